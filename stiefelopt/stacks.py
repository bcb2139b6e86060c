"""Stacks and back: parameters of one shape and placement as one batched matrix, with the workspaces of their step."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter, ne
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .distributed import Shards, local
from .joint import Joint, saves_time
from .moments import Block
from .placement import Placement, residual_of
from .precision import Masters
from .retractions import OpenSum
from .shapes import HALF, compute_dtype, tolerance


@dataclass(eq=False)
class Slot:
    """One constrained parameter."""

    p: Tensor
    label: object
    placement: Placement
    group: int


class Space(NamedTuple):
    """A workspace (k, *shape) laid out like the parameters, as one tall stack, and this rank's part of each piece."""

    whole: Tensor
    tall: Tensor
    own: list[Tensor]


class Moments(NamedTuple):
    """Moments as one stack (b, n, p), and the tensors it must be written back to; none where it is their memory."""

    tall: Tensor
    tensors: list[Tensor]


# The parameters that make one: a single one on Stiefel, U, S, V on FixedRank, A, B on FixedRankPair.
Point = Sequence[Slot]


class Stack:
    """Parameters of one shape and placement, with the workspaces that hold their points and gradients.

    The workspaces have the parameters' own memory layout, so that gathering is one straight copy and the inner
    optimizer sees gradients laid out like its parameters. There are two: one for the points, one for the gradients
    and, once these have been used, for where the optimizer has left the points. Where it steps all as one, it does so
    in the first, and the points are gathered anew in the second.

    Args:
        slots: the parameters.
        optimizer: their optimizer.
        shards: how they are cut over ranks.
        join: whether the optimizer may step them as one, see `joint`.
    """

    def __init__(
        self, slots: Sequence[Slot], optimizer: Optimizer, shards: Shards | None = None, join: bool = False
    ) -> None:
        self.slots = slots
        self.params = [s.p for s in slots]
        self._optimizer = optimizer
        # Riemannion's inner optimizer says so of itself: rounding cannot take the direction of its steps.
        self.unit_steps = bool(getattr(optimizer, "unit_steps", False))
        self._masters = Masters(self.params, optimizer) if self.params[0].dtype in HALF else None
        self._shards = shards
        p = self.params[0]
        # What follows is this rank's part; which way the whole lies is said, since a part does not show it.
        self._placement = slots[0].placement.oriented(p.shape)
        self.scale = self._placement.scale(p.shape)
        self.drift = tolerance(p.dtype, *(1, *self._placement.tall_shape(p.shape))[-2:])
        # Column-major parameters, as LAPACK's QR and SVD return them, are gathered as they lie.
        self._flipped = is_flipped(p)
        self._kind = p.dtype, p.shape
        self._groups = {slot.group for slot in slots}
        here = self._here(self.params)
        self._shape = p.shape if shards is not None and shards.is_gathered else here[0].shape
        # An optimizer's fused kernels may walk parameter and gradient in step: equal layouts are needed.
        self._dense = self._flipped or all(t.is_contiguous() for t in here)
        self._strides = [t.stride() for t in here]
        join = join and self._dense and shards is None and self._masters is None and p.device.type == "cpu"
        join = join and saves_time(self.params)
        self._spaces = self._space(), self._space()
        self._points, self._work = self._spaces
        self.joints = self._joints() if join else []
        self.joined = self._untouched = False
        gradients = self._spaces[1]
        # What the optimizer reads, on this rank. Not views that torch would count the changes of together.
        self._parts = [
            t.data if self._dense else torch.empty_like(p, dtype=t.dtype)
            for t, p in zip(gradients.own, here, strict=True)
        ]
        self._grads = self._parts if shards is None else [shards.like_parameter(t) for t in self._parts]
        self._blocks: dict[str, Block] = {}
        self._found_grads: list[Tensor | None] = []
        self._own_grads: list[Tensor | None] = []
        self._lent_versions: list[int] = []
        self._seen: Sequence[Tensor] = self.params  # by the optimizer
        self._stepped: Sequence[Tensor] = self.params
        self._kept: Sequence[bool] = []

    def _joints(self) -> list[Joint]:
        """One for every run of parameters of one group."""
        points, gradients = (space.whole for space in self._spaces)
        found, start = [], 0
        for _, run in groupby(self.slots, key=lambda slot: slot.group):
            here = slice(start, start := start + len(list(run)))
            found.append(Joint(self._optimizer, self.params[here], points[here], gradients[here]))
        return found

    def _here(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What lies on this rank of tensors like the parameters."""
        return list(tensors) if self._shards is None else [self._shards.local(t) for t in tensors]

    def _own(self, workspace: Tensor) -> Tensor:
        """What this rank stores of a workspace."""
        return workspace if self._shards is None else self._shards.own(workspace)

    @property
    def xs(self) -> Tensor:
        """The points, (b, n, p)."""
        return self._points.tall

    @property
    def work(self) -> Tensor:
        """The converted gradients, then where the optimizer has left the points, then the new points, (b, n, p)."""
        return self._work.tall

    def _space(self) -> Space:
        whole = self._workspace()
        return Space(whole, self._tall(whole), list(self._own(whole)))

    def _workspace(self) -> Tensor:
        """(k, *shape), each piece laid out like a parameter."""
        p, shape = self.params[0], self._shape[::-1] if self._flipped else self._shape
        space = torch.empty((len(self.params), *shape), dtype=compute_dtype(p.dtype), device=p.device)
        return space.mT if self._flipped else space

    def _tall(self, workspace: Tensor) -> Tensor:
        """The workspace (k, *shape) as one stack (b, n, p), a view."""
        if self._placement.manifold.held == "tensor":
            return workspace
        *batch, rows, columns = self._placement.matrix_shape(self._shape)
        count = len(self.params) * math.prod(batch)
        matrices = workspace if workspace.ndim == 3 else workspace.view(count, rows, columns)
        return matrices.mT if self._placement.is_rows(self._shape) else matrices

    def load(self) -> None:
        """Copy points and gradients in; RuntimeError where a parameter is no longer what it was."""
        # Stacking refuses shapes that differ, but casts a dtype that does in silence.
        dtype, shape = self._kind
        if self.params[0].shape != shape or set(map(attrgetter("dtype"), self.params)) != {dtype}:
            raise RuntimeError("the parameters' dtype or shape has changed")
        self._points, self._work = self._spaces
        self._gather(self._masters.values() if self._masters else self.params, self._points.whole)
        self._found_grads = [p.grad for p in self.params]
        self._gather(self._found_grads, self._work.whole)  # type: ignore[arg-type]

    def _is_fused(self) -> bool:
        """Whether a kernel of the optimizer's may walk parameters and the gradients lent to them in step."""
        groups = self._optimizer.param_groups
        return any(groups[i].get("fused") for i in self._groups)

    def _gather(self, tensors: Sequence[Tensor], workspace: Tensor) -> None:
        tensors, own = self._here(tensors), self._own(workspace)
        if tensors[0].dtype != workspace.dtype:
            tensors = [t.to(workspace.dtype) for t in tensors]
        if self._flipped:
            tensors, own = [t.mT for t in tensors], own.mT
        torch.stack(tensors, out=own)
        if self._shards is not None:
            self._shards.complete(workspace)

    def lend(self, refused: Container[int], *, joined: bool) -> None:
        """Show the optimizer the converted gradients and the points: joined, where it may step all as one.

        Args:
            refused: ids of parameters that it is to leave alone.
            joined: whether none is, and it may.
        """
        self.joined = self._untouched = joined and bool(self.joints)
        if self.joined:
            self._found_grads = []
        else:
            self._lend_gradients([id(p) not in refused for p in self.params])

    def _lend_gradients(self, keep: Sequence[bool]) -> None:
        """Put the converted gradients where the optimizer reads; None where not to be kept."""
        if self._is_fused() and self._strides != [t.stride() for t in self._here(self.params)]:
            raise RuntimeError("the parameters' memory layout has changed")
        self._own_grads, self._kept = self._found_grads, keep
        if self._masters:
            self._seen = self._masters.enter(list(self._points.whole.clone()))
        if not self._dense:
            torch._foreach_copy_(self._parts, self._work.own)
        for p, grad, kept in zip(self._seen, self._grads, keep, strict=True):
            p.grad = grad if kept else None
        self._lent_versions = self._versions()

    def return_gradients(self) -> None:
        """Give every parameter its own gradient, and its place in the optimizer, back."""
        if not self._own_grads:
            return
        # An optimizer that clears the gradients it has used means the user's.
        cleared = [kept and p.grad is None for p, kept in zip(self._seen, self._kept, strict=True)]
        if self._masters:
            self._stepped, self._seen = self._masters.leave(), self.params
        for p, grad, gone in zip(self.params, self._own_grads, cleared, strict=True):
            p.grad = None if gone else grad
        self._own_grads, self._found_grads = [], []

    def load_moved(self) -> None:
        """Where the inner optimizer left the points, into the work space."""
        if self.joined:  # it has left them where they were gathered, and the parameters untouched
            self._work, self._points = self._spaces
            self._untouched = False
            self._gather(self.params, self._points.whole)
        else:
            self._gather(self._stepped, self._work.whole)

    def reset_moved(self, index: Sequence[int]) -> None:
        """Pretend that the inner optimizer left these parameters where they were."""
        for i in index:
            self._work.whole[i] = self._points.whole[i]

    def store(self, y: OpenSum) -> None:
        """Write new points (b, n, p) to the parameters."""
        z, dz = y
        if dz is not None:
            torch.add(z, dz, out=self.work)
        elif z is not self.work:
            self.work.copy_(z)
        torch._foreach_copy_(self._here(self.params), self._work.own)
        if self._masters:
            self._masters.keep(self._work.own, self._kept)

    def moments(self, name: str) -> Moments | None:
        """The optimizer's tensors of this name; None unless every parameter has one of its own shape."""
        stepped = self._stepped_as_one(name)
        if stepped is not None:
            return Moments(self._tall(stepped), [])
        if not isinstance(self._optimizer.state.get(self.params[0], {}).get(name), Tensor):
            return None
        found = [self._optimizer.state.get(p, {}).get(name) for p in self.params]
        block = None
        if self._shards is None:
            block = self._blocks.setdefault(name, Block()).of(found, self._workspace)
        like = self._points.whole
        if block is not None and (block.dtype, block.stride()) == (like.dtype, like.stride()):
            return Moments(self._tall(block), [])
        fits = all(isinstance(t, Tensor) and t.shape == self._kind[1] for t in found)
        return Moments(self.gather_tall(found), found) if fits else None

    def _stepped_as_one(self, name: str) -> Tensor | None:
        """The moments (k, *shape), where one joint has just stepped all parameters: nothing is left to look up."""
        return self.joints[0].stepped.get(name) if self.joined and len(self.joints) == 1 else None

    def release_moments(self) -> None:
        """Let every moment have its own memory, before other stacks are made."""
        for block in self._blocks.values():
            block.dissolve()

    def rate(self) -> float:
        """The learning rate of the group, as it is now."""
        return float(self._optimizer.param_groups[self.slots[0].group]["lr"])

    def gather_tall(self, tensors: Sequence[Tensor]) -> Tensor:
        """Parameter-shaped tensors as a new stack (b, n, p)."""
        space = self._workspace()
        self._gather(tensors, space)
        return self._tall(space)

    def moved(self) -> Tensor:
        """Where the points are now, as a new stack (b, n, p); the masters', from which a step starts."""
        return self.gather_tall(self._masters.values() if self._masters else self.params)

    def own_tall(self, tall: Tensor) -> Tensor:
        """What this rank stores of a stack (b, n, p)."""
        return tall if self._shards is None else self._shards.own(tall)

    def scatter_tall(self, tall: Tensor, tensors: Sequence[Tensor]) -> None:
        """A stack (b, n, p) back to parameter-shaped tensors."""
        flat = tall.mT if self._placement.is_rows(self._shape) else tall
        pieces = self._own(flat.reshape(len(self.params), *self._shape))
        torch._foreach_copy_(self._here(tensors), list(pieces))

    def put_back(self, tall: Tensor, before: Tensor, slots: Container[Slot]) -> None:
        """Let a stack (b, n, p) be what it was before, where it belongs to these slots."""
        pieces = zip(self.slots, tall.chunk(len(self.slots)), before.chunk(len(self.slots)), strict=True)
        for slot, piece, old in pieces:
            if slot in slots:
                piece.copy_(old)

    def restore(self) -> None:
        """Put the parameters back to where they were when they were loaded."""
        if not self._untouched:
            torch._foreach_copy_(self._here(self.params), self._points.own)

    def recover(self) -> None:
        """`return_gradients` and `restore` some time after the step has failed: what was set since then stays.

        That is a gradient that is not the one lent, or was written to, and a parameter that is a point again.
        """
        found = [q.grad if p.grad is None else p.grad for p, q in zip(self.params, self._seen, strict=True)]
        written = list(map(ne, self._versions(), self._lent_versions))
        self.return_gradients()
        for p, grad, own, kept, new in zip(self.params, found, self._grads, self._kept, written, strict=True):
            lent = own if kept else None
            if grad is not lent or (kept and new):
                p.grad = None if grad is None else grad.to(p.dtype, copy=grad is own)
        for p, x in zip(self.params, self._points.own, strict=True):
            if not (self._masters or self._is_set(p)):  # half precision was not stepped itself
                local(p).copy_(x)

    def _is_set(self, p: Tensor) -> bool:
        """Whether this value was set, and is not half a step: a point."""
        if p.shape != self._kind[1]:
            return True
        if not self._placement.manifold.recognized:
            return False
        return residual_of(self.slots[0].label, [p], self._placement) <= self.drift

    def _versions(self) -> list[int]:
        """Changes wherever a lent gradient is written to."""
        return [0 if t.is_inference() else t._version for t in self._parts]


def is_flipped(p: Tensor) -> bool:
    """Whether a matrix lies column by column."""
    return p.ndim == 2 and not p.is_contiguous() and p.mT.is_contiguous()
