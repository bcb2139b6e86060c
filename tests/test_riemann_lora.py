"""RiemannLoRALinear: its gradients, its corrections, and everything that training code does with a layer.

What it shares with StelLALinear (the formula, merging, precision, copies) is in test_layers.py, for both.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, vmap
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from stiefelopt import (
    USV,
    ConfigError,
    FixedRank,
    NotOnManifoldError,
    RiemannianWrapper,
    RiemannLoRALinear,
    StelLALinear,
    Stiefel,
    adapt,
    adapter_state_dict,
    export_lora,
    import_lora,
    load_adapter_state_dict,
    merge_adapters,
    param_groups,
)

peft = pytest.importorskip("peft")

torch.set_num_threads(1)

OUT, IN, R, ALPHA = 7, 10, 3, 4.0
CORRECTIONS = ("fold", "keep", "none")
every_correction = pytest.mark.parametrize("correction", CORRECTIONS)
exact_corrections = pytest.mark.parametrize("correction", ["fold", "keep"])
HALVES = [torch.float16, torch.bfloat16]


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, dtype=dtype)


def conv1d() -> Any:
    base, twin = Conv1D(OUT, IN), linear()
    base.weight.data.copy_(twin.weight.detach().T)
    base.bias.data.copy_(twin.bias.detach())
    return base


def layer_on(base: nn.Module, seed: int = 5, **options: Any) -> RiemannLoRALinear:
    return RiemannLoRALinear(base, R, ALPHA, generator=torch.Generator().manual_seed(seed), **options)


def trained(layer: Any, seed: int = 9) -> Any:
    """Factors as after training: another point."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in (layer.U, layer.V):
            factor.copy_(Stiefel().random_point(*factor.shape, dtype=factor.dtype, generator=generator))
        layer.S.copy_(torch.randn(R, R, generator=generator))
    return layer


def inputs(*batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*batch, IN, generator=torch.Generator().manual_seed(3)).to(dtype)


def assert_near(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def grads(layer: RiemannLoRALinear) -> list[Tensor]:
    found = [p.grad for p in (layer.U, layer.S, layer.V)]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]


def loss_of(y: Tensor) -> Tensor:
    return (y.sin() * torch.linspace(0.5, 2, y.shape[-1]).to(y)).sum()


def dense(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, dx and G V, U^T G V, G^T U with G = dL/d(U S V^T), from a dense update that autograd differentiates."""
    u, s, v = (p.detach() for p in (layer.U, layer.S, layer.V))
    update = (u @ s @ v.T).requires_grad_()
    rest = update if layer.folds or layer.U0 is None else update - layer.U0 @ layer.V0.T
    x = x.detach().clone().requires_grad_()
    y = layer.base(x) + layer.scale * x @ rest.T
    dx, g = torch.autograd.grad(loss_of(y), (x, update))
    return y.detach(), dx, [g @ v, u.T @ g @ v, g.T @ u]


# Gradients


@every_correction
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (2, 1, 4), (0,)])
@pytest.mark.parametrize("needs_dx", [True, False])
def test_gradients_are_those_of_the_dense_matrix_to_1e_9(
    correction: str, batch: tuple[int, ...], needs_dx: bool
) -> None:
    layer = trained(layer_on(linear(torch.float64), correction=correction, scale=0.7))
    x = inputs(*batch, dtype=torch.float64).requires_grad_(needs_dx)
    y = layer(x)
    loss_of(y).backward()
    expected_y, dx, expected = dense(layer, x)
    assert_near(y.detach(), expected_y, 1e-12)
    for ours, theirs in zip(grads(layer), expected, strict=True):
        assert_near(ours, theirs, 1e-9)
    if needs_dx:
        assert x.grad is not None
        assert_near(x.grad, dx, 1e-9)
    assert layer.base.weight.grad is None


def test_the_gradients_are_not_the_derivatives_by_the_factors() -> None:
    """What the group key "gradient" is for: StelLA's are G V S^T, U^T G V, G^T U S."""
    ours, theirs = trained(layer_on(linear(), correction="none")), trained(StelLALinear(linear(), R, ALPHA))
    for layer in (ours, theirs):
        loss_of(layer(inputs(5))).backward()
    assert_near(ours.U.grad @ ours.S.T.detach(), theirs.U.grad)
    assert_near(ours.V.grad @ ours.S.detach(), theirs.V.grad)
    assert_near(ours.S.grad, theirs.S.grad)
    assert (ours.U.grad - theirs.U.grad).abs().max() > 1e-2


@every_correction
def test_a_step_is_the_dense_riemannian_step(correction: str) -> None:
    layer = trained(layer_on(linear(torch.float64), correction=correction))
    x = inputs(6, dtype=torch.float64)
    point = USV(*(p.detach().clone() for p in (layer.U, layer.S, layer.V)))
    _, _, (gv, _, _) = dense(layer, x)
    w = (point.U @ point.S @ point.V.T).requires_grad_()
    rest = w if layer.folds or layer.U0 is None else w - layer.U0 @ layer.V0.T
    (g,) = torch.autograd.grad(loss_of(layer.base(x) + layer.scale * x @ rest.T), w)
    assert_near(g @ point.V, gv, 1e-9)
    tangent = FixedRank().project_dense(point, -0.01 * g)
    expected = FixedRank().to_dense(FixedRank().retract(point, tangent))
    wrapper = RiemannianWrapper(SGD(param_groups(layer), lr=0.01))
    loss_of(layer(x)).backward()
    wrapper.step()
    assert_near((layer.U @ layer.S @ layer.V.T).detach(), expected, 1e-9)


@every_correction
def test_accumulated_gradients_are_those_of_the_sum(correction: str) -> None:
    layer = trained(layer_on(linear(torch.float64), correction=correction))
    x = inputs(8, dtype=torch.float64)
    loss_of(layer(x)).backward()
    whole = grads(layer)
    layer.zero_grad()
    for part in x.split(3):
        loss_of(layer(part)).backward()
    for a, b in zip(grads(layer), whole, strict=True):
        assert_near(a, b, 1e-12)


def test_a_layer_used_twice_gets_the_sum_of_both_uses() -> None:
    torch.manual_seed(0)
    layer = RiemannLoRALinear(nn.Linear(6, 6, dtype=torch.float64), 2, scale=0.5)
    x = torch.randn(4, 6, dtype=torch.float64)
    h = layer(x)
    loss_of(layer(h)).backward()
    update = (layer.U @ layer.S @ layer.V.T).detach().requires_grad_()
    base: Any = layer.base
    weight = base.weight + update
    (g,) = torch.autograd.grad(
        loss_of(nn.functional.linear(nn.functional.linear(x, weight, base.bias), weight, base.bias)), update
    )
    assert_near(grads(layer)[0], g @ layer.V.detach(), 1e-9)
    assert_near(grads(layer)[2], g.T @ layer.U.detach(), 1e-9)


@pytest.mark.parametrize("frozen", ["U", "S", "V"])
def test_a_frozen_factor_gets_no_gradient_and_cannot_be_trained_in_part(frozen: str) -> None:
    layer = trained(layer_on(linear()))
    loss_of(layer(inputs(4))).backward()
    expected = {n: getattr(layer, n).grad.clone() for n in "USV"}
    layer.zero_grad()
    getattr(layer, frozen).requires_grad_(False)
    loss_of(layer(inputs(4))).backward()
    for name in "USV":
        grad = getattr(layer, name).grad
        assert grad is None if name == frozen else torch.equal(grad, expected[name])
    with pytest.raises(ConfigError, match=rf"{frozen} frozen.*all three"):
        param_groups(nn.Sequential(layer))
    layer.requires_grad_(False)
    assert param_groups(nn.ModuleList([layer, nn.Linear(2, 2)]))  # all three: a layer at rest
    with torch.no_grad():
        layer(inputs(4))


@pytest.mark.parametrize("through", ["x", "U"])
def test_double_backward_is_refused_by_name(through: str) -> None:
    layer = trained(layer_on(linear()))
    x = inputs(4).requires_grad_()
    # A linear loss: dL/dy depends on nothing, and the refusal must not depend on that.
    (g,) = torch.autograd.grad(layer(x).sum(), x if through == "x" else layer.U, create_graph=True)
    with pytest.raises(ConfigError, match=r"RiemannLoRALinear is differentiable once.*StelLALinear"):
        g.square().sum().backward()


def test_create_graph_alone_is_fine() -> None:
    """First gradients under create_graph, and second ones past the layer, are as ever."""
    layer, w = trained(layer_on(linear())), torch.ones(4, OUT, requires_grad=True)
    x = inputs(4)
    layer(x).sin().sum().backward()
    expected = grads(layer)
    found = torch.autograd.grad(
        (layer(x) * 1.0).sin().sum(), (layer.U, layer.S, layer.V), create_graph=True, materialize_grads=True
    )
    for a, b in zip(found, expected, strict=True):
        assert_near(a.detach(), b, 1e-6)
    (g,) = torch.autograd.grad((w.sin() * layer(x).detach()).sum(), w, create_graph=True)
    g.sum().backward()


# Corrections


@exact_corrections
@pytest.mark.parametrize(
    "make", [linear, conv1d, lambda: linear(torch.float64)], ids=["Linear", "Conv1D", "float64"]
)
@pytest.mark.parametrize("scale", [None, 1.0, -2.0])
def test_the_function_starts_unchanged(correction: str, make: Callable[[], Any], scale: float | None) -> None:
    base = make()
    x = inputs(50, dtype=base.weight.dtype)
    y, weight = base(x).detach(), base.weight.detach().clone()
    layer = layer_on(base, correction=correction, scale=scale)
    start = abs(layer.start) * layer.scale
    assert_near(layer(x).detach(), y, 8 * torch.finfo(x.dtype).eps * (y.abs().max().item() + start))
    assert layer.delta_weight().abs().max() == 0
    assert torch.equal(base.weight, weight) == (correction == "keep")


def test_none_leaves_the_start_in() -> None:
    base = linear()
    layer = layer_on(base, correction="none")
    x = inputs(50)
    assert_near(layer(x), base(x) + ALPHA / R * layer.start * x @ (layer.V @ layer.U.T), 1e-6)
    assert layer.start == 0.01 / R**0.5
    assert layer.U0 is None


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, "fold"), (torch.float64, "fold"), *((h, "keep") for h in HALVES)]
)
def test_the_default_folds_where_it_is_exact(dtype: torch.dtype, expected: str) -> None:
    layer = layer_on(linear(dtype))
    assert layer.correction == expected
    assert expected in repr(layer)
    assert layer.S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_base_starts_bit_for_bit_at_its_own_function(dtype: torch.dtype) -> None:
    """What folding would lose: the start is far below the rounding of the weight."""
    base = linear(dtype)
    x = inputs(50, dtype=dtype)
    layer = layer_on(base)
    assert torch.equal(layer(x), base(x))
    with pytest.raises(ConfigError, match=r"rounds away.*'keep'"):
        layer_on(linear(dtype), correction="fold")


def test_starting_again_elsewhere_undoes_the_first_start() -> None:
    base = linear()
    original, x = base.weight.detach().clone(), inputs(9)
    y = base(x).detach()
    layer = layer_on(base)
    point = FixedRank().random_point(OUT, IN, rank=R)
    layer.start_at(point.U, point.V, 0.5)
    assert torch.equal(layer.S, 0.5 * torch.eye(R))
    assert_near(layer(x).detach(), y, 1e-6)
    assert_near(base.weight, original - layer.scale * 0.5 * point.U @ point.V.T, 1e-7)
    layer.reset_parameters()
    assert layer.start == 0.5


def test_a_tied_weight_is_not_corrected_behind_the_others_back() -> None:
    embedding, head = nn.Embedding(OUT, IN), nn.Linear(IN, OUT)
    head.weight = embedding.weight
    before = embedding.weight.detach().clone()
    layer = layer_on(head)
    x = inputs(5)
    assert torch.equal(embedding.weight, before)
    assert_near(layer(x), x @ before.T + head.bias, 1e-6)


@pytest.mark.parametrize("scale", [0, 0.0, float("nan"), float("inf"), "small"])
def test_a_start_without_rank_is_refused(scale: Any) -> None:
    base = linear()
    with pytest.raises(ConfigError, match=r"scale is .*other than 0"):
        layer_on(base, scale=scale)
    assert base.weight.requires_grad


# What training code does


@every_correction
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(correction: str, reentrant: bool) -> None:
    layer = trained(layer_on(linear(), correction=correction, dropout=0.3))
    found = []
    for wrapped in (False, True):
        layer.zero_grad()
        torch.manual_seed(1)
        x = inputs(6).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant) if wrapped else layer(x)
        loss_of(y).backward()
        assert x.grad is not None
        found.append([y.detach(), x.grad, *grads(layer)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_correction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(correction: str, dtype: torch.dtype) -> None:
    if correction == "fold" and dtype != torch.float32:
        correction = "keep"
    layer = trained(layer_on(linear(dtype), correction=correction))
    x = inputs(6, dtype=dtype)
    loss_of(layer(x).float()).backward()
    exact = grads(layer)
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        loss = loss_of(y.float())
    loss.backward()
    for ours, theirs in zip(grads(layer), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_autocast_leaves_float64_alone() -> None:
    layer = trained(layer_on(linear(torch.float64)))
    x = inputs(5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
    assert torch.equal(inside, layer(x))


def test_dropout_acts_on_the_adapters_input_in_both_directions() -> None:
    layer = trained(layer_on(linear(torch.float64), dropout=0.5))
    x = inputs(64, dtype=torch.float64).requires_grad_()
    torch.manual_seed(0)
    y = layer(x)
    loss_of(y).backward()
    torch.manual_seed(0)
    mask = nn.functional.dropout(torch.ones_like(x), 0.5)
    twin = x.detach().clone().requires_grad_()
    update = (layer.U @ layer.S @ layer.V.T).detach().requires_grad_()
    expected = layer.base(twin) + layer.scale * (twin * mask) @ update.T
    loss_of(expected).backward()
    assert_near(y.detach(), expected.detach(), 1e-12)
    assert x.grad is not None
    assert twin.grad is not None
    assert update.grad is not None
    assert_near(x.grad, twin.grad, 1e-9)
    assert_near(grads(layer)[0], update.grad @ layer.V.detach(), 1e-9)


def compile_parity(correction: str, backend: str) -> None:
    layer = trained(layer_on(linear(), correction=correction))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    found = []
    for module in (layer, compiled):
        layer.zero_grad()
        x = inputs(6).requires_grad_()
        y = module(x)
        loss_of(y).backward()
        assert x.grad is not None
        found.append([y.detach(), x.grad, *grads(layer)])
    for a, b in zip(*found, strict=True):
        assert_near(a, b, 1e-5)
    torch._dynamo.reset()


@exact_corrections
def test_it_compiles_without_a_graph_break(correction: str) -> None:
    compile_parity(correction, "aot_eager")


@pytest.mark.slow
@exact_corrections
def test_inductor_agrees(correction: str) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("the inductor finds no C++ compiler")
    compile_parity(correction, "inductor")


def saved_for_backward(module: nn.Module, x: Tensor) -> int:
    """Bytes that are kept from forward to backward, parameters (which lie there anyway) not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize(
    ("correction", "dtype", "autocast"),
    [("fold", torch.float32, False), ("fold", torch.float32, True), ("keep", torch.bfloat16, False)],
)
def test_it_saves_no_more_than_lora(
    correction: str, dtype: torch.dtype, autocast: bool, dropout: float, needs_dx: bool
) -> None:
    n, m, r = 96, 64, 4
    x = torch.randn(8, 16, n, dtype=dtype, requires_grad=needs_dx)

    def lora() -> nn.Module:
        config = peft.LoraConfig(r=r, target_modules=["0"], lora_dropout=dropout)
        return peft.get_peft_model(nn.Sequential(nn.Linear(n, m, dtype=dtype)), config)

    ours = nn.Sequential(
        RiemannLoRALinear(nn.Linear(n, m, dtype=dtype), r, correction=correction, dropout=dropout)
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine, theirs = (saved_for_backward(model.train(), x) for model in (ours, lora()))
    rows, size = 8 * 16, 2 if autocast else 4
    # S, which LoRA has not; with "keep" r further columns of x V.
    allowance = (rows * r * size if correction == "keep" else 0) + r * r * size
    assert mine <= theirs + allowance, (mine, theirs)


def test_it_trains_and_param_groups_says_all() -> None:
    torch.manual_seed(0)
    model = adapt(
        nn.Sequential(nn.Linear(IN, 8), nn.Tanh(), nn.Linear(8, OUT)),
        RiemannLoRALinear,
        target_modules="all-linear",
        r=2,
    )
    groups = param_groups(model, lr=1e-2, weight_decay=0.1, manifold_lr=3e-2)
    assert len(groups) == 1
    layers = [m for m in model.modules() if isinstance(m, RiemannLoRALinear)]
    assert [id(p) for p in groups[0]["params"]] == [id(p) for m in layers for p in (m.U, m.S, m.V)]
    keys = {k: v for k, v in groups[0].items() if k != "params"}
    assert keys == {
        "manifold": FixedRank().spec(),
        "gradient": "projected",
        "lr": 3e-2,
        "weight_decay": 0.0,
        "manifold_decay": 0.1,
    }
    with pytest.raises(ConfigError, match=r"scale_lr.*manifold_lr"):
        param_groups(model, lr=1e-2, scale_lr=1e-2)
    wrapper = RiemannianWrapper(AdamW(param_groups(model, lr=3e-2)))
    x, target = inputs(64), torch.randn(64, OUT)
    losses = []
    for _ in range(60):
        wrapper.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        wrapper.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]
    assert max(wrapper.residuals().values()) < 2e-6


def test_manifold_decay_shrinks_the_matrix() -> None:
    layer = trained(layer_on(linear(torch.float64), correction="none"))
    before = layer.delta_weight().clone()
    wrapper = RiemannianWrapper(SGD(param_groups(layer, lr=0.1, weight_decay=0.5)))
    (0 * layer(inputs(4, dtype=torch.float64))).sum().backward()
    wrapper.step()
    assert_near(layer.delta_weight(), 0.95 * before, 1e-12)


# State


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


PAIRS = list(itertools.product(CORRECTIONS, CORRECTIONS))


@pytest.mark.parametrize(("saved", "live"), PAIRS)
@pytest.mark.parametrize("merged", [False, True])
def test_a_whole_state_loads_across_corrections(saved: str, live: str, merged: bool) -> None:
    """The state says whether its base weight has the correction in it."""
    source = trained(layer_on(linear(), correction=saved, scale=0.8))
    x = inputs(9)
    y, delta, original = source(x).detach(), source.delta_weight(), linear().weight.detach()
    target = trained(layer_on(linear(), seed=8, correction=live, scale=0.8), seed=33)
    if merged:
        source.merge()
        target.merge()
    target.load_state_dict(through_a_file(source.state_dict()))
    assert_near(target(x).detach(), y, 1e-6)
    assert_near(target.delta_weight(), delta, 1e-6)
    target.merge()
    assert_near(target.weight.detach(), original + delta, 1e-5)
    target.reset_parameters()
    assert target.correction == live
    assert target.folds == (live == "fold")
    if live != "none":
        assert_near(target(x).detach(), linear()(x).detach(), 1e-5)


@pytest.mark.parametrize(("saved", "live"), PAIRS)
@pytest.mark.parametrize("live_state", ["fresh", "merged", "loaded"])
@pytest.mark.parametrize("make", [linear, conv1d], ids=["Linear", "Conv1D"])
def test_a_whole_state_without_metadata_loads_across_corrections(
    saved: str, live: str, live_state: str, make: Callable[[], Any]
) -> None:
    """As safetensors gives it back: the base weight here tells whether the correction lies in the saved one."""
    source = trained(layer_on(make(), correction=saved))
    target = trained(layer_on(make(), seed=8, correction=live), seed=33)
    if live_state == "merged":
        target.merge()
    if live_state == "loaded":
        target.load_state_dict(layer_on(make(), seed=3, correction=live).state_dict())
    target.load_state_dict(dict(source.state_dict()))
    assert_near(target(inputs(9)), source(inputs(9)), 1e-6)
    assert_near(target.delta_weight(), source.delta_weight(), 1e-6)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_without_metadata_another_base_is_taken_to_be_corrected_as_here(correction: str) -> None:
    source = trained(layer_on(nn.Linear(IN, OUT), correction=correction))
    target = trained(layer_on(nn.Linear(IN, OUT), seed=8, correction=correction), seed=33)
    target.load_state_dict(dict(source.state_dict()))
    assert_near(target(inputs(9)), source(inputs(9)), 1e-6)


@pytest.mark.parametrize(("saved", "live"), PAIRS)
@pytest.mark.parametrize("strict", [True, False], ids=["load_adapter_state_dict", "strict=False"])
def test_an_adapters_state_loads_across_corrections(saved: str, live: str, strict: bool) -> None:
    """Also by torch's own load_state_dict(strict=False), which brings no base weight."""
    source = trained(layer_on(linear(), correction=saved, scale=0.8))
    target = trained(layer_on(linear(), seed=8, correction=live, scale=0.8), seed=33)
    state = adapter_state_dict(source)
    if live == "none" and saved != "none" and strict:
        before = {k: t.clone() for k, t in target.state_dict().items()}
        with pytest.raises(ConfigError, match=r"saved with a correction"):
            load_adapter_state_dict(target, state)
        assert all(torch.equal(t, before[k]) for k, t in target.state_dict().items())
        return
    if strict:
        load_adapter_state_dict(target, state)
    else:
        target.load_state_dict(state, strict=False)
    assert_near(target(inputs(9)), source(inputs(9)), 1e-6)
    assert_near(target.delta_weight(), source.delta_weight(), 1e-6)


def test_a_base_state_alone_leaves_the_adapter_alone() -> None:
    layer = trained(layer_on(linear(), correction="keep"))
    before = layer.delta_weight()
    layer.load_state_dict({"base.weight": torch.ones(OUT, IN)}, strict=False)
    assert_near(layer.delta_weight(), before, 0)


def test_a_correction_of_another_shape_is_refused() -> None:
    layer = layer_on(linear())
    state = {**layer.state_dict(), "U0": torch.zeros(OUT, R + 1)}
    with pytest.raises(RuntimeError, match="U0"):
        layer.load_state_dict(state)


def test_the_adapters_state_goes_through_safetensors(tmp_path: Path) -> None:
    source = nn.Sequential(trained(layer_on(linear(), scale=0.8)))
    save_file(adapter_state_dict(source), tmp_path / "a.safetensors")
    target = nn.Sequential(layer_on(linear(), seed=8, correction="keep"))
    load_adapter_state_dict(target, load_file(tmp_path / "a.safetensors"))
    assert_near(target(inputs(5)), source(inputs(5)), 1e-6)


@every_correction
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_train_on(correction: str, clone: Callable[[Any], Any]) -> None:
    layer = trained(layer_on(linear(), correction=correction))
    twin = clone(layer)
    x = inputs(6)
    assert torch.equal(twin(x), layer(x))
    for each in (layer, twin):
        wrapper = RiemannianWrapper(SGD(param_groups(each), lr=0.1))
        loss_of(each(x)).backward()
        wrapper.step()
    assert torch.equal(twin(x), layer(x))
    twin.reset_parameters()
    assert not torch.equal(twin.U, layer.U)
    weight = layer.weight.clone()
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


# Plain LoRA checkpoints


def small_bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
        initializer_range=0.3,
    )
    return transformers.BertForSequenceClassification(config).eval()


IDS = torch.arange(12).reshape(2, 6)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def bert_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, RiemannLoRALinear)]


@every_correction
def test_stock_peft_loads_an_exported_model_and_it_comes_back(correction: str, tmp_path: Path) -> None:
    model = adapt(
        small_bert(),
        RiemannLoRALinear,
        target_modules=["query", "value"],
        r=R,
        correction=correction,
        scale=0.3,
    )
    for i, layer in enumerate(bert_layers(model)):
        trained(layer, seed=i)
    export_lora(model, tmp_path)
    assert_near(logits(peft.PeftModel.from_pretrained(small_bert(), tmp_path)), logits(model))
    back = import_lora(small_bert(), tmp_path, RiemannLoRALinear)
    assert_near(logits(back), logits(model))
    assert_near(logits(merge_adapters(back)), logits(model))


def lora_checkpoint(path: Path, rank_left: int) -> Any:
    """A LoRA of PEFT's own whose updates have that rank, below R."""
    config = peft.LoraConfig(r=R, lora_alpha=5, target_modules=["query", "value"], init_lora_weights=False)
    torch.manual_seed(11)
    model = peft.get_peft_model(small_bert(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p[:, rank_left:] = 0
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("rank_left", [0, 1, R])
@exact_corrections
def test_an_imported_checkpoint_is_a_point_with_the_same_function(
    rank_left: int, correction: str, tmp_path: Path
) -> None:
    """An untrained LoRA (B = 0) has no rank; the missing singular values get the start's size, and it is taken out."""
    theirs = lora_checkpoint(tmp_path, rank_left)
    ours = import_lora(small_bert(), tmp_path, RiemannLoRALinear, correction=correction)
    assert_near(logits(ours), logits(theirs))
    for layer in bert_layers(ours):
        FixedRank().check(USV(layer.U, layer.S, layer.V))
        assert (layer.U0 is None) == (rank_left == R)
    wrapper = RiemannianWrapper(AdamW(param_groups(ours, lr=1e-3)))
    losses = []
    for _ in range(5):
        wrapper.zero_grad()
        loss = nn.functional.cross_entropy(ours(IDS).logits, torch.tensor([0, 2]))
        loss.backward()
        wrapper.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_singular_import_without_a_correction_is_off_by_the_start_alone(tmp_path: Path) -> None:
    theirs = lora_checkpoint(tmp_path, 0)
    ours = import_lora(small_bert(), tmp_path, RiemannLoRALinear, correction="none", scale=1e-6)
    assert_near(logits(ours), logits(theirs))


def test_a_zero_s_is_no_point() -> None:
    layer = layer_on(linear())
    nn.init.zeros_(layer.S)
    with pytest.raises(NotOnManifoldError, match="S is singular"):
        RiemannianWrapper(AdamW(param_groups(layer)))


# torch.func


def test_torch_func_maps_and_differentiates_by_the_input_what_is_not_trained() -> None:
    layer = RiemannLoRALinear(nn.Linear(6, 5), r=2, correction="keep")
    x = torch.randn(7, 6)
    with torch.no_grad():
        layer.S.mul_(50)
        torch.testing.assert_close(vmap(layer)(x), layer(x))
    layer.requires_grad_(False)
    expected = (layer.weight + layer.delta_weight()).expand(7, -1, -1)
    torch.testing.assert_close(vmap(jacrev(layer))(x), expected)
    torch.testing.assert_close(vmap(jacfwd(layer))(x), expected)


def test_torch_func_is_refused_where_it_would_miss_the_projected_gradients() -> None:
    layer = RiemannLoRALinear(nn.Linear(6, 5), r=2)
    params: dict[str, Tensor] = dict(layer.named_parameters())

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, params, (x,)).sum()

    with pytest.raises(ConfigError, match=r"no_grad.*StelLALinear"):
        vmap(grad(loss), in_dims=(None, 0))(params, torch.randn(7, 6))
