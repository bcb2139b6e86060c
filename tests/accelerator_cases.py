"""Steps on an accelerator that is not there: what the host would have to wait for, and what lies on the wrong device.

torch's fake tensors run every operation without numbers: reading one is an error, so is a product of tensors on two
devices. Their device is one that torch makes up for backends written in Python. Prints, as JSON, what was wrong with
each case ("" where nothing was), which operations wait for the device on CUDA, how many passes over the parameters the
step makes, and whether it computes in float64, which not every device has.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from stiefelopt import (
    FixedRank,
    RiemannianWrapper,
    Riemannion,
    RiemannLoRALinear,
    StelLALinear,
    Stiefel,
    adapt,
    alarm,
    manifold_step,
    param_groups,
)
from stiefelopt.manifolds import Grassmann, Oblique, SpecialOrthogonal, Sphere

DEVICE = "pretended"
# What LAPACK's stand-ins check on the host, and what a result's size depends on.
WAITS = (
    "_linalg_svd",
    "_linalg_eigh",
    "linalg_eig",
    "linalg_matrix_exp",
    "nonzero",
    "masked_select",
    "_unique2",
)

Made = tuple[list[nn.Parameter], Any]


class Watch(TorchDispatchMode):
    """Notes the operations that wait for the device, and the entries of all tensors that an operation touches."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.touched, self.doubles = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        to_host = name == "_to_copy" and str(kwargs.get("device")) == "cpu" and not kwargs.get("non_blocking")
        if name in WAITS or (to_host and args[0].device.type != "cpu"):
            self.found.add(name)
        out = func(*args, **kwargs)
        tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}.values()
        if not (func.is_view or name in ("empty", "empty_like", "new_empty", "detach", "device")):
            self.touched += sum(t.numel() for t in tensors)
        self.doubles |= any(t.dtype == torch.float64 and t.device.type != "cpu" for t in tensors)
        return out


class Event:
    """The device's events; there is no device."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == DEVICE

    def record(self, stream: torch.device) -> None:
        assert stream.type == DEVICE


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=DEVICE))


def adamw(groups: Any, **options: Any) -> RiemannianWrapper:
    return RiemannianWrapper(torch.optim.AdamW(groups, lr=1e-3, **options))


def stiefel(**options: Any) -> Callable[[], Made]:
    """Two heights, a wide one, a large square one, a lone one in bfloat16, and a free parameter."""

    def make() -> Made:
        keys = {k: options[k] for k in ("direction",) if k in options}
        manifold = Stiefel(**{k: v for k, v in options.items() if k not in keys})
        points = [parameter(*shape) for shape in ((64, 16), (64, 16), (128, 16), (16, 40), (600, 600))]
        points.append(parameter(60, 6, dtype=torch.bfloat16))
        free = parameter(5)
        return [*points, free], adamw([{"params": points, "manifold": manifold, **keys}, {"params": [free]}])

    return make


def tall(optimizer: Callable[..., Any]) -> Callable[[], Made]:
    """Matrices so tall that nothing p x p counts."""

    def make() -> Made:
        points = [parameter(n, 4) for n in (20000, 20000, 30000)]
        return points, optimizer(points)

    return make


def other(manifold: Any) -> Callable[[], Made]:
    def make() -> Made:
        points = [parameter(12, 12), parameter(12, 12)]
        return points, adamw([{"params": points, "manifold": manifold}])

    return make


def fixed_rank(wrap: Callable[..., Any] = adamw, manifold: Any = None, **keys: Any) -> Callable[[], Made]:
    def make() -> Made:
        factors = [parameter(*shape) for _ in range(2) for shape in ((64, 8), (8, 8), (32, 8))]
        return factors, wrap([{"params": factors, "manifold": manifold or FixedRank(), **keys}])

    return make


def layers(layer: Any, wrap: Callable[..., Any] = adamw, **options: Any) -> Callable[[], Made]:
    """An adapted model, its gradients from a backward pass."""

    def make() -> Made:
        model = nn.Sequential(nn.Linear(32, 48, device=DEVICE), nn.ReLU(), nn.Linear(48, 8, device=DEVICE))
        adapt(model, layer, target_modules="all-linear", r=4, **options)
        model(torch.empty(10, 32, device=DEVICE)).square().mean().backward()
        return [p for p in model.parameters() if p.requires_grad], wrap(param_groups(model, lr=1e-3))

    return make


CASES: dict[str, Callable[[], Made]] = {
    "bare AdamW": tall(lambda params: torch.optim.AdamW(params, foreach=True)),
    "tall": tall(lambda params: adamw([{"params": params, "manifold": Stiefel()}], foreach=True)),
    "stiefel": stiefel(),
    **{f"stiefel {r}": stiefel(retraction=r) for r in ("qr", "svd", "cayley", "exp", "newton_schulz")},
    "stiefel euclidean": stiefel(metric="euclidean"),
    "stiefel none": stiefel(projection="none"),
    "stiefel transport": stiefel(transport="projection"),
    "stiefel spectral": stiefel(direction="spectral"),
    **{type(m).__name__: other(m) for m in (Grassmann(), SpecialOrthogonal(), Sphere(), Oblique())},
    "fixed rank": fixed_rank(),
    "fixed rank orthographic": fixed_rank(manifold=FixedRank(retraction="orthographic")),
    "fixed rank projected": fixed_rank(gradient="projected"),
    "Riemannion": fixed_rank(Riemannion, weight_decay=0.1),
    "StelLALinear": layers(StelLALinear),
    "RiemannLoRALinear": layers(RiemannLoRALinear),
    "RiemannLoRALinear keep": layers(RiemannLoRALinear, correction="keep"),
    # What must be seen here: the host waits for numbers, as this one says it does.
    "restore": fixed_rank(lambda groups: RiemannianWrapper(torch.optim.SGD(groups), nonfinite="restore")),
}


def tried(make: Callable[[], Made]) -> tuple[str, list[str], float, bool]:
    """Two steps: what was wrong, what waits, the passes that the second one makes, and whether in float64."""
    with FakeTensorMode():
        params, optimizer = make()
        for p in params:
            p.grad = torch.empty_like(p) if p.grad is None else p.grad
        first, second = Watch(), Watch()
        try:
            with first:
                optimizer.step()
            with second:
                optimizer.step()
        except Exception as error:
            return f"{type(error).__name__}: {error}", [], 0.0, False
    passes = second.touched / sum(p.numel() for p in params)
    return "", sorted(first.found | second.found), passes, first.doubles or second.doubles


def main() -> None:
    """Try every case."""
    torch.set_num_threads(1)
    _setup_privateuseone_for_python_backend(DEVICE)
    # Points are looked at when an optimizer is made, and the host hears of a step in the next one: not in a step.
    vars(manifold_step)["check_point"] = lambda *_: None
    torch.Event = Event  # type: ignore[assignment, misc]
    torch.accelerator.current_stream = lambda device: device  # type: ignore[assignment, misc]
    alarm.Alarm.rings = lambda self: False  # type: ignore[method-assign]
    print(json.dumps({name: tried(make) for name, make in CASES.items()}))


if __name__ == "__main__":
    main()
