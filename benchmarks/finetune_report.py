"""What `benchmarks.finetune` shows and leaves behind: a table, plain sentences, a JSON file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.environment import write_json
from benchmarks.finetune_statistics import Comparison, Difference, Summary
from benchmarks.finetune_training import Record

COLUMNS = (
    "learning\nrate",
    "trained\nparameters",
    "test accu-\nracy (%)",
    "test cross-\nentropy",
    "s/step",
    "optimizer\nshare",
    "residual",
)


def table(summaries: Sequence[Summary]) -> Table:
    """Fits into 80 columns."""
    view = Table(title="Fine-tuning", box=box.SIMPLE_HEAD, show_edge=False, padding=0, collapse_padding=True)
    view.caption = (
        "± is the standard error over the test sentences, the line below it the range over seeds.\n"
        "Residual: largest |Y^T Y - I| of the orthonormal factors."
    )
    view.caption_justify = "left"
    view.add_column("method", overflow="fold")
    for name in COLUMNS:
        view.add_column(name, justify="right", no_wrap=True)
    for row in summaries:
        view.add_row(*_cells(row))
    return view


def _cells(row: Summary) -> list[str]:
    accuracy = "-"
    if row.test_accuracy is not None and row.test_accuracy_standard_error is not None:
        accuracy = f"{100 * row.test_accuracy:.1f} ± {100 * row.test_accuracy_standard_error:.1f}"
    return [
        row.method,
        f"{row.learning_rate:g}",
        f"{row.trainable_parameters:,}",
        accuracy + _span([100 * a for a in row.test_accuracy_by_seed], ".1f"),
        _number(row.test_cross_entropy, ".4f") + _span(row.test_cross_entropy_by_seed, ".4f"),
        _number(row.seconds_per_step, ".3f"),
        _number(row.optimizer_share, ".1%"),
        _number(row.residual, ".0e"),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isinf(value) else format(value, form)


def _span(values: Sequence[float], form: str) -> str:
    """A second line from the lowest to the highest, if there is more than one value."""
    return f"\n{min(values):{form}}-{max(values):{form}}" if len(values) > 1 else ""


def sweep_table(records: Sequence[Record]) -> Table:
    """Every learning rate, averaged over the sweep's seeds; the chosen one in bold, - if diverged or interrupted."""
    rates = sorted({record.learning_rate for record in records})
    view = Table(title="Learning rates: validation cross-entropy")
    view.add_column("method")
    for rate in rates:
        view.add_column(f"{rate:g}", justify="right")
    for method in dict.fromkeys(record.method for record in records):
        losses = {
            rate: mean(r.validation_loss for r in records if (r.method, r.learning_rate) == (method, rate))
            for rate in rates
            if any((r.method, r.learning_rate) == (method, rate) for r in records)
        }
        best = min(losses, key=losses.__getitem__)
        view.add_row(method, *(_marked(losses.get(rate), rate == best) for rate in rates))
    return view


def _marked(loss: float | None, best: bool) -> str:
    text = _number(loss, ".4f")
    return f"[bold]{text}[/bold]" if best else text


def sentences(comparison: Comparison) -> list[str]:
    """What may be said about a method beside the baseline, and what may not."""
    lines = []
    accuracy, cross_entropy, ratio = comparison.accuracy, comparison.cross_entropy, comparison.step_ratio
    if accuracy is not None and cross_entropy is not None:
        seeds = len(accuracy.by_seed)
        lines.append(
            f"{comparison.method} against {comparison.baseline}, same test sentences,"
            f" {seeds} seed{'s' if seeds > 1 else ''} (95 % interval):"
        )
        lines.append(f"  accuracy {_verdict(accuracy, 100, '.1f', ' points')}")
        lines.append(f"  cross-entropy {_verdict(cross_entropy, 1, '.4f', '')}")
        if seeds == 1:
            lines.append("  One seed only: the spread over seeds was not measured; try --seeds 3.")
    if ratio is not None:
        lines.append(
            f"  step time {comparison.method} / {comparison.baseline}: {ratio.median:.3f}"
            f" (quartiles over blocks {ratio.lower_quartile:.3f} to {ratio.upper_quartile:.3f})"
        )
    return lines


def _verdict(difference: Difference, scale: float, form: str, unit: str) -> str:
    low, middle, high = (
        format(scale * v, f"+{form}") for v in (difference.low, difference.mean, difference.high)
    )
    noise = "within noise" if difference.within_noise else "beyond noise"
    return f"{middle}{unit} ({low} to {high}): {noise}"


def save_json(
    path: Path,
    *,
    settings: dict[str, Any],
    environment: dict[str, Any],
    complete: bool,
    summaries: Sequence[Summary],
    comparisons: Sequence[Comparison],
    sweep: Sequence[Record],
    runs: Sequence[Record],
) -> None:
    content = {
        "settings": settings,
        "environment": environment,
        "complete": complete,
        "summaries": [asdict(summary) for summary in summaries],
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "sweep": [_trace(record) for record in sweep],
        "runs": [_trace(record) | {"training_losses": _losses(record)} for record in runs],
    }
    write_json(path, content)


def _trace(record: Record) -> dict[str, Any]:
    return {
        "method": record.method,
        "seed": record.seed,
        "learning_rate": record.learning_rate,
        "steps": len(record.steps),
        "finished": record.finished,
        "validation": [
            {"step": step, "cross_entropy": loss, "accuracy": accuracy}
            for step, loss, accuracy in record.validation
        ],
    }


def _losses(record: Record) -> list[float]:
    return [round(step.loss, 5) for step in record.steps]
