"""Retractions on the manifold of fixed-rank matrices: a few lines of r x r algebra each.

At W = U S V^T and along the tangent vector U M V^T + Up V^T + U Vp^T a retraction is a function of the r x r
matrices c = S + M, hu = Up^T Up and hv = Vp^T Vp alone,

    au, bu, s, av, bv = f(c, hu, hv)        U+ = U au + Up bu,  S+ = s,  V+ = V av + Vp bv.

Everything else is the library's, the same for all: projecting, the zero step, the gauge (U+ and V+ turned so that
U^T U+ and V^T V+ are symmetric and positive), the correction of what rounding leaves, and the loss of rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from . import core_svd
from .core_svd import Coefficients
from .errors import StepError
from .gram import Reduce, Tall, gram, grams, identity_like, mix
from .matfun import distance_from_identity, inverse_sqrt_increment, inverse_symmetric_root
from .registry import Registry
from .retractions import close, normalize, polar
from .shapes import check_count, check_returned
from .transforms import host_can_look

# Condition number of S + M up to which `orthographic` is right to 1e-5 in float32.
ORTHOGRAPHIC_LIMIT = 1e4
# Error of the Gram of U+, as the small algebra foresees it, from which on float32 products are not good enough.
HARD = 1e-4
# The same error, in eps, up to which it is lost in the rounding of U+ itself: measured at r = 16, the bound being about
# ten times too large, U+ is as orthonormal as ever up to 16, and less so by half at 100.
SURE = 16
# Singular value, relative to the norm, that a float64 Gram shows beyond doubt.
CLEAR = 1e-6
# ||a^T a - I||_F up to which the gauge is found by matrix products, six or fewer.
NEARLY_ORTHOGONAL = 0.25
# ||a - a^T||_F, relative, up to which U^T U+ = a counts as symmetric.
SYMMETRIC = 1e-12
NOT_FINITE = "the displacement is not finite, or too large for its squares: clip the gradient"


Small = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class RankRetraction:
    """A retraction of `FixedRank` as a value.

    Attributes:
        name: its registered name.
        function: the small part, ``f(c, hu, hv) -> (au, bu, s, av, bv)``.
        order: declared order of agreement with the geodesic of the embedded metric.
        iterative: whether the function takes ``eps``, the accuracy that the points' dtype asks for.
    """

    name: str
    function: Small = field(repr=False)
    order: int = 2
    iterative: bool = False

    def coefficients(self, c: Tensor, hu: Tensor, hv: Tensor, eps: float = 0.0) -> Coefficients:
        """The small part as it was registered, no gauge fixed: all arguments (*b, r, r).

        Raises:
            StepError: it is not five matrices of that shape.
        """
        found = self.function(c, hu, hv, eps) if self.iterative else self.function(c, hu, hv)
        family, called = "fixed-rank retraction", "it maps c, hu and hv, (B, r, r), to au, bu, s, av and bv"
        parts = check_count(family, self.name, found, Coefficients._fields)
        return Coefficients(*(check_returned(family, self.name, t, c.shape, called) for t in parts))


_registry: Registry[RankRetraction] = Registry("fixed-rank retraction")
names, get = _registry.names, _registry.get


def register(name: str, *, order: int = 1, iterative: bool = False) -> Callable[[Small], RankRetraction]:
    """Decorator that adds a fixed-rank retraction.

    Args:
        name: the word that ``FixedRank(retraction=...)`` will accept.
        order: 1 or 2.
        iterative: whether the function takes a fourth argument, the eps of the points' dtype.

    The decorated function is ``f(c, hu, hv) -> (au, bu, s, av, bv)``, see the module; it computes in float64.

    Raises:
        ConfigError: not a name, or one that is taken.
    """
    _registry.check_name(name)
    return lambda function: _registry.add(name, RankRetraction(name, function, order, iterative))


@register("svd", order=2, iterative=True)
def svd(c: Tensor, hu: Tensor, hv: Tensor, eps: float = 0.0) -> Coefficients:
    """The rank-r matrix nearest to W + xi: a truncated SVD of the 2r x 2r core [[c, hv^(1/2)], [hu^(1/2), 0]].

    No QR of anything tall and, where the step is shorter than the singular values of W, no LAPACK; see `core_svd`.
    """
    return core_svd.truncated(c, hu, hv, eps=eps)


@register("orthographic", order=2)
def orthographic(c: Tensor, hu: Tensor, hv: Tensor) -> Coefficients:
    """The matrix of rank r whose difference to W + xi is normal at W: (U + Up c^-1) c (V + Vp c^-T)^T.

    Only for a well-conditioned c; S+ takes up the two r x r factors that orthonormalize. Reference: Absil & Oseledets
    (2015), section 3.2.
    """
    a, d, bh = torch.linalg.svd(c)
    if host_can_look(c) and not bool((d[..., -1] * ORTHOGRAPHIC_LIMIT > d[..., 0]).all()):
        raise StepError(
            f"orthographic needs S + M with a condition number up to {ORTHOGRAPHIC_LIMIT:g}; lower the learning rate, "
            f"or use retraction='svd', which needs none"
        )
    inverse = bh.mT @ (a / d[..., None, :]).mT
    gu, gv = inverse.mT @ hu @ inverse, inverse @ hv @ inverse.mT
    eye = identity_like(c)
    tu, tv = (inverse_sqrt_increment(g + eye) + eye for g in (gu, gv))
    s = (tu + gu @ tu) @ c @ (tv + tv @ gv)
    return Coefficients(tu, inverse @ tu, s, tv, inverse.mT @ tv)


def spectral(m: Tensor, hu: Tensor, hv: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The tangent part of a tangent vector's orthogonal factor: M', and a, b with Up' = Up a and Vp' = Vp b.

    Singular values at rounding level, which a zero or dependent direction leaves, stay zero: below sqrt(eps) of the
    largest in Up and Vp, whose Grams hu, hv were computed with a rounding of eps.
    """
    r = m.shape[-1]
    eigen = torch.linalg.eigh(torch.cat((hu, hv)))
    inverse_u, inverse_v = inverse_symmetric_root(eigen, eps).chunk(2)
    k, d, lh = core_svd.core_svd(m, eigen)
    kept = d > eps * d[..., :1].clamp_min(torch.finfo(d.dtype).tiny)
    sign = (k * kept[..., None, :]) @ lh
    return (
        sign[..., :r, :r],
        inverse_u @ sign[..., r:, :r],
        inverse_v @ sign[..., :r, r:].mT,
    )


class Factors(NamedTuple):
    """Stacks of U and V of several heights, and S, (B, r, r), of all of them."""

    us: list[Tensor]
    s: Tensor
    vs: list[Tensor]


def retract(
    retraction: RankRetraction,
    x: Factors,
    d: Factors,
    *,
    overlap: tuple[Tensor, Tensor] | None = None,
    floor: float = 0.0,
    reduce: Reduce | None = None,
    out: Factors | None = None,
) -> Factors:
    """The new points, for displacements d that need not be tangent.

    Args:
        retraction: the small part.
        x: the points.
        d: displacements (dU, M, dV); of dU and dV what lies in the span of U and V is discarded.
        overlap: U^T dU and V^T dV where they are at hand already.
        floor: smallest singular value of the new S, relative to its largest; 0 raises where rank is lost.
        reduce: sums a batch over ranks.
        out: where U and V may be written, d for example.

    Raises:
        StepError: rank is lost, or d is too large for its squares.

    Cost: per factor five products of 2 n r^2 flops, one less with the overlap; two or three more after a long step.
        r x r algebra in float64: the retraction's small part and a Cholesky factorization; the gauge, where the small
        part has not fixed it, by products, by two SVDs more after a long step.
    """
    sides = _Sides([*x.us, *x.vs], [*d.us, *d.vs], overlap, reduce)
    c = x.s.double() + d.s.double()
    if host_can_look(c) and not bool(torch.isfinite(c).all()):
        raise StepError(NOT_FINITE)
    found = _small_part(retraction, c, sides, floor)
    noise = sides.noise(found)
    if noise is None or noise > HARD:
        sides.square_in_float64()
        found = _small_part(retraction, c, sides, floor)
    to = None if out is None else [*out.us, *out.vs]
    ys, (left, right) = sides.move(found, sure=noise is not None and noise <= sides.sure, out=to)
    count = len(x.us)
    return Factors(ys[:count], (left @ found.s @ right.mT).to(x.s.dtype), ys[count:])


class _Sides:
    """Both tall factors: their points, their displacements and the products of these, (2 B, r, r) with U's first."""

    def __init__(
        self, xs: Tall, ds: Tall, overlap: tuple[Tensor, Tensor] | None, reduce: Reduce | None
    ) -> None:
        self.xs, self.ds, self._reduce = xs, ds, reduce
        self.eps = torch.finfo(xs[0].dtype).eps
        self.sure = SURE * self.eps
        if overlap is None:
            self._multiply(xs, ds)
        else:
            c, q = grams((xs, xs), (ds, ds), reduce=reduce)
            self._keep(c, torch.cat(overlap), q)
        if host_can_look(self._w) and not bool(torch.isfinite(self._q).all()):
            raise StepError(NOT_FINITE)

    def _multiply(self, xs: Tall, ds: Tall) -> None:
        self._keep(*grams((xs, xs), (xs, ds), (ds, ds), reduce=self._reduce))

    def _keep(self, c: Tensor, w: Tensor, q: Tensor) -> None:
        """c = x^T x, w = x^T d, q = d^T d, and h, the Gram of the projected displacement."""
        self._c, self._w, self._q = c.double(), w.double(), q.double()
        self.h = self._q - self._w.mT @ self._w

    def square_in_float64(self) -> None:
        """The products again, without the rounding that a nearly dependent displacement or a small S blows up."""
        self._multiply([x.double() for x in self.xs], [d.double() for d in self.ds])

    def noise(self, found: Coefficients) -> float | None:
        """What rounding of the products may do to the Gram of the new factors; None on an accelerator."""
        if not host_can_look(self._q):
            return None
        b = torch.cat((found.bu, found.bv))
        # ||b^T b||_F bounds ||b||_2^2 better than ||b||_F^2 does, where b has no preferred direction by r^(1/2).
        errors = self.eps * torch.linalg.matrix_norm(self._q) * torch.linalg.matrix_norm(b.mT @ b)
        return errors.amax().item() if len(b) else 0.0

    def move(
        self, found: Coefficients, *, sure: bool, out: Tall | None
    ) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """The new orthonormal factors y and, for z = x a + (d - x w) b, the r x r y^T z that S must take up.

        Where rounding is sure to be small z^T z is foreseen, the drift of x included, and one step of Newton-Schulz
        on it goes into the coefficients; else z^T z is measured, and z normalized.
        """
        a, b = torch.cat((found.au, found.av)), torch.cat((found.bu, found.bv))
        dtype, eye = self.xs[0].dtype, identity_like(a)
        on_x = a - self._w @ b
        taken = eye
        if sure:
            off = a.mT @ a - eye + b.mT @ self.h @ b + on_x.mT @ (self._c - eye) @ on_x
            sure = bool((torch.linalg.matrix_norm(off).square() <= self.eps).all())
            if sure:
                on_x, b, taken = on_x - 0.5 * on_x @ off, b - 0.5 * b @ off, eye + 0.5 * off
        zs = mix((self.ds, b.to(dtype)), (self.xs, (on_x - eye).to(dtype)), start=self.xs, out=out)
        if not sure:
            ys = close(normalize(zs, polar, self._reduce))
            zs, taken = ys, gram(ys, zs, self._reduce).double()
        left, right = taken.expand_as(a).chunk(2)
        return zs, (left, right)


def _small_part(retraction: RankRetraction, c: Tensor, sides: _Sides, floor: float) -> Coefficients:
    """The coefficients with rank and gauge seen to."""
    hu, hv = sides.h.chunk(2)
    found = retraction.coefficients(c, hu, hv, sides.eps)
    sums = [t.sum() for t in (found.au, found.av, found.s)]
    if host_can_look(c) and not bool(torch.stack(sums).isfinite().all()):
        raise StepError(f"{retraction.name} finds no point: the step is too long; lower the learning rate")
    if (floor > 0 or host_can_look(c)) and not _has_rank(found.s, max(floor, sides.eps)):
        found = _keep_rank(found, floor)
    au, bu, s, av, bv = found
    a = torch.cat((au, av))
    if _is_gauged(a):
        return found
    qu, qv = turns(a).chunk(2)
    return Coefficients(au @ qu, bu @ qu, qu.mT @ s @ qv, av @ qv, bv @ qv)


def _has_rank(s: Tensor, limit: float) -> bool:
    """Whether all singular values of s are above limit times the largest; False on an accelerator.

    Mostly a Cholesky factorization says so: of s^T s / ||s||^2 less a shift above both limit^2 and its own rounding.
    """
    if not host_can_look(s):
        return False
    shift = max(limit, CLEAR) ** 2
    size = torch.linalg.matrix_norm(s, keepdim=True)
    unit = s / torch.where(size > 0, size, torch.ones_like(size))
    if not bool(torch.linalg.cholesky_ex(unit.mT @ unit - shift * identity_like(s))[1].any()):
        return True
    d = torch.linalg.svdvals(s)
    return bool((d[:, -1] > limit * d[:, 0]).all())


def _is_gauged(a: Tensor) -> bool:
    """Whether every a is symmetric and positive already; False on an accelerator."""
    if not host_can_look(a):
        return False
    asymmetry, size = torch.linalg.matrix_norm(a - a.mT), torch.linalg.matrix_norm(a)
    return bool((asymmetry <= SYMMETRIC * size).all()) and not bool(torch.linalg.cholesky_ex(a)[1].any())


def turns(a: Tensor) -> Tensor:
    """The orthogonal q for which a q is symmetric and positive: the transposed polar factor of a, (B, r, r).

    A step shorter than the singular values of W gives an a that is nearly orthogonal, and products do; else by SVD.
    """
    g = a.mT @ a
    off = distance_from_identity(g)
    if off is not None and off <= NEARLY_ORTHOGONAL:
        return (a + a @ inverse_sqrt_increment(g)).mT
    u, _, vh = torch.linalg.svd(a)
    return (u @ vh).mT


def _keep_rank(found: Coefficients, floor: float) -> Coefficients:
    """Raise the singular values of s to the floor; the vectors that belong to them are chosen from U and V."""
    u, d, vh = torch.linalg.svd(found.s)
    if host_can_look(d) and not (floor > 0 and bool((d[..., 0] > 0).all())):
        ratio = (d[..., -1] / d[..., 0]).nan_to_num().min().item()
        raise StepError(
            f"the matrix loses rank: the smallest singular value of S is {ratio:.2g} of the largest. Use a smaller "
            f"rank or learning rate, or FixedRank(floor=1e-3), which keeps the small ones up"
        )
    lost = (d < floor * d[..., :1])[..., None, :]
    sides = []
    for a, b in ((found.au @ u, found.bu @ u), (found.av @ vh.mT, found.bv @ vh.mT)):
        kept = torch.where(lost, torch.zeros_like(a), a)
        # Where k columns are lost, the last k left singular vectors of the rest are orthogonal to it.
        sides.append(torch.where(lost, torch.linalg.svd(kept)[0], kept))
        sides.append(torch.where(lost, torch.zeros_like(b), b))
    raised = torch.maximum(d, floor * d[..., :1])
    return Coefficients(sides[0], sides[1], torch.diag_embed(raised), sides[2], sides[3])
