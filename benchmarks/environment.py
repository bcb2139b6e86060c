"""Where and with what a measurement was made, and where its files go."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stiefelopt

CHECKOUT = Path(__file__).resolve().parent.parent


def cpu_model() -> str:
    """The processor's name; the architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device | str = "cpu") -> str:
    """The name of the machine part that computes on `device`."""
    where = torch.device(device)
    return torch.cuda.get_device_name(where) if where.type == "cuda" else cpu_model()


def commit() -> str:
    """The checkout's commit, "+dirty" when files differ from it, "unknown" outside a repository."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+dirty" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def version(package: str) -> str | None:
    """The installed version of a pip package, None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", packages: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What a reader needs to judge or repeat a measurement, as plain strings and numbers.

    Args:
        dtype: what the measured tensors are made of.
        device: where they are.
        packages: pip names whose versions matter too (peers); None marks one that is not installed.
    """
    return {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "stiefelopt": stiefelopt.__version__,
        "packages": {package: version(package) for package in packages},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def results_dir(path: str | Path | None = None) -> Path:
    """The folder for results, made if need be: `path`, or `results/` in the checkout."""
    folder = CHECKOUT / "results" if path is None else Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(path: Path, data: Mapping[str, Any]) -> Path:
    """Write `data` readably; a reader never sees half a file, also when the run is interrupted."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return path
