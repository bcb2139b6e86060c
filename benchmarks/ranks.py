"""How the sharded step's communication grows with the number of ranks: `python -m benchmarks ranks`.

Counted: the bytes that one step hands to all-reduces for the adapters of LLaMA3-8B. Measured: the step and an
all-reduce of that size on a few gloo processes. Computed: the same all-reduces on up to thousands of ranks, by the
alpha-beta model, beside what gathering the tall factors would take.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import AdamW

from benchmarks.communication import Collectives, fork_ranks
from benchmarks.environment import CHECKOUT, cpu_model
from stiefelopt import FixedRank, RiemannianWrapper, Stiefel

# (in, out) of the linear layers of one of LLaMA3-8B's 32 blocks: q, k, v, o, gate, up, down.
LAYERS = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096))
BLOCKS = 32
RANKS = (16, 32)  # of the adapters
SHRINK = 32  # heights are divided by this where only bytes count: what is sent does not depend on them
WARM_UP = 2


@dataclass(frozen=True)
class Network:
    """Seconds to begin a message, and bytes a second that a rank can send."""

    latency: float
    bandwidth: float

    def ring(self, payload: float, ranks: int) -> float:
        """Seconds of an all-reduce around a ring: 2 (N - 1) messages of 1 / N of the payload."""
        return 2 * (ranks - 1) * (self.latency + payload / ranks / self.bandwidth)

    def tree(self, payload: float, ranks: int) -> float:
        """Seconds of an all-reduce up and down a pipelined binary tree: 2 log2 N latencies, twice the payload."""
        return 2 * (ranks - 1).bit_length() * self.latency + 2 * payload / self.bandwidth * (ranks > 1)

    def gather(self, payload: float, ranks: int) -> float:
        """Seconds until every rank has all of a payload of which each had 1 / N: N - 1 messages, or log2 N."""
        steps = (ranks - 1).bit_length()
        return steps * self.latency + (ranks - 1) / ranks * payload / self.bandwidth


def layers(shrink: int = 1) -> list[tuple[int, int]]:
    return [(n // shrink, m // shrink) for n, m in LAYERS] * BLOCKS


def tall_bytes(r: int) -> int:
    """Of all factors U and V in float32."""
    return 4 * r * sum(n + m for n, m in layers())


def stella(r: int, shrink: int) -> tuple[Any, list[Tensor]]:
    manifold = Stiefel()
    return manifold, [manifold.random_point(size, r) for pair in layers(shrink) for size in pair]


def riemann_lora(r: int, shrink: int) -> tuple[Any, list[Tensor]]:
    manifold = FixedRank()
    return manifold, [t for n, m in layers(shrink) for t in manifold.random_point(m, n, rank=r)]


METHODS: dict[str, Callable[[int, int], tuple[Any, list[Tensor]]]] = {
    "StelLA": stella,
    "RiemannLoRA": riemann_lora,
}


def sharded_step(method: str, r: int, shrink: int) -> RiemannianWrapper:
    """An optimizer over the adapters' factors, cut along their rows over all ranks, with gradients that stay."""
    manifold, values = METHODS[method](r, shrink)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [nn.Parameter(distribute_tensor(v, mesh, [Shard(0)], src_data_rank=None)) for v in values]
    for p, v in zip(params, values, strict=True):
        p.grad = distribute_tensor(1e-2 * torch.randn_like(v), mesh, [Shard(0)], src_data_rank=None)
    group = {"params": params, "manifold": manifold, "weight_decay": 0.0}
    # Not foreach: its first step over hundreds of DTensors takes torch 2.13 a minute.
    return RiemannianWrapper(AdamW([group], lr=1e-4, foreach=False))


def begin(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)


def count(folder: Path, rank: int) -> None:
    """Write what one step sends: bytes and calls by method and r."""
    begin(rank, 1, folder)
    found = []
    for method in METHODS:
        for r in RANKS:
            optimizer = sharded_step(method, r, SHRINK)
            optimizer.step()
            optimizer.step()
            with Collectives() as seen:
                optimizer.step()
            found.append({"method": method, "r": r, "bytes": seen.bytes, "calls": len(seen.calls)})
    (folder / "count.json").write_text(json.dumps(found))


def measure(size: int, payload: int, folder: Path, rank: int) -> None:
    """Write the seconds of a step and of all-reduces."""
    begin(rank, size, folder)
    optimizer = sharded_step("StelLA", 16, 8)
    big, small = torch.zeros(payload // 4), torch.zeros(1)
    work: dict[str, Callable[[], object]] = {
        "all-reduce": lambda: dist.all_reduce(big),
        "latency": lambda: dist.all_reduce(small),
        "step": optimizer.step,
    }
    rounds = {"all-reduce": 150, "latency": 150, "step": 4}
    seconds = {name: _seconds(run, rounds[name]) for name, run in work.items()}
    if rank == 0:
        (folder / "measured.json").write_text(json.dumps({"ranks": size, **seconds}))
    dist.barrier()


def _seconds(run: Callable[[], object], rounds: int) -> float:
    """The first quartile, since others use the machine too, of the slowest rank."""
    found = []
    for _ in range(WARM_UP + rounds):
        dist.barrier()
        begun = time.perf_counter()
        run()
        found.append(time.perf_counter() - begun)
    slowest = torch.tensor(statistics.quantiles(found[WARM_UP:], n=4)[0], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def in_new_folder(size: int, work: Callable[[Path, int], None], result: str) -> Any:
    with tempfile.TemporaryDirectory() as name:
        fork_ranks(size, partial(work, Path(name)))
        return json.loads((Path(name) / result).read_text())


def fitted(measured: Sequence[dict[str, float]], payload: int) -> Network:
    """Latency and bandwidth of this machine from the all-reduces of two ranks."""
    two = next(m for m in measured if m["ranks"] == 2)
    return Network(two["latency"] / 2, payload / max(two["all-reduce"] - two["latency"], 1e-6))


def plot(
    path: Path, measured: Sequence[dict[str, float]], local: Network, wire: Network, payload: int
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    several = [m for m in measured if m["ranks"] > 1]
    x = [m["ranks"] for m in several]
    left.plot(x, [1e3 * m["all-reduce"] for m in several], "o", color="#0072B2", label="measured, gloo")
    left.plot(
        x,
        [1e3 * local.ring(payload, int(n)) for n in x],
        "-",
        color="#D55E00",
        label="ring model, fitted at 2",
    )
    left.set(
        xlabel="processes on one machine", ylabel="all-reduce of one phase, ms", xticks=x, ylim=(0, None)
    )
    many = [2**k for k in range(1, 13)]
    for label, cost, colour in (
        ("Grams, ring", lambda n: 3 * wire.ring(payload, n), "#D55E00"),
        ("Grams, tree", lambda n: 3 * wire.tree(payload, n), "#0072B2"),
        ("gathering the tall factors, at best", lambda n: wire.gather(tall_bytes(16), n), "#999999"),
    ):
        right.loglog(many, [1e3 * cost(n) for n in many], color=colour, label=label)
    right.set(xlabel="ranks", ylabel="communication of a step, ms")
    right.set_title(f"computed: {1e6 * wire.latency:g} us, {wire.bandwidth / 1e9:g} GB/s", fontsize=9)
    left.set_title(f"measured: {payload / 1e6:.2f} MB", fontsize=9)
    for axes in (left, right):
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def report(counted: Sequence[dict[str, Any]], measured: Sequence[dict[str, float]], wire: Network) -> None:
    print("| adapters | r | factors | a step sends | all-reduces |\n|---|---|---|---|---|")
    for c in counted:
        sizes = f"{tall_bytes(c['r']) / 1e6:,.0f} MB | {c['bytes'] / 1e6:.2f} MB"
        print(f"| {c['method']} | {c['r']} | {sizes} | {c['calls']} |")
    print(f"\n{cpu_model()}, {os.cpu_count()} cores, gloo; StelLA, r = 16, heights / 8, milliseconds:")
    print("| processes | step | all-reduce of one phase | of one number |\n|---|---|---|---|")
    for m in measured:
        times = [m[name] for name in ("step", "all-reduce", "latency")]
        print(f"| {m['ranks']} | " + " | ".join(f"{1e3 * t:.2f}" for t in times) + " |")
    payload = counted[0]["bytes"] / 3
    print(
        f"\ncomputed for r = 16: {1e6 * wire.latency:g} us, {wire.bandwidth / 1e9:g} GB/s, milliseconds a step:"
    )
    print("| ranks | ring | tree | gathering the tall factors |\n|---|---|---|---|")
    for n in (8, 64, 512, 4096):
        times = [3 * wire.ring(payload, n), 3 * wire.tree(payload, n), wire.gather(tall_bytes(16), n)]
        print(f"| {n} | " + " | ".join(f"{1e3 * t:.2f}" for t in times) + " |")


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, measure, compute, and draw."""
    p = argparse.ArgumentParser(prog="python -m benchmarks ranks", description=__doc__.partition("\n")[0])
    p.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2, 3, 4], help="measured (default: 1 2 3 4)"
    )
    p.add_argument(
        "--latency", type=float, default=10e-6, help="of the network computed for, s (default: 1e-5)"
    )
    p.add_argument("--bandwidth", type=float, default=25e9, help="of a rank there, bytes/s (default: 2.5e10)")
    p.add_argument("--plot", type=Path, default=CHECKOUT / "docs" / "distributed.png")
    args = p.parse_args(arguments)
    wire = Network(args.latency, args.bandwidth)
    counted = in_new_folder(1, count, "count.json")
    payload = counted[0]["bytes"] // 3
    measured = [in_new_folder(n, partial(measure, n, payload), "measured.json") for n in args.processes]
    report(counted, measured, wire)
    plot(args.plot, measured, fitted(measured, payload), wire, payload)
    print(f"\nSaved {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
