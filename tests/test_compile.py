"""torch.compile: models that hold our layers become one graph; a compiled step moves every point as the eager one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from stiefelopt import (
    RiemannianWrapper,
    RiemannLoRALinear,
    StelLALinear,
    Stiefel,
    adapt,
    constrain,
    param_groups,
)
from stiefelopt.errors import StepError
from tests.training import Net

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _nothing_compiled_stays() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def needs_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("the inductor finds no C++ compiler")


def every_layer() -> nn.Module:
    """What the library has to offer, in one module."""
    torch.manual_seed(0)

    def base() -> nn.Linear:
        return nn.Linear(12, 12)

    return nn.Sequential(
        constrain(nn.Conv1d(3, 12, 4), "weight", Stiefel(), view="matrix"),
        nn.Flatten(),
        constrain(nn.Linear(60, 12), "weight", Stiefel()),
        StelLALinear(base(), r=3),
        nn.Tanh(),
        StelLALinear(base(), r=3, diagonal=True, init="pseudo-zero"),
        RiemannLoRALinear(base(), r=3),
        nn.Tanh(),
        RiemannLoRALinear(base(), r=3, correction="keep"),
    )


def outputs_and_gradients(model: Any, parameters: nn.Module, autocast: bool) -> list[Tensor]:
    parameters.zero_grad()
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().sum().backward()
    grads = [p.grad for p in parameters.parameters() if p.requires_grad]
    assert x.grad is not None
    assert all(g is not None for g in grads)
    return [y.detach().float(), x.grad, *(g.clone() for g in grads if g is not None)]


def test_groups_of_a_compiled_model_are_those_of_the_model() -> None:
    model = every_layer()
    compiled_model: Any = torch.compile(model)
    groups, compiled = (param_groups(m, lr=1e-3) for m in (model, compiled_model))
    for ours, theirs in zip(compiled, groups, strict=True):
        assert [id(p) for p in ours.pop("params")] == [id(p) for p in theirs.pop("params")]
        assert ours == theirs


def parity(backend: str, autocast: bool = False) -> None:
    model = every_layer()
    compiled = torch.compile(model, fullgraph=True, backend=backend)  # a graph break raises
    eager = outputs_and_gradients(model, model, autocast)
    for ours, theirs in zip(outputs_and_gradients(compiled, model, autocast), eager, strict=True):
        assert (ours - theirs).norm() <= (2e-2 if autocast else 1e-5) * theirs.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_every_layer_compiles_without_a_graph_break(autocast: bool) -> None:
    parity("aot_eager", autocast)


@pytest.mark.slow
def test_the_inductor_agrees() -> None:
    needs_compiler()
    parity("inductor")


@pytest.mark.parametrize("layer", [StelLALinear, RiemannLoRALinear])
def test_an_adapted_language_model_is_one_graph(layer: Any) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = adapt(LlamaForCausalLM(config), layer, target_modules="all-linear", r=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(0, 32, (2, 6))
    found = []
    for callee in (model, compiled):
        model.zero_grad()
        loss = callee(input_ids=tokens, labels=tokens).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


# Steps


def backward(model: Net) -> None:
    model.zero_grad()
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(8, k, generator=generator, dtype=torch.float64) for k in (6, 1))
    (model(x)["logits"] - y).square().mean().backward()


@pytest.fixture
def twins() -> Iterator[list[tuple[Net, RiemannianWrapper, Any]]]:
    """Two equal models with optimizer and scheduler, in float64."""
    torch.set_default_dtype(torch.float64)
    models = [Net(), Net()]
    wrappers = [RiemannianWrapper(AdamW(param_groups(m, lr=2e-2))) for m in models]
    yield [(m, w, CosineAnnealingLR(w, 20)) for m, w in zip(models, wrappers, strict=True)]
    torch.set_default_dtype(torch.float32)


def follows(twins: list[tuple[Net, RiemannianWrapper, Any]], step: Any, counter: Any, steps: int = 6) -> None:
    """The second twin, stepped by `step`, stays where the first one is, and nothing is compiled after two steps."""
    (eager, wrapper, _), (model, _, _) = twins
    compiled = []
    for _ in range(steps):
        for twin in (eager, model):
            backward(twin)
        wrapper.step()
        step()
        for _, _, scheduler in twins:
            scheduler.step()
        compiled.append(counter.frame_count)
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            assert (p - q).abs().max() < 1e-12
    assert compiled[0] > 0
    assert compiled[1] == compiled[-1]
    assert max(twins[1][1].residuals().values()) < 1e-13


def compile_inner_step(wrapper: RiemannianWrapper, backend: Any) -> None:
    """The recipe of docs/training_loops.md."""
    inner: Any = wrapper.optimizer
    inner.step = torch.compile(inner.step, backend=backend)


def test_a_compiled_inner_step(twins: list[tuple[Net, RiemannianWrapper, Any]]) -> None:
    """A changing learning rate does not compile again, and what is not finite is refused as ever."""
    wrapper = twins[1][1]
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compile_inner_step(wrapper, counter)
    follows(twins, lambda: wrapper.step(), counter)
    before = [p.detach().clone() for p in twins[1][0].parameters()]
    backward(twins[1][0])
    twins[1][0].stella.U.grad.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(StepError):
        wrapper.step()
    assert all(map(torch.equal, before, twins[1][0].parameters()))


@pytest.mark.slow
def test_the_inductor_compiles_the_inner_step(twins: list[tuple[Net, RiemannianWrapper, Any]]) -> None:
    needs_compiler()
    wrapper = twins[1][1]
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compile_inner_step(wrapper, counter)
    follows(twins, lambda: wrapper.step(), counter)


@pytest.mark.slow
def test_a_compiled_whole_step_compiles_the_inner_one(
    twins: list[tuple[Net, RiemannianWrapper, Any]],
) -> None:
    """Ours looks at its data, and is left out."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    step = torch.compile(twins[1][1].step, backend=counter)
    follows(twins, step, counter)
    assert 0 < counter.frame_count <= 8
