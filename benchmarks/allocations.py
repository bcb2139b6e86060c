"""How many bytes a piece of code holds and needs at its peak, from the allocator's own records."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Bytes:
    """Beyond what was allocated before.

    Attributes:
        peak: the most at any moment.
        held: what is left at the end.
    """

    peak: int
    held: int


def measure(run: Callable[[], object], device: torch.device | str = "cpu") -> Bytes:
    """Bytes of tensors that `run` allocates on the device; what it returns is freed."""
    where = torch.device(device)
    gc.collect()
    return _on_cuda(run, where) if where.type == "cuda" else _on_cpu(run)


def _on_cuda(run: Callable[[], object], device: torch.device) -> Bytes:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    gc.collect()
    torch.cuda.synchronize(device)
    return Bytes(
        torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    )


def _on_cpu(run: Callable[[], object]) -> Bytes:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        run()
        gc.collect()
    events = [e for e in records.profiler.kineto_results.events() if e.name() == "[memory]"]
    levels = list(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    return Bytes(max([0, *levels]), levels[-1] if levels else 0)
