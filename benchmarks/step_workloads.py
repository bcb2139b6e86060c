"""The matrices that the step benchmark moves, and the goals it holds us to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
        stacked: whether all matrices of a shape are one parameter (count, n, p).
        floor_goal: the largest ratio of our geometry's time to its six tall products' that we accept.
        cpu_share: of every count, what is measured on a CPU, where the whole list would take too long.
    """

    title: str
    shapes: tuple[tuple[int, int, int], ...]
    goals: Mapping[str, float] = field(default_factory=dict)
    stacked: bool = False
    floor_goal: float | None = None
    cpu_share: float = 1.0

    def on(self, device: torch.device | str) -> Workload:
        """What of it is measured on that device."""
        if torch.device(device).type != "cpu" or self.cpu_share == 1.0:
            return self
        shapes = tuple((round(count * self.cpu_share), n, p) for count, n, p in self.shapes)
        return replace(self, shapes=shapes, title=f"{self.title}; {self.cpu_share:g} of it")

    @property
    def numel(self) -> int:
        """Entries of all its matrices together."""
        return sum(math.prod(shape) for shape in self.shapes)


def llama(rank: int) -> Workload:
    """The factors of LoRA on every linear layer of LLaMA3-8B, as StelLA's paper lists them (arXiv 2510.01938)."""
    return Workload(
        f"LLaMA3-8B's adapters at rank {rank}: 192 of 4096, 64 of 1024, 64 of 14336 rows",
        ((192, 4096, rank), (64, 1024, rank), (64, 14336, rank)),
        cpu_share=1 / 16,
    )


WORKLOADS: dict[str, Workload] = {
    "lora16": Workload(
        "64 of 1024x16 + 64 of 4096x16",
        ((64, 1024, 16), (64, 4096, 16)),
        {"AdamW": 2.2, "StelLA's scheme": 0.27, "geoopt": 0.40, "POGO, stacked": 0.50},
    ),
    "tall64": Workload(
        "32 of 4096x64",
        ((32, 4096, 64),),
        {"StelLA's scheme": 0.28, "geoopt": 0.42, "POGO, stacked": 0.40},
        floor_goal=1.3,
    ),
    "small": Workload(
        "2,000 of 16x16 as separate parameters",
        ((2000, 16, 16),),
        {"AdamW": 1.15, "StelLA's scheme": 0.50, "geoopt": 0.30},
    ),
    "small-stacked": Workload(
        "2,000 of 16x16 as one parameter", ((2000, 16, 16),), {"POGO, stacked": 1.2}, stacked=True
    ),
    "square": Workload(
        "8 of 512x512",
        ((8, 512, 512),),
        {"StelLA's scheme": 0.30, "geoopt": 0.80, "POGO, stacked": 1.00},
        floor_goal=1.3,
    ),
    "pca": Workload("1 of 2000x1500", ((1, 2000, 1500),), {"POGO, stacked": 0.95}, floor_goal=1.3),
    "procrustes": Workload("1 of 2000x2000", ((1, 2000, 2000),)),
    "llama16": llama(16),
    "llama32": llama(32),
    "llama64": llama(64),
    "kernels": Workload("20,000 of 3x3 as one parameter", ((20000, 3, 3),), stacked=True),
    "tiny": Workload("3 of 12x4 + 2 of 5x5, to try the program", ((3, 12, 4), (2, 5, 5)), {"AdamW": 100.0}),
}
MEASURED = tuple(name for name in WORKLOADS if name != "tiny")


@dataclass(frozen=True)
class Problem:
    """One workload's data: orthonormal points and Gaussian gradients, drawn once, shared by all contestants.

    `stacks` and `stack_gradients` hold one (count, n, p) tensor per shape, `gradients` the same numbers as
    the parameters' shapes. Contestants copy the points and only read the gradients.
    """

    stacks: list[Tensor]
    stack_gradients: list[Tensor]
    gradients: list[Tensor]
    stacked: bool = False

    @classmethod
    def draw(cls, workload: Workload, *, device: torch.device | str = "cpu", seed: int = 0) -> Problem:
        """Draw it, in float32."""
        generator = torch.Generator().manual_seed(seed)
        normal = [torch.randn(shape, generator=generator) for shape in workload.shapes for _ in range(2)]
        stacks = [torch.linalg.qr(z)[0].contiguous().to(device) for z in normal[::2]]
        stack_gradients = [g.to(device) for g in normal[1::2]]
        pieces = stack_gradients if workload.stacked else [g for stack in stack_gradients for g in stack]
        return cls(stacks, stack_gradients, [g.clone() for g in pieces], workload.stacked)

    def parameters(self) -> list[Parameter]:
        """The points as parameters, each with memory of its own: one per matrix, or one per stack."""
        pieces = self.stacks if self.stacked else [x for stack in self.stacks for x in stack]
        return [Parameter(x.clone()) for x in pieces]


def residual(points: list[Tensor]) -> float:
    """max |x^T x - I| over matrices (*b, n, p), in float64: how far their columns are from orthonormal."""
    found = []
    for point in points:
        x = point.detach().double()
        gram = x.mT @ x
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        found.append(gram.abs().max())
    return torch.stack(found).max().item()  # NaN stays NaN
