"""StelLALinear with every option, what RiemannLoRALinear shares with it, and adapt / merge_adapters on whole models."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import AdamW
from transformers.pytorch_utils import Conv1D

from stiefelopt import (
    ConfigError,
    RiemannianWrapper,
    RiemannLoRALinear,
    StelLALinear,
    Stiefel,
    adapt,
    adapter_state_dict,
    disable_adapters,
    load_adapter_state_dict,
    merge_adapters,
    param_groups,
)
from stiefelopt.layers import LowRankLinear
from stiefelopt.layers.shared import SharedBase

torch.set_num_threads(1)

INITS = ("random", "zero", "pseudo-zero", "svd-major", "svd-minor")
# And "pseudo-zero" with correction="keep".
KEPT = "pseudo-zero kept"
STARTS = (*INITS, KEPT)
# RiemannLoRALinear with each of its corrections, by the same name.
CORRECTIONS = ("fold", "keep", "none")
every_init = pytest.mark.parametrize("init", INITS)
both_shapes_of_s = pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
# Both layers, however they start.
every_layer = pytest.mark.parametrize(
    ("init", "diagonal"),
    [
        *(pytest.param(i, d, id=f"{i}-{'diagonal' if d else 'full'}") for i in STARTS for d in (False, True)),
        *(pytest.param(c, False, id=c) for c in CORRECTIONS),
    ],
)
every_start = pytest.mark.parametrize("init", [*STARTS, *CORRECTIONS])
# A half-precision base takes no fold.
every_start_in_half = pytest.mark.parametrize("init", [*STARTS, "keep", "none"])
corrected = ("pseudo-zero", KEPT, "fold", "keep")
OUT, IN, R = 7, 10, 3


class LinearLike(nn.Module):
    """Not nn.Linear, but a linear module all the same."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + 1.0


class BufferedLinear(nn.Module):
    """A frozen linear module: its weight is a buffer."""

    weight: Tensor

    def __init__(self, twin: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = twin.in_features, twin.out_features
        self.register_buffer("weight", twin.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def linear(dtype: torch.dtype = torch.float32, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype)


def conv1d(seed: int = 0) -> Any:
    """transformers' Conv1D with the weight of `linear`."""
    twin = linear(seed=seed)
    base = Conv1D(OUT, IN)
    base.weight.data.copy_(twin.weight.detach().T)
    base.bias.data.copy_(twin.bias.detach())
    return base


def linear_like(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return LinearLike(IN, OUT)


BASES: dict[str, Callable[[], Any]] = {
    "Linear": linear,
    "no bias": lambda: linear(bias=False),
    "float64": lambda: linear(torch.float64),
    "Conv1D": conv1d,
    "linear-like": linear_like,
    "weight as buffer": lambda: BufferedLinear(linear()),
}
every_base = pytest.mark.parametrize("make", BASES.values(), ids=list(BASES))


def layer_on(
    base: nn.Module | SharedBase,
    r: int = R,
    alpha: float | None = 4.0,
    *,
    seed: int = 5,
    init: str = "random",
    **options: Any,
) -> Any:
    """StelLALinear with that init, or RiemannLoRALinear with that correction."""
    generator = torch.Generator().manual_seed(seed)
    if init in CORRECTIONS:
        options.pop("diagonal", None)
        return RiemannLoRALinear(base, r, alpha, correction=init, scale=0.8, generator=generator, **options)
    if init == KEPT:
        init, options["correction"] = "pseudo-zero", "keep"
    return StelLALinear(base, r, alpha, init=init, generator=generator, **options)


def trained(layer: Any, seed: int = 9) -> Any:
    """Factors as after training: U, V other points, S anything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in (layer.U, layer.V):
            factor.copy_(Stiefel().random_point(*factor.shape, dtype=factor.dtype, generator=generator))
        layer.S.copy_(torch.randn(layer.S.shape, generator=generator))
    return layer


def inputs(*batch: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    return torch.randn(*batch, IN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense_update(layer: Any) -> Tensor:
    """scale U S V^T, written out, with what lies beside it."""
    s = layer.S.detach().diag() if layer.S.ndim == 1 else layer.S.detach()
    update = layer.U.detach() @ s @ layer.V.detach().T
    return layer.scale * (update if layer.folds or layer.U0 is None else update - layer.U0 @ layer.V0.T)


def weight_of(base: Any) -> Tensor:
    """The weight as (out, in)."""
    weight: Tensor = base.weight.detach().clone()
    return weight.T if isinstance(base, Conv1D) else weight


def assert_near(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# The function


@every_base
@every_layer
def test_it_computes_what_the_formula_says(make: Callable[[], Any], init: str, diagonal: bool) -> None:
    base = make()
    layer = trained(layer_on(base, init=init, diagonal=diagonal))
    x = inputs(5, dtype=base.weight.dtype)
    assert_near(layer(x), base(x) + x @ dense_update(layer).T)
    assert (layer.r, layer.alpha, layer.scale) == (R, 4.0, 4.0 / 3)


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (2, 1, 4)])
@every_base
def test_inputs_of_any_rank(make: Callable[[], Any], batch: tuple[int, ...]) -> None:
    base = make()
    layer = trained(layer_on(base))
    x = inputs(*batch, dtype=base.weight.dtype)
    if isinstance(base, Conv1D) and batch == (0,):
        pytest.skip("transformers' Conv1D itself cannot view an empty batch")
    y = layer(x)
    assert y.shape == (*batch, OUT)
    assert_near(y, base(x) + x @ dense_update(layer).T)


def test_non_contiguous_inputs() -> None:
    layer = trained(layer_on(linear()))
    x = inputs(4, 6).transpose(0, 1)
    assert_near(layer(x), layer(x.contiguous()), 1e-6)


@both_shapes_of_s
def test_gradients_are_those_of_the_function(diagonal: bool) -> None:
    layer = trained(layer_on(linear(torch.float64), diagonal=diagonal))
    x = inputs(4, dtype=torch.float64).requires_grad_()

    def f(x: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"U": u, "S": s, "V": v}, (x,))

    assert torch.autograd.gradcheck(f, (x, layer.U, layer.S, layer.V))


@every_base
@every_layer
def test_the_factors_are_what_the_page_says(make: Callable[[], Any], init: str, diagonal: bool) -> None:
    base = make()
    layer = layer_on(base, init=init, diagonal=diagonal)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if not name.startswith("base")}
    assert shapes == {"U": (OUT, R), "S": (R,) if diagonal else (R, R), "V": (IN, R)}
    dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
    for factor in (layer.U, layer.S, layer.V):
        assert isinstance(factor, nn.Parameter)
        assert factor.dtype == dtype
        assert factor.requires_grad
    assert layer.base is base
    assert not any(p.requires_grad for p in base.parameters())
    Stiefel().check(layer.U)
    Stiefel().check(layer.V)


# Initialization


@every_base
@both_shapes_of_s
@pytest.mark.parametrize("init", ["random", "zero", "svd-major", "svd-minor"])
def test_s_and_the_base_weight_at_the_start(make: Callable[[], Any], init: str, diagonal: bool) -> None:
    base = make()
    before = weight_of(base)
    layer = layer_on(base, init=init, diagonal=diagonal)
    assert torch.equal(weight_of(base), before)
    expected = torch.zeros(R) if init == "zero" else torch.ones(R)
    assert torch.equal(layer.S.detach().float(), expected if diagonal else expected.diag())


@every_base
@both_shapes_of_s
def test_zero_starts_at_the_function_itself(make: Callable[[], Any], diagonal: bool) -> None:
    base = make()
    x = inputs(5, dtype=base.weight.dtype)
    before = base(x)
    assert torch.equal(layer_on(base, init="zero", diagonal=diagonal)(x), before)


@every_base
@both_shapes_of_s
@pytest.mark.parametrize("alpha", [None, 8.0])
def test_pseudo_zero_starts_at_the_function_itself(
    make: Callable[[], Any], diagonal: bool, alpha: float | None
) -> None:
    base = make()
    x = inputs(5, dtype=base.weight.dtype)
    before, weight = base(x).detach(), weight_of(base)
    layer = layer_on(base, alpha=alpha, init="pseudo-zero", diagonal=diagonal)
    assert torch.equal(layer.S.detach().float(), torch.ones(R) if diagonal else torch.eye(R))
    assert_near(layer(x).detach(), before, 1e-5)
    assert_near(weight_of(base), weight - layer.scale * layer.U.detach() @ layer.V.detach().T, 1e-6)
    assert layer.delta_weight().abs().max() == 0


@every_base
@pytest.mark.parametrize(("init", "part"), [("svd-major", slice(None, R)), ("svd-minor", slice(-R, None))])
def test_svd_inits_are_numpys_singular_vectors(make: Callable[[], Any], init: str, part: slice) -> None:
    base = make()
    u, s, vh = np.linalg.svd(weight_of(base).double().numpy(), full_matrices=False)
    layer = layer_on(base, init=init)
    ours_u, ours_v = layer.U.detach().double().numpy(), layer.V.detach().double().numpy()
    # Signs are free, but the same in U and V: u_i v_i^T is unique.
    for i, j in enumerate(range(*part.indices(len(s)))):
        np.testing.assert_allclose(np.outer(ours_u[:, i], ours_v[:, i]), np.outer(u[:, j], vh[j]), atol=2e-5)


def test_the_random_init_is_haar_like() -> None:
    """Mean zero in every entry and U, V independent: no signs fixed, no identity left in."""
    generator = torch.Generator().manual_seed(0)
    draws = [StelLALinear(linear(), 2, generator=generator) for _ in range(300)]
    for name in ("U", "V"):
        mean = torch.stack([getattr(d, name).detach() for d in draws]).mean(0)
        assert mean.abs().max() < 4 / math.sqrt(300 * 7)
    assert abs(torch.stack([(d.U[:, 0].sum() * d.V[:, 0].sum()).detach() for d in draws]).mean()) < 0.3


@every_start
def test_a_generator_makes_it_reproducible_and_spares_the_global_one(init: str) -> None:
    state = torch.get_rng_state()
    bases = [linear(), linear(), linear()]
    torch.set_rng_state(state)
    first, again, other = (layer_on(b, seed=s, init=init) for b, s in zip(bases, (5, 5, 6), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("U", "S", "V"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    if not init.startswith("svd"):
        assert not torch.equal(first.U, other.U)


def test_without_a_generator_the_global_seed_decides() -> None:
    layers = []
    for seed in (1, 1, 2):
        base = linear()
        torch.manual_seed(seed)
        layers.append(StelLALinear(base, R))
    assert torch.equal(layers[0].U, layers[1].U)
    assert not torch.equal(layers[0].U, layers[2].U)


@every_base
@every_layer
def test_reset_parameters_starts_again(make: Callable[[], Any], init: str, diagonal: bool) -> None:
    base = make()
    x = inputs(5, dtype=base.weight.dtype)
    original, fresh = weight_of(base), copy.deepcopy(base)
    layer = trained(layer_on(base, init=init, diagonal=diagonal))
    layer.merge()
    layer.reset_parameters(torch.Generator().manual_seed(11))
    assert not layer.merged
    reference = layer_on(fresh, seed=11, init=init, diagonal=diagonal)
    for name in ("U", "S", "V"):
        assert_near(getattr(layer, name).detach(), getattr(reference, name).detach(), 1e-6)
    assert_near(layer(x).detach(), reference(x).detach(), 1e-5)
    if init not in ("pseudo-zero", "fold"):
        assert torch.equal(weight_of(base), original)


def test_resetting_many_times_does_not_wear_the_base_weight() -> None:
    """Each pseudo-zero takes its correction out of the original weight, not of a rounded one."""
    base = linear(torch.bfloat16)
    original = base.weight.detach().clone()
    layer = layer_on(base, alpha=30.0, init="pseudo-zero")
    for seed in range(20):
        layer.reset_parameters(torch.Generator().manual_seed(seed))
    restored = base.weight.detach().float() + layer.scale * (layer.U @ layer.V.T).detach()
    one_rounding = (
        2**-8 * (layer.scale * (layer.U @ layer.V.T).detach().abs().max() + original.abs().max()).item()
    )
    assert (restored - original.float()).abs().max() <= one_rounding


# Options


@pytest.mark.parametrize(
    ("alpha", "use_rslora", "scale"),
    [(None, False, 1.0), (None, True, 2.0), (8, False, 2.0), (8.0, True, 4.0)],
)
def test_alpha_and_rslora_make_the_scale(alpha: float | None, use_rslora: bool, scale: float) -> None:
    layer = trained(StelLALinear(linear(), 4, alpha, use_rslora=use_rslora))
    assert (layer.alpha, layer.scale) == (4.0 if alpha is None else 8.0, scale)
    x = inputs(5)
    update = scale * layer.U @ layer.S @ layer.V.T
    assert_near(layer(x), layer.base(x) + x @ update.T)
    assert_near(layer.delta_weight(), update.detach())


def test_dropout_is_on_the_adapters_input_and_in_training_only() -> None:
    layer = trained(layer_on(linear(), dropout=0.5))
    x = inputs(64)
    layer.eval()
    assert_near(layer(x), layer.base(x) + x @ dense_update(layer).T)
    layer.train()
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    assert_near(y, layer.base(x) + dropped @ dense_update(layer).T)
    assert not torch.equal(layer(x), y)


@pytest.mark.parametrize(("given", "stored"), [(None, IN), (64, 64)])
def test_reference_dim_is_stored_and_reaches_the_groups(given: int | None, stored: int) -> None:
    layer = layer_on(linear(), reference_dim=given)
    assert layer.reference_dim == stored
    groups = [g for g in param_groups(layer) if "manifold" in g]
    assert [g["reference_dim"] for g in groups] == [stored]
    assert {id(p) for g in groups for p in g["params"]} == {id(layer.U), id(layer.V)}


@pytest.mark.parametrize("r", [1, OUT])
@every_start
def test_the_smallest_and_the_largest_rank(r: int, init: str) -> None:
    layer = layer_on(linear(), r, init=init)
    wrapper = RiemannianWrapper(AdamW(param_groups(layer, lr=1e-2)))
    for _ in range(3):
        wrapper.zero_grad()
        layer(inputs(4)).square().mean().backward()
        wrapper.step()
    assert max(wrapper.residuals().values()) < 2e-6


def test_repr_says_rank_and_scale() -> None:
    text = repr(layer_on(linear()))
    assert "r=3" in text
    assert "alpha=4" in text
    assert "Linear(in_features=10" in text


# Precision

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
@every_start_in_half
def test_a_half_base_has_float32_factors(dtype: torch.dtype, init: str) -> None:
    base = linear(dtype)
    layer = trained(layer_on(base, init=init))
    assert {layer.U.dtype, layer.S.dtype, layer.V.dtype} == {torch.float32}
    assert base.weight.dtype == dtype
    x = inputs(5, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    exact = base(x).float() + x.float() @ dense_update(layer).T
    assert_near(y.float(), exact, 8 * torch.finfo(dtype).eps * exact.abs().max().item())
    # The sum is rounded, once, and not the update before it.
    assert bool(((y.float() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all())
    y.float().square().sum().backward()
    assert layer.U.grad is not None
    assert layer.U.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "to_half",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to(dtype=torch.float16),
    ],
    ids=["half", "bfloat16", "to", "to dtype="],
)
@pytest.mark.parametrize("init", ["random", "pseudo-zero", *CORRECTIONS])
def test_half_and_bfloat16_leave_the_factors_alone(
    to_half: Callable[[nn.Module], nn.Module], init: str
) -> None:
    layer = trained(layer_on(linear(), init=init))
    layer(inputs(4)).sum().backward()
    before = {n: p.detach().clone() for n, p in layer.named_parameters() if "base" not in n}
    model = to_half(nn.Sequential(layer))
    assert weight_of(layer.base).dtype in HALVES
    for name, old in before.items():
        factor = getattr(layer, name)
        assert torch.equal(factor, old)
        assert factor.dtype == factor.grad.dtype == torch.float32
    x = inputs(5, dtype=weight_of(layer.base).dtype)
    assert model(x).dtype == x.dtype
    # The net update is still the one of float32: the correction was not rounded either.
    assert layer.delta_weight().dtype == torch.float32


@pytest.mark.parametrize("cls", [StelLALinear, RiemannLoRALinear])
def test_wider_factors_are_points_of_their_precision(cls: Any) -> None:
    """After .double(), or loaded from a narrower state: else the optimizer would refuse them."""
    original = nn.Sequential(nn.Linear(12, 20))
    x = torch.randn(5, 12)
    models: dict[str, Any] = {
        name: copy.deepcopy(original) for name in ("double", "adapter state", "state", "rounded")
    }
    for name, model in models.items():
        models[name] = adapt(
            model.double() if name in ("adapter state", "state") else model, cls, target_modules=["0"], r=2
        )
    source: Any = adapt(copy.deepcopy(original), cls, target_modules=["0"], r=2)
    with torch.no_grad():
        before = models["double"](x)
    models["double"].double()
    assert_near(models["double"](x.double()).float(), before)
    load_adapter_state_dict(models["adapter state"], adapter_state_dict(source))
    rounded = {name: t.bfloat16() for name, t in adapter_state_dict(source).items()}
    load_adapter_state_dict(models["rounded"], rounded)
    models["state"].load_state_dict(source.state_dict())
    for name, model in models.items():
        groups = param_groups(model, lr=1e-3)
        worst = max(RiemannianWrapper(AdamW(groups)).residuals().values())
        assert worst < 10 * torch.finfo(torch.float32 if name == "rounded" else torch.float64).eps
        for factor, saved in (("U", source[0].U), ("V", source[0].V)):
            if name != "double":
                off = (getattr(model[0], factor) - saved).abs().max()
                assert off < (1e-2 if name == "rounded" else 1e-6)


def test_factors_that_are_no_points_stay_what_they_are() -> None:
    layer = layer_on(linear())
    with torch.no_grad():
        layer.U.mul_(1.01)
    old = layer.U.detach().clone()
    layer.double()
    assert torch.equal(layer.U, old.double())


def test_double_is_honoured_and_float_comes_back() -> None:
    layer = trained(layer_on(linear(), init="pseudo-zero"))
    x = inputs(5)
    y = layer(x)
    layer.double()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert_near(layer(x.double()).float(), y)
    assert layer.delta_weight().dtype == torch.float64
    layer.float()
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert_near(layer(x), y)


@both_shapes_of_s
@pytest.mark.parametrize("merged", [False, True])
@every_base
def test_autocast(make: Callable[[], Any], diagonal: bool, merged: bool) -> None:
    base = make()
    if base.weight.dtype == torch.float64:
        pytest.skip("autocast leaves float64 alone")
    layer = trained(layer_on(base, diagonal=diagonal))
    if merged:
        layer.merge()
    x = inputs(5)
    exact = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        plain = base(x)
        y = layer(x)
    assert y.dtype == plain.dtype
    assert_near(y.detach().float(), exact, 0.05 * exact.abs().max().item())
    if not merged:
        y.float().sum().backward()
        assert layer.V.grad is not None
        assert layer.V.grad.dtype == torch.float32


@pytest.mark.parametrize("init", ["random", "pseudo-zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_merging_and_exporting_inside_autocast_rounds_nothing(init: str, dtype: torch.dtype) -> None:
    layer: Any = trained(layer_on(nn.Linear(9, 7).to(dtype), init=init))
    delta, pair = layer.delta_weight(), layer.to_lora()
    layer.merge()
    merged = layer.base.weight.detach().clone()
    layer.unmerge()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.delta_weight(), delta)
        assert all(map(torch.equal, layer.to_lora(), pair))
        layer.merge()
    assert torch.equal(layer.base.weight, merged)


# Merging


@every_base
@every_layer
def test_merge_and_unmerge(make: Callable[[], Any], init: str, diagonal: bool) -> None:
    base = make()
    x = inputs(5, dtype=base.weight.dtype)
    original = weight_of(base)
    layer = trained(layer_on(base, init=init, diagonal=diagonal, dropout=0.5)).eval()
    started, y = base.weight.detach().clone(), layer(x).detach()
    states = [layer.merged]
    for _ in range(2):
        layer.merge()
        states.append(layer.merged)
    assert_near(layer(x).detach(), y)
    assert_near(base(x).detach(), y)
    assert_near(layer.delta_weight(), weight_of(base) - original, 2e-6)
    assert_near(layer.train()(x).detach(), y)
    for _ in range(2):
        layer.unmerge()
        states.append(layer.merged)
    assert states == [False, True, True, False, False]
    assert torch.equal(base.weight, started)
    assert_near(layer.eval()(x).detach(), y, 1e-6)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@every_init
def test_unmerging_is_bitwise_in_every_dtype(dtype: torch.dtype, init: str) -> None:
    base = linear(dtype)
    original = weight_of(base)
    layer = trained(layer_on(base, init=init))
    started = base.weight.detach().clone()
    layer.merge()
    merged = base.weight.detach().clone()
    assert merged.dtype == dtype
    assert not torch.equal(merged, started)
    tolerance = 4 * torch.finfo(dtype).eps * max(1.0, merged.abs().max().item(), started.abs().max().item())
    assert_near((merged - original).double(), layer.delta_weight().double(), tolerance)
    layer.unmerge()
    assert torch.equal(base.weight, started)


def test_merged_in_float32_and_cast_to_half_is_unmerged_to_the_casted_original() -> None:
    base = linear()
    layer = trained(layer_on(base))
    original = base.weight.detach().clone()
    layer.merge()
    layer.bfloat16()
    layer.unmerge()
    assert torch.equal(base.weight, original.bfloat16())


@every_base
@every_layer
def test_to_lora_is_the_net_change(make: Callable[[], Any], init: str, diagonal: bool) -> None:
    layer = trained(layer_on(make(), init=init, diagonal=diagonal))
    a, b = layer.to_lora()
    k = 2 * R if init in corrected else R
    assert (a.shape, b.shape) == ((k, IN), (OUT, k))
    assert a.is_contiguous()
    assert b.is_contiguous()
    assert not a.requires_grad
    assert_near(b @ a, layer.delta_weight(), 1e-6)
    a.zero_()
    b.zero_()
    assert layer.U.abs().max() > 0  # copies, not views


@every_layer
def test_conv1d_is_the_linear_with_the_transposed_weight(init: str, diagonal: bool) -> None:
    ours, twin = (layer_on(b, init=init, diagonal=diagonal) for b in (conv1d(), linear()))
    x = inputs(2, 5)
    assert_near(ours(x), twin(x))
    assert_near(ours.delta_weight(), twin.delta_weight())
    ours.merge()
    twin.merge()
    assert_near(weight_of(ours.base), weight_of(twin.base))


@every_init
def test_a_square_conv1d_is_not_taken_for_its_transpose(init: str) -> None:
    """Where both orientations fit, only the numbers can tell."""
    plain, base = nn.Linear(IN, IN), Conv1D(IN, IN)
    base.weight.data.copy_(plain.weight.detach().T)
    base.bias.data.copy_(plain.bias.detach())
    ours, twin = (trained(layer_on(b, init=init)) for b in (base, plain))
    x = inputs(5)
    assert_near(ours(x), twin(x))
    ours.merge()
    twin.merge()
    assert_near(ours(x), twin(x))
    assert_near(weight_of(ours.base), weight_of(twin.base))


# Refused


class WrongShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 6
        self.weight = nn.Parameter(torch.zeros(4, 6))


class IntegerWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 6
        self.register_buffer("weight", torch.zeros(6, 4, dtype=torch.int8))


NOT_LINEAR: dict[str, Callable[[], nn.Module]] = {
    "Embedding": lambda: nn.Embedding(5, 4),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "Conv2d": lambda: nn.Conv2d(3, 4, 1),
    "Conv1d": lambda: nn.Conv1d(3, 4, 1),
    "Identity": nn.Identity,
    "LSTM": lambda: nn.LSTM(3, 4),
    "Bilinear": lambda: nn.Bilinear(3, 4, 5),
    "Sequential": lambda: nn.Sequential(nn.Linear(4, 4)),
    "WrongShape": WrongShape,
    "IntegerWeight": IntegerWeight,
}


@pytest.mark.parametrize("make", NOT_LINEAR.values(), ids=list(NOT_LINEAR))
def test_a_base_that_is_not_linear_is_refused_and_left_trainable(make: Callable[[], Any]) -> None:
    base = make()
    with pytest.raises(ConfigError, match=rf"{type(base).__name__}.*linear module is needed.*out_features"):
        StelLALinear(base, 2)
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_a_weight_that_is_not_in_a_plain_dtype_is_refused_by_it(dtype: torch.dtype) -> None:
    """Quantized weights are scaled by other numbers: what is added to them is not what was meant."""
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(torch.zeros(8, 8).to(dtype), requires_grad=False)
    with pytest.raises(ConfigError, match=rf"Linear.*{dtype}.*float16, bfloat16, float32 or float64"):
        RiemannLoRALinear(model[1], 2)
    with pytest.raises(ConfigError, match=rf"^1: .*{dtype}"):
        adapt(model, target_modules="all-linear", r=2)


class Linear4bit(nn.Linear):
    """As in bitsandbytes: two numbers a byte, in a column."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        packed = torch.zeros(in_features * out_features // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


class WithoutWeight(nn.Module):
    """As in GPTQ, AWQ and HQQ."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 8
        self.register_buffer(name, torch.zeros(8, 1, dtype=torch.int32))


class QuantizedTensor(Tensor):
    """As in torchao: it says that it is float32."""


def quantized_by_subclass() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(QuantizedTensor), requires_grad=False)
    return linear


QUANTIZED: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes": lambda: Linear4bit(8, 8),
    "GPTQ and AWQ": lambda: WithoutWeight("qweight"),
    "HQQ": lambda: WithoutWeight("W_q"),
    "packed integers": lambda: WithoutWeight("weight"),
    "torchao": quantized_by_subclass,
}


@pytest.mark.parametrize("make", QUANTIZED.values(), ids=list(QUANTIZED))
@pytest.mark.parametrize("targets", ["all-linear", ["1"]])
def test_quantized_modules_are_refused_by_name_and_never_passed_over(
    make: Callable[[], nn.Module], targets: Any
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), make())
    before = everything(model)
    with pytest.raises(ConfigError, match=r"^1: the base is a .*(packed|quantized).*without quantization"):
        adapt(model, target_modules=targets, r=2)
    assert_unchanged(model, before)
    adapt(model, target_modules="all-linear", exclude_modules=["1"], r=2)


COMPUTED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "parametrizations.weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "prune": lambda m: prune.random_unstructured(m, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("make", COMPUTED.values(), ids=list(COMPUTED))
def test_a_weight_that_is_computed_at_every_use_is_refused(make: Callable[..., nn.Module]) -> None:
    """Merging into it, or folding, would be lost at the next forward."""
    model = nn.Sequential(nn.Linear(8, 8), make(nn.Linear(8, 8)))
    before = everything(model)
    with pytest.raises(ConfigError, match=r"^1: .*computed from others.*remove_parametrizations"):
        adapt(model, target_modules="all-linear", r=2, init="pseudo-zero")
    assert_unchanged(model, before)
    adapt(model, target_modules="0", r=2)


# Begun on meta


@pytest.mark.parametrize("init", corrected)
def test_a_layer_begun_on_meta_is_corrected_once_it_has_been_filled(init: str) -> None:
    with torch.device("meta"):
        base = nn.Linear(IN, OUT)
    layer: Any = layer_on(base, init=init).to_empty(device="cpu")
    twin = linear()
    layer.base.load_state_dict(twin.state_dict())
    layer.reset_parameters(torch.Generator().manual_seed(1))
    x = inputs(5)
    assert_near(layer(x).detach(), twin(x).detach())
    expected = trained(layer).delta_weight() + twin.weight.detach()
    assert_near(weight_of(merge_adapters(layer)), expected)


# Copies and state


@every_start
@pytest.mark.parametrize("merged", [False, True])
def test_a_deep_copy_is_independent_and_complete(init: str, merged: bool) -> None:
    layer = trained(layer_on(linear(), init=init, reference_dim=77))
    x = inputs(5)
    y = layer(x).detach()
    started = weight_of(layer.base)
    if merged:
        layer.merge()
    twin = copy.deepcopy(layer)
    trained(layer, seed=21)
    layer.unmerge()
    nn.init.zeros_(layer.get_parameter("base.weight"))
    assert_near(twin(x).detach(), y)
    twin.unmerge()
    assert torch.equal(weight_of(twin.base), started)
    declared = [g.get("reference_dim", g.get("gradient")) for g in param_groups(twin) if "manifold" in g]
    assert declared == ["projected" if init in CORRECTIONS else 77]


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_base
@both_shapes_of_s
@pytest.mark.parametrize("saved_init", ["random", "zero", "pseudo-zero", KEPT])
@pytest.mark.parametrize("live_init", ["random", "pseudo-zero", KEPT, "svd-major"])
def test_a_state_dict_round_trip_gives_the_same_function(
    make: Callable[[], Any], diagonal: bool, saved_init: str, live_init: str
) -> None:
    saved = trained(layer_on(make(), init=saved_init, diagonal=diagonal))
    live = layer_on(make(), seed=33, init=live_init, diagonal=diagonal)
    live.load_state_dict(through_a_file(saved.state_dict()))
    x = inputs(5, dtype=saved.U.dtype)
    assert torch.equal(live(x), saved(x))
    assert_near(live.delta_weight(), saved.delta_weight(), 1e-7)
    assert live.U.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("saved", "live"), [(KEPT, "random"), (KEPT, "pseudo-zero"), ("pseudo-zero", KEPT)])
def test_a_state_without_metadata_loads_across_inits(saved: str, live: str, dtype: torch.dtype) -> None:
    """safetensors drops what torch.save keeps beside the tensors."""
    source, target = (
        trained(layer_on(linear(dtype), init=init), seed=i) for i, init in enumerate((saved, live))
    )
    target.load_state_dict(dict(source.state_dict()))
    x = inputs(5, dtype=dtype)
    assert_near(target(x).detach(), source(x).detach())


def test_a_state_saved_while_merged_does_not_count_the_update_twice() -> None:
    saved, live = trained(layer_on(linear())), layer_on(linear(), seed=8)
    x = inputs(5)
    y = saved(x).detach()
    saved.merge()
    live.load_state_dict(through_a_file(saved.state_dict()))
    assert_near(live(x).detach(), y)


def test_loading_into_a_merged_layer() -> None:
    saved, live = trained(layer_on(linear())), trained(layer_on(linear()), seed=40)
    live.merge()
    live.load_state_dict(saved.state_dict())
    x = inputs(5)
    assert_near(live(x), saved(x))
    assert not live.merged


def test_the_state_dict_is_strict() -> None:
    layer = layer_on(linear())
    state = layer.state_dict()
    assert set(state) == {"U", "S", "V", "base.weight", "base.bias"}
    state.pop("V")
    with pytest.raises(RuntimeError, match="V"):
        layer_on(linear()).load_state_dict(state)
    assert {"U0", "V0"} <= set(layer_on(linear(), init="pseudo-zero").state_dict())


@every_base
@every_init
def test_training_lowers_the_loss_and_keeps_the_bases_orthonormal(make: Callable[[], Any], init: str) -> None:
    base = make()
    layer = layer_on(base, init=init, dropout=0.05)
    before = weight_of(base)
    x = inputs(64, dtype=base.weight.dtype)
    generator = torch.Generator().manual_seed(1)
    change = (
        Stiefel().random_point(OUT, 2, generator=generator)
        @ Stiefel().random_point(IN, 2, generator=generator).mT
    )
    target = (base(x) + x @ change.to(x).T).detach()
    wrapper = RiemannianWrapper(AdamW(param_groups(layer, lr=0.02)))
    losses = []
    for _ in range(60):
        wrapper.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        wrapper.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert max(wrapper.residuals().values()) < 2e-6
    assert torch.equal(weight_of(base), before)


# adapt


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.dense = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.out(torch.tanh(self.dense(self.query(x) * self.key(x)))))


class Model(nn.Module):
    """Embedding, two blocks, a head that is the output embedding."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.classifier = nn.Linear(8, 3)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return torch.cat((self.classifier(x), self.lm_head(x)), -1)


IDS = torch.arange(10).reshape(2, 5)
LINEARS = ("query", "key", "dense", "out")
EVERY = {f"layers.{i}.{name}" for i in range(2) for name in LINEARS}


def adapted_names(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, StelLALinear)}


TARGETS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "endings": ({"target_modules": ["query", "out"]}, {n for n in EVERY if n.endswith(("query", "out"))}),
    "a longer ending": ({"target_modules": ["1.query"]}, {"layers.1.query"}),
    "a whole name": ({"target_modules": ["layers.0.dense"]}, {"layers.0.dense"}),
    "endings are whole words": ({"target_modules": ["y", "key"]}, {n for n in EVERY if n.endswith("key")}),
    "a tuple": ({"target_modules": ("key",)}, {n for n in EVERY if n.endswith("key")}),
    "a regex": (
        {"target_modules": r"layers\.\d+\.(query|key)"},
        {n for n in EVERY if n.endswith(("query", "key"))},
    ),
    "a regex is no prefix": (
        {"target_modules": r"layers\.\d+\.(query|ou)"},
        {n for n in EVERY if n.endswith("query")},
    ),
    "a regex matches in full": ({"target_modules": r".*\.0\.\w+y"}, {"layers.0.query", "layers.0.key"}),
    "all-linear": ({"target_modules": "all-linear"}, {*EVERY, "classifier"}),
    "all-linear without a saved module": (
        {"target_modules": "all-linear", "modules_to_save": ["classifier"]},
        EVERY,
    ),
    "without an ending": (
        {"target_modules": "all-linear", "exclude_modules": ["classifier", "key"]},
        {n for n in EVERY if not n.endswith("key")},
    ),
    "without a prefix": (
        {"target_modules": ["query"], "exclude_modules": r"layers\.1"},
        {n for n in EVERY if n.endswith("query")},
    ),
    "without a regex": (
        {"target_modules": "all-linear", "exclude_modules": r"layers\.1\..*|classifier"},
        {n for n in EVERY if n.startswith("layers.0")},
    ),
    "PEFT's default of modules_to_save": (
        {"target_modules": ["key"], "modules_to_save": None},
        {n for n in EVERY if n.endswith("key")},
    ),
    "all-linear in capitals, as in PEFT": ({"target_modules": "ALL-Linear"}, {*EVERY, "classifier"}),
    "the output embedding by name": ({"target_modules": ["lm_head"]}, {"lm_head"}),
}


@pytest.mark.parametrize(("options", "expected"), TARGETS.values(), ids=list(TARGETS))
def test_target_modules(options: dict[str, Any], expected: set[str]) -> None:
    model = Model()
    assert adapt(model, StelLALinear, r=2, **options) is model
    assert adapted_names(model) == expected


def test_what_trains_after_adapt() -> None:
    model = adapt(Model(), target_modules=["query"], modules_to_save=["classifier", "norm"], r=2)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    factors = {f"layers.{i}.query.{f}" for i in range(2) for f in "USV"}
    norms = {f"layers.{i}.norm.{w}" for i in range(2) for w in ("weight", "bias")}
    assert trainable == factors | norms | {"classifier.weight", "classifier.bias"}


def test_a_rank_may_be_an_integer_of_any_kind() -> None:
    layer: Any = adapt(Model(), target_modules=["query"], r=np.int64(2)).get_submodule("layers.0.query")
    assert (layer.r, type(layer.r), layer.S.shape) == (2, int, (2, 2))


def test_the_default_layer_is_stella_and_options_reach_it() -> None:
    model = adapt(
        Model(), target_modules=["query"], r=2, alpha=6, dropout=0.25, diagonal=True, init="svd-minor"
    )
    layer = model.get_submodule("layers.0.query")
    assert isinstance(layer, StelLALinear)
    assert (layer.r, layer.alpha, layer.scale, layer.init, layer.diagonal) == (2, 6.0, 3.0, "svd-minor", True)


@pytest.mark.parametrize(
    ("targets", "expected"), [("all-linear", 8), (["out"], 16), (["out", "dense", "query"], 8)]
)
def test_reference_dim_is_the_commonest_width_printed_and_stored(
    targets: Any, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapt(Model(), target_modules=targets, r=2)
    assert f"reference_dim = {expected}" in capsys.readouterr().out
    assert {m.reference_dim for m in model.modules() if isinstance(m, StelLALinear)} == {expected}
    assert {g["reference_dim"] for g in param_groups(model) if "manifold" in g} == {expected}


def test_a_given_reference_dim_is_kept() -> None:
    model = adapt(Model(), target_modules="all-linear", r=2, reference_dim=768)
    assert {m.reference_dim for m in model.modules() if isinstance(m, StelLALinear)} == {768}


@pytest.mark.parametrize("init", ["zero", "pseudo-zero"])
def test_the_adapted_model_starts_at_the_same_function(init: str) -> None:
    model = Model()
    before = model(IDS).detach()
    adapt(model, target_modules="all-linear", r=2, alpha=4, init=init)
    assert_near(model(IDS).detach(), before)


def everything(model: nn.Module) -> Any:
    """All that a refused adapt must leave alone."""
    return (
        {n: (type(m), id(m)) for n, m in model.named_modules()},
        {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()},
        {k for k in model.__dict__ if "stiefelopt" in k},
    )


def assert_unchanged(model: nn.Module, before: Any) -> None:
    modules, parameters, marks = everything(model)
    assert modules == before[0]
    assert marks == before[2]
    assert parameters.keys() == before[1].keys()
    for name, (requires_grad, value) in parameters.items():
        assert requires_grad == before[1][name][0], name
        assert torch.equal(value, before[1][name][1]), name


BAD_ADAPT: dict[str, tuple[dict[str, Any], str]] = {
    "nothing matches": ({"target_modules": ["q_proj"], "r": 2}, r"q_proj.*layers\.0\.query"),
    "a regex must match in full": ({"target_modules": "query", "r": 2}, r"'query' matches no module.*layers"),
    "an empty list": ({"target_modules": [], "r": 2}, r"matches no module"),
    "an invalid regex": ({"target_modules": "layers.(", "r": 2}, r"layers\.\("),
    "everything excluded": (
        {"target_modules": ["key"], "exclude_modules": ["key"], "r": 2},
        r"key.*matches no module",
    ),
    "a match that is not linear": ({"target_modules": ["norm"], "r": 2}, r"LayerNorm.*linear module"),
    "an embedding": ({"target_modules": ["query", "embed"], "r": 2}, r"Embedding.*linear module"),
    "no such module to save": (
        {"target_modules": ["key"], "modules_to_save": ["score"], "r": 2},
        r"modules_to_save.*'score'",
    ),
    "no rank": ({"target_modules": ["key"]}, r"rank.*r="),
    "a rank too large for one": (
        {"target_modules": "all-linear", "r": 4},
        r"^classifier: the rank is 4.*from 1 to 3.*exclude_modules.*modules_to_save",
    ),
    "no targets": ({"target_modules": None, "r": 2}, r"needs target_modules.*'?all-linear"),
    "the same, with corrected bases": (
        {"target_modules": "all-linear", "r": 4, "init": "pseudo-zero"},
        r"rank is 4.*from 1 to 3",
    ),
    "an unknown init": (
        {"target_modules": ["key"], "r": 2, "init": "orthogonal"},
        r"'orthogonal'.*'pseudo-zero'",
    ),
    "a seed for a generator": (
        {"target_modules": ["key"], "r": 2, "generator": 3},
        r"generator is 3; pass torch\.Generator\(\)",
    ),
    "a reference_dim that is none": (
        {"target_modules": ["key"], "r": 2, "reference_dim": 0},
        r"reference_dim.*0",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_ADAPT.values(), ids=list(BAD_ADAPT))
def test_a_refused_adapt_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = Model()
    model.embed.requires_grad_(False)
    before = everything(model)
    with pytest.raises(ConfigError, match=message):
        adapt(model, StelLALinear, **options)
    assert_unchanged(model, before)


def test_an_adapt_that_fails_half_way_puts_the_very_same_weights_back() -> None:
    model = nn.Sequential(nn.Linear(8, 8), BufferedLinear(nn.Linear(8, 8)), nn.Linear(8, 8).bfloat16())
    weights, before = [m.weight for m in model], everything(model)
    with pytest.raises(ConfigError, match=r"'fold' rounds away"):
        adapt(model, RiemannLoRALinear, target_modules="all-linear", r=2, correction="fold")
    assert_unchanged(model, before)
    assert all(m.weight is weight for m, weight in zip(model, weights, strict=True))


def test_singular_vectors_of_a_weight_with_nan_are_refused() -> None:
    model = Model()
    nn.init.constant_(model.get_parameter("layers.1.key.weight"), math.nan)
    weight = model.get_parameter("layers.0.key.weight")
    with pytest.raises(ConfigError, match=r"^layers\.1\.key: init='svd-major'.*NaN or infinite"):
        adapt(model, target_modules=["key"], r=2, init="svd-major")
    assert model.get_parameter("layers.0.key.weight") is weight
    assert weight.requires_grad


@pytest.mark.parametrize("targets", ["all-linear", ["0"]])
def test_lazy_modules_beside_the_adapted_ones_are_frozen_or_saved_like_others(targets: Any) -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8), nn.LazyLinear(3))
    adapt(model, target_modules=targets, modules_to_save=["2"], r=2, init="pseudo-zero")
    model(torch.randn(4, 8)).sum().backward()
    assert (model[1].weight.grad is None, model[2].weight.grad is None) == (True, False)


class Gated(LinearLike):
    """A linear module with a linear module in it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.gate = nn.Linear(in_features, out_features)


def test_a_linear_module_compiled_by_itself_is_refused() -> None:
    """What was compiled is called, whatever takes its place."""
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1] = torch.compile(model[1], backend="eager")
    with pytest.raises(ConfigError, match=r"^1: .*compiled by itself.*first, then compile"):
        adapt(model, target_modules="all-linear", r=2)


def test_matches_inside_matches_are_refused() -> None:
    model = nn.Sequential(Gated(8, 8))
    before = everything(model)
    with pytest.raises(ConfigError, match=r"matches 0 and 0\.gate inside it.*exclude_modules"):
        adapt(model, target_modules="all-linear", r=2)
    assert_unchanged(model, before)
    assert adapted_names(adapt(model, target_modules="all-linear", exclude_modules=["gate"], r=2)) == {"0"}


def test_adapting_twice_is_refused_with_the_way_out() -> None:
    model = adapt(Model(), target_modules=["query"], r=2)
    before = everything(model)
    with pytest.raises(ConfigError, match=r"layers\.0\.query.*merge_adapters"):
        adapt(model, target_modules=["key"], r=2)
    assert_unchanged(model, before)
    adapt(merge_adapters(model), target_modules=["key"], r=2)
    assert adapted_names(model) == {"layers.0.key", "layers.1.key"}


def test_a_base_weight_shared_with_another_module_is_not_corrected_behind_its_back() -> None:
    """Tied embeddings: taking X0 out of the head must not change the embedding."""
    model = Model()
    model.lm_head.weight = model.embed.weight
    before = model(IDS).detach()
    with contextlib.suppress(ConfigError):  # refused, or right
        adapt(model, target_modules=["lm_head"], r=2, alpha=8, init="pseudo-zero")
    assert_near(model(IDS).detach(), before)


def test_a_module_used_in_two_places_is_adapted_in_both() -> None:
    shared: Any = nn.Linear(8, 8)
    model: Any = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(8, 8)})
    adapt(model, target_modules="all-linear", r=2)
    assert model["a"] is model["b"]
    assert isinstance(model["b"], StelLALinear)
    merge_adapters(model)
    assert model["a"] is model["b"] is shared


@pytest.mark.parametrize("targets", ["all-linear", ["linear1", "linear2"]])
def test_torchs_encoder_layer_gives_in_eval_what_it_gives_in_training(targets: Any) -> None:
    """Its fast path reads weights past the forward of its linear modules; an adapter must not be lost there."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    adapt(model, target_modules=targets, r=4, alpha=64)
    x = torch.randn(2, 5, 16)
    expected = model.train()(x).detach()
    assert_near(model.eval()(x).detach(), expected)
    with torch.no_grad():
        assert_near(model(x), expected)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("layer", [StelLALinear, RiemannLoRALinear])
def test_torchs_encoder_packs_padded_sequences(layer: Any) -> None:
    """In eval, given a mask, it hands nested tensors to its linear modules."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    adapt(model, layer, target_modules=["linear1", "linear2"], r=4, alpha=64)
    for m in model.modules():
        if isinstance(m, layer):
            trained(m)
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model.train()(x, src_key_padding_mask=mask).detach() * ~mask[..., None]
    with torch.no_grad():
        assert_near(model.eval()(x, src_key_padding_mask=mask), expected)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
@pytest.mark.parametrize("init", ["random", "fold", "keep"])
def test_nested_inputs_give_the_rows_and_gradients_of_plain_ones(layout: torch.layout, init: str) -> None:
    layer, twin = (trained(layer_on(linear(), init=init)) for _ in range(2))
    rows = [inputs(3, seed=1), inputs(4, seed=2)]
    x = torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)
    y = layer(x) + layer.base(x)  # of the same lengths as far as torch knows
    plain = [part.clone().requires_grad_() for part in rows]
    expected = [twin(part) + twin.base(part) for part in plain]
    for got, want in zip(y.unbind(), expected, strict=True):
        assert_near(got.detach(), want.detach())
    torch.cat([part.square() for part in y.unbind()]).sum().backward()
    torch.cat([part.square() for part in expected]).sum().backward()
    grads = [*(p.grad for p in (layer.U, layer.S, layer.V)), *(x.grad.unbind() if x.grad is not None else ())]
    for got, want in zip(grads, [p.grad for p in (twin.U, twin.S, twin.V, *plain)], strict=True):
        assert_near(got, want, 1e-3)


def test_every_adapted_layer_gets_a_gradient_in_torchs_encoder_layer() -> None:
    """MultiheadAttention reads out_proj.weight directly: an adapter there would never act."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    adapt(model, target_modules="all-linear", r=4)
    model(torch.randn(2, 5, 16)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_an_adapter_that_cannot_act_is_refused() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    before = everything(model)
    with pytest.raises(ConfigError, match="out_proj"):
        adapt(model, target_modules=["out_proj"], r=4)
    assert_unchanged(model, before)


def disturb(model: nn.Module) -> nn.Module:
    for i, m in enumerate(m for m in model.modules() if isinstance(m, StelLALinear)):
        trained(m, seed=50 + i)
    return model


@every_init
def test_merge_adapters_gives_plain_modules_with_the_same_outputs(init: str) -> None:
    model = Model()
    kinds = {n: type(m) for n, m in model.named_modules()}
    objects = {n: id(m) for n, m in model.named_modules()}
    disturb(adapt(model, target_modules="all-linear", r=2, init=init, modules_to_save=["classifier"]))
    expected = model(IDS).detach()
    assert merge_adapters(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    assert {n: id(m) for n, m in model.named_modules()} == objects
    assert_near(model(IDS).detach(), expected)


def test_merge_adapters_of_a_model_that_is_merged_in_part() -> None:
    model = disturb(adapt(Model(), target_modules="all-linear", r=2))
    expected = model(IDS).detach()
    first = model.get_submodule("layers.0.query")
    assert isinstance(first, StelLALinear)
    first.merge()
    assert_near(merge_adapters(model)(IDS).detach(), expected)


def test_merge_adapters_of_a_layer_and_of_a_plain_model() -> None:
    layer = trained(layer_on(linear()))
    x = inputs(5)
    expected = layer(x).detach()
    plain: Any = merge_adapters(layer)
    assert type(plain) is nn.Linear
    assert_near(plain(x).detach(), expected)
    with pytest.raises(ConfigError, match=r"no adapted layer.*adapt\("):
        merge_adapters(Model())


# A base that somebody else holds


@pytest.mark.parametrize("init", [KEPT, "svd-minor", "keep", "none"])
@pytest.mark.parametrize(
    "make", [linear, conv1d, BASES["weight as buffer"]], ids=["Linear", "Conv1D", "buffer"]
)
def test_layers_on_one_shared_base(make: Callable[[], Any], init: str) -> None:
    """They read it, merge into it one after the other and come out again in the opposite order; it is no submodule."""
    base = make()
    before = base.weight
    trainable = {name: p.requires_grad for name, p in base.named_parameters()}
    first, second = (trained(layer_on(SharedBase(base), init=init, seed=s), seed=s) for s in (1, 2))
    assert {name: p.requires_grad for name, p in base.named_parameters()} == trainable
    assert all(not name.startswith("base") for name in first.state_dict())
    x = inputs(4)
    expected = second.add_update(first(x), x).detach()
    first.merge()
    second.merge()
    assert_near(base(x).detach(), expected)
    assert first.state_dict().keys() == layer_on(SharedBase(make()), init=init).state_dict().keys()
    with pytest.raises(ConfigError, match=r"unmerge_adapter\(\) first"):
        first.load_factors(second.factor_state())
    second.unmerge()
    first.unmerge()
    assert base.weight is before


def test_nothing_is_folded_into_a_shared_base() -> None:
    for make in (StelLALinear, RiemannLoRALinear):
        with pytest.raises(ConfigError, match=r"'fold' changes a base that others hold.*'keep'"):
            make(SharedBase(linear()), R, correction="fold")
    assert RiemannLoRALinear(SharedBase(linear()), R).correction == "keep"
    base = linear()
    with pytest.raises(ConfigError, match=r"'none'.*'fold', 'keep'"):
        StelLALinear(base, R, correction="none")
    with pytest.raises(ConfigError, match="reference_dim is 0"):
        StelLALinear(base, R, reference_dim=0)
    assert base.weight.requires_grad


def test_all_that_cannot_be_adapted_is_named_at_once() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    for i in (0, 2):
        torch.nn.utils.parametrizations.spectral_norm(model[i])
    with pytest.raises(ConfigError, match=r"^0: .*exclude_modules=\['0', '2'\]"):
        adapt(model, target_modules="all-linear", r=2)
    adapt(model, target_modules="all-linear", exclude_modules=["0", "2"], r=2)


def test_a_state_with_the_names_of_a_wrapper_is_loaded_into_that_wrapper() -> None:
    """As they were saved before the wrappers' names were left out."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))

    holders = Holder(), Holder()
    for holder in holders:
        adapt(holder.net, target_modules=["0"], modules_to_save=["1"], r=2)
    state = adapter_state_dict(holders[0])
    load_adapter_state_dict(holders[1], {f"net.{name}": t for name, t in state.items()})
    again = adapter_state_dict(holders[1])
    assert all(torch.equal(t, again[name]) for name, t in state.items())


DISABLED: dict[str, dict[str, Any]] = {
    "stella": {},
    "pseudo-zero": {"init": "pseudo-zero"},
    "pseudo-zero kept": {"init": "pseudo-zero", "correction": "keep"},
    "fold": {"layer": RiemannLoRALinear},
    "keep": {"layer": RiemannLoRALinear, "correction": "keep"},
}


@pytest.mark.parametrize("options", DISABLED.values(), ids=list(DISABLED))
@pytest.mark.parametrize("merged", [False, True])
def test_disabled_adapters_leave_the_function_from_before(options: dict[str, Any], merged: bool) -> None:
    model = Model()
    plain = model(IDS).detach()
    adapt(model, target_modules=["query", "out", "lm_head"], r=2, alpha=8, **options)
    layers: list[Any] = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    with torch.no_grad():
        for layer in layers:
            layer.S.add_(torch.eye(2))
            if merged:
                layer.merge()
    adapted, state = model(IDS).detach(), copy.deepcopy(model.state_dict())
    with contextlib.suppress(KeyboardInterrupt), disable_adapters(model) as same:
        assert same is model
        assert torch.equal(model(IDS), plain)
        with disable_adapters(model):
            assert torch.equal(model(IDS), plain)
        assert torch.equal(model(IDS), plain)
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
        raise KeyboardInterrupt
    assert torch.equal(model(IDS), adapted)
    assert not torch.equal(adapted, plain)
    fresh: Any = adapt(Model(seed=1), target_modules=["query", "out", "lm_head"], r=2, alpha=8, **options)
    fresh.load_state_dict(state)
    with disable_adapters(fresh):  # what was folded is known by U0 and V0 alone
        assert_near(fresh(IDS).detach(), plain)


def test_a_plain_model_has_no_adapters_to_disable() -> None:
    with pytest.raises(ConfigError, match=r"no adapted layer.*adapt\("), disable_adapters(Model()):
        pass
