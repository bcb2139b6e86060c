"""What the geometry of a step cannot do without: its tall products, and its trips through memory."""

from __future__ import annotations

import torch

from benchmarks.step_workloads import Problem
from benchmarks.timing import Contestant

# Reads and writes of a tensor of the points' size that the geometry needs around the inner optimizer's own:
# x, g and the converted gradient (2 + 3: its Gram, its combine), then x, d and the new point (2 + 3).
TRANSFERS = 10


def six_products(problem: Problem) -> Contestant:
    """The tall products of gradient conversion, displacement Grams and combine, batched, into memory at hand."""
    small = [torch.empty_like(x[:, : x.shape[-1], :]) for x in problem.stacks]
    tall = [torch.empty_like(x) for x in problem.stacks]

    def run() -> None:
        for x, d, w, z in zip(problem.stacks, problem.stack_gradients, small, tall, strict=True):
            for left, right in ((d, x), (x, d), (d, d)):
                torch.bmm(left.mT, right, out=w)
            for left in (x, x, d):
                torch.bmm(left, w, out=z)

    return Contestant(run)


def one_copy(problem: Problem) -> Contestant:
    """One copy of all points: a read and a write, the measure of memory bandwidth."""
    targets = [torch.empty_like(x) for x in problem.stacks]

    def run() -> None:
        for target, x in zip(targets, problem.stacks, strict=True):
            target.copy_(x)

    return Contestant(run)
