"""What an accelerator found wrong in a step, told to the host one step later: no step waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Alarm:
    """Numbers on their way to the host.

    They are copied behind the step's own work and read when the next step begins. By then the device has mostly come
    that far: the backward pass between the two steps waits in its queue behind them. While a graph is captured nothing
    is sent or read; its replays go on counting, which `rings` leaves to be found out.
    """

    def __init__(self) -> None:
        self._sent: list[tuple[Tensor, Any]] = []
        self._captured: torch.device | None = None

    def send(self, counts: Sequence[Tensor]) -> None:
        """Start the copies of the sums of these counts, one for each device."""
        self._sent = []
        for device in {count.device for count in counts}:
            if _is_capturing(device):
                self._captured = device
                continue
            here = torch.cat([count for count in counts if count.device == device]).sum()
            host = here.to("cpu", non_blocking=True)  # pinned memory on CUDA
            event = torch.Event(device)
            event.record(torch.accelerator.current_stream(device))
            self._sent.append((host, event))

    def rings(self) -> bool:
        """Whether something other than zero was sent last, or may have been counted by a graph; waits for the copies.

        Asked again, no.
        """
        if self._captured is not None:
            if _is_capturing(self._captured):
                return False
            self._captured = None
            return True
        sent, self._sent = self._sent, []
        for _, event in sent:
            event.synchronize()
        return any(bool(host) for host, _ in sent)


def _is_capturing(device: torch.device) -> bool:
    """Whether what is called now is recorded for a graph, and the host must not ask for its results."""
    asked = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return asked is not None and asked()
