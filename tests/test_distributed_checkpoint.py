"""torch.distributed.checkpoint over the wrapper: what its users save and load, in one gloo process."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import SGD, AdamW

from stiefelopt import RiemannianWrapper, Stiefel, constrain, param_groups

# Both at once KeyErrors in torch 2.13, with a bare AdamW too.
OPTIONS = {
    "nested": StateDictOptions(),
    "full": StateDictOptions(full_state_dict=True),
    "full on the CPU": StateDictOptions(full_state_dict=True, cpu_offload=True),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
}
INNERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": AdamW,
    "SGD": lambda groups: SGD(groups, lr=1e-2, momentum=0.9),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
every_inner = pytest.mark.parametrize("inner", INNERS.values(), ids=list(INNERS))
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make(
    inner: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype, seed: int, named: bool = True
) -> tuple[nn.Module, RiemannianWrapper]:
    """A tall and a wide point, under two retractions, and two biases."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).to(dtype)
    constrain(model, "0.weight", Stiefel())
    constrain(model, "1.weight", Stiefel(retraction="qr"))
    return model, RiemannianWrapper(inner(param_groups(model, lr=1e-2, weight_decay=0.0, named=named)))


def train(model: nn.Module, wrapper: RiemannianWrapper, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + i)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        wrapper.step()


def bits(model: nn.Module, wrapper: RiemannianWrapper) -> list[Tensor]:
    """Parameters and the optimizer's tensors."""
    params = list(model.parameters())
    return [p.detach().clone() for p in params] + [
        t.clone() for p in params for _, t in sorted(wrapper.state[p].items()) if isinstance(t, Tensor)
    ]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def plain(thing: Any) -> bool:
    """What a checkpoint may hold."""
    if isinstance(thing, dict):
        return all(isinstance(k, (str, int)) and plain(v) for k, v in thing.items())
    if isinstance(thing, (list, tuple)):
        return all(map(plain, thing))
    return thing is None or isinstance(thing, (Tensor, str, int, float, bool))


@every_option
@every_inner
@both_dtypes
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_get_and_set_resume_bitwise(
    options: StateDictOptions, inner: Callable[[Any], Any], dtype: torch.dtype, named: bool
) -> None:
    model, wrapper = make(inner, dtype, 0, named)
    train(model, wrapper, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, wrapper, options=options))
    weights = copy.deepcopy(model.state_dict())
    assert plain(saved)
    other, resumed = make(inner, dtype, 1, named)
    other.load_state_dict(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # for instance that saved and live manifolds differ
        set_optimizer_state_dict(other, resumed, saved, options=options)
    assert same(bits(other, resumed), bits(model, wrapper))
    train(model, wrapper, range(3, 6))
    train(other, resumed, range(3, 6))
    assert same(bits(other, resumed), bits(model, wrapper))
    assert [g.get("manifold") for g in resumed.param_groups] == [
        g.get("manifold") for g in wrapper.param_groups
    ]


@both_dtypes
@every_inner
@pytest.mark.parametrize("options", [OPTIONS["nested"], OPTIONS["flattened"]], ids=["nested", "flattened"])
def test_a_checkpoint_on_disk_resumes_bitwise(
    options: StateDictOptions, inner: Callable[[Any], Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model, wrapper = make(inner, dtype, 0)
    train(model, wrapper, range(3))

    def state(m: nn.Module, w: RiemannianWrapper) -> dict[str, Any]:
        return {"model": m.state_dict(), "optimizer": get_optimizer_state_dict(m, w, options=options)}

    save(state(model, wrapper), checkpoint_id=tmp_path / "checkpoint")
    other, resumed = make(inner, dtype, 1)
    loaded = state(other, resumed)  # DCP loads into tensors that are there, so it makes the state first
    load(loaded, checkpoint_id=tmp_path / "checkpoint")
    other.load_state_dict(loaded["model"])
    set_optimizer_state_dict(other, resumed, loaded["optimizer"], options=options)
    assert same(bits(other, resumed), bits(model, wrapper))
    train(model, wrapper, range(3, 6))
    train(other, resumed, range(3, 6))
    assert same(bits(other, resumed), bits(model, wrapper))


@both_dtypes
@every_inner
@every_option
def test_making_the_state_moves_no_bit(
    options: StateDictOptions, inner: Callable[[Any], Any], dtype: torch.dtype
) -> None:
    """DCP steps with zero gradients and lr = 0 to find out what state there is."""
    model, wrapper = make(inner, dtype, 0)
    before = [p.detach().clone() for p in model.parameters()]
    rates = [group["lr"] for group in wrapper.param_groups]
    assert not wrapper.state
    get_optimizer_state_dict(model, wrapper, options=options)
    assert set(wrapper.state) == set(model.parameters())
    assert same([p.detach() for p in model.parameters()], before)
    assert all(p.grad is None for p in model.parameters())
    assert [group["lr"] for group in wrapper.param_groups] == rates


@pytest.mark.parametrize("options", [OPTIONS["nested"], OPTIONS["flattened"]], ids=["nested", "flattened"])
def test_the_live_manifold_wins_with_a_warning(options: StateDictOptions) -> None:
    model, wrapper = make(AdamW, torch.float32, 0)
    train(model, wrapper, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, wrapper, options=options))
    other, live = make(AdamW, torch.float32, 1)
    live.param_groups[0]["manifold"] = Stiefel(retraction="cayley").spec()
    with pytest.warns(UserWarning, match=r"group 0 .*polar.*cayley"):
        set_optimizer_state_dict(other, live, saved, options=options)
    assert live.param_groups[0]["manifold"]["retraction"] == "cayley"
