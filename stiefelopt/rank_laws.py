"""The laws of fixed-rank geometry, as functions of a manifold with the methods of `FixedRank` and of a `RankCase`.

`stiefelopt.testing.check_manifold` runs them. What they compare with is computed here, densely and in float64:
W = U S V^T, tangent vectors as m x n matrices, the projection as Z - (I - U U^T) Z (I - V V^T).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import rank_retractions
from .errors import NotOnManifoldError, StepError, StiefelOptError
from .laws import (
    DRIFT,
    DTYPES,
    HUGE,
    Broken,
    Law,
    at_most,
    check_slope,
    check_spec,
    holds,
    law_at,
    matrix_norms,
    rescaled,
    slope_of,
)
from .manifolds import USV, FixedRank
from .shapes import HALF, compute_dtype, tolerance

# A named tuple of tensors: a point, or a vector at one.
P = TypeVar("P", bound=Any)

# (*b, m, n, r)
RANK_SHAPES = (
    (7, 5, 3),
    (5, 6, 2),
    (6, 4, 1),
    (4, 4, 4),
    (3, 6, 3),
    (1, 1, 1),
    (2, 3, 6, 5, 2),
    (0, 5, 4, 2),
)
# Steps of at most this norm may not be refused: drawn points have singular values in [1/2, 3/2].
SAFE = 0.1


@dataclass(frozen=True)
class RankCase:
    """Where a law is tried.

    Attributes:
        shape: (*b, m, n, r).
        dtype: of the points.
        scale: norm of every vector drawn.
        seed: equal seeds draw equal points and vectors.
    """

    shape: tuple[int, ...] = (7, 5, 3)
    dtype: torch.dtype = torch.float64
    scale: float = 1.0
    seed: int = 0

    @property
    def sizes(self) -> tuple[int, int, int]:
        """m, n, r."""
        m, n, r = self.shape[-3:]
        return m, n, r

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """(*b, m, n)."""
        return self.shape[:-1]

    def tolerance(self, size: float = 1.0) -> float:
        """The one rule, 10 eps sqrt(n r) of the taller factor, times the size of what is compared."""
        m, n, r = self.sizes
        return size * tolerance(compute_dtype(self.dtype), max(m, n), r)

    def normal(self, key: int, *shape: int) -> Tensor:
        """Gaussian numbers in float64, of the shape (*b, *shape)."""
        generator = torch.Generator().manual_seed(1000 * self.seed + key)
        return torch.randn(*self.shape[:-3], *shape, dtype=torch.float64, generator=generator)

    def orthogonal(self, key: int, size: int) -> Tensor:
        """Orthogonal matrices (*b, size, size), in the case's dtype."""
        return torch.linalg.qr(self.normal(key, size, size))[0].to(self.dtype)

    def point(self, key: int = 0) -> USV:
        """A point whose S, not diagonal, has its singular values in [1/2, 3/2]."""
        m, n, r = self.sizes
        u, v = (torch.linalg.qr(self.normal(key + k, s, r))[0] for k, s in ((0, m), (1, n)))
        a, b = (torch.linalg.qr(self.normal(key + k, r, r))[0] for k in (2, 3))
        values = 1 + 0.5 * torch.tanh(self.normal(key + 4, r))
        return cast(USV(u, a * values[..., None, :] @ b, v), self.dtype)

    def weak(self) -> Tensor:
        """r x r, diagonal from 1 down to 1e-3: what makes a well-conditioned point an ill-conditioned one."""
        return torch.diag(torch.logspace(0, -3, self.sizes[-1], dtype=torch.float64))

    def weak_point(self) -> USV:
        """A point whose W has a condition number of about 1e3."""
        x = self.point()
        return x._replace(S=(x.S.double() @ self.weak()).to(self.dtype))

    def ambient(self, key: int = 10) -> USV:
        """Coordinates (dU, M, dV), not tangent, of norm ``scale`` together."""
        m, n, r = self.sizes
        z = USV(self.normal(key, m, r), self.normal(key + 1, r, r), self.normal(key + 2, n, r))
        size = torch.stack([t.square().sum((-2, -1), keepdim=True) for t in z]).sum(0).sqrt()
        return cast(USV(*(t * (self.scale / size) for t in z)), self.dtype)

    def dense(self, key: int = 20) -> Tensor:
        """A dense matrix (*b, m, n) of norm ``scale``."""
        m, n, _ = self.sizes
        return rescaled(self.normal(key, m, n), self.scale).to(self.dtype)

    def tangent(self, x: USV, key: int = 30, columns: Tensor | None = None) -> USV:
        """A tangent vector of norm ``scale``; ``columns`` (r x r) makes its parts Up and Vp deficient."""
        z = cast(self.ambient(key), torch.float64)
        k = torch.eye(x.S.shape[-1], dtype=torch.float64) if columns is None else columns
        u, v = (off_span(a.double(), off_span(a.double(), b)) @ k for a, b in ((x.U, z.U), (x.V, z.V)))
        size = torch.stack([t.square().sum((-2, -1), keepdim=True) for t in (u, z.S, v)]).sum(0).sqrt()
        return cast(USV(*(t * (self.scale / size) for t in (u, z.S, v))), self.dtype)

    def deficient(self, x: USV) -> dict[str, USV]:
        """Tangent vectors with zero or dependent columns, or with one part alone."""
        r = self.sizes[-1]
        ones = torch.ones(r, r, dtype=torch.float64)
        one_short = torch.diag((torch.arange(r) > 0).double())
        u = self.tangent(x)
        zero = USV(*map(torch.zeros_like, u))
        return {
            "equal columns": self.tangent(x, 31, ones / r),
            "a zero column": self.tangent(x, 32, one_short),
            "only Up": zero._replace(U=u.U),
            "only M": zero._replace(S=u.S),
            "only Vp": zero._replace(V=u.V),
        }


law = law_at(RankCase)


def cast(x: P, dtype: torch.dtype) -> P:
    """Points and vectors in another dtype."""
    return type(x)(*(t.to(dtype) for t in x))


def off_span(x: Tensor, z: Tensor) -> Tensor:
    """z - x x^T z, exactly zero for a square x."""
    return z - x @ (x.mT @ z) if x.shape[-2] > x.shape[-1] else torch.zeros_like(z)


def _zero(x: P) -> P:
    return type(x)(*map(torch.zeros_like, x))


# What depends on the kind of point; `pair_laws` registers that of pairs.


@functools.singledispatch
def matrix_of(x: Any) -> Tensor:
    """W, in float64."""
    u, s, v = cast(x, torch.float64)
    return u @ s @ v.mT


@functools.singledispatch
def tangent_matrix(x: Any, u: Any) -> Tensor:
    """U M V^T + Up V^T + U Vp^T."""
    x, u = cast(x, torch.float64), cast(u, torch.float64)
    return (x.U @ u.S + u.U) @ x.V.mT + x.U @ u.V.mT


@functools.singledispatch
def tangent_part(x: Any, z: Tensor) -> Tensor:
    """The part of a dense z that is tangent at x."""
    u, _, v = cast(x, torch.float64)
    left = z - u @ (u.mT @ z)
    return z - (left - left @ v @ v.mT)


@functools.singledispatch
def constraint_error(x: Any) -> Tensor:
    """U^T U - I and V^T V - I, side by side."""
    grams = [t.double().mT @ t.double() for t in (x.U, x.V)]
    return torch.cat([g - torch.eye(g.shape[-1], dtype=g.dtype) for g in grams], -1)


@functools.singledispatch
def normal_part(x: Any, u: Any) -> Tensor:
    """U^T Up and V^T Vp, which vanish for a tangent u."""
    return torch.cat((x.U.double().mT @ u.U.double(), x.V.double().mT @ u.V.double()), -1)


@functools.singledispatch
def factor_gradients(x: Any, z: Tensor) -> Any:
    """Ordinary gradients of the factors, of a function of W whose gradient is z."""
    u, s, v = x
    return USV(z @ v @ s.mT, u.mT @ z @ v, z.mT @ u @ s)


def _difference(x: USV, y: USV) -> Tensor:
    """The largest difference of their factors' entries, (1,), or nothing for an empty batch."""
    parts = [(a.double() - b.double()).abs().flatten() for a, b in zip(x, y, strict=True)]
    return torch.cat(parts)


def plus(a: float, u: P, b: float, v: P) -> P:
    """a u + b v."""
    return type(u)(*(a * s + b * t for s, t in zip(u, v, strict=True)))


def equal(x: P, y: P) -> bool:
    """Bit for bit."""
    return all(map(torch.equal, x, y))


def stepped(m: FixedRank, case: RankCase, x: USV, u: USV) -> USV | None:
    """R(x, u); None where a long step was refused."""
    try:
        return m.retract(x, u)
    except StepError:
        if case.scale <= SAFE:
            raise
        return None


# The manifold: points, tangent vectors, metric


def drawn(m: Any, case: RankCase) -> Any:
    """A random point, the same from equal generators and in the dtype asked for."""
    x, again, other = (
        m.random_point(
            *case.dense_shape,
            rank=case.sizes[-1],
            dtype=case.dtype,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (case.seed, case.seed, case.seed + 1)
    )
    holds("equal generators draw equal points", equal(x, again))
    if matrix_of(x).numel():
        holds("other seeds draw other points", not equal(x, other))
    holds("random_point has the dtype asked for", {t.dtype for t in x} == {case.dtype})
    return x


def draws_unit_tangents(m: Any, case: RankCase, x: Any) -> None:
    """A random tangent vector is one, of unit norm, and its generator's."""
    u, again, other = (m.random_tangent(x, torch.Generator().manual_seed(case.seed + k)) for k in (1, 1, 2))
    holds("equal generators draw equal tangent vectors", equal(u, again))
    if matrix_of(x).numel() and max(case.sizes) > 1:  # a 1 x 1 matrix has two of unit norm
        holds("other seeds draw other tangent vectors", not equal(u, other))
    at_most("random_tangent is tangent", normal_part(x, u), case.tolerance())
    at_most("random_tangent has unit norm", matrix_norms(tangent_matrix(x, u)) - 1, case.tolerance())


@law
def law_rank_membership(m: FixedRank, case: RankCase) -> None:
    """``residual`` tells points from others, ``check`` acts on it, ``random_point`` and ``random_tangent`` fit."""
    rows, columns, r = case.sizes
    x, batch = drawn(m, case), case.shape[:-3]
    shapes = tuple(tuple(t.shape) for t in x)
    holds(
        "random_point has the shapes asked for",
        shapes == ((*batch, rows, r), (*batch, r, r), (*batch, columns, r)),
    )
    at_most("random_point lies on the manifold", constraint_error(x), case.tolerance())
    m.check(x)
    off = case.ambient()
    for z in (x._replace(U=x.U + off.U), x._replace(V=x.V + off.V)):
        error = m.residual(z).double() - constraint_error(z).abs().amax((-2, -1))
        at_most("residual is max |U^T U - I|, |V^T V - I|", error, case.tolerance(4 * (1 + case.scale) ** 2))
    draws_unit_tangents(m, case, x)
    if x.S.numel():
        _check_refuses(m, x)


def _check_refuses(m: FixedRank, x: USV) -> None:
    lower = x.S.clone()
    lower[..., -1, :] = 0
    wrong = {
        "2 U": x._replace(U=2 * x.U),
        "2 V": x._replace(V=2 * x.V),
        "NaN in S": x._replace(S=x.S * math.nan),
        "a singular S": x._replace(S=lower),
        "S = 0": x._replace(S=torch.zeros_like(x.S)),
    }
    for name, z in wrong.items():
        try:
            m.check(z)
        except StiefelOptError:
            continue
        raise Broken(f"check refuses what is not a point: it accepted {name}")


@law
def law_rank_project_point(m: FixedRank, case: RankCase) -> None:
    """project_point gives the nearest matrix of rank r (Eckart & Young), and a point's own matrix back."""
    r = case.sizes[-1]
    x, z = case.point(), case.dense()
    back = matrix_of(m.project_point(matrix_of(x).to(case.dtype), rank=r)) - matrix_of(x)
    at_most("a point's matrix comes back", back, case.tolerance(2))
    try:
        y = m.project_point(z, rank=r)
    except NotOnManifoldError:
        holds("a generic matrix is accepted", False)
    at_most("the result lies on the manifold", constraint_error(y), case.tolerance())
    left = z.double() - matrix_of(y)
    at_most("nearest: what is left is normal", tangent_part(y, left), case.tolerance(case.scale))
    values = torch.linalg.svdvals(z.double())
    distance = values[..., r:].square().sum(-1).sqrt()[..., None, None]
    at_most(
        "nearest: the distance is that of the small singular values",
        matrix_norms(left) - distance,
        case.tolerance(case.scale),
    )


@law
def law_rank_project_tangent(m: FixedRank, case: RankCase) -> None:
    """Both projections are tangent, idempotent and self-adjoint; that of dense matrices has the right rank."""
    x, z, v = case.point(), case.ambient(), case.tangent(case.point())
    u = m.project_tangent(x, z)
    bound = case.tolerance(case.scale)
    at_most("the result is tangent", normal_part(x, u), bound)
    at_most("idempotent", _difference(m.project_tangent(x, u), u), bound)
    at_most("fixes tangent vectors", _difference(m.project_tangent(x, v), v), bound)
    other = case.ambient(40)
    pairs = ((u, other), (z, m.project_tangent(x, other)))
    uz, zu = (
        sum((a.double() * b.double()).sum((-2, -1)) for a, b in zip(p, q, strict=True)) for p, q in pairs
    )
    at_most("self-adjoint: <P z, v> = <z, P v>", uz - zu, case.tolerance(case.scale**2))

    dense = case.dense()
    w = m.project_dense(x, dense)
    at_most("project_dense is tangent", normal_part(x, w), bound)
    at_most(
        "project_dense is the orthogonal projection",
        tangent_matrix(x, w) - tangent_part(x, dense.double()),
        bound,
    )
    at_most("project_dense fixes tangent vectors", _difference(m.project_dense(x, m.embed(x, v)), v), bound)
    rows, columns, r = case.sizes
    basis = torch.eye(rows * columns, dtype=case.dtype).reshape(-1, rows, columns)
    single = replace(case, shape=case.sizes).point()
    one = type(x)(*(t.expand(len(basis), -1, -1) for t in single))
    rank = (m.embed(one, m.project_dense(one, basis)) * basis).sum()
    one_dim = m.dim(rows, columns, rank=r)
    at_most("its rank is the dimension", rank - one_dim, case.tolerance(rows * columns))
    holds("dim counts a batch's points", m.dim(3, rows, columns, rank=r) == 3 * one_dim)


@law
def law_rank_dense(m: FixedRank, case: RankCase) -> None:
    """to_dense and embed are what they say."""
    x = case.point()
    at_most("to_dense is U S V^T", m.to_dense(x).double() - matrix_of(x), case.tolerance(2))
    u = case.tangent(x)
    error = m.embed(x, u).double() - tangent_matrix(x, u)
    at_most("embed is U M V^T + Up V^T + U Vp^T", error, case.tolerance(2 * case.scale))


@law
def law_rank_gradient(m: FixedRank, case: RankCase) -> None:
    """gradient is tangent, linear, and the dense gradient projected: inner(x, gradient(x, g), v) = <G, v>.

    The factors' gradients are those of a function of W: gU = G V S^T, gS = U^T G V, gV = G^T U S.
    """
    x, g, h = case.point(), case.dense(), case.dense(21)

    def factors(z: Tensor) -> Any:
        return cast(factor_gradients(cast(x, torch.float64), z.double()), case.dtype)

    u = m.gradient(x, factors(g))
    at_most("tangent", normal_part(x, u), case.tolerance(4 * case.scale))
    linear = m.gradient(x, plus(2, factors(g), -3, factors(h)))
    expected = plus(2, u, -3, m.gradient(x, factors(h)))
    at_most("linear", _difference(linear, expected), case.tolerance(20 * case.scale))
    for key in (35, 38):
        v = case.tangent(x, key)
        difference = m.inner(x, u, v).double() - (g.double() * tangent_matrix(x, v)).sum((-2, -1))
        at_most("inner(x, gradient(x, g), v) = <G, v>", difference, case.tolerance(4 * case.scale**2))


@law
def law_rank_metric(m: FixedRank, case: RankCase) -> None:
    """The inner product is that of the dense matrices, and so symmetric, bilinear, positive; norm is its root."""
    x = case.point()
    u, v, w = (case.tangent(x, key) for key in (30, 35, 38))
    size = case.scale**2
    uv = m.inner(x, u, v)
    holds("inner has the batch shape", uv.shape == case.shape[:-3])
    dense = (tangent_matrix(x, u) * tangent_matrix(x, v)).sum((-2, -1))
    at_most("the inner product of the dense matrices", uv.double() - dense, case.tolerance(size))
    at_most("symmetric", uv - m.inner(x, v, u), case.tolerance(size))
    linear = m.inner(x, plus(2, u, -3, w), v) - (2 * uv - 3 * m.inner(x, w, v))
    at_most("bilinear", linear, case.tolerance(5 * size))
    for part in (u, *case.deficient(x).values()):
        share = matrix_norms(tangent_matrix(x, part)).flatten().square() / size
        positive = m.inner(x, part, part).double().flatten() > 0.5 * share * size
        holds("positive definite", bool((positive | (share < 1e-12)).all()))
    at_most("norm(x, u)^2 = inner(x, u, u)", m.norm(x, u) ** 2 - m.inner(x, u, u), case.tolerance(size))


@law
def law_rank_transport(m: FixedRank, case: RankCase) -> None:
    """A transported vector is the dense projection at y: tangent, linear in v, and v itself as u tends to 0."""
    x = case.point()
    u, v, w = (case.tangent(x, key) for key in (30, 35, 38))
    y = stepped(m, case, x, u)
    if y is not None:
        moved = m.transport_vector(x, u, y, v)
        bound = case.tolerance(4 * case.scale)
        at_most("tangent at y", normal_part(y, moved), bound)
        linear = m.transport_vector(x, u, y, plus(2, v, -3, w))
        expected = plus(2, moved, -3, m.transport_vector(x, u, y, w))
        at_most("linear", _difference(linear, expected), 5 * bound)
        at_most(
            "the projection of the dense matrix",
            tangent_matrix(y, moved) - tangent_part(y, tangent_matrix(x, v)),
            bound,
        )
    still = m.transport_vector(x, _zero(u), x, v)
    at_most("the identity at u = 0", _difference(still, v), case.tolerance(case.scale))
    single, x, u = _single(case)
    v = single.tangent(x, 35)

    def change(t: Tensor) -> Tensor:
        xs, us, vs = (_spread(z, t) for z in (x, u, v))
        us = type(us)(*(t * z for z in us))
        moved = m.transport_vector(xs, us, m.retract(xs, us), vs)
        # Coordinates too: the gauge turns the factors as little as it can.
        return torch.stack(
            [matrix_norms(a - b) for a, b in zip(moved, vs, strict=True)],
        ).sum(0)

    k = slope_of(change, torch.arange(-4, -1.5, 0.5))
    holds(f"tends to the identity as u tends to 0 (slope {k:.2f}, 0.7 is needed)", k >= 0.7)


def _single(case: RankCase) -> tuple[RankCase, USV, USV]:
    """One float64 point and a unit tangent vector: what slopes are measured on."""
    single = replace(case, shape=case.sizes, dtype=torch.float64, scale=1.0)
    x = single.point()
    return single, x, single.tangent(x)


def _spread(x: USV, t: Tensor) -> USV:
    """One copy of x for every entry of t (k, 1, 1)."""
    return type(x)(*(z.expand(len(t), *z.shape) for z in x))


@law
def law_rank_spec(m: FixedRank, case: RankCase) -> None:
    """A manifold survives being written as plain strings and numbers."""
    check_spec(m)


# The retraction


@law
def law_rank_retraction(m: FixedRank, case: RankCase) -> None:
    """R(x, u) lies on the manifold, passes ``check``, and is W + u + O(u^2); also for deficient u."""
    x = case.point()
    for name, u in {"a generic step": case.tangent(x), **case.deficient(x)}.items():
        y = stepped(m, case, x, u)
        if y is None:
            continue
        at_most(f"the result lies on the manifold ({name})", constraint_error(y), case.tolerance())
        holds(f"it is finite ({name})", all(bool(torch.isfinite(t).all()) for t in y))
        m.check(y)
        if case.scale <= SAFE:
            error = matrix_norms(matrix_of(y) - matrix_of(x) - tangent_matrix(x, u))
            bound = 4 * case.scale**2 + case.tolerance(4)
            at_most(f"R(x, u) = W + u + O(u^2) ({name})", error, bound)


@law
def law_rank_nearest(m: FixedRank, case: RankCase) -> None:
    """Where the retraction is the metric projection, R(x, u) is the matrix of rank r nearest to W + u.

    Tried with W of condition 1e3 and with steps that all but move one side alone, short and long beside its singular
    values.
    """
    if getattr(m, "retraction", "svd") != "svd":
        return
    x, r = case.weak_point(), case.sizes[-1]
    u = case.tangent(x)
    for part in (x._fields[0], x._fields[-1]):
        for tiny in (1.0, 1e-6, 1e-10, 1e-14, 0.0):
            step = u._replace(**{part: tiny * getattr(u, part)})
            y = stepped(m, case, x, step)
            if y is None:
                continue
            goal = matrix_of(x) + tangent_matrix(x, step)
            best = torch.linalg.svdvals(goal)[..., r:].square().sum(-1).sqrt()
            distance = matrix_norms(goal - matrix_of(y))[..., 0, 0]
            bound = case.tolerance(20 * (1 + case.scale))
            at_most(f"the nearest matrix of rank r (u.{part} times {tiny:g})", distance - best, bound)


@law
def law_rank_gauge(m: FixedRank, case: RankCase) -> None:
    """U^T U+ and V^T V+ are symmetric and positive: the factors turn as little as they can."""
    x = case.point()
    for u in (case.tangent(x), *case.deficient(x).values()):
        y = stepped(m, case, x, u)
        if y is None:
            continue
        for a, b in ((x.U, y.U), (x.V, y.V)):
            h = a.double().mT @ b.double()
            at_most("U^T U+ is symmetric", h - h.mT, case.tolerance(4))
            at_most("U^T U+ is positive", torch.linalg.eigvalsh(h + h.mT).clamp_max(0), case.tolerance(4))


@law
def law_rank_zero_step(m: FixedRank, case: RankCase) -> None:
    """R(x, 0) = x bit for bit, also within a batch and for -0.0; a u with one part alone is no zero step."""
    x = case.point()
    for zero in (0.0, -0.0):
        u = type(x)(*(torch.full_like(t, zero) for t in x))
        holds("R(x, 0) = x bit for bit", equal(m.retract(x, u), x))
    three = replace(case, shape=(3, *case.sizes), scale=min(case.scale, SAFE))
    x = three.point()
    u = three.tangent(x)
    for t in u:
        t[1] = 0
    y = m.retract(x, u)
    holds(
        "R(x, 0) = x bit for bit within a batch",
        all(torch.equal(a[1], b[1]) for a, b in zip(x, y, strict=True)),
    )
    for part, t in zip(x._fields, replace(three, scale=1e-3).tangent(x), strict=True):
        alone = _zero(x)._replace(**{part: t})
        moved = matrix_of(m.retract(x, alone)) - matrix_of(x) - tangent_matrix(x, alone)
        at_most(f"follows a u whose only part is {part}", moved, 1e-5)


@law
def law_rank_order(m: FixedRank, case: RankCase, *, order: float | None = None) -> None:
    """|P_x(R(x, t u) - W - t u)| ~ t^(k+1) for the declared order k: not less, and for k = 1 not more.

    "Not more" is asked where the order shows: 2 <= r < min(m, n).
    """
    _, x, u = _single(case)
    rows, columns, r = case.sizes

    def error(t: Tensor) -> Tensor:
        xs, us = _spread(x, t), type(u)(*(t * z for z in u))
        z = matrix_of(m.retract(xs, us)) - matrix_of(x) - t * tangent_matrix(x, u)
        return matrix_norms(tangent_part(x, z))

    declared = rank_retractions.get(getattr(m, "retraction", "svd")).order if order is None else order
    check_slope("|P_x(R(x, t u) - W - t u)|", error, declared, 2 <= r < min(rows, columns))


@law
def law_rank_huge(m: FixedRank, case: RankCase) -> None:
    """A step of norm 1e4 ends on the manifold, or in StepError; never in NaN."""
    x = case.point()
    far = replace(case, scale=HUGE)
    for u in (far.tangent(x), *far.deficient(x).values()):
        y = stepped(m, far, x, u)
        if y is not None:
            at_most(
                f"the result of a step of norm {HUGE:g} lies on the manifold",
                constraint_error(y),
                case.tolerance(),
            )
            holds("it is finite after a huge step", all(bool(torch.isfinite(t).all()) for t in y))


@law
def law_rank_loss(m: FixedRank, case: RankCase) -> None:
    """A step to lower rank raises StepError with the way out; with a floor its singular values stay above it."""
    r = case.sizes[-1]
    x = case.point()
    values = torch.linspace(1.5, 0.5, r, dtype=case.dtype)
    x = x._replace(S=torch.diag_embed(values.expand(*case.shape[:-3], r)).clone())
    if x.S.numel() == 0:
        return
    for kept in range(r):
        u = USV(*map(torch.zeros_like, x))
        u.S[..., range(kept, r), range(kept, r)] = -values[kept:]
        try:
            m.replace(floor=0.0).retract(x, u)
        except StepError as error:
            holds("the message names the floor or another retraction", _has_way_out(str(error)))
        else:
            raise Broken(f"a step to rank {kept} raises StepError: it did not")
        if kept:
            _check_floor(m.replace(floor=1e-3), case, x, u)


def _has_way_out(message: str) -> bool:
    return "floor" in message or "retraction=" in message


def _check_floor(m: FixedRank, case: RankCase, x: USV, u: USV) -> None:
    try:
        y = m.retract(x, u)
    except StepError as error:
        # A retraction that needs a well-conditioned S + M says so.
        return holds("with a floor, a refusal names another retraction", "retraction=" in str(error))
    at_most("on the manifold where the floor acted", constraint_error(y), case.tolerance())
    singular = torch.linalg.svdvals(y.S.double())
    lowest = (singular[..., -1] / singular[..., 0]).amin().item()
    holds(f"the smallest singular value is {lowest:.3g} of the largest, at least the floor", lowest > 0.99e-3)
    # Raised by at most the floor's share of the largest, 1.5, in each of the lost directions.
    raised = matrix_norms(matrix_of(y) - matrix_of(x) - tangent_matrix(x, u))
    at_most("W moves by the floor at most", raised, 1.6e-3 * math.sqrt(x.S.shape[-1]))


@law
def law_rank_equivariance(m: FixedRank, case: RankCase) -> None:
    """The same W+ from other factors, R(h x, h u) = h R(x, u) and the same from the right, factor by factor."""
    rows, columns, r = case.sizes
    x = case.point()
    u = case.tangent(x)
    y = stepped(m, case, x, u)
    if y is None:
        return
    a, b = case.orthogonal(50, r), case.orthogonal(51, r)
    h, k = case.orthogonal(52, rows), case.orthogonal(53, columns)

    # Up stands beside V and turns as V does, Vp as U does.
    others = USV(x.U @ a, a.mT @ x.S @ b, x.V @ b), USV(u.U @ b, a.mT @ u.S @ b, u.V @ a)
    rotated = USV(h @ x.U, x.S, k @ x.V), USV(h @ u.U, u.S, k @ u.V)
    changes = {
        "other factors": (*others, USV(y.U @ a, a.mT @ y.S @ b, y.V @ b)),
        "rotated": (*rotated, USV(h @ y.U, y.S, k @ y.V)),
    }
    bound = case.tolerance(4 * (1 + case.scale) ** 2)
    for name, (point, vector, expected) in changes.items():
        moved = stepped(m, case, point, vector)
        if moved is None:
            continue
        at_most(f"{name}: the same matrix", matrix_of(moved) - matrix_of(expected), bound)
        if case.scale <= SAFE:
            at_most(f"{name}: the same factors", _difference(moved, expected), bound)


# Every method

Method = Callable[[USV, USV, USV, Tensor], Any]


def _methods(m: FixedRank, r: int) -> dict[str, Method]:
    """The batched methods as functions of a point, ambient coordinates, a step and a dense matrix."""
    return {
        "residual": lambda x, z, u, d: m.residual(x),
        "to_dense": lambda x, z, u, d: m.to_dense(x),
        "project_tangent": lambda x, z, u, d: m.project_tangent(x, z),
        "project_dense": lambda x, z, u, d: m.project_dense(x, d),
        "embed": lambda x, z, u, d: m.embed(x, u),
        "gradient": lambda x, z, u, d: m.gradient(x, z),
        "inner": lambda x, z, u, d: m.inner(x, u, z),
        "norm": lambda x, z, u, d: m.norm(x, u),
        "retract": lambda x, z, u, d: m.retract(x, u),
        "transport_vector": lambda x, z, u, d: m.transport_vector(x, u, x, z),
    }


_SCALARS = ("residual", "inner", "norm")


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _visible(name: str, result: Any) -> Tensor:
    """What two results must agree in: the matrix of a point, else every number, (k,)."""
    tensors = (matrix_of(result),) if name == "retract" else _tensors(result)
    return torch.cat([t.double().flatten() for t in tensors])


@law
def law_rank_stack(m: FixedRank, case: RankCase) -> None:
    """A stack gives what a loop gives, for any batch rank; an empty batch gives an empty batch."""
    # Unequal lengths, so that one matrix that decides for all shows.
    case = replace(case, scale=min(case.scale, 1.0))
    batch = replace(case, shape=(2, 2, *case.sizes))
    lengths = torch.logspace(-1, -4, 4, dtype=case.dtype).reshape(2, 2, 1, 1)
    x = batch.point()
    z, u = (type(v)(*(lengths * t for t in v)) for v in (batch.ambient(), batch.tangent(x)))
    args = (x, z, u, batch.dense())
    bound = case.tolerance((1 + case.scale) ** 2)
    for name, method in _methods(m, case.sizes[-1]).items():
        whole = method(*args)
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            one = method(*(_at(a, i, j) for a in args))
            piece = _at(whole, i, j)
            at_most(f"{name}: stack = loop", _visible(name, piece) - _visible(name, one), bound)
        for empty in ((0,), (2, 0)):
            given = [_emptied(a, empty) for a in args]
            shapes = {tuple(t.shape[: len(empty)]) for t in _tensors(method(*given))}
            holds(f"{name}: an empty batch gives an empty batch", shapes == {empty})


def _at(z: Any, i: int, j: int) -> Any:
    return z[i, j] if isinstance(z, Tensor) else type(z)(*(t[i, j] for t in z))


def _emptied(z: Any, batch: tuple[int, ...]) -> Any:
    tensors = [t.new_empty((*batch, *t.shape[-2:])) for t in _tensors(z)]
    return tensors[0] if isinstance(z, Tensor) else type(z)(*tensors)


@law
def law_rank_dtype(m: FixedRank, case: RankCase) -> None:
    """dtype is kept, float32 is near float64, and half precision is computed in float32."""
    case = replace(case, scale=min(case.scale, SAFE))
    x = case.point()
    args = (x, case.ambient(), case.tangent(x), case.dense())
    bound = replace(case, dtype=torch.float32).tolerance(2)
    for name, method in _methods(m, case.sizes[-1]).items():
        holds(f"{name}: the dtype is kept", {t.dtype for t in _tensors(method(*args))} == {case.dtype})
        single = [_as(a, torch.float32) for a in args]
        precise = method(*(_as(a, torch.float64) for a in single))
        error = _visible(name, method(*single)) - _visible(name, precise)
        at_most(f"{name}: float32 is near float64", error, bound)
        for dtype in HALF:
            half = [_as(a, dtype) for a in args]
            results = _tensors(method(*half))
            kept = torch.float32 if name in _SCALARS else dtype
            holds(f"{name}: the dtype is kept", {t.dtype for t in results} == {kept})
            lifted = _tensors(method(*(_as(a, torch.float32) for a in half)))
            same = all(torch.equal(a, b.to(a.dtype)) for a, b in zip(results, lifted, strict=True))
            holds(f"{name}: half precision is computed in float32", same)


def _as(z: Any, dtype: torch.dtype) -> Any:
    return z.to(dtype) if isinstance(z, Tensor) else cast(z, dtype)


@law
def law_rank_pure(m: FixedRank, case: RankCase) -> None:
    """No method changes its arguments or returns memory of theirs."""
    case = replace(case, scale=min(case.scale, SAFE))
    x = case.point()
    for step in (case.tangent(x), _zero(x)):
        args = (x, case.ambient(), step, case.dense())
        flat = [t for a in args for t in _tensors(a)]
        before = [t.clone() for t in flat]
        memory = {t.untyped_storage().data_ptr() for t in flat if t.numel()}
        for name, method in _methods(m, case.sizes[-1]).items():
            results = _tensors(method(*args))
            holds(f"{name}: arguments are unchanged", all(map(torch.equal, flat, before)))
            own = all(t.untyped_storage().data_ptr() not in memory for t in results if t.numel())
            holds(f"{name}: the result is new memory", own)


@law
def law_rank_drift(m: FixedRank, case: RankCase, *, steps: int = 5000) -> None:
    """After thousands of random steps the residual stays below 42 eps, 5e-6 in float32.

    Args:
        m: the manifold.
        case: ``scale`` is the length of every step; one matrix.
        steps: how many.
    """
    start = x = case.point()
    pool = [case.ambient(key) for key in range(100, 148, 3)]
    draw = torch.Generator().manual_seed(case.seed)
    for _ in range(steps):
        i, j = torch.randint(0, 1 << 30, (2,), generator=draw).tolist()
        # Turned draws stand for fresh ones; of S a little is taken back, so that it neither grows nor vanishes.
        z = USV(*(t.roll(j % t.shape[-2], -2) for t in pool[i % 16]))
        u = m.project_tangent(x, z._replace(S=z.S + 0.1 * case.scale * (start.S - x.S)))
        x = m.retract(x, u)
    at_most(f"on the manifold after {steps} steps", constraint_error(x), DRIFT * torch.finfo(case.dtype).eps)


RANK_MANIFOLD_LAWS: tuple[Law, ...] = (
    law_rank_membership,
    law_rank_project_point,
    law_rank_project_tangent,
    law_rank_dense,
    law_rank_gradient,
    law_rank_metric,
    law_rank_transport,
    law_rank_spec,
)
RANK_RETRACTION_LAWS: tuple[Law, ...] = (
    law_rank_retraction,
    law_rank_nearest,
    law_rank_gauge,
    law_rank_zero_step,
    law_rank_order,
    law_rank_huge,
    law_rank_loss,
    law_rank_equivariance,
    law_rank_stack,
    law_rank_dtype,
    law_rank_pure,
)


def rank_cases(*, max_r: int = 4, max_extra: int = 4, dtypes: Sequence[torch.dtype] = DTYPES) -> Any:
    """A hypothesis strategy of cases: no, one, several and empty batches, r = 1, r = min(m, n), m = n, m = n = r.

    Args:
        max_r: largest r.
        max_extra: largest m - r and n - r.
        dtypes: to draw from.

    Raises:
        ModuleNotFoundError: hypothesis is not installed (``pip install stiefelopt[test]``).
    """
    from hypothesis import strategies as st

    def case(
        batch: tuple[int, ...],
        r: int,
        extra: tuple[int, int],
        dtype: torch.dtype,
        exponent: float,
        seed: int,
    ) -> RankCase:
        return RankCase((*batch, r + extra[0], r + extra[1], r), dtype, 10.0**exponent, seed)

    return st.builds(
        case,
        st.sampled_from([(), (1,), (3,), (2, 2), (0,), (2, 0)]),
        st.integers(1, max_r),
        st.tuples(st.integers(0, max_extra), st.integers(0, max_extra)),
        st.sampled_from(list(dtypes)),
        st.floats(-6, 2, allow_nan=False).map(lambda e: round(e, 1)),
        st.integers(0, 999),
    )
