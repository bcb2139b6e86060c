"""Race several contestants in turn within one process.

Two programs timed one after the other on a shared machine differ by its other tenants as much as by their
work. Here every round runs every contestant once, in a rotating order, so a slow minute slows them all and the
medians stay comparable.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Contestant:
    """One thing to time: `run` is timed, `prepare` is called before it and is not."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass
class Timing:
    """Seconds per run of one contestant, in the order they were measured."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle run, in seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third, in seconds."""
        if len(self.seconds) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    @property
    def spread(self) -> float:
        """The interquartile range, in seconds; 0 with fewer than two runs."""
        first, third = self.quartiles
        return third - first


def synchronize(device: torch.device) -> None:
    """Wait for everything queued on `device`; a CPU queues nothing."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_once(contestant: Contestant, device: torch.device) -> float:
    """Seconds of one run, from an idle device to an idle device."""
    contestant.prepare()
    synchronize(device)
    start = time.perf_counter()
    contestant.run()
    synchronize(device)
    return time.perf_counter() - start


def race(
    contestants: Mapping[str, Contestant],
    *,
    rounds: int = 20,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    patience: float = math.inf,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Timing]:
    """Time every contestant once per round, in an order that rotates from round to round.

    Args:
        contestants: name to contestant; the result keeps this order.
        rounds: timed runs of each.
        warmup: untimed rounds before them (allocator, thread pools, lazily made optimizer state).
        device: where the contestants work; it is synchronized around every run.
        patience: seconds; a contestant whose first run takes longer is timed by one more alone.
        progress: told (rounds done, rounds in all) after each round.
    """
    where = torch.device(device)
    names = list(contestants)
    timings = {name: Timing() for name in names}
    slow: set[str] = set()
    total = warmup + rounds
    for done in range(total):
        # Collect between rounds, so that no contestant pays for another's garbage inside its run.
        gc.collect()
        for place in range(len(names)):
            name = names[(place + done) % len(names)]
            if name in slow:
                continue
            seconds = time_once(contestants[name], where)
            if done == 0 and seconds > patience:
                slow.add(name)
                seconds = time_once(contestants[name], where)  # the first one made lasting state
            if done >= warmup or name in slow:
                timings[name].seconds.append(seconds)
        progress(done + 1, total)
    return timings
