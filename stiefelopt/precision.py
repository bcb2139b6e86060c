"""float32 masters of half-precision parameters: in bfloat16 most of a small step would round away.

While the inner optimizer steps, parameter and gradient are float32: the parameter is its master, an orthonormal
matrix of which the half-precision one is the nearest rounding. Between steps the master lies in the inner optimizer's
state, under "master", and so in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .shapes import HALF, compute_dtype
from .transforms import host_can_look

KEY = "master"


class Masters:
    """The masters of a few parameters, and the exchange of one for the other around the inner step."""

    def __init__(self, params: Sequence[Tensor], optimizer: Optimizer) -> None:
        self._params = params
        self._optimizer = optimizer
        self._own: list[Tensor] = []

    def values(self) -> list[Tensor]:
        """The masters; a parameter that was changed since, or has none yet, is its own."""
        return [self._value(p) for p in self._params]

    def _value(self, p: Tensor) -> Tensor:
        master = self._optimizer.state[p].get(KEY) if p in self._optimizer.state else None
        if master is None or master.shape != p.shape:
            return p.detach().to(compute_dtype(p.dtype))
        if host_can_look(p):
            return master if torch.equal(master.to(p.dtype), p) else p.detach().to(master.dtype)
        return torch.where((master.to(p.dtype) == p).all(), master, p.detach().to(master.dtype))

    def enter(self, values: Sequence[Tensor]) -> None:
        """Let the parameters be these tensors; the optimizer steps them in place."""
        self._own = [p.data for p in self._params]
        for p, value in zip(self._params, values, strict=True):
            p.grad = None  # of the other dtype, which torch refuses side by side
            p.data = value
            self._lift_state(p)

    def _lift_state(self, p: Tensor) -> None:
        """State that the optimizer made before the first step (Adagrad's) has the parameter's old dtype."""
        state = self._optimizer.state.get(p, {})
        if KEY in state:
            return  # half precision since then is the optimizer's own choice (Adafactor's average of gradients)
        for name, t in state.items():
            if isinstance(t, Tensor) and t.dtype in HALF:
                state[name] = t.to(p.dtype)

    def leave(self) -> list[Tensor]:
        """Let the parameters be what they were; returns what the optimizer stepped."""
        stepped = [p.data for p in self._params]
        for p, own in zip(self._params, self._own, strict=True):
            p.grad = None
            p.data = own
        self._own = []
        return stepped

    def keep(self, values: Sequence[Tensor], stepped: Sequence[bool]) -> None:
        """Store the new masters, but for those not stepped: many optimizers take any state for their own."""
        for p, value, was in zip(self._params, values, stepped, strict=True):
            if not was:
                continue
            state = self._optimizer.state[p]
            master = state.get(KEY)
            if isinstance(master, Tensor) and (master.shape, master.dtype) == (value.shape, value.dtype):
                master.copy_(value)  # the same memory at every step, as a captured graph needs
            else:
                state[KEY] = value.clone()


@contextmanager
def lifted(params: Iterable[Tensor]) -> Iterator[None]:
    """Half-precision parameters as float32 ones, for torch's load_state_dict casts state to their dtype."""
    half = [(p, p.data) for p in params if p.dtype in HALF]
    grads = [p.grad for p, _ in half]
    try:
        for p, own in half:
            p.grad = None
            p.data = own.to(torch.float32)
        yield
    finally:
        for (p, own), grad in zip(half, grads, strict=True):
            p.data = own
            p.grad = grad


def reload(optimizer: Optimizer, params: Iterable[Tensor], state_dict: Mapping[str, Any]) -> None:
    """Where torch's load_state_dict has just cast state of half-precision parameters to their dtype: undo that."""
    half = {id(p) for p in params if p.dtype in HALF}
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(saved, own, strict=True):
        for name, t in state_dict["state"].get(i, {}).items() if id(p) in half else ():
            if isinstance(t, Tensor) and t.is_floating_point() and optimizer.state[p][name].dtype in HALF:
                optimizer.state[p][name] = t.to(p.device, torch.float32, copy=True)
