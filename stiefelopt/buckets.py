"""Stacks and back: parameters of one manifold and width gathered into a few batched matrices.

A bucket is worked through beat by beat, all its heights together in the small algebra. On the CPU it is kept
small enough for the cache, so that the passes after the first cost little; on an accelerator it has no limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import StepError
from .gram import split
from .placement import Placement
from .shapes import compute_dtype

# Bytes of points per bucket on the CPU: three stacks of it lie in the second-level caches of two cores.
CPU_BUCKET_BYTES = 2**20


@dataclass
class Slot:
    """One constrained parameter."""

    p: Tensor
    label: object
    placement: Placement


class Stack:
    """Parameters of one shape and placement, with the workspaces that hold their points and gradients.

    The workspaces have the parameters' own layout, so that gathering is one contiguous copy and the inner
    optimizer sees gradients laid out like its parameters; `xs` and `gs` are tall views of them.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self.params = [s.p for s in slots]
        first = slots[0]
        self.scale = first.placement.scale(first.p.shape)
        shape = (len(slots), *first.p.shape)
        dtype = compute_dtype(first.p.dtype)
        self._points = torch.empty(shape, dtype=dtype, device=first.p.device)
        self._work = torch.empty_like(self._points)
        self.xs, self.ds = self._tall(self._points), self._tall(self._work)
        # An optimizer's fused kernels may walk parameter and gradient in step: equal layouts are needed.
        self._dense = all(p.is_contiguous() for p in self.params)
        self._grads = list(self._work) if self._dense else [torch.empty_like(p) for p in self.params]
        self._points_of = list(self._points)
        self._own_grads: list[Tensor | None] = []

    def _tall(self, workspace: Tensor) -> Tensor:
        """The workspace (k, *shape) as one stack (b, n, p), a view."""
        placement, shape = self.slots[0].placement, self.params[0].shape
        matrices = workspace.view(-1, *placement.matrix_shape(shape)[-2:])
        return matrices.mT if placement.is_rows(shape) else matrices

    @property
    def matrices_each(self) -> int:
        """How many matrices one parameter holds."""
        return self.xs.shape[0] // len(self.slots)

    def load(self) -> None:
        """Copy points and gradients in."""
        torch.stack(self.params, out=self._points)
        torch.stack([p.grad for p in self.params], out=self._work)  # type: ignore[misc]

    def lend_gradients(self, keep: Sequence[bool]) -> None:
        """Put the converted gradients where the optimizer reads; None where not to be kept."""
        self._own_grads = [p.grad for p in self.params]
        if not self._dense:
            torch._foreach_copy_(self._grads, list(self._work))
        for p, grad, kept in zip(self.params, self._grads, keep, strict=True):
            p.grad = grad if kept else None

    def return_gradients(self) -> None:
        """Give every parameter its own gradient back."""
        for p, grad in zip(self.params, self._own_grads, strict=True):
            p.grad = grad
        self._own_grads = []

    def load_displacements(self) -> None:
        """What the inner optimizer did to the parameters, scaled, into the work space."""
        torch.stack(self.params, out=self._work)
        self._work.sub_(self._points)
        if self.scale != 1.0:
            self._work.mul_(self.scale)

    def store(self, ys: Tensor) -> None:
        """Write new points (b, n, p) to the parameters."""
        shape = self.params[0].shape
        flat = ys.mT if self.slots[0].placement.is_rows(shape) else ys
        torch._foreach_copy_(self.params, list(flat.reshape(-1, *shape)))

    def restore(self) -> None:
        """Put the parameters back to where they were when they were loaded."""
        torch._foreach_copy_(self.params, self._points_of)


class Bucket:
    """Stacks of several heights that share manifold, width, dtype and device."""

    def __init__(self, stacks: list[Stack]) -> None:
        self.stacks = stacks
        self.manifold = stacks[0].slots[0].placement.manifold
        self.xs = [s.xs for s in stacks]
        self.ds = [s.ds for s in stacks]
        self._limit = torch.finfo(self.xs[0].dtype).max / (4 * self.xs[0].shape[-1])

    def convert_gradients(self) -> list[Slot]:
        """Load points and gradients and make the gradients Riemannian; return the slots that are not finite.

        Only workspaces change. x^T g shows every NaN and Inf of g, and bounds the products made from it.
        """
        for stack in self.stacks:
            stack.load()
        k = self.manifold.stacked_gradient(self.xs, self.ds)  # type: ignore[attr-defined]
        return self._non_finite(k)

    def _non_finite(self, small: Tensor) -> list[Slot]:
        if small.numel() == 0 or bool(small.abs().amax() <= self._limit):
            return []
        fine = (small.abs().amax((-2, -1)) <= self._limit).cpu()
        return [
            slot
            for stack, piece in zip(self.stacks, split(fine, self.xs), strict=True)
            for slot, ok in zip(stack.slots, piece.view(len(stack.slots), -1).all(-1).tolist(), strict=True)
            if not ok
        ]

    def move(self, *, skip_bad: bool) -> list[Slot]:
        """Bring the parameters from where the inner optimizer left them back to the manifold.

        Returns:
            The slots whose displacement was not finite and that were left where they are.

        Raises:
            StepError: a displacement is not finite, or cannot be retracted.
        """
        for stack in self.stacks:
            stack.load_displacements()
        w = self.manifold.stacked_overlap(self.xs, self.ds)  # type: ignore[attr-defined]
        bad = self._non_finite(w)
        if bad:
            if not skip_bad:
                raise StepError(f"the inner optimizer moved {bad[0].label!r} to NaN or Inf")
            for stack in self.stacks:
                rows = [i for i, slot in enumerate(stack.slots) if slot in bad]
                stack._work[rows] = 0.0
            w = self.manifold.stacked_overlap(self.xs, self.ds)  # type: ignore[attr-defined]
        ys = self.manifold.stacked_move(self.xs, self.ds, w)  # type: ignore[attr-defined]
        for stack, y in zip(self.stacks, ys, strict=True):
            stack.store(y)
        return bad


def make_buckets(slots: Sequence[Slot]) -> list[Bucket]:
    """Sort slots into buckets and their stacks, keeping the order of parameters within each."""
    families: dict[object, dict[object, list[Slot]]] = {}
    for slot in slots:
        p, placement = slot.p, slot.placement
        width = placement.as_tall(p).shape[-1] if p.numel() else 0
        family = families.setdefault((placement.manifold, width, p.dtype, p.device), {})
        family.setdefault((placement, p.shape), []).append(slot)
    return [
        Bucket([Stack(chunk) for chunk in chunks])
        for heights in families.values()
        for chunks in _fill(heights.values(), next(iter(heights.values()))[0].p.device)
    ]


def _fill(heights: object, device: torch.device) -> list[list[list[Slot]]]:
    """Cut runs of equal shape into pieces and the pieces into buckets of at most CPU_BUCKET_BYTES."""
    buckets: list[list[list[Slot]]] = [[]]
    room = limit = CPU_BUCKET_BYTES if device.type == "cpu" else float("inf")
    for run in heights:  # type: ignore[attr-defined]
        size = max(1, run[0].p.numel() * run[0].p.element_size())
        while run:
            fits = len(run) if room == float("inf") else int(room // size)
            if fits == 0 and buckets[-1]:
                buckets.append([])
                room = limit
                continue
            piece, run = run[: max(1, fits)], run[max(1, fits) :]
            buckets[-1].append(piece)
            room -= size * len(piece)
    return buckets
