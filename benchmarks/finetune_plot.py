"""The picture of a comparison: training loss and validation cross-entropy over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.finetune_training import Record

# Okabe and Ito's colours, which colour-blind readers can tell apart; grey and brown for a long list of methods
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#8C564B")
SMOOTHING = 0.95  # share of the old value in the running mean of the training loss
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}

Curve = tuple[np.ndarray, np.ndarray]  # steps, values per seed (seeds, steps)


def save_plot(path: Path, runs: dict[str, list[Record]], title: str) -> None:
    """One colour per method: the mean over seeds as a line, lowest to highest seed as a band."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color="#444444")
        _panel(left, {name: _training(records) for name, records in runs.items()}, marker="")
        _panel(right, {name: _validation(records) for name, records in runs.items()}, marker="o")
        left.set(title="Training", ylabel="cross-entropy, running mean (nats)", xlabel="training step")
        right.set(title="Validation", ylabel="cross-entropy (nats)", xlabel="training step")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def save_curves(path: Path, tasks: dict[str, dict[str, list[Record]]]) -> Path:
    """One panel per task with the validation loss of every method."""
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            rows, columns, figsize=(6 * columns, 4.5 * rows), layout="constrained", squeeze=False
        )
        for axes in list(grid.flat)[len(tasks) :]:
            axes.remove()
        for axes, (title, runs) in zip(grid.flat, tasks.items(), strict=False):
            curves = {name: _validation(records) for name, records in runs.items()}
            ends = [values[:, -1] for _, values in curves.values() if values.size]
            axes.set(title=title, xlabel="training step", ylabel="validation loss")
            if (
                ends
                and max(map(np.max, ends)) > 0
                and np.max([v.max() for _, v in curves.values()]) > 20 * np.min(ends)
            ):
                axes.set_yscale("log")
            _panel(axes, curves, marker="o")
        figure.savefig(path, dpi=120)
        plt.close(figure)
    return path


def _training(records: Sequence[Record]) -> Curve:
    curves = _longest(
        [list(accumulate((step.loss for step in record.steps), _running_mean)) for record in records]
    )
    return np.arange(1, len(curves[0]) + 1), np.array(curves)


def _running_mean(mean: float, value: float) -> float:
    return SMOOTHING * mean + (1 - SMOOTHING) * value


def _validation(records: Sequence[Record]) -> Curve:
    curves = _longest([record.validation for record in records])
    return np.array([step for step, _, _ in curves[0]]), np.array([[v[1] for v in curve] for curve in curves])


def _longest(curves: list[list[Any]]) -> list[list[Any]]:
    """Without the curves that an interruption cut short, so that a mean is over the same seeds everywhere."""
    return [curve for curve in curves if len(curve) == max(map(len, curves))]


def _panel(axes: Axes, curves: dict[str, Curve], marker: str) -> None:
    ends: dict[str, tuple[float, float, str]] = {}
    for position, (name, (steps, values)) in enumerate(curves.items()):
        if len(steps) == 0:
            continue
        colour = COLOURS[position % len(COLOURS)]
        axes.plot(steps, values.mean(axis=0), color=colour, marker=marker, linewidth=2, markersize=5)
        axes.fill_between(
            steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0
        )
        ends[name] = (float(steps[-1]), float(values.mean(axis=0)[-1]), colour)
    _label_ends(axes, ends)


def _label_ends(axes: Axes, ends: dict[str, tuple[float, float, str]]) -> None:
    """The method's name beside the end of its line, pushed up where two would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()  # shares of the panel, whatever its scale
    places = {name: float(to_axes.transform((step, value))[1]) for name, (step, value, _) in ends.items()}
    height = -1.0
    for name in sorted(ends, key=places.__getitem__):
        step, value, colour = ends[name]
        height = max(places[name], height + 0.06)
        axes.annotate(
            name,
            (step, value),
            xytext=(1.02, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )
