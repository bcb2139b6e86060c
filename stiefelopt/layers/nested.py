"""Nested inputs, sequences of different lengths: what acts on each row by itself acts on all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def over_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of rows (n, in) -> (n, out), applied to the last dimension of a nested tensor.

    torch packs sequences so in `nn.TransformerEncoder`'s eval with a padding mask, and few operations know them.
    """
    if x.layout == torch.jagged:
        # With x's own offsets, so that torch knows the lengths to be the same.
        own: Any = x
        return torch.nested.nested_tensor_from_jagged(
            function(x.values()), own.offsets(), lengths=own.lengths(), jagged_dim=own._ragged_idx
        )
    parts = x.unbind()
    shapes = [part.shape[:-1] for part in parts]
    y = function(torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]))
    rows = y.split([shape.numel() for shape in shapes])
    return torch.nested.as_nested_tensor(
        [r.reshape(*shape, -1) for r, shape in zip(rows, shapes, strict=True)]
    )
