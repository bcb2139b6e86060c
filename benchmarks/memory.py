"""Memory of a step, ours beside its peers, and of a fine-tuning step: `python -m benchmarks memory`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from benchmarks.allocations import measure
from benchmarks.command import figure, leave, new_console
from benchmarks.step_contestants import builders
from benchmarks.step_entry import MissingPeerError
from benchmarks.step_workloads import WORKLOADS, Problem

CONTESTANTS = (
    "AdamW",
    "AdamW, foreach",
    "AdamW, fused",
    "stiefelopt, polar",
    "stiefelopt, exp",
    "StelLA's scheme",
    "geoopt",
    "POGO, stacked",
)
ADAPTERS = ("lora", "stella", "riemannlora", "riemannlora-keep", "riemannion")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    add = parser.add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, default=["lora16", "tall64", "square"], metavar="NAME")
    add("--adapters", nargs="*", default=list(ADAPTERS), metavar="METHOD", help="of benchmarks.finetune")
    add("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    add("--device", default="cpu")
    add("--output", metavar="DIR", help="folder of memory.json and memory.png (default: results/)")
    return parser.parse_args(arguments)


def optimizers(workload: str, device: str) -> dict[str, dict[str, float]]:
    """Contestant to bytes in units of the points' own: held between steps (points included), and a step's peak."""
    problem = Problem.draw(WORKLOADS[workload].on(device), device=device)
    unit = sum(x.numel() * x.element_size() for x in problem.stacks)
    rows = {}
    for name in track(CONTESTANTS, f"{workload}", transient=True):
        kept: list[Any] = []

        def start(name: str = name, kept: list[Any] = kept) -> None:
            contestant = builders()[name](problem, 1e-3).contestant
            for _ in range(2):
                contestant.prepare()
                contestant.run()
            kept.append(contestant)

        try:
            held = measure(start, device).held
        except MissingPeerError:
            continue
        kept[0].prepare()
        rows[name] = {"held": held / unit, "peak": (held + measure(kept[0].run, device).peak) / unit}
    return rows


def adapters(names: Sequence[str], rank: int, device: str) -> dict[str, dict[str, float]]:
    """Method to MiB: trained, its optimizer's state, what else the optimizer and the adapter hold, a step's peak."""
    from benchmarks.finetune_job import load_encoder
    from benchmarks.finetune_methods import METHODS, Adapter
    from benchmarks.finetune_training import Plan, Run
    from benchmarks.text_data import read_sentences, tokenize

    encoder, tokenizer = load_encoder("all-MiniLM-L6-v2", "all-MiniLM-L6-v2")
    data = tokenize(read_sentences("rotten_tomatoes"), tokenizer, 32).to(device)
    plan = Plan(Adapter(rank, 2.0 * rank, "all-linear"), 1e-3, 4, 16, device)
    size = sum(p.numel() * p.element_size() for p in encoder.parameters())
    rows = {}
    for name in names:
        runs: list[Run] = []

        def start(name: str = name, runs: list[Run] = runs) -> None:
            runs.append(Run(name, METHODS[name], encoder.to(device), data, plan, 0, 1e-3))
            for _ in range(2):
                runs[0].step()

        held = measure(start, device).held
        trained = [p for p in runs[0].model.parameters() if p.requires_grad]
        weights = sum(p.numel() * p.element_size() for p in trained)
        state = sum(
            t.numel() * t.element_size()
            for found in runs[0].optimizer.state.values()
            for t in found.values()
            if isinstance(t, torch.Tensor)
        )
        rows[name] = {
            "trained": weights / 2**20,
            "optimizer state": state / 2**20,
            "else held": (held - weights - state - size) / 2**20,
            "peak of a step": measure(runs[0].step, device).peak / 2**20,
        }
    return rows


def table(title: str, rows: dict[str, dict[str, float]]) -> Table:
    view = Table(title=title, title_justify="left")
    view.add_column("")
    for heading in next(iter(rows.values())):
        view.add_column(heading, justify="right")
    for name, row in rows.items():
        view.add_row(name, *(f"{value:.2f}" for value in row.values()))
    return view


def plot(path: Path, panels: dict[str, dict[str, dict[str, float]]], caption: str) -> Path:
    """One panel of bars per table."""
    with figure(path, 1, len(panels), (5 * len(panels), 3.6), caption) as axes:
        for axis, (title, rows) in zip(axes.flat, panels.items(), strict=True):
            keys = list(next(iter(rows.values())))
            height = 0.8 / len(keys)
            for i, key in enumerate(keys):
                places = [k + i * height for k in range(len(rows))]
                axis.barh(places, [row[key] for row in rows.values()], height, label=key)
            axis.set_yticks([k + 0.4 - height / 2 for k in range(len(rows))], list(rows), fontsize=8)
            axis.invert_yaxis()
            axis.set_title(title, fontsize=9, loc="left")
            axis.legend(
                fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=len(keys)
            )
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables, leave a JSON file and a plot."""
    options = parse(arguments)
    console = new_console()
    panels = {
        f"{name}, in units of the points": optimizers(name, options.device) for name in options.workloads
    }
    if options.adapters:
        panels[f"MiniLM, rank {options.rank}, all linear layers, MiB"] = adapters(
            options.adapters, options.rank, options.device
        )
    for title, rows in panels.items():
        console.print(table(title, rows))
    return leave(console, "memory", options, panels, plot)


if __name__ == "__main__":
    sys.exit(main())
