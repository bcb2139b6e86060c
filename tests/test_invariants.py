"""The laws of stiefelopt.testing over everything that is registered: a new part is tested with no edit here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, jvp, vmap

from stiefelopt import Stiefel, metrics, projections, rank_retractions, retractions, testing, transports
from stiefelopt.errors import ConfigError, NotOnManifoldError, ShapeError, StepError
from stiefelopt.gram import sym
from stiefelopt.laws import Law
from stiefelopt.retractions import close
from stiefelopt.shapes import tolerance
from stiefelopt.testing import (
    MANIFOLD_LAWS,
    RETRACTION_LAWS,
    Case,
    cases,
    check_manifold,
    check_retraction,
)

# Laws that measure slopes look at one float64 matrix; those that call every method in a loop cost the most.
SHARE = {"law_order": 0.25, "law_second_order": 0.25, "law_stack": 0.25, "law_dtype": 0.34, "law_pure": 0.34}
CORNERS = (
    Case((1, 1), torch.float32, 1e-2),
    Case((6, 1), torch.float64, 1e2),
    Case((5, 5), torch.float32, 1e2),
    Case((7, 3), torch.float32, 1e-6),
    Case((2, 0, 5, 2), torch.float32, 1.0),
)


def named(law: Law) -> str:
    return law.__name__


def label(m: Stiefel) -> str:
    return "-".join((m.metric, str(m.retraction), m.transport, m.projection))


def hold(law: Law, m: Stiefel) -> None:
    """The law at the corners, and where hypothesis looks for a case in which it breaks."""

    def check(case: Case) -> None:
        law(m, case)

    for corner in CORNERS:
        check = example(case=corner)(check)
    examples = int(settings().max_examples * SHARE.get(law.__name__, 1))
    settings(max_examples=examples)(given(case=cases())(check))()


MOVING = [
    Stiefel(metric, retraction)
    for metric in metrics.names()
    for retraction in retractions.names()
    if testing.serves(retractions.get(retraction), metric)
]
STANDING = [
    Stiefel(metric, "polar", transport, projection)
    for metric in metrics.names()
    for transport in ("none", *transports.names())
    for projection in ("none", *projections.names())
]


@pytest.mark.parametrize("m", MOVING, ids=label)
@pytest.mark.parametrize("law", RETRACTION_LAWS, ids=named)
def test_laws_of_retractions(law: Law, m: Stiefel) -> None:
    hold(law, m)


@pytest.mark.parametrize("m", STANDING, ids=label)
@pytest.mark.parametrize("law", MANIFOLD_LAWS, ids=named)
def test_laws_of_manifolds(law: Law, m: Stiefel) -> None:
    hold(law, m)


@pytest.mark.parametrize("m", MOVING, ids=label)
@pytest.mark.parametrize("shape", [(7, 3), (9, 4), (4, 3), (5, 2)], ids=str)
def test_declared_orders(m: Stiefel, shape: tuple[int, ...]) -> None:
    """At fixed shapes with 2 <= p < n, three generic directions each."""
    for seed in range(3):
        testing.law_order(m, Case(shape, seed=seed))
        testing.law_second_order(m, Case(shape, seed=seed))


# Drift


WALKS = [m for m in MOVING if m.metric == "canonical" or retractions.get(str(m.retraction)).variants]


@pytest.mark.parametrize("m", WALKS, ids=label)
def test_no_drift_in_5000_steps(m: Stiefel) -> None:
    testing.law_drift(m, Case((64, 8), torch.float32, 1e-2), steps=5000)


@pytest.mark.parametrize("m", WALKS, ids=label)
def test_no_drift_in_wide_matrices(m: Stiefel) -> None:
    testing.law_drift(m, Case((1024, 64), torch.float32, 1e-2), steps=40)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("m", WALKS, ids=label)
def test_no_drift_in_5000_steps_of_wide_matrices(m: Stiefel) -> None:
    testing.law_drift(m, Case((1024, 64), torch.float32, 1e-2), steps=5000)


# The optimizer's beats: several heights in one stack of small matrices


def moved(m: Stiefel, xs: list[Tensor], ds: list[Tensor], scales: list[float]) -> list[Tensor]:
    ms = [x + d for x, d in zip(xs, ds, strict=True)]
    drift = max(tolerance(x.dtype, *x.shape[-2:]) for x in xs)
    return close(m.stacked_move(xs, ms, m.stacked_overlap(xs, ms), scales, drift=drift))


@pytest.mark.parametrize("m", [*MOVING, *STANDING], ids=label)
@given(case=cases(max_p=4, max_extra=4))
@settings(max_examples=8)
@example(case=Case((3, 3), torch.float32, 1e2))
def test_beats_equal_methods(m: Stiefel, case: Case) -> None:
    n, p = case.shape[-2:]
    scale = min(case.scale, 0.5 * testing.retraction_of(m).radius)
    many = [replace(case, shape=(k, n + k - 2, p), scale=scale, seed=case.seed + k) for k in (2, 3)]
    xs, ds = [c.point() for c in many], [c.ambient() for c in many]
    ds[1][0] = 0
    gs = [d.clone() for d in ds]
    m.stacked_gradient(xs, gs)
    # float32 displacements are what x + d leaves of them.
    for x, d, g in zip(xs, ds, gs, strict=True):
        torch.testing.assert_close(g, m.gradient(x, d), atol=case.tolerance(1 + scale), rtol=0)
    scales = [1.0, 0.5]
    try:
        ys = moved(m, xs, ds, scales)
    except StepError:
        assert m.projection == "none"  # where x + d may be singular
        return
    project = projections.get(m.projection) if m.projection != "none" else lambda x, d: d
    for x, d, y, s in zip(xs, ds, ys, scales, strict=True):
        assert m.residual(y).amax() <= case.tolerance()
        expected = m.retract(x, project(x, s * ((x + d) - x)))
        torch.testing.assert_close(y, expected, atol=case.tolerance((1 + scale) ** 2), rtol=0)
    assert torch.equal(ys[1][0], xs[1][0])


@pytest.mark.parametrize("m", [*MOVING, *STANDING], ids=label)
def test_a_move_that_leaves_the_span_of_x_is_no_zero_step(m: Stiefel) -> None:
    """x^T d = 0 with d != 0: the test for the zero step must look at d itself."""
    x = torch.eye(5, 2)[None]
    d = torch.zeros_like(x)
    d[0, 4, 0] = 1e-3
    (y,) = moved(m, [x], [d], [1.0])
    torch.testing.assert_close(y, x + d, atol=1e-5, rtol=0)
    assert not torch.equal(y, x)


@pytest.mark.parametrize("r", retractions.names())
def test_a_move_that_shrinks_columns_ends_on_the_manifold(r: str) -> None:
    """Without a projection x + d may be nearly singular: one column short, or all of them."""
    m = Stiefel(retraction=r, projection="none")
    x = Case((1, 6, 3), torch.float32).point()
    for columns in (1, 3):
        for shrink in (0.3, 0.9, 0.999, 1.3):
            d = torch.zeros_like(x)
            d[..., :columns] = -shrink * x[..., :columns]
            try:
                (y,) = moved(m, [x], [d], [1.0])
            except StepError:
                continue
            assert m.residual(y).amax() <= Case((6, 3), torch.float32).tolerance()


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(3, 40, 8), (2, 9, 9), (1, 300, 280)])
def test_without_a_projection_the_new_point_is_the_nearest_to_where_the_optimizer_went(
    shape: tuple[int, int, int], scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(shape, generator=generator)).Q
    d = 0.05 * torch.randn(shape, generator=generator) / shape[1] ** 0.5
    (y,) = moved(Stiefel(projection="none"), [x], [d], [scale])
    u, _, vh = torch.linalg.svd(x.double() + scale * d.double(), full_matrices=False)
    torch.testing.assert_close(y.double(), u @ vh, atol=2e-6, rtol=0)


def test_without_a_projection_a_point_that_did_not_move_stays_bit_for_bit() -> None:
    x = Case((3, 40, 8), torch.float32).point()
    d = torch.zeros_like(x)
    d[1] = 1e-3
    m = Stiefel(projection="none")
    (y,) = moved(m, [x], [d], [1.0])
    assert torch.equal(y[0], x[0])
    assert torch.equal(y[2], x[2])
    assert m.residual(y).max() <= 2e-6


# Stated limits


def test_newton_schulz_refuses_with_a_way_out() -> None:
    m = Stiefel(retraction="newton_schulz")
    case = Case((9, 4), torch.float32, scale=5.0)
    x = case.point()
    with pytest.raises(
        StepError, match=r"newton_schulz accepts steps up to .*learning rate or use retraction='polar'"
    ):
        m.retract(x, case.tangent(x))


@pytest.mark.parametrize("r", retractions.names())
def test_a_displacement_that_is_not_finite_is_refused(r: str) -> None:
    x = torch.eye(4, 2)
    for bad in (math.nan, math.inf):
        with pytest.raises(StepError):
            Stiefel(retraction=r).retract(x, torch.full_like(x, bad))


def test_messages_name_what_was_given_and_the_way_out() -> None:
    m, x = Stiefel(), torch.eye(4, 2)
    for call, message in (
        (lambda: m.retract(x.mT, x.mT), "pass the transpose"),
        (lambda: m.retract(x, x.double()), "dtype torch.float64"),
        (lambda: m.retract(x, x[None]), "shape"),
        (lambda: m.gradient(x.long(), x), r"call \.float\(\)"),
        (lambda: m.residual(torch.zeros(3)), r"\[:, None\]"),
        (lambda: m.check(x.to(torch.complex64)), "real"),
        (lambda: m.random_point(3), "fewer than two dimensions"),
    ):
        with pytest.raises(ShapeError, match=message):
            call()
    with pytest.raises(NotOnManifoldError, match="project_point"):
        m.check(2 * x)
    with pytest.raises(NotOnManifoldError, match="NaN"):
        m.project_point(x * math.nan)


# Derivatives


def where(kind: str) -> tuple[Tensor, Tensor]:
    """A point and a tangent vector: generic, zero, or with Gram (1 + 0.04) I, all of whose eigenvalues agree."""
    case = Case((4, 2), scale=0.3, seed=3)
    x = case.point()
    if kind == "generic":
        return x, case.tangent(x)
    if kind == "zero":
        return x, torch.zeros_like(x)
    if kind == "square":
        square = Case((3, 3), scale=0.3)
        return square.point(), square.tangent(square.point())
    q, _ = torch.linalg.qr(torch.cat((x, case.ambient()), -1))
    return x, 0.2 * q[:, 2:]


def turned(x: Tensor, a: Tensor) -> Tensor:
    """x moved along the manifold, by the dense Cayley transform of a skew part of a (n x p)."""
    b = a @ x.mT - x @ a.mT
    eye = torch.eye(x.shape[-2], dtype=x.dtype)
    return torch.linalg.solve(eye - 0.5 * b, x + 0.5 * b @ x)


@pytest.mark.parametrize("m", MOVING, ids=label)
@pytest.mark.parametrize("kind", ["generic", "zero", "repeated eigenvalues", "square"])
def test_derivatives(m: Stiefel, kind: str) -> None:
    """First and second derivatives by point and vector, along the manifold: off it a retraction means nothing."""
    x, u = where(kind)

    def retract(a: Tensor, v: Tensor) -> Tensor:
        y = turned(x, a)
        return m.retract(y, m.project_tangent(y, v))

    inputs = (torch.zeros_like(x).requires_grad_(), u.requires_grad_())
    assert gradcheck(retract, inputs, check_forward_ad=True)
    assert gradgradcheck(retract, inputs, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("m", MOVING, ids=label)
def test_derivatives_of_a_batch_with_a_zero_step(m: Stiefel) -> None:
    (x, u), (_, zero) = where("generic"), where("zero")
    x, u = torch.stack((x, x)), torch.stack((u, zero)).requires_grad_()
    assert gradcheck(lambda v: m.retract(x, m.project_tangent(x, v)), (u,), check_forward_ad=True)
    assert torch.equal(m.retract(x, u)[1], x[1])


@pytest.mark.parametrize("m", MOVING, ids=label)
def test_torch_func(m: Stiefel) -> None:
    """Under vmap nobody may look at a number, and a zero step is one all the same."""
    (x, u), (_, zero) = where("generic"), where("zero")
    x, us = torch.stack((x, x)), torch.stack((u, zero))
    mapped = vmap(m.retract)(x, us)
    torch.testing.assert_close(mapped, m.retract(x, us), rtol=0, atol=1e-14)
    assert torch.equal(mapped[1], x[1])
    jacobian = vmap(jacrev(m.retract, 1))(x, us)
    torch.testing.assert_close(vmap(jacfwd(m.retract, 1))(x, us), jacobian, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.einsum("ijkl,kl->ij", jacobian[1], u), u, rtol=0, atol=1e-12)
    torch.testing.assert_close(jvp(m.retract, (x, 0 * us), (0 * us, us))[1], us, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["project_tangent", "gradient", "exp", "norm", "project_point"])
def test_torch_func_maps_the_other_methods(method: str) -> None:
    m, (x, u) = Stiefel(), where("generic")
    x, u = torch.stack((x, -x)), torch.stack((u, 0.5 * u))
    f, inputs = getattr(m, method), (x + u,) if method == "project_point" else (x, u)
    torch.testing.assert_close(vmap(f)(*inputs), f(*inputs), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["generic", "zero", "repeated eigenvalues", "square"])
def test_derivatives_of_the_nearest_point(kind: str) -> None:
    x, u = where(kind)
    z = (x + u).requires_grad_()
    assert gradcheck(Stiefel().project_point, (z,), check_forward_ad=True)
    assert gradgradcheck(Stiefel().project_point, (z,), check_fwd_over_rev=True)


def test_derivatives_of_the_nearest_point_of_any_matrix() -> None:
    """Far from the manifold, at any scale, where the SVD's own derivative is right too."""
    z = Case((2, 6, 3)).ambient().requires_grad_()
    weights = Case((2, 6, 3), seed=1).ambient()

    def plain(z: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(z, full_matrices=False)
        return u @ vh

    for scale in (1e-100, 1.0, 1e100):
        ours = torch.autograd.grad((Stiefel().project_point(scale * z) * weights).sum(), z)[0]
        theirs = torch.autograd.grad((plain(z) * weights).sum(), z)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("metric", metrics.names())
def test_gradient_and_inner_are_differentiable(metric: str) -> None:
    m = Stiefel(metric)
    x, u = where("generic")
    inputs = (x.requires_grad_(), u.requires_grad_())
    assert gradgradcheck(m.gradient, inputs)
    assert gradgradcheck(lambda x, u: m.inner(x, u, u), inputs)


# Parts of one's own


def cholesky_qr(w: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    r = torch.linalg.cholesky(torch.eye(w.shape[-1], dtype=w.dtype) + w + w.mT + q).mT
    inverse = torch.linalg.inv(r)
    return inverse, inverse


def householder_qr(x: Tensor, u: Tensor) -> Tensor:
    q, r = torch.linalg.qr(x + u)
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)[..., None, :]


QUICK: dict[str, Any] = {"shapes": [(7, 3), (6, 1), (2, 4, 2)], "scales": (1e-6, 1.0)}


@pytest.mark.usefixtures("scratch_registries")
@pytest.mark.parametrize(("form", "function"), [("gram", cholesky_qr), ("ambient", householder_qr)])
def test_a_retraction_of_ones_own(form: str, function: Law) -> None:
    part = retractions.register("mine", form=form, equivariance="left")(function)
    assert part.order == {"canonical": 1, "euclidean": 1}
    check_retraction("mine", steps=300, **QUICK)
    m = Stiefel(retraction="mine")
    case = Case((8, 3), torch.float32, 1e-2)
    x = case.point()
    assert torch.equal(m.retract(x, torch.zeros_like(x)), x)
    torch.testing.assert_close(
        m.retract(x, case.tangent(x)), retractions.qr(x, case.tangent(x)), atol=1e-6, rtol=0
    )
    testing.law_spec(m)


@pytest.mark.usefixtures("scratch_registries")
def test_a_plain_function_works_live() -> None:
    check_retraction(householder_qr, order=1, equivariance="left", steps=300, **QUICK)
    with pytest.raises(AssertionError, match="law_order"):
        check_retraction(householder_qr, order=2, **QUICK)


def textbook_cayley(x: Tensor, u: Tensor) -> Tensor:
    """(I - w/2)^-1 (I + w/2) x with the n x n matrix w = u x^T - x u^T + x x^T u x^T; rounding grows with ||u||."""
    a = u - 0.5 * x @ (x.mT @ u)
    w = a @ x.mT - x @ a.mT
    eye = torch.eye(x.shape[-2], dtype=x.dtype)
    return torch.linalg.solve(eye - 0.5 * w, x + 0.5 * w @ x)


@pytest.mark.usefixtures("scratch_registries")
def test_a_radius_of_ones_own() -> None:
    """check_retraction tries no longer steps, and the library refuses them, be the part ambient or not."""
    order = {"canonical": 2, "euclidean": 1}
    where: dict[str, Any] = {"shapes": [(7, 3)], "steps": 10}
    with pytest.raises(AssertionError, match="law_radius: the result of a step of norm 10000"):
        check_retraction(textbook_cayley, order, **where)
    check_retraction(textbook_cayley, order, radius=100.0, **where)
    mine = retractions.register("mine", form="ambient", order=order, radius=100.0)(textbook_cayley)
    check_retraction(mine, **where)
    case = Case((7, 3), torch.float64, 1e3)
    with pytest.raises(StepError, match=r"mine accepts steps up to \|\|u\|\|_2 = 100"):
        mine(case.point(), case.tangent(case.point()))
    with pytest.raises(ConfigError, match="leave them out for FixedRank"):
        check_retraction(rank_retractions.get("svd"), radius=1.0)


@pytest.mark.usefixtures("scratch_registries")
def test_the_correction_makes_an_approximation_exact() -> None:
    """A gram part that is orthonormal to second order only is brought to the manifold by the library."""

    @retractions.register("taylor", order={"canonical": 1, "euclidean": 2}, radius=0.5)
    def taylor(w: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        eye = torch.eye(w.shape[-1], dtype=w.dtype)
        return eye - 0.5 * q, eye

    testing.law_retraction(Stiefel(retraction="taylor"), Case((9, 4), torch.float32, 0.4))
    testing.law_order(Stiefel("euclidean", "taylor"))
    testing.law_drift(Stiefel(retraction="taylor"), Case((16, 4), torch.float32, 1e-2), steps=1000)


@pytest.mark.usefixtures("scratch_registries")
def test_a_metric_of_ones_own() -> None:
    """<u, v> = tr u^T (I - x x^T / 4) v, halfway between the two."""

    @metrics.register(
        "between", inner=lambda q, wu, wv: q.diagonal(dim1=-2, dim2=-1).sum(-1) - (wu * wv).sum((-2, -1)) / 4
    )
    def between(k: Tensor) -> Tensor:
        return k - 4 / 3 * (k - sym(k))

    m = Stiefel("between", "qr")
    check_manifold(m, **QUICK)
    with pytest.raises(ConfigError, match="no closed geodesic is known for metric 'between'"):
        m.exp(*where("generic"))
    with pytest.raises(ConfigError, match="between"):
        m.replace(retraction="exp").retract(*where("generic"))
    check_retraction("exp", shapes=[(5, 2)], scales=[1.0], steps=10)  # under the metrics that it serves


@pytest.mark.usefixtures("scratch_registries")
def test_a_projection_and_a_transport_of_ones_own() -> None:
    @projections.register("twice", form="ambient")
    def twice(x: Tensor, z: Tensor) -> Tensor:
        return projections.tangent(x, projections.tangent(x, z))

    @transports.register("turned", form="ambient")
    def turned(x: Tensor, u: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v - y @ sym(y.mT @ v)

    m = Stiefel(transport="turned", projection="twice")
    check_manifold(m, **QUICK)
    case = Case((5, 2), torch.float64)
    torch.testing.assert_close(
        moved(m, [case.point()[None]], [case.ambient()[None]], [1.0]),
        moved(Stiefel(), [case.point()[None]], [case.ambient()[None]], [1.0]),
    )


def test_check_manifold_runs_every_law() -> None:
    check_manifold(Stiefel(), shapes=[(7, 3)], dtypes=[torch.float64], scales=[1.0])


# Letters of the promise that no law says


def test_random_points_are_haar() -> None:
    """Uniform: E x = 0 and E x x^T = (p / n) I; the Q of a Gaussian without the signs has E x != 0."""
    x = Stiefel().random_point(20000, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert x.mean(0).abs().max() < 0.02
    assert ((x @ x.mT).mean(0) - 0.5 * torch.eye(4)).abs().max() < 0.02


def test_random_point_lies_in_memory_row_by_row() -> None:
    assert Stiefel().random_point(6, 3).is_contiguous()


def test_the_one_by_one_manifold() -> None:
    m, x = Stiefel(), torch.tensor([[-1.0]])
    assert m.dim(1, 1) == 0
    assert torch.equal(m.random_tangent(x), torch.zeros(1, 1))
    assert torch.equal(m.project_point(torch.tensor([[-3.0]])), x)


def test_many_batch_dimensions() -> None:
    m = Stiefel()
    x = m.random_point(2, 1, 3, 5, 2)
    u = m.random_tangent(x)
    assert m.retract(x, u).shape == x.shape
    assert m.norm(x, u).shape == (2, 1, 3)
    assert m.dim(2, 1, 3, 5, 2) == 6 * 7


@pytest.mark.parametrize("retraction", retractions.names())
def test_autocast_rounds_nothing(retraction: str) -> None:
    m = Stiefel(retraction=retraction)
    x = m.random_point(3, 64, 8)
    u, z = 0.5 * m.random_tangent(x), torch.randn(3, 64, 8)
    y = m.retract(x, u)
    calls: dict[str, Callable[[], Any]] = {
        "residual": lambda: m.residual(x),
        "project_point": lambda: m.project_point(z),
        "project_tangent": lambda: m.project_tangent(x, z),
        "random_tangent": lambda: m.random_tangent(x, torch.Generator().manual_seed(1)),
        "gradient": lambda: m.gradient(x, z),
        "inner": lambda: m.inner(x, u, u),
        "norm": lambda: m.norm(x, u),
        "retract": lambda: m.retract(x, u),
        "exp": lambda: m.exp(x, u),
        "transport_vector": lambda: m.transport_vector(x, u, y, u),
    }
    for name, call in calls.items():
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(), expected), name
            m.check(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 8), (5, 5), (300, 2)], ids=str)
def test_check_draws_the_line_where_it_says(shape: tuple[int, int], dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    half = dtype in (torch.bfloat16, torch.float16)
    line = max(4 * eps / math.sqrt(shape[0]), 2 * eps) if half else 10 * eps * math.sqrt(math.prod(shape))
    x = Stiefel().random_point(*shape, dtype=torch.float64)
    Stiefel().check(x.to(dtype))
    if not half:
        Stiefel().check((x * math.sqrt(1 + 0.7 * line)).to(dtype))
    with pytest.raises(NotOnManifoldError):
        Stiefel().check((x * math.sqrt(1 + (3 if half else 1.4) * line)).to(dtype))


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_cayley_of_a_long_step_of_rank_one(scale: float) -> None:
    """Right to eps times the condition number, ||u||^2, of what is solved; the oracle is dense, n x n."""
    m, case = Stiefel(retraction="cayley"), Case((10, 4), torch.float64)
    x, z = case.point(), case.ambient()
    u = m.project_tangent(x, z[:, :1] @ z[:1])
    u = u * (scale / u.norm())
    half = torch.eye(10, dtype=torch.float64) - 0.5 * x @ x.mT
    w = half @ u @ x.mT - x @ u.mT @ half
    eye = torch.eye(10, dtype=torch.float64)
    expected = np.linalg.solve((eye - w / 2).numpy(), ((eye + w / 2) @ x).numpy())
    off = np.abs(m.retract(x, u).numpy() - expected).max()
    assert off < 1e-15 * (1 + scale**2) * 10
