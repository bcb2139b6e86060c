"""The benchmark commands other than `step`: each runs on something small and leaves what it promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import allocations, convergence, gap, scaling
from benchmarks.convergence_tasks import Regression


def left_by(folder: Path, name: str) -> Any:
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / f"{name}.json").read_text())
    assert report["environment"]["device"]
    return report[name]


def test_without_a_command_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main([]) == 0
    assert benchmarks.main(["no-such-command"]) == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in benchmarks.COMMANDS)


@pytest.mark.parametrize("command", benchmarks.COMMANDS)
def test_every_command_says_what_it_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        benchmarks.main([command, "--help"])
    assert left.value.code == 0
    assert "--help" in capsys.readouterr().out


def test_retraction(tmp_path: Path) -> None:
    options = ["--workloads", "tiny", "--rounds", "2", "--threads", "1", "--output", str(tmp_path)]
    assert benchmarks.main(["retraction", *options]) == 0
    rows = left_by(tmp_path, "retraction")["tiny"]
    assert rows["stiefelopt, polar"]["ms"] > 0
    assert max(row["residual"] for row in rows.values()) < 1e-5


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scaling.AXES, "n", ((8, 16), lambda n: (2, n, 4)))
    options = ["--axes", "n", "--rounds", "1", "--threads", "1", "--output", str(tmp_path)]
    assert benchmarks.main(["scaling", *options]) == 0
    points = left_by(tmp_path, "scaling")["n"]
    assert list(points) == ["8", "16"]
    assert points["16"]["bytes of the points"][""] == 2 * 16 * 4 * 4


def test_memory(tmp_path: Path) -> None:
    options = ["--workloads", "tiny", "--adapters", "--output", str(tmp_path)]
    assert benchmarks.main(["memory", *options]) == 0
    (rows,) = left_by(tmp_path, "memory").values()
    # The parameters, and two moments of each; ours keeps two workspaces beside them.
    assert rows["AdamW"]["held"] == pytest.approx(3, abs=0.1)
    assert rows["stiefelopt, polar"]["held"] == pytest.approx(5, abs=0.1)


def test_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gap, "PILOT", 5)
    options = ["--size", "0.03", "--seconds", "0.5", "--threads", "1", "--output", str(tmp_path)]
    assert benchmarks.main(["gap", *options]) == 0
    for rows in left_by(tmp_path, "gap").values():
        curve = rows["stiefelopt, polar"]["curve"]
        assert 0 <= curve[-1][1] < curve[0][1]


def test_allocations_are_counted() -> None:
    kept = []

    def run() -> None:
        kept.append(torch.empty(1000))
        torch.empty(5000)

    found = allocations.measure(run)
    assert found.held == pytest.approx(4000, abs=512)
    assert found.peak == pytest.approx(24000, abs=1024)


def test_convergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(convergence.TASKS, "regression", lambda steps: Regression(steps=48, rates=(1e-2,)))
    methods = ["lora", "riemannlora"]
    options = ["--tasks", "regression", "--methods", *methods, "--seeds", "1", "--threads", "1"]
    assert benchmarks.main(["convergence", *options, "--output", str(tmp_path)]) == 0
    assert (tmp_path / "convergence.png").exists()
    found = json.loads((tmp_path / "convergence.json").read_text())["tasks"]["regression"]["methods"]
    assert found["lora"]["share_of_steps"] == [1.0]
    for method in methods:
        assert found[method]["validation"][0][-1][0] == 48
        assert found[method]["halved"][0][-1][0] == 24
