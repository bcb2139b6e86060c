"""What one workload's race gave, and the judgements that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.step_contestants import BARE, OURS
from benchmarks.step_floor import TRANSFERS
from benchmarks.step_workloads import Workload
from benchmarks.timing import Timing


@dataclass(frozen=True)
class StepResult:
    """Times of one workload.

    Args:
        workload: what was moved.
        timings: contestant to its runs.
        residuals: contestant to max |x^T x - I| after the race, None for one without geometry.
        missing: contestant to why it did not race.
        products: the floor's six tall products.
        copy: one copy of all points.
    """

    workload: Workload
    timings: dict[str, Timing]
    residuals: dict[str, float | None]
    missing: dict[str, str]
    products: Timing
    copy: Timing

    def relative_to(self, name: str, unit: str) -> float | None:
        """Median of `name` over median of `unit`, None unless both raced."""
        if name not in self.timings or unit not in self.timings:
            return None
        return self.timings[name].median / self.timings[unit].median

    def goal_met(self, peer: str) -> bool | None:
        """Whether our step is as fast beside `peer` as we want, None where there is nothing to judge."""
        ratio, goal = self.relative_to(OURS, peer), self.workload.goals.get(peer)
        return None if ratio is None or goal is None else ratio <= goal

    @property
    def bandwidth(self) -> float:
        """Measured bytes per second of a copy (float32 read and written)."""
        return 2 * 4 * self.workload.numel / self.copy.median

    @property
    def transfer_seconds(self) -> float:
        """Time to move the geometry's bytes at the measured bandwidth."""
        return TRANSFERS * 4 * self.workload.numel / self.bandwidth

    @property
    def geometry_seconds(self) -> float | None:
        """What our step takes beyond bare AdamW."""
        if OURS not in self.timings or BARE not in self.timings:
            return None
        return self.timings[OURS].median - self.timings[BARE].median

    def of_floor(self, name: str) -> float | None:
        """What a contestant takes beyond bare AdamW, in units of the six tall products."""
        if name == BARE or name not in self.timings or BARE not in self.timings:
            return None
        return (self.timings[name].median - self.timings[BARE].median) / self.products.median

    @property
    def floor_goal_met(self) -> bool | None:
        """Whether our geometry is as near to its products as we want, None where there is nothing to judge."""
        ratio, goal = self.of_floor(OURS), self.workload.floor_goal
        return None if ratio is None or goal is None else ratio <= goal

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, times in milliseconds."""
        return {
            "title": self.workload.title,
            "shapes": [list(shape) for shape in self.workload.shapes],
            "contestants": {name: self._row(name) for name in self.timings},
            "missing": self.missing,
            "floor": {
                "products_ms": self.products.median * 1e3,
                "copy_gb_per_s": self.bandwidth / 1e9,
                "transfers_ms": self.transfer_seconds * 1e3,
                "geometry_ms": None if self.geometry_seconds is None else self.geometry_seconds * 1e3,
                "goal": self.workload.floor_goal,
                "goal_met": self.floor_goal_met,
            },
        }

    def _row(self, name: str) -> dict[str, Any]:
        timing = self.timings[name]
        return {
            "median_ms": timing.median * 1e3,
            "spread_ms": timing.spread * 1e3,
            "relative_to_adamw": self.relative_to(name, BARE),
            "ours_relative_to_it": self.relative_to(OURS, name),
            "beyond_adamw_of_floor": self.of_floor(name),
            "goal": self.workload.goals.get(name),
            "goal_met": self.goal_met(name),
            "residual": self.residuals[name],
            "all_ms": [seconds * 1e3 for seconds in timing.seconds],
        }
