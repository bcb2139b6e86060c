"""RiemannianWrapper on FixedRank: every torch optimizer on triples U, S, V, whatever the choice of factors."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from stiefelopt import USV, FixedRank, RiemannianWrapper, StepError, attach, rank_retractions
from stiefelopt.rank_laws import RankCase
from stiefelopt.rank_retractions import Factors
from stiefelopt.rank_transports import Turn, spread, transported
from tests.test_wrapper_optimizers import VARIANTS, Variant

torch.set_num_threads(1)

Triple = list[nn.Parameter]
RETRACTIONS = rank_retractions.names()
# Two of equal shape, one of another height, one of another rank.
SHAPES = ((12, 9, 3), (12, 9, 3), (8, 14, 3), (9, 7, 2))
# On this problem, of matrices and not of unit columns.
LR = {"SGD": 0.05, "ASGD": 0.05, "Adadelta": 5.0, "Adagrad": 0.1, "Muon": 0.02, "Adam": 0.005, "AdamW": 0.005}


def triple(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Triple:
    x = RankCase(shape, torch.float64, seed=seed).point()
    return [nn.Parameter(t.to(dtype)) for t in x]


def usv(point: Sequence[Tensor]) -> USV:
    return USV(*(t.detach() for t in point))


def dense(point: Sequence[Tensor]) -> Tensor:
    u, s, v = (t.detach().double() for t in point)
    return u @ s @ v.mT


class LeastSquares:
    """Half the squared distance of every W = U S V^T to a matrix A near it, beside a Euclidean matrix."""

    def __init__(
        self, dtype: torch.dtype = torch.float64, shapes: Sequence[tuple[int, ...]] = SHAPES
    ) -> None:
        self.points = [triple(shape, k, dtype) for k, shape in enumerate(shapes)]
        self.targets = [dense(triple(shape, 50 + k)) for k, shape in enumerate(shapes)]
        self.free = nn.Parameter(torch.ones(4, 3, dtype=dtype))

    @property
    def params(self) -> list[nn.Parameter]:
        return [*(p for point in self.points for p in point), self.free]

    def groups(self, manifold: Any = None, **keys: Any) -> list[dict[str, Any]]:
        m = FixedRank() if manifold is None else manifold
        return [{"params": self.params[:-1], "manifold": m, **keys}, {"params": [self.free]}]

    def loss(self) -> float:
        pairs = zip(self.points, self.targets, strict=True)
        return sum(0.5 * (dense(x) - a).square().sum().item() for x, a in pairs)

    def dense_gradients(self) -> list[Tensor]:
        return [dense(x) - a for x, a in zip(self.points, self.targets, strict=True)]

    def set_gradients(self, kind: str = "factors", scale: float = 1.0) -> None:
        for x, g in zip(self.points, self.dense_gradients(), strict=True):
            u, s, v = (t.detach().double() for t in x)
            zv, ztu = scale * g @ v, scale * g.mT @ u
            grads = (zv @ s.mT, u.mT @ zv, ztu @ s) if kind == "factors" else (zv, u.mT @ zv, ztu)
            for p, grad in zip(x, grads, strict=True):
                p.grad = grad.to(p.dtype)
        self.free.grad = self.free.detach().clone()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    def turn(self) -> LeastSquares:
        """The same matrices from other factors."""
        for k, x in enumerate(self.points):
            case = RankCase((5, 5, x[1].shape[-1]), x[0].dtype, seed=k)
            a, b = case.orthogonal(1, x[1].shape[-1]), case.orthogonal(2, x[1].shape[-1])
            for p, t in zip(x, (x[0] @ a, a.mT @ x[1] @ b, x[2] @ b), strict=True):
                p.data.copy_(t.detach())
        return self


def run(problem: LeastSquares, optimizer: Any, steps: int, kind: str = "factors", scale: float = 1.0) -> None:
    for _ in range(steps):
        problem.set_gradients(kind, scale)
        optimizer.step()


def residual(problem: LeastSquares) -> float:
    return max(FixedRank().residual(usv(x)).item() for x in problem.points)


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


# Every optimizer


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_points_stay_and_loss_falls(variant: Variant) -> None:
    problem = LeastSquares(torch.float32)
    lr = {"lr": LR[variant.name]} if variant.name in LR else {}
    wrapper = RiemannianWrapper(variant(problem.groups(), **lr))
    start = problem.loss()
    run(problem, wrapper, 40)
    assert residual(problem) < 2e-6
    assert max(wrapper.residuals().values()) < 2e-6
    assert problem.loss() < 0.7 * start


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.name != "Rprop" and v.label == "default"], ids=str
)
def test_a_zero_learning_rate_moves_no_bit(variant: Variant) -> None:
    problem = LeastSquares(torch.float32)
    before = problem.values()
    run(problem, RiemannianWrapper(variant(problem.groups(), lr=0.0)), 2)
    assert same_bits(problem.values(), before)


def test_adamw_takes_the_learning_rate_with_transport_that_it_takes_without() -> None:
    ends = []
    for transport in ("none", "projection"):
        problem = LeastSquares()
        start = problem.loss()
        run(problem, RiemannianWrapper(AdamW(problem.groups(FixedRank(transport=transport)), lr=0.02)), 200)
        ends.append(problem.loss() / start)
    assert ends[1] < ends[0] < 1e-4


# Invariance

LINEAR: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda g: SGD(g, lr=0.05),
    "heavy ball": lambda g: SGD(g, lr=0.02, momentum=0.9),
    "nesterov": lambda g: SGD(g, lr=0.02, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("inner", LINEAR.values(), ids=list(LINEAR))
@pytest.mark.parametrize("name", RETRACTIONS)
def test_other_factors_of_the_same_matrix_make_no_difference(
    name: str, inner: Callable[[Any], Optimizer]
) -> None:
    plain, turned = LeastSquares(), LeastSquares().turn()
    start = plain.loss()
    for problem in (plain, turned):
        run(problem, RiemannianWrapper(inner(problem.groups(FixedRank(name)))), 30)
    assert plain.loss() < 0.5 * start
    for x, y in zip(plain.points, turned.points, strict=True):
        torch.testing.assert_close(dense(x), dense(y), atol=1e-9, rtol=0)


def test_elementwise_moments_do_depend_on_the_factors() -> None:
    """The check above can fail."""
    plain, turned = LeastSquares(), LeastSquares().turn()
    for problem in (plain, turned):
        run(problem, RiemannianWrapper(AdamW(problem.groups(), lr=0.005)), 10)
    assert (dense(plain.points[0]) - dense(turned.points[0])).abs().max() > 1e-3


@pytest.mark.parametrize("name", RETRACTIONS)
def test_one_step_is_the_dense_one(name: str) -> None:
    problem = LeastSquares()
    before = [usv([t.clone() for t in x]) for x in problem.points]
    expected = []
    for x, g in zip(before, problem.dense_gradients(), strict=True):
        left, right = x.U @ x.U.mT, x.V @ x.V.mT
        z = dense(x) - 0.1 * (left @ g + g @ right - left @ g @ right)
        if name == "svd":
            a, d, bh = torch.linalg.svd(z)
            r = x.S.shape[-1]
            expected.append((a[:, :r] * d[:r]) @ bh[:r])
        else:
            expected.append(z @ x.V @ torch.linalg.inv(x.U.mT @ z @ x.V) @ x.U.mT @ z)
    assert all((dense(p) - y).abs().max() > 1e-3 for p, y in zip(problem.points, expected, strict=True))
    run(problem, RiemannianWrapper(SGD(problem.groups(FixedRank(name)), lr=0.1)), 1)
    for new, y in zip(problem.points, expected, strict=True):
        torch.testing.assert_close(dense(new), y, atol=1e-12, rtol=0)


def test_heavy_ball_is_the_dense_one_with_projected_momentum() -> None:
    problem = LeastSquares()
    wrapper = RiemannianWrapper(SGD(problem.groups(), lr=0.05, momentum=0.9))
    w = [dense(x) for x in problem.points]
    momentum: list[Tensor] = [torch.zeros_like(t) for t in w]
    for _ in range(10):
        for k, (z, a) in enumerate(zip(w, problem.targets, strict=True)):
            r = problem.points[k][1].shape[-1]

            def tangent(t: Tensor, at: Tensor = z, r: int = r) -> Tensor:
                u, _, vh = torch.linalg.svd(at)
                pu, pv = u[:, :r] @ u[:, :r].mT, vh[:r].mT @ vh[:r]
                return pu @ t + t @ pv - pu @ t @ pv

            momentum[k] = 0.9 * tangent(momentum[k]) + tangent(z - a)
            u, d, vh = torch.linalg.svd(z - 0.05 * momentum[k])
            w[k] = (u[:, :r] * d[:r]) @ vh[:r]
        run(problem, wrapper, 1)
    for x, y in zip(problem.points, w, strict=True):
        torch.testing.assert_close(dense(x), y, atol=1e-10, rtol=0)


@pytest.mark.parametrize("inner", [*LINEAR.values(), lambda g: AdamW(g, lr=0.02)])
def test_factor_and_projected_gradients_give_the_same_step(inner: Callable[[Any], Optimizer]) -> None:
    factors, projected = LeastSquares(), LeastSquares()
    run(factors, RiemannianWrapper(inner(factors.groups(gradient="factors"))), 10, "factors")
    run(projected, RiemannianWrapper(inner(projected.groups(gradient="projected"))), 10, "projected")
    for a, b in zip(factors.values(), projected.values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


# Decay


def test_adamws_decoupled_decay_shrinks_w() -> None:
    problem = LeastSquares()
    expected = [(1 - 0.1 * 0.5) * dense(x) for x in problem.points]
    wrapper = RiemannianWrapper(AdamW(problem.groups(), lr=0.1, weight_decay=0.5))
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    wrapper.step()
    for x, y in zip(problem.points, expected, strict=True):
        torch.testing.assert_close(dense(x), y, atol=1e-13, rtol=0)


def test_manifold_decay_shrinks_w_for_sgd() -> None:
    problem, plain = LeastSquares(), LeastSquares()
    expected = [(1 - 0.1 * 0.5) * dense(x) for x in problem.points]
    wrapper = RiemannianWrapper(SGD(problem.groups(manifold_decay=0.5), lr=0.1))
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    wrapper.step()
    for x, y in zip(problem.points, expected, strict=True):
        torch.testing.assert_close(dense(x), y, atol=1e-13, rtol=0)
    assert torch.equal(problem.free, plain.free)
    # It reads the learning rate of the moment.
    wrapper.param_groups[0]["lr"] = 0.0
    before = problem.values()
    wrapper.step()
    assert same_bits(problem.values(), before)


def test_decay_beside_a_gradient_is_one_tangent_step() -> None:
    problem = LeastSquares()
    expected = []
    for x, g in zip(problem.points, problem.dense_gradients(), strict=True):
        m, y = FixedRank(), usv(x)
        step = m.project_dense(y, -0.1 * g - 0.1 * 0.5 * dense(x))
        expected.append(dense(m.retract(y, step)))
    run(problem, RiemannianWrapper(SGD(problem.groups(manifold_decay=0.5), lr=0.1)), 1)
    for x, w in zip(problem.points, expected, strict=True):
        torch.testing.assert_close(dense(x), w, atol=1e-12, rtol=0)


# The spectral direction


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_spectral_direction_knows_neither_loss_scale_nor_factors(scale: float) -> None:
    plain, other = LeastSquares(), LeastSquares().turn()
    for problem, s in ((plain, 1.0), (other, scale)):
        groups = problem.groups(direction="spectral")
        run(problem, RiemannianWrapper(SGD(groups, lr=0.02, momentum=0.9)), 15, scale=s)
    for x, y in zip(plain.points, other.points, strict=True):
        torch.testing.assert_close(dense(x), dense(y), atol=1e-8, rtol=0)


def test_the_spectral_direction_is_the_projected_orthogonal_factor() -> None:
    problem = LeastSquares()
    m = FixedRank()
    expected = []
    for x, g in zip(problem.points, problem.dense_gradients(), strict=True):
        y = usv(x)
        u, d, vh = torch.linalg.svd(m.embed(y, m.project_dense(y, g)))
        k = int((d > 1e-9).sum())
        expected.append(dense(m.retract(y, m.project_dense(y, -0.02 * u[:, :k] @ vh[:k]))))
    run(problem, RiemannianWrapper(SGD(problem.groups(direction="spectral"), lr=0.02)), 1)
    for x, w in zip(problem.points, expected, strict=True):
        torch.testing.assert_close(dense(x), w, atol=1e-10, rtol=0)


# Buckets


@pytest.mark.parametrize("direction", ["plain", "spectral"])
def test_stacked_heights_move_as_each_alone(direction: str) -> None:
    together = LeastSquares()
    wrapper = RiemannianWrapper(SGD(together.groups(direction=direction), lr=0.02, momentum=0.9))
    run(together, wrapper, 5)
    for k, shape in enumerate(SHAPES):
        alone = LeastSquares(shapes=())
        alone.points, alone.targets = [triple(shape, k)], [together.targets[k]]
        run(alone, RiemannianWrapper(SGD(alone.groups(direction=direction), lr=0.02, momentum=0.9)), 5)
        torch.testing.assert_close(dense(alone.points[0]), dense(together.points[k]), atol=1e-12, rtol=0)


def test_a_batch_of_triples_moves_as_its_members() -> None:
    shape = (9, 7, 2)
    members = LeastSquares(shapes=(shape, shape, shape))
    batched = [nn.Parameter(torch.stack([x[i].detach() for x in members.points])) for i in range(3)]
    inner = SGD([{"params": batched, "manifold": FixedRank(), "view": "batch"}], lr=0.02, momentum=0.9)
    wrapper, separate = (
        RiemannianWrapper(inner),
        RiemannianWrapper(SGD(members.groups(), lr=0.02, momentum=0.9)),
    )
    for _ in range(5):
        members.set_gradients()
        for i, p in enumerate(batched):
            p.grad = torch.stack([x[i].grad for x in members.points])  # type: ignore[misc]
        wrapper.step()
        separate.step()
    for k, x in enumerate(members.points):
        torch.testing.assert_close(dense([p[k] for p in batched]), dense(x), atol=1e-12, rtol=0)


def test_parameters_that_lie_column_by_column_move_alike() -> None:
    plain, flipped = LeastSquares(), LeastSquares()
    flipped.points = [[nn.Parameter(p.detach().mT.contiguous().mT) for p in x] for x in flipped.points]
    for problem in (plain, flipped):
        run(problem, RiemannianWrapper(AdamW(problem.groups(), lr=0.02)), 5)
    for a, b in zip(plain.values(), flipped.values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert not flipped.points[0][0].is_contiguous()


# Gradients that are missing or bad


@pytest.mark.parametrize("missing", range(3))
def test_a_missing_gradient_skips_the_whole_point(missing: int) -> None:
    problem, whole = LeastSquares(), LeastSquares()
    wrapper, other = (RiemannianWrapper(SGD(p.groups(), lr=0.05, momentum=0.9)) for p in (problem, whole))
    before = [p.detach().clone() for p in problem.points[1]]
    for _ in range(2):
        problem.set_gradients()
        whole.set_gradients()
        problem.points[1][missing].grad = None
        own = [p.grad for p in problem.params]
        bits = [None if g is None else g.clone() for g in own]
        wrapper.step()
        other.step()
        for p, g, b in zip(problem.params, own, bits, strict=True):
            assert p.grad is g
            assert g is None or (b is not None and torch.equal(g, b))
    assert same_bits([p.detach() for p in problem.points[1]], before)
    assert not any(wrapper.state.get(p) for p in problem.points[1])
    for k in (0, 2, 3):
        torch.testing.assert_close(dense(problem.points[k]), dense(whole.points[k]), atol=1e-13, rtol=0)
    # And when it comes back the point goes on.
    run(problem, wrapper, 1)
    assert not same_bits([p.detach() for p in problem.points[1]], before)


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_a_bad_gradient_changes_nothing(part: int, value: float) -> None:
    problem = LeastSquares()
    wrapper = RiemannianWrapper(AdamW(problem.groups(), lr=0.02))
    run(problem, wrapper, 2)
    problem.set_gradients()
    grad = problem.points[2][part].grad
    assert grad is not None
    grad.fill_(value) if value == 1e300 else grad[0, 0].fill_(value)
    if value == 1e300:
        grad.mul_(1e8)  # Inf in float64 products
    before, state = problem.values(), copy.deepcopy([dict(wrapper.state[p]) for p in problem.params])
    own = [p.grad for p in problem.params]
    with pytest.raises(StepError, match=r"\(0, 6\).*not finite"):
        wrapper.step()
    assert same_bits(problem.values(), before)
    assert all(p.grad is g for p, g in zip(problem.params, own, strict=True))
    for p, then in zip(problem.params, state, strict=True):
        assert all(torch.equal(wrapper.state[p][k], then[k]) for k in then)


@pytest.mark.parametrize("part", range(3))
def test_skip_leaves_out_just_that_point(part: int) -> None:
    problem, plain = LeastSquares(), LeastSquares()
    skipping = RiemannianWrapper(SGD(problem.groups(), lr=0.05, momentum=0.9), nonfinite="skip")
    problem.set_gradients()
    grad = problem.points[1][part].grad
    assert grad is not None
    grad[0, 0] = math.nan
    before = [p.detach().clone() for p in problem.points[1]]
    skipping.step()
    run(plain, RiemannianWrapper(SGD(plain.groups(), lr=0.05, momentum=0.9)), 1)
    assert same_bits([p.detach() for p in problem.points[1]], before)
    for k in (0, 2, 3):
        torch.testing.assert_close(dense(problem.points[k]), dense(plain.points[k]), atol=1e-13, rtol=0)
    assert skipping.diagnostics()["skipped"] == 3.0


class Poisoned(SGD):
    """Moves one parameter to NaN."""

    victim: Tensor

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.victim[0, 0] = math.nan


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_nan_born_inside_the_inner_step(part: int, nonfinite: str) -> None:
    problem = LeastSquares()
    inner = Poisoned(problem.groups(), lr=0.05)
    inner.victim = problem.points[2][part]
    wrapper = RiemannianWrapper(inner, nonfinite=nonfinite)
    before = problem.values()
    problem.set_gradients()
    if nonfinite == "raise":
        with pytest.raises(StepError, match=r"moved \(0, [678]\) to NaN"):
            wrapper.step()
        assert same_bits(problem.values()[:-1], before[:-1])
    else:
        wrapper.step()
        assert same_bits(problem.values()[6:9], before[6:9])
        assert not torch.equal(problem.values()[0], before[0])
        assert residual(problem) < 1e-13


def test_a_lost_rank_puts_every_point_back() -> None:
    problem = LeastSquares()
    wrapper = RiemannianWrapper(SGD(problem.groups(gradient="projected"), lr=1.0))
    before = problem.values()
    problem.set_gradients("projected")
    for p in problem.points[3]:
        p.grad = torch.zeros_like(p)
    problem.points[3][1].grad = problem.points[3][1].detach().clone()  # S - S
    with pytest.raises(StepError, match=r"floor=1e-3.*put back"):
        wrapper.step()
    assert same_bits(problem.values()[:-1], before[:-1])


# The torch contract


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [LINEAR["heavy ball"], lambda g: AdamW(g, lr=0.02)])
def test_resuming_is_bitwise_the_uninterrupted_run(
    inner: Callable[[Any], Optimizer], dtype: torch.dtype
) -> None:
    whole, first, second = (LeastSquares(dtype) for _ in range(3))
    run(whole, RiemannianWrapper(inner(whole.groups())), 7)
    stopped = RiemannianWrapper(inner(first.groups()))
    run(first, stopped, 4)
    file = io.BytesIO()
    torch.save({"optimizer": stopped.state_dict(), "params": first.values()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = RiemannianWrapper(inner(second.groups()))
    for p, value in zip(second.params, saved["params"], strict=True):
        p.data.copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["manifold"] == FixedRank().spec()
    run(second, resumed, 3)
    assert same_bits(second.values(), whole.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", [LINEAR["heavy ball"], lambda g: AdamW(g, lr=0.01)])
def test_half_precision_points_have_masters(inner: Callable[[Any], Optimizer], dtype: torch.dtype) -> None:
    problem = LeastSquares(dtype)
    wrapper = RiemannianWrapper(inner(problem.groups(gradient="projected")))
    start = problem.loss()
    run(problem, wrapper, 40, "projected")
    assert residual(problem) < 2 * torch.finfo(dtype).eps
    assert problem.loss() < 0.5 * start
    for x in problem.points:
        masters = [wrapper.state[p]["master"] for p in x]
        assert {t.dtype for t in masters} == {torch.float32}
        assert {p.dtype for p in x} == {dtype}
        assert all(torch.equal(t.to(dtype), p) for t, p in zip(masters, x, strict=True))
        assert FixedRank().residual(USV(*masters)) < 2e-6


def test_attach_and_a_deep_copy_go_on_alike() -> None:
    wrapped, attached = LeastSquares(), LeastSquares()
    wrapper = RiemannianWrapper(AdamW(wrapped.groups(), lr=0.02))
    optimizer = AdamW(attached.groups(), lr=0.02)
    handle = attach(optimizer)
    run(wrapped, wrapper, 3)
    run(attached, optimizer, 3)
    assert same_bits(wrapped.values(), attached.values())
    assert handle.residuals().keys() == wrapper.residuals().keys() == {(0, 0), (0, 3), (0, 6), (0, 9)}
    twin, copied = copy.deepcopy((wrapped, wrapper))
    run(wrapped, wrapper, 3)
    run(twin, copied, 3)
    assert same_bits(wrapped.values(), twin.values())


def test_an_added_group_is_as_one_from_the_start() -> None:
    whole, grown = LeastSquares(), LeastSquares()
    reference = RiemannianWrapper(AdamW(whole.groups(), lr=0.02))
    wrapper = RiemannianWrapper(AdamW([grown.free], lr=0.02))
    wrapper.add_param_group({"params": grown.params[:-1], "manifold": FixedRank()})
    run(whole, reference, 3)
    run(grown, wrapper, 3)
    assert same_bits(whole.values(), grown.values())
    assert wrapper.param_groups[1]["manifold"] == FixedRank().spec()


def test_diagnostics_are_norms_of_dense_matrices() -> None:
    problem = LeastSquares()
    wrapper = RiemannianWrapper(SGD(problem.groups(), lr=0.05))
    before, m = [usv([t.clone() for t in x]) for x in problem.points], FixedRank()
    gradient = sum(
        m.norm(x, m.project_dense(x, g)).item() ** 2
        for x, g in zip(before, problem.dense_gradients(), strict=True)
    )
    run(problem, wrapper, 1)
    moved = sum(
        (dense(x) - dense(y)).square().sum().item() for x, y in zip(problem.points, before, strict=True)
    )
    found = wrapper.diagnostics()
    assert found["gradient_norm"] == pytest.approx(math.sqrt(gradient), rel=1e-10)
    assert found["displacement_norm"] == pytest.approx(math.sqrt(moved), rel=1e-10)


def test_displacement_scale_multiplies_the_step() -> None:
    scaled, plain = LeastSquares(), LeastSquares()
    run(scaled, RiemannianWrapper(SGD(scaled.groups(displacement_scale=0.5), lr=0.1)), 2)
    run(plain, RiemannianWrapper(SGD(plain.groups(), lr=0.05)), 2)
    for x, y in zip(scaled.points, plain.points, strict=True):
        torch.testing.assert_close(dense(x), dense(y), atol=1e-12, rtol=0)


# Second moments


def _moved(seed: int, size: float) -> tuple[USV, USV]:
    g = torch.Generator().manual_seed(seed)
    m = FixedRank()
    x = m.random_point(60, 40, rank=3, dtype=torch.float64, generator=g)
    u = m.random_tangent(x, generator=g)
    return x, m.retract(x, USV(*(size * t for t in u)))


def _factors(x: USV, batch: int = 1) -> Factors:
    u, s, v = (t.expand(batch, *t.shape) for t in x)
    return Factors([u], s, [v])


def _as_usv(x: Factors) -> USV:
    return USV(x.us[0], x.s, x.vs[0])


def test_variances_stay_where_the_point_stays() -> None:
    x, _ = _moved(0, 1.0)
    v = USV(*(torch.rand_like(t) for t in x))
    for before, after in zip(v, _as_usv(spread(Turn(_factors(x), _factors(x)), _factors(v))), strict=True):
        torch.testing.assert_close(after[0], before, rtol=1e-12, atol=1e-14)


def test_variances_follow_columns_that_change_places() -> None:
    x, _ = _moved(1, 1.0)
    v = USV(*(torch.rand_like(t) for t in x))
    left, right = torch.eye(3, dtype=torch.float64)[[1, 2, 0]], torch.eye(3, dtype=torch.float64)[[0, 2, 1]]
    y = USV(x.U @ left, left.T @ x.S @ right, x.V @ right)
    got = _as_usv(spread(Turn(_factors(x), _factors(y)), _factors(v)))
    expected = USV(v.U @ right, left.T @ v.S @ right, v.V @ left)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a[0], b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [0.1, 1.0])
def test_variances_are_those_of_transported_samples(size: float) -> None:
    """Many independent tangent vectors, carried one by one: their spread, entry by entry, is what `spread` says."""
    x, y = _moved(2, size)
    g = torch.Generator().manual_seed(3)
    v = USV(*(torch.rand(t.shape, generator=g, dtype=torch.float64) + 0.1 for t in x))
    count = 4000
    z = USV(*(torch.randn(count, *t.shape, generator=g, dtype=torch.float64) * t.sqrt() for t in v))
    points = _factors(x, count), _factors(y, count)
    tangent = FixedRank().project_tangent(USV(*(t.expand(count, *t.shape) for t in x)), z)
    sampled = _as_usv(transported(Turn(*points), Factors([tangent.U], tangent.S, [tangent.V])))
    said = _as_usv(spread(Turn(_factors(x), _factors(y)), _factors(v)))
    for part, expected in zip(sampled, said, strict=True):
        ratio = part.var(dim=0) / expected[0]
        assert 0.85 < ratio.mean() < 1.1  # tangency takes r of m or n dimensions, 5 to 8 %
        assert ratio.log().std() < 0.2
