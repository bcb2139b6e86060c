"""Which runs are made: a sweep of learning rates if asked for, then the measured seeds, with a bar per method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import nn

from benchmarks.finetune_methods import METHODS
from benchmarks.finetune_training import Plan, Record, Run, train_in_turn
from benchmarks.text_data import TextData

SWEEP_SEED = 1000  # learning rates are chosen on other seeds than those that are reported


class Session:
    """Trains methods on what they share, shows a bar for each, and keeps a record of every run."""

    def __init__(
        self,
        encoder: nn.Module,
        data: TextData,
        plan: Plan,
        progress: Progress,
        keep: Callable[[Session], object],
    ) -> None:
        self.encoder, self.data, self.plan, self.progress = encoder, data, plan, progress
        self.keep = keep  # called whenever a seed has been trained
        self.records: list[Record] = []
        self.sweep: list[Record] = []

    def run(self, names: Sequence[str], rates: Sequence[float], seeds: int) -> None:
        """No rate: each method's own tuned one. One: that for all. Several: a sweep first."""
        if len(rates) > 1:
            chosen = self.choose(names, rates, seeds)
        else:
            chosen = {name: rates[0] if rates else METHODS[name].learning_rate for name in names}
        self.measure(chosen, seeds)

    def measure(self, rates: Mapping[str, float], seeds: int) -> None:
        """Train every method at its learning rate on every seed, then look at the test part once."""
        bars = self._bars(rates, seeds)
        for seed in range(seeds):
            for run in self._train(rates, seed, self.records, bars):
                run.finish()
            self.keep(self)

    def choose(self, names: Sequence[str], rates: Sequence[float], seeds: int) -> dict[str, float]:
        """Each method's learning rate with the lowest validation cross-entropy, averaged over seeds."""
        bars = self._bars(names, seeds * len(rates), note=" sweep")
        for rate in rates:
            for seed in range(SWEEP_SEED, SWEEP_SEED + seeds):
                self._train(dict.fromkeys(names, rate), seed, self.sweep, bars)
                self.keep(self)

        def loss(name: str, rate: float) -> float:
            return mean(r.validation_loss for r in self.sweep if (r.method, r.learning_rate) == (name, rate))

        return {name: min(rates, key=lambda rate: loss(name, rate)) for name in names}

    def _train(
        self, rates: Mapping[str, float], seed: int, records: list[Record], bars: Mapping[str, TaskID]
    ) -> list[Run]:
        runs = [
            Run(name, METHODS[name], self.encoder, self.data, self.plan, seed, rate)
            for name, rate in rates.items()
        ]
        records.extend(run.record for run in runs)  # before training: an interrupted run is kept too
        train_in_turn(runs, lambda run: self._show(run, bars[run.record.method]))
        return runs

    def _bars(
        self, names: Sequence[str] | Mapping[str, float], runs: int, note: str = ""
    ) -> dict[str, TaskID]:
        total = runs * self.plan.steps
        return {name: self.progress.add_task(name + note, total=total, loss="", speed="") for name in names}

    def _show(self, run: Run, bar: TaskID) -> None:
        recent = run.record.steps[-20:]
        loss = mean(step.loss for step in recent)
        speed = 1 / mean(step.seconds for step in recent)
        self.progress.update(bar, advance=1, loss=f"loss {loss:.3f}", speed=f"{speed:.1f} steps/s")


def progress_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        refresh_per_second=4,  # the display shares the processor with what is measured
    )
