"""Lightning: a callback that logs residual and optimizer time.

`configure_optimizers` returning ``RiemannianWrapper(AdamW(param_groups(self, lr=1e-3)))`` needs nothing from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.hooks import RemovableHandle

from .extras import extra
from .monitor import StepMonitor

with extra("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer


class RiemannianCallback(Callback):
    """Logs "residual" and "optimizer_share" (see `StepMonitor.report`) every ``log_every_n_steps`` steps.

        Trainer(callbacks=[RiemannianCallback()])

    They reach every logger of the trainer and ``trainer.callback_metrics``. The optimizer's time includes clipping,
    which Lightning does within it. Automatic and manual optimization.

    Raises:
        ConfigError: when training begins, if no optimizer of the module is a RiemannianWrapper.

    Cost: two small calls a batch; one residual per point at each logging step.
    """

    _monitor: StepMonitor
    _hooks: Sequence[RemovableHandle] = ()
    _steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the points."""
        self._monitor = StepMonitor(trainer.optimizers)
        ends = self._monitor.optimizer_ends
        self._hooks = [w.register_step_post_hook(lambda *_: ends()) for w in self._monitor.wrappers]
        self._steps = trainer.global_step

    def on_train_end(self, *_: Any) -> None:
        """Take the hooks off again."""
        for hook in self._hooks:
            hook.remove()

    def on_exception(self, *_: Any) -> None:
        """Likewise: training that was broken off does not end."""
        self.on_train_end()

    def on_train_batch_start(self, *_: Any) -> None:
        """Before the forward pass."""
        self._monitor.step_begins()

    def on_before_optimizer_step(self, *_: Any) -> None:
        """After the backward pass, before clipping."""
        self._monitor.optimizer_begins()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Report when the trainer's loggers are due, and not between the batches of one step."""
        self._monitor.step_ends()
        stepped, self._steps = trainer.global_step != self._steps, trainer.global_step
        if stepped and trainer._logger_connector.should_update_logs:  # as Lightning's own monitors ask
            pl_module.log_dict(self._monitor.report())
