"""Plain PEFT LoRA layers, known by their structure: which pairs (A, B) of theirs are a matrix W = B A and no more.

PEFT is not imported. A LoRA layer holds two `nn.ModuleDict`s, `lora_A` and `lora_B`, with one linear layer for each
adapter. What such a layer computes from them in any other way than x -> B A x is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from .errors import ConfigError

# LoRA on what is no linear layer keeps its factors elsewhere.
_ELSEWHERE = {"lora_embedding_A": "an embedding", "lora_embedding_B": "an embedding"}
_WAY_OUT = "leave lora= out, target other modules, or freeze it (requires_grad_(False))"


class LoraPair(NamedTuple):
    """One pair of factors and the names of both in the model."""

    a_name: str
    a: Tensor
    b_name: str
    b: Tensor


def lora_pairs(model: nn.Module, *, trainable_only: bool = True) -> list[LoraPair]:
    """The pairs of every plain LoRA layer, in the order of the model's modules and of a layer's adapters.

    Args:
        model: a PEFT model, or any module with such layers inside.
        trainable_only: leave out frozen adapters; PEFT freezes those that are not active.

    Raises:
        ConfigError: none is there; a pair is frozen in half or shared; a layer computes anything but x -> B A x.
    """
    pairs = [
        pair for name, module in model.named_modules() for pair in _of_layer(name, module, trainable_only)
    ]
    if not pairs:
        raise ConfigError(
            f"lora='fixed-rank' finds no {'trainable ' * trainable_only}LoRA pair in {type(model).__name__}: pass the "
            f"model that get_peft_model(model, LoraConfig(...)) returned, with an adapter that is active."
        )
    owners: dict[int, LoraPair] = {}
    for pair in pairs:
        for name, p in ((pair.a_name, pair.a), (pair.b_name, pair.b)):
            if id(p) in owners:
                raise ConfigError(
                    f"the factor {name} is shared with another pair ({owners[id(p)].a_name}), and cannot move with "
                    f"both: {_WAY_OUT}."
                )
            owners[id(p)] = pair
    return pairs


def _of_layer(name: str, module: nn.Module, trainable_only: bool) -> Iterator[LoraPair]:
    for where, what in _ELSEWHERE.items():
        for adapter, p in getattr(module, where, {}).items():
            if p.requires_grad or not trainable_only:
                raise ConfigError(_refusal(name, module, adapter, f"adapts {what}"))
    a, b = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    if not (isinstance(a, nn.ModuleDict) and isinstance(b, nn.ModuleDict)):
        found = [p for n, p in module.named_parameters() if n.startswith("lora_A")]
        if any(p.requires_grad or not trainable_only for p in found):
            raise ConfigError(_refusal(name, module, "", f"keeps lora_A as a {type(a).__name__}"))
        return
    for adapter in a:
        if trainable_only and not any(m[adapter].weight.requires_grad for m in (a, b)):
            continue
        reason = _not_plain(module, adapter, a[adapter], b[adapter])
        if reason:
            raise ConfigError(_refusal(name, module, adapter, reason))
        half_a, half_b = (m[adapter].get_parameter("weight") for m in (a, b))
        prefix = f"{name}." if name else ""
        pair = LoraPair(
            f"{prefix}lora_A.{adapter}.weight", half_a, f"{prefix}lora_B.{adapter}.weight", half_b
        )
        if trainable_only and pair.a.requires_grad != pair.b.requires_grad:
            frozen = pair.b_name if pair.a.requires_grad else pair.a_name
            raise ConfigError(
                f"{frozen} is frozen and the other half of its pair A, B trains, and both move as one point: set "
                f"requires_grad of both, or of none."
            )
        yield pair


def _not_plain(module: nn.Module, adapter: str, a: nn.Module, b: nn.Module) -> str | None:
    """Why the layer does not add B A alone; None where it does."""
    variant = _said(module, "lora_variant", adapter)
    if adapter in getattr(module, "lora_magnitude_vector", ()) or _said(module, "use_dora", adapter):
        return "is DoRA (use_dora), which trains a magnitude beside B A"
    if variant is not None:
        return f"is the variant {type(variant).__name__}"
    for factor in (a, b):
        if not isinstance(factor, nn.Linear):
            return f"adapts with {type(factor).__name__} factors, not nn.Linear"
    if getattr(a, "bias", None) is not None:
        return "has a bias inside lora_A, which B multiplies too"
    shapes = [tuple(factor.get_parameter("weight").shape) for factor in (a, b)]
    if not shapes[0][0] == shapes[1][1] == (_said(module, "r", adapter) or shapes[0][0]):
        return f"has factors {shapes[0]} and {shapes[1]}, of which B A is not the update"
    r, n, m = *shapes[0], shapes[1][0]
    if r > min(n, m):
        return f"has rank {r}, and its update {m} x {n} has at most {min(n, m)} (use a smaller r)"
    return None


def _said(module: nn.Module, name: str, adapter: str) -> object:
    """What a layer says about an adapter; None where it says nothing."""
    found = getattr(module, name, None)
    return found.get(adapter) if isinstance(found, Mapping) else None


def _refusal(name: str, module: nn.Module, adapter: str, reason: str) -> str:
    adapter = f", adapter {adapter!r}," if adapter else ""
    return (
        f"{name or 'the model'} ({type(module).__name__}){adapter} {reason}; lora='fixed-rank' trains plain LoRA on "
        f"linear layers, x -> B A x: {_WAY_OUT}."
    )
