"""Fine-tune a pretrained transformer with StelLA beside LoRA and its relatives: `python -m benchmarks.finetune`.

Every method gets the same rank, layers, number of steps, batches in the same order and, at a given seed, the same
new head. The methods take turns in blocks of a few steps within one process, so that their step times can be
compared on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.finetune_methods import METHODS
from benchmarks.text_data import DATASETS

PACKAGED_MODEL = "all-MiniLM-L6-v2"


def parser() -> argparse.ArgumentParser:
    """What can be chosen; every default makes the demo of about five minutes on two cores."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune",
        description="Fine-tune a pretrained transformer with StelLA beside LoRA and its relatives.",
        epilog="Ctrl-C stops early and keeps what was measured.",
    )
    _add_subject(p.add_argument_group("what is compared"))
    _add_budget(p.add_argument_group("with what budget"))
    _add_place(p.add_argument_group("where"))
    return p


def _add_subject(group: argparse._ArgumentGroup) -> None:
    names = ", ".join(METHODS)
    group.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=["lora", "stella"],
        metavar="NAME",
        help=f"one or more of {names}; the first is the baseline (default: lora stella)",
    )
    group.add_argument(
        "--model",
        default=PACKAGED_MODEL,
        help="a local folder, a name on the Hugging Face hub, or the packaged model (default: %(default)s)",
    )
    group.add_argument(
        "--data",
        default="rotten_tomatoes",
        help=f"{' or '.join(DATASETS)}, or a csv file with the columns text,label (default: %(default)s)",
    )
    group.add_argument("--rank", type=int, default=8, help="of every adapter (default: %(default)s)")
    group.add_argument("--alpha", type=float, help="adapters are scaled by alpha / rank (default: 2 x rank)")
    group.add_argument(
        "--targets",
        nargs="+",
        default=["query", "key", "value", "dense"],
        metavar="NAME",
        help="endings of the names of the adapted layers, or all-linear (default: query key value dense)",
    )


def _add_budget(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        default=[],
        metavar="LR",
        help="one for all methods, or several: then each method uses the one with its lowest validation "
        "cross-entropy, found on seeds kept for that (default: each method's tuned value)",
    )
    group.add_argument(
        "--head-learning-rate",
        type=float,
        default=1e-3,
        metavar="LR",
        help="of the new linear head, for all methods (default: %(default)s)",
    )
    group.add_argument("--steps", type=int, default=240, help="of every run (default: %(default)s)")
    group.add_argument("--batch-size", type=int, default=16, help="sentences (default: %(default)s)")
    group.add_argument("--length", type=int, default=32, help="tokens, longer is cut (default: %(default)s)")
    group.add_argument("--seeds", type=int, default=2, help="runs of every method (default: %(default)s)")


def _add_place(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: all, %(default)s)")
    group.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    group.add_argument(
        "--output", type=Path, metavar="FOLDER", help="of the JSON file and the plot (default: results/)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, and say plainly which package is missing if one is."""
    args = parser().parse_args(arguments)
    args.alpha = 2.0 * args.rank if args.alpha is None else args.alpha
    try:
        from benchmarks.finetune_job import run  # here, so that --help needs none of the demo's packages

        return run(args, packaged_model=PACKAGED_MODEL)
    except ModuleNotFoundError as missing:
        print(f"{missing}. Install what the demo needs with\n    python -m pip install -e '.[demo]'")
        return 2


if __name__ == "__main__":
    sys.exit(main())
