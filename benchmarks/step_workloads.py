"""The matrices that the step benchmark moves, and the goals it holds us to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter


@dataclass(frozen=True)
class Workload:
    """A list of tall matrices of a few distinct shapes.

    Args:
        title: what it is, for a reader.
        shapes: (count, n, p) for each distinct shape.
        goals: contestant to the largest ratio of our step's time to its time that we accept.
    """

    title: str
    shapes: tuple[tuple[int, int, int], ...]
    goals: Mapping[str, float] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Entries of all its matrices together."""
        return sum(math.prod(shape) for shape in self.shapes)


WORKLOADS: dict[str, Workload] = {
    "lora16": Workload(
        "64 of 1024x16 + 64 of 4096x16",
        ((64, 1024, 16), (64, 4096, 16)),
        {"AdamW": 2.4, "StelLA's scheme": 0.32, "geoopt": 0.40, "POGO, stacked": 0.50},
    ),
    "tall64": Workload(
        "32 of 4096x64",
        ((32, 4096, 64),),
        {"StelLA's scheme": 0.28, "geoopt": 0.42, "POGO, stacked": 0.40},
    ),
    "small": Workload(
        "2,000 of 16x16 as separate parameters",
        ((2000, 16, 16),),
        {"AdamW": 1.15, "StelLA's scheme": 0.50, "geoopt": 0.30},
    ),
    "square": Workload(
        "8 of 512x512",
        ((8, 512, 512),),
        {"StelLA's scheme": 0.30, "geoopt": 0.80, "POGO, stacked": 1.00},
    ),
    "tiny": Workload("3 of 12x4 + 2 of 5x5, to try the program", ((3, 12, 4), (2, 5, 5)), {"AdamW": 100.0}),
}
MEASURED = ("lora16", "tall64", "small", "square")


@dataclass(frozen=True)
class Problem:
    """One workload's data: orthonormal points and Gaussian gradients, drawn once, shared by all contestants.

    `stacks` and `stack_gradients` hold one (count, n, p) tensor per shape, `gradients` the same numbers as
    separate tensors. Contestants copy the points and only read the gradients.
    """

    stacks: list[Tensor]
    stack_gradients: list[Tensor]
    gradients: list[Tensor]

    @classmethod
    def draw(cls, workload: Workload, *, device: torch.device | str = "cpu", seed: int = 0) -> Problem:
        """Draw it, in float32."""
        generator = torch.Generator().manual_seed(seed)
        normal = [torch.randn(shape, generator=generator) for shape in workload.shapes for _ in range(2)]
        stacks = [torch.linalg.qr(z)[0].contiguous().to(device) for z in normal[::2]]
        stack_gradients = [g.to(device) for g in normal[1::2]]
        return cls(stacks, stack_gradients, [g.clone() for stack in stack_gradients for g in stack])

    def parameters(self) -> list[Parameter]:
        """The points as separate parameters, each with memory of its own."""
        return [Parameter(x.clone()) for stack in self.stacks for x in stack]


def residual(points: list[Tensor]) -> float:
    """max |x^T x - I| over matrices (*b, n, p), in float64: how far their columns are from orthonormal."""
    worst = 0.0
    for point in points:
        x = point.detach().double()
        gram = x.mT @ x
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        worst = max(worst, gram.abs().max().item())
    return worst
