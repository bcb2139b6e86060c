"""loi_init: where it starts, what it costs, and that a failure leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from stiefelopt import (
    USV,
    ConfigError,
    FixedRank,
    RiemannLoRALinear,
    StelLALinear,
    StepError,
    Stiefel,
    adapt,
    loi_init,
)

torch.set_num_threads(1)

R = 3
exact_corrections = pytest.mark.parametrize("correction", ["fold", "keep"])


class Net(nn.Module):
    """Two linear layers of different shapes, with dropout and a nonlinearity between them."""

    def __init__(
        self, dtype: torch.dtype = torch.float64, dropout: float = 0.0, use_reentrant: bool | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first: Any = nn.Linear(12, 20, dtype=dtype)
        self.second: Any = nn.Linear(20, 9, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.use_reentrant = use_reentrant
        self.passes = 0
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        h = self.first(x).tanh()
        if self.dropout.p:
            self.masks.append((self.dropout(torch.ones_like(h)) > 0).detach())
            h = h * self.masks[-1]
        if self.use_reentrant is not None:
            y: Tensor = checkpoint(self.second, h, use_reentrant=self.use_reentrant)
            return y
        return self.second(h)


X = torch.randn(30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
T = torch.randn(30, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def adapted(net: nn.Module, r: int = R, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(4)
    options = {"reference_dim": 1, "init": "loi", "generator": generator, **options}
    return adapt(net, RiemannLoRALinear, target_modules="all-linear", r=r, **options)


def closure_of(net: Any, x: Tensor = X, target: Tensor = T, c: float = 1.0) -> Callable[[], Tensor]:
    return lambda: c * (net(x.to(net.first.weight.dtype)) - target).square().mean()


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layers_of(net: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in net.named_modules() if isinstance(m, RiemannLoRALinear)}


def dense_gradients(net: Any, closures: list[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """dL/dW at every plain base weight, by autograd on the bases themselves."""
    weights = {name: layer.base.weight for name, layer in layers_of(net).items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    loss = torch.stack([closure() for closure in closures]).sum()
    found = torch.autograd.grad(loss, list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return dict(zip(weights, found, strict=True))


def captured(net: Any, closures: list[Callable[[], Tensor]]) -> dict[str, float]:
    """||P_X G - SVD_2r(G)|| / ||G|| for every layer, where the function is the base's own."""
    errors = {}
    for name, g in dense_gradients(net, closures).items():
        layer = layers_of(net)[name]
        point = USV(layer.U.detach(), layer.S.detach(), layer.V.detach())
        projected = FixedRank().embed(point, FixedRank().project_dense(point, g))
        u, s, vh = torch.linalg.svd(g, full_matrices=False)
        k = 2 * layer.r
        best = (u[:, :k] * s[:k]) @ vh[:k]
        errors[name] = ((projected - best).norm() / g.norm()).item()
    return errors


# Where it starts


@pytest.mark.parametrize("r", [1, 3])
@exact_corrections
def test_the_first_gradient_is_the_best_of_rank_2r(correction: str, r: int) -> None:
    net = adapted(Net(), r=r, correction=correction)
    y = net(X).detach()
    loi_init(net, closure_of(net), power_iterations=15, generator=seeded())
    assert max(captured(net, [closure_of(net)]).values()) < 1e-9
    torch.testing.assert_close(net(X).detach(), y, rtol=0, atol=1e-12)
    for layer in layers_of(net).values():
        FixedRank().check(USV(layer.U, layer.S, layer.V))


def test_the_layers_own_gradient_is_as_large_as_can_be() -> None:
    """Through .grad and the manifold, not through dense matrices; a random start is smaller by far."""
    found = []
    for init in (False, True):
        net = adapted(Net())
        if init:
            loi_init(net, closure_of(net), power_iterations=15, generator=seeded())
        closure_of(net)().backward()
        norms = {}
        for name, layer in layers_of(net).items():
            # Of the projected gradients (G V, U^T G V, G^T U), ||P_X G||^2 = ||G V||^2 + ||G^T U||^2 - ||U^T G V||^2.
            squares = [p.grad.square().sum() for p in (layer.U, layer.V, layer.S)]
            norms[name] = (squares[0] + squares[1] - squares[2]).sqrt().item()
        found.append(norms)
    plain = Net()
    (plain(X) - T).square().mean().backward()
    for name in ("first", "second"):
        s = torch.linalg.svdvals(plain.get_parameter(f"{name}.weight").grad)
        best = s[: 2 * R].norm().item()
        assert abs(found[1][name] - best) < 1e-9
        assert found[0][name] < 0.9 * best


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-2), (torch.float32, 1e-2)])
def test_the_defaults_on_a_layer_of_64_x_48(dtype: torch.dtype, bound: float) -> None:
    """q = 1 and 16 further columns; the gradient of 200 random rows, whose singular values fall slowly."""
    torch.manual_seed(0)
    net = nn.Module()
    net.first = nn.Linear(48, 64, dtype=dtype)
    x, target = torch.randn(200, 48, dtype=dtype), torch.randn(200, 64, dtype=dtype)
    layer: Any = adapted(net, r=4).first
    loi_init(net, lambda: (layer(x) - target).square().mean(), generator=seeded())
    (g,) = dense_gradients(net, [lambda: (layer(x) - target).square().mean()]).values()
    point = USV(layer.U.detach(), layer.S.detach(), layer.V.detach())
    size = FixedRank().norm(point, FixedRank().project_dense(point, g))
    best = torch.linalg.svdvals(g)[:8].norm()
    assert best * (1 - bound) < size < best * (1 + 1e-5)
    assert max(Stiefel().residual(point.U), Stiefel().residual(point.V)) < 2e-6


@pytest.mark.parametrize("power_iterations", [0, 1, 2])
def test_power_iterations_help(power_iterations: int) -> None:
    net = adapted(Net(), r=2)
    loi_init(net, closure_of(net), power_iterations=power_iterations, oversample=1, generator=seeded())
    error = max(captured(net, [closure_of(net)]).values())
    assert error < (0.5, 0.15, 0.05)[power_iterations]


@pytest.mark.parametrize("r", [5, 7, 9])
def test_layers_thinner_than_2r(r: int) -> None:
    """Left and right directions overlap there, and the projection holds the whole gradient."""
    net = adapted(Net(), r=r)
    y = net(X).detach()
    loi_init(net, closure_of(net), power_iterations=15, generator=seeded())
    errors = captured(net, [closure_of(net)])
    assert errors["second"] < 1e-9  # 9 x 20: no more than 9 directions, less than 2 r
    torch.testing.assert_close(net(X).detach(), y, rtol=0, atol=1e-12)


def test_several_closures_are_their_sum() -> None:
    one, two = adapted(Net()), adapted(Net())
    halves = [closure_of(two, X[:10], T[:10], 1 / 3), closure_of(two, X[10:], T[10:], 2 / 3)]
    loi_init(one, closure_of(one), generator=seeded())
    loi_init(two, halves, generator=seeded())
    for a, b in zip(layers_of(one).values(), layers_of(two).values(), strict=True):
        torch.testing.assert_close(a.U @ a.V.T, b.U @ b.V.T, rtol=0, atol=1e-9)
    alone = adapted(Net())
    loi_init(alone, closure_of(alone, X[:10], T[:10]), generator=seeded())
    assert (alone.first.U @ alone.first.V.T - two.first.U @ two.first.V.T).abs().max() > 1e-2


@pytest.mark.parametrize("c", [1e-6, 1e6, 1e-30])
def test_the_scale_of_the_loss_does_not_matter(c: float) -> None:
    nets = [adapted(Net(torch.float32)) for _ in range(2)]
    for net, factor in zip(nets, (1.0, c), strict=True):
        loi_init(net, closure_of(net, c=factor), generator=seeded())
    for a, b in zip(*(layers_of(net).values() for net in nets), strict=True):
        torch.testing.assert_close(a.U @ a.V.T, b.U @ b.V.T, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("given", "start"), [(None, 0.01 / R**0.5), (0.5, 0.5), (-0.2, -0.2)])
def test_the_scale_of_the_start(given: float | None, start: float) -> None:
    net = adapted(Net())
    loi_init(net, closure_of(net), scale=given, generator=seeded())
    for layer in layers_of(net).values():
        assert torch.equal(layer.S.detach(), start * torch.eye(R, dtype=torch.float64))


def test_a_generator_makes_it_reproducible() -> None:
    found = []
    for seed in (7, 7, 8):
        net = adapted(Net(torch.float32))
        loi_init(net, closure_of(net), power_iterations=0, oversample=0, generator=seeded(seed))
        found.append(net.first.U.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_once_more_from_where_training_has_led() -> None:
    """What was learned is dropped, and the correction of the first start with it."""
    first, again = adapted(Net()), adapted(Net())
    with torch.no_grad():
        for layer in layers_of(again).values():
            layer.S.add_(1.0)
            layer.merge()
    for net in (first, again):
        loi_init(net, closure_of(net), generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not again.first.merged


# What it costs, and what it leaves


@pytest.mark.parametrize("q", [0, 1, 3])
@pytest.mark.parametrize("batches", [1, 2])
def test_the_number_of_passes(q: int, batches: int) -> None:
    net = adapted(Net())
    loi_init(net, [closure_of(net)] * batches, power_iterations=q)
    assert net.passes == 2 * (q + 1) * batches


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operations make, views of a model's own weights not counted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()
        self._own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self._own:
                self.seen.add(tuple(t.shape))
        return result


@pytest.mark.parametrize("correction", ["keep", "none"])
def test_no_gradient_of_full_size_is_formed(correction: str) -> None:
    net = adapted(Net(), correction=correction)
    full = {(20, 12), (12, 20), (9, 20), (20, 9)}
    with Shapes(net) as shapes:
        loi_init(net, closure_of(net), oversample=1)
    assert (30, 20) in shapes.seen
    assert not full & shapes.seen
    plain = Net()
    with Shapes(plain) as shapes:
        closure_of(plain)().backward()
    assert full & shapes.seen  # the check can fail
    assert not any(p.requires_grad for n, p in net.named_parameters() if "base" in n)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("given", [True, False])
def test_dropout_draws_the_same_masks_and_the_random_state_comes_back(given: bool) -> None:
    net = adapted(Net(dropout=0.5))
    torch.manual_seed(5)
    if not given:
        # The probes come from the global generator then; nothing else does.
        for layer in layers_of(net).values():
            torch.randn(
                layer.in_features, min(2 * R + 16, layer.in_features, layer.out_features), dtype=torch.float64
            )
    state = torch.get_rng_state()
    torch.manual_seed(5)
    loi_init(net, closure_of(net), generator=seeded() if given else None)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(net.masks) == 4
    assert all(torch.equal(mask, net.masks[0]) for mask in net.masks)
    assert not net.masks[0].all()


def snapshot(net: nn.Module) -> Any:
    return (
        {n: (id(t), t.detach().clone()) for n, t in (*net.named_parameters(), *net.named_buffers())},
        {n: (m.merged, sorted(m._kept), m._probe, m.start, m.folds) for n, m in layers_of(net).items()},
        torch.get_rng_state(),
    )


def assert_same(before: Any, after: Any) -> None:
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])
    assert before[0].keys() == after[0].keys()
    for name, (identity, value) in before[0].items():
        assert after[0][name][0] == identity, name
        assert torch.equal(after[0][name][1], value), name


def third_fails(net: Any) -> Callable[[], Tensor]:
    """Not the first pass: half of the work is done."""

    def closure() -> Tensor:
        loss = closure_of(net)()
        if net.passes == 3:
            raise ZeroDivisionError("third pass")
        return loss

    return closure


FAILURES: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "an exception": (third_fails, ZeroDivisionError, "third pass"),
    "NaN": (lambda net: lambda: closure_of(net)() * float("nan"), StepError, r"'?first'? is not finite"),
    "infinite": (lambda net: lambda: closure_of(net)() * float("inf"), StepError, r"not finite"),
    "no graph": (lambda net: lambda: closure_of(net)().detach(), ConfigError, r"with its graph"),
    "a number": (lambda net: lambda: closure_of(net)().item(), ConfigError, r"scalar loss"),
    "a vector": (lambda net: lambda: net(X.float()).sum(0), ConfigError, r"scalar loss"),
    "of another model": (lambda net: lambda: T.clone().requires_grad_().sum(), ConfigError, r"adapted model"),
    "backward inside": (
        lambda net: lambda: (lambda loss: (loss.backward(), loss)[1])(closure_of(net)()),
        RuntimeError,
        r"second time",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), FAILURES.values(), ids=list(FAILURES))
@pytest.mark.parametrize("correction", ["fold", "keep", "none"])
@pytest.mark.parametrize("state", ["fresh", "merged", "loaded"])
def test_a_failure_leaves_every_bit(
    make: Callable[[Any], Any], error: type[Exception], message: str, correction: str, state: str
) -> None:
    net = adapted(Net(torch.float32), correction=correction)
    if state == "loaded":
        net.load_state_dict(adapted(Net(torch.float32), correction=correction, scale=0.4).state_dict())
    if state == "merged":
        net.first.merge()
    before = snapshot(net)
    with pytest.raises(error, match=message):
        loi_init(net, make(net), generator=seeded())
    assert_same(before, snapshot(net))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "scale 0": ({"scale": 0.0}, r"scale is 0\.0"),
    "scale NaN": ({"scale": float("nan")}, r"scale is nan"),
    "negative oversample": ({"oversample": -1}, r"oversample=-1"),
    "half a power iteration": ({"power_iterations": 0.5}, r"power_iterations=0\.5"),
    "no closures": ({"loss_closure": []}, r"0 closures"),
    "the loss itself": ({"loss_closure": torch.zeros(())}, r"is or holds a Tensor; a function that returns"),
    "no function": ({"loss_closure": [3]}, r"is or holds a int; a function that returns"),
    "a seed": ({"generator": 3}, r"generator is 3; pass torch\.Generator\(\)"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=list(BAD))
def test_bad_options_are_refused_before_anything_happens(options: dict[str, Any], message: str) -> None:
    net = adapted(Net())
    before = snapshot(net)
    with pytest.raises(ConfigError, match=message):
        loi_init(net, **{"loss_closure": closure_of(net), **options})
    assert_same(before, snapshot(net))
    assert net.passes == 0


def test_a_model_without_such_layers_is_refused() -> None:
    net: Any = adapt(Net(), StelLALinear, target_modules="all-linear", r=2, reference_dim=1)
    with pytest.raises(ConfigError, match=r"no RiemannLoRALinear"):
        loi_init(net, closure_of(net))


# Models as they come


def test_layers_without_a_gradient_keep_their_start() -> None:
    """One that the loss does not reach, one whose gradient is exactly zero, and one that is found all the same."""
    net: Any = Net(torch.float32)
    net.unused, net.dead = nn.Linear(4, 5), nn.Linear(9, 9)
    net.last = nn.Linear(9, 2)
    adapted(net, r=2)
    nn.init.zeros_(net.last.base.weight)
    net.last._kept.clear()
    before = {
        name: [t.detach().clone() for t in (m.U, m.S, m.V, m.base.weight)]
        for name, m in layers_of(net).items()
    }

    def closure() -> Tensor:
        y = net(X.float())
        zero = net.last.base(net.dead(y)).sum() * 0.0 + net.dead(y).sum() * 0.0
        return y.square().mean() + zero

    loi_init(net, closure, generator=seeded())
    for name, layer in layers_of(net).items():
        kept = all(
            torch.equal(a, b)
            for a, b in zip((layer.U, layer.S, layer.V, layer.base.weight), before[name], strict=True)
        )
        assert kept == (name in ("unused", "dead", "last")), name
        assert all(torch.isfinite(t).all() for t in layer.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base(dtype: torch.dtype) -> None:
    net, exact = adapted(Net(dtype)), adapted(Net(dtype).float())
    x = X.to(dtype)
    y = net(x).detach()

    def closure_at(each: Any) -> Callable[[], Tensor]:
        return lambda: (each(x.to(each.first.weight.dtype)).float() - T.float()).square().mean()

    for each in (net, exact):
        loi_init(each, closure_at(each), generator=seeded())
    assert torch.equal(net(x), y)
    layer, twin = net.second, exact.second
    assert layer.U.dtype == torch.float32
    # The leading direction of a gradient in half precision is right to a few of its roundings.
    assert abs(torch.linalg.svdvals(layer.U.T @ twin.U)[0].item() - 1) < 1e-2
    FixedRank().check(USV(layer.U, layer.S, layer.V))


def test_under_autocast() -> None:
    net = adapted(Net(torch.float32))

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (net(X.float()).float() - T.float()).square().mean()

    loi_init(net, closure, power_iterations=3, generator=seeded())
    assert max(captured(net, [lambda: (net(X.float()) - T.float()).square().mean()]).values()) < 5e-2


def test_gradient_checkpointing_without_reentry() -> None:
    plain, saving = adapted(Net(dropout=0.3)), adapted(Net(dropout=0.3, use_reentrant=False))
    for net in (plain, saving):
        torch.manual_seed(2)
        loi_init(net, closure_of(net), generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), saving.parameters(), strict=True))


def test_reentrant_checkpointing_is_refused_by_torch_with_the_way_out() -> None:
    net = adapted(Net(use_reentrant=True))
    before = snapshot(net)
    with pytest.raises(RuntimeError, match=r"use_reentrant=False"):
        loi_init(net, closure_of(net), generator=seeded())
    assert_same(before, snapshot(net))


def test_layers_that_reentrant_checkpointing_hides_are_refused_by_name() -> None:
    """The way to the other layers does not lead through the checkpoint, and torch says nothing."""

    class Hiding(Net):
        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = checkpoint(self.first, x.requires_grad_(), use_reentrant=True)
            return self.second(h)

    net = adapted(Hiding())
    before = snapshot(net)
    with pytest.raises(ConfigError, match=r"^first ran without a graph.*use_reentrant=False"):
        loi_init(net, closure_of(net, X.clone()), generator=seeded())
    assert_same(before, snapshot(net))


def test_trainable_parameters_beside_the_adapters_get_no_gradient() -> None:
    net: Any = Net()
    net.bias = nn.Parameter(torch.zeros(9, dtype=torch.float64))
    adapted(net)
    net.bias.requires_grad_(True)
    net.bias.grad = torch.ones_like(net.bias)
    loi_init(net, lambda: (net(X) + net.bias - T).square().mean(), generator=seeded())
    assert torch.equal(net.bias.grad, torch.ones_like(net.bias))
