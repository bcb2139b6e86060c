"""A plain LoRA checkpoint of PEFT's comes in, and training goes on with geometry."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..full_precision import full_precision
from .adapt import adapt, check_state, ends_with, plain_name, plainly_named
from .lora_parts import CONFIG, PREFIX, WEIGHTS, parts_of, safetensors_module
from .low_rank import LowRankLinear, linear_sizes
from .stella import StelLALinear
from .tied import check_tied, tied_to

# What makes of a LoRA checkpoint another function than W + scale B A: the entry of adapter_config.json, and its name.
_BEYOND_LORA = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layers that are replicated",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "single tokens that are trained",
}
# The options of `adapt` and of our tuners that a checkpoint decides.
_FROM_CHECKPOINT = {"r", "alpha", "rank_pattern", "target_modules", "exclude_modules", "modules_to_save"}
# Beginnings of `init_lora_weights` that change W itself, so that the pairs are meant for another base model.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def import_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    layer: Callable[..., Any] = StelLALinear,
    **layer_options: Any,
) -> nn.Module:
    """Adapt a plain model with the updates of a PEFT LoRA checkpoint, so that training goes on with geometry.

    The thin SVD of scale B A gives U, S, V; the function is that of the checkpoint to rounding.

    Args:
        model: the plain base model.
        directory: a stock LoRA checkpoint with safetensors.
        layer: the adapter to use: a layer class, or a config class of our PEFT tuners, which gives a PeftModel.
        layer_options: passed on, for example dropout; ranks, which may differ by layer, and scales come from the
            checkpoint.

    Returns:
        The model, or the PeftModel around it.

    Raises:
        ConfigError: not a plain LoRA checkpoint (DoRA, activated LoRA, PiSSA before its conversion, ...), it does not
            fit the model, or an option that the checkpoint decides.
    """
    if not callable(layer):
        raise ConfigError(
            f"layer is the object {type(layer).__name__}(...); a class is needed, and its options after it: "
            f"import_lora(model, directory, {type(layer).__name__}, ...)."
        )
    given = sorted(_FROM_CHECKPOINT.intersection(layer_options))
    if given:
        raise ConfigError(f"import_lora got {', '.join(given)}, which the checkpoint decides; leave it out.")
    safetensors = safetensors_module()
    path = Path(directory)
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise ConfigError(
            f"{path} holds no {CONFIG} with {WEIGHTS}; save the adapter with peft's save_pretrained first."
        )
    config = json.loads((path / CONFIG).read_text())
    _check_plain(config, path)
    tensors = {k.removeprefix(PREFIX): t for k, t in safetensors.load_file(str(path / WEIGHTS)).items()}
    endings = _modules_to_save(model, config)
    pairs, saved, base = _sort_tensors(model, tensors, endings)
    put_in = getattr(layer, "put_in", None)
    changed = dict(base)
    if put_in is None:  # PEFT trains copies, `adapt` the parameters themselves
        changed.update({f"{name}.{key}": t for name, state in saved.items() for key, t in state.items()})
        put_in = functools.partial(_adapt_to, layer)
    check_tied(model, changed)
    vocabulary = _vocabulary(model)
    weights = {vocabulary[name]: t for name, t in base.items()}
    factors = {
        name: _factors(name, _lora_scale(config, name, len(a)) * b.double(), a.double())
        for name, (a, b) in pairs.items()
    }
    ranks = {name: len(sigma) for name, (_, sigma, _) in factors.items()}
    adapted = put_in(model, ranks, endings, {"task_type": config.get("task_type")}, **layer_options)
    parts = parts_of(adapted, None)
    with torch.no_grad():
        for p, t in weights.items():
            p.copy_(t)
    for name, (u, sigma, v) in factors.items():
        adapter = parts.layers[name]
        state = adapter.factors_from(u, sigma / adapter.scale, v)
        adapter.load_factors({key: t.to(adapter.U) for key, t in state.items()})
    for name, state in saved.items():
        parts.saved[name].load_state_dict(state)
    return adapted


def _check_plain(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint whose function is not that of its base model with B A added."""
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{path} is a {config.get('peft_type')} checkpoint; plain LoRA is needed.")
    beyond = next((key for key in _BEYOND_LORA if config.get(key)), None)
    if beyond is not None:
        raise ConfigError(f"{path} has {_BEYOND_LORA[beyond]} ({beyond}); plain LoRA is needed.")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise ConfigError(
            f"{path} was trained from init_lora_weights={init!r}, which changes the base weights too; plain LoRA is "
            f"needed: save it with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...), which "
            f"PEFT has for PiSSA, OLoRA, CorDA and LoRA-GA."
        )


def _modules_to_save(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """The name endings of the modules saved whole, with those that PEFT has tied to them.

    Those that the model lacks are left out, as PEFT does: for a classifier it writes both "classifier" and "score".
    """
    named = config.get("modules_to_save") or ()
    endings = [e for e in named if any(ends_with(name, [e]) for name in plainly_named(model))]
    if not config.get("ensure_weight_tying"):
        return endings
    saved = {name: m for name, m in plainly_named(model).items() if name and ends_with(name, endings)}
    return [*endings, *tied_to(model, saved)]


def _adapt_to(
    layer: Callable[..., LowRankLinear],
    model: nn.Module,
    ranks: Mapping[str, int],
    modules_to_save: Sequence[str],
    about: Mapping[str, Any],
    **layer_options: Any,
) -> nn.Module:
    """Adapt exactly the named modules with layers of these ranks and scale 1; what it is about has no place here."""
    exactly = "|".join(map(re.escape, ranks))
    named = plainly_named(model)
    rank_of = {named[name]: r for name, r in ranks.items()}

    def of_its_rank(base: nn.Module, r: int, **options: Any) -> LowRankLinear:
        return layer(base, rank_of[base], **options)

    r = min(ranks.values())  # one that all may have
    return adapt(
        model, of_its_rank, target_modules=exactly, modules_to_save=modules_to_save, r=r, **layer_options
    )


Pairs = dict[str, tuple[Tensor, Tensor]]
States = dict[str, dict[str, Tensor]]


def _vocabulary(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model's embedding and of its head, by name."""
    parts: list[Any] = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(NotImplementedError):
            parts.append(getattr(model, get, lambda: None)())
    named = [(name, m) for name, m in plainly_named(model).items() if any(m is part for part in parts)]
    return {f"{name}.{plain_name(key)}": p for name, m in named for key, p in m.named_parameters()}


def _sort_tensors(
    model: nn.Module, tensors: dict[str, Tensor], endings: list[str]
) -> tuple[Pairs, States, dict[str, Tensor]]:
    """(A, B) by layer, the states of the modules saved whole, and base weights that the model has otherwise.

    PEFT saves embedding and head where they are among the targets or the vocabulary has been resized. Whatever fits
    nowhere is refused by name.
    """
    modules, vocabulary = plainly_named(model), _vocabulary(model)
    pairs: Pairs = {}
    base: dict[str, Tensor] = {}
    saved: States = {name: {} for name in modules if name and ends_with(name, endings)}
    for key, t in tensors.items():
        name, _, part = key.rpartition(".lora_")
        owner = next((n for n in saved if key.startswith(n + ".")), None)
        plain = key.replace(".base_layer.", ".")
        if part == "A.weight" and f"{name}.lora_B.weight" in tensors:
            pairs[name] = t, tensors[f"{name}.lora_B.weight"]
        elif owner is not None:
            saved[owner][key[len(owner) + 1 :]] = t
        elif plain in vocabulary:
            base[plain] = t
        elif part in ("A.weight", "B.weight"):
            other = f"{name}.lora_{'B' if part[0] == 'A' else 'A'}.weight"
            if other not in tensors:
                raise ConfigError(
                    f"the checkpoint holds {key!r} without {other!r}; it is incomplete: save it again."
                )
        else:
            raise ConfigError(
                f"the checkpoint holds {key!r}, which is neither half of a LoRA pair on a linear layer nor part of a "
                f"module of the model in modules_to_save; only plain LoRA (bias='none') can be imported, into its own "
                f"base model."
            )
    if not pairs:
        raise ConfigError("the checkpoint has no LoRA pair; plain LoRA on linear layers is needed.")
    for name, t in base.items():
        own = tuple(vocabulary[name].shape)
        if t.shape != own:
            raise ConfigError(
                f"the checkpoint holds the base weight {name!r} as {tuple(t.shape)}, and the model has {own}: another "
                f"base model, or one whose vocabulary was resized; model.resize_token_embeddings({len(t)}) first."
            )
    for name, (a, b) in pairs.items():
        if name not in modules:
            raise ConfigError(
                f"the checkpoint adapts {name!r}, which the model lacks; import it into its own base model."
            )
        n, m, _ = linear_sizes(modules[name])
        if a.shape[1] != n or b.shape != (m, a.shape[0]):
            raise ConfigError(
                f"{name!r} is a layer {n} -> {m}, and its pair is {tuple(a.shape)}, "
                f"{tuple(b.shape)}: another base model."
            )
    for name, state in saved.items():
        check_state(name, modules[name], state)
    differing = {k: t for k, t in base.items() if not torch.equal(t.to(vocabulary[k]), vocabulary[k])}
    return pairs, saved, differing


def _lora_scale(config: dict[str, Any], name: str, r: int) -> float:
    """PEFT's rule: the first alpha_pattern that matches the name's end, else lora_alpha."""
    patterns = (config.get("alpha_pattern") or {}).items()
    matching = (alpha for key, alpha in patterns if re.match(rf"(.*\.)?({key})$", name))
    return next(matching, config["lora_alpha"]) / (r**0.5 if config.get("use_rslora") else r)


@full_precision
def _factors(name: str, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, the diagonal of S, and V with U S V^T = b a, through two thin QRs and the SVD of a small matrix.

    Their rank is that of the pair or, where that is larger, the smaller size of the layer: b a has no more.
    """
    if not bool(torch.isfinite(b).all() & torch.isfinite(a).all()):
        raise ConfigError(
            f"the checkpoint's pair of {name!r} holds NaN or infinite values; use one that was saved before they came."
        )
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return qb @ u, s, qa @ vh.T
