"""What is sent: counts the collectives that are called inside a block, and the bytes that each hands over."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Sees every collective of torch.distributed, functional or not, that this rank calls inside ``with``.

    Attributes:
        calls: (name, bytes of the tensor handed over) in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            name = func._opname
            if "wait_tensor" not in name and "barrier" not in name:
                self.calls.append((name, _largest(args)))
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
        """Bytes of all calls: an all-reduce's tensor, a gather's whole result, a scatter's whole input."""
        return sum(self.sizes)


def _largest(args: Any) -> int:
    """Bytes of the largest group of tensors among the arguments: inputs, or outputs where these are larger."""
    if isinstance(args, Tensor):
        return args.numel() * args.element_size()
    if isinstance(args, (list, tuple)):
        if args and all(isinstance(a, (Tensor, list, tuple)) for a in args) and isinstance(args, list):
            return sum(map(_largest, args))
        return max(map(_largest, args), default=0)
    return 0


def ring_bytes(payload: float, ranks: int) -> float:
    """What one rank sends in an all-reduce of a payload around a ring: 2 (N - 1) / N of it."""
    return 2 * (ranks - 1) / ranks * payload if ranks > 1 else 0.0
