"""Memory that the buckets of a step use one after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Bytes from which on memory is kept. What is smaller stays with the allocator and comes back warm.
LARGE = 2**20


class Scratch:
    """One piece of memory for each dtype, grown to the largest that was asked for.

    On the CPU large pieces go back to the system when they are freed, and fresh pages cost more than what is written
    to them: 4 % of a step of wide matrices, see benchmarks/NOTES.md. Allocators of accelerators keep theirs.
    """

    def __init__(self) -> None:
        self._pieces: dict[torch.dtype, Tensor] = {}

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        """Memory of this shape in like's dtype, until it is taken again; None where fresh memory is as good."""
        count = math.prod(shape)
        if like.device.type != "cpu" or count * like.element_size() < LARGE:
            return None
        if like.dtype not in self._pieces or self._pieces[like.dtype].numel() < count:
            self._pieces[like.dtype] = like.new_empty(count)
        return self._pieces[like.dtype][:count].view(shape)
