"""Fine-tuning runs: one method at one seed each, advanced in turn so that their step times compare fairly."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_linear_schedule_with_warmup

from benchmarks.finetune_methods import Adapter, Method, Rates
from benchmarks.text_data import Part, TextData, evaluation_batches, training_batches
from benchmarks.timing import synchronize
from stiefelopt import RiemannianWrapper

BLOCK = 5  # steps of one method before it is the next one's turn
WARM_UP = 0.1  # share of the steps in which the learning rate rises
START_BATCHES = 2  # that a method may look at before its first step (locally optimal initialization)


@dataclass(frozen=True)
class Plan:
    """What every run of a comparison has in common."""

    adapter: Adapter
    head_rate: float
    steps: int
    batch_size: int
    device: str = "cpu"
    validations: int = 4  # evaluations on the validation part, evenly over a run


@dataclass(frozen=True)
class Scores:
    """One number per sentence, in the order of the part, so that methods can be compared in pairs."""

    losses: Tensor
    correct: Tensor

    @property
    def cross_entropy(self) -> float:
        return self.losses.mean().item()

    @property
    def accuracy(self) -> float:
        return self.correct.mean().item()


class Step(NamedTuple):
    """One training step as it was measured."""

    loss: float
    seconds: float
    optimizer_seconds: float


@dataclass
class Record:
    """Everything measured in one run; kept up to date while it runs, so that an interruption loses nothing."""

    method: str
    seed: int
    learning_rate: float
    trainable: int
    steps: list[Step] = field(default_factory=list)
    validation: list[tuple[int, float, float]] = field(default_factory=list)  # step, cross-entropy, accuracy
    residual: float | None = None  # largest |Y^T Y - I| seen, over all orthonormal factors; None without any
    finished: bool = False  # went through all its steps, neither diverged nor interrupted
    test: Scores | None = None

    @property
    def validation_loss(self) -> float:
        """Cross-entropy of the last evaluation on the validation part; what learning rates are chosen by."""
        return self.validation[-1][1] if self.finished else math.inf


class SentenceClassifier(nn.Module):
    """A transformer encoder, the mean over the words, and a new linear head."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        words = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(words.dtype)
        return self.head((words * weight).sum(dim=1) / weight.sum(dim=1))


class Run:
    """One method at one seed: the model, its optimizer and schedule, and the record of what happens."""

    def __init__(
        self,
        name: str,
        method: Method,
        encoder: nn.Module,
        data: TextData,
        plan: Plan,
        seed: int,
        rate: float,
    ) -> None:
        self.data, self.plan, self.seed = data, plan, seed
        torch.manual_seed(seed)
        # the head before the adapter, so that it starts alike for every method
        head = nn.Linear(encoder.config.hidden_size, len(data.classes))  # type: ignore[union-attr, arg-type]
        adapted = method.adapt(copy.deepcopy(encoder), plan.adapter)
        self.model = SentenceClassifier(adapted, head).to(plan.device)
        self.optimizer = method.optimizer(adapted, head, Rates(rate, plan.head_rate))
        self.schedule = get_linear_schedule_with_warmup(
            self.optimizer, round(WARM_UP * plan.steps), plan.steps
        )
        self.batches = training_batches(data.train, plan.batch_size, seed)
        if method.start is not None:
            method.start(adapted, self._first_losses())
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.record = Record(name, seed, rate, trainable)
        self.diverged = False

    def _first_losses(self) -> list[Callable[[], Tensor]]:
        """The losses of the first batches, which training will see again."""
        batches = training_batches(self.data.train, self.plan.batch_size, self.seed)
        return [partial(self._loss, batch) for batch in islice(batches, START_BATCHES)]

    def _loss(self, batch: Part) -> Tensor:
        return functional.cross_entropy(self.model(batch.ids, batch.mask), batch.labels)

    @property
    def step_count(self) -> int:
        return len(self.record.steps)

    @property
    def done(self) -> bool:
        return self.diverged or self.step_count >= self.plan.steps

    def step(self) -> None:
        """One training step; the batch is outside the measured time."""
        batch = next(self.batches)
        # runs take turns in one process: reseeding makes a run independent of its neighbours, and gives every
        # method the same dropout masks
        torch.manual_seed(self.seed * 1_000_003 + self.step_count)
        self.model.train()
        start = time.perf_counter()
        loss = self._loss(batch)
        loss.backward()
        if not math.isfinite(loss.item()):
            self.diverged = True
            return
        middle = time.perf_counter()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        synchronize(torch.device(self.plan.device))
        end = time.perf_counter()
        self.record.steps.append(Step(loss.item(), end - start, end - middle))
        self.record.finished = self.step_count == self.plan.steps

    def validate(self) -> None:
        scores = self.scores(self.data.validation)
        self.record.validation.append((self.step_count, scores.cross_entropy, scores.accuracy))
        residuals = self.optimizer.residuals() if isinstance(self.optimizer, RiemannianWrapper) else {}
        if residuals:
            self.record.residual = max(self.record.residual or 0.0, *residuals.values())

    def scores(self, part: Part) -> Scores:
        self.model.eval()
        losses, correct = torch.empty(len(part)), torch.empty(len(part))  # on the CPU, wherever the model is
        with torch.inference_mode():
            for index, batch in evaluation_batches(part):
                logits = self.model(batch.ids, batch.mask)
                losses[index] = functional.cross_entropy(logits, batch.labels, reduction="none").cpu()
                correct[index] = (logits.argmax(dim=1) == batch.labels).float().cpu()
        return Scores(losses, correct)

    def finish(self) -> None:
        """The test part, looked at once and only after the last step."""
        if self.record.finished:
            self.record.test = self.scores(self.data.test)


def train_in_turn(runs: Sequence[Run], after_step: Callable[[Run], None]) -> None:
    """Advance all runs together in short blocks, forwards and backwards, so that a busy machine slows all alike."""
    order = list(runs)
    while not all(run.done for run in order):
        for run in order:
            advance(run, after_step)
        order.reverse()


def advance(run: Run, after_step: Callable[[Run], None]) -> None:
    """One block of steps, with the validations that fall into it."""
    steps = run.plan.steps
    count = run.plan.validations
    validations = {round(steps * k / count) for k in range(1, count + 1)}
    for _ in range(BLOCK):
        if run.done:
            return
        run.step()
        after_step(run)
        if run.step_count in validations and not run.diverged:
            run.validate()
