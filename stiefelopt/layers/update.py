"""What a low-rank layer adds to its base's output, scale (h V) S^T U^T, and how it is differentiated."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..shapes import HALF


def beside(a: Tensor, b: Tensor | None) -> Tensor:
    """[a b], or a where there is no b."""
    return a if b is None else torch.cat((a, b), -1)


def _own(z: Tensor, u: Tensor, u0: Tensor | None) -> Tensor:
    """The columns of u's in what was multiplied by [u u0]."""
    return z if u0 is None else z[..., : u.shape[-1]]


def plus_product(y: Tensor, z: Tensor, wide: Tensor) -> Tensor:
    """y + z wide of rows y and z, in y's dtype: one pass over the wide result where the dtypes allow it."""
    if y.dtype != z.dtype or y.dtype != wide.dtype or y.device.type != z.device.type:
        product = z @ wide
        if y.dtype in HALF and product.dtype not in HALF:
            return product.add_(y).to(y.dtype)  # rounded once
        return y + product.to(y.dtype)
    return torch.addmm(y, z, wide)


def factors_of_update(
    h: Tensor, u: Tensor, s: Tensor, v: Tensor, scale: float, u0: Tensor | None, v0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A (..., k) and b (k, m) whose product is scale (h v) s^T u^T, less scale (h v0) u0^T.

    Args:
        h: (..., n), the layer's input.
        u: (m, r), and u0 like it.
        s: (r, r), or its diagonal (r,).
        v: (n, r), and v0 like it.
        scale: a number.
    """
    return _factors(scale * F.linear(h, _in_rows(beside(v, v0))), s, u, u0)


def _factors(z: Tensor, s: Tensor, u: Tensor, u0: Tensor | None) -> tuple[Tensor, Tensor]:
    """A (..., k) and b (k, m) whose product is z s^T u^T, or z s^T u^T - z0 u0^T of [z z0].

    s goes to u, which leaves the product in rows, see `_in_rows`. With fewer than r rows in z that is the longer way,
    and in half precision a small s u^T may underflow: there s goes to z.
    """
    own = _own(z, u, u0)
    if s.ndim == 1:
        own, wide = own * s, _in_rows(u)
    elif z.dtype in HALF or own.shape[:-1].numel() < u.shape[-1]:
        own, wide = F.linear(own, s), u.t()
    else:
        wide = torch.mm(s.t(), u.t())
    if u0 is None:
        return own, wide
    return torch.cat((own, -z[..., u.shape[-1] :]), -1), torch.cat((wide, u0.t()))


def _in_rows(t: Tensor) -> Tensor:
    """t^T; on a CPU lying row after row, where products of many rows with it, and its gradient, take half the time."""
    return t.t().contiguous() if t.device.type == "cpu" else t.t()


class _Saved(NamedTuple):
    """From forward to backward: z is scale h V, the rest are arguments."""

    h: Tensor
    z: Tensor
    u: Tensor
    u0: Tensor | None
    # For dL/dh, or what is not projected.
    s: Tensor | None
    v: Tensor | None
    v0: Tensor | None
    weight: Tensor | None


class LowRankUpdate(torch.autograd.Function):
    """y + scale (h V) S^T U^T, with the FLOPs and saved tensors of plain LoRA.

    With a pair (U0, V0) beside it, y - scale (h V0) U0^T on top: the same products with 2 r columns, and gradients for
    U, S, V alone. Given the base's weight and bias instead of y, it is y = h weight^T + bias, and both sums, of y and
    of dL/dh, are made in place.

    With G = dL/d(U S V^T) the gradients of U, S, V are G V S^T, U^T G V, G^T U S; or, where ``projected``, the
    "gradients" G V, U^T G V, G^T U, which cannot be differentiated once more. (Here G V and G^T U are made as their
    transposes, as a CPU prefers by a factor of two.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor | None,
        h: Tensor,
        u: Tensor,
        s: Tensor,
        v: Tensor,
        scale: float,
        projected: bool,
        u0: Tensor | None,
        v0: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The sum, of y's shape or with h's leading dimensions."""
        rows = h.reshape(-1, h.shape[-1])
        z = torch.mm(rows, beside(v, v0)).mul_(scale)
        ctx.scale, ctx.projected = scale, projected
        for_dh = (None,) * 4 if projected and not ctx.needs_input_grad[1] else (s, v, v0, weight)
        ctx.save_for_backward(*_Saved(h, _own(z, u, u0), u, u0, *for_dh))
        thin, wide = _factors(z, s, u, u0)
        if y is None:
            out = F.linear(rows, cast(Tensor, weight), bias).addmm_(thin, wide)
        else:
            out = plus_product(y.reshape(-1, y.shape[-1]), thin, wide)
        shape = (*h.shape[:-1], u.shape[0])
        # Others may write to it in place, which autograd forbids for a view; the compiler knows no resize_.
        return out.view(shape) if torch.compiler.is_compiling() else out.resize_(shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, h, U, S, V."""
        saved = _Saved(*ctx.saved_tensors)
        if not torch.is_grad_enabled():
            grads = _gradients(ctx, dy, saved)
        elif ctx.projected:
            with torch.no_grad():
                grads = _gradients(ctx, dy, saved)
            grads = _NotTwice.apply(len(saved), *saved, *grads)
        else:
            grads = _differentiable_gradients(ctx, dy, saved)
        return dy if ctx.needs_input_grad[0] else None, *grads, *[None] * 6


def _gradients(ctx: Any, dy: Tensor, saved: _Saved) -> tuple[Tensor | None, ...]:
    """Of h, U, S, V."""
    h, z, u, u0, s, v, v0, weight = saved
    rows, columns = h.reshape(-1, h.shape[-1]), dy.reshape(-1, dy.shape[-1])
    if columns.dtype != h.dtype:
        columns = columns.to(h.dtype)
    inner = torch.mm(columns, beside(u, u0))
    own = _own(inner, u, u0)
    diagonal = s is not None and s.ndim == 1
    st = s if s is None or diagonal else s.t()
    gs = (own * z).sum(0) if diagonal else torch.mm(own.t(), z)
    inner.mul_(ctx.scale)
    to_u, to_v = (None, None) if ctx.projected else (st, s)
    gu, gv = _turned(torch.mm(z.t(), columns), to_u), _turned(torch.mm(own.t(), rows), to_v)
    if not ctx.needs_input_grad[1] or st is None or v is None:
        return None, gu, gs, gv
    thin, wide = _factors(inner, st, v, v0)
    dh = torch.mm(thin, wide) if weight is None else torch.mm(columns, weight).addmm_(thin, wide)
    return dh.view(h.shape), gu, gs, gv


def _turned(g: Tensor, t: Tensor | None) -> Tensor:
    """g^T t (n, r), lying in rows; t is (r, r), a diagonal (r,) or None, the identity."""
    if t is None:
        return g.t().contiguous()
    return torch.mm(g.t(), t) if t.ndim == 2 else (g * t[:, None]).t().contiguous()


def _differentiable_gradients(ctx: Any, dy: Tensor, saved: _Saved) -> tuple[Tensor | None, ...]:
    """`_gradients` as functions of h, U, S, V and dy: create_graph=True."""
    # By other names: h may itself be made from u, and only what y owes each of them directly is asked for.
    own = [t.view_as(t) for t in (saved.h, saved.u, saved.s, saved.v) if t is not None]
    h, u, s, v = own
    thin, wide = factors_of_update(h, u, s, v, ctx.scale, saved.u0, saved.v0)
    y = thin @ wide if saved.weight is None else F.linear(h, saved.weight) + thin @ wide
    found = iter(torch.autograd.grad(y, [t for t in own if t.requires_grad], dy, create_graph=True))
    return tuple(next(found) if t.requires_grad else None for t in own)


class _NotTwice(torch.autograd.Function):
    """Projected gradients as functions of what they are made of, that refuse to be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[count:]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise ConfigError(
            "RiemannLoRALinear is differentiable once: its gradients G V, U^T G V, G^T U are no derivatives of a "
            "function. Use StelLALinear where a loss contains gradients, or merge() what is only to be differentiated."
        )
