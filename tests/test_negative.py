"""A law is worth what it catches: for each a broken counter-example, which it must refuse by its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stiefelopt import RiemannianWrapper, Stiefel, metrics, projections, retractions, testing, transports
from stiefelopt.errors import StepError
from stiefelopt.gram import gram, sym
from stiefelopt.laws import Law
from stiefelopt.retractions import Retraction
from stiefelopt.testing import MANIFOLD_LAWS, RETRACTION_LAWS, Case, check_manifold, check_retraction

EXAMPLES: list[tuple[Law, str, Callable[[], Stiefel], str]] = []


def breaks(law: Law, claim: str) -> Callable[[Callable[[], Stiefel]], Callable[[], Stiefel]]:
    """Collect a function that makes a manifold for which the law must refuse the claim."""

    def add(make: Callable[[], Stiefel]) -> Callable[[], Stiefel]:
        EXAMPLES.append((law, claim, make, make.__name__))
        return make

    return add


def broken(m: Stiefel | None = None, **methods: Callable[..., Any]) -> Stiefel:
    """A Stiefel with some methods replaced."""
    m = Stiefel() if m is None else m
    cls = type("Broken", (Stiefel,), methods)
    return cls(m.metric, m.retraction, m.transport, m.projection)


def retracting(
    f: Callable[[Tensor, Tensor], Tensor], metric: str = "canonical", name: str = "polar"
) -> Stiefel:
    """A Stiefel whose retract is f while it says it was another."""
    return broken(Stiefel(metric, name), retract=lambda self, x, u: f(x, u))


def declared(name: str, **facts: Any) -> Retraction:
    """A registered retraction that claims something else of itself."""
    return replace(retractions.get(name), **facts)


def polar_by_svd(x: Tensor, u: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(x + u, full_matrices=False)
    return left @ right


def same(x: Tensor, *_: Tensor) -> Tensor:
    return x.clone()


# Points


@breaks(testing.law_membership, "residual is max")
def residual_that_is_always_zero() -> Stiefel:
    return broken(residual=lambda self, x: torch.zeros(x.shape[:-2], dtype=x.dtype))


@breaks(testing.law_membership, "check refuses")
def check_that_accepts_all() -> Stiefel:
    return broken(check=lambda self, x: None)


@breaks(testing.law_membership, "random_point lies on the manifold")
def random_points_that_are_only_normalized() -> Stiefel:
    def random_point(self: Stiefel, *shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        z = torch.randn(shape, dtype=dtype, generator=generator)
        return z / z.norm(dim=-2, keepdim=True)

    return broken(random_point=random_point)


@breaks(testing.law_membership, "equal generators")
def random_points_that_ignore_the_generator() -> Stiefel:
    def random_point(self: Stiefel, *shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        return torch.linalg.qr(torch.randn(shape, dtype=dtype))[0]

    return broken(random_point=random_point)


@breaks(testing.law_membership, "other seeds draw other points")
def random_points_that_are_always_the_same() -> Stiefel:
    def random_point(self: Stiefel, *shape: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        return torch.eye(*shape[-2:], dtype=dtype).expand(shape).clone()

    return broken(random_point=random_point)


@breaks(testing.law_membership, "equal generators draw equal tangent vectors")
def random_tangents_that_ignore_the_generator() -> Stiefel:
    return broken(random_tangent=lambda self, x, generator: Stiefel().random_tangent(x))


@breaks(testing.law_membership, "other seeds draw other tangent vectors")
def random_tangents_that_are_always_the_same() -> Stiefel:
    def random_tangent(self: Stiefel, x: Tensor, generator: torch.Generator) -> Tensor:
        return Stiefel().random_tangent(x, torch.Generator().manual_seed(0))

    return broken(random_tangent=random_tangent)


@breaks(testing.law_membership, "dim counts a batch's points")
def dimension_of_one_point() -> Stiefel:
    return broken(dim=lambda self, *shape: Stiefel().dim(*shape[-2:]))


@breaks(testing.law_membership, "random_tangent has unit norm")
def random_tangent_of_unit_norm_in_another_metric() -> Stiefel:
    return broken(random_tangent=lambda self, x, g: Stiefel("euclidean").random_tangent(x, g))


@breaks(testing.law_project_point, "nearest: y^T z is symmetric")
def project_point_by_qr() -> Stiefel:
    return broken(project_point=lambda self, z: torch.linalg.qr(z)[0])


@breaks(testing.law_project_point, "lies on the manifold")
def project_point_that_only_normalizes() -> Stiefel:
    return broken(project_point=lambda self, z: z / z.norm(dim=-2, keepdim=True))


@breaks(testing.law_project_point, "idempotent")
def project_point_to_the_farthest() -> Stiefel:
    def far(self: Stiefel, z: Tensor) -> Tensor:
        left, _, right = torch.linalg.svd(z, full_matrices=False)
        sign = torch.ones(z.shape[-1], dtype=z.dtype)
        sign[-1] = -1
        return (left * sign) @ right

    return broken(project_point=far)


# Tangent vectors


@breaks(testing.law_project_tangent, "fixes tangent vectors")
def projection_that_forgets_turning() -> Stiefel:
    return broken(project_tangent=lambda self, x, z: z - x @ (x.mT @ z))


@breaks(testing.law_project_tangent, "fixes tangent vectors")
def projection_to_zero() -> Stiefel:
    return broken(project_tangent=lambda self, x, z: torch.zeros_like(z))


@breaks(testing.law_project_tangent, "idempotent")
def projection_by_the_canonical_gradient() -> Stiefel:
    """What geoopt's CanonicalStiefel.proju does."""
    return broken(project_tangent=lambda self, x, z: z - x @ (z.mT @ x))


@breaks(testing.law_project_tangent, "tangent")
def projection_with_half_the_correction() -> Stiefel:
    return broken(project_tangent=lambda self, x, z: z - 0.5 * x @ sym(x.mT @ z))


@breaks(testing.law_project_tangent, "self-adjoint")
def projection_that_is_oblique() -> Stiefel:
    """Tangent, idempotent and right on tangent vectors, but it reads part of the normal component."""

    def oblique(self: Stiefel, x: Tensor, z: Tensor) -> Tensor:
        normal = sym(x.mT @ z)
        return z - x @ normal + 0.3 * x @ (normal.triu(1) - normal.tril(-1))

    return broken(project_tangent=oblique)


@breaks(testing.law_project_tangent, "rank is the dimension")
def dimension_of_the_ambient_space() -> Stiefel:
    return broken(dim=lambda self, *shape: shape[-1] * shape[-2])


@breaks(testing.law_projection, "tangent")
def displacements_that_are_halfway_projected() -> Stiefel:
    projections.register("halfway")(lambda w: 0.5 * sym(w))
    return Stiefel(projection="halfway")


# Gradient and metric


@breaks(testing.law_gradient, "= <g, v>")
def gradient_of_the_other_metric() -> Stiefel:
    return broken(gradient=lambda self, x, g: metrics.euclidean_gradient(x, g))


@breaks(testing.law_gradient, "= <g, v>")
def gradient_with_a_factor() -> Stiefel:
    return broken(gradient=lambda self, x, g: 0.5 * metrics.canonical_gradient(x, g))


@breaks(testing.law_gradient, "tangent")
def gradient_that_is_euclidean() -> Stiefel:
    return broken(gradient=lambda self, x, g: g.clone())


@breaks(testing.law_gradient, "linear")
def gradient_that_is_clipped() -> Stiefel:
    def clipped(self: Stiefel, x: Tensor, g: Tensor) -> Tensor:
        u = metrics.canonical_gradient(x, g)
        return u / u.norm().clamp_min(0.5)

    return broken(gradient=clipped)


@breaks(testing.law_metric, "positive definite")
def metric_that_is_indefinite() -> Stiefel:
    return broken(
        inner=lambda self, x, u, v: (u * v).sum((-2, -1)) - 1.5 * ((x.mT @ u) * (x.mT @ v)).sum((-2, -1))
    )


@breaks(testing.law_metric, "positive definite")
def metric_that_is_blind_to_turning() -> Stiefel:
    return broken(inner=lambda self, x, u, v: (u * v).sum((-2, -1)) - ((x.mT @ u) * (x.mT @ v)).sum((-2, -1)))


@breaks(testing.law_metric, "symmetric")
def metric_that_is_not_symmetric() -> Stiefel:
    weight = torch.arange(1.0, 8.0, dtype=torch.float64)[:, None]

    def lopsided(self: Stiefel, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return (u * v).sum((-2, -1)) + 0.1 * (weight * u * v.roll(1, -2)).sum((-2, -1))

    return broken(inner=lopsided)


@breaks(testing.law_metric, "bilinear")
def metric_that_is_not_linear() -> Stiefel:
    return broken(inner=lambda self, x, u, v: u.norm() * v.norm())


@breaks(testing.law_metric, "norm")
def norm_that_is_squared() -> Stiefel:
    return broken(norm=lambda self, x, u: 2 * self.inner(x, u, u))


# Geodesics, transports, specs


@breaks(testing.law_exp, "equals the dense geodesic")
def geodesic_of_the_other_metric() -> Stiefel:
    return broken(exp=lambda self, x, u: Stiefel("euclidean").exp(x, u))


@breaks(testing.law_exp, "equals the dense geodesic")
def geodesic_by_a_retraction() -> Stiefel:
    return broken(exp=lambda self, x, u: retractions.cayley(x, u))


@breaks(testing.law_exp, "bit for bit")
def geodesic_that_moves_by_rounding() -> Stiefel:
    return broken(exp=lambda self, x, u: testing.geodesic("canonical", x, u) + 1e-16)


@breaks(testing.law_exp, "constant speed")
def geodesic_that_accelerates() -> Stiefel:
    """Of a metric without a known formula: only its speed can be judged."""
    metrics.register("unknown", inner=metrics.get("euclidean").product)(sym)
    return broken(Stiefel("unknown"), exp=lambda self, x, u: Stiefel("euclidean").exp(x, u * (1 + u.norm())))


@breaks(testing.law_transport, "tangent at y")
def transport_that_does_nothing() -> Stiefel:
    return broken(transport_vector=lambda self, x, u, y, v: v.clone())


@breaks(testing.law_transport, "identity at u = 0")
def transport_to_zero() -> Stiefel:
    return broken(transport_vector=lambda self, x, u, y, v: torch.zeros_like(v))


@breaks(testing.law_transport, "linear")
def transport_that_renormalizes() -> Stiefel:
    def isometric(self: Stiefel, x: Tensor, u: Tensor, y: Tensor, v: Tensor) -> Tensor:
        moved = projections.tangent(y, v)
        return moved * (v.norm() / moved.norm())

    return broken(transport_vector=isometric)


@breaks(testing.law_transport, "tends to the identity")
def transport_that_jumps() -> Stiefel:
    def jump(self: Stiefel, x: Tensor, u: Tensor, y: Tensor, v: Tensor) -> Tensor:
        moved = projections.tangent(y, v)
        return moved if bool((u == 0).all()) else 2 * moved

    return broken(transport_vector=jump)


@breaks(testing.law_spec, "from_spec")
def spec_that_forgets_an_option() -> Stiefel:
    return broken(spec=lambda self: {"manifold": "Stiefel", "metric": self.metric})


@breaks(testing.law_spec, "plain")
def spec_that_holds_an_object() -> Stiefel:
    return broken(spec=lambda self: {"manifold": "Stiefel", "metric": self._metric})


@breaks(testing.law_spec, "ConfigError")
def spec_of_a_live_function() -> Stiefel:
    return broken(Stiefel(retraction=polar_by_svd), spec=lambda self: {})


# Retractions


@breaks(testing.law_retraction, "lies on the manifold")
def retraction_that_only_adds() -> Stiefel:
    return retracting(lambda x, u: x + u)


@breaks(testing.law_retraction, "x + u + O(u^2)")
def retraction_that_goes_twice_as_far() -> Stiefel:
    return retracting(lambda x, u: retractions.polar(x, 2 * u))


@breaks(testing.law_retraction, "x + u + O(u^2)")
def retraction_that_turns_twice_as_fast() -> Stiefel:
    """What geoopt's CanonicalStiefel.retr does."""

    def geoopts(x: Tensor, u: Tensor) -> Tensor:
        return retractions.cayley(x, u + x @ (x.mT @ u))

    return retracting(geoopts)


@breaks(testing.law_retraction, "equal columns")
def retraction_by_the_inverse_of_a_gram() -> Stiefel:
    def careless(x: Tensor, u: Tensor) -> Tensor:
        y = retractions.polar(x, u)
        return y + 0 * torch.linalg.inv_ex(u.mT @ u)[0].sum((-2, -1), keepdim=True)

    return retracting(careless)


@breaks(testing.law_zero_step, "bit for bit")
def retraction_that_rounds_at_zero() -> Stiefel:
    return retracting(polar_by_svd)


@breaks(testing.law_zero_step, "within a batch")
def zero_step_seen_for_the_whole_batch_only() -> Stiefel:
    return retracting(lambda x, u: x.clone() if bool((u == 0).all()) else polar_by_svd(x, u))


@breaks(testing.law_zero_step, "x^T u = 0")
def zero_step_seen_in_the_small_matrix() -> Stiefel:
    """The mask that looks at x^T u alone takes a step out of the span of x for none."""

    def masked(x: Tensor, u: Tensor) -> Tensor:
        still = (x.mT @ u == 0).all(-1).all(-1)[..., None, None]
        return torch.where(still, x, retractions.polar(x, u))

    return retracting(masked)


@breaks(testing.law_order, "more than the declared order 1")
def order_that_is_declared_too_low() -> Stiefel:
    return Stiefel("euclidean", declared("polar", order={"euclidean": 1}))


@breaks(testing.law_order, "order 2 needs")
def order_that_is_declared_too_high() -> Stiefel:
    return Stiefel("euclidean", declared("cayley", order={"euclidean": 2}))


@breaks(testing.law_order, "order 2 needs")
def order_of_the_other_metric() -> Stiefel:
    return Stiefel("canonical", declared("polar", order={"canonical": 2}))


@breaks(testing.law_order, "exact")
def order_that_is_not_exact() -> Stiefel:
    return Stiefel("canonical", declared("cayley", order={"canonical": float("inf")}))


@breaks(testing.law_order, "exact")
def exponential_that_does_not_know_its_metric() -> Stiefel:
    return Stiefel("euclidean", declared("exp", variants={}))


@breaks(testing.law_order, "order 1 needs")
def order_of_a_curve_with_the_wrong_velocity() -> Stiefel:
    return retracting(lambda x, u: retractions.polar(x, 1.01 * u))


@breaks(testing.law_second_order, "order 2 needs")
def second_order_that_is_first() -> Stiefel:
    return Stiefel("euclidean", declared("qr", order={"euclidean": 2}))


@breaks(testing.law_second_order, "more than the declared order 1")
def first_order_that_is_second() -> Stiefel:
    return Stiefel("euclidean", declared("svd", order={"euclidean": 1}))


@breaks(testing.law_radius, "beyond its radius")
def radius_that_is_not_kept() -> Stiefel:
    return retracting(retractions.polar, name="newton_schulz")


@breaks(testing.law_radius, "norm 10000 lies on the manifold")
def huge_step_that_is_silently_wrong() -> Stiefel:
    """POGO's single unscaled Newton-Schulz step diverges from ||u||_2 = sqrt 2 on."""

    def pogo(x: Tensor, u: Tensor) -> Tensor:
        z = x + u
        return 1.5 * z - 0.5 * z @ (z.mT @ z)

    return retracting(pogo)


@breaks(testing.law_equivariance, "R(x k, u k)")
def equivariance_that_is_declared_too_high() -> Stiefel:
    return Stiefel(retraction=declared("qr", equivariance="both"))


@breaks(testing.law_equivariance, "R(h x, h u)")
def equivariance_that_a_weight_on_rows_breaks() -> Stiefel:
    def weighted(x: Tensor, u: Tensor) -> Tensor:
        weight = torch.linspace(0.5, 1.5, x.shape[-2], dtype=x.dtype)[:, None]
        return retractions.polar(x, weight * u)

    return retracting(weighted)


# Every method


@breaks(testing.law_stack, "stack = loop")
def stack_that_shares_a_norm() -> Stiefel:
    def scaled(x: Tensor, u: Tensor) -> Tensor:
        return retractions.polar(x, u * (1 + u.square().mean()))

    return retracting(scaled)


@breaks(testing.law_stack, "empty batch")
def stack_that_flattens_the_batch() -> Stiefel:
    def flattened(self: Stiefel, x: Tensor, z: Tensor) -> Tensor:
        u = projections.tangent(x, z)
        return u if u.numel() else u.reshape(-1, *u.shape[-2:])

    return broken(project_tangent=flattened)


@breaks(testing.law_dtype, "dtype is kept")
def dtype_that_is_lost() -> Stiefel:
    return broken(gradient=lambda self, x, g: metrics.canonical_gradient(x, g).float())


@breaks(testing.law_dtype, "float32 is near float64")
def dtype_that_is_rounded_inside() -> Stiefel:
    def rounded(self: Stiefel, x: Tensor, g: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            g = g.bfloat16().float()
        return metrics.canonical_gradient(x, g)

    return broken(gradient=rounded)


@breaks(testing.law_dtype, "half precision is computed in float32")
def half_precision_that_is_not_lifted() -> Stiefel:
    return broken(project_tangent=lambda self, x, z: z - x @ sym(x.mT @ z))


@breaks(testing.law_pure, "arguments are unchanged")
def step_that_writes_to_its_argument() -> Stiefel:
    return retracting(lambda x, u: retractions.polar(x, u.mul_(0.5)))


@breaks(testing.law_pure, "new memory")
def zero_step_that_returns_its_argument() -> Stiefel:
    return retracting(lambda x, u: x if bool((u == 0).all()) else retractions.polar(x, u))


@breaks(testing.law_drift, "after 5000 steps")
def retraction_without_the_fold() -> Stiefel:
    """Coefficients for an orthonormal x, applied to an x that no longer is."""

    def unfolded(x: Tensor, u: Tensor) -> Tensor:
        xs, us = x[None], u[None]
        a, b = retractions.cayley.coefficients(gram([xs], [us]), gram([us], [us]))
        return (xs @ a + us @ b)[0]

    return retracting(unfolded)


SMALL = {testing.law_drift: Case((16, 4), torch.float32, 1e-2), testing.law_retraction: Case(scale=0.05)}


@pytest.mark.usefixtures("scratch_registries")
@pytest.mark.parametrize(("law", "claim", "make"), [e[:3] for e in EXAMPLES], ids=[e[3] for e in EXAMPLES])
def test_the_law_catches(law: Law, claim: str, make: Callable[[], Stiefel]) -> None:
    with pytest.raises(AssertionError, match=rf"^{law.__name__}: .*{re.escape(claim)}.* at Case\(shape="):
        law(make(), SMALL.get(law, Case()))


@pytest.mark.parametrize(
    "law", [*MANIFOLD_LAWS, *RETRACTION_LAWS, testing.law_drift], ids=lambda law: law.__name__
)
def test_every_law_has_a_counter_example_and_holds_for_ours(law: Law) -> None:
    assert any(example[0] is law for example in EXAMPLES)
    if law is not testing.law_drift:
        law(Stiefel(), SMALL.get(law, Case()))


# The two public checks pass the laws' verdict on


def test_check_retraction_names_the_law() -> None:
    with pytest.raises(AssertionError, match=r"^law_retraction: the result lies on the manifold"):
        check_retraction(lambda x, u: x + u, scales=[1.0])
    with pytest.raises(AssertionError, match=r"^law_order"):
        check_retraction("qr", order={"euclidean": 2}, shapes=[(7, 3)], scales=[1.0])
    with pytest.raises(AssertionError, match=r"^law_equivariance"):
        check_retraction("qr", equivariance="both", shapes=[(7, 3)], scales=[1.0])


def test_check_manifold_names_the_law() -> None:
    with pytest.raises(AssertionError, match=r"^law_gradient"):
        check_manifold(gradient_with_a_factor())


def test_an_exception_of_the_part_itself_comes_through() -> None:
    def fails(x: Tensor, u: Tensor) -> Tensor:
        raise StepError("mine")

    with pytest.raises(StepError, match="mine"):
        check_retraction(fails)


def test_a_part_that_refuses_steps_within_its_radius_is_told_so() -> None:
    def fails(x: Tensor, u: Tensor) -> Tensor:
        raise StepError("mine")

    with pytest.raises(StepError, match=r"law_\w+: mine; .*radius="):
        check_retraction(fails)


WRONG_PARTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a retraction of one result": (
        lambda: retractions.register("bad")(lambda w, q: (w,)),
        r"retraction 'bad' returned 1 results, and 2 are needed: a, b",
    ),
    "a retraction of one matrix": (
        lambda: retractions.register("bad")(lambda w, q: w),
        r"retraction 'bad' returned Tensor, and 2 are needed: a, b",
    ),
    "a narrow retraction": (
        lambda: retractions.register("bad")(lambda w, q: (w[..., :1], q)),
        r"retraction 'bad' returned \(1, 3, 1\), and \(1, 3, 3\) is needed",
    ),
    "a narrow normalizer": (
        lambda: retractions.register("bad", form="normalizer")(lambda g: g[..., :1]),
        r"retraction 'bad' returned \(1, 3, 1\), and \(1, 3, 3\) is needed",
    ),
    "a narrow projection": (
        lambda: projections.register("bad")(lambda w: w[..., :1]),
        r"projection 'bad' returned \(1, 3, 1\), and \(1, 3, 3\) is needed",
    ),
    "a narrow ambient projection": (
        lambda: projections.register("bad", form="ambient")(lambda x, z: z[..., :1]),
        r"projection 'bad' returned \(1, 6, 1\), and \(1, 6, 3\) is needed",
    ),
    "a narrow transport": (
        lambda: transports.register("bad")(lambda w: w[..., :1]),
        r"transport 'bad' returned \(1, 3, 1\), and \(1, 3, 3\) is needed",
    ),
    "a narrow ambient transport": (
        lambda: transports.register("bad", form="ambient")(lambda x, u, y, v: v[..., :1]),
        r"transport 'bad' returned \(1, 6, 1\), and \(1, 6, 3\) is needed",
    ),
    "a narrow metric": (
        lambda: metrics.register("bad", inner=lambda q, wu, wv: q.sum((-2, -1)))(lambda k: k[..., :1]),
        r"metric 'bad' returned \(1, 3, 1\), and \(1, 3, 3\) is needed",
    ),
}


@pytest.mark.usefixtures("scratch_registries")
@pytest.mark.parametrize("name", WRONG_PARTS)
def test_a_part_that_returns_another_shape_is_named(name: str) -> None:
    """Where it would broadcast, or fail deep inside; and nothing has changed."""
    register, message = WRONG_PARTS[name]
    register()
    family = next(word for word in ("retraction", "projection", "transport", "metric") if word in message)
    p = torch.nn.Parameter(torch.eye(6, 3))
    group = {"params": [p], "manifold": Stiefel(**{family: "bad"})}
    optimizer = RiemannianWrapper(torch.optim.SGD([group], lr=0.1, momentum=0.9))
    p.grad = torch.ones(6, 3)
    with pytest.raises(StepError, match=message):
        optimizer.step()
    assert torch.equal(p, torch.eye(6, 3))


@pytest.mark.usefixtures("scratch_registries")
def test_an_inner_product_of_another_shape_is_named() -> None:
    metrics.register("bad", inner=lambda q, wu, wv: q)(lambda k: k)
    with pytest.raises(
        StepError, match=r"metric 'bad' returned \(1, 3, 3\), and \(1,\) is needed: its inner"
    ):
        Stiefel("bad").norm(torch.eye(6, 3), torch.ones(6, 3))


@pytest.mark.parametrize(
    ("result", "what"),
    [
        (lambda x: x[..., :-1], "returned"),
        (lambda x: None, "NoneType"),
        (lambda x: x / 0, "NaN or Inf"),
        (lambda x: 3 * x, r"retraction 'a plain function' left the manifold, \|y\^T y - I\| = 8"),
        (lambda x: x.cumsum(-1), "left the manifold"),
    ],
)
def test_what_is_no_point_is_not_written_to_a_parameter(result: Callable[[Tensor], Any], what: str) -> None:
    p = torch.nn.Parameter(torch.eye(6, 3))
    manifold = Stiefel(retraction=lambda x, u: result(x + u))
    optimizer = RiemannianWrapper(torch.optim.SGD([{"params": [p], "manifold": manifold}], lr=0.1))
    p.grad = torch.ones(6, 3)
    with pytest.raises(StepError, match=what):
        optimizer.step()
    assert torch.equal(p, torch.eye(6, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, 17), (5, 5), (3, 1)])
def test_points_are_not_taken_for_others(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Long steps and half precision leave the manifold by rounding alone."""
    p = torch.nn.Parameter(Stiefel().random_point(*shape, dtype=dtype))
    for retraction in ("svd", lambda x, u: torch.linalg.qr(x + u)[0]):
        group = {"params": [p], "manifold": Stiefel(retraction=retraction)}
        for lr in (1e-3, 1e3):
            p.grad = torch.randn(shape).to(dtype)
            RiemannianWrapper(torch.optim.SGD([group], lr=lr)).step()
    assert torch.isfinite(p).all()
