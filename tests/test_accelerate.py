"""accelerate's prepared optimizer around the wrapper: prepared, stepped, accumulated, clipped, saved and resumed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from stiefelopt import (
    ConfigError,
    RiemannianWrapper,
    RiemannLoRALinear,
    StelLALinear,
    Stiefel,
    adapt,
    constrain,
    param_groups,
)

accelerate = pytest.importorskip("accelerate")
AcceleratorState = accelerate.state.AcceleratorState


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerators of one process share a state."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make(seed: int = 0) -> tuple[nn.Module, RiemannianWrapper, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    constrain(model, "0.weight", Stiefel())
    wrapper = RiemannianWrapper(AdamW(param_groups(model, lr=2e-2, named=True)))
    return model, wrapper, lr_scheduler.OneCycleLR(wrapper, 2e-2, total_steps=40)


def batches(start: int = 0, stop: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(48, 6, generator=generator), torch.randn(48, 1, generator=generator)
    return [(x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]) for i in range(start, stop)]


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def train(prepared: tuple[Any, ...], data: Any) -> None:
    """The loop of accelerate's guide."""
    accelerator, model, optimizer, scheduler = prepared
    for x, y in data:
        with accelerator.accumulate(model):
            loss = (model(x) - y).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def by_hand(accumulate: int = 1) -> list[Tensor]:
    """What the loop means, without accelerate."""
    model, wrapper, scheduler = make()
    for i, (x, y) in enumerate(batches()):
        ((model(x) - y).square().mean() / accumulate).backward()
        if (i + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            wrapper.step()
            scheduler.step()
            wrapper.zero_grad()
    return bits(model)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_prepared_wrapper_steps_as_a_bare_one(accumulate: int) -> None:
    model, wrapper, scheduler = make()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, optimizer, scheduler = accelerator.prepare(model, wrapper, scheduler)
    assert optimizer.optimizer is wrapper
    train((accelerator, model, optimizer, scheduler), batches())
    assert same(bits(model), by_hand(accumulate))
    assert wrapper.residuals()["0.weight"] < 1e-5
    assert optimizer.param_groups[0]["manifold"] == Stiefel().spec()


def test_a_prepared_dataloader_may_end_in_the_middle_of_an_accumulation() -> None:
    model, wrapper, scheduler = make()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=5)
    data = DataLoader(TensorDataset(*(torch.cat(ts) for ts in zip(*batches(), strict=True))), batch_size=4)
    model, optimizer, scheduler, data = accelerator.prepare(model, wrapper, scheduler, data)
    before = bits(model)
    steps: list[int] = []
    wrapper.register_step_post_hook(lambda *_: steps.append(1))
    train((accelerator, model, optimizer, scheduler), data)
    assert len(steps) == 3  # after batches 5, 10 and 12
    assert not same(bits(model), before)
    assert wrapper.residuals()["0.weight"] < 1e-5


def test_save_state_and_load_state_resume_bitwise(tmp_path: Path) -> None:
    def prepared(seed: int) -> tuple[Any, ...]:
        fresh = make(seed)
        accelerator = accelerate.Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(*fresh)

    whole = prepared(0)
    train(whole, batches())
    AcceleratorState._reset_state(reset_partial_state=True)
    first = prepared(0)
    train(first, batches(0, 7))
    first[0].save_state(str(tmp_path / "checkpoint"))
    AcceleratorState._reset_state(reset_partial_state=True)
    second = prepared(1)
    second[0].load_state(str(tmp_path / "checkpoint"))
    train(second, batches(7, 12))
    assert same(bits(second[1]), bits(whole[1]))
    for a, b in zip(second[2].param_groups, whole[2].param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}


def test_bfloat16_autocast() -> None:
    model, wrapper, scheduler = make()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer, scheduler = accelerator.prepare(model, wrapper, scheduler)
    before = bits(model)
    train((accelerator, model, optimizer, scheduler), batches())
    assert not same(bits(model), before)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert wrapper.residuals()["0.weight"] < 1e-5


# A hook that shows in the output.
SHOWING: dict[str, Any] = {"post_forward": lambda self, module, output: output + 100}
Showing: Any = type("Showing", (accelerate.hooks.ModelHook,), SHOWING)


@pytest.mark.parametrize("layer", [StelLALinear, RiemannLoRALinear])
def test_accelerates_hooks_on_a_base_are_heard(layer: Any) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(4, 6)
    adapt(model, layer, target_modules=["0"], r=2)
    expected = model(x) + 100
    accelerate.hooks.add_hook_to_module(model.get_submodule("0.base"), Showing())
    torch.testing.assert_close(model(x), expected)


def test_offloaded_modules_are_refused_by_name_and_left_working() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)), torch.randn(4, 6)
    expected = model(x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"^0: .*Linear.*offloaded.*without offloading"):
        adapt(model, target_modules=["0"], r=2)
    torch.testing.assert_close(model(x), expected)
