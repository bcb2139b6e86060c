"""Optimality gap against time on two large problems: `python -m benchmarks gap`.

Principal components, maximize tr x^T A x over 2000 x 1500, A of condition number 1000 (the size of RSDM's and POGO's
papers), and Procrustes, minimize ||A x - B||^2 over 2000 x 2000. The gap is (f - f*) / |f*|, f* from eigenvalues and
from an SVD in float64. Every method takes the full gradient with heavy-ball momentum 0.9; its learning rate is the best
of one grid on the same problem at a tenth of the size, after 200 steps. Time is that of gradients and steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD

from benchmarks.command import figure, leave, new_console
from benchmarks.step_workloads import residual
from stiefelopt import RiemannianWrapper, Stiefel

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)  # times 1 / Lipschitz constant of the gradient
PILOT = 200  # steps by which a rate is chosen
MOMENTUM = 0.9


@dataclass(frozen=True)
class Problem:
    """A smooth function on n x p, its gradient, its optimum, a scale for learning rates and a start."""

    gradient: Callable[[Tensor], Tensor]
    gap: Callable[[Tensor], float]
    rate: float
    start: Tensor


def pca(n: int, p: int) -> Problem:
    """f = -tr x^T A x / 2."""
    g = torch.Generator().manual_seed(0)
    values = torch.logspace(0, -3, n, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    a = ((q * values) @ q.T).float()
    best = values[:p].sum().item()
    start = torch.linalg.qr(torch.randn(n, p, generator=g))[0]
    return Problem(
        lambda x: -(a @ x), lambda x: 1 - (x.double() * (a @ x).double()).sum().item() / best, 1.0, start
    )


def procrustes(n: int) -> Problem:
    """f = ||A x - B||^2 / 2 with B = A Q + noise."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    b = a @ q + 0.1 * torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5
    cross = a.T @ b
    # ||A x - B||^2 = const - 2 <cross, x> on square orthogonal matrices.
    size = (a.square().sum() + b.square().sum()).item()
    best = size - 2 * torch.linalg.svdvals(cross).sum().item()
    normal, right = (a.T @ a).float(), cross.float()
    # The start lies in the same component as the solution: a walk cannot change the determinant.
    start = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    u, _, vh = torch.linalg.svd(cross)
    sign = torch.linalg.slogdet(u @ vh)[0] * torch.linalg.slogdet(start)[0]
    start[:, 0] *= sign

    def gap(x: Tensor) -> float:
        return (size - 2 * (cross * x.double()).sum().item() - best) / best

    return Problem(lambda x: normal @ x - right, gap, 1 / 4.0, start.float())


class Ours:
    def __init__(self, x: Tensor, lr: float) -> None:
        self.x = Parameter(x.clone())
        group = {"params": [self.x], "manifold": Stiefel(metric="euclidean"), "weight_decay": 0.0}
        self.optimizer: Any = RiemannianWrapper(SGD([group], lr=lr, momentum=MOMENTUM))

    def step(self, gradient: Callable[[Tensor], Tensor]) -> None:
        self.x.grad = gradient(self.x.detach())
        self.optimizer.step()

    @property
    def point(self) -> Tensor:
        return self.x.detach()


class Geoopt(Ours):
    def __init__(self, x: Tensor, lr: float) -> None:
        import geoopt

        self.x = geoopt.ManifoldParameter(x.clone(), manifold=geoopt.Stiefel(canonical=False))
        self.optimizer = geoopt.optim.RiemannianSGD([self.x], lr=lr, momentum=MOMENTUM)


class Pogo(Ours):
    def __init__(self, x: Tensor, lr: float) -> None:
        import pogo
        from pogo.base import SGD as Base

        self.x = Parameter(x.T.clone(memory_format=torch.contiguous_format)[None])
        self.optimizer = pogo.POGO([self.x], Base(momentum=MOMENTUM), lr)

    def step(self, gradient: Callable[[Tensor], Tensor]) -> None:
        self.x.grad = gradient(self.point).T[None].contiguous()
        self.optimizer.step()

    @property
    def point(self) -> Tensor:
        return self.x.detach()[0].T


METHODS: dict[str, Callable[[Tensor, float], Ours]] = {
    "stiefelopt, polar": Ours,
    "POGO": Pogo,
    "geoopt": Geoopt,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gap", description=str(__doc__).splitlines()[0]
    )
    add = parser.add_argument
    add("--size", type=float, default=1.0, help="times the published sizes")
    add("--seconds", type=float, default=30.0, help="of every method on every problem")
    add("--threads", type=int, default=2)
    add("--output", metavar="DIR", help="folder of gap.json and gap.png (default: results/)")
    return parser.parse_args(arguments)


def run(
    make: Callable[[Tensor, float], Ours], pilot: Problem, problem: Problem, seconds: float
) -> dict[str, Any]:
    """The rate that the pilot chose, and (seconds, gap) after every step."""
    lr = min(RATES, key=lambda rate: _pilot(make, pilot, rate * pilot.rate)) * problem.rate
    method = make(problem.start, lr)
    method.step(problem.gradient)  # what is made once, untimed
    curve, spent = [(0.0, problem.gap(method.point))], 0.0
    while spent < seconds:
        begin = time.perf_counter()
        method.step(problem.gradient)
        spent += time.perf_counter() - begin
        curve.append((spent, problem.gap(method.point)))
    return {"learning rate": lr, "curve": curve, "residual": residual([method.point])}


def _pilot(make: Callable[[Tensor, float], Ours], problem: Problem, lr: float) -> float:
    method = make(problem.start, lr)
    for _ in range(PILOT):
        method.step(problem.gradient)
    found = problem.gap(method.point)
    # Off the manifold a gap means nothing.
    return found if residual([method.point]) < 1e-3 else float("inf")


def table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    view = Table(title=title, title_justify="left")
    for heading in ("method", "learning rate", "steps", "ms a step", "last gap", "residual"):
        view.add_column(heading, justify="left" if heading == "method" else "right")
    for name, row in rows.items():
        spent, gap = row["curve"][-1]
        steps = len(row["curve"]) - 1
        cells = f"{row['learning rate']:.3g}", f"{steps}", f"{spent / steps * 1e3:.0f}", f"{gap:.2e}"
        view.add_row(name, *cells, f"{row['residual']:.0e}")
    return view


def plot(path: Path, found: dict[str, dict[str, Any]], caption: str) -> Path:
    """Gap against seconds, one panel per problem."""
    with figure(path, 1, len(found), (5 * len(found), 3.6), caption) as axes:
        for axis, (title, rows) in zip(axes.flat, found.items(), strict=True):
            for name, row in rows.items():
                times, gaps = zip(*row["curve"], strict=True)
                axis.semilogy(times, [max(gap, 1e-9) for gap in gaps], label=name)
            axis.set_title(title, fontsize=9, loc="left")
            axis.set_xlabel("seconds in gradients and steps")
            axis.set_ylabel("(f - f*) / |f*|")
            axis.legend(frameon=False, fontsize=8)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print tables, leave a JSON file and a plot; Ctrl-C keeps what was finished."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    console = new_console()
    n, p = round(2000 * options.size), round(1500 * options.size)
    small = n // 10, p // 10
    problems = {
        f"PCA, {n} x {p}": lambda: (pca(*small), pca(n, p)),
        f"Procrustes, {n} x {n}": lambda: (procrustes(small[0]), procrustes(n)),
    }
    found: dict[str, dict[str, Any]] = {}
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("", total=len(problems) * len(METHODS))
            for title, make in problems.items():
                pilot, problem = make()
                for name, method in METHODS.items():
                    progress.update(task, description=f"{title}: {name}")
                    found.setdefault(title, {})[name] = run(method, pilot, problem, options.seconds)
                    progress.advance(task)
    except KeyboardInterrupt:
        console.print("interrupted: keeping what was finished")
    for title, rows in found.items():
        console.print(table(title, rows))
    return leave(console, "gap", options, found, plot, ("geoopt", "pogo-torch"))


if __name__ == "__main__":
    sys.exit(main())
