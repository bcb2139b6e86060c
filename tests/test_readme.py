"""README.md says what runs: its blocks, one after the other, by a Python that knows nothing of the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stiefelopt

PAGE = Path(__file__).parent.parent / "README.md"


def test_every_block_runs(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    (tmp_path / "blocks.py").write_text("\n".join(blocks))
    path = os.pathsep.join(
        filter(None, (str(Path(stiefelopt.__file__).parent.parent), os.environ.get("PYTHONPATH")))
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "blocks.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "adapter" / "adapter_model.safetensors").exists()
    residuals = re.findall(r"\{.*?: ([0-9.e-]+)\}", done.stdout)
    assert residuals, done.stdout
    assert all(float(r) < 1e-6 for r in residuals)
