"""StelLA on sharded parameters beside LoRA on copies: what two processes send, and how long a step takes.

A pretrained sentence encoder learns to tell good film reviews from bad ones, three times from the same start and with
the same batches: LoRA with AdamW under DDP, StelLA under fully_shard with only the adapters sharded, and StelLA with
every weight sharded. StelLA's own step sends r x r matrices and nothing tall; the gradients and weights that DDP and
fully_shard send are theirs.

    torchrun --nproc-per-node 2 -m examples.distributed
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from benchmarks.communication import Collectives
from benchmarks.finetune import PACKAGED_MODEL
from benchmarks.finetune_job import load_encoder
from benchmarks.finetune_methods import METHODS, Adapter, Rates
from benchmarks.finetune_training import SentenceClassifier
from benchmarks.text_data import (
    Part,
    TextData,
    evaluation_batches,
    read_sentences,
    tokenize,
    training_batches,
)

COUNTED = 2  # the step whose messages are counted; its time is left out


@dataclass
class Contestant:
    """A model, how it lies on the processes, and what was measured."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)  # seconds of forward and backward passes
    stepping: list[float] = field(default_factory=list)  # seconds of optimizer steps
    sent: tuple[int, int] = (0, 0)  # bytes handed to collectives: passes, step


def data_parallel(model: SentenceClassifier) -> nn.Module:
    return DistributedDataParallel(model)


def adapters_sharded(model: SentenceClassifier) -> Any:
    """Every process keeps the frozen weights whole, and its rows of what is trained."""
    frozen = {p for p in model.parameters() if not p.requires_grad}
    return fully_shard(model, reshard_after_forward=False, ignored_params=frozen)


def all_sharded(model: SentenceClassifier) -> Any:
    """Every process keeps its rows of everything; a layer's weights are put together while it computes."""
    for layer in model.encoder.encoder.layer:  # type: ignore[union-attr]
        fully_shard(layer)
    return fully_shard(model)


CONTESTANTS: dict[str, tuple[str, Callable[[SentenceClassifier], Any]]] = {
    "LoRA, AdamW, DDP": ("lora", data_parallel),
    "StelLA, adapters sharded": ("stella", adapters_sharded),
    "StelLA, all sharded": ("stella", all_sharded),
}


def make(name: str, encoder: nn.Module, classes: int, args: argparse.Namespace) -> Contestant:
    method_name, distribute = CONTESTANTS[name]
    method = METHODS[method_name]
    torch.manual_seed(0)  # the same start on all processes: fully_shard broadcasts nothing
    head = nn.Linear(encoder.config.hidden_size, classes)  # type: ignore[union-attr, arg-type]
    adapter = Adapter(args.rank, 2.0 * args.rank, ["query", "key", "value", "dense"])
    model = SentenceClassifier(method.adapt(copy.deepcopy(encoder), adapter), head)
    distributed = distribute(model)
    # The groups are made from the parameters as they lie now.
    rates = Rates(adapter=args.learning_rate or method.learning_rate, head=1e-3)
    optimizer = method.optimizer(model.encoder, model.head, rates)
    for group in optimizer.param_groups:
        group["foreach"] = True  # one call for all sharded tensors instead of one for each
    return Contestant(distributed, optimizer)


def shares(data: TextData, args: argparse.Namespace) -> Iterator[Part]:
    """This process's part of every batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for batch in training_batches(data.train, args.batch_size * size, seed=0):
        yield batch.rows(torch.arange(rank * args.batch_size, (rank + 1) * args.batch_size))


def train_step(student: Contestant, batch: Part) -> None:
    begun = time.perf_counter()
    student.optimizer.zero_grad()
    loss = functional.cross_entropy(student.model(batch.ids, batch.mask), batch.labels)
    loss.backward()
    between = time.perf_counter()
    student.optimizer.step()
    student.losses.append(loss.item())
    student.backward.append(between - begun)
    student.stepping.append(time.perf_counter() - between)


def count(student: Contestant, batch: Part) -> None:
    """A step with its messages counted."""
    student.optimizer.zero_grad()
    with Collectives() as passes, gradients_of_ddp(student.model) as reduced:
        functional.cross_entropy(student.model(batch.ids, batch.mask), batch.labels).backward()
    with Collectives() as step:
        student.optimizer.step()
    student.sent = passes.bytes + sum(reduced), step.bytes


@contextmanager
def gradients_of_ddp(model: nn.Module) -> Iterator[list[int]]:
    """Bytes of the gradients that DDP averages: its reducer does not call torch.distributed where we can see it."""
    sizes: list[int] = []
    if isinstance(model, DistributedDataParallel):
        sizes.append(sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))
    yield sizes


@torch.no_grad()
def accuracy(model: nn.Module, part: Part, sentences: int) -> float:
    """On some sentences; every process computes all of them, since a sharded model is put together by all."""
    chosen = part.rows(torch.arange(min(sentences, len(part))))
    right = [
        (model(batch.ids, batch.mask).argmax(-1) == batch.labels).float()
        for _, batch in evaluation_batches(chosen)
    ]
    return torch.cat(right).mean().item()


def slowest(seconds: list[float]) -> float:
    """Milliseconds: the median over the steps, of the slowest process."""
    found = torch.tensor([1000 * median(seconds)], dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def table(students: dict[str, Contestant], data: TextData, args: argparse.Namespace) -> Table:
    shown = Table(title=f"{dist.get_world_size()} processes, {args.steps} steps, rank {args.rank}")
    shown.add_column(no_wrap=True)
    for column in ("loss", "right", "passes send", "step sends", "passes", "step"):
        shown.add_column(column, justify="right")
    for name, student in students.items():
        last = student.losses[-max(1, len(student.losses) // 4) :]
        passes, step = student.sent
        shown.add_row(
            name,
            f"{mean(last):.3f}",
            f"{accuracy(student.model, data.validation, args.sentences):.1%}",
            f"{passes / 1e6:,.1f} MB",
            f"{step / 1e6:,.3f} MB",
            f"{slowest(student.backward):,.0f} ms",
            f"{slowest(student.stepping):,.1f} ms",
        )
    return shown


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description="StelLA on sharded parameters beside LoRA under DDP.")
    p.add_argument("--steps", type=int, default=40, help="of every contestant (default: %(default)s)")
    p.add_argument("--rank", type=int, default=8, help="of every adapter (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=8, help="sentences of a process (default: %(default)s)")
    p.add_argument("--length", type=int, default=32, help="tokens, longer is cut (default: %(default)s)")
    p.add_argument("--sentences", type=int, default=256, help="to validate on (default: %(default)s)")
    p.add_argument("--learning-rate", type=float, help="of the adapters (default: each method's tuned one)")
    return p.parse_args()


def main() -> None:
    args = arguments()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    console = Console(quiet=dist.get_rank() > 0)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end of the process
    encoder, tokenizer = load_encoder(PACKAGED_MODEL, PACKAGED_MODEL)
    data = tokenize(read_sentences("rotten_tomatoes"), tokenizer, args.length)
    students = {name: make(name, encoder, len(data.classes), args) for name in CONTESTANTS}
    for step, batch in zip(range(args.steps + 1), shares(data, args), strict=False):
        for student in students.values():  # in turn, so that a busy moment of the machine hits all alike
            (count if step == COUNTED else train_step)(student, batch)
        if step % 10 == 0:
            console.print(f"step {step}: " + ", ".join(f"{s.losses[-1]:.3f}" for s in students.values()))
    console.print(table(students, data, args))
    for name, student in students.items():
        residuals: Any = getattr(student.optimizer, "residuals", dict)()
        if residuals:
            console.print(f"{name}: all {len(residuals)} bases orthonormal to {max(residuals.values()):.1e}")
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # gloo's threads may abort when the interpreter goes down


if __name__ == "__main__":
    main()
