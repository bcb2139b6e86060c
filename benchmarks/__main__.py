"""Every benchmark of the project: `python -m benchmarks COMMAND`; `COMMAND --help` lists its options."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# What a fine-tuning step costs: few steps, the methods in turn, every linear layer at rank 16.
FINETUNE_STEP = [
    *("--methods", "lora", "lora-preconditioned", "stella", "riemannlora", "riemannlora-keep", "riemannion"),
    *("--rank", "16", "--targets", "all-linear", "--steps", "60", "--seeds", "1"),
    *("--output", "results/finetune-step"),
]

# command: (module, options put before the user's, what it is)
COMMANDS: dict[str, tuple[str, list[str], str]] = {
    "step": ("step", [], "one optimizer step, ours beside every peer"),
    "retraction": ("retraction", [], "the retractions alone, beside LAPACK"),
    "finetune-step": ("finetune", FINETUNE_STEP, "a whole fine-tuning step of every adapter"),
    "memory": ("memory", [], "what is held between steps and at the peak of one"),
    "scaling": ("scaling", [], "time and memory against n, p and the number of matrices"),
    "ranks": ("ranks", [], "what the sharded step sends, and how that grows with the number of processes"),
    "gap": ("gap", [], "optimality gap against time on 2000 x 1500 and 2000 x 2000"),
    "finetune": ("finetune", [], "StelLA, RiemannLoRA and LoRA on real sentences: accuracy and time"),
    "convergence": ("convergence", [], "steps to LoRA's loss, rates tuned alike"),
    "third-party": ("third_party", [], "every optimizer of pytorch_optimizer inside the wrapper"),
}
SPEED = ("step", "retraction", "finetune-step", "memory", "scaling", "gap")  # what `speed` runs


def main(arguments: Sequence[str]) -> int:
    name, *rest = arguments or ["help"]
    if name == "speed":
        return max(run(command, rest) for command in SPEED)
    if name not in COMMANDS:
        print(f"{__doc__}\n\n  {'speed':14} all of: {', '.join(SPEED)}")
        print("\n".join(f"  {command:14} {what}" for command, (_, _, what) in COMMANDS.items()))
        return 0 if name in ("help", "-h", "--help") else 2
    return run(name, rest)


def run(name: str, rest: Sequence[str]) -> int:
    module, preset, _ = COMMANDS[name]
    return importlib.import_module(f"benchmarks.{module}").main([*preset, *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
