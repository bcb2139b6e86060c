"""Who races in the step benchmark: our wrapper, bare AdamW, the peers, each built from the same problem."""

from __future__ import annotations

import torch
from torch.optim import AdamW

from benchmarks.stella_reference import StellaHooks
from benchmarks.step_entry import Builder, Entry, MissingPeerError, enter
from benchmarks.step_parametrized import parametrized_builders
from benchmarks.step_workloads import Problem, Workload, residual
from stiefelopt import RiemannianWrapper, Stiefel, retractions

OURS = "stiefelopt, polar"
BARE = "AdamW"
POGO = "POGO, stacked"


def bare(*, foreach: bool | None = None, fused: bool | None = None) -> Builder:
    """AdamW on the same parameters with no geometry at all: the unit of every ratio."""

    def build(problem: Problem, lr: float) -> Entry:
        points = problem.parameters()
        optimizer = AdamW(points, lr=lr, weight_decay=0.0, foreach=foreach, fused=fused)
        return Entry(enter(optimizer, points, problem.gradients).contestant, lambda: None)

    return build


def ours(retraction: str, **options: str) -> Builder:
    """RiemannianWrapper over AdamW."""

    def build(problem: Problem, lr: float) -> Entry:
        points = problem.parameters()
        group = {"params": points, "manifold": Stiefel(retraction=retraction, **options), "weight_decay": 0.0}
        group |= {"view": "batch"} if problem.stacked else {}
        return enter(RiemannianWrapper(AdamW([group], lr=lr)), points, problem.gradients)

    return build


def stella(*, batched: bool = True) -> Builder:
    """StelLA's two hooks around AdamW, thin SVD batched over same shapes or one by one."""

    def build(problem: Problem, lr: float) -> Entry:
        points = problem.parameters()
        optimizer = AdamW(points, lr=lr, weight_decay=0.0)
        StellaHooks(optimizer, points, batched=batched)
        return enter(optimizer, points, problem.gradients)

    return build


def geoopt(name: str) -> Builder:
    """geoopt's RiemannianAdam or RiemannianSGD with its Euclidean Stiefel manifold, which retracts by QR.

    Its canonical one solves an n x n system for each matrix: out of the question at n = 4096.
    """

    def build(problem: Problem, lr: float) -> Entry:
        try:
            import geoopt
        except ImportError:
            raise MissingPeerError("geoopt") from None
        manifold = geoopt.Stiefel(canonical=False)
        points = [geoopt.ManifoldParameter(x.data, manifold=manifold) for x in problem.parameters()]
        return enter(getattr(geoopt.optim, name)(points, lr=lr), points, problem.gradients)

    return build


def pogo(*, stacked: bool) -> Builder:
    """POGO with its VectorAdam, in the row layout it is written for; a tensor per shape or per matrix."""

    def build(problem: Problem, lr: float) -> Entry:
        try:
            import pogo
            from pogo.base import VectorAdam
        except ImportError:
            raise MissingPeerError("pogo-torch") from None
        rows = [x.mT.contiguous() for x in problem.stacks]
        gradients = [g.mT.contiguous() for g in problem.stack_gradients]
        if not stacked:
            rows, gradients = ([t[None] for stack in ts for t in stack] for ts in (rows, gradients))
        points = [torch.nn.Parameter(x.clone()) for x in rows]
        entry = enter(pogo.POGO(points, VectorAdam(), lr), points, gradients)
        return Entry(entry.contestant, lambda: residual([x.mT for x in points]))

    return build


def builders() -> dict[str, Builder]:
    """Every contestant by name; ours are whatever retractions are registered, the default one first."""
    names = sorted(retractions.names(), key=lambda name: (name != "polar", name))
    return {
        BARE: bare(),
        "AdamW, foreach": bare(foreach=True),
        "AdamW, fused": bare(fused=True),
        **{f"stiefelopt, {name}": ours(name) for name in names},
        f"{OURS}, projection none": ours("polar", projection="none"),
        "StelLA's scheme": stella(),
        "StelLA's scheme, one by one": stella(batched=False),
        "geoopt": geoopt("RiemannianAdam"),
        "geoopt, SGD": geoopt("RiemannianSGD"),
        POGO: pogo(stacked=True),
        "POGO, looped": pogo(stacked=False),
        **parametrized_builders(),
    }


def default_contestants(workload: Workload) -> list[str]:
    """Who races where nobody is chosen.

    All but our SVD retraction, the reference that the others are tested against: it would only repeat StelLA's time.
    Where all matrices of a shape are one parameter, a loop over parameters is nothing of its own.
    """
    loops = ("StelLA's scheme, one by one", "POGO, looped") if workload.stacked else ()
    return [name for name in builders() if name != "stiefelopt, svd" and name not in loops]
