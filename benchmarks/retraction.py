"""The retractions alone, beside LAPACK's QR and SVD and geoopt's: `python -m benchmarks retraction`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks.command import figure, leave, new_console
from benchmarks.stella_reference import batched_polar
from benchmarks.step_workloads import WORKLOADS, Problem, residual
from benchmarks.timing import Contestant, Timing, race
from stiefelopt import projections, retractions

FLOOR = "two tall products"
LENGTH = 1e-2  # Frobenius norm of a displacement


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks retraction", description=__doc__)
    add = parser.add_argument
    default = ["lora16", "tall64", "small-stacked", "square", "pca"]
    add("--workloads", nargs="+", choices=WORKLOADS, default=default, metavar="NAME")
    add("--rounds", type=int, default=11)
    add(
        "--patience",
        type=float,
        default=8.0,
        metavar="SECONDS",
        help="of the first run; slower ones make one more",
    )
    add("--threads", type=int, default=2)
    add("--device", default="cpu")
    add("--output", metavar="DIR", help="folder of retraction.json and retraction.png (default: results/)")
    return parser.parse_args(arguments)


def functions() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """By name: (x, u) -> y for stacks; ours are whatever is registered."""
    ours = {f"stiefelopt, {name}": retractions.get(name) for name in sorted(retractions.names())}
    return ours | {
        "torch.linalg.qr": lambda x, u: torch.linalg.qr(x + u)[0],
        "torch.linalg.svd, U V^T": lambda x, u: batched_polar(x + u),
    }


class Runner:
    """One retraction on all stacks of a problem."""

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], xs: list[Tensor], us: list[Tensor]
    ) -> None:
        self.function, self.xs, self.us = function, xs, us
        self.ys = xs

    def __call__(self) -> None:
        self.ys = [self.function(x, u) for x, u in zip(self.xs, self.us, strict=True)]


def measure(name: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Contestant to milliseconds, spread, times the floor and residual."""
    problem = Problem.draw(WORKLOADS[name].on(options.device), device=options.device)
    xs = problem.stacks
    us = [projections.tangent(x, g) for x, g in zip(xs, problem.stack_gradients, strict=True)]
    us = [u * (LENGTH / torch.linalg.matrix_norm(u))[:, None, None] for u in us]
    runners = {known: Runner(function, xs, us) for known, function in functions().items()}

    def products() -> None:
        for x, u in zip(xs, us, strict=True):
            torch.bmm(x, torch.bmm(x.mT, u))

    timings: dict[str, Timing] = race(
        {known: Contestant(runner) for known, runner in runners.items()} | {FLOOR: Contestant(products)},
        rounds=options.rounds,
        device=options.device,
        patience=options.patience,
    )
    floor = timings.pop(FLOOR).median
    return {
        known: {
            "ms": timing.median * 1e3,
            "spread": timing.spread * 1e3,
            f"/ {FLOOR}": timing.median / floor,
            "residual": residual(runners[known].ys),
        }
        for known, timing in timings.items()
    }


def table(title: str, rows: dict[str, dict[str, float]]) -> Table:
    view = Table(title=title, title_justify="left")
    view.add_column("retraction", no_wrap=True)
    for heading in next(iter(rows.values())):
        view.add_column(heading, justify="right")
    for name, row in rows.items():
        view.add_row(name, *(f"{value:.3g}" for value in row.values()))
    return view


def plot(path: Path, found: dict[str, dict[str, dict[str, float]]], caption: str) -> Path:
    """Time in units of the floor, logarithmic, one panel per workload."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    with figure(path, 1, len(found), (3.6 * len(found), 3.2), caption, sharey=True) as axes:
        for axis, (name, rows) in zip(axes.flat, found.items(), strict=True):
            colors = ["#1f6f8b" if known.startswith("stiefelopt") else "#d98e4a" for known in rows]
            axis.barh(list(rows), [row[f"/ {FLOOR}"] for row in rows.values()], color=colors)
            axis.set_xscale("log")
            axis.set_xlim(left=1)  # what nothing can be faster than
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_title(f"{name}: {WORKLOADS[name].title}", fontsize=8, loc="left")
            axis.set_xlabel(f"time / {FLOOR}", fontsize=8)
            axis.tick_params(labelsize=8)
        axes[0][0].invert_yaxis()
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables, leave a JSON file and a plot; Ctrl-C keeps what was finished."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    console = new_console()
    found: dict[str, Any] = {}
    try:
        with Progress(console=console, transient=True) as progress:
            for name in progress.track(options.workloads):
                found[name] = measure(name, options)
                progress.console.print(table(f"{name}: {WORKLOADS[name].title}", found[name]))
    except KeyboardInterrupt:
        console.print("interrupted: keeping the workloads that were finished")
    return leave(console, "retraction", options, found, plot)


if __name__ == "__main__":
    sys.exit(main())
