"""What an accelerator found wrong in a step, told to the host one step later: no step waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Alarm:
    """Numbers on their way to the host.

    They are copied behind the step's own work and read when the next step begins. By then the device has mostly come
    that far: the backward pass between the two steps waits in its queue behind them. Inside a CUDA graph's capture
    nothing is sent or read; replays go on counting, and the next step outside tells.
    """

    def __init__(self) -> None:
        self._sent: list[tuple[Tensor, Any]] = []
        self._device = torch.device("cpu")

    def send(self, counts: Sequence[Tensor]) -> None:
        """Start the copies of the sums of these counts, one for each device."""
        if not counts or _is_capturing(counts[0].device):
            return
        self._sent, self._device = [], counts[0].device
        for device in {count.device for count in counts}:
            here = torch.stack([count.sum() for count in counts if count.device == device]).sum()
            host = here.to("cpu", non_blocking=True)  # pinned memory on CUDA
            event = torch.Event(device)
            event.record()
            self._sent.append((host, event))

    def rings(self) -> bool:
        """Whether something other than zero was sent last; waits for the copies. Asked again, no."""
        if not self._sent or _is_capturing(self._device):
            return False
        sent, self._sent = self._sent, []
        for _, event in sent:
            event.synchronize()
        return any(bool(host) for host, _ in sent)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
