"""Sharded parameters: which part of a point lies on this rank, and sums over the ranks that hold its other rows.

The only file that knows DTensor and collectives. What is sharded are rows of tall matrices; a Gram is a sum over rows,
so the step sends p x p numbers and nothing tall. Every rank then does the same small algebra on the same numbers and
takes the same branches, which asks for ranks of one kind of processor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def count_ranks() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def to_shards(module: nn.Module) -> None:
    """Let modules under fully_shard hold their sharded parameters again; no communication.

    After a forward pass without a backward one the root's own hold whole ones, which are thrown away. What fully_shard
    has torch do before it takes a state_dict is done here alone, since it also knows a single layer of such a model.
    """
    for each in module.modules():
        for hook in each._state_dict_pre_hooks.values():
            if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp._fully_shard."):
                hook(each, "", False)


def is_distributed(t: Tensor) -> bool:
    """Whether a tensor is a DTensor, replicated or sharded."""
    return hasattr(t, "device_mesh")


def sharded_dims(t: Tensor) -> dict[int, int]:
    """Dimension of the mesh -> dimension of the tensor that is cut along it; -1 where the parts are summands."""
    placements: Sequence[Any] = getattr(t, "placements", ())
    return {i: getattr(s, "dim", -1) for i, s in enumerate(placements) if not s.is_replicate()}


@dataclass(frozen=True)
class RowSum:
    """Sums a small tensor over the ranks that hold the other rows: the ``reduce`` of `gram`.

    Attributes:
        mesh: the device mesh; mesh_dims: its dimensions along which the rows are cut.
    """

    mesh: Any
    mesh_dims: tuple[int, ...]

    def __call__(self, small: Tensor) -> Tensor:
        """The sum, on every rank; may overwrite its argument. Cost: an all-reduce for each dimension of the mesh."""
        small = small.contiguous()
        for dim in self.mesh_dims:
            dist.all_reduce(small, group=self.mesh.get_group(dim))
        return small

    @property
    def ranks(self) -> int:
        """How many ranks share the rows."""
        return functools.reduce(lambda n, dim: n * self.mesh.size(dim), self.mesh_dims, 1)


def row_sum(t: Tensor) -> RowSum | None:
    """The sum over the ranks that share a tensor; None where each has all of it."""
    dims = tuple(sharded_dims(t))
    return RowSum(t.device_mesh, dims) if dims else None  # type: ignore[attr-defined]


def local(t: Tensor) -> Tensor:
    """The part of a tensor on this rank, sharing its memory and cut off its graph; a plain tensor itself."""
    if not is_distributed(t):
        return t
    with torch.no_grad():
        part = t.to_local()  # type: ignore[attr-defined]
    return part.wait() if hasattr(part, "wait") else part


class Shards:
    """How the parameters of one stack lie on the ranks: DTensors of one shape and placement.

    Args:
        p: one of them.
        gathered: whether the step needs them whole on every rank, as it does small ones (FixedRank's S).
    """

    def __init__(self, p: Tensor, *, gathered: bool = False) -> None:
        self._p = p.detach()
        self._reduce = row_sum(p) if gathered else None
        self._rows = slice(None) if self._reduce is None else _place_here(p)[-2]

    @property
    def is_gathered(self) -> bool:
        """Whether a workspace holds whole matrices, of which this rank owns some rows."""
        return self._reduce is not None

    def local(self, t: Tensor) -> Tensor:
        """This rank's part of a tensor like the parameters; a gradient that lies otherwise is brought to their way."""
        p: Any = self._p
        if is_distributed(t) and t.placements != p.placements:  # type: ignore[attr-defined]
            t = t.redistribute(placements=p.placements)  # type: ignore[attr-defined]
        return local(t)

    def like_parameter(self, part: Tensor) -> Tensor:
        """The distributed tensor of which every rank holds its part; no communication."""
        from torch.distributed.tensor import DTensor

        p: Any = self._p
        return DTensor.from_local(
            part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )

    def own(self, stack: Tensor) -> Tensor:
        """The rows of a stack of workspaces that this rank stores."""
        return stack if self._reduce is None else stack[..., self._rows, :]

    def complete(self, stack: Tensor) -> None:
        """Fill the other ranks' rows in. Cost: an all-reduce of the stack where it is gathered."""
        if self._reduce is None:
            return
        whole = torch.zeros_like(stack, memory_format=torch.contiguous_format)
        self.own(whole).copy_(self.own(stack))
        stack.copy_(self._reduce(whole))


def whole(t: Tensor) -> Tensor:
    """A small tensor with all its entries on every rank."""
    return t.detach().full_tensor() if is_distributed(t) else t  # type: ignore[attr-defined]


def _place_here(p: Any) -> tuple[slice, ...]:
    """Which entries of a sharded tensor lie on this rank."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def write_whole(p: Tensor, value: Tensor) -> None:
    """Store a whole tensor, the same on every rank, in a parameter, of which this rank may hold a part."""
    value = whole(value)
    local(p).copy_(value[_place_here(p)] if is_distributed(p) else value)


@torch.no_grad()
def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state of whole tensors, the same on every rank, into a module of which this rank may hold a part."""
    own = module.state_dict()
    if not any(map(is_distributed, own.values())):
        module.load_state_dict(state)
        return
    for name, t in own.items():
        write_whole(t, state[name])


def write_once(params: Iterable[Tensor], write: Callable[[], None]) -> None:
    """Write files; where parameters are sharded, and all ranks of their mesh have come here, the first one does.

    The others wait, also where it fails.
    """
    mesh: Any = next((p.device_mesh for p in params if is_distributed(p)), None)  # type: ignore[attr-defined]
    if mesh is None:
        write()
        return
    try:
        if dist.get_rank() == int(mesh.mesh.flatten()[0]):
            write()
    finally:
        for dim in range(mesh.ndim):
            dist.barrier(group=mesh.get_group(dim))


def shared_generator(p: Tensor, generator: torch.Generator | None) -> torch.Generator | None:
    """A generator that draws the same numbers on every rank that holds a part of p, seeded by the first of them.

    A plain tensor's own generator: DDP broadcasts parameters when it wraps, fully_shard does not.
    """
    if not is_distributed(p):
        return generator
    q: Any = p
    mesh, device = q.device_mesh, q.device
    if device.type == "meta":
        return generator
    source = "cpu" if generator is None else generator.device
    seed = torch.randint(2**62, (1,), generator=generator, device=source).to(local(p).device)
    for dim in reversed(range(mesh.ndim)):
        group = mesh.get_group(dim)
        dist.broadcast(seed, src=dist.get_global_rank(group, 0), group=group)
    return torch.Generator(local(p).device).manual_seed(int(seed.item()))
