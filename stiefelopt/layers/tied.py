"""Parameters that several modules hold, such as an embedding's weight that is the head's too.

PEFT trains copies of its modules_to_save, and `adapt` the parameters themselves, wherever they are held.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .adapt import plainly_named


def tied_to(model: nn.Module, saved: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules outside the saved ones that hold a parameter of theirs, by name."""
    trained = {id(p) for module in saved.values() for p in module.parameters()}
    inside = {part for module in saved.values() for part in module.modules()}
    return {
        name: module
        for name, module in plainly_named(model).items()
        if module not in inside and any(id(p) in trained for p in module.parameters(recurse=False))
    }


def peft_ties(model: Any, saved: Mapping[str, nn.Module]) -> bool:
    """Whether PEFT's ensure_weight_tying makes one parameter of these: heads without a bias on the input embedding."""
    embedding = next((m for m in saved.values() if isinstance(m, nn.Embedding)), None)
    if embedding is None or not hasattr(model, "get_input_embeddings"):
        return False
    heads = [
        m for m in saved.values() if m is not embedding and getattr(m, "weight", None) is embedding.weight
    ]
    plain = all(type(m) is nn.Linear and m.bias is None for m in heads)
    return bool(heads) and plain and model.get_input_embeddings() is embedding


def check_tied(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Refuse values by name that a parameter with several names cannot have under all of them."""
    held: dict[nn.Parameter, list[str]] = {}
    for prefix, module in plainly_named(model).items():
        for key, p in module.named_parameters(recurse=False):
            held.setdefault(p, []).append(f"{prefix}.{key}" if prefix else key)
    for p, names in held.items():
        given = [values[name].to(p) for name in names if name in values]
        if given and (len(given) < len(names) or any(not torch.equal(t, given[0]) for t in given)):
            last = f"model.{names[-1]}"
            raise ConfigError(
                f"{' and '.join(names)} are one parameter of the model, and the checkpoint changes them apart; untie "
                f"them first: model.config.tie_word_embeddings = False and {last} = "
                f"torch.nn.Parameter({last}.detach().clone()). Modules of modules_to_save are copies, and may be tied, "
                f"under a config class of stiefelopt.integrations.peft in place of the layer."
            )
