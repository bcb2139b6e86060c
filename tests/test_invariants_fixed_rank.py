"""The laws of stiefelopt.rank_laws over every registered fixed-rank retraction, transport and dtype."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from stiefelopt import USV, FixedRank, rank_retractions
from stiefelopt.core_svd import Coefficients
from stiefelopt.errors import StepError
from stiefelopt.laws import Law
from stiefelopt.manifolds.fixed_rank import TRANSPORTS
from stiefelopt.rank_laws import (
    RANK_MANIFOLD_LAWS,
    RANK_RETRACTION_LAWS,
    RankCase,
    law_rank_drift,
    law_rank_order,
    rank_cases,
)
from stiefelopt.rank_retractions import RankRetraction
from stiefelopt.retractions import close
from stiefelopt.testing import check_manifold, check_retraction

# Laws that measure slopes look at one float64 matrix; those that call every method in a loop cost the most.
SHARE = {"law_rank_order": 0.34, "law_rank_stack": 0.17, "law_rank_dtype": 0.34, "law_rank_pure": 0.34}
CORNERS = (
    RankCase((1, 1, 1), torch.float32, 1e-2),
    RankCase((5, 4, 1), torch.float64, 1e2),
    RankCase((4, 4, 4), torch.float32, 1e2),
    RankCase((3, 7, 3), torch.float32, 1e-6),
    RankCase((2, 0, 5, 4, 2), torch.float32, 1.0),
)
MOVING = [FixedRank(name) for name in rank_retractions.names()]
STANDING = [FixedRank("svd", transport) for transport in TRANSPORTS]


def named(law: Law) -> str:
    return law.__name__


def label(m: FixedRank) -> str:
    return f"{m.retraction}-{m.transport}"


def hold(law: Law, m: FixedRank) -> None:
    def check(case: RankCase) -> None:
        law(m, case)

    for corner in CORNERS:
        check = example(case=corner)(check)
    examples = max(1, int(settings().max_examples * SHARE.get(law.__name__, 0.67)))
    settings(max_examples=examples)(given(case=rank_cases())(check))()


@pytest.mark.parametrize("m", MOVING, ids=label)
@pytest.mark.parametrize("law", RANK_RETRACTION_LAWS, ids=named)
def test_laws_of_retractions(law: Law, m: FixedRank) -> None:
    hold(law, m)


@pytest.mark.parametrize("m", STANDING, ids=label)
@pytest.mark.parametrize("law", RANK_MANIFOLD_LAWS, ids=named)
def test_laws_of_manifolds(law: Law, m: FixedRank) -> None:
    hold(law, m)


@pytest.mark.parametrize("m", MOVING, ids=label)
@pytest.mark.parametrize("shape", [(7, 5, 3), (5, 9, 2), (4, 4, 3)], ids=str)
def test_declared_orders(m: FixedRank, shape: tuple[int, ...]) -> None:
    for seed in range(3):
        law_rank_order(m, RankCase(shape, seed=seed))


@pytest.mark.parametrize("m", MOVING, ids=label)
def test_no_drift(m: FixedRank) -> None:
    """5,000 steps of the default, 1,000 of the others; `make test-all` goes on to 5,000 with these."""
    steps = 5000 if m == FixedRank() else 1000
    law_rank_drift(m, RankCase((64, 48, 8), torch.float32, 1e-2), steps=steps)


@pytest.mark.slow
@pytest.mark.parametrize("m", MOVING, ids=label)
def test_no_drift_in_5000_steps(m: FixedRank) -> None:
    law_rank_drift(m, RankCase((64, 48, 8), torch.float32, 1e-2, seed=1))


def test_check_manifold_runs_the_laws_of_fixed_rank() -> None:
    check_manifold(FixedRank("orthographic"), shapes=[(5, 4, 2)], dtypes=[torch.float64], scales=[1e-2])


# The optimizer's beats: several heights in one stack of small matrices


@pytest.mark.parametrize("m", MOVING, ids=label)
@given(case=rank_cases(max_r=3, max_extra=3))
@settings(max_examples=6)
def test_beats_equal_methods(m: FixedRank, case: RankCase) -> None:
    rows, columns, r = case.sizes
    scale = min(case.scale, 0.1)
    many = [
        RankCase((k, rows + k - 2, columns + 2 - k % 2, r), case.dtype, scale, case.seed + k) for k in (2, 3)
    ]
    points, gradients = [c.point() for c in many], [c.ambient() for c in many]
    for t in gradients[1]:
        t[0] = 0
    xs = [t for x in points for t in x]
    gs = [t.clone() for g in gradients for t in g]
    m.stacked_gradient(xs, gs, arriving="factors")
    for k, (x, g) in enumerate(zip(points, gradients, strict=True)):
        expected = m.gradient(x, g)
        for found, e in zip(gs[3 * k : 3 * k + 3], expected, strict=True):
            torch.testing.assert_close(found, e, atol=case.tolerance(4), rtol=0)
    ms = [a + b for x, g in zip(points, gradients, strict=True) for a, b in zip(x, g, strict=True)]
    overlap = m.stacked_overlap(xs, ms)
    ys = close(m.stacked_move(xs, ms, overlap, [1.0] * 3 + [0.5] * 3, drift=1e-5))
    for k, (x, g, s) in enumerate(zip(points, gradients, (1.0, 0.5), strict=True)):
        d = USV(*(s * ((a + b) - a) for a, b in zip(x, g, strict=True)))
        expected = m.retract(x, m.project_tangent(x, d))
        y = USV(*ys[3 * k : 3 * k + 3])
        error = m.to_dense(y) - m.to_dense(expected)
        torch.testing.assert_close(error, torch.zeros_like(error), atol=case.tolerance(8), rtol=0)
        assert m.residual(y).amax() <= case.tolerance()
    assert all(torch.equal(y[0], x[0]) for y, x in zip(ys[3:], xs[3:], strict=True))


# Ill-conditioned points


def ill_conditioned(condition: float, seed: int, dependent: bool, scale: float) -> tuple[USV, USV]:
    """A float32 point whose S is not diagonal, and a tangent vector, its columns nearly dependent where asked."""
    case = RankCase((40, 30, 5), torch.float64, scale, seed)
    x = case.point()
    a, _, bh = torch.linalg.svd(x.S)
    values = torch.logspace(0, -math.log10(condition), 5, dtype=torch.float64)
    x = USV(*(t.float() for t in x._replace(S=a * values @ bh)))
    columns = None
    if dependent:
        columns = torch.ones(5, 5, dtype=torch.float64) / 5 + 1e-6 * case.normal(9, 5, 5)
    return x, USV(*(t.float() for t in case.tangent(x, 30, columns)))


def truncated(x: USV, u: USV) -> Tensor:
    m = FixedRank()
    x, u = (USV(*(t.double() for t in z)) for z in (x, u))
    left, values, right = torch.linalg.svd(m.to_dense(x) + m.embed(x, m.project_tangent(x, u)))
    r = x.S.shape[-1]
    return (left[:, :r] * values[:r]) @ right[:r]


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("condition", [1e3, 1e6])
def test_ill_conditioned_points_stay_right(condition: float, dependent: bool) -> None:
    """Factors orthonormal to 1e-5 and W right to 1e-5 of its norm, in float32."""
    m = FixedRank()
    for seed in range(4):
        for scale in (1e-6, 1e-3, 0.1, 3.0, 1e3):
            x, u = ill_conditioned(condition, seed, dependent, scale)
            y = m.retract(x, u)
            assert m.residual(y) < 1e-5
            expected = truncated(x, u)
            error = m.to_dense(USV(*(t.double() for t in y))) - expected
            assert error.norm() < 1e-5 * expected.norm()


def test_orthographic_is_right_up_to_its_limit_and_refuses_beyond() -> None:
    m = FixedRank("orthographic")
    x, u = ill_conditioned(3e3, 0, True, 1e-5)
    y = m.retract(x, u)
    assert m.residual(y) < 1e-5
    difference = m.to_dense(USV(*(t.double() for t in y))) - truncated(x, u)
    assert difference.norm() < 1e-5
    x, u = ill_conditioned(1e6, 0, True, 1e-9)
    with pytest.raises(StepError, match=r"orthographic.*condition number.*retraction='svd'"):
        m.retract(x, u)


# Rank


def losing(lost: int, seed: int, dtype: torch.dtype, moving: bool) -> tuple[USV, USV]:
    """A step after which ``lost`` of 4 singular values of W are exactly zero; with ``moving``, U turns too."""
    case = RankCase((9, 7, 4), torch.float64, 0.1, seed)
    x = case.point()
    values = torch.tensor([1.5, 1.2, 1.0, 0.7], dtype=torch.float64)
    zero = USV(*map(torch.zeros_like, x))
    kept = (torch.arange(4) < 4 - lost).double()
    # Of U the columns that stay may turn: W + u = (U (S + M) + Up) V^T keeps the rank of S + M.
    up = case.tangent(x).U * kept if moving else zero.U
    x, u = x._replace(S=torch.diag(values)), USV(up, torch.diag(values * (kept - 1)), zero.V)
    return USV(*(t.to(dtype) for t in x)), USV(*(t.to(dtype) for t in u))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lost", [1, 2, 3, 4])
@pytest.mark.parametrize("name", rank_retractions.names())
def test_losing_rank_raises_with_the_way_out(name: str, lost: int, dtype: torch.dtype) -> None:
    x, u = losing(lost, 0, dtype, moving=False)
    with pytest.raises(StepError, match=r"floor=1e-3|retraction='svd'"):
        FixedRank(name).retract(x, u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lost", [1, 2, 3])
@pytest.mark.parametrize("moving", [False, True])
def test_the_floor_keeps_rank(lost: int, dtype: torch.dtype, moving: bool) -> None:
    m = FixedRank(floor=1e-3)
    for seed in range(5):
        x, u = losing(lost, seed, dtype, moving)
        y = m.retract(x, u)
        m.check(y)
        values = torch.linalg.svdvals(y.S.double())
        torch.testing.assert_close(
            values[4 - lost :], (1e-3 * values[0]).expand(lost), rtol=1e-3, atol=0, check_dtype=False
        )
        error = m.to_dense(USV(*(t.double() for t in y))) - truncated(x, u)
        assert error.norm() <= 1.01 * math.sqrt(lost) * 1e-3 * values[0]


def test_the_floor_leaves_what_is_above_it_alone() -> None:
    case = RankCase((3, 9, 7, 4), torch.float64, 0.1)
    x, u = case.point(), case.tangent(case.point())
    y, z = FixedRank().retract(x, u), FixedRank(floor=1e-3).retract(x, u)
    assert all(map(torch.equal, y, z))


def test_one_lost_rank_in_a_batch_leaves_the_others_alone() -> None:
    case = RankCase((3, 9, 7, 4), torch.float64, 0.1)
    x, u = case.point(), case.tangent(case.point())
    expected = FixedRank().retract(x, u)
    bad, step = losing(2, 1, torch.float64, moving=True)
    for t, b in zip((*x, *u), (*bad, *step), strict=True):
        t[1] = b
    y = FixedRank(floor=1e-3).retract(x, u)
    m = FixedRank()
    error = m.to_dense(y) - m.to_dense(expected)
    assert error[[0, 2]].abs().max() < 1e-13
    assert m.residual(y).max() < 1e-14


@pytest.mark.parametrize("name", rank_retractions.names())
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("part", USV._fields)
def test_a_displacement_that_is_not_finite_is_refused(name: str, part: str, bad: float) -> None:
    case = RankCase((6, 5, 2), torch.float32, 1e-2)
    x, u = case.point(), case.tangent(case.point())
    getattr(u, part)[0, 0] = bad
    with pytest.raises(StepError, match=r"not finite.*clip"):
        FixedRank(name).retract(x, u)


# A retraction of one's own


@pytest.mark.usefixtures("scratch_registries")
def test_a_retraction_of_ones_own() -> None:
    """First order only: the tangent matrix's factors added to S, U and V, and each orthonormalized."""

    @rank_retractions.register("mine", order=1)
    def mine(c: Tensor, hu: Tensor, hv: Tensor) -> Coefficients:
        inverse = torch.linalg.inv(c)
        eye = torch.eye(c.shape[-1], dtype=c.dtype).expand_as(c)
        bu, bv = inverse, inverse.mT
        # Corrected to orthonormal columns by the library, which gives S what it takes.
        return Coefficients(eye, bu, c + 0.5 * bu.mT @ hu @ bu @ c, eye, bv)

    part = rank_retractions.get("mine")
    assert isinstance(part, RankRetraction)
    law_rank_order(FixedRank("mine"), RankCase())
    with pytest.raises(AssertionError, match="law_rank_order"):
        law_rank_order(FixedRank("mine"), RankCase(), order=2)
    x = RankCase((9, 7, 3), torch.float32, 1e-3).point()
    u = RankCase((9, 7, 3), torch.float32, 1e-3).tangent(x)
    y = FixedRank("mine").retract(x, u)
    assert FixedRank().residual(y) < 1e-6


@pytest.mark.parametrize("name", rank_retractions.names())
def test_check_retraction_takes_them(name: str) -> None:
    part = rank_retractions.get(name)
    quick = {"shapes": [(5, 4, 2)], "dtypes": [torch.float64], "scales": [1e-2], "steps": 50}
    check_retraction(part, **quick)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=r"^law_rank_order.*more than the declared order 1"):
        check_retraction(part, order=1, **quick)  # type: ignore[arg-type]


def test_check_retraction_catches_an_order_that_is_too_high() -> None:
    """Not for orthographic, whose error is normal at W to every order."""
    with pytest.raises(AssertionError, match=r"^law_rank_order.*order 3 needs"):
        check_retraction(rank_retractions.get("svd"), order=3)


def test_autocast_rounds_nothing() -> None:
    m = FixedRank()
    x = m.random_point(40, 30, rank=4)
    u, v = m.random_tangent(x), m.random_tangent(x)
    z = torch.randn(40, 30)

    def everything() -> list[torch.Tensor]:
        y = m.retract(x, u)
        found = [*y, *m.transport_vector(x, u, y, v), *m.gradient(x, v), *m.project_tangent(x, v)]
        return [*found, *m.project_dense(x, z), m.embed(x, u), m.to_dense(x), m.inner(x, u, v), m.residual(x)]

    plain = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = everything()
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
