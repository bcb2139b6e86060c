"""transformers' Trainer: an optimizer in one line, and residual and optimizer time in its own log.

`Trainer(..., optimizers=(RiemannianWrapper(AdamW(param_groups(model, lr=1e-3))), None))` needs nothing from here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..groups import param_groups
from ..wrapper import RiemannianWrapper
from .extras import extra
from .monitor import StepMonitor

with extra("transformers"):
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def riemannian(
    optimizer: Callable[..., Optimizer], *, groups: dict[str, Any] | None = None, **options: Any
) -> tuple[Callable[[], Callable[..., RiemannianWrapper]], dict[str, Any]]:
    """For ``Trainer(optimizer_cls_and_kwargs=...)``: the optimizer is made when the Trainer has its model.

    That is the way where ``optimizers=`` is refused: with ``model_init``, and with FSDP, which replaces parameters.

        Trainer(model_init=make, args=args, train_dataset=data, optimizer_cls_and_kwargs=riemannian(AdamW, lr=1e-3))

    Args:
        optimizer: called with groups and options, for example torch.optim.AdamW.
        groups: further arguments of `param_groups`, for example {"scale_lr": 1e-2}.
        **options: of the optimizer. The Trainer's ``learning_rate`` and ``weight_decay`` are not read.

    Returns:
        The pair that the Trainer expects.
    """

    def make(model: nn.Module, **options: Any) -> RiemannianWrapper:
        return RiemannianWrapper(optimizer(param_groups(model, **(groups or {})), **options))

    return lambda: make, options


class RiemannianCallback(TrainerCallback):
    """Adds "residual" and "optimizer_share" (see `StepMonitor.report`) to what the Trainer logs of its training.

        trainer = Trainer(...)
        RiemannianCallback.add_to(trainer)

    Both are then in the progress bar's lines, in ``trainer.state.log_history`` and in whatever ``report_to`` names.
    (With ``Trainer(callbacks=[RiemannianCallback()])`` they miss the latter: its callbacks run before those given.)

    Raises:
        ConfigError: when training begins, if the Trainer's optimizer is not a RiemannianWrapper.

    Cost: two small calls a step; one residual per point at each logging step.
    """

    _monitor: StepMonitor

    @classmethod
    def add_to(cls, trainer: Trainer) -> RiemannianCallback:
        """Put a new callback before all others of the trainer."""
        callback = cls()
        trainer.add_callback(callback)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())
        return callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **loop: Any) -> None:
        """Look for the points."""
        self._monitor = StepMonitor([loop["optimizer"]])

    def on_step_begin(self, args: Any, state: Any, control: Any, **loop: Any) -> None:
        """Before the first batch of a step."""
        self._monitor.step_begins()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **loop: Any) -> None:
        """After accumulation and clipping."""
        self._monitor.optimizer_begins()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **loop: Any) -> None:
        """Before the scheduler's step."""
        self._monitor.optimizer_ends()

    def on_step_end(self, args: Any, state: Any, control: Any, **loop: Any) -> None:
        """Before evaluation, logging and saving."""
        self._monitor.step_ends()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **loop: Any,
    ) -> None:
        """Add to a log of training, not of evaluation."""
        if logs is not None and "loss" in logs:
            figures = self._monitor.report()
            logs.update(figures)
            state.log_history[-1].update(figures)  # the Trainer copied the logs before it called us
