"""A base layer with named adapters, each of which is one of our layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import ConfigError, ShapeError
from ...layers import LowRankLinear
from ...layers.low_rank import forbid_fast_path, linear_sizes
from ...layers.nested import over_rows
from ...layers.shared import SharedBase
from .config import LowRankConfig
from .registration import BaseTunerLayer, check_adapters_to_merge

# PEFT's name, in mixed batches, for rows without an adapter.
BASE = "__base__"


class AdaptedLinear(nn.Module, BaseTunerLayer):
    """y = base_layer(x) + the updates of the active adapters.

    The one attribute in ``adapter_layer_names`` holds the adapters by name; each is a `LowRankLinear` on a shared base,
    of which the factors, the update, merging and the state are.
    """

    adapter_layer_names: tuple[str, ...]
    other_param_names: tuple[str, ...] = ()
    # What BaseTunerLayer gives.
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[[list[str]], None]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LowRankConfig, r: int, alpha: float | None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features, self.fan_in_fan_out = linear_sizes(self.get_base_layer())
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.add_module(self.adapter_layer_names[0], nn.ModuleDict())
        self.register_forward_pre_hook(forbid_fast_path)
        self.update_layer(adapter_name, config, r, alpha)
        self.train(base_layer.training)

    @property
    def adapters(self) -> dict[str, LowRankLinear]:
        """The adapters by name."""
        return cast("dict[str, LowRankLinear]", self._held._modules)

    @property
    def _held(self) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self._modules[self.adapter_layer_names[0]])

    def update_layer(self, adapter_name: str, config: LowRankConfig, r: int, alpha: float | None) -> None:
        """Add an adapter, or start one again."""
        if self.merged:
            warnings.warn("An adapter is added to a merged layer, which is unmerged first.", stacklevel=2)
            self.unmerge()
        self._held[adapter_name] = config.make_layer(self.get_base_layer(), r, alpha).train(self.training)
        self.set_adapter(self.active_adapters)

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """base_layer(x) plus updates: of the active adapters, or of the one named for each row of x.

        Raises:
            ShapeError: another number of names than of rows.
            ConfigError: rows with names while adapters are merged.
        """
        if x.is_nested and adapter_names is None:
            return over_rows(lambda rows: self.forward(rows, *args, **kwargs), x)
        if adapter_names is not None:
            self._check_rows(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        off = self.disable_adapters or self.merged
        active = (
            [] if off else [self.adapters[name] for name in self.active_adapters if name in self.adapters]
        )
        alone = len(active) == 1 and adapter_names is None and not (args or kwargs)
        # The fused form knows the innermost base alone: not a tuner below this one, nor what has taken its place since.
        if alone and cast(SharedBase, active[0].base).module is self.base_layer and active[0].may_fuse(x):
            return active[0].forward(x)
        y = self.base_layer(x, *args, **kwargs)
        if adapter_names is not None and not off:
            return self._mixed(y, x, adapter_names)
        for adapter in active:
            y = adapter.add_update(y, x)
        return y

    def _check_rows(self, x: Tensor, adapter_names: Sequence[str]) -> None:
        if len(adapter_names) != len(x):
            raise ShapeError(
                f"adapter_names has {len(adapter_names)} names for an input of {len(x)} rows; the Length of "
                f"`adapter_names` should be the same as the number of inputs."
            )
        if self.merged:
            raise ConfigError(
                "adapter_names cannot choose among adapters that are merged; call unmerge_adapter() first."
            )

    def _mixed(self, y: Tensor, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        for name in dict.fromkeys(adapter_names):
            if name != BASE and name in self.adapters:
                rows = torch.tensor([i for i, n in enumerate(adapter_names) if n == name], device=y.device)
                y = y.index_copy(0, rows, self.adapters[name].add_update(y[rows], x[rows]))
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the named adapters, default the active ones, to the base weight.

        Raises:
            ConfigError: ``safe_merge``, and the merged weight is not finite; nothing has changed.
        """
        merged_before = len(self.merged_adapters)
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.adapters:
                continue
            # Whoever has put another base layer here since the adapter was made means this one.
            cast(SharedBase, self.adapters[name].base).module = self.get_base_layer()
            self.adapters[name].merge()
            self.merged_adapters.append(name)
            if safe_merge and not bool(torch.isfinite(self.adapters[name].weight).all()):
                self.unmerge_to(merged_before)
                raise ConfigError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken; nothing is merged."
                )

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.unmerge_to(0)

    def unmerge_to(self, count: int) -> None:
        """Undo the last merges, down to that many; each adapter holds the weight from before its own."""
        while len(self.merged_adapters) > count:
            self.adapters[self.merged_adapters.pop()].unmerge()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What the adapter adds to the base weight, lying as that does; zero where the adapter is absent."""
        if adapter_name not in self.adapters:
            return torch.zeros_like(cast(Tensor, self.get_base_layer().weight))
        delta = self.adapters[adapter_name].delta_weight()
        return delta.T if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Always: the update is a matrix beside the weight."""
        return True

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """New factors take effect: what the old ones were merged into is put back."""
        held = f"{prefix}{self.adapter_layer_names[0]}."
        if any(
            f"{held}{name}.{self.adapters[name].FACTORS[0]}" in state_dict for name in self.merged_adapters
        ):
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __repr__(self) -> str:
        return f"stiefelopt.{super().__repr__()}"


class StellaLinear(AdaptedLinear):
    """A base layer with adapters `stiefelopt.StelLALinear`."""

    adapter_layer_names: tuple[str, ...] = ("stella_adapter",)


class RiemannLoraLinear(AdaptedLinear):
    """A base layer with adapters `stiefelopt.RiemannLoRALinear`."""

    adapter_layer_names: tuple[str, ...] = ("riemann_lora_adapter",)
