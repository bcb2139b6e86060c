"""RiemannianWrapper and attach as torch optimizers: the contract in every corner, nothing lost, nothing silent."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop, lr_scheduler

from stiefelopt import (
    ConfigError,
    NotOnManifoldError,
    RiemannianWrapper,
    ShapeError,
    StepError,
    Stiefel,
    UnknownNameError,
    attach,
    buckets,
    constrain,
    param_groups,
)

torch.set_num_threads(1)

Wrap = Callable[..., Any]
INNERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda g: SGD(g, lr=0.05, momentum=0.9),
    "AdamW": lambda g: AdamW(g, lr=0.02),
    "AdamW-fused": lambda g: AdamW(g, lr=0.02, fused=True),
    "AdamW-foreach": lambda g: AdamW(g, lr=0.02, foreach=True),
    "RMSprop": lambda g: RMSprop(g, lr=0.01, momentum=0.5),
    "Adagrad": lambda g: Adagrad(g, lr=0.1),
}
every_inner = pytest.mark.parametrize("inner", INNERS.values(), ids=list(INNERS))
RETRACTIONS = ("polar", "qr", "svd", "cayley", "exp", "newton_schulz")


def point(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return Stiefel().random_point(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    """A tall or wide point."""
    x = point(*sorted(shape, reverse=True), seed=seed, dtype=dtype)
    return nn.Parameter(x if shape[0] >= shape[1] else x.mT.contiguous())


class Model:
    """Points of several heights, tall, wide and square, and a Euclidean vector and matrix."""

    SHAPES = ((8, 3), (12, 3), (8, 3), (3, 10), (5, 5), (9, 2))

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.points = [parameter(*shape, seed=i, dtype=dtype) for i, shape in enumerate(self.SHAPES)]
        self.free = [nn.Parameter(torch.ones(4, dtype=dtype)), nn.Parameter(torch.ones(4, 6, dtype=dtype))]

    @property
    def params(self) -> list[nn.Parameter]:
        return [*self.points, *self.free]

    def groups(self, manifold: object = None, **keys: Any) -> list[dict[str, Any]]:
        return [
            {"params": self.points, "manifold": Stiefel() if manifold is None else manifold, **keys},
            {"params": self.free},
        ]

    def named_groups(self) -> list[dict[str, Any]]:
        points, free = self.groups()
        points["params"] = [(f"point.{i}", p) for i, p in enumerate(self.points)]
        free["params"] = [(f"free.{i}", p) for i, p in enumerate(self.free)]
        return [points, free]

    def set_gradients(self, step: int) -> None:
        fill(self.params, step)

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


def fill(params: Sequence[Tensor], step: int) -> None:
    """Gradients that depend on the step and on the parameter's place only."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


def run(model: Model, optimizer: Any, steps: range) -> Model:
    for step in steps:
        model.set_gradients(step)
        optimizer.step()
    return model


def same_bits(now: Sequence[Tensor], then: Sequence[Tensor]) -> bool:
    return len(now) == len(then) and all(map(torch.equal, now, then))


def close(now: Sequence[Tensor], then: Sequence[Tensor], atol: float = 1e-12) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in zip(now, then, strict=True))


def snapshot(model: Model, optimizer: Any) -> Any:
    """Everything that a refused step must leave alone: points, gradients, moments, counters, groups."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    state = [copy.deepcopy(dict(optimizer.state.get(p, {}))) for p in model.params]
    grads = [None if p.grad is None else p.grad.clone() for p in model.params]
    return [model.values(), grads, state, copy.deepcopy(groups)]


def set_scaled_gradients(model: Model, scaler: torch.amp.GradScaler, step: int) -> None:
    """As backward of a scaled loss leaves them."""
    model.set_gradients(step)
    scaler.scale(torch.zeros(()))  # makes the scaler's tensors, as scaling a loss does
    torch._foreach_mul_([p.grad for p in model.params if p.grad is not None], scaler.get_scale())


def moments(model: Model, optimizer: Any) -> list[Tensor]:
    """The optimizer's tensors, parameter by parameter."""
    return [t for p in model.params for t in optimizer.state[p].values() if isinstance(t, Tensor)]


def equal(a: Any, b: Any) -> bool:
    """Deep equality, NaN equal to itself."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a.nan_to_num(nan=1.5e30), b.nan_to_num(nan=1.5e30))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def saved_and_loaded(state: Any) -> Any:
    """Through a file, as a careful user loads it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# What a step is


@pytest.mark.parametrize("metric", ["canonical", "euclidean"])
def test_one_sgd_step_by_hand(metric: str) -> None:
    p = parameter(9, 4)
    x = p.detach().numpy().copy()
    wrapper = RiemannianWrapper(SGD([{"params": [p], "manifold": Stiefel(metric=metric)}], lr=0.3))
    fill([p], 0)
    assert p.grad is not None
    g = p.grad.numpy()
    wrapper.step()
    k = x.T @ g
    d = -0.3 * (g - x @ (k.T if metric == "canonical" else (k + k.T) / 2))
    u, _, vh = np.linalg.svd(x + d - x @ (x.T @ d + d.T @ x) / 2, full_matrices=False)
    np.testing.assert_allclose(p.detach().numpy(), u @ vh, atol=1e-14)


@pytest.mark.parametrize("metric", ["canonical", "euclidean"])
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_the_step_retracts_as_the_manifold_does(metric: str, retraction: str) -> None:
    manifold = Stiefel(metric=metric, retraction=retraction)
    model, reference = Model(), Model()
    run(model, RiemannianWrapper(SGD(model.groups(manifold), lr=0.02)), range(1))
    reference.set_gradients(0)
    for p, q in zip(model.points, reference.points, strict=True):
        assert q.grad is not None
        x, g = (t.mT if t.shape[0] < t.shape[1] else t for t in (q.detach(), q.grad))
        y = manifold.retract(x, -0.02 * manifold.gradient(x, g))
        # torch's matrix_exp chooses its degree by the batch: up to 1e-12 apart.
        torch.testing.assert_close(p.detach(), y.mT if q.shape[0] < q.shape[1] else y, rtol=0, atol=1e-11)


def test_it_is_an_optimizer_whose_groups_are_the_inner_ones() -> None:
    model = Model()
    inner = AdamW(model.groups())
    wrapper = RiemannianWrapper(inner)
    assert isinstance(wrapper, Optimizer)
    assert wrapper.optimizer is inner
    assert wrapper.param_groups is inner.param_groups
    assert wrapper.state is inner.state
    assert wrapper.defaults is inner.defaults
    assert "AdamW" in repr(wrapper)
    assert wrapper.step() is None
    assert not hasattr(wrapper, "_step_supports_amp_scaling")


def test_groups_hold_plain_strings_and_numbers() -> None:
    model = Model()
    wrapper = RiemannianWrapper(AdamW(model.groups(displacement_scale="stella", reference_dim=16)))
    group = wrapper.param_groups[0]
    assert group["manifold"] == Stiefel().spec()
    assert all(isinstance(v, (str, int, float, bool)) for v in group["manifold"].values())
    assert group["displacement_scale"] == "stella"
    assert "manifold" not in wrapper.param_groups[1]


def test_the_default_manifold_is_for_groups_that_name_none() -> None:
    a, b, c = parameter(6, 2), parameter(6, 2), nn.Parameter(torch.ones(6, 2, dtype=torch.float64))
    own = {"params": [b], "manifold": Stiefel(retraction="qr")}
    groups: list[Any] = [{"params": [a]}, own, {"params": [c], "manifold": None}]
    inner = SGD(groups, lr=0.1)
    wrapper = RiemannianWrapper(inner, Stiefel(retraction="cayley"))
    assert [(g.get("manifold") or {}).get("retraction") for g in wrapper.param_groups] == [
        "cayley",
        "qr",
        None,
    ]
    fill([a, b, c], 0)
    wrapper.step()
    assert set(wrapper.residuals()) == {(0, 0), (1, 0)}
    assert c.grad is not None
    assert torch.equal(c, 1 - 0.1 * c.grad)


def test_residuals_speak_names_where_groups_do() -> None:
    model = Model()
    wrapper = RiemannianWrapper(AdamW(model.named_groups()))
    run(model, wrapper, range(3))
    assert list(wrapper.residuals()) == [f"point.{i}" for i in range(6)]
    assert 0 < max(wrapper.residuals().values()) < 1e-14
    unnamed = RiemannianWrapper(AdamW(Model().groups()))
    assert list(unnamed.residuals()) == [(0, i) for i in range(6)]


def test_residuals_see_drift() -> None:
    model = Model()
    wrapper = RiemannianWrapper(AdamW(model.groups()))
    model.points[1].data[0, 0] += 0.1
    residuals = wrapper.residuals()
    assert residuals[0, 1] > 0.01
    assert residuals[0, 0] < 1e-14


# Schedules and groups

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda i: 0.9**i, lambda i: 0.5**i]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum="momentum" in o.defaults),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 4),
}


def run_scheduled(
    wrap: Wrap, make: Callable[[Any], Any], inner: Callable[[Any], Optimizer]
) -> tuple[Any, list[Tensor]]:
    """What the schedule set (lr and momentum of both groups, step by step), and where the model ended."""
    model = Model()
    optimizer = wrap(inner(model.groups()))
    scheduler, history = make(optimizer), []
    for step in range(8):
        run(model, optimizer, range(step, step + 1))
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        history.append(
            [[g[k] for k in ("lr", "momentum", "betas") if k in g] for g in optimizer.param_groups]
        )
    return history, model.values()


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("inner", [INNERS["SGD"], INNERS["AdamW"]], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=list(SCHEDULERS))
def test_every_scheduler_drives_the_wrapper_as_it_drives_torch(
    make: Callable[[Any], Any], inner: Callable[[Any], Optimizer]
) -> None:
    history, end = run_scheduled(RiemannianWrapper, make, inner)
    bare_history, _ = run_scheduled(lambda o: o, make, inner)
    assert history == bare_history
    assert len({str(h) for h in history}) > 1
    # Scheduling the inner optimizer instead is the same thing.
    on_inner, _ = Model(), None
    optimizer = inner(on_inner.groups())
    wrapper, scheduler = RiemannianWrapper(optimizer), make(optimizer)
    for step in range(8):
        run(on_inner, wrapper, range(step, step + 1))
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    assert same_bits(end, on_inner.values())


def test_a_learning_rate_set_by_hand_is_read_at_the_next_step() -> None:
    model = Model()
    wrapper = RiemannianWrapper(SGD(model.groups(), lr=0.1))
    run(model, wrapper, range(2))
    before = model.values()
    wrapper.param_groups[0]["lr"] = 0.0
    run(model, wrapper, range(2, 3))
    assert same_bits(model.values()[:6], before[:6])
    assert not same_bits(model.values()[6:], before[6:])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model = Model()
    wrapper = RiemannianWrapper(SGD(model.groups(), lr=0.1))
    run(model, wrapper, range(1))
    wrapper.zero_grad(set_to_none=set_to_none)
    for p in model.params:
        assert p.grad is None if set_to_none else p.grad is not None and not p.grad.any()


@every_inner
def test_a_group_added_after_steps_is_as_one_from_the_start(inner: Callable[[Any], Optimizer]) -> None:
    late, alone = parameter(7, 3, seed=20), parameter(7, 3, seed=20)
    model = Model()
    wrapper = RiemannianWrapper(inner(model.groups()))
    run(model, wrapper, range(3))
    wrapper.add_param_group({"params": late, "manifold": Stiefel(), "lr": 0.03})
    other = RiemannianWrapper(inner([{"params": [alone], "manifold": Stiefel(), "lr": 0.03}]))
    for step in range(4):
        model.set_gradients(step)
        fill([late, alone], step)
        alone.grad = late.grad
        wrapper.step()
        other.step()
    assert wrapper.param_groups[-1]["manifold"] == Stiefel().spec()
    torch.testing.assert_close(late, alone, rtol=0, atol=1e-12)
    assert (2, 0) in wrapper.residuals()


def test_a_named_group_can_be_added() -> None:
    model = Model()
    wrapper = RiemannianWrapper(AdamW(model.named_groups()))
    late = parameter(7, 3)
    wrapper.add_param_group({"params": [("late", late)], "manifold": Stiefel()})
    assert wrapper.residuals()["late"] < 1e-14


def test_an_added_group_takes_the_default_manifold() -> None:
    wrapper = RiemannianWrapper(SGD([parameter(4, 2)], lr=0.1), Stiefel(retraction="qr"))
    wrapper.add_param_group({"params": iter([parameter(6, 2), parameter(5, 2)])})
    assert wrapper.param_groups[1]["manifold"]["retraction"] == "qr"
    assert len(wrapper.param_groups[1]["params"]) == 2


def test_a_group_added_to_the_inner_optimizer_is_checked_at_the_next_step() -> None:
    model = Model()
    wrapper = RiemannianWrapper(SGD(model.groups(), lr=0.1))
    late = nn.Parameter(torch.ones(4, 2, dtype=torch.float64))
    wrapper.optimizer.add_param_group({"params": [late], "manifold": Stiefel()})
    late.grad = torch.ones_like(late)
    with pytest.raises(NotOnManifoldError, match="parameter 0 of group 2"):
        wrapper.step()


def test_a_set_of_parameters_is_refused_as_torch_does() -> None:
    wrapper = RiemannianWrapper(SGD([parameter(4, 2)], lr=0.1), Stiefel())
    with pytest.raises(TypeError):
        wrapper.add_param_group({"params": {parameter(6, 2), parameter(5, 2)}})
    assert len(wrapper.param_groups) == 1


# Saving, loading, copying


@every_inner
@pytest.mark.usefixtures("no_warnings")
def test_resuming_is_bitwise_the_uninterrupted_run(inner: Callable[[Any], Optimizer]) -> None:
    whole, first, second = Model(torch.float32), Model(torch.float32), Model(torch.float32)
    run(whole, RiemannianWrapper(inner(whole.groups())), range(12))
    stopped = RiemannianWrapper(inner(first.groups()))
    run(first, stopped, range(7))
    checkpoint = saved_and_loaded({"optimizer": stopped.state_dict(), "params": first.values()})
    for p, saved in zip(second.params, checkpoint["params"], strict=True):
        p.data.copy_(saved)
    resumed = RiemannianWrapper(inner(second.groups()))
    resumed.load_state_dict(state_dict=checkpoint["optimizer"])
    run(second, resumed, range(7, 12))
    assert same_bits(second.values(), whole.values())


def test_loading_into_a_wrapper_that_has_stepped_is_bitwise_too() -> None:
    model = Model(torch.float32)
    wrapper = RiemannianWrapper(AdamW(model.groups()))
    run(model, wrapper, range(3))
    state, values = copy.deepcopy(wrapper.state_dict()), model.values()
    end = run(model, wrapper, range(3, 6)).values()
    for p, saved in zip(model.params, values, strict=True):
        p.data.copy_(saved)
    wrapper.load_state_dict(state)
    assert same_bits(run(model, wrapper, range(3, 6)).values(), end)


def test_the_state_dict_is_the_inner_optimizers() -> None:
    model = Model()
    wrapper = RiemannianWrapper(AdamW(model.groups()))
    run(model, wrapper, range(2))
    assert equal(wrapper.state_dict(), wrapper.optimizer.state_dict())


def test_a_live_retraction_wins_over_the_saved_one_with_a_warning() -> None:
    saved = RiemannianWrapper(SGD(Model().groups(Stiefel(retraction="qr")), lr=0.5)).state_dict()
    wrapper = RiemannianWrapper(SGD(Model().groups(Stiefel(retraction="cayley")), lr=0.1))
    with pytest.warns(UserWarning, match=r"group 0 .*qr.*cayley"):
        wrapper.load_state_dict(saved)
    assert wrapper.param_groups[0]["manifold"]["retraction"] == "cayley"
    assert wrapper.param_groups[0]["lr"] == 0.5


def test_a_bare_optimizers_state_loads_and_the_manifold_stays() -> None:
    model = Model()
    bare = AdamW([{"params": model.points}, {"params": model.free}], lr=0.5)
    run(model, bare, range(2))
    live = Model()
    wrapper = RiemannianWrapper(AdamW(live.groups(), lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper.load_state_dict(bare.state_dict())
    assert wrapper.param_groups[0]["manifold"] == Stiefel().spec()
    run(live, wrapper, range(2, 4))
    assert max(wrapper.residuals().values()) < 1e-14


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = Model()
    wrapper = RiemannianWrapper(AdamW(model.groups()))
    run(model, wrapper, range(2))
    before = snapshot(model, wrapper)
    other = RiemannianWrapper(AdamW([parameter(4, 2)]), Stiefel())
    with pytest.raises(ValueError, match="group"):
        wrapper.load_state_dict(other.state_dict())
    assert equal(snapshot(model, wrapper), before)


def shorten(x: Tensor, u: Tensor) -> Tensor:
    """A plain function: QR of x + u, signs fixed."""
    q, r = torch.linalg.qr(x + u)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def test_a_plain_function_retracts_but_cannot_be_saved() -> None:
    ours, reference = Model(), Model()
    wrapper = RiemannianWrapper(AdamW(ours.groups(Stiefel(retraction=shorten))))
    run(ours, wrapper, range(5))
    run(reference, RiemannianWrapper(AdamW(reference.groups(Stiefel(retraction="qr")))), range(5))
    assert close(ours.values(), reference.values(), 1e-9)
    with pytest.raises(ConfigError, match=r"retraction.*register"):
        wrapper.state_dict()
    run(ours, wrapper, range(5, 6))
    assert max(wrapper.residuals().values()) < 1e-14


def clone_by_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("clone", [copy.deepcopy, clone_by_pickle], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["plain", "after a scheduler patched step"])
def test_a_copy_of_model_and_wrapper_goes_on_alike(clone: Callable[[Any], Any], scheduled: bool) -> None:
    model = Model()
    wrapper = RiemannianWrapper(AdamW(model.groups()), nonfinite="skip")
    if scheduled:
        lr_scheduler.StepLR(wrapper, 1)
    run(model, wrapper, range(3))
    twin, copied = clone((model, wrapper))
    assert isinstance(copied, RiemannianWrapper)
    assert copied.param_groups[0]["params"][0] is twin.points[0]
    before = model.values()
    run(twin, copied, range(3, 6))
    assert same_bits(model.values(), before)
    run(model, wrapper, range(3, 6))
    assert same_bits(twin.values(), model.values())
    twin.points[0].grad = torch.full_like(twin.points[0], math.nan)
    copied.step()  # nonfinite="skip" was copied too


def test_pickle_leaves_hooks_out_as_torch_does() -> None:
    model = Model()
    wrapper = RiemannianWrapper(SGD(model.groups(), lr=0.1))
    wrapper.register_step_post_hook(lambda *_: None)
    wrapper.optimizer.register_step_post_hook(lambda *_: None)
    _, copied = clone_by_pickle((model, wrapper))
    assert copied.param_groups[0]["lr"] == 0.1


# Hooks


def test_step_hooks_see_the_users_gradient_and_the_finished_point() -> None:
    model, seen = Model(), []
    wrapper = RiemannianWrapper(SGD(model.groups(), lr=0.1))
    model.set_gradients(0)
    own = model.points[0].grad

    def look(name: str) -> Callable[..., None]:
        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            seen.append((name, model.points[0].grad is own, wrapper.residuals()[0, 0] < 1e-14))

        return hook

    handles = [
        wrapper.register_step_pre_hook(look("pre")),
        wrapper.register_step_post_hook(look("post")),
        wrapper.optimizer.register_step_pre_hook(look("inner pre")),
    ]
    wrapper.step()
    assert seen == [("pre", True, True), ("inner pre", False, True), ("post", True, True)]
    for handle in handles:
        handle.remove()
    wrapper.step()
    assert len(seen) == 3


def test_a_step_hook_may_change_the_gradient() -> None:
    ours, reference = Model(), Model()
    wrapper, plain = (RiemannianWrapper(SGD(m.groups(), lr=0.1)) for m in (ours, reference))

    def double(*_: Any) -> None:
        torch._foreach_mul_([p.grad for p in ours.params if p.grad is not None], 2.0)

    wrapper.register_step_pre_hook(double)
    ours.set_gradients(0)
    reference.set_gradients(0)
    for p in reference.params:
        assert p.grad is not None
        p.grad *= 2
    wrapper.step()
    plain.step()
    assert same_bits(ours.values(), reference.values())


def test_state_dict_hooks_run_in_torchs_order() -> None:
    calls: list[str] = []
    wrapper = RiemannianWrapper(SGD(Model().groups(), lr=0.1))
    wrapper.register_state_dict_pre_hook(lambda o: calls.append("pre"))
    wrapper.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
    wrapper.register_load_state_dict_pre_hook(lambda o, s: {k: v for k, v in s.items() if k != "extra"})
    wrapper.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    state = wrapper.state_dict()
    assert state["extra"] == 1
    wrapper.load_state_dict(state)
    assert calls == ["pre", "loaded"]


def test_a_closure_may_call_backward_where_the_caller_has_switched_gradients_off() -> None:
    ours, reference = parameter(8, 3), parameter(8, 3)
    a = torch.randn(8, 3, dtype=torch.float64)
    wrappers = [RiemannianWrapper(SGD([p], lr=0.1), Stiefel()) for p in (ours, reference)]

    def closure() -> float:
        wrappers[0].zero_grad()
        loss = (ours * a).sum()
        loss.backward()
        return loss.item()

    with torch.no_grad():
        assert wrappers[0].step(closure) == pytest.approx((reference * a).sum().item())
    (reference * a).sum().backward()
    wrappers[1].step()
    assert torch.equal(ours, reference)


# Gradient scaling, accumulation, clipping


@pytest.mark.parametrize(
    "inner", [INNERS["SGD"], INNERS["AdamW"], INNERS["AdamW-fused"]], ids=["SGD", "AdamW", "fused"]
)
def test_grad_scaler_gives_the_same_bits_and_skips_safely(inner: Callable[[Any], Optimizer]) -> None:
    scaled, plain = Model(torch.float32), Model(torch.float32)
    wrapper, reference = (RiemannianWrapper(inner(m.groups())) for m in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(4):
        run(plain, reference, range(step, step + 1))
        set_scaled_gradients(scaled, scaler, step)
        scaler.step(wrapper)
        scaler.update()
    assert same_bits(scaled.values(), plain.values())
    scaled.points[2].grad = torch.full_like(scaled.points[2], math.inf)
    before = snapshot(scaled, wrapper)
    scaler.step(wrapper)
    scaler.update()
    after = snapshot(scaled, wrapper)
    assert equal([after[0], after[2], after[3]], [before[0], before[2], before[3]])
    assert scaler.get_scale() == 512.0


def test_accumulated_gradients_are_their_sum() -> None:
    ours, reference = parameter(8, 3), parameter(8, 3)
    a, b = (torch.randn(8, 3, dtype=torch.float64) for _ in range(2))
    wrappers = [RiemannianWrapper(AdamW([p]), Stiefel()) for p in (ours, reference)]
    (ours * a).sum().backward()
    (ours * b).sum().backward()
    (reference * (a + b)).sum().backward()
    for wrapper in wrappers:
        wrapper.step()
    assert torch.equal(ours, reference)


def test_accumulation_over_a_step_keeps_the_ambient_gradient() -> None:
    """Without zero_grad the next backward adds to the user's gradient, not to a Riemannian one."""
    p = parameter(8, 3)
    a = torch.randn(8, 3, dtype=torch.float64)
    wrapper = RiemannianWrapper(SGD([p], lr=0.1), Stiefel())
    for _ in range(3):
        (p * a).sum().backward()
        wrapper.step()
    assert p.grad is not None
    torch.testing.assert_close(p.grad, 3 * a, rtol=0, atol=1e-15)


def test_clip_grad_norm_clips_what_the_user_sees() -> None:
    ours, reference = Model(), Model()
    wrappers = [RiemannianWrapper(SGD(m.groups(), lr=0.1)) for m in (ours, reference)]
    ours.set_gradients(0)
    reference.set_gradients(0)
    norm = torch.nn.utils.clip_grad_norm_(ours.params, 0.5)
    for p in reference.params:
        assert p.grad is not None
        p.grad *= 0.5 / (norm + 1e-6)
    for wrapper in wrappers:
        wrapper.step()
    assert close(ours.values(), reference.values(), 1e-15)


# How a parameter lies


@every_inner
def test_a_wide_parameter_moves_as_its_transpose(inner: Callable[[Any], Optimizer]) -> None:
    tall = parameter(9, 3)
    wide = nn.Parameter(tall.detach().mT.contiguous())
    wrappers = [RiemannianWrapper(inner([{"params": [p], "manifold": Stiefel()}])) for p in (tall, wide)]
    assert [w.param_groups[0]["orientation"] for w in wrappers] == ["columns", "rows"]
    for step in range(10):
        fill([tall], step)
        assert tall.grad is not None
        wide.grad = tall.grad.mT.contiguous()
        for wrapper in wrappers:
            wrapper.step()
    torch.testing.assert_close(wide.mT, tall, rtol=0, atol=1e-10)


@pytest.mark.parametrize("orientation", ["columns", "rows"])
def test_a_square_parameter_obeys_the_stated_orientation(orientation: str) -> None:
    p = parameter(5, 5)
    x = p.detach().clone() if orientation == "columns" else p.detach().mT.clone()
    wrapper = RiemannianWrapper(
        SGD([{"params": [p], "manifold": Stiefel(), "orientation": orientation}], lr=0.05)
    )
    fill([p], 0)
    assert p.grad is not None
    g = p.grad.clone() if orientation == "columns" else p.grad.mT.clone()
    wrapper.step()
    y = Stiefel().retract(x, -0.05 * Stiefel().gradient(x, g))
    torch.testing.assert_close(p.detach(), y if orientation == "columns" else y.mT, rtol=0, atol=1e-13)


def conv_kernel(seed: int = 0, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Parameter:
    """(8, 3, 2, 2): 8 rows of 12, orthonormal rows."""
    return nn.Parameter(
        point(12, 8, seed=seed).mT.reshape(8, 3, 2, 2).contiguous(memory_format=memory_format)
    )


def test_view_matrix_is_first_dimension_against_the_rest() -> None:
    kernel = conv_kernel()
    flat = nn.Parameter(kernel.detach().reshape(8, 12).clone())
    wrappers = [
        RiemannianWrapper(AdamW([{"params": [kernel], "manifold": Stiefel(), "view": "matrix"}])),
        RiemannianWrapper(AdamW([{"params": [flat], "manifold": Stiefel()}])),
    ]
    for step in range(5):
        fill([flat], step)
        assert flat.grad is not None
        kernel.grad = flat.grad.reshape(8, 3, 2, 2)
        for wrapper in wrappers:
            wrapper.step()
    assert torch.equal(kernel.reshape(8, 12), flat)
    assert max(wrappers[0].residuals().values()) < 1e-14


@pytest.mark.parametrize("batch", [(4,), (2, 3), (1, 1, 2)])
def test_view_batch_steps_every_matrix(batch: tuple[int, ...]) -> None:
    stacked = nn.Parameter(point(*batch, 6, 2))
    loose = [nn.Parameter(x.clone()) for x in stacked.detach().reshape(-1, 6, 2)]
    wrapper = RiemannianWrapper(SGD([{"params": [stacked], "manifold": Stiefel(), "view": "batch"}], lr=0.1))
    each = RiemannianWrapper(SGD([{"params": loose, "manifold": Stiefel()}], lr=0.1))
    for step in range(5):
        fill([stacked], step)
        assert stacked.grad is not None
        for p, g in zip(loose, stacked.grad.reshape(-1, 6, 2), strict=True):
            p.grad = g
        wrapper.step()
        each.step()
    assert close(list(stacked.detach().reshape(-1, 6, 2)), [p.detach() for p in loose], 1e-14)


def test_an_empty_batch_moves_nothing() -> None:
    p = nn.Parameter(torch.empty(0, 4, 2))
    wrapper = RiemannianWrapper(SGD([{"params": [p], "manifold": Stiefel(), "view": "batch"}], lr=0.1))
    p.grad = torch.empty(0, 4, 2)
    wrapper.step()
    assert p.shape == (0, 4, 2)
    assert all(r == 0 for r in wrapper.residuals().values())


@every_inner
def test_channels_last_kernels_move_as_contiguous_ones(inner: Callable[[Any], Optimizer]) -> None:
    kernels = [conv_kernel(), conv_kernel(memory_format=torch.channels_last)]
    wrappers = [
        RiemannianWrapper(inner([{"params": [p], "manifold": Stiefel(), "view": "matrix"}])) for p in kernels
    ]
    for step in range(5):
        fill([kernels[0]], step)
        assert kernels[0].grad is not None
        kernels[1].grad = kernels[0].grad.contiguous(memory_format=torch.channels_last)
        for wrapper in wrappers:
            wrapper.step()
    torch.testing.assert_close(kernels[1].detach(), kernels[0].detach(), rtol=0, atol=1e-12)
    assert kernels[1].is_contiguous(memory_format=torch.channels_last)


def test_moments_of_channels_last_kernels_are_carried_as_those_of_contiguous_ones() -> None:
    kernels = [conv_kernel(), conv_kernel(memory_format=torch.channels_last)]
    groups = [{"params": [p], "manifold": Stiefel(transport="projection"), "view": "matrix"} for p in kernels]
    optimizers = [RiemannianWrapper(AdamW([group], lr=0.02)) for group in groups]
    for step in range(3):
        fill([kernels[0]], step)
        kernels[1].grad = kernels[0].grad
        for optimizer in optimizers:
            optimizer.step()
    plain, last = (o.state[p]["exp_avg"] for o, p in zip(optimizers, kernels, strict=True))
    torch.testing.assert_close(kernels[1], kernels[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(last, plain, rtol=0, atol=1e-12)
    assert last.is_contiguous(memory_format=torch.channels_last)


def strided(x: Tensor, how: str) -> Tensor:
    """The same numbers in another memory layout."""
    if how == "columns first":
        return x.mT.contiguous().mT
    if how == "every other row":
        wide = torch.zeros(2 * x.shape[0], x.shape[1], dtype=x.dtype)
        wide[::2] = x
        return wide[::2]
    return x.contiguous()


@every_inner
@pytest.mark.parametrize("layout", ["columns first", "every other row"])
@pytest.mark.parametrize("gradient_layout", ["rows first", "columns first"])
def test_memory_layout_does_not_matter(
    inner: Callable[[Any], Optimizer], layout: str, gradient_layout: str
) -> None:
    if inner is INNERS["AdamW-fused"] and layout == "every other row":
        pytest.skip("torch's own fused kernel walks over the gaps, bare too")
    plain = [parameter(8, 3, seed=1), parameter(8, 3, seed=2)]
    odd = [nn.Parameter(strided(p.detach(), layout)) for p in plain]
    strides = [p.stride() for p in odd]
    wrappers = [RiemannianWrapper(inner([{"params": ps, "manifold": Stiefel()}])) for ps in (plain, odd)]
    for step in range(4):
        fill(plain, step)
        for p, q in zip(plain, odd, strict=True):
            assert p.grad is not None
            q.grad = strided(p.grad, gradient_layout)
        for wrapper in wrappers:
            wrapper.step()
    assert close([p.detach() for p in odd], [p.detach() for p in plain])
    assert [p.stride() for p in odd] == strides


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_displacement_scale_multiplies_the_displacement(scale: float) -> None:
    ours, reference = Model(), Model()
    run(ours, RiemannianWrapper(SGD(ours.groups(displacement_scale=scale), lr=0.02)), range(3))
    run(reference, RiemannianWrapper(SGD(reference.groups(lr=0.02 * scale), lr=0.02)), range(3))
    assert close(ours.values(), reference.values(), 1e-14)


def test_stellas_scale_is_by_the_long_side() -> None:
    ours, reference = Model(), Model()
    run(
        ours,
        RiemannianWrapper(SGD(ours.groups(displacement_scale="stella", reference_dim=7), lr=0.02)),
        range(3),
    )
    loose: list[Any] = [
        {"params": [p], "manifold": Stiefel(), "lr": 0.02 * math.sqrt(7 / max(p.shape))}
        for p in reference.points
    ]
    run(reference, RiemannianWrapper(SGD([*loose, {"params": reference.free}], lr=0.02)), range(3))
    assert close(ours.values(), reference.values(), 1e-14)


# Stacking


@every_inner
def test_stacked_heights_move_as_each_alone(inner: Callable[[Any], Optimizer]) -> None:
    together, alone = Model(), Model()
    run(together, RiemannianWrapper(inner(together.groups())), range(6))
    wrappers = [RiemannianWrapper(inner([{"params": [p], "manifold": Stiefel()}])) for p in alone.points]
    for step in range(6):
        alone.set_gradients(step)
        for wrapper in wrappers:
            wrapper.step()
    assert close(together.values()[:6], alone.values()[:6])


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("size", [1, 500, 2**40])
def test_many_small_buckets_are_one_large_one(
    size: int, retraction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for limit in (size, 2**20):
        monkeypatch.setattr(buckets, "CPU_BUCKET_BYTES", limit)
        model = Model()
        run(model, RiemannianWrapper(AdamW(model.groups(Stiefel(retraction=retraction)))), range(4))
        ends.append(model.values())
    assert close(ends[0], ends[1], 1e-11)


def test_a_bad_gradient_in_a_late_bucket_leaves_the_early_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "CPU_BUCKET_BYTES", 1)
    refuse_non_finite(Model(), lambda o: RiemannianWrapper(o), INNERS["AdamW"], math.nan, which=5)


@every_inner
def test_a_zero_gradient_without_decay_moves_no_bit(inner: Callable[[Any], Optimizer]) -> None:
    for retraction in RETRACTIONS:
        model = Model(torch.float32)
        wrapper = RiemannianWrapper(inner(model.groups(Stiefel(retraction=retraction))))
        for group in wrapper.param_groups:
            group["weight_decay"] = 0.0
        before = model.values()
        for p in model.params:
            p.grad = torch.zeros_like(p)
        wrapper.step()
        wrapper.step()
        assert same_bits(model.values(), before)


def test_one_zero_gradient_among_others_moves_no_bit() -> None:
    model = Model(torch.float32)
    wrapper = RiemannianWrapper(SGD(model.groups(), lr=0.1))
    before = model.values()
    model.set_gradients(0)
    model.points[2].grad = torch.zeros_like(model.points[2])
    wrapper.step()
    assert torch.equal(model.points[2], before[2])
    assert not torch.equal(model.points[0], before[0])


# Parameters that come, go and change


@every_inner
def test_gradients_that_come_and_go_are_as_each_parameter_alone(inner: Callable[[Any], Optimizer]) -> None:
    together, alone = Model(), Model()
    wrapper = RiemannianWrapper(inner(together.groups()))
    wrappers = [RiemannianWrapper(inner([{"params": [p], "manifold": Stiefel()}])) for p in alone.points]
    coin = random.Random(0)
    for step in range(12):
        together.set_gradients(step)
        alone.set_gradients(step)
        for p, q in zip(together.points, alone.points, strict=True):
            if coin.random() < 0.5:
                p.grad = q.grad = None
        before = together.values()
        wrapper.step()
        for single in wrappers:
            single.step()
        for p, old in zip(together.points, before, strict=False):
            assert p.grad is not None or torch.equal(p, old)
    assert close(together.values()[:6], alone.values()[:6])


def test_without_any_gradient_nothing_happens() -> None:
    model = Model()
    wrapper = RiemannianWrapper(AdamW(model.groups()))
    before = model.values()
    wrapper.step()
    assert same_bits(model.values(), before)
    assert not wrapper.state


def test_frozen_parameters_stay() -> None:
    model = Model()
    wrapper = RiemannianWrapper(AdamW(model.groups()))
    run(model, wrapper, range(2))
    model.points[1].requires_grad_(False)
    model.points[1].grad = None
    before = model.points[1].detach().clone()
    for _ in range(2):
        for p in model.params:
            p.grad = None if p is model.points[1] else torch.ones_like(p)
        wrapper.step()
    assert torch.equal(model.points[1], before)
    assert not torch.equal(model.points[0], before)


@pytest.mark.parametrize("wrap", [RiemannianWrapper, attach], ids=["wrapper", "attach"])
def test_a_frozen_parameter_that_moves_to_another_group_is_stepped_as_there(wrap: Wrap) -> None:
    model = Model()
    inner = SGD(model.groups(), lr=0.1)
    wrapper = wrap(inner)
    stepping = wrapper if wrap is RiemannianWrapper else inner
    model.set_gradients(0)
    model.points[2].grad = None
    stepping.step()
    moved = inner.param_groups[0]["params"].pop(2)
    inner.param_groups[1]["params"].append(moved)
    moved.grad, before = torch.ones_like(moved), moved.detach().clone()
    stepping.step()
    assert torch.equal(moved, before - 0.1)


def test_a_parameter_shared_between_modules_is_stepped_once() -> None:
    first, second = nn.Linear(3, 8, bias=False).double(), nn.Linear(3, 8, bias=False).double()
    constrain(first, "weight", Stiefel())
    second.weight = first.weight
    alone = nn.Parameter(first.weight.detach().clone())
    wrapper = RiemannianWrapper(SGD(param_groups(nn.ModuleList([first, second])), lr=0.1))
    reference = RiemannianWrapper(SGD([alone], lr=0.1), Stiefel())
    fill([alone], 0)
    first.weight.grad = alone.grad
    wrapper.step()
    reference.step()
    assert torch.equal(second.weight, alone)


def test_replaced_parameters_are_seen() -> None:
    model = Model()
    wrapper = RiemannianWrapper(SGD(model.groups(), lr=0.1))
    run(model, wrapper, range(2))
    old, new = model.points[0], parameter(8, 3, seed=30)
    kept = old.detach().clone()
    wrapper.param_groups[0]["params"][0] = model.points[0] = new
    run(model, wrapper, range(2, 4))
    assert torch.equal(old, kept)
    assert not torch.equal(new, parameter(8, 3, seed=30))
    assert max(wrapper.residuals().values()) < 1e-14


def test_a_replaced_parameter_off_the_manifold_is_refused() -> None:
    model = Model()
    wrapper = RiemannianWrapper(SGD(model.groups(), lr=0.1))
    run(model, wrapper, range(2))
    wrapper.param_groups[0]["params"][0] = model.points[0] = nn.Parameter(
        torch.ones(8, 3, dtype=torch.float64)
    )
    model.set_gradients(2)
    before = snapshot(model, wrapper)
    with pytest.raises(NotOnManifoldError, match="parameter 0 of group 0"):
        wrapper.step()
    assert equal(snapshot(model, wrapper), before)


def test_groups_replaced_as_accelerate_does_are_seen() -> None:
    model, reference = Model(), Model()
    wrapper = RiemannianWrapper(SGD(model.groups(), lr=0.1))
    run(model, wrapper, range(2))
    for group in wrapper.param_groups:
        group["params"] = list(group["params"])
    wrapper.param_groups = [dict(group) for group in wrapper.param_groups]
    run(model, wrapper, range(2, 4))
    run(reference, RiemannianWrapper(SGD(reference.groups(), lr=0.1)), range(4))
    assert wrapper.param_groups is wrapper.optimizer.param_groups
    assert same_bits(model.values(), reference.values())


def test_data_exchanged_under_a_parameter_is_seen() -> None:
    model = Model()
    wrapper = RiemannianWrapper(SGD(model.groups(), lr=0.1))
    run(model, wrapper, range(1))
    model.points[0].data = point(8, 3, seed=40)
    expected = [nn.Parameter(point(8, 3, seed=40))]
    reference = RiemannianWrapper(SGD(expected, lr=0.1), Stiefel())
    model.set_gradients(1)
    expected[0].grad = model.points[0].grad
    wrapper.step()
    reference.step()
    assert close([model.points[0].detach()], [expected[0].detach()])


def test_a_model_turned_to_another_dtype_is_checked_again() -> None:
    """A float32 point is no float64 one: refused with the way out, which works."""
    module = nn.Linear(3, 8, bias=False)
    constrain(module, "weight", Stiefel())
    wrapper = RiemannianWrapper(SGD(param_groups(module), lr=0.1))
    fill([module.weight], 0)
    wrapper.step()
    module.double()
    fill([module.weight], 1)
    assert module.weight.grad is not None
    own, bits, before = module.weight.grad, module.weight.grad.clone(), module.weight.detach().clone()
    with pytest.raises(NotOnManifoldError, match=r"float64.*constrain"):
        wrapper.step()
    assert module.weight.grad is own
    assert same_bits([own, module.weight.detach()], [bits, before])
    constrain(module, "weight", Stiefel())
    for step in range(2, 5):
        fill([module.weight], step)
        wrapper.step()
    assert module.weight.dtype == torch.float64
    assert max(wrapper.residuals().values()) < 1e-14


def test_a_model_turned_to_half_precision_goes_on_there() -> None:
    """Never a step of bfloat16 points through stale float32 workspaces."""
    module = nn.Linear(3, 8, bias=False)
    constrain(module, "weight", Stiefel())
    wrapper = RiemannianWrapper(SGD(param_groups(module), lr=0.1))
    fill([module.weight], 0)
    wrapper.step()
    module.bfloat16()
    fill([module.weight], 1)
    own = module.weight.grad
    wrapper.step()
    assert module.weight.grad is own
    assert module.weight.dtype == torch.bfloat16
    assert max(wrapper.residuals().values()) < 2**-6


def test_a_frozen_point_may_be_offloaded_and_back_but_not_from_the_start() -> None:
    points = [parameter(8, 3, seed=i) for i in range(2)]
    wrapper = RiemannianWrapper(SGD(points, lr=0.1), Stiefel())
    fill(points, 0)
    wrapper.step()
    values, before = points[1].data, points[1].detach().clone()
    points[1].grad = None
    points[1].data = torch.empty(0, dtype=torch.float64)
    wrapper.step()
    with pytest.raises(ShapeError, match=r"shape \(0,\)"):
        RiemannianWrapper(SGD(points, lr=0.1), Stiefel())
    points[1].data = values
    assert torch.equal(points[1], before)
    fill(points, 1)
    wrapper.step()
    assert not torch.equal(points[1], before)
    assert max(wrapper.residuals().values()) < 1e-14


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("dtype", "master"), [(torch.float64, []), (torch.bfloat16, ["master"])], ids=str)
def test_one_of_two_stacked_points_changes_its_dtype(
    which: int, dtype: torch.dtype, master: list[str]
) -> None:
    """It is computed in its own, and has a master where it needs one."""
    points = [parameter(8, 3, seed=i, dtype=torch.float32) for i in range(2)]
    wrapper = RiemannianWrapper(SGD(points, lr=0.1), Stiefel())
    fill(points, 0)
    wrapper.step()
    points[which].grad = None
    points[which].data = point(8, 3, seed=which).to(dtype)
    fill(points, 1)
    wrapper.step()
    assert list(wrapper.state[points[which]]) == master
    if dtype == torch.float64:
        assert wrapper.residuals()[0, which] < 1e-14


def test_a_point_whose_shape_changes_is_gathered_anew() -> None:
    p = parameter(8, 3)
    wrapper = RiemannianWrapper(SGD([p], lr=0.1), Stiefel())
    for rows in (8, 11):
        p.grad = None
        p.data = point(rows, 3)
        fill([p], 0)
        wrapper.step()
        assert max(wrapper.residuals().values()) < 1e-14


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("shape", [(11, 3), (6, 4), (5, 2)])
@pytest.mark.usefixtures("no_warnings")
def test_one_of_two_stacked_points_changes_its_shape(which: int, shape: tuple[int, int]) -> None:
    points = [parameter(8, 3, seed=1), parameter(8, 3, seed=2)]
    wrapper = RiemannianWrapper(SGD(points, lr=0.1), Stiefel())
    for _ in range(2):
        fill(points, 0)
        wrapper.step()
    points[which].grad = None
    points[which].data = parameter(*shape).data
    alone = [nn.Parameter(p.detach().clone()) for p in points]
    fill(points, 1)
    wrapper.step()
    for p, q in zip(alone, points, strict=True):
        p.grad = q.grad
        RiemannianWrapper(SGD([p], lr=0.1), Stiefel()).step()
    assert close([p.detach() for p in points], [p.detach() for p in alone])


@pytest.mark.parametrize(
    "new", [Stiefel(retraction="qr"), Stiefel(retraction="qr").spec()], ids=["object", "spec"]
)
def test_a_manifold_replaced_between_steps_takes_effect(new: Any) -> None:
    model, reference = Model(), Model()
    wrapper = RiemannianWrapper(SGD(model.groups(), lr=0.1))
    run(model, wrapper, range(2))
    wrapper.param_groups[0]["manifold"] = new
    run(model, wrapper, range(2, 4))
    assert wrapper.param_groups[0]["manifold"] == Stiefel(retraction="qr").spec()
    other = RiemannianWrapper(SGD(reference.groups(), lr=0.1))
    run(reference, other, range(2))
    other = RiemannianWrapper(SGD(reference.groups(Stiefel(retraction="qr")), lr=0.1))
    run(reference, other, range(2, 4))
    assert same_bits(model.values(), reference.values())


def test_a_spec_changed_in_place_takes_effect() -> None:
    model, reference = Model(), Model()
    wrapper, other = (RiemannianWrapper(SGD(m.groups(), lr=0.1)) for m in (model, reference))
    run(model, wrapper, range(1))
    run(reference, other, range(1))
    wrapper.param_groups[0]["manifold"]["retraction"] = "qr"
    other.param_groups[0]["manifold"] = Stiefel(retraction="qr")
    run(model, wrapper, range(1, 2))
    run(reference, other, range(1, 2))
    assert same_bits(model.values(), reference.values())
    wrapper.param_groups[0]["manifold"]["retraction"] = "quirk"
    with pytest.raises(UnknownNameError, match="quirk"):
        wrapper.step()


@pytest.mark.parametrize("wrap", [RiemannianWrapper, attach], ids=["wrapper", "attach"])
def test_a_saved_state_is_plain_and_not_changed_by_later_edits(wrap: Wrap) -> None:
    inner = SGD(Model().groups(), lr=0.1)
    handle = wrap(inner)
    optimizer = handle if isinstance(handle, Optimizer) else inner
    state = optimizer.state_dict()
    optimizer.param_groups[0]["manifold"]["retraction"] = "svd"
    assert state["param_groups"][0]["manifold"] == Stiefel().spec()
    optimizer.param_groups[0]["manifold"] = Stiefel(retraction="qr")
    assert optimizer.state_dict()["param_groups"][0]["manifold"] == Stiefel(retraction="qr").spec()
    assert state["param_groups"][0]["manifold"] == Stiefel().spec()


# Trouble


def refuse_non_finite(
    model: Model,
    wrap: Wrap,
    inner: Callable[[Any], Optimizer],
    value: float,
    *,
    which: int = 3,
    closure: bool = False,
) -> None:
    """A step with a bad gradient raises, names the parameter, changes nothing, and can be followed by good ones."""
    reference = Model(model.params[0].dtype)
    optimizer, other = inner(model.named_groups()), RiemannianWrapper(inner(reference.named_groups()))
    handle = wrap(optimizer)
    stepper = handle if isinstance(handle, Optimizer) else optimizer
    run(model, stepper, range(3))
    run(reference, other, range(3))
    model.set_gradients(3)
    good = [p.grad for p in model.params]
    spoiled = torch.ones_like(model.points[which])
    spoiled[1, 1] = value
    model.points[which].grad = spoiled
    before = snapshot(model, optimizer)
    with pytest.raises(StepError, match=rf"point\.{which}.*(clip|skip)"):
        stepper.step(*([lambda: 0.0] if closure else []))
    assert equal(snapshot(model, optimizer), before)
    for p, g in zip(model.params, good, strict=True):
        p.grad = g
    stepper.step()
    run(reference, other, range(3, 4))
    assert same_bits(model.values(), reference.values())


@every_inner
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_changes_nothing(inner: Callable[[Any], Optimizer], value: float) -> None:
    refuse_non_finite(Model(), RiemannianWrapper, inner, value)


def test_a_non_finite_gradient_from_a_closure_changes_nothing() -> None:
    refuse_non_finite(Model(), RiemannianWrapper, INNERS["AdamW"], math.nan, closure=True)


def test_an_attached_optimizer_refuses_a_non_finite_gradient_too() -> None:
    refuse_non_finite(Model(), attach, INNERS["AdamW"], math.inf)


def test_a_gradient_too_large_to_be_converted_changes_nothing() -> None:
    refuse_non_finite(Model(torch.float32), RiemannianWrapper, INNERS["SGD"], 3e38)


def test_unnamed_groups_are_named_by_place() -> None:
    model = Model()
    wrapper = RiemannianWrapper(SGD(model.groups(), lr=0.1))
    model.set_gradients(0)
    model.points[4].grad = torch.full_like(model.points[4], math.nan)
    with pytest.raises(StepError, match=r"\(0, 4\)"):
        wrapper.step()


@every_inner
def test_skip_leaves_out_just_that_point(inner: Callable[[Any], Optimizer]) -> None:
    model, reference = Model(), Model()
    wrapper = RiemannianWrapper(inner(model.groups()), nonfinite="skip")
    other = RiemannianWrapper(inner(reference.groups()))
    for step in range(5):
        model.set_gradients(step)
        reference.set_gradients(step)
        if step == 2:
            model.points[3].grad = torch.full_like(model.points[3], math.nan)
            reference.points[3].grad = None
        own = model.points[3].grad
        wrapper.step()
        other.step()
        assert model.points[3].grad is own
    assert close(model.values(), reference.values())
    assert close(moments(model, wrapper), moments(reference, other))


class Poisoned(SGD):
    """Moves one parameter to NaN inside its step, after all others have moved, or fails in the middle."""

    def __init__(self, groups: Any, victim: nn.Parameter, how: str) -> None:
        super().__init__(groups, lr=0.1, momentum=0.9)
        self.victim, self.how = victim, how

    def step(self, closure: Any = None) -> Any:
        super().step()
        if self.how == "raise":
            raise ArithmeticError("the inner optimizer failed")
        if self.how:
            self.victim.data.fill_(float(self.how))


def poisoned_step(how: str, error: type[Exception], match: str, **options: Any) -> tuple[Model, Any, Any]:
    model = Model()
    inner = Poisoned(model.named_groups(), model.points[3], "")
    wrapper = RiemannianWrapper(inner, **options)
    run(model, wrapper, range(2))
    model.set_gradients(2)
    before = snapshot(model, wrapper)
    inner.how = how
    with pytest.raises(error, match=match):
        wrapper.step()
    return model, before, snapshot(model, wrapper)


@pytest.mark.parametrize("how", ["nan", "inf"])
def test_nan_born_inside_the_inner_step_puts_the_points_back(how: str) -> None:
    _, before, after = poisoned_step(how, StepError, r"point\.3.*before the step")
    assert same_bits(after[0][:6], before[0][:6])
    assert equal(after[1], before[1])


@pytest.mark.parametrize("how", ["nan", "inf", "raise"])
def test_restore_lets_a_failed_inner_step_change_nothing_anywhere(how: str) -> None:
    error = ArithmeticError if how == "raise" else StepError
    _, before, after = poisoned_step(how, error, r"failed|point\.3", nonfinite="restore")
    assert equal(after, before)


def test_restore_has_nothing_to_restore_where_no_parameter_is_left() -> None:
    wrapper = RiemannianWrapper(SGD([{"params": []}], lr=0.1), nonfinite="restore")
    for _ in range(2):
        wrapper.step()
    wrapper._core.undo()


def test_restore_takes_back_the_first_step_and_a_later_one() -> None:
    model, reference = Model(), Model()
    inner = AdamW(model.groups(), lr=0.1)
    wrapper = RiemannianWrapper(inner, nonfinite="restore")
    other = RiemannianWrapper(AdamW(reference.groups(), lr=0.1))
    for step in range(4):
        before = snapshot(model, wrapper)
        model.set_gradients(step)
        good = [None if p.grad is None else p.grad.clone() for p in model.params]
        for group in wrapper.param_groups:
            group["lr"] = float("nan")
        with pytest.raises(StepError, match=r"Everything was put back"):
            wrapper.step()
        for group in wrapper.param_groups:
            group["lr"] = 0.1
        assert equal([p.grad for p in model.params], good)
        assert equal(snapshot(model, wrapper)[0], before[0])
        run(model, wrapper, range(step, step + 1))
        run(reference, other, range(step, step + 1))
    assert same_bits(model.values(), reference.values())


def test_an_inner_step_that_raises_puts_points_and_gradients_back() -> None:
    _, before, after = poisoned_step("raise", ArithmeticError, "failed")
    assert same_bits(after[0][:6], before[0][:6])
    assert equal(after[1], before[1])


def test_nan_born_inside_is_skipped_on_demand() -> None:
    model, reference = Model(), Model()
    inner = Poisoned(model.groups(), model.points[3], "nan")
    wrapper = RiemannianWrapper(inner, nonfinite="skip")
    run(model, wrapper, range(1))
    run(reference, RiemannianWrapper(SGD(reference.groups(), lr=0.1, momentum=0.9)), range(1))
    expected = reference.values()
    expected[3] = Model().values()[3]
    assert close(model.values(), expected)
    assert torch.equal(model.points[3], expected[3])


def test_a_step_beyond_the_radius_names_the_way_out_and_puts_points_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(buckets, "CPU_BUCKET_BYTES", 1)
    model = Model()
    wrapper = RiemannianWrapper(SGD(model.groups(Stiefel(retraction="newton_schulz")), lr=1e-3))
    model.set_gradients(0)
    assert model.points[5].grad is not None
    model.points[5].grad *= 1e5
    before = snapshot(model, wrapper)
    with pytest.raises(StepError, match=r"newton_schulz.*(learning rate|polar)"):
        wrapper.step()
    assert same_bits(model.values()[:6], before[0][:6])
    assert equal([p.grad for p in model.params], before[1])


@pytest.mark.parametrize("retraction", [r for r in RETRACTIONS if r != "newton_schulz"])
@pytest.mark.parametrize("lr", [1e-8, 1.0, 1e2])
def test_steps_of_any_length_end_on_the_manifold(retraction: str, lr: float) -> None:
    model = Model(torch.float32)
    wrapper = RiemannianWrapper(SGD(model.groups(Stiefel(retraction=retraction)), lr=lr))
    for step in range(5):
        run(model, wrapper, range(step, step + 1))
        assert max(wrapper.residuals().values()) < 2e-6


@pytest.mark.parametrize("retraction", RETRACTIONS)
@pytest.mark.parametrize("lr", [1e5, 1e10, 1e18, 1e22, 1e30, 1e37])
def test_overflow_in_the_small_matrices_is_a_step_or_an_error_that_changes_no_point(
    retraction: str, lr: float
) -> None:
    """A finite displacement whose squares are not: never a point off the manifold."""
    model = Model(torch.float32)
    wrapper = RiemannianWrapper(SGD(model.groups(Stiefel(retraction=retraction)), lr=lr))
    model.set_gradients(0)
    before = snapshot(model, wrapper)
    try:
        wrapper.step()
    except StepError:
        assert same_bits(model.values()[:6], before[0][:6])
        assert equal([p.grad for p in model.params], before[1])
        return
    assert lr < 1e37
    assert max(wrapper.residuals().values()) < 2e-6
    assert not any(map(torch.equal, model.values()[:6], before[0][:6]))


# Diagnostics


def total_norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(t.square().sum().item() for t in tensors))


@every_inner
def test_diagnostics_are_norms_by_hand_for_every_height_and_orientation(
    inner: Callable[[Any], Optimizer],
) -> None:
    model = Model()
    wrapper = RiemannianWrapper(inner(model.groups()))
    run(model, wrapper, range(2))
    before = model.values()
    run(model, wrapper, range(2, 3))
    gradients, moves = [], []
    for p, x in zip(model.points, before, strict=False):
        assert p.grad is not None
        tall = (x.mT, p.grad.mT) if p.shape[0] < p.shape[1] else (x, p.grad)
        gradients.append(Stiefel().gradient(*tall))
        moves.append(p.detach() - x)
    found = wrapper.diagnostics()
    assert found["gradient_norm"] == pytest.approx(total_norm(gradients), rel=1e-9)
    assert found["displacement_norm"] == pytest.approx(total_norm(moves), rel=1e-9)
    assert found["skipped"] == 0


def test_asking_for_diagnostics_changes_nothing() -> None:
    ours, reference = Model(torch.float32), Model(torch.float32)
    asked, plain = (RiemannianWrapper(AdamW(m.groups())) for m in (ours, reference))
    assert asked.diagnostics() == {"gradient_norm": 0.0, "displacement_norm": 0.0, "skipped": 0.0}
    for step in range(4):
        run(ours, asked, range(step, step + 1))
        before = snapshot(ours, asked)
        asked.diagnostics()
        assert equal(snapshot(ours, asked), before)
        run(reference, plain, range(step, step + 1))
    assert same_bits(ours.values(), reference.values())


def test_skipped_points_are_counted() -> None:
    model = Model()
    wrapper = RiemannianWrapper(AdamW(model.groups()), nonfinite="skip")
    bad_ones: list[list[int]] = [[], [0, 3], [1]]
    for step, bad in enumerate(bad_ones):
        model.set_gradients(step)
        for i in bad:
            model.points[i].grad = torch.full_like(model.points[i], math.nan)
        wrapper.step()
    assert wrapper.diagnostics()["skipped"] == 3


# Transport of first moments

MOMENTS = {"exp_avg": lambda g: AdamW(g, lr=0.1), "momentum_buffer": lambda g: SGD(g, lr=0.1, momentum=0.9)}


def tangency(p: Tensor, moment: Tensor) -> float:
    x, v = (t.detach().mT if p.shape[0] < p.shape[1] else t.detach() for t in (p, moment))
    return (x.mT @ v + v.mT @ x).abs().max().item()


@pytest.mark.parametrize("key", MOMENTS)
@pytest.mark.parametrize("transport", ["projection", "none"])
@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_first_moments_are_carried_where_asked(key: str, transport: str, retraction: str) -> None:
    model = Model()
    manifold = Stiefel(transport=transport, retraction=retraction)
    wrapper = RiemannianWrapper(MOMENTS[key](model.groups(manifold)))
    for group in wrapper.param_groups:
        group["lr"] = 0.01
    run(model, wrapper, range(3))
    worst = max(tangency(p, wrapper.state[p][key]) for p in model.points)
    assert worst < 1e-13 if transport == "projection" else worst > 1e-3


@pytest.mark.parametrize("key", MOMENTS)
def test_carrying_is_the_manifolds_transport_and_only_of_first_moments(key: str) -> None:
    manifold = Stiefel(transport="projection")
    carried, left = parameter(8, 3), parameter(8, 3)
    wrapper = RiemannianWrapper(MOMENTS[key]([carried]), manifold)
    other = RiemannianWrapper(MOMENTS[key]([left]), Stiefel())
    x = left.detach().clone()
    for p, optimizer in ((carried, wrapper), (left, other)):
        fill([p], 0)
        optimizer.step()
    assert torch.equal(carried, left)
    y = left.detach()
    for name, moment in wrapper.state[carried].items():
        expected = other.state[left][name]
        if name == key:
            expected = manifold.transport_vector(x, y - x, y, expected)
        torch.testing.assert_close(moment, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("how", ["nan", ""], ids=["displacement", "gradient"])
def test_moments_of_a_skipped_point_are_not_carried_and_those_of_its_neighbour_are(how: str) -> None:
    skipped, other = parameter(8, 3, seed=0), parameter(8, 3, seed=1)
    inner = Poisoned([{"params": [skipped, other], "manifold": Stiefel(transport="projection")}], skipped, "")
    wrapper = RiemannianWrapper(inner, nonfinite="skip")
    fill([skipped, other], 0)
    wrapper.step()
    skipped.data = point(8, 3, seed=2)  # far from its moment
    moment = wrapper.state[skipped]["momentum_buffer"].clone()
    fill([other], 1)
    skipped.grad = torch.zeros_like(skipped) if how else torch.full_like(skipped, math.nan)
    inner.how = how
    wrapper.step()
    inner_moment = 0.9 * moment if how else moment
    assert torch.equal(wrapper.state[skipped]["momentum_buffer"], inner_moment)
    assert tangency(other, wrapper.state[other]["momentum_buffer"]) < 1e-13


def test_a_caller_can_name_other_moments() -> None:
    p = parameter(8, 3)
    wrapper = RiemannianWrapper(
        RMSprop([p], lr=0.01, centered=True), Stiefel(transport="projection"), moments=["grad_avg"]
    )
    for step in range(3):
        fill([p], step)
        wrapper.step()
    assert tangency(p, wrapper.state[p]["grad_avg"]) < 1e-13


def test_a_step_that_fails_for_no_fault_of_the_parameters_is_not_begun_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A collective that another rank has left would wait for its timeout once more."""
    model = Model()
    wrapper = RiemannianWrapper(AdamW(model.groups()))
    run(model, wrapper, range(2))
    asked = []

    def fail(bucket: object) -> None:
        asked.append(bucket)
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(buckets.Bucket, "convert_gradients", fail)
    with pytest.raises(RuntimeError, match="closed by peer"):
        run(model, wrapper, range(2, 3))
    assert len(asked) == 1


# Half precision: float32 masters

HALVES = [torch.bfloat16, torch.float16]
every_half = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])


@every_half
def test_small_steps_add_up_in_half_precision(dtype: torch.dtype) -> None:
    """300 steps of 1e-4, each far below the spacing of bfloat16, end where float32 ends."""
    half, exact = Model(dtype), Model(torch.float32)
    wrappers = [RiemannianWrapper(AdamW(m.groups(), lr=1e-4, weight_decay=0.0)) for m in (half, exact)]
    start = exact.values()
    for step in range(300):
        for model, wrapper in zip((half, exact), wrappers, strict=True):
            fill(model.points, step % 3 + 1)
            wrapper.step()
    eps = torch.finfo(dtype).eps
    for p, q, x in zip(half.points, exact.points, start, strict=False):
        assert (q - x).abs().max() > 5e-3
        assert (p.detach().float() - q.detach()).abs().max() < 2 * eps
        assert p.dtype == dtype


@every_half
@every_inner
def test_half_precision_points_are_the_rounding_of_float32_ones(
    dtype: torch.dtype, inner: Callable[[Any], Optimizer]
) -> None:
    model = Model(dtype)
    wrapper = RiemannianWrapper(inner(model.groups()))
    for step in range(5):
        model.set_gradients(step)
        own = [p.grad for p in model.params]
        bits = [p.grad.clone() for p in model.params if p.grad is not None]
        wrapper.step()
        assert all(p.grad is g for p, g in zip(model.params, own, strict=True))
        assert same_bits([g for g in own if g is not None], bits)
    for p in model.points:
        x = p.detach().float() if p.shape[0] >= p.shape[1] else p.detach().float().mT
        # Each column of the rounding of an orthonormal matrix is off by at most eps / 2 of its length.
        assert Stiefel().residual(x) < 2 * torch.finfo(dtype).eps
        dtypes = {t.dtype for k, t in wrapper.state[p].items() if isinstance(t, Tensor) and t.ndim > 1}
        assert dtypes == {torch.float32}
    assert {p.dtype for p in model.params} == {dtype}


@every_half
@every_inner
@pytest.mark.usefixtures("no_warnings")
def test_resuming_in_half_precision_is_bitwise(dtype: torch.dtype, inner: Callable[[Any], Optimizer]) -> None:
    whole, first, second = Model(dtype), Model(dtype), Model(dtype)
    whole_wrapper = RiemannianWrapper(inner(whole.groups()))
    run(whole, whole_wrapper, range(12))
    stopped = RiemannianWrapper(inner(first.groups()))
    run(first, stopped, range(7))
    checkpoint = saved_and_loaded({"optimizer": stopped.state_dict(), "params": first.values()})
    for p, saved in zip(second.params, checkpoint["params"], strict=True):
        p.data.copy_(saved)
    resumed = RiemannianWrapper(inner(second.groups()))
    resumed.load_state_dict(checkpoint["optimizer"])
    run(second, resumed, range(7, 12))
    assert same_bits(second.values(), whole.values())
    for p, q in zip(second.points, whole.points, strict=True):
        assert equal(dict(resumed.state[p]), dict(whole_wrapper.state[q]))


@every_half
def test_a_copy_in_half_precision_goes_on_alike(dtype: torch.dtype) -> None:
    model = Model(dtype)
    wrapper = RiemannianWrapper(AdamW(model.groups()))
    run(model, wrapper, range(3))
    twin, copied = clone_by_pickle((model, wrapper))
    run(model, wrapper, range(3, 6))
    run(twin, copied, range(3, 6))
    assert same_bits(twin.values(), model.values())


@every_half
def test_a_half_precision_point_set_by_hand_is_believed(dtype: torch.dtype) -> None:
    """A stale master must not bring the old value back."""
    model = Model(dtype)
    wrapper = RiemannianWrapper(SGD(model.groups(), lr=0.0))
    run(model, wrapper, range(2))
    new = point(8, 3, seed=50).to(dtype)
    model.points[0].data.copy_(new)
    run(model, wrapper, range(2, 3))
    assert (model.points[0] - new).abs().max() <= torch.finfo(dtype).eps


@every_half
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_in_half_precision_changes_nothing(dtype: torch.dtype, value: float) -> None:
    refuse_non_finite(Model(dtype), RiemannianWrapper, INNERS["AdamW"], value)


@every_half
@every_inner
def test_a_half_precision_point_skipped_at_its_first_step_begins_at_its_second(
    dtype: torch.dtype, inner: Callable[[Any], Optimizer]
) -> None:
    """A master stored too early would look to the optimizer like state of its own."""
    model, reference = Model(dtype), Model(dtype)
    wrapper = RiemannianWrapper(inner(model.groups()), nonfinite="skip")
    other = RiemannianWrapper(inner(reference.groups()))
    for step in range(3):
        model.set_gradients(step)
        reference.set_gradients(step)
        if step == 0:
            model.points[0].grad = torch.full_like(model.points[0], math.nan)
            reference.points[0].grad = None
        wrapper.step()
        other.step()
    assert same_bits(model.values()[:1], reference.values()[:1])


@every_half
def test_a_zero_learning_rate_moves_no_bit_in_half_precision(dtype: torch.dtype) -> None:
    model = Model(dtype)
    before = model.values()
    run(model, RiemannianWrapper(AdamW(model.groups(), lr=0.0)), range(3))
    assert same_bits(model.values(), before)


@every_half
def test_grad_scaler_with_half_precision_points(dtype: torch.dtype) -> None:
    scaled, plain = Model(dtype), Model(dtype)
    wrapper, reference = (RiemannianWrapper(SGD(m.groups(), lr=0.05, momentum=0.9)) for m in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
    if dtype == torch.float16:
        pytest.skip("torch's GradScaler refuses to unscale float16 gradients")
    for step in range(3):
        run(plain, reference, range(step, step + 1))
        set_scaled_gradients(scaled, scaler, step)
        scaler.step(wrapper)
        scaler.update()
    assert same_bits(scaled.values(), plain.values())


def gradient_node(p: Tensor) -> Any:
    """Where its gradient arrives in the graph; DistributedDataParallel's hook sits there."""
    return p.expand_as(p).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


@every_half
@every_inner
@pytest.mark.parametrize("wrap", [RiemannianWrapper, attach], ids=["wrapper", "attach"])
def test_steps_and_loads_leave_a_half_precision_parameter_where_its_gradient_arrives(
    wrap: Wrap, inner: Callable[[Any], Optimizer], dtype: torch.dtype
) -> None:
    model = Model(dtype)
    optimizer = inner(model.groups())
    handle = wrap(optimizer)
    stepping = handle if isinstance(handle, Optimizer) else optimizer
    nodes, lists = [gradient_node(p) for p in model.points], [g["params"] for g in optimizer.param_groups]
    run(model, stepping, range(2))
    assert all(gradient_node(p) is node for p, node in zip(model.points, nodes, strict=True))
    assert all(g["params"] is found for g, found in zip(optimizer.param_groups, lists, strict=True))
    assert set(optimizer.state) == set(model.params)
    own = [p.grad for p in model.params]
    stepping.load_state_dict(saved_and_loaded(stepping.state_dict()))
    assert all(gradient_node(p) is node for p, node in zip(model.points, nodes, strict=True))
    assert all(p.grad is g for p, g in zip(model.params, own, strict=True))
    assert set(optimizer.state) == set(model.params)


class Interrupted(AdamW):
    """Raises after its step, once asked to."""

    asked = False

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if self.asked:
            raise ArithmeticError
        return loss


@every_half
@pytest.mark.parametrize("wrap", [RiemannianWrapper, attach], ids=["wrapper", "attach"])
def test_a_failed_step_leaves_the_optimizer_the_parameters_themselves(wrap: Wrap, dtype: torch.dtype) -> None:
    model = Model(dtype)
    optimizer = Interrupted(model.groups())
    handle = wrap(optimizer)
    stepping = handle if isinstance(handle, Optimizer) else optimizer
    run(model, stepping, range(1))
    optimizer.asked = True
    with pytest.raises(ArithmeticError):
        run(model, stepping, range(1, 2))
    handle.residuals()
    assert all(map(is_, [p for g in optimizer.param_groups for p in g["params"]], model.params))
    assert set(optimizer.state) == set(model.params)
    optimizer.asked = False
    run(model, stepping, range(2, 3))


LEAVING: dict[str, Callable[[Any, Optimizer], object]] = {
    "remove": lambda handle, optimizer: handle.remove(),
    "no manifold": lambda handle, optimizer: optimizer.param_groups[0].update(manifold=None),
}
HALF_INNERS = {
    **INNERS,
    "Adafactor": lambda g: torch.optim.Adafactor(g, lr=0.01),
    "Lookahead": lambda g: pytorch_optimizer.Lookahead(AdamW(g, lr=0.02)),
}


@every_half
@pytest.mark.parametrize("inner", HALF_INNERS.values(), ids=list(HALF_INNERS))
@pytest.mark.parametrize("leave", LEAVING.values(), ids=list(LEAVING))
def test_a_half_precision_parameter_that_leaves_its_manifold_is_stepped_as_any_other(
    leave: Callable[[Any, Any], object], inner: Callable[[Any], Optimizer], dtype: torch.dtype
) -> None:
    model = Model(dtype)
    optimizer = inner(model.groups())
    if isinstance(optimizer, pytorch_optimizer.Lookahead) and leave is LEAVING["remove"]:
        pytest.skip("it has no hooks to attach to")
    handle = attach(optimizer) if leave is LEAVING["remove"] else RiemannianWrapper(optimizer)
    stepping = handle if isinstance(handle, Optimizer) else optimizer
    run(model, stepping, range(2))
    assert "master" in optimizer.state[model.points[0]]
    leave(handle, optimizer)
    run(model, stepping, range(2, 4))
    for p in model.points:
        state = optimizer.state[p]
        assert "master" not in state
        assert {t.dtype for t in state.values() if isinstance(t, Tensor) and t.ndim > 1} <= {dtype}


@every_half
@pytest.mark.parametrize("wrap", [RiemannianWrapper, attach], ids=["wrapper", "attach"])
def test_empty_points_in_half_precision_resume(wrap: Wrap, dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.empty(0, 6, 3, dtype=dtype))
    optimizer = AdamW([{"params": [p], "manifold": Stiefel(), "view": "batch"}], lr=0.1)
    handle = wrap(optimizer)
    stepping = handle if isinstance(handle, Optimizer) else optimizer
    for _ in range(2):
        p.grad = torch.empty_like(p)
        stepping.step()
        stepping.load_state_dict(saved_and_loaded(stepping.state_dict()))


# autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("wrap", [RiemannianWrapper, attach], ids=["wrapper", "attach"])
def test_a_step_inside_autocast_gives_the_same_bits(wrap: Wrap, dtype: torch.dtype) -> None:
    """Autocast would round every product of the step to half precision, and leave the manifold."""
    ours, reference = Model(dtype), Model(dtype)
    inner = AdamW(ours.groups(Stiefel(transport="projection")), lr=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        handle = wrap(inner)
        run(ours, handle if isinstance(handle, Optimizer) else inner, range(4))
        residuals = handle.residuals()
    other = RiemannianWrapper(AdamW(reference.groups(Stiefel(transport="projection")), lr=0.02))
    run(reference, other, range(4))
    assert same_bits(ours.values(), reference.values())
    assert residuals == other.residuals()
    with torch.autocast("cpu", torch.bfloat16):
        found = handle.diagnostics() if isinstance(handle, RiemannianWrapper) else other.diagnostics()
    assert found == other.diagnostics()


# attach


@every_inner
def test_attach_is_bitwise_the_wrapper(inner: Callable[[Any], Optimizer]) -> None:
    ours, reference = Model(), Model()
    optimizer = inner(ours.groups())
    handle = attach(optimizer)
    wrapper = RiemannianWrapper(inner(reference.groups()))
    scheduler, other = (lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, wrapper))
    for step in range(6):
        ours.set_gradients(step)
        bits = [p.grad for p in ours.params]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(ours.params, bits, strict=True))
        run(reference, wrapper, range(step, step + 1))
        scheduler.step()
        other.step()
    assert same_bits(ours.values(), reference.values())
    assert handle.residuals() == wrapper.residuals()
    assert equal(optimizer.state_dict(), wrapper.state_dict())


def test_attach_takes_a_default_manifold() -> None:
    p = parameter(6, 2)
    optimizer = SGD([p], lr=0.1)
    handle = attach(optimizer, Stiefel())
    for step in range(5):
        fill([p], step)
        optimizer.step()
    assert handle.residuals()[0, 0] < 1e-14


def test_a_removed_handle_leaves_a_bare_optimizer() -> None:
    ours, bare = Model(), Model()
    optimizer, reference = SGD(ours.groups(), lr=0.1), SGD(bare.groups(), lr=0.1)
    attach(optimizer).remove()
    run(ours, optimizer, range(3))
    run(bare, reference, range(3))
    assert same_bits(ours.values(), bare.values())


@pytest.mark.parametrize(
    "call", [lambda o, f: o.step(f), lambda o, f: o.step(closure=f)], ids=["positional", "keyword"]
)
def test_an_attached_optimizer_refuses_a_closure(call: Callable[[Any, Any], Any]) -> None:
    model = Model()
    optimizer = SGD(model.groups(), lr=0.1, momentum=0.9)
    attach(optimizer)
    run(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    with pytest.raises(ConfigError, match=r"closure.*RiemannianWrapper"):
        call(optimizer, lambda: torch.zeros(()))
    assert equal(snapshot(model, optimizer), before)
    optimizer.step(None)


@pytest.mark.parametrize("inner", [INNERS["AdamW"], INNERS["AdamW-fused"]], ids=["AdamW", "fused"])
def test_grad_scaler_drives_an_attached_optimizer_as_the_wrapper(inner: Callable[[Any], Optimizer]) -> None:
    """A fused optimizer that unscaled inside its step would meet an overflow after our hook has."""
    ours, reference = Model(torch.float32), Model(torch.float32)
    optimizer, wrapper = inner(ours.groups()), RiemannianWrapper(inner(reference.groups()))
    own = getattr(optimizer, "_step_supports_amp_scaling", False)
    handle = attach(optimizer)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for step in range(4):
        for model, stepper, scaler in ((ours, optimizer, scalers[0]), (reference, wrapper, scalers[1])):
            set_scaled_gradients(model, scaler, step)
            if step == 2:
                model.points[2].grad = torch.full_like(model.points[2], math.inf)
            scaler.step(stepper)
            scaler.update(1024.0)
    assert same_bits(ours.values(), reference.values())
    handle.remove()
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == own


@every_half
@pytest.mark.usefixtures("no_warnings")
def test_an_attached_optimizer_resumes_in_half_precision_bitwise(dtype: torch.dtype) -> None:
    whole, first, second = Model(dtype), Model(dtype), Model(dtype)
    optimizers = [AdamW(m.groups(), lr=0.02) for m in (whole, first, second)]
    for optimizer in optimizers:
        attach(optimizer)
    run(whole, optimizers[0], range(9))
    run(first, optimizers[1], range(5))
    checkpoint = saved_and_loaded({"optimizer": optimizers[1].state_dict(), "params": first.values()})
    for p, saved in zip(second.params, checkpoint["params"], strict=True):
        p.data.copy_(saved)
    optimizers[2].load_state_dict(checkpoint["optimizer"])
    for p in second.points:
        assert {t.dtype for t in optimizers[2].state[p].values()} == {torch.float32}
    run(second, optimizers[2], range(5, 9))
    assert same_bits(second.values(), whole.values())


def test_an_attached_optimizer_keeps_its_manifold_over_a_load_with_a_warning() -> None:
    model = Model()
    optimizer = SGD(model.groups(Stiefel(retraction="cayley")), lr=0.1)
    attach(optimizer)
    saved = SGD(Model().groups(Stiefel(retraction="qr").spec()), lr=0.5).state_dict()
    with pytest.warns(UserWarning, match=r"group 0 .*qr.*cayley"):
        optimizer.load_state_dict(saved)
    bare = SGD([{"params": model.points}, {"params": model.free}], lr=0.7).state_dict()
    with pytest.warns(UserWarning, match=r"group 0 .*cayley"):
        optimizer.load_state_dict(bare)
    assert optimizer.param_groups[0]["manifold"]["retraction"] == "cayley"
    assert optimizer.param_groups[0]["lr"] == 0.7


def test_a_load_that_fails_leaves_an_attached_optimizer_as_it_was() -> None:
    model = Model(torch.bfloat16)
    optimizer = AdamW(model.groups())
    attach(optimizer)
    run(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(AdamW([parameter(4, 2)]).state_dict())
    assert equal(snapshot(model, optimizer), before)
    run(model, optimizer, range(2, 3))


def test_an_attached_plain_function_cannot_be_saved() -> None:
    optimizer = SGD(Model().groups(Stiefel(retraction=shorten)), lr=0.1)
    attach(optimizer)
    with pytest.raises(ConfigError, match=r"retraction.*register"):
        optimizer.state_dict()


class Doubled(SGD):
    """Its step calls torch's, so that torch runs the hooks of both, and moves the parameters before and after."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                torch._foreach_mul_(group["params"], 0.9)
                super().step(closure)
                torch._foreach_mul_(group["params"], 1.2)


def test_attach_to_an_optimizer_whose_step_calls_its_parents_is_bitwise_the_wrapper() -> None:
    SGD([parameter(4, 2)])  # torch hooks a class's step when the first of its instances is made
    ours, reference = Model(), Model()
    optimizer = Doubled(ours.groups(), lr=0.1, momentum=0.9)
    attach(optimizer)
    wrapper = RiemannianWrapper(Doubled(reference.groups(), lr=0.1, momentum=0.9))
    for step in range(4):
        ours.set_gradients(step)
        own = [p.grad for p in ours.params]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(ours.params, own, strict=True))
        run(reference, wrapper, range(step, step + 1))
    assert same_bits(ours.values(), reference.values())


def interrupted(dtype: torch.dtype = torch.float64) -> tuple[Model, Any, Poisoned, Any]:
    """A model whose attached optimizer has just raised in its third step, and a snapshot from before that step."""
    model = Model(dtype)
    optimizer = Poisoned(model.groups(), model.points[3], "")
    handle = attach(optimizer)
    run(model, optimizer, range(2))
    model.set_gradients(2)
    before = snapshot(model, optimizer)
    optimizer.how = "raise"
    with pytest.raises(ArithmeticError):
        optimizer.step()
    optimizer.how = ""
    return model, handle, optimizer, before


def step_at_rate_zero(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()


RECOVERIES: dict[str, Callable[[Any, Any], object]] = {
    "the next step": lambda handle, optimizer: step_at_rate_zero(optimizer),
    "residuals": lambda handle, optimizer: handle.residuals(),
    "remove": lambda handle, optimizer: handle.remove(),
    "state_dict": lambda handle, optimizer: optimizer.state_dict(),
    "load_state_dict": lambda handle, optimizer: optimizer.load_state_dict(
        RiemannianWrapper(SGD(Model().groups(), lr=0.1)).state_dict()
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("recover", RECOVERIES.values(), ids=list(RECOVERIES))
def test_an_attached_optimizer_recovers_from_an_inner_step_that_raised(
    recover: Callable[[Any, Any], object], dtype: torch.dtype
) -> None:
    model, handle, optimizer, before = interrupted(dtype)
    recover(handle, optimizer)
    assert {p.dtype for p in model.points} == {dtype}
    assert same_bits(model.values()[:6], before[0][:6])
    assert equal([p.grad for p in model.params], before[1])


def test_after_an_interrupted_step_an_attached_optimizer_goes_on_as_the_wrapper_does() -> None:
    model, _, optimizer, _ = interrupted()
    other = Model()
    inner = Poisoned(other.groups(), other.points[3], "")
    wrapper = RiemannianWrapper(inner)
    run(other, wrapper, range(2))
    inner.how = "raise"
    with pytest.raises(ArithmeticError):
        run(other, wrapper, range(2, 3))
    inner.how = ""
    run(model, optimizer, range(3, 6))
    run(other, wrapper, range(3, 6))
    assert same_bits(model.values(), other.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_points_loaded_after_an_interrupted_step_are_kept(dtype: torch.dtype) -> None:
    model, handle, _, _ = interrupted(dtype)
    loaded = Model(dtype).values()
    with torch.no_grad():
        for p, value in zip(model.params, loaded, strict=True):
            p.copy_(value)
    handle.residuals()
    assert {p.dtype for p in model.points} == {dtype}
    assert same_bits(model.values(), loaded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_a_gradient_written_to_after_an_interrupted_step_is_kept_and_the_others_are_the_users(
    dtype: torch.dtype,
) -> None:
    model, handle, _, before = interrupted(dtype)
    written = model.points[0].grad  # one of two of its shape
    if dtype == torch.bfloat16:  # what was stepped was a stand-in in float32
        assert written is None
        model.points[0].grad = torch.full_like(model.points[0], 7.0)
    else:
        assert written is not None
        written.fill_(7.0)
    handle.residuals()
    own, *others = (p.grad for p in model.params)
    assert own is not None
    assert (own == 7.0).all()
    assert equal(others, before[1][1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_computed_after_an_interrupted_step_are_kept(set_to_none: bool, dtype: torch.dtype) -> None:
    model, handle, optimizer, before = interrupted(dtype)
    optimizer.zero_grad(set_to_none)
    if set_to_none:
        handle.residuals()
        assert all(p.grad is None for p in model.params)
        return
    torch.autograd.backward([p.sum() for p in model.points])
    handle.residuals()
    for p in model.points:
        assert p.grad is not None
        assert p.grad.dtype == dtype
        assert torch.equal(p.grad, torch.ones_like(p))
    assert same_bits(model.values()[:6], before[0][:6])


@pytest.mark.parametrize("again", [attach, RiemannianWrapper], ids=["attach", "wrapper"])
def test_attaching_to_an_attached_optimizer_is_refused(again: Wrap) -> None:
    optimizer = SGD(Model().groups(), lr=0.1)
    handle = attach(optimizer)
    with pytest.raises(ConfigError, match=r"already|twice|remove"):
        again(optimizer)
    handle.remove()
    again(optimizer)


# Refused at the start


def test_a_refused_group_leaves_the_accepted_ones_as_they_were() -> None:
    a, b = parameter(6, 2), nn.Parameter(torch.ones(6, 2))
    inner = SGD([{"params": [a]}, {"params": [b]}], lr=0.1)
    keys = [set(g) for g in inner.param_groups]
    with pytest.raises(NotOnManifoldError, match="parameter 0 of group 1"):
        RiemannianWrapper(inner, Stiefel())
    assert [set(g) for g in inner.param_groups] == keys


def test_a_refused_added_group_is_not_added() -> None:
    model = Model()
    wrapper = RiemannianWrapper(SGD(model.groups(), lr=0.1))
    before = snapshot(model, wrapper)
    with pytest.raises(ShapeError, match="param_groups"):
        wrapper.add_param_group({"params": [nn.Parameter(torch.ones(3))], "manifold": Stiefel()})
    assert equal(snapshot(model, wrapper), before)


COUPLED = ["SGD", "Adam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD"]


@pytest.mark.parametrize("decay", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_decay_is_refused_on_a_manifold_group_only(name: str, decay: Any) -> None:
    model = Model()
    cls = getattr(torch.optim, name)
    with pytest.raises(ConfigError, match=r"group 0 .*weight_decay=0\.1.*AdamW"):
        RiemannianWrapper(cls(model.groups(), weight_decay=decay))
    points, free = model.groups(weight_decay=0.0)
    RiemannianWrapper(cls([points, {**free, "weight_decay": 0.1}]))


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("how", ["set", "loaded", "loaded before any step"])
def test_coupled_decay_that_comes_later_is_refused(how: str) -> None:
    p = nn.Parameter(torch.eye(6, 3))
    optimizer = RiemannianWrapper(SGD([{"params": [p], "manifold": Stiefel()}], lr=0.1, momentum=0.9))
    if how != "loaded before any step":
        p.grad = torch.ones(6, 3)
        optimizer.step()
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["weight_decay"] = 0.1
    p.grad = torch.ones(6, 3)
    if how == "set":
        optimizer.param_groups[0]["weight_decay"] = 0.1
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"group 0 .*weight_decay=0\.1"):
                optimizer.step()
    else:
        with pytest.raises(ConfigError, match=r"group 0 .*weight_decay=0\.1"):
            optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["weight_decay"] == 0
    assert torch.equal(p, before)
    optimizer.param_groups[0]["weight_decay"] = 0
    optimizer.step()
    assert not torch.equal(p, before)


@pytest.mark.parametrize("lr", [1e-4, 1.0])
def test_a_direction_that_rounding_takes_is_warned_of(lr: float) -> None:
    """direction="spectral" reads the direction of the inner step alone, and p + step has rounded a short one."""
    p = nn.Parameter(torch.eye(60, 4))
    group = {"params": [p], "manifold": Stiefel(), "direction": "spectral"}
    optimizer = RiemannianWrapper(SGD([group], lr=lr))
    p.grad = torch.full((60, 4), 1e-4)
    short = lr < 1
    with pytest.warns(UserWarning, match="Riemannion") if short else contextlib.nullcontext():
        optimizer.step()


@pytest.mark.parametrize("make", [AdamW, lambda g: Adam(g, weight_decay=0.1, decoupled_weight_decay=True)])
def test_decoupled_decay_is_accepted(make: Callable[[Any], Optimizer]) -> None:
    RiemannianWrapper(make(Model().groups()))


def test_a_third_partys_decay_is_warned_of_once() -> None:
    class Ours(SGD):
        pass

    model = Model()
    half = [{"params": ps, "manifold": Stiefel()} for ps in (model.points[:3], model.points[3:])]
    with pytest.warns(UserWarning, match=r"Ours.*weight_decay=0") as seen:
        RiemannianWrapper(Ours(half, lr=0.1, weight_decay=0.1))
    assert len(seen) == 1


# Fuzz


class Contract(RuleBasedStateMachine):
    """Whatever is done to the wrapper, it goes on as each parameter alone in a wrapper that nothing is done to."""

    def __init__(self) -> None:
        super().__init__()
        self.points = [parameter(*shape, seed=i) for i, shape in enumerate(((8, 3), (3, 6), (4, 4)))]
        self.alone = [nn.Parameter(p.detach().clone()) for p in self.points]
        self.wrapper = RiemannianWrapper(self.make([{"params": self.points, "manifold": Stiefel()}]))
        self.wrappers = [
            RiemannianWrapper(self.make([{"params": [p], "manifold": Stiefel()}])) for p in self.alone
        ]
        self.steps = 0

    @staticmethod
    def make(groups: Any) -> Optimizer:
        return AdamW(groups, lr=0.05, eps=1e-3)

    def everywhere(self, **keys: Any) -> None:
        for wrapper in (self.wrapper, *self.wrappers):
            for group in wrapper.param_groups:
                group.update(keys)

    @rule(present=st.lists(st.booleans(), min_size=3, max_size=6), closure=st.booleans())
    def step(self, present: list[bool], closure: bool) -> None:
        self.steps += 1
        fill(self.alone, self.steps)
        for i, (p, q) in enumerate(zip(self.points, self.alone, strict=True)):
            q.grad = q.grad if present[i % len(present)] else None
            p.grad = None if q.grad is None else q.grad.clone()
        own = [p.grad for p in self.points]
        self.wrapper.step(*([lambda: 0.0] if closure else []))
        assert all(p.grad is g for p, g in zip(self.points, own, strict=True))
        for wrapper in self.wrappers:
            wrapper.step()

    @rule(lr=st.sampled_from([0.0, 1e-3, 0.1, 1.0]))
    def change_lr(self, lr: float) -> None:
        self.everywhere(lr=lr)

    @rule(gamma=st.sampled_from([0.5, 0.9]))
    def schedule(self, gamma: float) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for wrapper in (self.wrapper, *self.wrappers):
                rates = [group["lr"] for group in wrapper.param_groups]
                lr_scheduler.ExponentialLR(wrapper, gamma).step()
                assert [group["lr"] for group in wrapper.param_groups] == [gamma * lr for lr in rates]

    @rule(retraction=st.sampled_from(["polar", "qr", "svd", "cayley", "exp"]), plain=st.booleans())
    def change_retraction(self, retraction: str, plain: bool) -> None:
        manifold = Stiefel(retraction=retraction)
        self.everywhere(manifold=manifold.spec() if plain else manifold)

    @rule(scale=st.sampled_from([0.5, 1.0, 2.0]))
    def change_scale(self, scale: float) -> None:
        self.everywhere(displacement_scale=scale)

    @rule(shape=st.sampled_from([(8, 3), (5, 2), (2, 7), (3, 3)]))
    def add_group(self, shape: tuple[int, int]) -> None:
        late = parameter(*shape, seed=len(self.points))
        keys = {
            k: v
            for k, v in self.wrapper.param_groups[0].items()
            if k in ("lr", "manifold", "displacement_scale")
        }
        self.points.append(late)
        self.alone.append(nn.Parameter(late.detach().clone()))
        self.wrapper.add_param_group({"params": [late], **keys})
        self.wrappers.append(RiemannianWrapper(self.make([{"params": [self.alone[-1]], **keys}])))

    @rule()
    def save_and_load(self) -> None:
        """Into new parameters and a new wrapper, built as the old one."""
        state = saved_and_loaded(self.wrapper.state_dict())
        groups, self.points = (
            self.wrapper.param_groups,
            [nn.Parameter(p.detach().clone()) for p in self.points],
        )
        new: list[dict[str, Any]] = []
        rest = list(self.points)
        for group in groups:
            count = len(group["params"])
            keys: dict[str, Any] = {
                k: group[k] for k in ("lr", "manifold", "displacement_scale") if k in group
            }
            new.append({"params": rest[:count], **keys})
            rest = rest[count:]
        self.wrapper = RiemannianWrapper(self.make(new))
        self.wrapper.load_state_dict(state_dict=state)

    @rule(clone=st.sampled_from([copy.deepcopy, clone_by_pickle]))
    def clone(self, clone: Callable[[Any], Any]) -> None:
        self.points, self.wrapper = clone((self.points, self.wrapper))

    @rule(value=st.sampled_from([math.nan, math.inf]))
    def refuse_a_bad_gradient(self, value: float) -> None:
        for p in self.points:
            p.grad = torch.full_like(p, value)
        with pytest.raises(StepError):
            self.wrapper.step()

    @invariant()
    def points_are_on_the_manifold(self) -> None:
        assert max(self.wrapper.residuals().values()) < 1e-13

    @invariant()
    def nothing_is_lost(self) -> None:
        for p, q in zip(self.points, self.alone, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-9)


TestContract = Contract.TestCase
TestContract.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)


def test_diagnostics_are_the_norms_of_the_last_step() -> None:
    torch.manual_seed(0)
    m = Stiefel()
    points = [torch.nn.Parameter(m.random_point(n, 3, dtype=torch.float64)) for n in (7, 11)]
    wrapper = RiemannianWrapper(torch.optim.SGD(points, lr=0.1), m)
    assert wrapper.diagnostics() == {"gradient_norm": 0.0, "displacement_norm": 0.0, "skipped": 0.0}
    before = [p.detach().clone() for p in points]
    for p in points:
        p.grad = torch.randn_like(p)
    expected = sum(m.gradient(p.detach(), p.grad).square().sum() for p in points if p.grad is not None)
    wrapper.step()
    found = wrapper.diagnostics()
    moved = sum((p.detach() - x).square().sum() for p, x in zip(points, before, strict=True))
    assert found["gradient_norm"] ** 2 == pytest.approx(float(expected), rel=1e-12)
    assert found["displacement_norm"] ** 2 == pytest.approx(float(moved), rel=1e-12)
    wrapper.zero_grad()
    assert wrapper.diagnostics()["gradient_norm"] != wrapper.diagnostics()["gradient_norm"]


def test_the_inner_optimizer_gets_the_loss_once():
    """Some optimizers (ALIG) read the loss; one that asks again (SAM) would reuse a gradient of another point."""

    class Reader(torch.optim.SGD):
        asks = 1

        def step(self, closure=None):
            losses = [closure() for _ in range(self.asks)]
            self.seen = losses[0].item()
            super().step()
            return losses[0]

    p = nn.Parameter(Stiefel().random_point(8, 3, dtype=torch.float64))
    inner = Reader([{"params": [p], "manifold": Stiefel()}], lr=0.1)
    wrapper = RiemannianWrapper(inner)

    def closure():
        wrapper.zero_grad()
        loss = p.square().sum() + p[0].sum()
        loss.backward()
        return loss

    value = wrapper.step(closure).item()
    assert inner.seen == value
    Reader.asks = 2
    before = p.detach().clone()
    with pytest.raises(StepError, match="more than once"):
        wrapper.step(closure)
    assert torch.equal(p, before)


@pytest.mark.parametrize("wrap", [RiemannianWrapper, attach])
def test_a_direction_takes_the_rate_of_its_group_wherever_that_stands(wrap: Wrap) -> None:
    x, free = parameter(8, 3), nn.Parameter(torch.zeros(3, dtype=torch.float64))
    spectral = {"params": [x], "manifold": Stiefel(), "direction": "spectral", "lr": 0.01}
    optimizer = SGD([{"params": [free], "lr": 1.0}, spectral], lr=0.1)
    wrapped = wrap(optimizer)
    steps = optimizer if wrap is attach else wrapped
    moved = []
    for change in (lambda: None, optimizer.param_groups.reverse, optimizer.param_groups.pop):
        change()
        x.grad, before = point(8, 3, seed=1), x.detach().clone()
        steps.step()
        moved.append((x.detach() - before).norm().item())
    assert max(moved) < 0.03


class Around(Optimizer):
    """An optimizer around another that never calls Optimizer.__init__, and whose zero_grad takes nothing."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)
    defaults = property(lambda self: self.inner.defaults)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self) -> None:  # type: ignore[override]
        self.inner.zero_grad()


def test_an_optimizer_around_another_may_have_no_hooks() -> None:
    x, y = parameter(8, 3), parameter(8, 3)
    around = Around(SGD([{"params": [x], "manifold": Stiefel()}], lr=0.1))
    with pytest.raises(ConfigError, match="never called"):
        attach(around)
    optimizers = [
        RiemannianWrapper(o) for o in (around, SGD([{"params": [y], "manifold": Stiefel()}], lr=0.1))
    ]
    for p, optimizer in zip((x, y), optimizers, strict=True):
        p.grad = point(8, 3, seed=1)
        optimizer.step()
        optimizer.zero_grad()
        assert p.grad is None
    assert torch.equal(x, y)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_point_may_change_its_memory_layout_between_steps(fused: bool, hooked: bool) -> None:
    """Stateless: with moments in the old layout torch's own fused kernels go wrong."""
    x, y = parameter(12, 3), parameter(12, 3)
    optimizers = []
    for p in (x, y):  # beside another of its shape: hooks keep apart what would be stepped as one
        points = [p, parameter(12, 3)] if hooked else [p]
        optimizers.append(
            RiemannianWrapper(SGD([{"params": points, "manifold": Stiefel()}], lr=0.1, fused=fused))
        )
        for q in points:
            q.grad = torch.zeros_like(q)
        if hooked:
            optimizers[-1].optimizer.register_step_pre_hook(lambda *_: None)
    for step in range(3):
        for p, optimizer in zip((x, y), optimizers, strict=True):
            p.grad = point(12, 3, seed=step)
            optimizer.step()
        if step == 0:
            x.data = x.data.mT.contiguous().mT
    assert torch.allclose(x, y, rtol=0, atol=1e-14)


def test_what_cannot_be_stepped_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="differentiable"):
        RiemannianWrapper(AdamW([{"params": [parameter(8, 3)], "manifold": Stiefel()}], differentiable=True))
    meta = nn.Parameter(torch.empty(8, 3, device="meta"))
    with pytest.raises(ConfigError, match="meta device"):
        RiemannianWrapper(SGD([{"params": [meta], "manifold": Stiefel()}], lr=0.1))


def test_a_hook_that_edits_a_state_before_it_is_loaded_edits_a_copy() -> None:
    optimizer = RiemannianWrapper(SGD([{"params": [parameter(8, 3)], "manifold": Stiefel()}], lr=0.1))
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state.update(state={}, extra=1))
    optimizer.load_state_dict(saved)
    assert "extra" not in saved


def test_a_step_in_inference_mode_and_a_name_for_a_parameter_added_by_hand() -> None:
    x, y = parameter(8, 3), parameter(8, 3)
    x.grad, y.grad = point(8, 3, seed=1), point(8, 3, seed=1)
    optimizer = RiemannianWrapper(SGD([{"params": [("x", x)], "manifold": Stiefel()}], lr=0.1))
    with torch.inference_mode():
        optimizer.step()
    optimizer.param_groups[0]["params"].append(y)
    optimizer.step()
    assert set(optimizer.residuals()) == {"x", (0, 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_that_clears_the_gradients_it_has_used_clears_the_users(dtype: torch.dtype) -> None:
    class Clearing(SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            self.zero_grad()
            return loss

    x = parameter(8, 3, dtype=dtype)
    x.grad = torch.ones_like(x)
    RiemannianWrapper(Clearing([{"params": [x], "manifold": Stiefel()}], lr=0.1)).step()
    assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lr", [1e-6, 1e-2])
def test_the_displacement_is_that_of_the_masters(dtype: torch.dtype, lr: float) -> None:
    """Not one end of the step rounded to half precision, which is more than a short step."""
    x = parameter(64, 8, dtype=dtype)
    optimizer = RiemannianWrapper(AdamW([{"params": [x], "manifold": Stiefel()}], lr=lr))
    for step in range(3):
        before = (
            optimizer.state[x]["master"].clone()
            if step and dtype != torch.float32
            else x.detach().float().clone()
        )
        x.grad = torch.ones_like(x) * (step + 1)
        optimizer.step()
        after = optimizer.state[x]["master"] if dtype != torch.float32 else x.detach()
        moved = (after - before).norm().item()
        assert optimizer.diagnostics()["displacement_norm"] == pytest.approx(moved, rel=1e-4)


def test_attach_refuses_what_a_wrapper_holds_and_empty_points_have_no_residual() -> None:
    inner = SGD([{"params": [parameter(6, 3)]}], lr=0.1)
    wrapper = RiemannianWrapper(inner, Stiefel())
    with pytest.raises(ConfigError, match="inside a RiemannianWrapper, and would be converted twice"):
        attach(inner, Stiefel())
    del wrapper
    attach(inner).remove()
    empty = RiemannianWrapper(
        SGD([{"params": [nn.Parameter(torch.zeros(0, 6, 3))], "view": "batch"}]), Stiefel()
    )
    assert empty.residuals() == {(0, 0): 0.0}


def test_skip_leaves_alone_what_moved_too_far_for_its_squares() -> None:
    """A finite displacement, whose Gram is not: the other points are stepped."""
    ps = [parameter(8, 3, dtype=torch.float32) for _ in range(2)]
    starts = [p.detach().clone() for p in ps]
    wrapper = RiemannianWrapper(SGD(ps, lr=1.0), Stiefel(), nonfinite="skip")
    ps[0].grad, ps[1].grad = torch.full((8, 3), 0.1), torch.randn(8, 3) * 1e19
    wrapper.step()
    assert torch.equal(ps[1].detach(), starts[1])
    assert not torch.equal(ps[0].detach(), starts[0])
    assert wrapper.diagnostics()["skipped"] == 1
