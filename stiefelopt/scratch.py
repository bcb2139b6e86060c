"""Memory that the buckets of a step use one after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """One piece of memory for each dtype and device, grown to the largest that was asked for.

    On the CPU large pieces go back to the system when they are freed, and fresh pages cost more than what is written
    to them: 4 % of a step of wide matrices, see benchmarks/NOTES.md.
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory of this shape, with like's dtype and device, until it is taken again."""
        key, count = (like.dtype, like.device), math.prod(shape)
        if key not in self._pieces or self._pieces[key].numel() < count:
            self._pieces[key] = like.new_empty(count)
        return self._pieces[key][:count].view(shape)
