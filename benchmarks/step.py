"""Race one optimizer step against its peers: `python -m benchmarks.step --help`.

Every contestant starts from the same orthonormal points and steps with the same Gaussian gradients, float32.
They take turns within one process, so that the machine's other tenants slow all of them alike. On a machine that
others use at the same time set OMP_WAIT_POLICY=passive: threads that spin while they wait for one that does not
run made everything ten to thirty times slower here. Compare only runs of one policy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.environment import environment, results_dir, write_json
from benchmarks.step_contestants import builders, default_contestants
from benchmarks.step_entry import Entry, MissingPeerError
from benchmarks.step_floor import one_copy, six_products
from benchmarks.step_report import plot, table
from benchmarks.step_result import StepResult
from benchmarks.step_workloads import MEASURED, WORKLOADS, Problem, Workload
from benchmarks.timing import race

PEER_PACKAGES = ("geoopt", "pogo-torch", "geotorch")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=str(__doc__).splitlines()[0]
    )
    known = list(builders())
    choice, racers = ", ".join(WORKLOADS), "; ".join(known)
    add = parser.add_argument
    add(
        "--workloads",
        nargs="+",
        choices=WORKLOADS,
        default=list(MEASURED),
        metavar="NAME",
        help=f"of {choice}",
    )
    add(
        "--contestants",
        nargs="+",
        choices=known,
        metavar="NAME",
        help=f"of {racers} (default: all that suit)",
    )
    add("--rounds", type=int, default=15, help="timed steps of each contestant")
    add("--warmup", type=int, default=3, help="untimed steps before them")
    add(
        "--patience",
        type=float,
        default=8.0,
        metavar="SECONDS",
        help="who takes longer for the first step makes one more",
    )
    add("--threads", type=int, default=2)
    add("--device", default="cpu")
    add("--lr", type=float, default=1e-3, help="AdamW's: the size of a step in each coordinate")
    add("--seed", type=int, default=0)
    add("--output", metavar="DIR", help="folder of step.json and step.png (default: results/)")
    return parser.parse_args(arguments)


def enlist(names: Sequence[str], problem: Problem, lr: float) -> tuple[dict[str, Entry], dict[str, str]]:
    """Build the contestants; those whose package is missing come back with the reason."""
    known, entries, missing = builders(), {}, {}
    for name in names:
        try:
            entries[name] = known[name](problem, lr)
        except MissingPeerError as reason:
            missing[name] = str(reason)
    return entries, missing


def measure(workload: Workload, options: argparse.Namespace, progress: Progress) -> StepResult:
    """Race all contestants, and the floor with them, on one workload."""
    workload = workload.on(options.device)
    problem = Problem.draw(workload, device=options.device, seed=options.seed)
    entries, missing = enlist(options.contestants or default_contestants(workload), problem, options.lr)
    runners = {name: entry.contestant for name, entry in entries.items()}
    floor = {"six products": six_products(problem), "one copy": one_copy(problem)}
    task = progress.add_task(workload.title)
    timings = race(
        runners | floor,
        rounds=options.rounds,
        warmup=options.warmup,
        device=options.device,
        patience=options.patience,
        progress=lambda done, total: progress.update(task, completed=done, total=total),
    )
    return StepResult(
        workload,
        {name: timings[name] for name in runners},
        {name: entry.residual() for name, entry in entries.items()},
        missing,
        *(timings[name] for name in floor),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen workloads, print a table for each, leave a JSON file and a plot."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    # A pipe has no width of its own; the table needs about this much.
    console = Console(width=None if sys.stdout.isatty() else 130)
    folder = results_dir(options.output)
    facts = environment(torch.float32, options.device, PEER_PACKAGES)
    machine = f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}"
    console.print(f"{machine}, commit {facts['commit']}, load {facts['load']} before the race\n")
    results: dict[str, StepResult] = {}
    try:
        with Progress(console=console, transient=True) as progress:
            for name in options.workloads:
                results[name] = measure(WORKLOADS[name], options, progress)
                progress.console.print(table(name, results[name]))
    except KeyboardInterrupt:
        console.print("interrupted: keeping the workloads that were finished")
    if not results:
        return 1
    report = {"environment": facts, "settings": vars(options)}
    report["workloads"] = {name: result.to_dict() for name, result in results.items()}
    caption = f"{machine}; float32, medians of {options.rounds} rounds, whiskers: interquartile range"
    written = write_json(folder / "step.json", report), plot(folder / "step.png", results, caption)
    console.print("written: " + ", ".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
