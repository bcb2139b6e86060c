"""What is sent: counts the collectives called inside a block, and the bytes that each hands over; ranks by fork."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_NOTHING_SENT = ("wait_tensor", "barrier")


class Collectives(TorchDispatchMode):
    """Sees every collective of torch.distributed, functional or not, that this rank calls inside ``with``.

    Attributes:
        calls: (name, bytes) in the order of the calls: of an all-reduce's tensor, of a gather's whole result, of a
            scatter's whole input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._opname
            if not any(word in name for word in _NOTHING_SENT):
                self.calls.append((name, max(map(_bytes, args))))
        return func(*args, **(kwargs or {}))

    @property
    def sizes(self) -> list[int]:
        """Bytes of every call."""
        return [size for _, size in self.calls]

    @property
    def names(self) -> set[str]:
        """The collectives that were called."""
        return {name for name, _ in self.calls}

    @property
    def bytes(self) -> int:
        """Bytes of all calls."""
        return sum(self.sizes)


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, (list, tuple)) else 0


def fork_ranks(size: int, work: Callable[[int], None]) -> None:
    """Run ``work(rank)`` in a process for each rank and wait for them all: what is imported is imported once."""
    sys.stdout.flush()
    children = [_fork(rank, work) for rank in range(size)]
    for child in children:
        os.waitpid(child, 0)


def _fork(rank: int, work: Callable[[int], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work(rank)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # gloo's own threads abort at random otherwise
    return child
