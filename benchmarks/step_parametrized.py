"""Peers that constrain by parametrization: they pay in forward and backward, so the whole of both is timed.

The loss is the sum of <G, x> over the matrices, so that its gradient by x is the G of all other contestants. Ours and
bare AdamW are timed in the same way beside them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import AdamW, Optimizer

from benchmarks.step_entry import Builder, Entry, MissingPeerError
from benchmarks.step_workloads import Problem, residual
from benchmarks.timing import Contestant
from stiefelopt import RiemannianWrapper, Stiefel

WHOLE = "{} + loss"
# geotorch makes an n x n matrix of an n x p one; torch's own took 99 s for one step of 128 matrices of up to 4096 rows.
TALLEST = 512


class Holder(nn.Module):
    """A module with one parameter `weight`, (n, p) or (count, n, p)."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(x.detach().clone())


def whole(constrain: Callable[[Holder], object], wrap: Callable[[list[Tensor], float], Optimizer]) -> Builder:
    """A contestant that makes the points from its parameters, goes back from them, and steps."""

    def build(problem: Problem, lr: float) -> Entry:
        modules = [Holder(x) for x in problem.parameters()]
        for module in modules:
            constrain(module)
        optimizer = wrap([p for module in modules for p in module.parameters()], lr)

        def run() -> None:
            optimizer.zero_grad()
            torch.autograd.backward([module.weight for module in modules], problem.gradients)
            optimizer.step()

        return Entry(Contestant(run), lambda: residual([module.weight for module in modules]))

    return build


def adamw(parameters: list[Tensor], lr: float) -> Optimizer:
    return AdamW(parameters, lr=lr, weight_decay=0.0)


def ours(parameters: list[Tensor], lr: float) -> Optimizer:
    group = {"params": parameters, "manifold": Stiefel(), "weight_decay": 0.0}
    group |= {"view": "batch"} if parameters[0].ndim > 2 else {}
    return RiemannianWrapper(AdamW([group], lr=lr))


def by_torch(module: Holder) -> None:
    """torch's own: Householder reflections for tall matrices, the matrix exponential for square ones."""
    check_height("torch", module)
    parametrizations.orthogonal(module, "weight")


def check_height(package: str, module: Holder) -> None:
    """Leave out what would take minutes for one step."""
    if module.weight.shape[-2] > TALLEST:
        raise MissingPeerError(package, f"left out above {TALLEST} rows, where one step takes minutes")


def by_geotorch(module: Holder) -> None:
    """The matrix exponential of a skew n x n matrix."""
    try:
        import geotorch
    except ImportError:
        raise MissingPeerError("geotorch") from None
    check_height("geotorch", module)
    geotorch.orthogonal(module, "weight")


def parametrized_builders() -> dict[str, Builder]:
    """By name; the first two are what the others compare with."""
    free = whole(lambda module: None, adamw)

    def bare(problem: Problem, lr: float) -> Entry:
        return Entry(free(problem, lr).contestant, lambda: None)

    return {
        WHOLE.format("AdamW"): bare,
        WHOLE.format("stiefelopt, polar"): whole(lambda module: None, ours),
        WHOLE.format("torch orthogonal"): whole(by_torch, adamw),
        WHOLE.format("geotorch"): whole(by_geotorch, adamw),
    }
