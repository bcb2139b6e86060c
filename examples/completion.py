"""Filling in a matrix of low rank: as one point of the fixed-rank manifold, or as a product of two factors.

A fifth of the entries of a 300 x 200 matrix of rank 5 is known, and its singular values lie a decade apart. Both
students start at the same matrix, the SVD of what is known, and use SGD with momentum at the best learning rate of the
same grid. The product A B^T crawls along the weak directions; the point U S V^T does not care how strong they are.
(Two decades apart, neither finds the weak directions from this start.)

    python examples/completion.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from stiefelopt import USV, FixedRank, RiemannianWrapper

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROWS, COLUMNS, RANK, KNOWN = 300, 200, 5, 0.2
CONDITION = 10.0  # largest singular value over the smallest
RATES = (0.05, 0.1, 0.2, 0.4)  # times each student's own unit: 1 / share of known entries
COLOURS = {"manifold": "#0072B2", "two factors": "#D55E00"}


@dataclass(frozen=True)
class Problem:
    """The matrix and which of its entries are known."""

    target: Tensor
    known: Tensor

    def loss(self, w: Tensor) -> Tensor:
        return 0.5 * (w - self.target)[self.known].square().sum()

    def error(self, w: Tensor) -> float:
        """Of the unknown entries, relative to their size."""
        hidden = ~self.known
        return ((w - self.target)[hidden].norm() / self.target[hidden].norm()).item()

    def start(self) -> USV:
        return FixedRank().project_point(self.target * self.known / KNOWN, rank=RANK)


def make_problem(seed: int) -> Problem:
    g = torch.Generator().manual_seed(seed)
    x = FixedRank().random_point(ROWS, COLUMNS, rank=RANK, generator=g)
    strengths = torch.logspace(0, -torch.tensor(CONDITION).log10().item(), RANK).diag()
    known = torch.rand(ROWS, COLUMNS, generator=g) < KNOWN
    return Problem(x.U @ strengths @ x.V.T, known)


class Student:
    """Parameters, the matrix that they stand for, and the optimizer that moves them."""

    def __init__(
        self, params: list[nn.Parameter], matrix: Callable[[], Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        self.params, self.matrix, self.optimizer = params, matrix, optimizer

    def step(self, problem: Problem) -> None:
        self.optimizer.zero_grad()
        problem.loss(self.matrix()).backward()
        self.optimizer.step()


def on_the_manifold(start: USV, rate: float) -> Student:
    u, s, v = (nn.Parameter(t.clone()) for t in start)
    sgd = torch.optim.SGD([{"params": [u, s, v], "manifold": FixedRank()}], lr=rate / KNOWN, momentum=0.8)
    return Student([u, s, v], lambda: u @ s @ v.T, RiemannianWrapper(sgd))


def as_two_factors(start: USV, rate: float) -> Student:
    """Balanced: A^T A = B^T B. A unit step of the factors is divided by the largest singular value."""
    left, strengths, right = torch.linalg.svd(start.S)
    root = strengths.sqrt()
    a, b = nn.Parameter(start.U @ left * root), nn.Parameter(start.V @ right.T * root)
    sgd = torch.optim.SGD([a, b], lr=rate / (KNOWN * 2 * strengths[0].item()), momentum=0.8)
    return Student([a, b], lambda: a @ b.T, sgd)


STUDENTS = {"manifold": on_the_manifold, "two factors": as_two_factors}


def train(student: Student, problem: Problem, steps: int) -> Iterator[float]:
    """Yields the error of the unknown entries after every step, until it is clear that the rate was too high."""
    error = 1.0
    for _ in range(steps):
        if error < 100:
            student.step(problem)
            error = problem.error(student.matrix().detach())
        yield error


def steps_to(errors: list[float], goal: float = 0.01) -> int | None:
    """How many steps until the error is below the goal; None if it never is."""
    return next((k for k, error in enumerate(errors, 1) if error < goal), None)


def quality(errors: list[float]) -> tuple[float, float]:
    """What learning rates are chosen by: the steps to 1 %, then the last error."""
    return steps_to(errors) or float("inf"), errors[-1]


def table(curves: dict[str, tuple[float, list[float]]]) -> Table:
    view = Table("trained as", "learning rate", "error", "steps to 1 %", title="Unknown entries")
    for name, (rate, errors) in curves.items():
        view.add_row(name, f"{rate:g}", f"{errors[-1]:.1e}", str(steps_to(errors) or "never"))
    return view


def save_plot(path: Path, curves: dict[str, tuple[float, list[float]]]) -> None:
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, (_, errors) in curves.items():
        axes.semilogy(range(1, len(errors) + 1), errors, color=COLOURS[name], linewidth=2, label=name)
    axes.legend(frameon=False, labelcolor="linecolor", title="trained as", alignment="left")
    axes.set(xlabel="step", ylabel="relative error of the unknown entries")
    axes.grid(color="#e6e6e6")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # the matrices are small: a second thread would cost more than it brings
    console = Console()
    problem = make_problem(args.seed)
    best: dict[str, tuple[float, list[float]]] = {}
    with Progress(console=console) as progress:
        for name, make in STUDENTS.items():
            bar = progress.add_task(name, total=len(RATES) * args.steps)
            for rate in RATES:
                errors = []
                for error in train(make(problem.start(), rate), problem, args.steps):
                    errors.append(error)
                    progress.advance(bar)
                if name not in best or quality(errors) < quality(best[name][1]):
                    best[name] = rate, errors
    console.print(table(best))
    args.output.mkdir(parents=True, exist_ok=True)
    save_plot(args.output / "completion.png", best)
    console.print(f"Saved {args.output / 'completion.png'}")


if __name__ == "__main__":
    main()
