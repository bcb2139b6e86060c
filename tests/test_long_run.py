"""Long runs: residual and memory stay flat, and a killed process resumes from its last checkpoint bitwise."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, lr_scheduler

from stiefelopt import RiemannianWrapper, Stiefel

MIB = 2**20
ROOT = Path(__file__).resolve().parent.parent


def points(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(sum(shape))
    tall = Stiefel().random_point(count, *sorted(shape, reverse=True), dtype=dtype, generator=generator)
    return [nn.Parameter((x if shape[0] >= shape[1] else x.mT).contiguous()) for x in tall]


# Residual and memory


@pytest.fixture
def earlier_tests_set_aside() -> Iterator[None]:
    """What they left, and may go at any time, is not counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def resident_bytes() -> int:
    """Of this process now, not at its peak; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


class Training:
    """200 layers that are drawn to noisy targets under a schedule which never lets them rest."""

    def __init__(self) -> None:
        self.points = points(100, 16, 4) + points(100, 24, 8)
        generator = torch.Generator().manual_seed(1)
        self.targets = [
            [torch.randn(p.shape, generator=generator) for p in self.points] for _ in range(7)
        ]  # a number of which no schedule's period is a multiple
        inner = AdamW([{"params": self.points, "manifold": Stiefel()}], lr=1e-2, fused=True)
        self.wrapper = RiemannianWrapper(inner)
        self.scheduler = lr_scheduler.CosineAnnealingWarmRestarts(self.wrapper, 50)
        self.steps = 0

    def run(self, steps: int) -> Iterator[float]:
        """The worst residual after every tenth step."""
        for _ in range(steps):
            targets = self.targets[self.steps % len(self.targets)]
            for p, target in zip(self.points, targets, strict=True):
                p.grad = p.detach() - target
            self.wrapper.step()
            self.wrapper.zero_grad()
            self.scheduler.step()
            self.steps += 1
            if self.steps % 10 == 0:
                yield max(self.wrapper.residuals().values())


@pytest.mark.usefixtures("earlier_tests_set_aside")
@pytest.mark.parametrize(
    "steps", [500, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_residual_and_memory_stay_flat(steps: int) -> None:
    training = Training()
    warm_up = list(training.run(100))
    start = [p.detach().clone() for p in training.points]
    tensors, resident = live_tensors(), resident_bytes()
    residuals = list(training.run(steps - 100))
    assert live_tensors() == tensors
    # Half a KiB a step would show in the long run, 20 KiB in the short one.
    assert resident_bytes() - resident < 8 * MIB
    quarter = len(residuals) // 4
    early, late = residuals[:quarter], residuals[-quarter:]
    assert max(late) < 2 * max(early)
    assert sum(late) < 1.2 * sum(early)
    assert max(warm_up) < 2 * max(residuals) < 5e-6
    assert min((p - x).abs().max().item() for p, x in zip(training.points, start, strict=True)) > 0.05


@pytest.mark.usefixtures("earlier_tests_set_aside")
def test_the_count_of_tensors_sees_one_that_is_kept() -> None:
    """The check behind the flat memory can fail."""
    before = live_tensors()
    kept = [torch.ones(1)]
    assert live_tensors() == before + len(kept)


# A killed process


class Job:
    """Tall, wide and half-precision points and a Euclidean matrix, a schedule, and a checkpoint every five steps."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "checkpoint.pt"
        self.params = [*points(2, 12, 3), *points(2, 4, 9), *points(2, 8, 8), *points(2, 16, 4)]
        self.params += points(2, 10, 2, dtype=torch.bfloat16)
        free = nn.Parameter(torch.ones(5, 5))
        groups: list[dict[str, Any]] = [
            {"params": self.params, "manifold": Stiefel(transport="projection")},
            {"params": [free]},
        ]
        self.params = [*self.params, free]
        self.wrapper = RiemannianWrapper(AdamW(groups, lr=3e-2))
        self.scheduler = lr_scheduler.OneCycleLR(self.wrapper, 3e-2, total_steps=1_000_000)
        self.generator = torch.Generator().manual_seed(5)
        self.done = 0

    def step(self) -> None:
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=self.generator).to(p.dtype)
        self.wrapper.step()
        self.scheduler.step()
        self.done += 1
        if self.done % 5 == 0:
            self.save()

    def save(self) -> None:
        state: dict[str, Any] = {
            "done": self.done,
            "params": [p.detach() for p in self.params],
            "optimizer": self.wrapper.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
        }
        torch.save(state, self.file.with_suffix(".new"))
        os.replace(self.file.with_suffix(".new"), self.file)

    def resume(self) -> None:
        state = torch.load(self.file, weights_only=True)
        with torch.no_grad():
            for p, saved in zip(self.params, state["params"], strict=True):
                p.copy_(saved)
        self.wrapper.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        self.done = state["done"]


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_process_resumes_from_its_last_checkpoint_bitwise(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert child.stdout is not None
        assert any(int(line) >= 23 for line in child.stdout), "the process ended before it could be killed"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    resumed, whole = Job(tmp_path), Job(tmp_path / "nowhere")
    resumed.resume()
    assert resumed.done >= 20
    assert resumed.done % 5 == 0
    last = resumed.done + 13
    for job in (resumed, whole):
        job.save = lambda: None  # type: ignore[method-assign]
        while job.done < last:
            job.step()
    for p, q in zip(resumed.params, whole.params, strict=True):
        assert torch.equal(p, q)
        for name, t in whole.wrapper.state[q].items():
            assert torch.equal(resumed.wrapper.state[p][name], t)
    assert resumed.scheduler.state_dict() == whole.scheduler.state_dict()


def main(folder: str) -> None:
    """What is killed: trains until it is."""
    torch.set_num_threads(1)
    job = Job(Path(folder))
    while True:
        job.step()
        print(job.done, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
