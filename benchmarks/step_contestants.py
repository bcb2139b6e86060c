"""Who races in the step benchmark: our wrapper, bare AdamW, the peers, each built from the same problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from benchmarks.stella_reference import StellaHooks
from benchmarks.step_workloads import Problem, Workload, residual
from benchmarks.timing import Contestant
from stiefelopt import RiemannianWrapper, Stiefel, retractions

OURS = "stiefelopt, polar"
BARE = "AdamW"
POGO = "POGO, stacked"


class MissingPeerError(RuntimeError):
    """A peer's package is not installed; the message is the way out."""

    def __init__(self, package: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'stiefelopt[bench]'")


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


def bare(*, foreach: bool | None = None, fused: bool | None = None) -> Builder:
    """AdamW on the same parameters with no geometry at all: the unit of every ratio."""

    def build(problem: Problem, lr: float) -> Entry:
        points = problem.parameters()
        optimizer = AdamW(points, lr=lr, weight_decay=0.0, foreach=foreach, fused=fused)
        return Entry(enter(optimizer, points, problem.gradients).contestant, lambda: None)

    return build


def ours(retraction: str) -> Builder:
    """RiemannianWrapper over AdamW."""

    def build(problem: Problem, lr: float) -> Entry:
        points = problem.parameters()
        group = {"params": points, "manifold": Stiefel(retraction=retraction), "weight_decay": 0.0}
        return enter(RiemannianWrapper(AdamW([group], lr=lr)), points, problem.gradients)

    return build


def stella(problem: Problem, lr: float) -> Entry:
    """StelLA's two hooks around AdamW, thin SVD batched over same shapes."""
    points = problem.parameters()
    optimizer = AdamW(points, lr=lr, weight_decay=0.0)
    StellaHooks(optimizer, points)
    return enter(optimizer, points, problem.gradients)


def geoopt_adam(problem: Problem, lr: float) -> Entry:
    """geoopt's RiemannianAdam with its Euclidean Stiefel manifold, which retracts by QR.

    Its canonical one solves an n x n system for each matrix: out of the question at n = 4096.
    """
    try:
        import geoopt
    except ImportError:
        raise MissingPeerError("geoopt") from None
    manifold = geoopt.Stiefel(canonical=False)
    points = [geoopt.ManifoldParameter(x.data, manifold=manifold) for x in problem.parameters()]
    return enter(geoopt.optim.RiemannianAdam(points, lr=lr), points, problem.gradients)


def pogo_stacked(problem: Problem, lr: float) -> Entry:
    """POGO with its VectorAdam, one stacked tensor per shape, in the row layout it is written for."""
    try:
        import pogo
        from pogo.base import VectorAdam
    except ImportError:
        raise MissingPeerError("pogo-torch") from None
    points = [torch.nn.Parameter(x.mT.contiguous()) for x in problem.stacks]
    gradients = [g.mT.contiguous() for g in problem.stack_gradients]
    entry = enter(pogo.POGO(points, VectorAdam(), lr), points, gradients)
    return Entry(entry.contestant, lambda: residual([x.mT for x in points]))


def builders() -> dict[str, Builder]:
    """Every contestant by name; ours are whatever retractions are registered, the default one first."""
    names = sorted(retractions.names(), key=lambda name: (name != "polar", name))
    return {
        BARE: bare(),
        "AdamW, foreach": bare(foreach=True),
        "AdamW, fused": bare(fused=True),
        **{f"stiefelopt, {name}": ours(name) for name in names},
        "StelLA's scheme": stella,
        "geoopt": geoopt_adam,
        POGO: pogo_stacked,
    }


def default_contestants(workload: Workload) -> list[str]:
    """Who races where nobody is chosen.

    All but POGO on separate parameters: it moves stacked tensors, which is another task. And all but our SVD
    retraction, the reference that the others are tested against: it would only repeat StelLA's time.
    """
    return [
        name for name in builders() if name != "stiefelopt, svd" and (name != POGO or POGO in workload.goals)
    ]
