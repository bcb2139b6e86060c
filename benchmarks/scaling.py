"""How a step's time and memory grow with n, p and the number of matrices: `python -m benchmarks scaling`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table

from benchmarks.allocations import measure
from benchmarks.command import figure, leave, new_console
from benchmarks.step_contestants import BARE, OURS, builders
from benchmarks.step_floor import six_products
from benchmarks.step_workloads import Problem, Workload
from benchmarks.timing import race

CONTESTANTS = (BARE, OURS, "StelLA's scheme", "geoopt", "POGO, stacked")
FLOOR = "six tall products"
# variable: (values, shape (count, n, p) at a value)
AXES: dict[str, tuple[tuple[int, ...], Any]] = {
    "n": ((64, 256, 1024, 4096, 16384, 65536), lambda n: (16, n, 16)),
    "p": ((1, 4, 16, 64, 256, 1024), lambda p: (4, 1024, p)),
    "count": ((1, 10, 100, 1000, 5000, 20000), lambda k: (k, 32, 8)),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__)
    add = parser.add_argument
    add("--axes", nargs="+", choices=AXES, default=list(AXES), metavar="NAME")
    add("--most", type=int, default=sys.maxsize, help="leave out larger values")
    add("--rounds", type=int, default=5)
    add(
        "--patience",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="of the first step; slower ones make one more",
    )
    add("--threads", type=int, default=2)
    add("--device", default="cpu")
    add("--output", metavar="DIR", help="folder of scaling.json and scaling.png (default: results/)")
    return parser.parse_args(arguments)


def point(shape: tuple[int, int, int], options: argparse.Namespace) -> dict[str, dict[str, float | None]]:
    """Milliseconds a step (the floor among them) and bytes at its peak, by contestant."""
    problem = Problem.draw(Workload("", (shape,)), device=options.device)
    made = {name: builders()[name](problem, 1e-3).contestant for name in CONTESTANTS}
    timings = race(
        made | {FLOOR: six_products(problem)},
        rounds=options.rounds,
        warmup=2,
        device=options.device,
        patience=options.patience,
    )
    peaks: dict[str, float | None] = {}
    for name in (BARE, OURS):
        made[name].prepare()
        peaks[name] = measure(made[name].run, options.device).peak
    return {
        "milliseconds": {name: timing.median * 1e3 for name, timing in timings.items()},
        "peak bytes": peaks,
        "bytes of the points": {"": sum(x.numel() * x.element_size() for x in problem.stacks)},
    }


Points = dict[int, dict[str, dict[str, float | None]]]


def table(axis: str, points: Points) -> Table:
    """Milliseconds, a row for each value."""
    names = [*CONTESTANTS, FLOOR]
    view = Table(title=f"milliseconds a step against {axis}", title_justify="left")
    for heading in (axis, *names, "ours / AdamW", "beyond / floor"):
        view.add_column(heading, justify="right")
    for value, found in points.items():
        ms: Mapping[str, Any] = found["milliseconds"]
        beyond = (ms[OURS] - ms[BARE]) / ms[FLOOR]
        ratios = f"{ms[OURS] / ms[BARE]:.2f}", f"{beyond:.2f}"
        view.add_row(f"{value:,}", *(f"{ms[name]:.3g}" for name in names), *ratios)
    return view


def plot(path: Path, found: Mapping[str, Points], caption: str) -> Path:
    """Time above, memory below, a column for each axis, all logarithmic."""
    with figure(path, 2, len(found), (4.6 * len(found), 6.4), caption) as axes:
        for column, (axis, points) in enumerate(found.items()):
            _panels(axes[0][column], axes[1][column], axis, points)
    return path


def _panels(upper: Any, lower: Any, axis: str, points: Points) -> None:
    sizes = zip(("count", "n", "p"), AXES[axis][1](0), strict=True)
    fixed = ", ".join(f"{name} = {size}" for name, size in sizes if name != axis)
    for name in (*CONTESTANTS, FLOOR):
        style = ":" if name == FLOOR else "-"
        heights = [row["milliseconds"][name] for row in points.values()]
        upper.loglog(list(points), heights, style, marker=".", label=name, lw=2 if name == OURS else 1)
    upper.set_title(f"milliseconds a step against {axis} ({fixed})", fontsize=9, loc="left")
    for name in (BARE, OURS):
        heights = [row["peak bytes"][name] or 1 for row in points.values()]
        lower.loglog(list(points), heights, marker=".", label=name)
    lower.loglog(
        list(points), [row["bytes of the points"][""] for row in points.values()], ":", label="the points"
    )
    lower.set_title("bytes beyond what is held, at the peak of a step", fontsize=9, loc="left")
    lower.set_xlabel(axis)
    for panel in (upper, lower):
        panel.legend(fontsize=7, frameon=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables, leave a JSON file and a plot; Ctrl-C keeps the points that were finished."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    console = new_console()
    found: dict[str, Points] = {}
    wanted = [(axis, v) for axis in options.axes for v in AXES[axis][0] if v <= options.most]
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("scaling", total=len(wanted))
            for axis, value in wanted:
                progress.update(task, description=f"{axis} = {value:,}")
                found.setdefault(axis, {})[value] = point(AXES[axis][1](value), options)
                progress.advance(task)
    except KeyboardInterrupt:
        console.print("interrupted: keeping the points that were finished")
    for axis, points in found.items():
        console.print(table(axis, points))
    return leave(console, "scaling", options, found, plot, ("geoopt", "pogo-torch"))


if __name__ == "__main__":
    sys.exit(main())
