"""Fixed-rank geometry on a pair of factors (A, B), W = B A, as plain LoRA keeps it: r x r algebra on their Grams.

With ca = A A^T and cb = B^T B the orthonormal bases of the row and the column space, V = A^T ca^(-1/2) and
U = B cb^(-1/2), are never formed. A tangent vector is X V^T + U Y^T with V^T Y = 0. These coordinates are orthonormal,
||xi||^2 = ||X||^2 + ||Y||^2, and X, Y have the shapes of B and A^T. They know nothing of how W is split into factors
but for a rotation.

Factors may be singular, as B = 0 is where LoRA starts. The inverse roots are pseudo-inverses: a singular value below
1.2e-7 of the factor's largest counts as zero (float32's eps, and what a float64 Gram can tell from zero). So the
tangent vectors are what moving A and B can bring about to first order, dB A + B dA: at B = 0 those with Y = 0.

Grams and small algebra are in float64: the Gram of a factor has the square of its condition number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from . import rank_retractions
from .core_svd import truncated
from .errors import StepError
from .gram import Reduce, Tall, combine, gram, identity_like, products, split
from .matfun import Eigen, inverse_symmetric_root, symmetric_root
from .transforms import host_can_look, is_differentiated, under_transform

# A singular value counts from this part of the largest on; of a Gram, the square of it.
RANK_EPS = torch.finfo(torch.float32).eps
# ||B|| / ||A|| from which on A is scaled up: a displacement of B is read to eps ||B||.
LARGEST = 100.0


class Pairs(NamedTuple):
    """Stacks of A^T, (b, n, r), and of B, (b, m, r), of several heights; or coordinates Y and X in their shapes."""

    rs: list[Tensor]
    ls: list[Tensor]


class Overlap(NamedTuple):
    """Grams of displacements (Y, X) with the points and themselves, all (B, r, r), float64."""

    ry: Tensor
    yy: Tensor
    lx: Tensor
    xx: Tensor


def precise_gram(xs: Tall, ys: Tall, reduce: Reduce | None = None) -> Tensor:
    """x^T y in float64, (B, r, r). Cost: a float64 copy of one stack at a time."""
    parts = [gram([x.double()], [y.double()]) for x, y in zip(xs, ys, strict=True)]
    small = parts[0] if len(parts) == 1 else torch.cat(parts)
    return small if reduce is None else reduce(small)


class Root:
    """The root of a Gram, its pseudo-inverse, and the projector on its range."""

    def __init__(self, c: Tensor) -> None:
        self.c = c
        self.eigen: Eigen = torch.linalg.eigh(c)

    @cached_property
    def root(self) -> Tensor:
        """c^(1/2)."""
        return symmetric_root(self.eigen)

    @cached_property
    def inverse(self) -> Tensor:
        """c^(-1/2), zero where c is."""
        return inverse_symmetric_root(self.eigen, RANK_EPS**2)

    @cached_property
    def half_inverse(self) -> Tensor:
        """Q D with c^(-1/2) = Q D Q^T, Q the eigenvectors."""
        return self.inverse @ self.eigen[1]

    def damped(self, mu: Tensor) -> Tensor:
        """Q D with c^(1/2) (c + mu I)^-1 = Q D Q^T, mu (B, 1, 1)."""
        values = self.eigen[0].clamp_min(torch.finfo(mu.dtype).tiny)[..., None, :]
        return self.half_inverse * (values / (values + mu))

    def divide(self, zs: Tall, half: Tensor | None = None) -> list[Tensor]:
        """z c^(-1/2), or z Q D Q^T, through the eigenvectors: what rounding does in weak directions stays there."""
        return times(times(zs, self.half_inverse if half is None else half), self.eigen[1].mT)

    @cached_property
    def range(self) -> Tensor:
        """The projector on what counts as not zero."""
        return self.inverse @ self.root


@dataclass
class Frame:
    """The bases V and U of the pairs x, through the roots of their Grams."""

    x: Pairs
    reduce: Reduce | None = None

    @cached_property
    def a(self) -> Root:
        """Of A A^T."""
        return Root(precise_gram(self.x.rs, self.x.rs, self.reduce))

    @cached_property
    def b(self) -> Root:
        """Of B^T B."""
        return Root(precise_gram(self.x.ls, self.x.ls, self.reduce))

    def left(self, zs: Tall) -> Tensor:
        """z^T U."""
        return precise_gram(zs, self.x.ls, self.reduce) @ self.b.inverse

    def right(self, zs: Tall) -> Tensor:
        """z^T V."""
        return precise_gram(zs, self.x.rs, self.reduce) @ self.a.inverse


def times(xs: Tall, t: Tensor) -> list[Tensor]:
    """x t, with a float64 t, in the precision of x."""
    return products(xs, t.to(xs[0].dtype))


def plus(zs: Tall, xs: Tall, t: Tensor, *, alpha: float = 1.0, out: Tall | None = None) -> list[Tensor]:
    """z + alpha x t, with a float64 t, in the precision of x."""
    return combine(zs, xs, t.to(xs[0].dtype), alpha=alpha, out=out)


def onto(zs: Tall, xs: Tall, t: Tensor, *, alpha: float = 1.0) -> list[Tensor]:
    """`plus` in the memory of z, which nobody else holds; in new memory where something is derived or mapped."""
    derived = is_differentiated(zs[0]) or under_transform()
    return plus(zs, xs, t, alpha=alpha, out=None if derived else zs)


def overlap_of(x: Pairs, d: Pairs, reduce: Reduce | None = None) -> Overlap:
    """What `retract` asks of displacements."""
    pairs = ((x.rs, d.rs), (d.rs, d.rs), (x.ls, d.ls), (d.ls, d.ls))
    return Overlap(*(precise_gram(a, b, reduce) for a, b in pairs))


def tangent(f: Frame, z: Pairs) -> Pairs:
    """The orthogonal projection of coordinates: Y - V V^T Y, where a factor is singular restricted to its range."""
    ys = times(z.rs, f.b.range)
    w = f.right(ys).mT  # V^T Y
    return Pairs(onto(ys, f.x.rs, f.a.inverse @ w, alpha=-1.0), times(z.ls, f.a.range))


def gradient(f: Frame, g: Pairs) -> Pairs:
    """Coordinates of the Riemannian gradient from those by the factors, gB = G A^T and gA^T = G^T B.

    X = G V = gB ca^(-1/2), Y = (I - V V^T) G^T U = (I - V V^T) gA^T cb^(-1/2), where the inverse root is damped by what
    rounding has left of gA V = B^T X, which both are B^T G V.
    """
    xs = f.a.divide(g.ls)
    gv = f.right(g.rs)
    half = f.b.damped(_damping(gv - precise_gram(f.x.ls, xs, f.reduce), xs, f.reduce))
    ys = f.b.divide(g.rs, half)
    normal = f.a.inverse @ (gv.mT @ half) @ f.b.eigen[1].mT
    return Pairs(onto(ys, f.x.rs, normal, alpha=-1.0), xs)


def _damping(noise: Tensor, xs: Tall, reduce: Reduce | None) -> Tensor:
    """Wiener's: the variance of an entry of gA's noise over that of an entry of G^T u for a unit u, (B, 1, 1).

    The noise is measured in gA V; entries of G^T u are taken to be as large as those of X = G V. Autocast and
    half-precision factors round gA to 4e-3 of ||B|| ||G||, and in weak directions of B an inverse would blow that up.
    """
    energy = torch.cat([x.double().square().sum((-2, -1), keepdim=True) / x.shape[-2] for x in xs])
    energy = energy if reduce is None else reduce(energy)
    share = noise.square().sum((-2, -1), keepdim=True) / noise.shape[-1]
    return torch.where(energy > 0, share / energy, torch.zeros_like(share))


def retract(f: Frame, d: Pairs, overlap: Overlap | None = None, reduce: Reduce | None = None) -> Pairs:
    r"""The matrix of rank r nearest to W + X V^T + U Y^T, as the pair in which A A^T is what it was.

    The right singular vectors V+ = V av + Y bv come from the 2r x 2r core of `core_svd`, turned so that
    V^T V+ is symmetric and positive; A+ = h V+^T with h = (A A^T)^(1/2), and B+ = (W + xi) V+ h^-1. So A rotates as
    little as it can and B takes up all else; as increments of A and B, which no condition number rounds. Where
    W + xi has lower rank, rows of A whose part of B is zero stay. Where A is singular, h is raised to the mean scale of
    A, or of B where A = 0; and as a whole where ||B+|| would exceed 100 ||A+||.

    Args:
        f: the points.
        d: coordinates (Y, X), tangent or not: of Y what lies in the span of V is discarded.
        overlap: `overlap_of` the points and d where it is at hand.
        reduce: sums a batch over ranks.

    Cost: six Grams and four products of 2 n r^2 flops; r x r algebra in float64: `core_svd.truncated`, two
        eigendecompositions and an SVD.
    """
    w, m, hy, hx = _parts(f, overlap_of(f.x, d, reduce) if overlap is None else overlap)
    found = truncated(f.b.root @ f.a.root + m, hx, hy)
    _, values, vh = torch.linalg.svd(found.s)
    av, bv = _complete(found.av @ vh.mT, found.bv @ vh.mT, values)
    q = rank_retractions.turns(f.a.range @ av)
    av, bv = av @ q, bv @ q
    h, inverse, c = _gauge(f, values[..., None] * q)
    eye = identity_like(av)
    rs = plus(f.x.rs, f.x.rs, f.a.inverse @ (av - w @ bv) @ h - eye)
    rs = onto(rs, d.rs, bv @ h)
    ls = plus(f.x.ls, f.x.ls, (f.a.root @ av + f.b.inverse @ hy @ bv) @ inverse - eye)
    ls = onto(ls, d.ls, f.a.range @ av @ inverse)
    return Pairs(_scaled(rs, c), _scaled(ls, 1 / c))


def _scaled(xs: list[Tensor], c: Tensor) -> list[Tensor]:
    """c x for every matrix, c (B,)."""
    if host_can_look(c) and bool((c == 1).all()):
        return xs
    return [x * s[:, None, None].to(x.dtype) for x, s in zip(xs, split(c, xs), strict=True)]


def _parts(f: Frame, overlap: Overlap) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """V^T Y, U^T X, and the Grams of Y - V V^T Y and X - U U^T X.

    Raises:
        StepError: the displacement is not finite.
    """
    if host_can_look(overlap.yy) and not all(bool(torch.isfinite(t).all()) for t in (overlap.yy, overlap.xx)):
        raise StepError(rank_retractions.NOT_FINITE)
    w, m = f.a.inverse @ overlap.ry, f.b.inverse @ overlap.lx @ f.a.range
    hy = f.b.range @ (overlap.yy - w.mT @ w) @ f.b.range
    return w, m, hy, f.a.range @ overlap.xx @ f.a.range - m.mT @ m


def _complete(av: Tensor, bv: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Where singular values of the new matrix are zero, right singular vectors out of the old row space."""
    lost = ~(values > RANK_EPS * values[..., :1])[..., None, :]
    kept = av.masked_fill(lost, 0)
    # Where k columns are lost, the last k left singular vectors of the rest are orthogonal to it.
    return torch.where(lost, torch.linalg.svd(kept)[0], av), bv.masked_fill(lost, 0)


def _gauge(f: Frame, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h and c with A+ = c h V+^T: (A A^T)^(1/2), raised where it is singular, by c where B+ = U+ s h^-1 is too large.

    Returns:
        h and its inverse, (B, r, r); c, (B,), which is left out of them: an increment of x would lose x for a large c.
    """
    values, vectors = f.a.eigen
    mean = [root.eigen[0].clamp_min(0).mean(-1, keepdim=True) for root in (f.a, f.b)]
    scale = torch.where(mean[0] > 0, mean[0], mean[1])
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    h = torch.where(values > RANK_EPS**2 * values[..., -1:].clamp_min(0), values, scale).sqrt()
    ratio = (s @ vectors / h[..., None, :]).square().sum((-2, -1)) / h.square().sum(-1)
    h, c = h[..., None, :], (ratio.sqrt() / LARGEST).sqrt().clamp_min(1)
    return (vectors * h) @ vectors.mT, (vectors / h) @ vectors.mT, c


def spectral(f: Frame, d: Pairs, overlap: Overlap, rate: Tensor) -> Pairs:
    """Rates (B,) times the tangent part of the orthogonal factor of xi; see `rank_retractions.spectral`."""
    w, m, hy, hx = _parts(f, overlap)
    middle, a, b = rank_retractions.spectral(m, hx, hy, torch.finfo(d.ls[0].dtype).eps)
    middle, a, b = (rate[:, None, None] * t for t in (middle, a, b))
    ys, xs = times(d.rs, b), times(d.ls, f.a.range @ a)
    ys = onto(ys, f.x.rs, f.a.inverse @ w @ b, alpha=-1.0)
    return Pairs(ys, onto(xs, f.x.ls, f.b.inverse @ (middle - m @ a)))


@dataclass
class Turn:
    """From the bases at x to those at y."""

    x: Frame
    y: Frame

    @cached_property
    def rows(self) -> Tensor:
        """V^T V+."""
        return self.x.a.inverse @ self.y.right(self.x.x.rs)

    @cached_property
    def columns(self) -> Tensor:
        """U^T U+."""
        return self.x.b.inverse @ self.y.left(self.x.x.ls)


def transported(turn: Turn, v: Pairs) -> Pairs:
    """The projection at y of v, tangent at x: X+ = xi V+, Y+ = (I - V+ V+^T) xi^T U+.

    With c = V^T V+ and a = U^T U+: xi V+ = X c + U (Y^T V+) and xi^T U+ = Y a + V (X^T U+).
    """
    x, y = turn.x, turn.y
    c, a = turn.rows, turn.columns
    yv, xu = y.right(v.rs), y.left(v.ls)
    xs, ys = times(v.ls, c), times(v.rs, a)
    ys = onto(ys, x.x.rs, x.a.inverse @ xu)
    ys = onto(ys, y.x.rs, y.a.inverse @ (c.mT @ xu + yv.mT @ a), alpha=-1.0)
    return Pairs(ys, onto(xs, x.x.ls, x.b.inverse @ yv))


def spread(turn: Turn, v: Pairs) -> Pairs:
    """Variances v of the entries of a vector tangent at x, as those of its projection at y; see `rank_transports`.

    Squares are entrywise: X+ = X c^2 + U^2 (Y^T (V+ - V c)^2), Y+ = Y a^2 + (V - V+ c^T)^2 (X^T (U+)^2).
    """
    x, y = turn.x, turn.y
    c, a = turn.rows, turn.columns
    old, new = times(x.x.rs, x.a.inverse), times(y.x.rs, y.a.inverse)
    turned, left = _squares(plus(new, old, c, alpha=-1.0)), _squares(plus(old, new, c.mT, alpha=-1.0))
    us, new_us = (_squares(times(f.x.ls, f.b.inverse)) for f in (x, y))
    xs, ys = times(v.ls, c.square()), times(v.rs, a.square())
    xs = combine(xs, us, gram(v.rs, turned), out=xs)
    return Pairs(combine(ys, left, gram(v.ls, new_us), out=ys), xs)


def _squares(xs: Tall) -> list[Tensor]:
    return [x.square_() for x in xs]
