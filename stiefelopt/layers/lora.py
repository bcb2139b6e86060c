"""Plain LoRA checkpoints: an adapter leaves as one that stock PEFT loads, and one of PEFT's comes in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .adapt import adapt, adapted_layers, saved_modules
from .low_rank import LowRankLinear
from .stella import StelLALinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ConfigError(
            "LoRA checkpoints are safetensors files: pip install safetensors (or stiefelopt[peft])."
        ) from error
    return safetensors.torch


def export_lora(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str | None = None) -> Path:
    """Write the adapters as a stock PEFT LoRA checkpoint, which `peft.PeftModel.from_pretrained` loads.

    B A is the net change of each weight: U S V^T has rank r, so the checkpoint has rank r too (2 r where the
    initialization was taken out of the base weight), with the scale baked in (lora_alpha = r).

    Args:
        model: a model adapted by `adapt`.
        directory: made if missing; adapter_config.json and adapter_model.safetensors are written to it.
        adapter_name: for PEFT models with several adapters; None here.

    Returns:
        The directory.

    Raises:
        ConfigError: no adapted layer, Conv1D and Linear mixed, or safetensors is not installed.
    """
    if adapter_name is not None:
        raise ConfigError(
            "a model adapted by stiefelopt.adapt has one adapter without a name; leave adapter_name out."
        )
    safetensors = _safetensors()
    layers = adapted_layers(model)
    orientations = {layer.fan_in_fan_out for layer in layers.values()}
    if len(orientations) > 1:
        raise ConfigError(
            "a LoRA checkpoint cannot mix Conv1D and Linear layers; export them from separate models."
        )
    tensors: dict[str, Tensor] = {}
    ranks = {}
    for name, layer in layers.items():
        a, b = layer.to_lora()
        ranks[name] = a.shape[0]
        tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = (
            a.cpu(),
            b.cpu(),
        )
    saved = saved_modules(model)
    for name, module in saved.items():
        tensors.update(
            {f"{_PREFIX}{name}.{k}": t.detach().cpu().clone() for k, t in module.state_dict().items()}
        )
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(tensors, str(path / WEIGHTS), metadata={"format": "pt"})
    config = _lora_config(model, ranks, list(saved), orientations.pop())
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path


def _lora_config(
    model: nn.Module, ranks: dict[str, int], saved: list[str], fan_in_fan_out: bool
) -> dict[str, Any]:
    """adapter_config.json: scale 1 everywhere, since alpha equals the rank."""
    common = max(ranks.values())
    others = {name: k for name, k in ranks.items() if k != common}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": list(ranks),
        "modules_to_save": saved or None,
        "rank_pattern": others,
        "alpha_pattern": others,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def import_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    layer: Callable[..., LowRankLinear] = StelLALinear,
    **layer_options: Any,
) -> nn.Module:
    """Adapt a plain model with the updates of a PEFT LoRA checkpoint, so that training goes on with geometry.

    The thin SVD of scale B A gives U, S, V; the function is that of the checkpoint to rounding.

    Args:
        model: the plain base model.
        directory: a stock LoRA checkpoint with safetensors.
        layer: the adapter to use.
        layer_options: passed on, for example dropout; r and alpha come from the checkpoint.

    Raises:
        ConfigError: not a plain LoRA checkpoint, or it does not fit the model.
    """
    safetensors = _safetensors()
    path = Path(directory)
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise ConfigError(
            f"{path} holds no {CONFIG} with {WEIGHTS}; save the adapter with peft's save_pretrained first."
        )
    config = json.loads((path / CONFIG).read_text())
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise ConfigError(
            f"{path} is a {config.get('peft_type')} checkpoint (DoRA: {config.get('use_dora')}); plain LoRA is needed."
        )
    tensors = {k.removeprefix(_PREFIX): t for k, t in safetensors.load_file(str(path / WEIGHTS)).items()}
    names = [k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")]
    ranks = {tensors[f"{name}.lora_A.weight"].shape[0] for name in names}
    if len(ranks) != 1:
        raise ConfigError(
            f"the checkpoint has ranks {sorted(ranks)}; one rank for all layers is needed here."
        )
    r = ranks.pop()
    adapt(
        model,
        layer,
        target_modules=names,
        modules_to_save=config.get("modules_to_save") or (),
        r=r,
        alpha=r,
        **layer_options,
    )
    for name, module in adapted_layers(model).items():
        if name not in names:
            raise ConfigError(
                f"the checkpoint's name endings also match {name!r}, for which it has no factors."
            )
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        module.load_factors(_factors(_lora_scale(config, name, r) * b.double(), a.double(), module))
    for name, saved in saved_modules(model).items():
        prefix = f"{name}."
        saved.load_state_dict({k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)})
    return model


def _lora_scale(config: dict[str, Any], name: str, r: int) -> float:
    alpha = next(
        (
            a
            for pattern, a in (config.get("alpha_pattern") or {}).items()
            if name == pattern or name.endswith("." + pattern)
        ),
        config["lora_alpha"],
    )
    return alpha / (r**0.5 if config.get("use_rslora") else r)


def _factors(b: Tensor, a: Tensor, layer: LowRankLinear) -> dict[str, Tensor]:
    """U, S, V with scale U S V^T = b a, through two thin QRs and an r x r SVD."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    s = s / layer.scale
    return {
        "U": (qb @ u).to(layer.U),
        "S": (s if layer.diagonal else s.diag()).to(layer.S),
        "V": (qa @ vh.T).to(layer.V),
    }
