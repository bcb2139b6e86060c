"""How `export_lora` and `import_lora` read a model that PEFT has adapted with our tuners."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import ConfigError, UnknownNameError
from ...layers.adapt import plainly_named
from ...layers.lora_parts import Parts
from .layer import AdaptedLinear
from .registration import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, PeftModel


def peft_parts(model: nn.Module, adapter_name: str | None) -> Parts | None:
    """The parts of one adapter; None if the model holds no layer of ours.

    Raises:
        UnknownNameError: no adapter of that name.
        ConfigError: several are active.
    """
    base, configs = _inside_wrappers(model)
    modules = plainly_named(base)
    layers = {name: m for name, m in modules.items() if isinstance(m, AdaptedLinear)}
    if not layers:
        return None
    name = _chosen(adapter_name, next(iter(layers.values())), configs)
    config = configs[name]
    beyond = f"the adapter {name!r} trains biases" if config.bias != "none" else ""
    saved = {}
    for key, module in modules.items():
        if isinstance(module, ModulesToSaveWrapper):
            if name in module.modules_to_save:
                saved[key] = module.modules_to_save[name]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            beyond = f"{key} is a {type(module).__name__}"
    about = {"task_type": config.task_type, "base_model_name_or_path": config.base_model_name_or_path}
    adapters = {key: m.adapters[name] for key, m in layers.items() if name in m.adapters}
    return Parts(base, adapters, saved, about, beyond)


def _inside_wrappers(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The plain model under whatever wraps it, and the configs of its adapters, which PEFT keeps in it."""
    for module in model.modules():
        if isinstance(module, PeftModel):
            return module.get_base_model(), module.peft_config
        if "peft_config" in module.__dict__:
            return module, module.__dict__["peft_config"]
    return model, {}


def _chosen(adapter_name: str | None, layer: AdaptedLinear, configs: dict[str, Any]) -> str:
    """The adapter that is meant."""
    active = layer.active_adapters
    if adapter_name is None and len(active) != 1:
        raise ConfigError(f"the active adapters are {active}; say which one: adapter_name=...")
    name = active[0] if adapter_name is None else adapter_name
    if name not in configs:
        known = ", ".join(map(repr, configs)) or "none: pass the model that PEFT gave, not a part of it"
        raise UnknownNameError(f"there is no adapter {name!r}; there are {known}.")
    return name
