"""An adapter leaves as a plain LoRA checkpoint, which stock PEFT loads."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import whole, write_once
from ..errors import ConfigError, UnknownNameError
from .adapt import ends_with, plain_name, plainly_named
from .lora_parts import CONFIG, PREFIX, WEIGHTS, Parts, parts_of, safetensors_module
from .tied import peft_ties, tied_to

# PEFT's tasks, and the endings of the modules that it takes to be saved whole for them, where the model has them.
_TASKS: dict[str, tuple[str, ...]] = {
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def export_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    task_type: str | None = None,
) -> Path:
    """Write the adapters as a stock PEFT LoRA checkpoint, which `peft.PeftModel.from_pretrained` loads.

    B A is the net change of each weight: U S V^T has rank r, so the checkpoint has rank r too (2 r where the
    initialization was taken out of the base weight), with the scale baked in (lora_alpha = r).

    Args:
        model: a model adapted by `adapt`, or by PEFT with one of our tuners, wrapped (torch.compile, DDP) or not.
            Sharded: called on all ranks, the first one writes.
        directory: made if missing; adapter_config.json and adapter_model.safetensors are written to it.
        adapter_name: of a PEFT model; default: the active one.
        task_type: PEFT's word for what the model does, such as "CAUSAL_LM": PEFT then loads it as that kind of
            PeftModel, with the head of a classifier among what is saved. Default: that of a PEFT model; without one,
            the model's class is written, which is all that PEFT's auto classes need.

    Returns:
        The directory.

    Raises:
        UnknownNameError: a task that PEFT does not know.
        ConfigError: no adapted layer, an adapted or saved module that is used in two places, an adapted layer whose
            base weight is trained in a saved one, or safetensors is not installed.
    """
    safetensors = safetensors_module()
    parts = parts_of(model, adapter_name)
    if parts.beyond:
        raise ConfigError(f"{parts.beyond}, which a plain LoRA checkpoint cannot hold; use save_pretrained.")
    if task_type is not None:
        parts = _for_task(parts, task_type)
    parts = _with_tied(parts)
    _check_places(parts)
    tensors: dict[str, Tensor] = {}
    ranks = {}
    for name, layer in parts.layers.items():
        a, b = layer.to_lora()
        ranks[name] = a.shape[0]
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = (
            a.cpu(),
            b.cpu(),
        )
    for name, module in parts.saved.items():
        state = {plain_name(k): whole(t).detach().cpu() for k, t in module.state_dict().items()}
        tensors.update(
            {f"{PREFIX}{name}.{k}": t.clone(memory_format=torch.contiguous_format) for k, t in state.items()}
        )
    path = Path(directory)
    config = _lora_config(parts, ranks)

    def write() -> None:
        path.mkdir(parents=True, exist_ok=True)
        safetensors.save_file(tensors, str(path / WEIGHTS), metadata={"format": "pt"})
        (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    write_once(model.parameters(), write)
    return path


def _for_task(parts: Parts, task_type: str) -> Parts:
    """The parts with the heads that PEFT takes to be saved whole for a task."""
    if task_type not in _TASKS:
        known = ", ".join(map(repr, _TASKS))
        raise UnknownNameError(f"task_type is {task_type!r}; use one of {known}, or leave it out.")
    heads = {name: m for name, m in plainly_named(parts.model).items() if ends_with(name, _TASKS[task_type])}
    adapted = next((name for name in heads if name in parts.layers), None)
    if adapted is not None:
        raise ConfigError(
            f"task_type={task_type!r} makes PEFT save {adapted} whole, and it is adapted; leave task_type out."
        )
    return replace(parts, saved={**heads, **parts.saved}, about={**parts.about, "task_type": task_type})


def _class_of(model: nn.Module) -> type:
    """The class of a model; fully_shard puts two in front of it."""
    first, second, *others = type(model).__mro__
    return others[0] if second.__name__ == "FSDPModule" else first


def _with_tied(parts: Parts) -> Parts:
    """The parts with all modules that hold a trained parameter among the saved ones, since PEFT trains copies.

    PEFT ties the copies again where it can; elsewhere they have the same values.
    """
    tied = tied_to(parts.model, parts.saved)
    adapted = (n for n in parts.layers if any(name.startswith(n + ".") for name in tied))
    holder = next(adapted, "the model itself" if "" in tied else None)
    if holder is not None:
        raise ConfigError(
            f"{holder} holds a parameter that is trained in {', '.join(parts.saved)}, where PEFT would train a copy; "
            f"save it with adapter_state_dict, or merge_adapters(model) and save the whole model."
        )
    saved = {**parts.saved, **tied}
    about = {"ensure_weight_tying": True} if peft_ties(parts.model, saved) else {}
    return replace(parts, saved=saved, about={**parts.about, **about})


def _check_places(parts: Parts) -> None:
    """Refuse a module that several modules hold: PEFT adapts it in one of them and leaves it plain in the others."""
    places: dict[nn.Module, dict[tuple[nn.Module, str], str]] = {}
    for place, module in parts.model.named_modules(remove_duplicate=False):
        parent, _, leaf = place.rpartition(".")
        name = plain_name(place)
        places.setdefault(module, {}).setdefault((parts.model.get_submodule(parent), leaf), name)
    named = plainly_named(parts.model)
    for name in (*parts.layers, *parts.saved):
        names = list(places[named[name]].values())
        if len(names) > 1:
            raise ConfigError(
                f"{' and '.join(names)} are one module, and a LoRA checkpoint would change it in one place only; save "
                f"it with adapter_state_dict, or merge_adapters(model) and save the whole model."
            )


def exact_targets(model: nn.Module, names: Iterable[str]) -> list[str] | str:
    """target_modules that mean these modules and no others."""
    names = list(names)
    if any(ends_with(name, names) for name in plainly_named(model) if name not in names):
        # PEFT reads a list as endings, and would adapt more than these; it matches a string in full.
        return "|".join(map(re.escape, names))
    return names


def rank_patterns(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The commonest rank, and PEFT's rank_pattern for the others."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    return common, {"^" + re.escape(name): k for name, k in ranks.items() if k != common}


def _lora_config(parts: Parts, ranks: dict[str, int]) -> dict[str, Any]:
    """adapter_config.json: scale 1 everywhere, since alpha equals the rank."""
    common, others = rank_patterns(ranks)
    model_class = _class_of(parts.model)
    auto = {"base_model_class": model_class.__name__, "parent_library": model_class.__module__}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None if parts.about.get("task_type") else auto,  # as in PEFT
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "bias": "none",
        # PEFT turns it layer by layer, with a warning, where Conv1D and Linear are mixed.
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in parts.layers.values()),
        "target_modules": exact_targets(parts.model, ranks),
        "modules_to_save": list(parts.saved) or None,
        "rank_pattern": others,
        "alpha_pattern": others,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        **parts.about,
    }
