"""Buckets: stacks of one manifold and width, of several heights, that take a step together.

A bucket is worked through beat by beat, all its heights together in the small algebra. On the CPU it is kept
small enough for the cache, so that the passes after the first cost little; on an accelerator it has no limit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .distributed import RowSum, Shards, is_distributed
from .errors import StepError
from .gram import largest_entries, split, squared_norm
from .manifolds.base import Carry
from .placement import sharding_of
from .retractions import close
from .scratch import Scratch
from .stacks import Point, Slot, Stack, is_flipped
from .transforms import host_can_look

# Bytes of points per bucket on the CPU: measured best from 4 to 16 MiB, see benchmarks/NOTES.md.
CPU_BUCKET_BYTES = 8 * 2**20
# What torch.optim and most others call averages of squared gradients.
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


# How far ||y||_F^2 of a new point may be from what it must be, where the host does not look: a column of norm 0.95.
SIZE = 0.1


def _squares(stack: Tensor) -> Tensor:
    """||y||_F^2 of every matrix of a stack, (b,)."""
    return torch.linalg.vector_norm(stack, dim=tuple(range(1, stack.ndim))).square()


class Bucket:
    """Stacks of several heights that share manifold, width, dtype and device.

    Where several parameters make a point, its stacks follow one another: U, S, V of one height, then of the next.
    """

    def __init__(
        self, stacks: list[Stack], over: RowSum | None, scratch: Scratch, *, looks: bool = False
    ) -> None:
        self.stacks = stacks
        self._scratch = scratch
        self._over = over
        # How the manifold sums over ranks; nothing said where every row is here.
        self._sharded: dict[str, RowSum] = {} if over is None else {"reduce": over}
        self._placement = stacks[0].slots[0].placement
        self.manifold = self._placement.manifold
        self._parts = self.manifold.parts
        self._drift = max(stack.drift for stack in stacks)
        largest = torch.finfo(self.xs[0].dtype).max
        self._limit = largest / (4 * self.xs[0].shape[-1])
        # Whether the host reads numbers in the step. Where it would have to wait for an accelerator it does not:
        # what is not finite is replaced there, counted, and told later.
        self.looks = looks or host_can_look(self.xs[0])
        # Entries of moved points whose Grams cannot overflow.
        entries = max(math.prod(x.shape[1:]) for x in self.xs) * (1 if over is None else over.ranks)
        self._reach = largest**0.5 / (4 * max(1, entries) ** 0.5)
        heads = self.xs[:: self._parts]
        # What the host has found not finite in this step.
        self._bad: list[Slot] = []
        self._fine = torch.ones(sum(map(len, heads)), dtype=torch.bool, device=heads[0].device)
        # How often each point was left where it was; made here, so that a captured graph does not reset it.
        self.left = torch.zeros_like(self._fine, dtype=torch.int32)

    @property
    def xs(self) -> list[Tensor]:
        """The points of every stack."""
        return [s.xs for s in self.stacks]

    @property
    def work(self) -> list[Tensor]:
        """And what its work space holds."""
        return [s.work for s in self.stacks]

    def convert_gradients(self) -> list[Slot]:
        """Load points and gradients and make the gradients Riemannian; return the slots that are not finite.

        Only workspaces change. x^T g shows every NaN and Inf of g, and bounds the products made from it. Where the
        host does not look no slot is returned, and the optimizer sees zeros in the place of such a gradient.
        """
        for stack in self.stacks:
            stack.load()
        small = self._make_riemannian(self.work)
        self._bad = self._non_finite(small) if self.looks else []
        if self.looks:
            return self._bad
        self._fine = self._within(small)
        for stack, fine in self._by_stack(self._fine):
            stack.work.masked_fill_(~fine, 0)
        return []

    def _by_stack(self, mask: Tensor) -> Iterator[tuple[Stack, Tensor]]:
        """A mask (B,) of points in front of every stack that holds a part of them."""
        for k, piece in enumerate(split(mask, self.xs[:: self._parts])):
            for stack in self.stacks[k * self._parts : (k + 1) * self._parts]:
                yield stack, piece.view(-1, *[1] * (stack.work.ndim - 1))

    def _make_riemannian(self, gs: Sequence[Tensor]) -> Tensor:
        """Overwrite gradients by Riemannian ones; returns small matrices in which NaN and Inf show."""
        manifold: Any = self.manifold
        arriving = self._placement.gradient
        return manifold.stacked_gradient(self.xs, gs, arriving=arriving, **self._small(), **self._sharded)

    def _overlap(self) -> Tensor:
        """What the manifold sees of the moved points before it moves them."""
        manifold: Any = self.manifold
        return manifold.stacked_overlap(self.xs, self.work, **self._small(), **self._sharded)

    def _small(self) -> dict[str, Tensor | None]:
        """Memory for the small matrices; nothing said to a manifold that takes none."""
        if not self.manifold.takes_small:
            return {}
        xs = self.xs
        width = xs[0].shape[-1]
        return {"small": self._scratch.take((sum(map(len, xs)), width, width), xs[0])}

    def _non_finite(self, small: Tensor) -> list[Slot]:
        # The norm first: one pass without a copy. It overflows before the entries do, and NaN and Inf stay in it.
        if small.numel() == 0 or bool(torch.linalg.vector_norm(small) <= self._limit):
            return []
        if bool(small.abs().amax() <= self._limit):
            return []
        return self._slots((~self._within(small)).int())

    def _within(self, small: Tensor) -> Tensor:
        """Mask (B,) of the small matrices that are finite, and not too large for what is made of them."""
        return small.abs().amax((-2, -1)) <= self._limit

    def _slots(self, counts: Tensor) -> list[Slot]:
        """The parameters of points (B,), each as often as was counted for it, or for the most of its matrices."""
        found = []
        for stack, piece in self._by_stack(counts.cpu()):
            often = piece.view(len(stack.slots), -1).amax(-1).tolist()
            found += [slot for slot, count in zip(stack.slots, often, strict=True) for _ in range(count)]
        return found

    def left_alone(self) -> list[Slot]:
        """The parameters that steps have left where they were, each as often as it was, since `forget_left`.

        Waits for the device.
        """
        return [] if self.looks else self._slots(self.left)

    def forget_left(self) -> None:
        """Count anew."""
        self.left.zero_()

    def _out_of_reach(self) -> list[Slot]:
        """The slots of points that moved to NaN, or so far that their Grams overflow."""
        return self._slots((~self._within_reach()).int())

    def _within_reach(self) -> Tensor:
        """Mask (B,) of the moved points that are finite, and not so large that their Grams overflow."""
        return self._sums(self.work, largest_entries) <= self._reach

    def _reset_unfit(self) -> None:
        """Where the host does not look: let points that moved to NaN, or too far, not have moved."""
        self._fine = self._fine & self._within_reach()
        for stack, fine in self._by_stack(self._fine):
            torch.where(fine, stack.work, stack.xs, out=stack.work)

    def _unfit(self, news: Sequence[Tensor]) -> Tensor:
        """Where the host does not look: mask (B,) of the points that are to stay where they were, which it counts.

        These are the ones known already, and those of which the retraction has made no point: NaN, or something that
        has not even the size of one, as a step that is too long for this precision leaves.
        """
        square = self.manifold.square_of_points(tuple(self.xs[0].shape[1:]))
        if square is None:
            fits = self._sums(news, largest_entries) < math.inf
        else:
            fits = (self._sums(news, _squares) - square).abs() <= SIZE
        self._fine = self._fine & fits
        self.left += ~self._fine
        return ~self._fine

    def _sums(self, stacks: Sequence[Tensor], of: Callable[[Tensor], Tensor]) -> Tensor:
        """Numbers of the matrices of every stack, summed over the parts of a point and the ranks: (B,)."""
        first, *others = (torch.cat([of(t) for t in stacks[k :: self._parts]]) for k in range(self._parts))
        total = sum(others, first)
        return total if self._over is None else self._over(total)

    def move(self, *, skip_bad: bool, moments: Sequence[str] = ()) -> list[Slot]:
        """Bring the parameters from where the inner optimizer left them back to the manifold.

        Args:
            skip_bad: leave a point alone whose displacement is not finite, or too long for its squares.
            moments: names of first moments in the optimizer's state, carried along where the manifold says so.

        Returns:
            The slots that were left where they are for that.

        Raises:
            StepError: a displacement is not finite, or cannot be retracted.
        """
        manifold: Any = self.manifold
        for stack in self.stacks:
            stack.load_moved()
        contained = not self.looks and self.manifold.is_contained and not self._placement.needs_rate
        if not self.looks and not contained:
            self._reset_unfit()
        overlap = self._overlap()
        bad = self._non_finite(overlap) if self.looks else []
        if self.looks and skip_bad:
            bad += [slot for slot in self._out_of_reach() if slot not in bad]
        if bad:
            if not skip_bad:
                raise StepError(f"the inner optimizer moved {bad[0].label!r} to NaN or Inf")
            for stack in self.stacks:
                stack.load_moved()
                stack.reset_moved([i for i, slot in enumerate(stack.slots) if slot in bad])
            overlap = self._overlap()
            self._bad = self._bad + bad
        if self._placement.needs_rate:
            overlap = self._directed(overlap)
        scales = [s.scale for s in self.stacks]
        carry = None
        if moments:
            carry = manifold.stacked_transporter(self.xs, self.work, scales, **self._sharded)
        judged = {"judge": self._unfit} if contained else {}
        ys = manifold.stacked_move(
            self.xs, self.work, overlap, scales, drift=self._drift, **judged, **self._sharded
        )
        if not self.looks and not contained:
            news = close(ys)
            masks = self._by_stack(self._unfit(news))
            ys = [
                (torch.where(unfit, stack.xs, y), None) for (stack, unfit), y in zip(masks, news, strict=True)
            ]
        for stack, y in zip(self.stacks, ys, strict=True):
            stack.store(y)
        if carry is not None:
            self._carry(carry.vectors, moments)
            self._carry(carry.variances, SECOND_MOMENTS)
        return bad

    def squared_norms(self) -> tuple[float, float]:
        """||gradient||^2 and ||displacement||^2 of the last step, Frobenius, summed over the bucket.

        From the points that the step started at, still in the workspaces, and from ``.grad`` and the parameters as
        they are now. The gradient's is NaN once ``.grad`` is gone.
        """
        manifold: Any = self.manifold
        ys = [s.moved() for s in self.stacks]
        moved = manifold.stacked_distance(self.xs, ys, **self._sharded)
        grads = [[p.grad for p in s.params] for s in self.stacks]
        if any(g is None for gs in grads for g in gs):
            return math.nan, moved
        stacked = [s.gather_tall(gs) for s, gs in zip(self.stacks, grads, strict=True)]  # type: ignore[arg-type]
        self._make_riemannian(stacked)
        parts = [s.own_tall(g) for s, g in zip(self.stacks, stacked, strict=True)]
        return squared_norm(parts, self._over), moved

    def _directed(self, overlap: Tensor) -> Tensor:
        """The displacement with what its group asks for beside the inner optimizer's step; returns its overlap."""
        manifold: Any = self.manifold
        rates = [stack.rate() for stack in self.stacks]
        if self._placement.direction == "spectral":
            if not self.stacks[0].unit_steps:
                self._warn_of_lost_directions()
            overlap = manifold.stacked_spectral(self.xs, self.work, overlap, rates, **self._sharded)
        if self._placement.manifold_decay:
            shares = [stack.slots[0].placement.manifold_decay for stack in self.stacks]
            decays = [rate * share for rate, share in zip(rates, shares, strict=True)]
            overlap = manifold.stacked_decay(self.xs, self.work, overlap, decays, **self._sharded)
        return overlap

    def _warn_of_lost_directions(self) -> None:
        """Where p + step has rounded the step to 1 % or worse: its length does not matter, its direction is all."""
        if not host_can_look(self.xs[0]):
            return
        moved = squared_norm([m - x for x, m in zip(self.xs, self.work, strict=True)], self._over) ** 0.5
        size = squared_norm(self.xs, self._over) ** 0.5
        if 0 < moved < 20 * torch.finfo(self.xs[0].dtype).eps * size:
            warnings.warn(
                f"the inner optimizer's steps of {self.stacks[0].slots[0].label!r} and those like it have norm "
                f"{moved:.1g}, and rounding leaves little of their direction, which is all that "
                f"direction='spectral' takes from them. Use stiefelopt.Riemannion, whose inner steps have norm 1, "
                f"longer inner steps, or float64.",
                stacklevel=2,
            )

    def _carry(self, carry: Carry | None, names: Sequence[str]) -> None:
        """Carry the optimizer's moments of these names to the new points, which are in the work space.

        Those of points that the host has left alone stay.
        """
        if carry is None:
            return
        for name in names:
            found = [stack.moments(name) for stack in self.stacks]
            heads = range(0, len(found), self._parts)
            whole = [h for h in heads if all(t is not None for t in found[h : h + self._parts])]
            index = [h + i for h in whole for i in range(self._parts)]
            if not index:
                continue
            moments = [m for i in index if (m := found[i]) is not None]
            ys = [self.stacks[i].work for i in index]
            before = [m.tall.clone() for m in moments] if self._bad else []
            for m, v in zip(moments, carry(index, ys, [m.tall for m in moments]), strict=True):
                if v is not m.tall:
                    m.tall.copy_(v)
            for i, m, old in zip(index, moments, before, strict=False):
                self.stacks[i].put_back(m.tall, old, self._bad)
            for i, m in zip(index, moments, strict=True):
                if m.tensors:
                    self.stacks[i].scatter_tall(m.tall, m.tensors)


def make_buckets(
    points: Sequence[Point],
    optimizer: Optimizer,
    scratch: Scratch,
    *,
    join: bool = False,
    looks: bool = False,
) -> list[Bucket]:
    """Sort points into buckets and their stacks, keeping the order of parameters within each.

    Args:
        points: the parameters that make each.
        optimizer: their optimizer.
        scratch: memory for all buckets.
        join: as in `Stack`.
        looks: whether the host reads numbers in the step though it must wait for them.
    """
    families: dict[tuple[Any, ...], dict[object, list[Point]]] = {}
    for point in points:
        p, placement = point[0].p, point[0].placement
        # Everything is told from whole shapes, so that all ranks make the same buckets.
        width = placement.tall_shape(p.shape)[-1]
        over = sharding_of(point[0].label, [s.p for s in point], placement)
        # One small algebra serves a bucket: what decides its course must be the same for all.
        course = placement.gradient, placement.direction, placement.manifold_decay > 0
        family = families.setdefault((over, placement.manifold, course, width, p.dtype, p.device), {})
        height = tuple(
            (s.p.shape, is_flipped(s.p), getattr(s.p, "placements", None), getattr(s.p, "device_mesh", None))
            for s in point
        )
        rate = point[0].group if placement.needs_rate else None
        family.setdefault((placement, rate, height), []).append(point)
    return [
        Bucket(
            [stack for chunk in chunks for stack in _stacks(chunk, optimizer, join)],
            over,
            scratch,
            looks=looks,
        )
        for (over, *_, device), heights in families.items()
        for chunks in _fill(heights.values(), device, 1 if over is None else over.ranks)
    ]


def _stacks(chunk: Sequence[Point], optimizer: Optimizer, join: bool) -> Iterator[Stack]:
    """A stack for each of the parameters that make a point."""
    for part, slots in enumerate(zip(*chunk, strict=True)):
        p, manifold = slots[0].p, slots[0].placement.manifold
        shards = Shards(p, gathered=part in manifold.small_parts) if is_distributed(p) else None
        yield Stack(slots, optimizer, shards, join)


def _fill(heights: Iterable[list[Point]], device: torch.device, ranks: int) -> list[list[list[Point]]]:
    """Cut runs of equal shape into pieces and the pieces into buckets of at most CPU_BUCKET_BYTES a rank."""
    buckets: list[list[list[Point]]] = [[]]
    room = limit = CPU_BUCKET_BYTES * ranks if device.type == "cpu" else float("inf")
    for run in heights:
        size = max(1, sum(slot.p.numel() * slot.p.element_size() for slot in run[0]))
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
