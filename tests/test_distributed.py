"""Sharded and data-parallel steps on gloo processes of one core each; the cases are in distributed_cases.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIZES = (2, 3, 1)
LIMIT = 400  # seconds; a group that is out of step gives up after 40 by itself


def run_cases(folder: Path, *cases: str) -> str:
    """In one process that forks the ranks, of two, three and one; returns what it printed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed_cases", str(folder), *cases]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    return done.stdout + done.stderr


def failures(folder: Path, size: int) -> list[str]:
    """What went wrong, a case and a rank each."""
    found = []
    names: set[str] = set()
    for rank in range(size):
        results = folder / f"{rank}.json"
        said = json.loads(results.read_text()) if results.exists() else {}
        found += [f"{case} on rank {rank} of {size}: {text[-2500:]}" for case, text in said.items() if text]
        names |= set(said)
        if not said or set(said) != names:
            found.append(f"rank {rank} of {size} ran {len(said)} cases")
    return found


def test_all_ranks_pass_every_case(tmp_path: Path) -> None:
    """On two ranks, on three, and a checkpoint of two that goes on with three and with one."""
    printed = run_cases(tmp_path)
    failed = [failure for size in SIZES for failure in failures(tmp_path / str(size), size)]
    assert not failed, "\n\n".join([*failed, printed[-3000:]])
    assert len(json.loads((tmp_path / "2" / "0.json").read_text())) > 25


def test_a_case_that_fails_or_hangs_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.json").write_text(json.dumps({"good": "", "bad": ""}))
    (tmp_path / "1.json").write_text(json.dumps({"good": "", "bad": "hung"}))
    assert failures(tmp_path, 2) == ["bad on rank 1 of 2: hung"]
    assert failures(tmp_path, 3)[1:] == ["rank 2 of 3 ran 0 cases"]
