"""float32 masters of half-precision parameters: in bfloat16 most of a small step would round away.

While the inner optimizer steps, it sees float32 stand-ins in the place of the parameters: the masters, orthonormal
matrices of which the half-precision ones are the nearest roundings. Parameters never change their dtype, which would
cut them off the node of the graph that DistributedDataParallel listens to. Between steps the master lies in the inner
optimizer's state, under "master", and so in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .shapes import HALF, compute_dtype
from .transforms import host_can_look

KEY = "master"


def inner_optimizers(optimizer: Optimizer) -> list[Optimizer]:
    """Those that an optimizer holds and steps with, as Lookahead does."""
    held = [
        each for found in vars(optimizer).values() for each in (found if type(found) is list else [found])
    ]
    return [each for each in held if isinstance(each, Optimizer)]


class Exchange:
    """float32 tensors in the place of half-precision parameters, as far as an optimizer can see.

    Groups and state name them instead. Optimizers around others name parameters in further places (TRAC below a key of
    the state, Magma by id): there the parameters themselves turn float32.

    Args:
        optimizer: theirs.
        params: the parameters.
        values: float32, one for each.
    """

    def __init__(self, optimizer: Optimizer, params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self._optimizer, self._params = optimizer, params
        self._own = [p.data for p in params]
        self._grads = [p.grad for p in params]
        self._turns = bool(inner_optimizers(optimizer))
        if self._turns:
            self.seen = list(params)
            _turn(params, values)
        else:
            self.seen = [nn.Parameter(v, p.requires_grad) for p, v in zip(params, values, strict=True)]
            _rename(optimizer, params, self.seen)
            for p in params:
                p.grad = None  # what is found here at the end was computed since

    def undo(self) -> list[Tensor]:
        """Let the optimizer see parameters and gradients as they were; returns what the values have become."""
        become = [t.data for t in self.seen]
        if self._turns:
            _turn(self._params, self._own)
        else:
            _rename(self._optimizer, self.seen, self._params)
        for p, grad in zip(self._params, self._grads, strict=True):
            p.grad = grad
        return become


def _turn(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.grad = None  # of the other dtype, which torch refuses side by side
        p.data = value


def _rename(optimizer: Optimizer, olds: Sequence[Tensor], news: Sequence[Tensor]) -> None:
    """Let groups and state name the new tensors in place of the old; the lists stay the ones they are."""
    new_of = dict(zip(map(id, olds), news, strict=True))
    for group in optimizer.param_groups:
        group["params"][:] = [new_of.get(id(p), p) for p in group["params"]]
    for old, new in zip(olds, news, strict=True):
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)


class Masters:
    """The masters of a few parameters, and the exchange of one for the other around the inner step."""

    def __init__(self, params: Sequence[Tensor], optimizer: Optimizer) -> None:
        self._params = params
        self._optimizer = optimizer
        self._exchange: Exchange | None = None

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

    def enter(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Let the optimizer step these tensors in place; returns what it sees of them."""
        for p in self._params:
            self._lift_state(p)
        self._exchange = Exchange(self._optimizer, self._params, values)
        return self._exchange.seen

    def _lift_state(self, p: Tensor) -> None:
        """State that the optimizer made before the first step (Adagrad's) has the parameter's dtype."""
        state = self._optimizer.state.get(p, {})
        if KEY in state:
            return  # half precision since then is the optimizer's own choice (Adafactor's average of gradients)
        for name, t in state.items():
            if isinstance(t, Tensor) and t.dtype in HALF:
                state[name] = t.to(compute_dtype(p.dtype))

    def leave(self) -> list[Tensor]:
        """Undo `enter`; returns what the optimizer stepped."""
        exchange, self._exchange = self._exchange, None
        return [] if exchange is None else exchange.undo()

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
def lifted(optimizer: Optimizer, params: Iterable[Tensor]) -> Iterator[None]:
    """Half-precision parameters as float32 ones, for torch's load_state_dict casts state to their dtype."""
    half = [p for p in params if p.dtype in HALF]
    exchange = Exchange(optimizer, half, [p.detach().float() for p in half])
    try:
        yield
    finally:
        exchange.undo()


def reload(optimizer: Optimizer, params: Iterable[Tensor], state_dict: Mapping[str, Any]) -> None:
    """Where torch's load_state_dict has just cast state of half-precision parameters to their dtype: undo that."""
    half = {id(p) for p in params if p.dtype in HALF}
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(saved, own, strict=True):
        for name, t in state_dict["state"].get(i, {}).items() if id(p) in half else ():
            if isinstance(t, Tensor) and t.is_floating_point() and optimizer.state[p][name].dtype in HALF:
                optimizer.state[p][name] = t.to(p.device, torch.float32, copy=True)


def lower_state(optimizer: Optimizer, p: Tensor) -> None:
    """For a half-precision parameter that leaves its manifold: state of its own dtype again, and no master."""
    if KEY not in optimizer.state.get(p, {}):
        return
    del optimizer.state[p][KEY]
    for state in [each.state.get(p, {}) for each in (optimizer, *inner_optimizers(optimizer))]:
        for name, t in state.items():
            if isinstance(t, Tensor) and t.dtype == torch.float32 and t.ndim == p.ndim:
                state[name] = t.to(p.dtype)
