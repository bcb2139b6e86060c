"""The manifold of m x n matrices of rank r, as pairs (A, B) with W = B A: the factors of plain LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..draws import normal
from ..errors import ConfigError, NotOnManifoldError, ShapeError
from ..full_precision import full_precision
from ..gram import Reduce, Tall, gram, keep_where, scale_displacements, subtract_points, zero_matrices
from ..matfun import safe_root
from ..rank_pairs import (
    Frame,
    Overlap,
    Pairs,
    Turn,
    gradient,
    overlap_of,
    plus,
    retract,
    spectral,
    spread,
    tangent,
    times,
    transported,
)
from ..registry import check_word
from ..retractions import OpenSum
from ..shapes import check_matrix, check_pair, compute_dtype
from ..transforms import without_derivative
from .base import Carrier, Manifold, carrier_from, register
from .fixed_rank import TRANSPORTS, FixedRank


class AB(NamedTuple):
    """A point of `FixedRankPair`, W = B A, or coordinates (Y^T, X) of a tangent vector X V^T + U Y^T at one."""

    A: Tensor
    B: Tensor


@register("FixedRankPair")
@dataclass(frozen=True)
class FixedRankPair(Manifold):
    """M_r = {W of shape m x n : rank W = r} on the factors of plain LoRA, with the metric of the space around it.

    Points are `AB(A, B)` of shapes (*b, r, n) and (*b, m, r), W = B A: any two factors, nothing is normalized. The
    geometry is that of `FixedRank` and depends on W alone. With the orthonormal bases V = A^T (A A^T)^(-1/2) and
    U = B (B^T B)^(-1/2), tangent vectors `AB(Y^T, X)` of the same shapes, V^T Y = 0, stand for X V^T + U Y^T, and
    ||xi||^2 = ||X||^2 + ||Y||^2. One step of SGD with learning rate lr moves W by -lr times the Riemannian gradient;
    AdamW moves every entry of X and Y by about lr, however W is split into A and B.

    W of lower rank is a point too (B = 0, where LoRA starts): inverse roots are pseudo-inverses, in which a singular
    value below 1.2e-7 of its factor's largest counts as zero. There, the tangent vectors are dB A + B dA. At B = 0
    these are the dB A; the first step moves B only.

    A step keeps A A^T, and turns the rows of A as little as it can; B takes up all else. (Where A is singular, or B a
    hundred times as large as A, A is scaled up to what B needs.)

    Args:
        transport: "projection" or "none": what `RiemannianWrapper` does with first moments; second moments, where
            there are any (Adam's), are carried along as variances.

    Raises:
        UnknownNameError: an unknown transport.

    Accuracy: where a factor has singular value s, in units of its largest, the coordinates of a gradient are right to
        eps / s, and elsewhere not touched by it, but for Y, which knows V to eps times the condition number of A; with
        half-precision autocast gradients are right to 4e-3, and s weaker than that makes no sense.
    Reference: Vandereycken (2013), SIAM J. Optim. 23; on factors: Mishra et al. (2014), Comput. Stat. 29.
    """

    parts: ClassVar[int] = 2
    layout: ClassVar[str] = "pairs A, B of shapes (*b, r, n), (*b, m, r)"
    lies: ClassVar[tuple[str, ...]] = ("rows", "columns")
    point_type: ClassVar[Any] = AB
    recognized: ClassVar[bool] = False  # one factor says nothing of its point

    transport: str = "projection"

    def __post_init__(self) -> None:
        check_word("transport", self.transport, TRANSPORTS)

    # Points

    def residual(self, x: AB) -> Tensor:
        """Distance from the constraint, (*b,): 0, since any two factors are a point."""
        x = _checked("x", x)[0]
        return x.A.new_zeros(x.A.shape[:-2], dtype=compute_dtype(x.A.dtype))

    def check(self, x: AB) -> None:
        """Refuse what is not a point.

        Raises:
            ShapeError: not two real tensors (*b, r, n), (*b, m, r) with r <= m, n.
            NotOnManifoldError: NaN or Inf.
        """
        for name, factor in zip(AB._fields, _checked("x", x)[0], strict=True):
            if not bool(torch.isfinite(factor.detach()).all()):
                raise NotOnManifoldError(f"{name} holds NaN or Inf; look where it was made.")

    def random_point(
        self,
        *shape: int,
        rank: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> AB:
        """A balanced point of (*b, m, n) matrices: row and column space uniform, singular values in [1/2, 3/2]."""
        return _balanced(
            *FixedRank().random_point(*shape, rank=rank, dtype=dtype, device=device, generator=generator)
        )

    def project_point(self, z: Tensor, *, rank: int) -> AB:
        """The point nearest to a dense (*b, m, n) matrix: its truncated SVD, with B^T B = A A^T.

        Raises:
            NotOnManifoldError: z is not finite, or its rank is lower.
        """
        return _balanced(*FixedRank().project_point(z, rank=rank))

    @full_precision
    def to_dense(self, x: AB) -> Tensor:
        """W = B A, (*b, m, n)."""
        x = _checked("x", x)[0]
        dtype = compute_dtype(x.A.dtype)
        return (x.B.to(dtype) @ x.A.to(dtype)).to(x.A.dtype)

    def dim(self, *shape: int, rank: int) -> int:
        """Dimension of the manifold of (*b, m, n) matrices: (m + n - r) r for each."""
        return FixedRank().dim(*shape, rank=rank)

    # Tangent vectors

    @full_precision
    def project_tangent(self, x: AB, z: AB) -> AB:
        """The orthogonal projection of coordinates (Y^T, X): Y - V V^T Y, and X."""
        x, z = _checked("x", x, z=z)
        return _unflatten(x, tangent(Frame(_flatten(x)), _flatten(z)))

    @full_precision
    def project_dense(self, x: AB, z: Tensor) -> AB:
        """The tangent vector nearest to a dense (*b, m, n) z: X = z V, Y = (I - V V^T) z^T U."""
        x = _checked("x", x)[0]
        if not isinstance(z, Tensor) or z.shape != (*x.B.shape[:-1], x.A.shape[-1]):
            shape = (*x.B.shape[:-1], x.A.shape[-1])
            raise ShapeError(f"z must be a dense tensor of shape {shape}, with the batch of the point.")
        if z.dtype != x.A.dtype or z.device != x.A.device:
            raise ShapeError(
                f"z is {z.dtype} on {z.device} and x.A is {x.A.dtype} on {x.A.device}; convert it with .to(...)."
            )
        point = _flatten(x)
        dense = z.to(point.ls[0].dtype).reshape(-1, *z.shape[-2:])
        g = Pairs([dense.mT @ point.ls[0]], [dense @ point.rs[0]])
        return _unflatten(x, gradient(Frame(point), g))

    @full_precision
    def embed(self, x: AB, u: AB) -> Tensor:
        """The dense tangent matrix X V^T + U Y^T, (*b, m, n)."""
        x, u = _checked("x", x, u=u)
        f, v = Frame(_flatten(x)), _flatten(u)
        bases = times(f.x.rs, f.a.inverse)[0], times(f.x.ls, f.b.inverse)[0]
        dense = v.ls[0] @ bases[0].mT + bases[1] @ v.rs[0].mT
        return dense.reshape(*x.B.shape[:-1], x.A.shape[-1]).to(x.A.dtype)

    @full_precision
    def random_tangent(self, x: AB, generator: torch.Generator | None = None) -> AB:
        """A tangent vector of unit norm."""
        x = _checked("x", x)[0]
        z = AB(*(normal(t.shape, t.dtype, t.device, generator).to(t) for t in x))
        u = self.project_tangent(x, self.project_tangent(x, z))
        size = self.norm(x, u)[..., None, None]
        return AB(*((t / size).to(x.A.dtype) for t in u))

    @full_precision
    def gradient(self, x: AB, egrad: AB) -> AB:
        """Riemannian gradient from the ordinary gradients of the two factors.

        With G = df/dW these are gA = B^T G, gB = G A^T, so that X = G V = gB (A A^T)^(-1/2) and
        Y = (I - V V^T) gA^T (B^T B)^(-1/2): r x r solves.
        """
        x, egrad = _checked("x", x, egrad=egrad)
        return _unflatten(x, gradient(Frame(_flatten(x)), _flatten(egrad)))

    @full_precision
    def inner(self, x: AB, u: AB, v: AB) -> Tensor:
        """<u, v> = tr X^T X' + tr Y^T Y', the inner product of the dense matrices, (*b,)."""
        x, u, v = _checked("x", x, u=u, v=v)
        dtype = compute_dtype(x.A.dtype)
        return sum((a.to(dtype) * b.to(dtype)).sum((-2, -1)) for a, b in zip(u, v, strict=True))  # type: ignore[return-value]

    def norm(self, x: AB, u: AB) -> Tensor:
        """Norm of a tangent vector, the Frobenius norm of the dense matrix, (*b,)."""
        return safe_root(self.inner(x, u, u))

    # Motion

    @without_derivative
    @full_precision
    def retract(self, x: AB, u: AB) -> AB:
        """The pair of the matrix of rank r nearest to W + u (order 2), in which A A^T is what it was.

        R(x, 0) is x bit for bit.
        """
        x, u = _checked("x", x, u=u)
        return _unflatten(x, _moved(Frame(_flatten(x)), _flatten(u)))

    def exp(self, x: AB, u: AB) -> AB:
        """Refused: no closed geodesic of this metric is known; the retraction agrees with it to second order."""
        raise ConfigError(
            "no closed geodesic is known on FixedRankPair; use retract, which is of second order."
        )

    @full_precision
    def transport_vector(self, x: AB, u: AB, y: AB, v: AB) -> AB:
        """v, tangent at x, as a tangent vector at y = retract(x, u): the projection of the dense matrix."""
        x, u, y, v = _checked("x", x, u=u, y=y, v=v)
        turn = Turn(Frame(_flatten(x)), Frame(_flatten(y)))
        return _unflatten(y, transported(turn, _flatten(v)))

    # The beats of the optimizer's step: stacks A^T, B of one height after the other

    def stacked_gradient(
        self, xs: Tall, gs: Tall, *, arriving: str = "factors", reduce: Reduce | None = None
    ) -> Tensor:
        """Overwrite the stacks gs by coordinates (Y, X); returns norms of columns, in which non-finite ones show."""
        shown = [torch.linalg.vector_norm(t, dim=-2, keepdim=True) for t in (*xs, *gs)]
        _write(gradient(Frame(_pairs(xs), reduce), _pairs(gs)), gs)
        half = len(xs)
        pieces = [
            torch.cat((*shown[i : i + 2], *shown[half + i : half + i + 2]), -1) for i in range(0, half, 2)
        ]
        return torch.cat(pieces)

    def stacked_overlap(self, xs: Tall, ms: Tall, reduce: Reduce | None = None) -> Tensor:
        """Overwrite the moved points ms by displacements (Y, X); returns their `Overlap` side by side, (B, r, 4 r)."""
        subtract_points(xs, ms)
        return torch.cat(overlap_of(_pairs(xs), _pairs(ms), reduce), -1)

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
        y = _moved(Frame(_pairs(xs), reduce), _pairs(ms), overlap, reduce)
        return [(t, None) for t in _stacks(y)]

    def stacked_spectral(self, xs: Tall, ds: Tall, e: Tensor, rates: Sequence[float]) -> Tensor:
        """Give every displacement, made tangent, the singular values rate and project; returns the overlap."""
        x, d = _pairs(xs), _pairs(ds)
        rate = torch.cat([e.new_full((len(x),), lr) for x, lr in zip(xs[0::2], rates[0::2], strict=True)])
        _write(spectral(Frame(x), d, _overlap(e), rate), ds)
        return torch.cat(overlap_of(x, d), -1)

    def stacked_decay(self, xs: Tall, ds: Tall, e: Tensor, decays: Sequence[float]) -> Tensor:
        """Add -decay W to every displacement, X - decay B (A A^T)^(1/2); returns the overlap."""
        x, d = _pairs(xs), _pairs(ds)
        share = torch.cat([e.new_full((len(x),), k) for x, k in zip(xs[0::2], decays[0::2], strict=True)])
        plus(d.ls, x.ls, share[:, None, None] * Frame(x).a.root, alpha=-1.0, out=d.ls)
        return torch.cat(overlap_of(x, d), -1)

    def stacked_distance(self, xs: Tall, ys: Tall) -> float:
        """Sum of ||W+ - W||_F^2 as [B+ - B, B] [A+; A+ - A], in which nothing cancels."""
        x, y = _pairs(xs), _pairs(ys)
        left = [torch.cat((b - a, a), -1) for a, b in zip(x.ls, y.ls, strict=True)]
        right = [torch.cat((b, b - a), -1) for a, b in zip(x.rs, y.rs, strict=True)]
        return (gram(left, left) * gram(right, right)).sum().item()

    def stacked_transporter(self, xs: Tall, ms: Tall, scales: Sequence[float]) -> Carrier | None:
        """What carries moments from the stacks xs to the new ones; None for "none"."""
        if self.transport == "none":
            return None

        def turn(index: Sequence[int], ys: Tall) -> Turn:
            return Turn(Frame(_pairs([xs[i] for i in index])), Frame(_pairs(ys)))

        return carrier_from(
            turn,
            lambda turn, vs: _stacks(transported(turn, _pairs(vs))),
            lambda turn, vs: _stacks(spread(turn, _pairs(vs))),
        )


def _moved(f: Frame, d: Pairs, overlap: Overlap | None = None, reduce: Reduce | None = None) -> Pairs:
    """`retract`, where a displacement is zero the point bit for bit."""
    masks = [zero_matrices(part) for part in d]
    y = retract(f, d, overlap, reduce)
    if any(mask is None for mask in masks):
        return y
    still = masks[0] & masks[1]  # type: ignore[operator]
    return Pairs(keep_where(still, f.x.rs, y.rs), keep_where(still, f.x.ls, y.ls))


def _overlap(e: Tensor) -> Overlap:
    return Overlap(*e.chunk(4, -1))


def _pairs(stacks: Tall) -> Pairs:
    """[A1^T, B1, A2^T, ...] by heights."""
    return Pairs(list(stacks[0::2]), list(stacks[1::2]))


def _stacks(x: Pairs) -> list[Tensor]:
    """The inverse of `_pairs`."""
    return [t for pair in zip(x.rs, x.ls, strict=True) for t in pair]


def _write(x: Pairs, out: Tall) -> None:
    for t, o in zip(_stacks(x), out, strict=True):
        o.copy_(t)


def _flatten(x: AB) -> Pairs:
    """Any batch dimensions as one, half precision lifted, A seen from its rows."""
    a, b = (t.to(compute_dtype(t.dtype)).reshape(-1, *t.shape[-2:]) for t in x)
    return Pairs([a.mT], [b])


def _unflatten(like: AB, x: Pairs) -> AB:
    flat = x.rs[0].mT, x.ls[0]
    return AB(*(t.reshape(o.shape).to(o.dtype).contiguous() for t, o in zip(flat, like, strict=True)))


def _balanced(u: Tensor, s: Tensor, v: Tensor) -> AB:
    """The pair of a diagonal S: B = U S^(1/2), A = S^(1/2) V^T."""
    root = s.diagonal(dim1=-2, dim2=-1).sqrt()
    return AB((v * root[..., None, :]).mT.contiguous(), u * root[..., None, :])


def _checked(name: str, x: object, **others: object) -> list[AB]:
    """The point, and what lives at it, as AB tuples of fitting tensors.

    Raises:
        ShapeError: not two real tensors (*b, r, n), (*b, m, r) of one dtype and device, or the others are not like
            them.
    """
    point = _as_ab(name, x)
    check_matrix(f"{name}.B", point.B)
    if point.A.shape[:-1] != (*point.B.shape[:-2], point.B.shape[-1]) or point.A.ndim < 2:
        raise ShapeError(
            f"{name} has the shapes {tuple(point.A.shape)}, {tuple(point.B.shape)}; A (*b, r, n) and B (*b, m, r) "
            f"are needed, in this order."
        )
    check_matrix(f"{name}.A^T", point.A.mT)
    if point.A.dtype != point.B.dtype or point.A.device != point.B.device:
        raise ShapeError(
            f"{name}.A is {point.A.dtype} on {point.A.device} and {name}.B is {point.B.dtype} on {point.B.device}; "
            f"convert them to one dtype and device with .to(...)."
        )
    found = [point]
    for other_name, other in others.items():
        z = _as_ab(other_name, other)
        for part in AB._fields:
            check_pair(f"{name}.{part}", getattr(point, part), f"{other_name}.{part}", getattr(z, part))
        found.append(z)
    return found


def _as_ab(name: str, x: object) -> AB:
    if isinstance(x, Tensor) or not isinstance(x, Sequence) or len(x) != 2:
        raise ShapeError(
            f"{name} is a {type(x).__name__}; two tensors AB(A, B) are needed: project_point(W, rank=r) makes them "
            f"from a dense matrix."
        )
    for part, t in zip(AB._fields, x, strict=True):
        if not isinstance(t, Tensor):
            raise ShapeError(f"{name}.{part} is a {type(t).__name__}; a torch tensor is needed.")
    return AB(*x)
