"""What the benchmark commands share: where they print, and the JSON file and the picture that they leave."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.environment import environment, results_dir, write_json

Plot = Callable[[Path, Any, str], Path]


def new_console() -> Console:
    """As wide as the terminal; a pipe has no width of its own."""
    return Console(width=None if sys.stdout.isatty() else 130)


def leave(
    console: Console,
    name: str,
    options: argparse.Namespace,
    found: Mapping[str, Any],
    plot: Plot,
    packages: tuple[str, ...] = (),
) -> int:
    """Write NAME.json and NAME.png and say where they are; returns the exit status, 1 if nothing was found.

    Args:
        console: where to say it.
        name: of the command.
        options: its command line; ``output`` is the folder, ``device`` where it measured (default: the CPU).
        found: what it measured.
        plot: draws it: (path, found, caption) -> path.
        packages: peers whose versions matter.
    """
    if not found:
        return 1
    facts = environment(torch.float32, getattr(options, "device", "cpu"), packages)
    folder = results_dir(options.output)
    report = {"environment": facts, "settings": vars(options), name: found}
    caption = f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, float32"
    written = write_json(folder / f"{name}.json", report), plot(folder / f"{name}.png", found, caption)
    console.print("written: " + ", ".join(map(str, written)), soft_wrap=True, highlight=False)
    return 0


@contextmanager
def figure(
    path: Path, rows: int, columns: int, size: tuple[float, float], caption: str, **options: Any
) -> Iterator[Any]:
    """The axes (rows, columns) of a new picture of that size in inches, saved when this is left."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    yield axes
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    made.suptitle(caption, fontsize=8, color="#555555")
    made.savefig(path, dpi=130)
    pyplot.close(made)
