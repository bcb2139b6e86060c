"""The manifold of m x n matrices of rank r, as points (U, S, V) with W = U S V^T."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import rank_retractions
from ..draws import normal
from ..errors import ConfigError, NotOnManifoldError, ShapeError
from ..full_precision import full_precision
from ..gram import (
    Reduce,
    Tall,
    combine,
    gram,
    grams,
    keep_where,
    products,
    scale_displacements,
    split,
    subtract_points,
    zero_matrices,
)
from ..matfun import safe_root
from ..rank_retractions import Factors
from ..rank_transports import Turn, spread, transported
from ..registry import check_word
from ..retractions import OpenSum
from ..shapes import as_sizes, check_matrix, check_pair, compute_dtype
from ..transforms import without_derivative
from .base import Carrier, Manifold, carrier_from, register
from .stiefel import Stiefel

TRANSPORTS = ("projection", "none")


class USV(NamedTuple):
    """A point of `FixedRank`, W = U S V^T, or a tangent vector (Up, M, Vp) at one, U M V^T + Up V^T + U Vp^T."""

    U: Tensor
    S: Tensor
    V: Tensor


@register("FixedRank")
@dataclass(frozen=True)
class FixedRank(Manifold):
    """M_r = {W of shape m x n : rank W = r}, with the metric of the space around it.

    Points are `USV(U, S, V)` of shapes (*b, m, r), (*b, r, r), (*b, n, r): U and V with orthonormal columns, S
    invertible, diagonal or not. Tangent vectors (Up, M, Vp) of the same shapes, with U^T Up = 0 and V^T Vp = 0, stand
    for U M V^T + Up V^T + U Vp^T.

    Args:
        retraction: "svd" (the nearest matrix of rank r), "orthographic", or a name registered with
            ``rank_retractions.register``.
        transport: "projection" or "none": what `RiemannianWrapper` does with first moments; second moments, where
            there are any (Adam's), are carried along as variances.
        floor: smallest singular value of S, relative to its largest, that a step may leave; what is smaller is
            raised. 0, the default, raises StepError where rank is lost.

    Raises:
        UnknownNameError: a name that is not registered. ConfigError: a floor outside [0, 1).

    Reference: Vandereycken (2013), SIAM J. Optim. 23; Absil & Oseledets (2015), Comput. Optim. Appl. 62.
    """

    parts: ClassVar[int] = 3
    layout: ClassVar[str] = "triples U, S, V of shapes (*b, m, r), (*b, r, r), (*b, n, r)"
    lies: ClassVar[tuple[str, ...]] = ("columns", "columns", "columns")
    point_type: ClassVar[Any] = USV
    gradients: ClassVar[tuple[str, ...]] = ("factors", "projected")
    recognized: ClassVar[bool] = False  # one factor says nothing of its point
    small_parts: ClassVar[tuple[int, ...]] = (1,)

    retraction: str = "svd"
    transport: str = "projection"
    floor: float = 0.0

    def __post_init__(self) -> None:
        rank_retractions.get(self.retraction)
        check_word("transport", self.transport, TRANSPORTS)
        if not (isinstance(self.floor, (int, float)) and 0 <= self.floor < 1):
            raise ConfigError(
                f"FixedRank(floor={self.floor!r}); a number in [0, 1) is needed, for example 1e-3."
            )

    def whole_part(self) -> None:
        """Nothing: every retraction is a function of r x r matrices."""

    # Points

    @full_precision
    def residual(self, x: USV) -> Tensor:
        """max of |U^T U - I| and |V^T V - I|, (*b,)."""
        x = _checked("x", x)
        return self.stacked_residual(_stacks(_flatten(x))).reshape(x.S.shape[:-2])

    def stacked_residual(self, xs: Tall, reduce: Reduce | None = None) -> Tensor:
        """`residual` of stacks U, S, V of one height after the other, (B,)."""
        x = _factors(xs)
        return Stiefel().stacked_residual([*x.us, *x.vs], reduce).view(2, -1).amax(0)

    def check(self, x: USV) -> None:
        """Refuse what is not a point.

        Raises:
            ShapeError: not three real tensors (*b, m, r), (*b, r, r), (*b, n, r).
            NotOnManifoldError: columns of U or V are not orthonormal, or S is singular or not finite.
        """
        x = USV(*(t.detach() for t in _checked("x", x)))
        for name, factor in (("U", x.U), ("V", x.V)):
            try:
                Stiefel().check(factor)
            except NotOnManifoldError as error:
                raise NotOnManifoldError(str(error).replace("x has", f"{name} has", 1)) from None
        self.check_small([x.S])

    def check_small(self, parts: Sequence[Tensor]) -> None:
        """Refuse an S (*b, r, r) that no point has.

        Raises:
            NotOnManifoldError: singular or not finite.
        """
        (s,) = parts
        if s.numel() == 0:
            return
        if not bool(torch.isfinite(s).all()):
            raise NotOnManifoldError("S holds NaN or Inf; look where it was made.")
        values = torch.linalg.svdvals(s.double())
        ratio = (values[..., -1] / values[..., 0]).nan_to_num().min().item()
        if not ratio > torch.finfo(compute_dtype(s.dtype)).eps:
            raise NotOnManifoldError(
                f"S is singular (its smallest singular value is {ratio:.2g} of the largest), and a point has rank r "
                f"exactly: start from a small multiple of an orthogonal S instead of zero, or use a smaller rank."
            )

    @full_precision
    def random_point(
        self,
        *shape: int,
        rank: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> USV:
        """A point of (*b, m, n) matrices: U, V uniform, S diagonal with singular values uniform in [1/2, 3/2]."""
        *batch, m, n = _as_shape(shape, rank)
        options: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
        u = Stiefel().random_point(*batch, m, rank, **options)
        v = Stiefel().random_point(*batch, n, rank, **options)
        source = u.device if generator is None else generator.device
        values = torch.rand((*batch, rank), dtype=compute_dtype(u.dtype), device=source, generator=generator)
        return USV(u, torch.diag_embed(values + 0.5).to(u), v)

    @full_precision
    def project_point(self, z: Tensor, *, rank: int) -> USV:
        """The point nearest to a dense (*b, m, n) matrix: its truncated SVD.

        Raises:
            NotOnManifoldError: z is not finite, or its rank is lower.
        """
        if not isinstance(z, Tensor) or z.ndim < 2 or not z.is_floating_point():
            raise ShapeError("project_point needs a dense real matrix z of shape (*b, m, n).")
        _as_shape(z.shape, rank)
        if not bool(torch.isfinite(z).all()):
            raise NotOnManifoldError(
                "z holds NaN or Inf, and no matrix of rank r is nearest to it; look where it was made."
            )
        # float64: where singular values are close, float32 vectors are orthonormal to 1e-5 only.
        u, s, vh = torch.linalg.svd(z.double(), full_matrices=False)
        x = USV(u[..., :rank], torch.diag_embed(s[..., :rank]), vh[..., :rank, :].mT)
        self.check(USV(*(t.to(compute_dtype(z.dtype)) for t in x)))
        return USV(*(t.to(z.dtype).contiguous() for t in x))

    @full_precision
    def to_dense(self, x: USV) -> Tensor:
        """W = U S V^T, (*b, m, n)."""
        x = _checked("x", x)
        u, s, v = _lifted(x)
        return (u @ s @ v.mT).to(x.U.dtype)

    def dim(self, *shape: int, rank: int) -> int:
        """Dimension of the manifold of (*b, m, n) matrices: (m + n - r) r for each."""
        *batch, m, n = _as_shape(shape, rank)
        return math.prod(batch) * (m + n - rank) * rank

    # Tangent vectors

    @full_precision
    def project_tangent(self, x: USV, z: USV) -> USV:
        """(dU - U U^T dU, M, dV - V V^T dV): the orthogonal projection of coordinates (dU, M, dV)."""
        x, z = _checked("x", x, z=z)
        return _as_dtype(_tangent(_lifted(x), _lifted(z)), x.U.dtype)

    @full_precision
    def project_dense(self, x: USV, z: Tensor) -> USV:
        """The tangent vector nearest to a dense (*b, m, n) z: M = U^T z V, Up = z V - U M, Vp = z^T U - V M^T."""
        x = _checked("x", x)
        m, n = x.U.shape[-2], x.V.shape[-2]
        if not isinstance(z, Tensor) or z.shape != (*x.U.shape[:-2], m, n):
            raise ShapeError(f"z must be a dense tensor (*b, {m}, {n}) with the batch of the point.")
        if z.dtype != x.U.dtype or z.device != x.U.device:
            raise ShapeError(
                f"z is {z.dtype} on {z.device} and x.U is {x.U.dtype} on {x.U.device}; convert it with .to(...)."
            )
        u, _, v = _lifted(x)
        z = z.to(u.dtype)
        zv, ztu = z @ v, z.mT @ u
        inner = u.mT @ zv
        return _as_dtype(USV(zv - u @ inner, inner, ztu - v @ inner.mT), x.U.dtype)

    @full_precision
    def embed(self, x: USV, u: USV) -> Tensor:
        """The dense tangent matrix U M V^T + Up V^T + U Vp^T, (*b, m, n)."""
        x, u = _checked("x", x, u=u)
        dtype = x.U.dtype
        x, u = _lifted(x), _lifted(u)
        return ((x.U @ u.S + u.U) @ x.V.mT + x.U @ u.V.mT).to(dtype)

    @full_precision
    def random_tangent(self, x: USV, generator: torch.Generator | None = None) -> USV:
        """A tangent vector of unit norm."""
        x = _checked("x", x)
        lifted = _lifted(x)
        z = USV(*(normal(t.shape, t.dtype, t.device, generator).to(t.device) for t in lifted))
        u = _tangent(lifted, _tangent(lifted, z))
        size = self.norm(lifted, u)[..., None, None]
        return _as_dtype(USV(*(t / size for t in u)), x.U.dtype)

    @full_precision
    def gradient(self, x: USV, egrad: USV) -> USV:
        """Riemannian gradient from the ordinary gradients of the three factors.

        With G = df/dW these are gU = G V S^T, gS = U^T G V, gV = G^T U S, so that M = gS, Up = gU S^-T - U (...),
        Vp = gV S^-1 - V (...).

        Accuracy: the inverse of S is damped at rounding level; in float32 the error is about 1e-7 times the condition
        number of S. Layers that deliver G V and G^T U themselves (`RiemannLoRALinear`) need no inverse.
        """
        x, egrad = _checked("x", x, egrad=egrad)
        point, g = _flatten(x), _flatten(egrad)
        overlap = gram(point.us, g.us), gram(point.vs, g.vs)
        u = self._gradient(point, g, "factors", overlap)
        return _unflatten(x, u._replace(s=u.s.clone()))

    @full_precision
    def inner(self, x: USV, u: USV, v: USV) -> Tensor:
        """<u, v> = tr M^T M' + tr Up^T Up' + tr Vp^T Vp', the inner product of the dense matrices, (*b,)."""
        x, u, v = _checked("x", x, u=u, v=v)
        pairs = zip(_lifted(u), _lifted(v), strict=True)
        return torch.stack([(a * b).sum((-2, -1)) for a, b in pairs]).sum(0)

    def norm(self, x: USV, u: USV) -> Tensor:
        """Norm of a tangent vector, the Frobenius norm of the dense matrix, (*b,)."""
        return safe_root(self.inner(x, u, u))

    # Motion

    @without_derivative
    @full_precision
    def retract(self, x: USV, u: USV) -> USV:
        """The point R(x, u) for a tangent u; R(x, 0) is x bit for bit.

        Raises:
            StepError: the result has lost rank (and ``floor`` is 0), or u is too large for its squares.
        """
        x, u = _checked("x", x, u=u)
        return _unflatten(x, self._retract(_flatten(x), _flatten(u)))

    def exp(self, x: USV, u: USV) -> USV:
        """Refused: no closed geodesic of this metric is known; both retractions agree with it to second order."""
        raise ConfigError("no closed geodesic is known on FixedRank; use retract, which is of second order.")

    @full_precision
    def transport_vector(self, x: USV, u: USV, y: USV, v: USV) -> USV:
        """v, tangent at x, as a tangent vector at y = retract(x, u): the projection of the dense matrix."""
        x, u, y, v = _checked("x", x, u=u, y=y, v=v)
        return _unflatten(y, transported(Turn(_flatten(x), _flatten(y)), _flatten(v)))

    # On stacks

    def _gradient(
        self,
        x: Factors,
        g: Factors,
        arriving: str,
        overlap: tuple[Tensor, Tensor],
        out: Factors | None = None,
    ) -> Factors:
        """The tangent coordinates of g, whose overlap is (U^T gU, V^T gV); U and V parts go to out."""
        ku, kv = overlap
        if arriving == "factors":
            # In float64, through the singular values: S may be ill-conditioned.
            a, d, bh = torch.linalg.svd(x.s.double())
            damped = d / (d.square() + (torch.finfo(x.s.dtype).eps * d[..., :1]).square()).clamp_min(1e-300)
            inverse = ((bh.mT * damped[..., None, :]) @ a.mT).to(x.s.dtype)
            g = Factors(products(g.us, inverse.mT), g.s, products(g.vs, inverse))
            ku, kv = ku @ inverse.mT, kv @ inverse
        up = combine(g.us, x.us, ku, alpha=-1.0, out=None if out is None else out.us)
        vp = combine(g.vs, x.vs, kv, alpha=-1.0, out=None if out is None else out.vs)
        return Factors(up, g.s, vp)

    def _retract(
        self,
        x: Factors,
        d: Factors,
        overlap: tuple[Tensor, Tensor] | None = None,
        reduce: Reduce | None = None,
        out: Factors | None = None,
    ) -> Factors:
        still = _is_zero(d, reduce)
        retraction = rank_retractions.get(self.retraction)
        y = rank_retractions.retract(
            retraction, x, d, overlap=overlap, floor=self.floor, reduce=reduce, out=out
        )
        if still is None:
            return y
        s = torch.where(still[:, None, None], x.s, y.s)
        return Factors(keep_where(still, x.us, y.us), s, keep_where(still, x.vs, y.vs))

    # The beats of the optimizer's step: stacks U, S, V of one height after the other

    def stacked_gradient(
        self, xs: Tall, gs: Tall, *, arriving: str = "factors", reduce: Reduce | None = None
    ) -> Tensor:
        """Overwrite the stacks gs by tangent coordinates (Up, M, Vp); returns what every non-finite entry shows in."""
        x, g = _factors(xs), _factors(gs)
        shown = _shown(x, g, reduce)
        _write(self._gradient(x, g, arriving, _overlap(shown), out=g), gs)
        return shown

    def stacked_overlap(self, xs: Tall, ms: Tall, reduce: Reduce | None = None) -> Tensor:
        """Overwrite the moved points ms by displacements; returns U^T dU, M and V^T dV side by side, (B, r, 3 r)."""
        subtract_points(xs, ms)
        return _shown(_factors(xs), _factors(ms), reduce)

    def stacked_move(
        self,
        xs: Tall,
        ms: Tall,
        e: Tensor,
        scales: Sequence[float],
        *,
        drift: float,
        reduce: Reduce | None = None,
    ) -> list[OpenSum]:
        """Scale and retract the displacements that `stacked_overlap` left in ms: the new points."""
        overlap = None if scale_displacements(ms, scales) else _overlap(e)
        d = _factors(ms)
        y = self._retract(_factors(xs), d, overlap, reduce, out=d)
        return [(t, None) for t in _stacks(y)]

    def stacked_spectral(
        self, xs: Tall, ds: Tall, e: Tensor, rates: Sequence[float], reduce: Reduce | None = None
    ) -> Tensor:
        r"""Give every displacement, made tangent, the singular values rate and project; returns the overlap.

        With hu = Up^T Up and hv = Vp^T Vp the tangent matrix is [U, Qu] core [V, Qv]^T, core = [[M, hv^(1/2)],
        [hu^(1/2), 0]] of 2r x 2r; its orthogonal factor msign(core), in r-blocks, gives the new M, Up and Vp.
        Reference: RiemannLoRA / Riemannion (arXiv 2507.12142), equations 10 to 12.
        """
        x, d = _factors(xs), _factors(ds)
        wu, wv = _overlap(e)
        us, vs = combine(d.us, x.us, wu, alpha=-1.0), combine(d.vs, x.vs, wv, alpha=-1.0)
        hu, hv = grams((us, us), (vs, vs), reduce=reduce)
        m, up, vp = rank_retractions.spectral(
            d.s.double(), hu.double(), hv.double(), torch.finfo(x.s.dtype).eps
        )
        rate = torch.cat([m.new_full((len(s),), lr) for s, lr in zip(xs[1::3], rates[1::3], strict=True)])
        m, up, vp = ((rate[:, None, None] * t).to(x.s.dtype) for t in (m, up, vp))
        _write(Factors(products(us, up), m, products(vs, vp)), ds)
        return _shown(x, _factors(ds), reduce)

    def stacked_decay(
        self, xs: Tall, ds: Tall, e: Tensor, decays: Sequence[float], reduce: Reduce | None = None
    ) -> Tensor:
        """Add -decay W to every displacement; returns the overlap."""
        for s, m, decay in zip(xs[1::3], ds[1::3], decays[1::3], strict=True):
            m.sub_(s, alpha=decay)
        wu, wv = _overlap(e)
        return torch.cat((wu, _factors(ds).s, wv), -1)

    def stacked_distance(self, xs: Tall, ys: Tall, reduce: Reduce | None = None) -> float:
        """Sum of ||W+ - W||_F^2 as [U+ S+ - U S, U S] [V+, V+ - V]^T, in which nothing cancels."""
        x, y = _factors(xs), _factors(ys)
        before, after = products(x.us, x.s), products(y.us, y.s)
        left = [torch.cat((b - a, a), -1) for a, b in zip(before, after, strict=True)]
        right = [torch.cat((b, b - a), -1) for a, b in zip(x.vs, y.vs, strict=True)]
        a, b = grams((left, left), (right, right), reduce=reduce)
        return (a * b).sum().item()

    def stacked_transporter(
        self, xs: Tall, ms: Tall, scales: Sequence[float], reduce: Reduce | None = None
    ) -> Carrier | None:
        """What carries moments from the stacks xs to the new ones; None for "none"."""
        if self.transport == "none":
            return None

        def turn(index: Sequence[int], ys: Tall) -> Turn:
            return Turn(_factors([xs[i] for i in index]), _factors(ys), reduce)

        def carry(by: Callable[[Turn, Factors, Factors], Factors]) -> Callable[[Turn, Tall], Tall]:
            return lambda turn, vs: _stacks(by(turn, v := _factors(vs), v))

        return carrier_from(turn, carry(transported), carry(spread))


def _is_zero(d: Factors, reduce: Reduce | None) -> Tensor | None:
    """Mask (B,) of the displacements that are exactly zero; on the CPU None when there is none."""
    mask = None
    # S first, which is whole on every rank and mostly settles it without a look at the tall parts.
    for part, over in (([d.s], None), (d.us, reduce), (d.vs, reduce)):
        zero = zero_matrices(part, over)
        if zero is None:
            return None
        mask = zero if mask is None else mask & zero
    return mask


def _shown(x: Factors, z: Factors, reduce: Reduce | None) -> Tensor:
    u, v = grams((x.us, z.us), (x.vs, z.vs), reduce=reduce)
    return torch.cat((u, z.s, v), -1)


def _overlap(shown: Tensor) -> tuple[Tensor, Tensor]:
    """The outer two of the three matrices of `_shown`."""
    r = shown.shape[-2]
    return shown[..., :r], shown[..., 2 * r :]


def _factors(stacks: Tall) -> Factors:
    """[U1, S1, V1, U2, ...] by heights as lists of U and V and one batch of S."""
    small = list(stacks[1::3])
    return Factors(list(stacks[0::3]), small[0] if len(small) == 1 else torch.cat(small), list(stacks[2::3]))


def _stacks(x: Factors) -> list[Tensor]:
    """The inverse of `_factors`."""
    return [t for triple in zip(x.us, split(x.s, x.us), x.vs, strict=True) for t in triple]


def _write(x: Factors, out: Tall) -> None:
    for t, o in zip(_stacks(x), out, strict=True):
        if t is not o:
            o.copy_(t)


def _lifted(x: USV) -> USV:
    """Half precision as float32."""
    return _as_dtype(x, compute_dtype(x.U.dtype))


def _as_dtype(x: USV, dtype: torch.dtype) -> USV:
    return USV(*(t.to(dtype) for t in x))


def _tangent(x: USV, z: USV) -> USV:
    return USV(z.U - x.U @ (x.U.mT @ z.U), z.S.clone(), z.V - x.V @ (x.V.mT @ z.V))


def _flatten(x: USV) -> Factors:
    """Any batch dimensions as one."""
    u, s, v = (t.to(compute_dtype(t.dtype)).reshape(-1, *t.shape[-2:]) for t in x)
    return Factors([u], s, [v])


def _unflatten(like: USV, x: Factors) -> USV:
    flat = (x.us[0], x.s, x.vs[0])
    return USV(*(t.reshape(o.shape).to(o.dtype) for t, o in zip(flat, like, strict=True)))


def _checked(name: str, x: object, **others: object) -> Any:
    """The point, and what lives at it, as USV tuples of fitting tensors.

    Raises:
        ShapeError: not three real tensors (*b, m, r), (*b, r, r), (*b, n, r) of one dtype and device, or the others
            are not like them.
    """
    point = _as_usv(name, x)
    check_matrix(f"{name}.U", point.U)
    check_matrix(f"{name}.V", point.V)
    *batch, _, r = point.U.shape
    if point.S.shape != (*batch, r, r) or point.V.shape[:-2] != tuple(batch) or point.V.shape[-1] != r:
        shapes = ", ".join(str(tuple(t.shape)) for t in point)
        raise ShapeError(f"{name} has the shapes {shapes}; (*b, m, r), (*b, r, r), (*b, n, r) are needed.")
    for part in ("S", "V"):
        t = getattr(point, part)
        if t.dtype != point.U.dtype or t.device != point.U.device:
            raise ShapeError(
                f"{name}.{part} is {t.dtype} on {t.device} and {name}.U is {point.U.dtype} on {point.U.device}; "
                f"convert them to one dtype and device with .to(...)."
            )
    found = [point]
    for other_name, other in others.items():
        z = _as_usv(other_name, other)
        for part in USV._fields:
            check_pair(f"{name}.{part}", getattr(point, part), f"{other_name}.{part}", getattr(z, part))
        found.append(z)
    return found if others else point


def _as_usv(name: str, x: object) -> USV:
    if isinstance(x, Tensor) or not isinstance(x, Sequence) or len(x) != 3:
        raise ShapeError(
            f"{name} is a {type(x).__name__}; three tensors USV(U, S, V) are needed: project_point(W, rank=r) makes a "
            f"point of a dense matrix, project_dense(x, G) the Riemannian gradient of a dense gradient."
        )
    for part, t in zip(USV._fields, x, strict=True):
        if not isinstance(t, Tensor):
            raise ShapeError(f"{name}.{part} is a {type(t).__name__}; a torch tensor is needed.")
    return USV(*x)


def _as_shape(shape: tuple[Any, ...], rank: object) -> tuple[int, ...]:
    """(m, n) or ((m, n),), with a rank that fits."""
    shape = as_sizes(shape, "(*b, m, n), for example (64, 32)")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= min(shape[-2:]):
        raise ShapeError(
            f"the rank is {rank!r}; (*b, m, n) = {shape} takes an integer from 1 to {min(shape[-2:])}."
        )
    return shape
