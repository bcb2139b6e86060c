"""What a contestant of the step benchmark is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from benchmarks.step_workloads import Problem, residual
from benchmarks.timing import Contestant


class MissingPeerError(RuntimeError):
    """A peer that cannot race; the message says why, and the way out if its package is not installed."""

    def __init__(self, package: str, reason: str = "") -> None:
        super().__init__(reason or f"{package} is not installed: pip install 'stiefelopt[bench]'")


@dataclass(frozen=True)
class Entry:
    """A contestant, and how far from the manifold its points are (None: it does not try to stay there)."""

    contestant: Contestant
    residual: Callable[[], float | None]


Builder = Callable[[Problem, float], Entry]


def enter(optimizer: Optimizer, points: Sequence[Tensor], gradients: Sequence[Tensor]) -> Entry:
    """An optimizer as a contestant; some of them overwrite `.grad`, so it is set before every step."""

    def prepare() -> None:
        for point, gradient in zip(points, gradients, strict=True):
            point.grad = gradient

    return Entry(Contestant(optimizer.step, prepare), lambda: residual(list(points)))
