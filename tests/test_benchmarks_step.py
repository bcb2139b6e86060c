"""The step benchmark: its reference is Algorithm 1 of StelLA, and the command leaves what it promises."""

import json
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.optim import AdamW

from benchmarks import step, step_contestants
from benchmarks.environment import environment
from benchmarks.stella_reference import StellaHooks, batched_polar
from benchmarks.step_contestants import BARE, OURS
from benchmarks.step_workloads import WORKLOADS, Problem, residual
from benchmarks.timing import Contestant, Timing, race


class DenseStella:
    """Algorithm 1 with AdamW, one matrix, float64, in numpy: as slow and as plain as it can be said."""

    def __init__(self, y: np.ndarray, lr: float, reference_dim: int) -> None:
        self.y, self.lr = y, lr
        self.scale = np.sqrt(reference_dim / y.shape[0])
        self.m, self.v, self.t = np.zeros_like(y), np.zeros_like(y), 0

    def step(self, g: np.ndarray) -> None:
        y = self.y
        self.t += 1
        g = g - y @ g.T @ y
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        d = self.scale * (-self.lr * m / (np.sqrt(v) + 1e-8))
        w = y.T @ d
        left, _, right = np.linalg.svd(y + d - y @ (w + w.T) / 2, full_matrices=False)
        self.y = left @ right


def test_the_reference_is_algorithm_1():
    generator = torch.Generator().manual_seed(3)
    shapes, lr, reference_dim = [(12, 3), (7, 3), (12, 3), (5, 5)], 0.05, 16
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    points = [Parameter(torch.linalg.qr(z)[0]) for z in draw]
    dense = [DenseStella(y.detach().numpy().copy(), lr, reference_dim) for y in points]
    optimizer = AdamW(points, lr=lr, weight_decay=0.0)
    StellaHooks(optimizer, points, reference_dim)

    for _ in range(20):
        for y, slow in zip(points, dense, strict=True):
            y.grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
            slow.step(y.grad.numpy())
        optimizer.step()

    assert residual(list(points)) < 1e-13
    for y, slow in zip(points, dense, strict=True):
        np.testing.assert_allclose(y.detach().numpy(), slow.y, atol=1e-9)


def test_a_parameter_without_a_gradient_stays():
    still, moving = (Parameter(torch.linalg.qr(torch.randn(6, 2))[0]) for _ in range(2))
    before = still.detach().clone()
    optimizer = AdamW([still, moving], lr=0.1, weight_decay=0.0)
    StellaHooks(optimizer, [still, moving])
    moving.grad = torch.randn(6, 2)
    optimizer.step()
    torch.testing.assert_close(still.detach(), before, atol=1e-6, rtol=0)


def test_an_svd_that_does_not_converge_is_done_again_in_float64(monkeypatch):
    svd, seen = torch.linalg.svd, []

    def fails_in_float32(z, **options):
        seen.append(z.dtype)
        if z.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]
        return svd(z, **options)

    monkeypatch.setattr(torch.linalg, "svd", fails_in_float32)
    y = batched_polar(torch.randn(2, 6, 3))
    assert seen == [torch.float32, torch.float64]
    assert y.dtype == torch.float32
    assert residual([y]) < 1e-6


def test_race_takes_turns_and_does_not_count_the_warm_up():
    calls: list[str] = []
    contestants = {name: Contestant(partial(calls.append, name)) for name in "ab"}
    timings = race(contestants, rounds=2, warmup=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert [len(timing.seconds) for timing in timings.values()] == [2, 2]


def test_race_times_the_slow_by_one_run_after_the_first():
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.02)

    timings = race(
        {"slow": Contestant(slow), "quick": Contestant(partial(calls.append, "quick"))},
        rounds=2,
        warmup=1,
        patience=0.01,
    )
    assert calls.count("slow") == 2
    assert timings["slow"].median >= 0.02
    assert [len(t.seconds) for t in timings.values()] == [1, 2]


def test_median_and_interquartile_range():
    timing = Timing([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (timing.median, timing.spread) == (3.0, 2.0)


def test_environment_says_where_and_with_what():
    facts = environment(torch.float64, packages=("torch", "no-such-package"))
    assert facts["dtype"] == "float64"
    assert facts["device"]
    assert facts["packages"]["no-such-package"] is None
    json.dumps(facts)


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """One run of the command on the smallest workload."""
    folder = tmp_path_factory.mktemp("step")
    arguments = ["--workloads", "tiny", "--rounds", "2", "--warmup", "1", "--threads", "1"]
    return step.main([*arguments, "--output", str(folder)]), folder


def test_the_command_leaves_json_and_plot(tried):
    code, folder = tried
    assert code == 0
    report = json.loads((folder / "step.json").read_text())
    assert report["environment"]["threads"] == 1
    row = report["workloads"]["tiny"]["contestants"][OURS]
    assert row["median_ms"] > 0
    assert len(row["all_ms"]) == 2
    assert (folder / "step.png").read_bytes().startswith(b"\x89PNG")


def test_every_contestant_with_geometry_stays_on_the_manifold(tried):
    rows = json.loads((tried[1] / "step.json").read_text())["workloads"]["tiny"]["contestants"]
    assert rows[BARE]["residual"] is None
    assert {name for name, row in rows.items() if (row["residual"] or 0) > 1e-5} == set()


def test_a_missing_peer_becomes_a_row_that_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "geoopt", None)
    arguments = ["--workloads", "tiny", "--rounds", "1", "--warmup", "0", "--threads", "1"]
    assert step.main([*arguments, "--contestants", "AdamW", "geoopt", "--output", str(tmp_path)]) == 0
    assert "geoopt is not installed: pip install" in capsys.readouterr().out
    missing = json.loads((tmp_path / "step.json").read_text())["workloads"]["tiny"]["missing"]
    assert "stiefelopt[bench]" in missing["geoopt"]


def test_contestants_share_gradients_but_not_points():
    problem = Problem.draw(WORKLOADS["tiny"])
    before = [x.clone() for x in problem.stacks], [g.clone() for g in problem.gradients]
    for name in step_contestants.default_contestants(WORKLOADS["tiny"]):
        contestant = step_contestants.builders()[name](problem, 1e-2).contestant
        contestant.prepare()
        contestant.run()
    for kept, now in zip(before[0] + before[1], problem.stacks + problem.gradients, strict=True):
        assert torch.equal(kept, now)
