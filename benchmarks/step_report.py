"""The step benchmark's table and plot."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.step_contestants import BARE, OURS
from benchmarks.step_result import StepResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUR_COLOR, BARE_COLOR, PEER_COLOR = "#1f6f8b", "#9aa5ab", "#d98e4a"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _goal(result: StepResult, name: str) -> Text:
    met = result.goal_met(name)
    if met is None:
        return Text("")
    return Text(
        f"<= {result.workload.goals[name]:.2f} {'met' if met else 'missed'}", "green" if met else "red"
    )


def table(name: str, result: StepResult) -> RenderableType:
    """One workload as a table, the floor and what did not run below it."""
    title = f"{name}: {result.workload.title}"
    view = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    view.add_column("optimizer step", no_wrap=True)
    for heading in ("median ms", "spread", "/ AdamW", "beyond / floor", "ours / it"):
        view.add_column(heading, justify="right")
    view.add_column("goal", no_wrap=True)
    view.add_column("residual", justify="right")
    for contestant, timing in result.timings.items():
        residual = result.residuals[contestant]
        view.add_row(
            contestant,
            f"{timing.median * 1e3:.2f}",
            f"{timing.spread * 1e3:.2f}",
            _ratio(result.relative_to(contestant, BARE)),
            _ratio(result.of_floor(contestant)),
            "" if contestant == OURS else _ratio(result.relative_to(OURS, contestant)),
            _goal(result, contestant),
            "" if residual is None else f"{residual:.0e}",
            style="bold" if contestant == OURS else "",
        )
    for contestant in result.missing:
        view.add_row(contestant, Text("missing", "yellow"))
    notes = [Text(f"{contestant}: {reason}", "yellow") for contestant, reason in result.missing.items()]
    return Group(view, *notes, Text(floor_line(result) + "\n"))


def floor_line(result: StepResult) -> str:
    """The price that nobody can avoid, and our distance from it."""
    products = result.products.median
    line = (
        f"floor of the geometry: six tall products {products * 1e3:.2f} ms; "
        f"its bytes {result.transfer_seconds * 1e3:.2f} ms at the measured {result.bandwidth / 1e9:.1f} GB/s"
    )
    if result.geometry_seconds is not None:
        beyond = result.geometry_seconds
        line += f"\nours beyond bare AdamW: {beyond * 1e3:.2f} ms, {beyond / products:.2f} of those products"
    if result.floor_goal_met is not None:
        line += f" (goal <= {result.workload.floor_goal}: {'met' if result.floor_goal_met else 'missed'})"
    return line


def _color(contestant: str) -> str:
    if contestant.startswith("stiefelopt"):
        return OUR_COLOR
    return BARE_COLOR if contestant.startswith(BARE) else PEER_COLOR


def plot(path: Path, results: Mapping[str, StepResult], caption: str) -> Path:
    """Medians as bars, one panel per workload; the whiskers are the interquartile range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = max(len(result.timings) for result in results.values())
    columns = min(3, len(results))
    lines = -(-len(results) // columns)
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(6.4 * columns, (0.3 * rows + 1.3) * lines),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    for axis, (name, result) in zip(axes.flat, results.items(), strict=False):
        _bars(axis, name, result)
    figure.suptitle(caption, fontsize=9, color="#555555")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _bars(axis: Axes, name: str, result: StepResult) -> None:
    names, timings = list(result.timings), result.timings.values()
    medians = [timing.median * 1e3 for timing in timings]
    firsts, thirds = zip(
        *([seconds * 1e3 for seconds in timing.quartiles] for timing in timings), strict=True
    )
    below = [median - first for median, first in zip(medians, firsts, strict=True)]
    above = [third - median for median, third in zip(medians, thirds, strict=True)]
    axis.barh(
        names, medians, xerr=(below, above), color=[_color(n) for n in names], ecolor="#444444", capsize=2
    )
    axis.invert_yaxis()
    for row, (median, third) in enumerate(zip(medians, thirds, strict=True)):
        axis.annotate(_short(median), (third, row), (4, 0), textcoords="offset points", va="center", size=8)
    products = result.products.median * 1e3
    axis.axvline(products, color="#444444", lw=0.8, ls=":", label=f"six tall products, {_short(products)}")
    axis.legend(loc="lower right", fontsize=8, frameon=False)
    axis.set_title(textwrap.fill(f"{name}: {result.workload.title}", 62), fontsize=10, loc="left")
    axis.set_xlabel("milliseconds per optimizer step", fontsize=8)
    axis.set_xlim(0, 1.12 * max(thirds))
    if max(medians) > 100 * min(medians):
        axis.set_xscale("log")
        axis.set_xlim(0.5 * min(medians), 3 * max(thirds))
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _short(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
