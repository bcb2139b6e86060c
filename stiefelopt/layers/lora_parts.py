"""What plain LoRA checkpoints are made of, and where their parts are found in an adapted model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import ConfigError
from .adapt import adapted_layers, inside_wrappers, saved_modules
from .low_rank import LowRankLinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Parts:
    """What a LoRA checkpoint is made of, under the names of the plain base model.

    Attributes:
        model: where these names are found. layers: the adapted ones. saved: modules trained whole.
        about: further entries of adapter_config.json. beyond: what a plain LoRA checkpoint would lack, if anything.
    """

    model: nn.Module
    layers: dict[str, LowRankLinear]
    saved: dict[str, nn.Module]
    about: dict[str, Any] = field(default_factory=dict)
    beyond: str = ""


# A reader gives the parts of the models it knows, and None of others; integrations add theirs.
Reader = Callable[[nn.Module, str | None], Parts | None]
READERS: list[Reader] = []


def parts_of(model: nn.Module, adapter_name: str | None) -> Parts:
    """The parts of a model that `adapt` or an integration has adapted, whatever wraps it."""
    for read in READERS:
        parts = read(model, adapter_name)
        if parts is not None:
            return parts
    model = inside_wrappers(model)
    layers = adapted_layers(model)
    if adapter_name is not None:
        raise ConfigError(
            "a model adapted by stiefelopt.adapt has one adapter without a name; leave adapter_name out."
        )
    source = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return Parts(model, layers, saved_modules(model), {"base_model_name_or_path": source})


def safetensors_module() -> Any:
    """The extra that reads and writes these files, imported only here."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ConfigError(
            "LoRA checkpoints are safetensors files: pip install safetensors (or stiefelopt[peft])."
        ) from error
    return safetensors.torch
