"""A base module that somebody else holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class SharedBase:
    """Stands in for the base of a `LowRankLinear` whose real base belongs to another module.

    A PEFT tuner layer holds one base layer and several adapters. Each adapter reads the base's weight and merges into
    it through this, and has no submodule, so that state dicts name the base once.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def weight(self) -> Tensor:
        """The module's weight."""
        return self.module.weight  # type: ignore[return-value]

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.module.weight = value

    @property
    def bias(self) -> Tensor | None:
        """The module's bias."""
        return self.module.bias  # type: ignore[return-value]

    def requires_grad_(self, requires_grad: bool) -> SharedBase:
        """Nothing: what trains in the base is its holder's affair."""
        return self

    def __call__(self, *args: Any) -> Any:
        """What the module computes."""
        return self.module(*args)
