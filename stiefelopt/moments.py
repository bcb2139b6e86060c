"""An optimizer's moments side by side in memory, so that carrying them needs no gathering and no scattering.

The tensors in the optimizer's state stay the objects they are. Where each owns its memory, their contents move, once,
into one block that all share; where they lie side by side already, as in a deep copy or a loaded checkpoint of such a
state, nothing moves. What is a view of something else, that somebody may hold, or lies in memory shared with other
processes, is left there. torch does not tell of views that somebody holds of a tensor that owns its memory: these keep
the old memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor


class Block:
    """The memory of the tensors of one name, one for each parameter of a stack."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._pointers: list[int] = []
        self._straight: list[bool] = []
        self.whole: Tensor | None = None

    def of(self, tensors: list[Any], empty: Callable[[], Tensor]) -> Tensor | None:
        """All the tensors as one, (k, *shape), which shares their memory; None where it cannot.

        Args:
            tensors: of one shape, if they are tensors.
            empty: makes a new block, with the memory layout that the tensors must have.
        """
        if not self._holds(tensors):
            if not all(isinstance(t, Tensor) and t.shape == tensors[0].shape for t in tensors):
                return None
            block = _side_by_side(tensors)
            if block is None:
                if torch.is_inference_mode_enabled():
                    return None  # memory made here could not be written to outside
                self.dissolve()
                if all(map(_owns_memory, tensors)):
                    block = _moved(tensors, empty())
            self.whole, self._tensors = block, tensors
            self._pointers, self._straight = _pointers(tensors), _straight(tensors)
        return self.whole

    def dissolve(self) -> None:
        """Give every tensor that is still here memory of its own again."""
        with torch.inference_mode(False):
            for t, pointer in zip(self._tensors, self._pointers, strict=True):
                if self.whole is not None and t.data_ptr() == pointer and not _is_shared(t):
                    t.data = t.detach().clone(memory_format=torch.preserve_format)
        self._tensors, self._pointers, self.whole = [], [], None

    def _holds(self, tensors: Sequence[Any]) -> bool:
        same = len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))
        return same and _pointers(tensors) == self._pointers and _straight(tensors) == self._straight


def _pointers(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _straight(tensors: Sequence[Tensor]) -> list[bool]:
    """Which lie row by row; a square matrix may be transposed where it lies."""
    return list(map(Tensor.is_contiguous, tensors)) if tensors[0].ndim > 1 else []


def _owns_memory(t: Tensor) -> bool:
    """Whether a plain tensor is all that its storage holds, for this process alone."""
    whole = type(t) is Tensor and t.untyped_storage().nbytes() == t.numel() * t.element_size()
    return whole and not _is_shared(t)


def _is_shared(t: Tensor) -> bool:
    """Whether other processes may hold its memory; torch says so of all that lies on an accelerator."""
    return t.device.type == "cpu" and t.is_shared()


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor | None:
    """The block that the tensors are pieces of, one after the other; None where they are not."""
    first, size = tensors[0], tensors[0].numel()
    storage = first.untyped_storage().data_ptr()
    for k, t in enumerate(tensors):
        alike = type(t) is Tensor and t.dtype == first.dtype and t.stride() == first.stride()
        if not alike or t.untyped_storage().data_ptr() != storage:
            return None
        if t.storage_offset() != first.storage_offset() + k * size:
            return None
    return first.detach().as_strided((len(tensors), *first.shape), (size, *first.stride()))


def _moved(tensors: Sequence[Tensor], block: Tensor) -> Tensor | None:
    """The block, with the tensors in it; None where its layout or dtype is not theirs."""
    pieces = list(block)
    alike = all(
        t.dtype == piece.dtype and t.device == piece.device and t.stride() == piece.stride()
        for t, piece in zip(tensors, pieces, strict=True)
    )
    if not alike:
        return None
    torch._foreach_copy_(pieces, list(tensors))
    for t, piece in zip(tensors, pieces, strict=True):
        t.data = piece
    return block
