"""The laws of Stiefel geometry, as functions that anyone can run on their own manifold or retraction.

    check_manifold(Stiefel(metric="mine"))
    check_manifold(FixedRank("mine"))
    check_retraction("mine")
    check_retraction(lambda x, u: ..., order=2, equivariance="both")
    check_retraction(rank_retractions.get("mine"))

A law is a function ``law(m, case)`` of a manifold with the methods of `Stiefel` and of a `Case`, which says the
shape, the dtype, how long the steps are and the seed. It returns nothing, or raises an AssertionError that names
the law, what it claims, the numbers and the case. ``MANIFOLD_LAWS`` and ``RETRACTION_LAWS`` list them; only
`law_drift`, a walk of thousands of steps, stands apart. `cases` draws cases with hypothesis. The laws of `FixedRank`
are in `rank_laws`.

What a law compares with is computed here, densely and in float64, not by the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import metrics, projections, retractions
from .errors import ConfigError, StepError, StiefelOptError
from .laws import (
    DRIFT,
    DTYPES,
    HUGE,
    SCALES,
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
from .manifolds import FixedRank, FixedRankPair, Stiefel
from .pair_laws import PAIR_LAWS, PairCase
from .rank_laws import (
    RANK_MANIFOLD_LAWS,
    RANK_RETRACTION_LAWS,
    RANK_SHAPES,
    RankCase,
    law_rank_drift,
    law_rank_order,
)
from .rank_retractions import RankRetraction
from .retractions import Retraction
from .shapes import HALF, compute_dtype, tolerance

SHAPES = ((7, 3), (5, 2), (6, 1), (4, 4), (1, 1), (2, 3, 6, 3), (0, 5, 2))


@dataclass(frozen=True)
class Case:
    """Where a law is tried.

    Attributes:
        shape: of the points, (*b, n, p).
        dtype: of the points.
        scale: Frobenius norm of every vector drawn; steps are cut to the radius of the retraction.
        seed: equal seeds draw equal points and vectors.
    """

    shape: tuple[int, ...] = (7, 3)
    dtype: torch.dtype = torch.float64
    scale: float = 1.0
    seed: int = 0

    def tolerance(self, size: float = 1.0) -> float:
        """The one rule, 10 eps sqrt(n p), times the size of what is compared."""
        return size * tolerance(compute_dtype(self.dtype), *self.shape[-2:])

    def normal(self, key: int, shape: Sequence[int] | None = None) -> Tensor:
        """Gaussian numbers in float64."""
        generator = torch.Generator().manual_seed(1000 * self.seed + key)
        return torch.randn(*(shape or self.shape), dtype=torch.float64, generator=generator)

    def point(self, key: int = 0) -> Tensor:
        """A point."""
        return torch.linalg.qr(self.normal(key))[0].to(self.dtype)

    def ambient(self, key: int = 1) -> Tensor:
        """A matrix of norm ``scale``."""
        return rescaled(self.normal(key), self.scale).to(self.dtype)

    def tangent(self, x: Tensor, key: int = 2, columns: Tensor | None = None) -> Tensor:
        """A tangent vector (x a + b) k of norm ``scale``, a skew and x^T b = 0; k = columns makes it deficient."""
        p = x.shape[-1]
        k = torch.eye(p, dtype=torch.float64) if columns is None else columns
        a = self.normal(100 + key, (*x.shape[:-2], p, p))
        b = rescaled(_off(x.double(), self.normal(key, x.shape)), p)
        b = _off(x.double(), b)  # once more: a short b was stretched, and its rounding with it
        return rescaled(x.double() @ (k.mT @ (a - a.mT) @ k) + b @ k, self.scale).to(self.dtype)

    def step(self, m: Stiefel, x: Tensor, key: int = 2, columns: Tensor | None = None) -> Tensor:
        """A tangent vector that the manifold's retraction must take."""
        longest = 0.99 * retraction_of(m).radius
        return replace(self, scale=min(self.scale, longest)).tangent(x, key, columns)

    def deficient(self) -> dict[str, Tensor]:
        """p x p matrices that make columns equal, or one of them zero."""
        p = self.shape[-1]
        ones = torch.ones(p, p, dtype=torch.float64)
        return {"equal columns": ones / p, "a zero column": torch.diag((torch.arange(p) > 0).double())}


@dataclass(frozen=True)
class OwnCase(Case):
    """A case on a manifold of orthonormal columns that has no suite of its own: by what the manifold itself says.

    Its projections are what the laws then check: by their rank, the dimension, and the dense formulas of the laws.
    """

    m: Any = None

    def point(self, key: int = 0) -> Tensor:
        """A point: the projection of a Gaussian."""
        return self.m.project_point(self.normal(key)).to(self.dtype)

    def ambient(self, key: int = 1) -> Tensor:
        """A matrix of norm ``scale``, x h with a point x nearest to it and a positive h."""
        h = self.normal(500 + key, (*self.shape[:-2], self.shape[-1], self.shape[-1]))
        x = replace(self, dtype=torch.float64).point(600 + key)
        return rescaled(x @ (h.mT @ h), self.scale).to(self.dtype)

    def tangent(self, x: Tensor, key: int = 2, columns: Tensor | None = None) -> Tensor:
        """x k^T w k + b k of norm ``scale``, where x w + b is tangent, made of a Gaussian by the manifold."""
        x = x.double()
        u = self.m.project_tangent(x, self.m.project_tangent(x, self.normal(key, x.shape)))
        k = torch.eye(x.shape[-1], dtype=torch.float64) if columns is None else columns
        return rescaled(x @ (k.mT @ (x.mT @ u) @ k) + _off(x, u) @ k, self.scale).to(self.dtype)


law = law_at(Case)


def _off(x: Tensor, z: Tensor) -> Tensor:
    """z - x x^T z, exactly zero for a square x."""
    return z - x @ (x.mT @ z) if x.shape[-2] > x.shape[-1] else torch.zeros_like(z)


def _residual(x: Tensor) -> Tensor:
    c = x.double().mT @ x.double()
    return c - torch.eye(c.shape[-1], dtype=c.dtype)


def _normal_part(x: Tensor, u: Tensor) -> Tensor:
    """sym(x^T u), which vanishes for a tangent u."""
    w = x.double().mT @ u.double()
    return 0.5 * (w + w.mT)


def retraction_of(m: Stiefel) -> Retraction:
    """The manifold's retraction as a part, with what it declares (a plain function declares nothing)."""
    return m.retraction_part


def serves(r: Retraction, metric: str) -> bool:
    """Whether the retraction exists for that metric: all do but ``exp``, which needs a known geodesic."""
    return not r.variants or metric in r.variants


def geodesic(metric: str, x: Tensor, u: Tensor) -> Tensor:
    """The geodesic at time 1 from n x n exponentials, float64: the reference of every order.

    expm(u x^T - x u^T - c x a x^T) x expm((c - 1) a), a = x^T u, c = 1 (canonical) or 0 (Euclidean).

    Args:
        metric: "canonical" or "euclidean".
        x: point (*b, n, p).
        u: tangent vector, same shape.

    Raises:
        ConfigError: no closed form is known for that metric.

    Reference: Hueper, Markina & Silva Leite (2021), theorem 2.1 and its limits.
    """
    if metric not in ("canonical", "euclidean"):
        raise ConfigError(
            f"no closed geodesic is known for metric {metric!r}; use 'canonical' or 'euclidean'."
        )
    x, u = x.double(), u.double()
    c = 1.0 if metric == "canonical" else 0.0
    a = x.mT @ u
    a = 0.5 * (a - a.mT)
    turn = u @ x.mT - x @ u.mT - c * (x @ a @ x.mT)
    return _rotation(turn) @ x @ _rotation((c - 1.0) * a)


def _rotation(a: Tensor) -> Tensor:
    """expm(a) of a skew-symmetric a, from the eigenvectors of the Hermitian i a."""
    angles, v = torch.linalg.eigh(1j * a)
    return (v * torch.exp(-1j * angles)[..., None, :] @ v.mH).real


# The manifold: points, tangent vectors, metric


@law
def law_membership(m: Stiefel, case: Case) -> None:
    """``residual`` tells points from others, ``check`` acts on it, ``random_point`` and ``random_tangent`` fit."""

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(case.seed + seed)

    x, again, other = (m.random_point(*case.shape, dtype=case.dtype, generator=seeded(k)) for k in (0, 0, 2))
    holds("equal generators draw equal points", torch.equal(x, again))
    holds("random_point has the shape and dtype asked for", (x.shape, x.dtype) == (case.shape, case.dtype))
    at_most("random_point lies on the manifold", _residual(x), case.tolerance())
    m.check(x)
    z = x + case.ambient()
    at_most(
        "residual is max |x^T x - I|",
        m.residual(z).double() - _residual(z).abs().amax((-2, -1)),
        case.tolerance(4 * (1 + case.scale) ** 2),
    )
    u, again, v = (m.random_tangent(x, seeded(k)) for k in (1, 1, 2))
    at_most("random_tangent is tangent", _normal_part(x, u), case.tolerance())
    holds("equal generators draw equal tangent vectors", torch.equal(u, again))
    if m.dim(*case.shape) > 0:
        at_most("random_tangent has unit norm", m.norm(x, u) - 1, case.tolerance())
        holds("other seeds draw other points", not torch.equal(x, other))
    n, p = case.shape[-2:]
    if x.numel() and m.dim(n, p) > 1:  # along a curve there are two of unit norm
        holds("other seeds draw other tangent vectors", not torch.equal(u, v))
    holds("dim counts a batch's points", m.dim(3, n, p) == 3 * m.dim(n, p))
    for wrong in (2 * x, x * math.nan) if x.numel() else ():
        try:
            m.check(wrong)
        except StiefelOptError:
            continue
        raise Broken("check refuses what is not a point: it accepted 2 x or NaN")


@law
def law_project_point(m: Stiefel, case: Case) -> None:
    """project_point lands on the manifold, at the nearest point; it is idempotent and fixes points."""
    x, z = case.point(), case.ambient()
    y = m.project_point(z)
    at_most("the result lies on the manifold", _residual(y), case.tolerance())
    at_most("idempotent", m.project_point(y) - y, case.tolerance())
    at_most("fixes points", m.project_point(x) - x, case.tolerance())
    # The nearest point is the one for which y^T z is symmetric positive semidefinite.
    h = y.double().mT @ z.double()
    at_most("nearest: y^T z is symmetric", h - h.mT, case.tolerance(case.scale))
    at_most("nearest: y^T z is positive", torch.linalg.eigvalsh(h).clamp_max(0), case.tolerance(case.scale))


def _check_projection(project: Callable[[Tensor, Tensor], Tensor], case: Case) -> None:
    x, z = case.point(), case.ambient()
    u, v = project(x, z), case.tangent(x)
    at_most("the result is tangent", _normal_part(x, u), case.tolerance(case.scale))
    at_most("idempotent", project(x, u) - u, case.tolerance(case.scale))
    at_most("fixes tangent vectors", project(x, v) - v, case.tolerance(case.scale))


@law
def law_project_tangent(m: Stiefel, case: Case) -> None:
    """project_tangent is the orthogonal projection: tangent, idempotent, self-adjoint, of the right rank."""
    _check_projection(m.project_tangent, case)
    x, z, v = case.point(), case.ambient(3), case.ambient(4)
    pz, pv = m.project_tangent(x, z), m.project_tangent(x, v)
    difference = (pz.double() * v.double() - z.double() * pv.double()).sum((-2, -1))
    at_most("self-adjoint: <P z, v> = <z, P v>", difference, case.tolerance(case.scale**2))
    n, p = case.shape[-2:]
    basis = torch.eye(n * p, dtype=case.dtype).reshape(n * p, n, p)
    one = replace(case, shape=(n, p)).point().expand_as(basis)
    rank = (m.project_tangent(one, basis) * basis).sum()
    at_most("its rank is the dimension", rank - m.dim(n, p), case.tolerance(n * p))


@law
def law_projection(m: Stiefel, case: Case) -> None:
    """The manifold's own projection of displacements is tangent, idempotent, and keeps tangent vectors."""
    if getattr(m, "projection", "none") != "none":
        _check_projection(projections.get(m.projection), case)


@law
def law_gradient(m: Stiefel, case: Case) -> None:
    """gradient is tangent, linear, and inner(x, gradient(x, g), v) = <g, v> for every tangent v."""
    x, g, h = case.point(), case.ambient(3), case.ambient(4)
    u = m.gradient(x, g)
    at_most("tangent", _normal_part(x, u), case.tolerance(case.scale))
    linear = m.gradient(x, 2 * g - 3 * h) - (2 * u - 3 * m.gradient(x, h))
    at_most("linear", linear, case.tolerance(5 * case.scale))
    for key in (5, 6):
        v = case.tangent(x, key)
        difference = m.inner(x, u, v).double() - (g.double() * v.double()).sum((-2, -1))
        at_most("inner(x, gradient(x, g), v) = <g, v>", difference, case.tolerance(case.scale**2))


@law
def law_metric(m: Stiefel, case: Case) -> None:
    """The inner product is symmetric, bilinear and positive definite; norm is its root."""
    x = case.point()
    u, v, w = (case.tangent(x, key) for key in (3, 4, 5))
    size = case.scale**2
    uv = m.inner(x, u, v)
    holds("inner has the batch shape", uv.shape == case.shape[:-2])
    at_most("symmetric", uv - m.inner(x, v, u), case.tolerance(size))
    linear = m.inner(x, 2 * u - 3 * w, v) - (2 * uv - 3 * m.inner(x, w, v))
    at_most("bilinear", linear, case.tolerance(5 * size))
    # Turning within the span of x and leaving it are the two kinds of tangent vectors.
    turn = (x.double() @ (x.double().mT @ u.double())).to(case.dtype)
    leave = _off(x.double(), u.double()).to(case.dtype)
    largest = m.inner(x, u, u)
    for part in (u, turn, leave):
        share = part.double().square().sum((-2, -1)) / size
        positive = m.inner(x, part, part) > 1e-4 * share * largest
        holds("positive definite", bool((positive | (share < 1e-4)).all()))
    at_most("norm(x, u)^2 = inner(x, u, u)", m.norm(x, u) ** 2 - m.inner(x, u, u), case.tolerance(size))


@law
def law_exp(m: Stiefel, case: Case) -> None:
    """exp is the geodesic of the metric: it starts at x, has constant speed, and equals the dense formula."""
    x = case.point()
    u = case.tangent(x)
    try:
        y = m.exp(x, u)
    except ConfigError:
        return  # A metric of one's own need not know its geodesics.
    at_most("the result lies on the manifold", _residual(y), case.tolerance(1 + case.scale**2))
    holds("exp(x, 0) = x bit for bit", torch.equal(m.exp(x, torch.zeros_like(x)), x))
    if m.metric in ("canonical", "euclidean"):
        error = y.double() - geodesic(m.metric, x, u)
        at_most("equals the dense geodesic", error, case.tolerance(1 + case.scale**2))
    x, h = x.double(), 1e-4
    u = replace(case, scale=1.0, dtype=torch.float64).tangent(x)
    velocity = (m.exp(x, (0.5 + h) * u) - m.exp(x, (0.5 - h) * u)) / (2 * h)
    at_most("constant speed", m.norm(m.exp(x, 0.5 * u), velocity) - m.norm(x, u), 1e-6)


@law
def law_transport(m: Stiefel, case: Case) -> None:
    """A transported vector is tangent at y, depends linearly on v, and tends to v as u tends to 0."""
    x = case.point()
    u, v, w = case.step(m, x, 3), case.tangent(x, 4), case.tangent(x, 5)
    y = m.retract(x, u)
    moved = m.transport_vector(x, u, y, v)
    at_most("tangent at y", _normal_part(y, moved), case.tolerance(case.scale))
    linear = m.transport_vector(x, u, y, 2 * v - 3 * w) - (2 * moved - 3 * m.transport_vector(x, u, y, w))
    at_most("linear", linear, case.tolerance(5 * case.scale))
    still = m.transport_vector(x, torch.zeros_like(u), x, v)
    at_most("the identity at u = 0", still - v, case.tolerance(case.scale))
    single, x, u = _single(case)
    v = single.tangent(x, 4)

    def change(t: Tensor) -> Tensor:
        xs, us, vs = torch.broadcast_tensors(x, t * u, v)
        return matrix_norms(m.transport_vector(xs, us, m.retract(xs, us), vs) - v)

    k = slope_of(change, torch.arange(-4, -1.5, 0.5))
    holds(f"tends to the identity as u tends to 0 (slope {k:.2f}, 0.7 is needed)", k >= 0.7)


def _single(case: Case) -> tuple[Case, Tensor, Tensor]:
    """One float64 matrix and a unit tangent vector: what slopes are measured on."""
    single = replace(case, shape=case.shape[-2:], dtype=torch.float64, scale=1.0)
    x = single.point()
    return single, x, single.tangent(x)


@law
def law_spec(m: Stiefel, case: Case) -> None:
    """A manifold survives being written as plain strings and numbers; one with a live function refuses."""
    if isinstance(m.retraction, str):
        return check_spec(m)
    try:
        m.spec()
    except ConfigError:
        return
    raise Broken("spec() of a live function raises ConfigError: it did not")


# The retraction


@law
def law_retraction(m: Stiefel, case: Case) -> None:
    """R(x, u) lies on the manifold, passes ``check``, and is x + u + O(u^2); also for deficient u."""
    x = case.point()
    steps = {"a generic step": case.step(m, x)}
    steps |= {name: case.step(m, x, columns=k) for name, k in case.deficient().items()}
    for name, u in steps.items():
        y = m.retract(x, u)
        at_most(f"the result lies on the manifold ({name})", _residual(y), case.tolerance())
        norm = matrix_norms(u.double()).amax().item() if u.numel() else 0.0
        if norm <= 0.1:
            error = y.double() - x.double() - u.double()
            at_most(f"R(x, u) = x + u + O(u^2) ({name})", error, 2 * norm**2 + case.tolerance())


@law
def law_zero_step(m: Stiefel, case: Case) -> None:
    """R(x, 0) = x bit for bit, also within a batch and for -0.0; a u with x^T u = 0 alone is no zero step."""
    x = case.point()
    for zero in (torch.zeros_like(x), -torch.zeros_like(x)):
        holds("R(x, 0) = x bit for bit", torch.equal(m.retract(x, zero), x))
    three = replace(case, shape=(3, *case.shape[-2:]))
    x = three.point()
    u = three.step(m, x)
    u[1] = 0
    y = m.retract(x, u)
    holds("R(x, 0) = x bit for bit within a batch", torch.equal(y[1], x[1]))
    n, p = case.shape[-2:]
    if n == p:
        return
    x = torch.eye(n, p, dtype=case.dtype)
    u = torch.zeros_like(x)
    u[p, 0] = 1e-3
    at_most("follows a u with x^T u = 0", m.retract(x, u) - x - u, 1e-5)


@law
def law_order(m: Stiefel, case: Case) -> None:
    """|R(x, t u) - Exp(x, t u)| ~ t^(k+1) for the declared order k: not less, and for k = 1 not more; 0 where exact.

    "Not more" is asked where the order shows: 2 <= p < n, and p >= 3 for retractions that are not right equivariant.
    """
    single, x, u = _single(case)
    r = retraction_of(m)
    order = r.order.get(m.metric)

    def error(t: Tensor) -> Tensor:
        try:
            y = geodesic(m.metric, x, t * u)
        except ConfigError:
            y = m.exp(x, t * u)
        return matrix_norms(m.retract(x.expand_as(y), t * u) - y)

    try:
        error(torch.zeros(1, 1))
    except ConfigError:
        return  # No geodesic is known to compare with.
    if order == math.inf:
        for t in (1e-3, 1e-2, 0.1, 1.0):  # one by one: a stack may take another path
            at_most("exact: R = Exp", error(torch.tensor([[t]], dtype=x.dtype)), single.tolerance(2))
        return
    check_slope("|R(x, t u) - Exp(x, t u)|", error, order, _shows_order(r, x))


@law
def law_second_order(m: Stiefel, case: Case) -> None:
    """|P_x(R(x, t u) - x - t u)| ~ t^3 exactly for order 2 in the Euclidean metric, without any geodesic."""
    r = retraction_of(m)
    if m.metric != "euclidean" or "euclidean" not in r.order:
        return
    _, x, u = _single(case)

    def error(t: Tensor) -> Tensor:
        z = m.retract(x.expand_as(t * u), t * u) - x - t * u
        return matrix_norms(z - x @ _normal_part(x, z))

    check_slope("|P_x(R(x, t u) - x - t u)|", error, min(2, r.order["euclidean"]), _shows_order(r, x))


def _shows_order(r: Retraction, x: Tensor) -> bool:
    n, p = x.shape
    return (2 if r.equivariance == "both" else 3) <= p < n


@law
def law_radius(m: Stiefel, case: Case) -> None:
    """Beyond the radius StepError; with no radius a step of norm 1e4 ends on the manifold, or in StepError."""
    x = case.point()
    radius = retraction_of(m).radius
    far = replace(case, scale=HUGE if radius == math.inf else 1.5 * radius * math.sqrt(case.shape[-1]))
    for columns in (None, *case.deficient().values()):
        u = far.tangent(x, 2, columns)
        try:
            y = m.retract(x, u)
        except StepError:
            continue
        beyond = torch.linalg.matrix_norm(u.double(), 2) > radius if u.numel() else torch.tensor([False])
        holds(f"refuses a step beyond its radius {radius:g}", not bool(beyond.any()))
        at_most(
            f"the result of a step of norm {far.scale:g} lies on the manifold", _residual(y), case.tolerance()
        )


@law
def law_equivariance(m: Stiefel, case: Case) -> None:
    """R(h x, h u) = h R(x, u) for orthogonal h, and R(x k, u k) = R(x, u) k where "both" is declared."""
    n, p = case.shape[-2:]
    declared = retraction_of(m).equivariance
    x = case.point()
    u = case.step(m, x)
    y = m.retract(x, u)
    h, k = (torch.linalg.qr(case.normal(7, (s, s)))[0].to(case.dtype) for s in (n, p))
    bound = case.tolerance(1 + case.scale**2)
    if declared in ("left", "both"):
        at_most("R(h x, h u) = h R(x, u)", m.retract(h @ x, h @ u) - h @ y, bound)
    if declared == "both":
        at_most("R(x k, u k) = R(x, u) k", m.retract(x @ k, u @ k) - y @ k, bound)


# Every method


def _methods(m: Stiefel) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The batched methods as functions of a point, an ambient matrix and a step."""
    methods: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "residual": lambda x, z, u: m.residual(x),
        # Near a point, since far from one the nearest point is ill conditioned.
        "project_point": lambda x, z, u: m.project_point(x + 0.1 * z / (1 + matrix_norms(z))),
        "project_tangent": lambda x, z, u: m.project_tangent(x, z),
        "gradient": lambda x, z, u: m.gradient(x, z),
        "inner": lambda x, z, u: m.inner(x, u, u),
        "norm": lambda x, z, u: m.norm(x, u),
        "retract": lambda x, z, u: m.retract(x, u),
        "transport_vector": lambda x, z, u: m.transport_vector(x, u, x + u, u),
    }
    if m.metric in retractions.exp.variants:
        methods["exp"] = lambda x, z, u: m.exp(x, u)
    return methods


_SCALARS = ("residual", "inner", "norm")


@law
def law_stack(m: Stiefel, case: Case) -> None:
    """A stack gives what a loop gives, for any batch rank; an empty batch gives an empty batch."""
    n, p = case.shape[-2:]
    batch = replace(case, shape=(2, 3, n, p))
    x = batch.point()
    # Unequal lengths, so that one matrix that decides for all shows.
    lengths = torch.logspace(0, -3, 6, dtype=case.dtype).reshape(2, 3, 1, 1)
    args = (x, lengths * batch.ambient(), lengths * batch.step(m, x))
    bound = case.tolerance((1 + case.scale) ** 3)
    for name, method in _methods(m).items():
        whole = method(*args)
        looped = [method(*(a[i, j] for a in args)) for i in range(2) for j in range(3)]
        at_most(f"{name}: stack = loop", whole.flatten(0, 1) - torch.stack(looped), bound)
        for shape in ((0, n, p), (2, 0, n, p)):
            empty = torch.empty(shape, dtype=case.dtype)
            result = method(empty, empty, empty)
            expected = shape[:-2] if name in _SCALARS else shape
            holds(f"{name}: an empty batch gives an empty batch", tuple(result.shape) == expected)


@law
def law_dtype(m: Stiefel, case: Case) -> None:
    """dtype is kept, float32 is near float64, and half precision is computed in float32."""
    x = case.point()
    args = (x, case.ambient(), case.step(m, x))
    bound = replace(case, dtype=torch.float32).tolerance((1 + case.scale) ** 3)
    for name, method in _methods(m).items():
        result = method(*args)
        holds(f"{name}: the dtype is kept", result.dtype == case.dtype)
        single = tuple(a.float() for a in args)
        precise = method(*(a.double() for a in single))
        at_most(f"{name}: float32 is near float64", method(*single).double() - precise, bound)
        if name not in (
            "transport_vector",
            "project_point",
        ):  # their lambdas compute in half precision themselves
            for dtype in HALF:
                _check_half(name, method, [a.to(dtype) for a in args], dtype)


def _check_half(name: str, method: Callable[..., Tensor], args: list[Tensor], dtype: torch.dtype) -> None:
    try:
        expected = method(*(a.float() for a in args))
    except StepError:
        return  # Rounded to half precision the step may lie beyond the radius.
    result = method(*args)
    holds(f"{name}: the dtype is kept", result.dtype == (torch.float32 if name in _SCALARS else dtype))
    same = torch.equal(result.nan_to_num(), expected.to(result.dtype).nan_to_num())
    holds(f"{name}: half precision is computed in float32", same)


@law
def law_pure(m: Stiefel, case: Case) -> None:
    """No method changes its arguments or returns memory of theirs."""
    x = case.point()
    u = case.step(m, x)
    for step in (u, torch.zeros_like(u)):
        args = (x, case.ambient(), step)
        before = [a.clone() for a in args]
        for name, method in _methods(m).items():
            result = method(*args)
            same = all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
            holds(f"{name}: arguments are unchanged", same)
            memory = {a.untyped_storage().data_ptr() for a in args if a.numel()}
            holds(f"{name}: the result is new memory", result.untyped_storage().data_ptr() not in memory)


@law
def law_drift(m: Stiefel, case: Case, *, steps: int = 5000) -> None:
    """After thousands of random steps the residual stays below 42 eps, 5e-6 in float32.

    Args:
        m: the manifold.
        case: ``scale`` is the length of every step; the issue's are (64, 8), (1024, 64), float32 and 1e-2.
        steps: how many.
    """
    x = case.point()
    pool = [case.ambient(key) for key in range(10, 26)]
    draw = torch.Generator().manual_seed(case.seed)
    for _ in range(steps):
        i, j = torch.randint(0, 1 << 30, (2,), generator=draw).tolist()
        # Turned and summed draws stand for fresh ones, which would cost more than the steps.
        u = m.project_tangent(x, pool[i % 16].roll(j % case.shape[-2], -2) + 0.5 * pool[(i + 1) % 16])
        x = m.retract(x, u * (case.scale / matrix_norms(u)))
    at_most(f"on the manifold after {steps} steps", _residual(x), DRIFT * torch.finfo(case.dtype).eps)


MANIFOLD_LAWS: tuple[Law, ...] = (
    law_membership,
    law_project_point,
    law_project_tangent,
    law_projection,
    law_gradient,
    law_metric,
    law_exp,
    law_transport,
    law_spec,
)
RETRACTION_LAWS: tuple[Law, ...] = (
    law_retraction,
    law_zero_step,
    law_order,
    law_second_order,
    law_radius,
    law_equivariance,
    law_stack,
    law_dtype,
    law_pure,
)


@dataclass(frozen=True)
class Suite:
    """The laws of one kind of manifold, and where they are tried.

    Attributes:
        laws: all of them but the walk.
        shapes: of points, where the caller names none.
        case: makes a case from shape, dtype, scale and seed.
    """

    laws: tuple[Law, ...]
    shapes: tuple[tuple[int, ...], ...]
    case: Callable[[tuple[int, ...], torch.dtype, float, int], Any]


STIEFEL = Suite((*MANIFOLD_LAWS, *RETRACTION_LAWS), SHAPES, Case)
FIXED_RANK = Suite((*RANK_MANIFOLD_LAWS, *RANK_RETRACTION_LAWS), RANK_SHAPES, RankCase)
PAIRS = Suite(PAIR_LAWS, RANK_SHAPES, PairCase)
SUITES: dict[type, Suite] = {Stiefel: STIEFEL, FixedRank: FIXED_RANK, FixedRankPair: PAIRS}


def suite_of(m: Any) -> Suite:
    """The laws of the nearest known class above a manifold's.

    Where there is none those of Stiefel, at the shapes that it ``fits`` and with points that the manifold makes.

    Raises:
        ConfigError: there is none, and its points have no orthonormal columns.
    """
    known = next((SUITES[cls] for cls in type(m).__mro__ if cls in SUITES), None)
    if known is not None:
        return known
    _check_has_frames(m)

    def case(shape: tuple[int, ...], dtype: torch.dtype, scale: float, seed: int) -> OwnCase:
        return OwnCase(m.fits(shape), dtype, scale, seed, m)

    return replace(STIEFEL, shapes=tuple(dict.fromkeys(map(m.fits, SHAPES))), case=case)


def _check_has_frames(m: Any) -> None:
    """Refuse a manifold of which the laws of Stiefel say nothing: they would call it broken."""
    name = type(m).__name__
    way_out = "FixedRank and FixedRankPair have laws of their own; of other manifolds test what they claim yourself."
    if m.held == "tensor":
        raise ConfigError(
            f"a point of {name} is a tensor, and the laws are those of orthonormal columns: {way_out}"
        )
    case = Case(m.fits(Case.shape))
    made = [m.project_point(case.normal(0))]
    if hasattr(m, "random_point"):  # one of the two may be what is broken
        made.append(m.random_point(*case.shape, dtype=case.dtype, generator=torch.Generator().manual_seed(0)))
    off = min(_residual(x).abs().amax().item() for x in made)
    if not off < 0.1:
        raise ConfigError(
            f"project_point of {name} makes points with |x^T x - I| = {off:.2g}, and the laws are those of orthonormal "
            f"columns: let fits(shape) name shapes where it has them. {way_out}"
        )


def check_manifold(
    m: Stiefel | FixedRank | FixedRankPair,
    *,
    shapes: Sequence[tuple[int, ...]] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    scales: Sequence[float] = SCALES,
    seed: int = 0,
) -> None:
    """Run every law on a manifold; ten to thirty seconds.

    Args:
        m: a `Stiefel`, or anything with its methods on matrices with orthonormal columns; a `FixedRank` or
            `FixedRankPair`, or a subclass of one.
        shapes: of points, (*b, n, p), or (*b, m, n, r) on FixedRank. Orders show at 3 <= p < n, 2 <= r < min(m, n).
        dtypes: of points.
        scales: Frobenius norms of the vectors.
        seed: of the draws.

    Raises:
        AssertionError: names the law that does not hold, and the numbers.
        ConfigError: a manifold of another kind, whose points have no orthonormal columns.
    """
    suite = suite_of(m)
    _check_all(suite, m, suite.shapes if shapes is None else shapes, dtypes, scales, seed)


def check_retraction(
    r: str | Retraction | RankRetraction | Callable[[Tensor, Tensor], Tensor],
    order: Mapping[str, float] | float | None = None,
    *,
    equivariance: str | None = None,
    radius: float | None = None,
    shapes: Sequence[tuple[int, ...]] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    scales: Sequence[float] = SCALES,
    steps: int = 1000,
    seed: int = 0,
) -> None:
    """Run the laws of retractions under every registered metric; about ten seconds.

    Args:
        r: of Stiefel, a registered name, a `Retraction`, or a plain function ``(x, u) -> y`` on stacks (B, n, p);
            of FixedRank, what ``rank_retractions.register`` or ``rank_retractions.get`` returned.
        order: the order to check, in place of the declared one: a mapping from metric to order, or a number for
            the Euclidean metric, which is what "second order" means in the literature. Undeclared orders are
            checked to be at least 1.
        equivariance: "both" or "left", in place of the declared one.
        radius: the largest ||u||_2 that is tried, in place of the declared one; with none, a step of norm 1e4 has to
            end on the manifold too. Register the function with it, so that longer steps are refused.
        shapes: of points, as in `check_manifold`.
        dtypes: of points.
        scales: Frobenius norms of the steps; cut to the retraction's radius.
        steps: length of the walk that looks for drift.
        seed: of the draws.

    Raises:
        AssertionError: names the law that does not hold, and the numbers.
        UnknownNameError: r, or a metric in the order, is not registered.
        ConfigError: what is to be checked cannot be true of any retraction, or is not asked on FixedRank.
    """
    if isinstance(r, RankRetraction):
        if equivariance is not None or radius is not None:
            raise ConfigError(
                "equivariance= and radius= are for retractions of Stiefel; leave them out for FixedRank."
            )
        return _check_rank_retraction(r, order, shapes, dtypes, scales, steps, seed)
    shapes = SHAPES if shapes is None else shapes
    part = retraction_of(Stiefel(retraction=r))
    part = _with_facts(part, order, radius, equivariance)
    for metric in metrics.names():
        if not serves(part, metric):
            continue
        m = Stiefel(metric=metric, retraction=part)
        _check_all(replace(STIEFEL, laws=RETRACTION_LAWS), m, shapes, dtypes, scales, seed)
        law_drift(m, Case((16, 3), torch.float32, 1e-2, seed), steps=steps)


def _with_facts(
    part: Retraction,
    order: Mapping[str, float] | float | None,
    radius: float | None,
    equivariance: str | None,
) -> Retraction:
    """A retraction with what is to be checked in place of what it declares."""
    given: dict[str, Any] = {"radius": radius, "equivariance": equivariance}
    given["order"] = {"euclidean": order} if isinstance(order, (int, float)) else order
    given = {fact: value for fact, value in given.items() if value is not None}
    tried = {"order": {}, "radius": math.inf, "equivariance": "both", **given}
    retractions.checked_facts(part.name, **tried)
    return replace(part, **given)


def _check_rank_retraction(
    r: RankRetraction, order: Any, shapes: Any, dtypes: Any, scales: Any, steps: int, seed: int
) -> None:
    if order is not None and not isinstance(order, (int, float)):
        raise ConfigError(f"order={order!r}; a number is needed: FixedRank has one metric.")
    m = FixedRank(r.name)
    law_rank_order(m, order=r.order if order is None else order)
    suite = replace(FIXED_RANK, laws=tuple(law for law in RANK_RETRACTION_LAWS if law is not law_rank_order))
    _check_all(suite, m, suite.shapes if shapes is None else shapes, dtypes, scales, seed)
    law_rank_drift(m, RankCase((16, 12, 3), torch.float32, 1e-2, seed), steps=steps)


def _check_all(suite: Suite, m: object, shapes: Any, dtypes: Any, scales: Any, seed: int) -> None:
    for shape in shapes:
        for dtype in dtypes:
            for scale in scales:
                for law in suite.laws:
                    law(m, suite.case(tuple(shape), dtype, scale, seed))


def cases(*, max_p: int = 5, max_extra: int = 6, dtypes: Sequence[torch.dtype] = DTYPES) -> Any:
    """A hypothesis strategy of cases: no, one, several and empty batches, p = 1, p = n, scales 1e-6 to 1e2.

    Args:
        max_p: largest p.
        max_extra: largest n - p.
        dtypes: to draw from.

    Raises:
        ModuleNotFoundError: hypothesis is not installed (``pip install stiefelopt[test]``).
    """
    from hypothesis import strategies as st

    def case(
        batch: tuple[int, ...], p: int, extra: int, dtype: torch.dtype, exponent: float, seed: int
    ) -> Case:
        return Case((*batch, p + extra, p), dtype, 10.0**exponent, seed)

    return st.builds(
        case,
        st.sampled_from([(), (1,), (3,), (2, 2), (0,), (2, 0)]),
        st.integers(1, max_p),
        st.integers(0, max_extra),
        st.sampled_from(list(dtypes)),
        st.floats(-6, 2, allow_nan=False).map(lambda e: round(e, 1)),
        st.integers(0, 999),
    )
