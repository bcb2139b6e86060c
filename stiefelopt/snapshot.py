"""All that a step of an optimizer changes, kept so that a failed step can be taken back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .distributed import local


class Snapshot:
    """Parameters, state and group settings of an optimizer. Tensors keep their identity, copies their memory."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._state: dict[Tensor, dict[Any, Any]] = {}
        self._settings: list[dict[str, Any]] = []

    def take(self) -> None:
        """Remember everything as it is. Cost: one copy of the parameters and of the state."""
        groups, state = self._optimizer.param_groups, self._optimizer.state
        self._state = {p: _kept(found) for p, found in state.items()}
        self._settings = [_kept({k: v for k, v in group.items() if k != "params"}) for group in groups]
        tensors = [p for group in groups for p in group["params"]]
        for found in (*self._state.values(), *self._settings):
            tensors += [t for t in found.values() if isinstance(t, Tensor)]
        self._copy(tensors)

    def _copy(self, tensors: list[Tensor]) -> None:
        same = len(tensors) == len(self._tensors) and all(
            a is b and local(a).shape == c.shape and a.dtype == c.dtype
            for a, b, c in zip(tensors, self._tensors, self._copies, strict=True)
        )
        if same:
            _copy(self._copies, [local(t) for t in tensors])
        else:
            self._tensors, self._copies = tensors, [local(t).detach().clone() for t in tensors]

    def put_back(self) -> None:
        """Let everything be what it was."""
        _copy([local(t).detach() for t in self._tensors], self._copies)
        state = self._optimizer.state
        for p in list(state):
            if p not in self._state:
                del state[p]
        for p, kept in self._state.items():
            state[p] = dict(kept)
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=True):
            group.update(settings)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:  # torch refuses none
        torch._foreach_copy_(targets, sources)


def _kept(found: dict[Any, Any]) -> dict[Any, Any]:
    """A copy that shares the tensors: these go back by their contents."""
    return {k: v if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in found.items()}
