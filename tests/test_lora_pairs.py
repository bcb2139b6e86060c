"""Plain LoRA pairs (A, B) on the fixed-rank manifold: against dense matrices, FixedRank, pymanopt and PEFT itself."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pymanopt
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from stiefelopt import (
    AB,
    FixedRank,
    FixedRankPair,
    RiemannianWrapper,
    Riemannion,
    StepError,
    attach,
    constrain,
    pair_laws,
    param_groups,
    rank_laws,
)
from stiefelopt.errors import ConfigError, NotOnManifoldError, ShapeError, UnknownNameError
from stiefelopt.laws import Law
from stiefelopt.pair_laws import PAIR_LAWS, PairCase
from stiefelopt.rank_laws import RankCase, rank_cases
from stiefelopt.testing import check_manifold

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)

Pair = list[nn.Parameter]
# Two of equal shape, one of another height, one of another rank, and square ones, where A could be taken for B.
SHAPES = ((12, 9, 3), (12, 9, 3), (8, 14, 3), (9, 7, 2), (5, 5, 5))


def near(y: Tensor, expected: Tensor, size: float = 1.0) -> None:
    torch.testing.assert_close(y, expected, atol=1e-9 * size, rtol=0)


def truncated(z: Tensor, r: int) -> Tensor:
    u, s, vh = torch.linalg.svd(z)
    return (u[..., :r] * s[..., None, :r]) @ vh[..., :r, :]


def projected(w: Tensor, r: int, z: Tensor) -> Tensor:
    """The part of z that is tangent at w, of rank r, by the SVD of w."""
    u, _, vh = torch.linalg.svd(w)
    pu, pv = u[:, :r] @ u[:, :r].mT, vh[:r].mT @ vh[:r]
    return pu @ z + z @ pv - pu @ z @ pv


def skew(r: int, seed: int) -> Tensor:
    """An invertible r x r matrix, far from orthogonal: condition number 30."""
    case = RankCase((r, r, r), seed=seed)
    values = torch.logspace(0, -math.log10(30), r, dtype=torch.float64) * 2
    return case.orthogonal(1, r) * values @ case.orthogonal(2, r)


def factors(shape: tuple[int, int, int], seed: int = 0) -> AB:
    """A pair whose factors are neither balanced nor orthogonal, of a W with singular values in [1/2, 3/2]."""
    x = RankCase(shape, seed=seed).point()
    t = skew(shape[-1], seed)
    return AB(torch.linalg.solve(t, x.V.mT), x.U @ x.S @ t)


# The geometry


@pytest.mark.parametrize("shape", [*SHAPES[2:], (6, 4, 1), (1, 1, 1)], ids=str)
def test_projection_gradient_and_norm_are_the_dense_ones(shape: tuple[int, int, int]) -> None:
    m, r = FixedRankPair(), shape[-1]
    x, g = factors(shape), RankCase(shape).dense()
    w = x.B @ x.A
    expected = projected(w, r, g)
    near(m.to_dense(x), w)
    near(m.embed(x, m.project_dense(x, g)), expected)
    leaves = [t.clone().requires_grad_() for t in x]
    ((leaves[1] @ leaves[0]) * g).sum().backward()
    u = m.gradient(x, AB(*(t.grad for t in leaves)))  # type: ignore[arg-type]
    near(m.embed(x, u), expected)
    near(m.norm(x, u), expected.norm())
    v = m.random_tangent(x, torch.Generator().manual_seed(1))
    near(m.inner(x, u, v), (expected * m.embed(x, v)).sum())
    near(m.norm(x, v), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 0.3, 3.0, 100.0])
@pytest.mark.parametrize("shape", [*SHAPES[2:], (6, 4, 1)], ids=str)
def test_the_retraction_is_the_truncated_svd_and_keeps_the_gram_of_a(
    shape: tuple[int, int, int], scale: float
) -> None:
    m = FixedRankPair()
    for seed in range(3):
        x = factors(shape, seed)
        u = m.random_tangent(x, torch.Generator().manual_seed(seed))
        u = AB(scale * u.A, scale * u.B)
        y = m.retract(x, u)
        near(m.to_dense(y), truncated(x.B @ x.A + m.embed(x, u), shape[-1]), 1 + scale)
        gram, before = y.A @ y.A.mT, x.A @ x.A.mT
        near(gram, before * (gram[0, 0] / before[0, 0]))
        assert scale > 3 or abs(gram[0, 0] / before[0, 0] - 1) < 1e-9
        v = m.random_tangent(x, torch.Generator().manual_seed(9))
        moved = m.embed(y, m.transport_vector(x, u, y, v))
        near(moved, projected(y.B @ y.A, shape[-1], m.embed(x, v)))


def test_pymanopts_fixed_rank_embedded_takes_the_same_step() -> None:
    shape = (20, 16, 6)
    theirs, m = pymanopt.manifolds.FixedRankEmbedded(*shape), FixedRankPair()
    x, g = factors(shape), RankCase(shape).dense()
    u, s, vt = np.linalg.svd((x.B @ x.A).numpy(), full_matrices=False)
    point = u[:, :6], s[:6], vt[:6]
    tangent = theirs.projection(point, g.numpy())
    ours = m.project_dense(x, g)
    a, b, c = theirs.embedding(point, tangent)
    near(m.embed(x, ours), torch.from_numpy(np.asarray(a @ b @ c.T)))
    assert abs(theirs.norm(point, tangent) - m.norm(x, ours).item()) < 1e-12
    left, values, right = theirs.retraction(point, tangent)
    near(m.to_dense(m.retract(x, ours)), torch.from_numpy((left * values) @ right), 2)


def test_project_point_is_the_balanced_truncated_svd() -> None:
    m, z = FixedRankPair(), RankCase((2, 9, 7, 3)).dense()
    x = m.project_point(z, rank=3)
    near(m.to_dense(x), truncated(z, 3))
    near(x.A @ x.A.mT, x.B.mT @ x.B)
    assert m.dim(9, 7, rank=3) == FixedRank().dim(9, 7, rank=3)
    m.check(x)
    assert torch.equal(m.residual(x), torch.zeros(2, dtype=torch.float64))


# The laws

CORNERS = (
    PairCase((1, 1, 1), torch.float32, 1e-2),
    PairCase((5, 4, 1), torch.float64, 1e2),
    PairCase((4, 4, 4), torch.float32, 1e2),
    PairCase((3, 7, 3), torch.float32, 1e-6),
    PairCase((2, 0, 5, 4, 2), torch.float32, 1.0),
)


@pytest.mark.parametrize("law", PAIR_LAWS, ids=lambda law: law.__name__)
def test_laws_hold(law: Law) -> None:
    @given(case=rank_cases())
    @settings(max_examples=max(1, settings().max_examples // 6))
    def check(case: RankCase) -> None:
        law(FixedRankPair(), PairCase(case.shape, case.dtype, case.scale, case.seed))

    for corner in CORNERS:
        check = example(case=corner)(check)
    check()


def broken(**methods: Callable[..., Any]) -> FixedRankPair:
    return type("Broken", (FixedRankPair,), methods)()


def balanced(self: FixedRankPair, x: AB, u: AB) -> AB:
    """The right matrix in the balanced pair, which drops the rows of A that B does not use yet."""
    w = x.B.double() @ x.A.double() + FixedRankPair().embed(x, u).double()
    a, s, bh = torch.linalg.svd(w)
    r = x.A.shape[-2]
    root = s[..., :r].sqrt()
    return AB((root[..., None] * bh[..., :r, :]).to(x.A), (a[..., :r] * root[..., None, :]).to(x.B))


BROKEN: dict[str, tuple[Law, FixedRankPair, str]] = {
    "a residual": (
        pair_laws.law_pair_membership,
        broken(residual=lambda self, x: x.A.abs().amax((-2, -1))),
        "every point has residual 0",
    ),
    "NaN accepted": (pair_laws.law_pair_membership, broken(check=lambda self, x: None), "accepted NaN"),
    "LoRA's own gradient": (
        pair_laws.law_pair_split,
        broken(gradient=lambda self, x, g: FixedRankPair().project_tangent(x, g)),
        "the same gradient",
    ),
    "its balanced pair": (pair_laws.law_pair_split, broken(retract=balanced), "A A\\^T is kept"),
    "lost rows": (pair_laws.law_pair_singular, broken(retract=balanced), "A A\\^T is kept \\(B = 0\\)"),
    "an inverse of B": (
        pair_laws.law_pair_singular,
        broken(project_dense=lambda self, x, z: AB(torch.linalg.pinv(x.B) @ z, z @ torch.linalg.pinv(x.A))),
        "the projection",
    ),
    "half the gradient": (
        rank_laws.law_rank_gradient,
        broken(gradient=lambda self, x, g: AB(*(t / 2 for t in FixedRankPair().gradient(x, g)))),
        "inner",
    ),
    "sums of factors": (
        rank_laws.law_rank_order,
        broken(
            retract=lambda self, x, u: AB(
                x.A + torch.linalg.pinv(x.B) @ FixedRankPair().embed(x, AB(u.A, torch.zeros_like(u.B))),
                x.B + FixedRankPair().embed(x, AB(torch.zeros_like(u.A), u.B)) @ torch.linalg.pinv(x.A),
            )
        ),
        "order",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_laws_refuse_what_is_broken(name: str) -> None:
    law, manifold, claim = BROKEN[name]
    case = PairCase((7, 5, 3), scale=1e-2)
    law(FixedRankPair(), case)
    with pytest.raises(AssertionError, match=f"(?s){law.__name__}.*{claim}"):
        law(manifold, case)


def test_check_manifold_runs_them() -> None:
    check_manifold(FixedRankPair(), shapes=[(5, 4, 2)], dtypes=[torch.float64], scales=[1e-2])


# The step


class LeastSquares:
    """Half the squared distance of every W = B A to a matrix near it."""

    def __init__(
        self, dtype: torch.dtype = torch.float64, shapes: Sequence[tuple[int, int, int]] = SHAPES
    ) -> None:
        self.pairs = [[nn.Parameter(t.to(dtype)) for t in factors(s, k)] for k, s in enumerate(shapes)]
        self.targets = [(b @ a) for a, b in (factors(s, 50 + k) for k, s in enumerate(shapes))]
        self.free = nn.Parameter(torch.ones(4, 3, dtype=dtype))

    @property
    def params(self) -> list[nn.Parameter]:
        return [*(p for pair in self.pairs for p in pair), self.free]

    def groups(self, manifold: Any = None, **keys: Any) -> list[dict[str, Any]]:
        m = FixedRankPair() if manifold is None else manifold
        return [{"params": self.params[:-1], "manifold": m, **keys}, {"params": [self.free]}]

    def dense(self) -> list[Tensor]:
        return [(b.detach().double() @ a.detach().double()) for a, b in self.pairs]

    def loss(self) -> float:
        return sum(
            0.5 * (w - t).square().sum().item() for w, t in zip(self.dense(), self.targets, strict=True)
        )

    def set_gradients(self) -> None:
        for (a, b), w, t in zip(self.pairs, self.dense(), self.targets, strict=True):
            a.grad = (b.detach().double().mT @ (w - t)).to(a.dtype)
            b.grad = ((w - t) @ a.detach().double().mT).to(b.dtype)
        self.free.grad = self.free.detach().clone()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    def turned(self, by: Callable[[int, int], Tensor] = skew) -> LeastSquares:
        """The same matrices from other factors."""
        for k, (a, b) in enumerate(self.pairs):
            t = by(a.shape[0], 70 + k)
            a.data.copy_(torch.linalg.solve(t, a.detach()))
            b.data.copy_(b.detach() @ t)
        return self


def run(problem: LeastSquares, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        problem.set_gradients()
        optimizer.step()


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


LINEAR: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda g: SGD(g, lr=0.05),
    "heavy ball": lambda g: SGD(g, lr=0.02, momentum=0.9),
    "nesterov": lambda g: SGD(g, lr=0.02, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("inner", LINEAR.values(), ids=list(LINEAR))
def test_the_split_into_factors_makes_no_difference(inner: Callable[[Any], Optimizer]) -> None:
    """B -> B M, A -> M^-1 A for any invertible M; and it is the trajectory of FixedRank from the same matrices."""
    plain, turned = LeastSquares(), LeastSquares().turned()
    assert (plain.pairs[0][0] - turned.pairs[0][0]).abs().max() > 0.1
    start = plain.loss()
    for problem in (plain, turned):
        run(problem, RiemannianWrapper(inner(problem.groups())), 30)
    assert plain.loss() < 0.5 * start
    for x, y in zip(plain.dense(), turned.dense(), strict=True):
        near(x, y)

    reference = LeastSquares()
    triples = [
        [nn.Parameter(t) for t in FixedRank().project_point(w, rank=a.shape[0])]
        for w, (a, _) in zip(reference.dense(), reference.pairs, strict=True)
    ]
    wrapper = RiemannianWrapper(inner([{"params": [p for t in triples for p in t], "manifold": FixedRank()}]))
    for _ in range(30):
        for (u, s, v), target in zip(triples, reference.targets, strict=True):
            g = u.detach() @ s.detach() @ v.detach().mT - target
            u.grad, s.grad, v.grad = (
                g @ v.detach() @ s.detach().mT,
                u.detach().mT @ g @ v.detach(),
                g.mT @ u.detach() @ s.detach(),
            )
        wrapper.step()
    for w, (u, s, v) in zip(plain.dense(), triples, strict=True):
        near(w, (u @ s @ v.mT).detach())


def test_adamw_does_not_see_the_scale_of_the_factors_but_their_rotation() -> None:
    plain, scaled, turned = (
        LeastSquares(),
        LeastSquares().turned(lambda r, _: 7.0 * torch.eye(r).double()),
        None,
    )
    turned = LeastSquares().turned()
    for problem in (plain, scaled, turned):
        run(problem, RiemannianWrapper(AdamW(problem.groups(), lr=0.01, weight_decay=0)), 20)
    for x, y in zip(plain.dense(), scaled.dense(), strict=True):
        near(x, y)
    assert (plain.dense()[0] - turned.dense()[0]).abs().max() > 1e-3


def test_one_step_of_sgd_is_the_dense_one() -> None:
    problem = LeastSquares()
    before = problem.dense()
    run(problem, RiemannianWrapper(SGD(problem.groups(), lr=0.1)), 1)
    for w, t, y, (a, _) in zip(before, problem.targets, problem.dense(), problem.pairs, strict=True):
        r = a.shape[0]
        near(y, truncated(w - 0.1 * projected(w, r, w - t), r))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transport", ["projection", "none"])
def test_adamw_descends(dtype: torch.dtype, transport: str) -> None:
    problem = LeastSquares(dtype, SHAPES[2:4])
    start = problem.loss()
    wrapper = RiemannianWrapper(AdamW(problem.groups(FixedRankPair(transport)), lr=0.05, weight_decay=0))
    run(problem, wrapper, 60)
    assert problem.loss() < 0.05 * start
    assert set(wrapper.residuals().values()) == {0.0}
    assert {p.dtype for p in problem.params} == {dtype}
    found = wrapper.diagnostics()
    assert 0 < found["displacement_norm"] < 1
    assert found["gradient_norm"] > 0


def test_diagnostics_are_the_dense_norms() -> None:
    problem = LeastSquares()
    before = problem.dense()
    wrapper = RiemannianWrapper(SGD(problem.groups(), lr=0.1))
    run(problem, wrapper, 1)
    found = wrapper.diagnostics()
    moved = [(y - w).square().sum() for y, w in zip(problem.dense(), before, strict=True)]
    grads = [
        projected(w, a.shape[0], w - t).square().sum()
        for w, t, (a, _) in zip(before, problem.targets, problem.pairs, strict=True)
    ]
    assert abs(found["displacement_norm"] - torch.stack(moved).sum().sqrt()) < 1e-12
    assert abs(found["gradient_norm"] - torch.stack(grads).sum().sqrt()) < 1e-12


def test_manifold_decay_shrinks_w() -> None:
    problem = LeastSquares()
    expected = [(1 - 0.1 * 0.5) * w for w in problem.dense()]
    wrapper = RiemannianWrapper(SGD(problem.groups(manifold_decay=0.5), lr=0.1))
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    wrapper.step()
    for w, y in zip(problem.dense(), expected, strict=True):
        near(w, y, 1e-3)


def test_a_displacement_scale_is_a_learning_rate() -> None:
    scaled, plain = LeastSquares(), LeastSquares()
    run(scaled, RiemannianWrapper(SGD(scaled.groups(displacement_scale=0.5), lr=0.1)), 3)
    run(plain, RiemannianWrapper(SGD(plain.groups(), lr=0.05)), 3)
    for x, y in zip(scaled.dense(), plain.dense(), strict=True):
        near(x, y, 1e-3)


def test_riemannion_moves_pairs_as_triples() -> None:
    """The orthogonal factor of the tangent vector, projected: the same matrices, whatever the factors."""
    problem = LeastSquares(shapes=SHAPES[:1])
    w, r = problem.dense()[0], 3
    xi = projected(w, r, w - problem.targets[0])
    u, s, vh = torch.linalg.svd(xi)
    k = int((s > 1e-9 * s[0]).sum())
    direction = projected(w, r, u[:, :k] @ vh[:k])
    run(problem, Riemannion(problem.groups()[:1], lr=0.01, momentum=0.0), 1)
    near(problem.dense()[0], truncated(w - 0.01 * direction, r))


def test_a_zero_learning_rate_moves_no_bit_and_a_missing_gradient_holds_the_point() -> None:
    problem = LeastSquares(torch.float32)
    before = problem.values()
    run(problem, RiemannianWrapper(AdamW(problem.groups(), lr=0.0)), 2)
    assert same_bits(problem.values(), before)
    problem.set_gradients()
    problem.pairs[0][1].grad = None
    RiemannianWrapper(AdamW(problem.groups(), lr=0.1)).step()
    assert same_bits(problem.values()[:2], before[:2])
    assert not torch.equal(problem.values()[2], before[2])


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(half: int, bad: float) -> None:
    problem = LeastSquares(torch.float32)
    problem.pairs[1][1].data.zero_()
    wrapper = RiemannianWrapper(AdamW(problem.groups(), lr=0.1))
    problem.set_gradients()
    grad = problem.pairs[1][half].grad
    assert grad is not None
    grad[0, 0] = bad
    before = problem.values()
    with pytest.raises(StepError, match="not finite"):
        wrapper.step()
    assert same_bits(problem.values(), before)
    assert not wrapper.state
    skipping = RiemannianWrapper(AdamW(problem.groups(), lr=0.1), nonfinite="skip")
    skipping.step()
    assert same_bits(problem.values()[2:4], before[2:4])
    assert not torch.equal(problem.values()[0], before[0])


def test_resume_is_bitwise_and_attach_is_the_wrapper() -> None:
    straight, broken, attached = (LeastSquares(torch.bfloat16) for _ in range(3))
    one = RiemannianWrapper(AdamW(straight.groups(), lr=0.02, weight_decay=0))
    run(straight, one, 10)
    two = RiemannianWrapper(AdamW(broken.groups(), lr=0.02, weight_decay=0))
    run(broken, two, 5)
    file = io.BytesIO()
    torch.save(two.state_dict(), file)
    file.seek(0)
    two = RiemannianWrapper(AdamW(broken.groups(), lr=0.5, weight_decay=0))
    two.load_state_dict(torch.load(file, weights_only=True))
    run(broken, two, 5)
    assert same_bits(straight.values(), broken.values())
    inner = AdamW(attached.groups(), lr=0.02, weight_decay=0)
    attach(inner)
    run(attached, inner, 10)
    assert same_bits(straight.values(), attached.values())


# Where rank is missing


def zero_start(dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> LeastSquares:
    """As LoRA begins: A uniform with PyTorch's bound 1 / sqrt(n), B = 0."""
    problem = LeastSquares(dtype, shapes)
    g = torch.Generator().manual_seed(0)
    for a, b in problem.pairs:
        start = (2 * torch.rand(a.shape, generator=g, dtype=torch.float64) - 1) / math.sqrt(a.shape[1])
        a.data.copy_(start)
        b.data.zero_()
    return problem


@pytest.mark.parametrize("inner", [lambda g: SGD(g, lr=0.2), lambda g: AdamW(g, lr=0.05, weight_decay=0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_training_starts_from_b_equal_to_zero(dtype: torch.dtype, inner: Callable[[Any], Optimizer]) -> None:
    problem = zero_start(dtype, SHAPES[2:4])
    start, before = problem.loss(), problem.values()
    wrapper = RiemannianWrapper(inner(problem.groups()))
    run(problem, wrapper, 1)
    for k, (a, b) in enumerate(problem.pairs):
        torch.testing.assert_close(a.detach(), before[2 * k], rtol=0, atol=20 * torch.finfo(dtype).eps)
        assert b.abs().max() > 0
    run(problem, wrapper, 1)
    assert all((a - x).abs().max() > 1e-3 for (a, _), x in zip(problem.pairs, before[::2], strict=False))
    run(problem, wrapper, 80)
    assert problem.loss() < 0.05 * start
    assert all(bool(torch.isfinite(p).all()) for p in problem.params)


def test_the_first_step_from_zero_is_that_of_the_dense_gradient_on_the_rows_of_a() -> None:
    problem = zero_start(torch.float64)
    before = problem.values()
    run(problem, RiemannianWrapper(SGD(problem.groups(), lr=0.1)), 1)
    for k, (w, t) in enumerate(zip(problem.dense(), problem.targets, strict=True)):
        a = before[2 * k]
        near(w, 0.1 * t @ a.mT @ torch.linalg.inv(a @ a.mT) @ a)


def test_gradients_of_rank_one_do_not_lock_the_rows_of_a() -> None:
    """After the first step W has rank 1; the other rows of A must stay for what the next steps bring."""
    problem = zero_start(torch.float32, SHAPES[:1])
    (a, b), target = problem.pairs[0], problem.targets[0].float()
    wrapper = RiemannianWrapper(SGD(problem.groups()[:1], lr=0.9))
    draw = torch.Generator().manual_seed(0)
    for _ in range(300):
        x = torch.randn(9, generator=draw)
        x = x / x.norm()
        g = torch.outer((b.detach() @ a.detach() - target) @ x, x)
        a.grad, b.grad = b.detach().mT @ g, g @ a.detach().mT
        wrapper.step()
        assert torch.linalg.matrix_rank(a.detach()) == 3
    assert (problem.dense()[0] - target).norm() < 0.05 * target.norm()


DEFICIENT: dict[str, Callable[[Pair], object]] = {
    "B = 0": lambda x: x[1].data.zero_(),
    "A = 0": lambda x: x[0].data.zero_(),
    "a zero column of B": lambda x: x[1].data[:, 0].zero_(),
    "a zero row of A": lambda x: x[0].data[0].zero_(),
    "equal columns of B": lambda x: x[1].data[:, 1].copy_(x[1].data[:, 0]),
    "equal rows of A": lambda x: x[0].data[1].copy_(x[0].data[0]),
    "one of A, another of B": lambda x: torch._foreach_zero_([x[0].data[0], x[1].data[:, 1]]),
    "a tiny column of B": lambda x: x[1].data[:, 0].mul_(1e-12),
    "tiny factors": lambda x: torch._foreach_mul_([p.data for p in x], 1e-12),
    "huge factors": lambda x: torch._foreach_mul_([p.data for p in x], 1e6),
}


@pytest.mark.parametrize("name", DEFICIENT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_missing_rank_neither_breaks_a_step_nor_ends_training(dtype: torch.dtype, name: str) -> None:
    """One step is W plus the dense gradient on the spaces that are there, cut to rank r; then training goes on."""
    problem = LeastSquares(dtype, SHAPES[:1])
    DEFICIENT[name](problem.pairs[0])
    w, r = problem.dense()[0], 3
    g = w - problem.targets[0]
    a, b = (p.detach().double() for p in problem.pairs[0])
    pinv = torch.linalg.pinv
    pu, pv = b @ pinv(b, rtol=1e-7), pinv(a, rtol=1e-7) @ a
    xi = pu @ g + g @ pv - pu @ g @ pv
    wrapper = RiemannianWrapper(SGD(problem.groups(), lr=0.1))
    run(problem, wrapper, 1)
    expected = truncated(w - 0.1 * xi, r)
    error = (problem.dense()[0] - expected).norm()
    assert error < 1e3 * torch.finfo(dtype).eps * max(1, w.norm().item())
    if name != "huge factors":
        for p in problem.params:
            p.grad = None
        wrapper = RiemannianWrapper(AdamW(problem.groups(), lr=0.1, weight_decay=0))
        run(problem, wrapper, 100)
        assert problem.loss() < 0.02 * g.square().sum()


def test_what_is_missing_in_both_factors_comes_back() -> None:
    """In plain LoRA both gradients vanish there for ever; here the new row and column spaces make a new direction."""
    problem = LeastSquares(shapes=SHAPES[:1])
    a, b = problem.pairs[0]
    a.data[0].zero_()
    b.data[:, 0].zero_()
    run(problem, RiemannianWrapper(AdamW(problem.groups(), lr=0.1, weight_decay=0)), 150)
    assert problem.loss() < 0.01


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_rounded_gradients_do_not_blow_up_in_weak_directions(half: torch.dtype) -> None:
    """Under autocast gA = B^T G knows B to 4e-3 only; where B is weaker than that, it is noise."""
    m, case = FixedRankPair(), RankCase((64, 48, 4))
    x, g = case.point(), case.dense()
    values = torch.tensor([1.0, 0.5, 1e-2, 1e-6], dtype=torch.float64)
    turn = case.orthogonal(3, 4)
    p = AB((turn.mT @ x.V.mT).float(), (x.U * values @ turn).float())
    turn = turn.float()
    exact = turn @ m.project_dense(p, g.float()).A
    rounded = AB(*(t.float() for t in (p.B.to(half).mT @ g.to(half), g.to(half) @ p.A.to(half).mT)))
    # Row k of Y^T, turned back, belongs to the k-th singular value.
    found, undamped = turn @ m.gradient(p, rounded).A, (turn @ rounded.A) / values.float()[:, None]
    assert undamped[-1].norm() > 20 * exact[-1].norm()
    assert found[-1].norm() < exact[-1].norm()
    assert (found[:2] - exact[:2]).norm() < 0.05 * exact[:2].norm()
    # Gradients that agree are taken at their word.
    agreeing = turn @ m.gradient(p, AB(p.B.mT @ g.float(), g.float() @ p.A.mT)).A
    assert (agreeing[:3] - exact[:3]).norm() < 1e-4 * exact[:3].norm()


@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("weak", AB._fields)
def test_rounding_of_a_gradient_stays_in_the_weak_directions(weak: str, smallest: float) -> None:
    """In the direction of singular value s of its factor a float32 coordinate is right to eps / s, and in no other."""
    m, case = FixedRankPair(), RankCase((64, 48, 4))
    x, g = case.point(), case.dense().float().double()
    values = torch.tensor([1.0, 0.5, 1e-1, smallest], dtype=torch.float64)
    p = AB((case.orthogonal(3, 4) @ x.V.mT).float(), (x.U @ case.orthogonal(4, 4)).float())
    if weak == "A":
        p = p._replace(A=(case.orthogonal(3, 4) * values @ x.V.mT).float())
    else:
        p = p._replace(B=(x.U * values @ case.orthogonal(4, 4)).float())
    a, b = (t.double() for t in p)
    found = m.gradient(p, AB((b.mT @ g).float(), (g @ a.mT).float()))
    # X = G V and Y^T = U^T G (I - V V^T), in the bases of the singular vectors.
    turn, strengths, v = torch.linalg.svd(a, full_matrices=False)
    error = (found.B.double() @ turn - g @ v.mT).norm(dim=0)
    if weak == "B":
        u, strengths, turn = torch.linalg.svd(b, full_matrices=False)
        error = (turn @ found.A.double() - u.mT @ (g - g @ v.mT @ v)).norm(dim=1)
    assert (error * strengths < 4 * torch.finfo(torch.float32).eps * g.norm()).all()


@pytest.mark.parametrize("condition", [1e3, 1e6])
def test_ill_conditioned_factors_in_float32(condition: float) -> None:
    """W right to 1e-5 of its norm, whichever factor has the small singular values."""
    m = FixedRankPair()
    values = torch.logspace(0, -math.log10(condition), 5, dtype=torch.float64)
    for share in (0.0, 0.5, 1.0):
        case = RankCase((40, 30, 5))
        x = case.point()
        p = AB(*(t.float() for t in (values[:, None] ** share * x.V.mT, x.U * values ** (1 - share))))
        for scale in (1e-6, 1e-3, 0.1, 3.0):
            u = m.random_tangent(p, torch.Generator().manual_seed(3))
            u = AB(scale * u.A, scale * u.B)
            precise = AB(*(t.double() for t in p))
            w = precise.B @ precise.A + m.embed(precise, AB(*(t.double() for t in u)))
            y = m.retract(p, u)
            expected = truncated(w, 5)
            assert (y.B.double() @ y.A.double() - expected).norm() < 1e-5 * expected.norm()


# PEFT


def tiny_llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def with_lora(model: Any = None, **options: Any) -> Any:
    model = tiny_llama() if model is None else model
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def batches(count: int) -> list[Tensor]:
    """Sequences that count upwards, which a model can learn."""
    g = torch.Generator().manual_seed(2)
    starts = torch.randint(0, 64, (count, 4, 1), generator=g)
    return list((starts + torch.arange(12)) % 64)


def fit(model: Any, optimizer: Any, data: Sequence[Tensor], *, autocast: bool = False) -> list[float]:
    losses = []
    for tokens in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def wrapped(model: Any, lr: float = 0.02, **options: Any) -> RiemannianWrapper:
    return RiemannianWrapper(AdamW(param_groups(model, lr=lr, lora="fixed-rank", **options)))


def test_groups_list_pairs_and_leave_the_rest_as_it_was() -> None:
    model = with_lora(bias="lora_only", modules_to_save=["lm_head"], lora_bias=True)
    plain = param_groups(model, lr=0.1, weight_decay=0.3, named=True)
    assert not any("manifold" in group for group in plain)
    groups = param_groups(model, lr=0.1, weight_decay=0.3, manifold_lr=0.2, named=True, lora="fixed-rank")
    pairs, others = groups[0], groups[1:]
    names = [name for name, _ in pairs["params"]]
    assert len(names) == 2 * 2 * 3
    for a, b in zip(names[0::2], names[1::2], strict=True):
        assert a.endswith("lora_A.default.weight")
        assert b == a.replace("lora_A", "lora_B")
    settings = {key: value for key, value in pairs.items() if key != "params"}
    spec = FixedRankPair().spec()
    assert settings == {"manifold": spec, "lr": 0.2, "weight_decay": 0.0, "manifold_decay": 0.3}
    for group in plain:
        group["params"] = [entry for entry in group["params"] if entry[0] not in names]
    by_decay = {group["weight_decay"]: group for group in others}
    assert by_decay == {group["weight_decay"]: group for group in plain}
    assert any("lora_B.default.bias" in name for name, _ in by_decay[0.0]["params"])
    RiemannianWrapper(AdamW(groups))


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_dropout": 0.1}, {"init_lora_weights": "pissa"}], ids=str
)
def test_a_peft_model_trains(options: dict[str, Any]) -> None:
    model = with_lora(**options)
    wrapper = wrapped(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = fit(model, wrapper, batches(40))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_a_peft_model_with_a_half_precision_base_trains_under_autocast() -> None:
    model = with_lora(tiny_llama(torch.bfloat16))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = fit(model, wrapped(model), batches(40), autocast=True)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    # PEFT can be told to keep the factors in the base's precision, too.
    model = with_lora(tiny_llama(torch.bfloat16))
    for p in model.parameters():
        p.data = p.data.bfloat16()
    losses = fit(model, wrapped(model), batches(40))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_checkpoint_is_plain_lora_and_stock_peft_reads_it(tmp_path: Path) -> None:
    model = with_lora()
    stock = with_lora()
    fit(model, wrapped(model), batches(5))
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    model.save_pretrained(tmp_path)
    stock.save_pretrained(tmp_path / "stock")
    read = (tmp_path / "adapter_config.json").read_text()
    assert read == (tmp_path / "stock" / "adapter_config.json").read_text()
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    tokens = batches(1)[0]
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        assert torch.equal(loaded(input_ids=tokens).logits, expected)
        merged = copy.deepcopy(loaded).merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_training_resumes_bitwise_in_a_fresh_model(tmp_path: Path) -> None:
    data = batches(10)
    straight = with_lora()
    fit(straight, wrapped(straight), data)
    model = with_lora()
    wrapper = wrapped(model)
    fit(model, wrapper, data[:5])
    model.save_pretrained(tmp_path)
    torch.save(wrapper.state_dict(), tmp_path / "optimizer.pt")
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    wrapper = wrapped(again)
    wrapper.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    again.train()
    fit(again, wrapper, data[5:])
    pairs = zip(straight.named_parameters(), again.named_parameters(), strict=True)
    assert all(n == k and torch.equal(p, q) for (n, p), (k, q) in pairs)


def test_only_the_active_adapter_moves() -> None:
    model = with_lora()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(param_groups(model, lora="fixed-rank")[0]["params"]) == 12
    model.set_adapter("other")
    groups = param_groups(model, lora="fixed-rank", named=True)
    assert len(groups) == 1
    assert all(".other." in name for name, _ in groups[0]["params"])
    assert len(groups[0]["params"]) == 4
    everything = param_groups(model, lora="fixed-rank", named=True, trainable_only=False)[0]["params"]
    assert [n.rpartition("lora_")[2] for n, _ in everything[:4]] == [
        f"{half}.{adapter}.weight" for adapter in ("default", "other") for half in "AB"
    ]


def test_conv1d_layers_are_linear_layers() -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64, n_positions=32)
    model = with_lora(transformers.GPT2LMHeadModel(config), target_modules=["c_attn"], fan_in_fan_out=True)
    losses = fit(model, wrapped(model), batches(40))
    assert losses[-1] < losses[0]


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.table = nn.Embedding(8, 6)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.table(x))


def half_frozen(name: str) -> Any:
    model = with_lora()
    for n, p in model.named_parameters():
        if name in n:
            p.requires_grad_(False)
    return model


def shared() -> Any:
    model = with_lora()
    layers = [m for m in model.modules() if isinstance(getattr(m, "lora_A", None), nn.ModuleDict)]
    layers[3].lora_A["default"].weight = layers[0].lora_A["default"].weight
    return model


def experts() -> Any:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,eio->beo", x, self.weight)

    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"])
    return peft.get_peft_model(nn.Sequential(Experts()), config)


def adalora() -> Any:
    config = peft.AdaLoraConfig(init_r=4, target_r=2, target_modules=["q_proj"], total_step=10)
    return peft.get_peft_model(tiny_llama(), config)


def on(target: str, **options: Any) -> Any:
    return with_lora(Convolution(), target_modules=[target], r=2, **options)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (lambda: with_lora(use_dora=True), r"q_proj.*'default'.*DoRA.*plain LoRA"),
    "an embedding": (lambda: on("table"), r"table.*embedding"),
    "a convolution": (lambda: on("conv"), r"conv.*Conv2d"),
    "MiCA": (lambda: with_lora(init_lora_weights="mica"), r"MiCA|is frozen"),
    "activated LoRA": (lambda: with_lora(alora_invocation_tokens=[1]), r"ALora"),
    "AdaLoRA": (adalora, r"q_proj.*ParameterDict"),
    "experts": (experts, r"ParamWrapper.*of which B A is not the update"),
    "A frozen": (
        lambda: half_frozen("lora_A"),
        r"lora_A\.default\.weight is frozen.*set requires_grad of both",
    ),
    "B frozen": (
        lambda: half_frozen("lora_B"),
        r"lora_B\.default\.weight is frozen.*set requires_grad of both",
    ),
    "all frozen": (lambda: half_frozen("lora_"), r"no trainable LoRA pair.*adapter that is active"),
    "no LoRA": (tiny_llama, r"no trainable LoRA pair in LlamaForCausalLM.*get_peft_model"),
    "a rank that is too large": (
        lambda: with_lora(Convolution(), target_modules=["linear"], r=6),
        r"linear.*has rank 6, and its update 5 x 6 has at most 5",
    ),
    "a shared factor": (shared, r"lora_A\.default\.weight is shared with another pair"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        param_groups(model, lora="fixed-rank")


def test_what_is_refused_may_be_frozen_beside_plain_lora() -> None:
    model = with_lora(Convolution(), target_modules=["linear", "table"], r=2)
    for n, p in model.named_parameters():
        if "embedding" in n:
            p.requires_grad_(False)
    assert len(param_groups(model, lora="fixed-rank")[0]["params"]) == 2


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora is 'stiefel'; use 'fixed-rank'"):
        param_groups(with_lora(), lora="stiefel")


def group_of(*params: Tensor, **keys: Any) -> list[dict[str, Any]]:
    return [{"params": [nn.Parameter(p) for p in params], "manifold": FixedRankPair(), **keys}]


A, B = torch.ones(2, 5), torch.ones(6, 2)
BAD_GROUPS: dict[str, tuple[list[dict[str, Any]], type[Exception], str]] = {
    "half a pair": (group_of(A), ConfigError, r"lists 1 parameters.*consecutive pairs A, B"),
    "B before A": (group_of(B, A), ShapeError, r"6 x 2.*pairs A, B of shapes.*this order"),
    "ranks that differ": (group_of(A, torch.ones(6, 3)), ShapeError, r"\(2, 5\), \(6, 3\).*in this order"),
    "a rank that is too large": (group_of(torch.ones(5, 4), torch.ones(6, 5)), ShapeError, r"smaller rank"),
    "a square A that is too small": (
        group_of(torch.ones(5, 5), torch.ones(4, 5)),
        ShapeError,
        r"smaller rank",
    ),
    "NaN": (group_of(A, B * math.nan), NotOnManifoldError, r"B holds NaN"),
    "rows": (group_of(A, B, orientation="rows"), ConfigError, r"leave out orientation='rows'"),
    "projected gradients": (
        group_of(A, B, gradient="projected"),
        ConfigError,
        r"only 'factors'.*leave it out",
    ),
    "StelLA's scale": (
        group_of(A, B, displacement_scale="stella", reference_dim=8),
        ConfigError,
        r"FixedRankPair group use a number",
    ),
    "dtypes that differ": (group_of(A, B.double()), ShapeError, r"convert them to one dtype"),
    "coupled decay": (group_of(A, B, weight_decay=0.1), ConfigError, r"weight_decay=0\.1"),
}


@pytest.mark.parametrize("name", BAD_GROUPS)
def test_bad_groups_are_refused(name: str) -> None:
    groups, error, message = BAD_GROUPS[name]
    with pytest.raises(error, match=f"(?s){message}"):
        RiemannianWrapper(SGD(groups, lr=0.1))


def test_bad_arguments_are_refused() -> None:
    m, x = FixedRankPair(), AB(A, B)
    with pytest.raises(ShapeError, match=r"two tensors AB\(A, B\)"):
        m.check(A)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"z must be a dense tensor of shape \(6, 5\)"):
        m.project_dense(x, torch.ones(5, 6))
    with pytest.raises(ShapeError, match=r"float64.*convert"):
        m.project_dense(x, torch.ones(6, 5).double())
    with pytest.raises(ShapeError, match=r"u\.A"):
        m.retract(x, AB(B, A))
    with pytest.raises(ConfigError, match=r"retract"):
        m.exp(x, x)
    with pytest.raises(
        UnknownNameError, match=r"'projecton'; known: 'projection', 'none'.*mean 'projection'"
    ):
        FixedRankPair(transport="projecton")
    with pytest.raises(ConfigError, match=r"two parameters A, B.*lora='fixed-rank'"):
        constrain(nn.Linear(3, 4), "weight", m)


@pytest.mark.parametrize("k", [3, 8, 15])
def test_a_small_step_of_unbalanced_factors_is_small(k: int) -> None:
    """A is scaled up as a whole, and nothing of B is lost on the way."""
    torch.manual_seed(0)
    m = FixedRankPair()
    a, b = (torch.linalg.qr(torch.randn(n, 4))[0] for n in (30, 20))
    x = AB(a.mT.contiguous() * 10.0**-k, b * 10.0**k)
    u = m.random_tangent(x)
    y = m.retract(x, AB(*(1e-6 * t for t in u)))
    before, after = (z.B.double() @ z.A.double() for z in (x, y))
    assert 1e-7 < (after - before).norm() / before.norm() < 1e-6
    assert 99 < y.B.norm() / y.A.norm() < 101
