"""What the callbacks of all training loops report: the drift of the points, and the optimizer's share of step time."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import Any

from ..errors import ConfigError
from ..wrapper import RiemannianWrapper


def unwrap(optimizer: Any) -> Any:
    """What accelerate has put its own optimizer around."""
    while not isinstance(optimizer, RiemannianWrapper) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class StepMonitor:
    """Sums up, since the last report, how long steps took and how much of that the optimizers did.

    Times are the host's: an accelerator works on after the call has returned, and its share needs a profiler.

    Args:
        optimizers: the loop's, in whatever it has put around them.

    Raises:
        ConfigError: no RiemannianWrapper is among them.
    """

    def __init__(self, optimizers: Iterable[object]) -> None:
        found = [unwrap(optimizer) for optimizer in optimizers]
        self.wrappers = [o for o in found if isinstance(o, RiemannianWrapper)]
        if not self.wrappers:
            names = ", ".join(type(o).__name__ for o in found)
            raise ConfigError(
                f"the loop's optimizers are {names or 'none'}, and there are no points to report on; give the loop "
                f"RiemannianWrapper(optimizer), or leave the callback out."
            )
        self._step = self._optimizer = 0.0
        self._step_began = self._optimizer_began = 0.0

    def step_begins(self) -> None:
        """Before the forward pass."""
        self._step_began = perf_counter()

    def optimizer_begins(self) -> None:
        """After the backward pass."""
        self._optimizer_began = perf_counter()

    def optimizer_ends(self) -> None:
        """After the optimizer's step."""
        self._optimizer += perf_counter() - self._optimizer_began

    def step_ends(self) -> None:
        """After everything that belongs to the step, or to a part of it where gradients accumulate."""
        self._step += perf_counter() - self._step_began

    def report(self) -> dict[str, float]:
        """The figures since the last report.

        Returns:
            "residual": the largest of `RiemannianWrapper.residuals`; "optimizer_share": of the steps' time, 0 to 1.
        """
        residual = max((r for w in self.wrappers for r in w.residuals().values()), default=0.0)
        share = self._optimizer / self._step if self._step else 0.0
        self._step = self._optimizer = 0.0
        return {"residual": residual, "optimizer_share": share}
