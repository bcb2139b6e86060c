"""What the runs of a method add up to, and whether two methods differ by more than noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median, quantiles

import torch
from torch import Tensor

from benchmarks.finetune_training import BLOCK, Record


@dataclass(frozen=True)
class Summary:
    """One row of the table. Test figures are None until a seed has been finished."""

    method: str
    learning_rate: float
    trainable_parameters: int
    seeds: list[int]
    test_accuracy: float | None
    test_accuracy_standard_error: float | None
    test_accuracy_by_seed: list[float]
    test_cross_entropy: float | None
    test_cross_entropy_by_seed: list[float]
    seconds_per_step: float | None
    optimizer_share: float | None
    residual: float | None


@dataclass(frozen=True)
class Difference:
    """Method minus baseline on the same test sentences, and the 95 % interval of its mean.

    The interval is for other test sentences; that other seeds might differ is covered by asking all seeds to agree.
    """

    mean: float
    low: float
    high: float
    by_seed: list[float]

    @property
    def within_noise(self) -> bool:
        """True unless the interval leaves out zero and every seed points the same way."""
        one_sided = all(d > 0 for d in self.by_seed) or all(d < 0 for d in self.by_seed)
        return self.low <= 0 <= self.high or not one_sided


@dataclass(frozen=True)
class StepRatio:
    """Step time of a method over that of the baseline: median and quartiles over pairs of neighbouring blocks."""

    median: float
    lower_quartile: float
    upper_quartile: float


@dataclass(frozen=True)
class Comparison:
    method: str
    baseline: str
    accuracy: Difference | None
    cross_entropy: Difference | None
    step_ratio: StepRatio | None


def summarize(records: Sequence[Record]) -> Summary:
    """All seeds of one method. The standard error is that of the test sentences: seeds are averaged first."""
    tests = [record.test for record in records if record.test is not None]
    steps = [step for record in records for step in record.steps]
    residuals = [record.residual for record in records if record.residual is not None]
    return Summary(
        method=records[0].method,
        learning_rate=records[0].learning_rate,
        trainable_parameters=records[0].trainable,
        seeds=[record.seed for record in records if record.test is not None],
        test_accuracy=mean(t.accuracy for t in tests) if tests else None,
        test_accuracy_standard_error=_standard_error([t.correct for t in tests]) if tests else None,
        test_accuracy_by_seed=[t.accuracy for t in tests],
        test_cross_entropy=mean(t.cross_entropy for t in tests) if tests else None,
        test_cross_entropy_by_seed=[t.cross_entropy for t in tests],
        seconds_per_step=median(step.seconds for step in steps) if steps else None,
        optimizer_share=median(step.optimizer_seconds / step.seconds for step in steps) if steps else None,
        residual=max(residuals, default=None),
    )


def compare(records: Sequence[Record], baseline: Sequence[Record]) -> Comparison:
    """Pairs the runs by seed and the sentences one by one, which removes what both methods find hard alike."""
    pairs = [(a, b) for a in records for b in baseline if a.seed == b.seed]
    tests = [(a.test, b.test) for a, b in pairs if a.test is not None and b.test is not None]
    return Comparison(
        method=records[0].method,
        baseline=baseline[0].method,
        accuracy=_difference([a.correct - b.correct for a, b in tests]),
        cross_entropy=_difference([a.losses - b.losses for a, b in tests]),
        step_ratio=_step_ratio(pairs),
    )


def _standard_error(by_seed: Sequence[Tensor]) -> float:
    per_sentence = torch.stack(list(by_seed)).double().mean(dim=0)
    return (per_sentence.std() / len(per_sentence) ** 0.5).item()


def _difference(by_seed: Sequence[Tensor]) -> Difference | None:
    if not by_seed:
        return None
    centre = torch.stack(list(by_seed)).double().mean().item()
    margin = 1.96 * _standard_error(by_seed)
    return Difference(centre, centre - margin, centre + margin, [d.mean().item() for d in by_seed])


def _step_ratio(pairs: Iterable[tuple[Record, Record]]) -> StepRatio | None:
    ratios = [
        a / b
        for record, other in pairs
        for a, b in zip(_block_medians(record), _block_medians(other), strict=False)
    ]
    if len(ratios) < 2:
        return None
    lower, middle, upper = quantiles(ratios, n=4)
    return StepRatio(middle, lower, upper)


def _block_medians(record: Record) -> list[float]:
    times = [step.seconds for step in record.steps]
    return [median(times[i : i + BLOCK]) for i in range(0, len(times) - BLOCK + 1, BLOCK)]
