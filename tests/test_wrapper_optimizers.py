"""Every optimizer of torch.optim inside RiemannianWrapper, in every implementation that this machine has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stiefelopt import ConfigError, RiemannianWrapper, Stiefel

torch.set_num_threads(1)

STEPS = 50
REFUSED = ("LBFGS", "SparseAdam")
# torch's defaults are made for networks; these suit a 16 x 3 problem with a gradient of norm about 1.
LR = {"SGD": 0.1, "ASGD": 0.1, "Adadelta": 5.0, "Adagrad": 0.1, "Muon": 0.05}
IMPLEMENTATIONS = ("default", "foreach", "fused", "capturable")


def torch_optimizers() -> dict[str, type[Optimizer]]:
    """Every public optimizer class of torch.optim."""
    classes = {name: cls for name, cls in vars(torch.optim).items() if inspect.isclass(cls)}
    return {
        n: cls for n, cls in sorted(classes.items()) if issubclass(cls, Optimizer) and cls is not Optimizer
    }


@dataclass(frozen=True)
class Variant:
    """An optimizer class with options; called with groups, it makes the optimizer."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    label: str = field(default="default", compare=False)

    def __call__(self, groups: Any, **more: Any) -> Optimizer:
        options = {"lr": LR.get(self.name, 0.02), **dict(self.options), **more}
        return torch_optimizers()[self.name](groups, **options)

    def __str__(self) -> str:
        return f"{self.name}-{self.label}"


def runs_bare(variant: Variant) -> bool:
    """Whether torch itself can take a step with this implementation here."""
    p = nn.Parameter(torch.ones(4, 2))
    p.grad = torch.ones(4, 2)
    try:
        variant([p]).step()
    except (TypeError, ValueError, RuntimeError, AssertionError):
        return False
    return True


def variants() -> list[Variant]:
    """Class x implementation, and the flags that take other paths through torch's code."""
    found = []
    for name in torch_optimizers():
        for label in IMPLEMENTATIONS:
            options = () if label == "default" else ((label, True),)
            if name not in REFUSED and runs_bare(Variant(name, options, label)):
                found.append(Variant(name, options, label))
    return [
        *found,
        Variant("SGD", (("momentum", 0.9), ("nesterov", True), ("lr", 0.02)), "nesterov"),
        Variant("SGD", (("momentum", 0.9), ("fused", True), ("lr", 0.02)), "momentum-fused"),
        Variant("Adam", (("amsgrad", True),), "amsgrad"),
        Variant("AdamW", (("amsgrad", True), ("fused", True)), "amsgrad-fused"),
        Variant("Adam", (("weight_decay", 0.1), ("decoupled_weight_decay", True)), "decoupled"),
        Variant("NAdam", (("weight_decay", 0.1), ("decoupled_weight_decay", True)), "decoupled"),
        Variant("RMSprop", (("centered", True), ("momentum", 0.9), ("lr", 0.005)), "centered"),
        Variant("Muon", (("nesterov", False), ("adjust_lr_fn", "match_rms_adamw")), "heavy-ball"),
    ]


VARIANTS = variants()
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


class Subspace:
    """max tr x^T a x over St(16, 3), twice (a column and a row point), and a Euclidean least-squares matrix."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        basis = Stiefel().random_point(16, 16, dtype=torch.float64, generator=generator)
        spectrum = torch.cat((torch.tensor([1.0, 0.9, 0.8]), torch.linspace(0.3, 0.01, 13))).double()
        self.a = (basis * spectrum @ basis.mT).to(dtype)
        self.b = torch.randn(5, 4, dtype=dtype, generator=generator)
        self.tall = nn.Parameter(Stiefel().random_point(16, 3, dtype=dtype, generator=generator))
        self.wide = nn.Parameter(
            Stiefel().random_point(16, 3, dtype=dtype, generator=generator).mT.contiguous()
        )
        self.free = nn.Parameter(torch.zeros(5, 4, dtype=dtype))

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.tall, self.wide, self.free]

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.tall, self.wide], "manifold": Stiefel()}, {"params": [self.free]}]

    def manifold_loss(self) -> Tensor:
        return 5.4 - (self.a @ self.tall * self.tall).sum() - (self.wide @ self.a * self.wide).sum()

    def backward(self) -> Tensor:
        """The loss, as a closure returns it, with new gradients."""
        for p in self.params:
            p.grad = None
        loss = self.manifold_loss() + 0.5 * (self.free - self.b).square().sum()
        loss.backward()
        return loss

    @torch.no_grad()
    def set_gradients(self) -> None:
        """The same gradients without autograd: these tests take many thousand steps."""
        self.tall.grad = -2 * (self.a @ self.tall)
        self.wide.grad = -2 * (self.wide @ self.a)
        self.free.grad = self.free - self.b


def values(problem: Subspace) -> list[Tensor]:
    return [p.detach().clone() for p in problem.params]


def assert_same_bits(now: list[Tensor], then: list[Tensor]) -> None:
    for a, b in zip(now, then, strict=True):
        assert torch.equal(a, b)


def run(variant: Variant, dtype: torch.dtype = torch.float32, *, steps: int = STEPS) -> Subspace:
    """Wrap, step, and return the problem where it ends."""
    problem = Subspace(dtype)
    wrapper = RiemannianWrapper(variant(problem.groups()))
    for _ in range(steps):
        problem.set_gradients()
        wrapper.step()
    return problem


def test_the_enumeration_found_what_this_torch_has() -> None:
    assert {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Muon", "Rprop"} <= {v.name for v in VARIANTS}
    assert {v.label for v in VARIANTS} >= {"default", "foreach", "fused"}
    assert set(torch_optimizers()) - {v.name for v in VARIANTS} == set(REFUSED)


@every_variant
def test_points_stay_and_loss_falls(variant: Variant) -> None:
    problem = Subspace()
    wrapper = RiemannianWrapper(variant(problem.groups()))
    start, worst = problem.manifold_loss().item(), 0.0
    for _ in range(STEPS):
        problem.set_gradients()
        wrapper.step()
        worst = max(worst, *wrapper.residuals().values())
    assert worst < 2e-6
    assert problem.manifold_loss().item() < 0.7 * start


@every_variant
def test_a_closure_is_called_once_and_gives_the_same_bits(variant: Variant) -> None:
    with_closure, without, calls = Subspace(), Subspace(), []
    wrapper, wrapper_without = (RiemannianWrapper(variant(p.groups())) for p in (with_closure, without))

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append(with_closure.backward())
        return calls[-1]

    for i in range(5):
        assert wrapper.step(closure) is calls[-1]
        assert len(calls) == i + 1
    for _ in range(5):
        without.backward()
        wrapper_without.step()
    assert_same_bits(values(with_closure), values(without))


@every_variant
def test_the_users_gradient_is_what_it_was(variant: Variant) -> None:
    problem = Subspace()
    wrapper = RiemannianWrapper(variant(problem.groups()))
    for _ in range(3):
        problem.set_gradients()
        objects = [p.grad for p in problem.params]
        bits = [p.grad.clone() for p in problem.params if p.grad is not None]
        wrapper.step()
        assert all(p.grad is g for p, g in zip(problem.params, objects, strict=True))
        assert_same_bits([g for g in objects if g is not None], bits)


@every_variant
def test_without_a_manifold_group_it_is_bitwise_the_bare_optimizer(variant: Variant) -> None:
    ours, bare = Subspace(), Subspace()
    stepping = (ours, RiemannianWrapper(variant(ours.params))), (bare, variant(bare.params))
    for _ in range(STEPS):
        for problem, optimizer in stepping:
            problem.set_gradients()
            optimizer.step()
    assert_same_bits(values(ours), values(bare))


@every_variant
def test_a_euclidean_group_beside_a_manifold_group_is_bitwise_the_bare_one(variant: Variant) -> None:
    ours, bare = run(variant), Subspace()
    optimizer = variant([bare.free])
    for _ in range(STEPS):
        bare.set_gradients()
        optimizer.step()
    assert torch.equal(ours.free, bare.free)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name != "Rprop"], ids=str)
def test_a_zero_learning_rate_moves_no_bit(variant: Variant) -> None:
    problem = Subspace()
    before = values(problem)
    wrapper = RiemannianWrapper(variant(problem.groups(), lr=0.0))
    for _ in range(3):
        problem.set_gradients()
        wrapper.step()
    assert_same_bits(values(problem), before)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.label in IMPLEMENTATIONS[1:]], ids=str)
def test_every_implementation_gives_the_same_points(variant: Variant) -> None:
    reference = run(Variant(variant.name), torch.float64, steps=10)
    other = run(variant, torch.float64, steps=10)
    # ASGD keeps its step sizes in float32, rounded differently by its two implementations.
    tolerance = 1e-7 if variant.name == "ASGD" else 1e-9
    for a, b in zip(values(other), values(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_points_stay_and_loss_falls(variant: Variant, dtype: torch.dtype) -> None:
    """The inner optimizer steps a float32 master; the parameter is its rounding."""
    problem = Subspace(dtype)
    wrapper = RiemannianWrapper(variant(problem.groups()[:1]))
    start = problem.manifold_loss().item()
    for _ in range(STEPS):
        problem.set_gradients()
        wrapper.step()
    eps = torch.finfo(dtype).eps
    assert max(wrapper.residuals().values()) < 2 * eps
    assert problem.manifold_loss().item() < 0.75 * start
    assert problem.tall.dtype == dtype
    moments = [t for t in wrapper.state[problem.tall].values() if isinstance(t, Tensor) and t.ndim > 1]
    assert {t.dtype for t in moments} <= {torch.float32}


@every_variant
def test_a_zero_gradient_without_decay_moves_no_bit(variant: Variant) -> None:
    """Distributed checkpoints create an optimizer's state by such a step."""
    problem = Subspace()
    wrapper = RiemannianWrapper(variant(problem.groups()))
    before = values(problem)
    for group in wrapper.param_groups:
        group.update({key: 0.0 for key in ("weight_decay", "lambd") if key in group})
    for _ in range(2):
        for p in problem.params:
            p.grad = torch.zeros_like(p)
        wrapper.step()
    assert_same_bits(values(problem), before)


@pytest.mark.parametrize("name", sorted({v.name for v in VARIANTS}))
def test_maximize_climbs(name: str) -> None:
    if "maximize" not in inspect.signature(torch_optimizers()[name]).parameters:
        pytest.skip(f"{name} has no maximize")
    problem = Subspace()
    wrapper = RiemannianWrapper(
        Variant(name)([{"params": [problem.tall], "manifold": Stiefel()}], maximize=True)
    )
    start = problem.manifold_loss().item()
    for _ in range(10):
        problem.set_gradients()
        wrapper.step()
    assert problem.manifold_loss().item() > start
    assert max(wrapper.residuals().values()) < 2e-6


@pytest.mark.parametrize("name", sorted({v.name for v in VARIANTS}))
def test_the_moments_are_of_the_riemannian_gradient(name: str) -> None:
    """After one step from a normal gradient g = x s, s symmetric, nothing has moved: that gradient is zero."""
    problem = Subspace(torch.float64)
    before = problem.tall.detach().clone()
    decay = (
        {"weight_decay": 0.0}
        if "weight_decay" in inspect.signature(torch_optimizers()[name]).parameters
        else {}
    )
    wrapper = RiemannianWrapper(Variant(name)([{"params": [problem.tall], "manifold": Stiefel()}], **decay))
    problem.tall.grad = 2.0 * before  # exactly normal: x^T g is a multiple of the identity
    wrapper.step()
    for key, moment in wrapper.state[problem.tall].items():
        if key in ("exp_avg", "momentum_buffer", "sum", "square_avg", "exp_avg_sq"):
            assert moment.abs().max() < 1e-12, key


class MyLBFGS(torch.optim.LBFGS):
    """A subclass is refused as its parent is."""


class MySparseAdam(torch.optim.SparseAdam):
    """A subclass is refused as its parent is."""


def make_with_defaults(cls: type[Optimizer], p: nn.Parameter) -> Optimizer:
    return cls([p])  # type: ignore[call-arg]


@pytest.mark.parametrize("cls", [torch.optim.LBFGS, torch.optim.SparseAdam, MyLBFGS, MySparseAdam])
@pytest.mark.parametrize("wrap", [lambda o: RiemannianWrapper(o, Stiefel()), lambda o: RiemannianWrapper(o)])
def test_lbfgs_and_sparse_adam_are_refused_with_the_way_out(
    cls: type[Optimizer], wrap: Callable[..., Any]
) -> None:
    p = nn.Parameter(Stiefel().random_point(6, 2))
    optimizer = make_with_defaults(cls, p)
    keys = set(optimizer.param_groups[0])
    with pytest.raises(ConfigError, match=r"(LBFGS|SparseAdam).*use (SGD|Adam)"):
        wrap(optimizer)
    assert set(optimizer.param_groups[0]) == keys
