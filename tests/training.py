"""What the tests of training loops share: a model with every kind of constrained parameter, and the loop by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from stiefelopt import (
    RiemannianWrapper,
    RiemannLoRALinear,
    StelLALinear,
    Stiefel,
    constrain,
    param_groups,
)

BATCH, CLIP = 4, 0.05  # the clipping is always active


class Net(nn.Module):
    """A Stiefel weight, a StelLA layer, a fixed-rank layer, an ordinary weight; called as a Trainer calls a model."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = constrain(nn.Linear(6, 8), "weight", Stiefel())
        self.stella = StelLALinear(nn.Linear(8, 8), r=2)
        self.lora = RiemannLoRALinear(nn.Linear(8, 8), r=2)
        self.last = nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        y = self.last(torch.tanh(self.lora(torch.tanh(self.stella(self.first(x))))))
        return {"logits": y} if labels is None else {"loss": mse_loss(y.float(), labels), "logits": y}


def wrapped(model: nn.Module, lr: float = 2e-2) -> RiemannianWrapper:
    return RiemannianWrapper(AdamW(param_groups(model, lr=lr, weight_decay=0.1)))


def samples(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(count, 6, generator=generator), torch.randn(count, 1, generator=generator)
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


def by_hand(
    model: Net,
    wrapper: RiemannianWrapper,
    scheduler: LRScheduler,
    data: list[dict[str, Tensor]],
    accumulate: int,
    clipped: list[nn.Parameter],
) -> None:
    """One pass over the data in order: accumulate, clip (the norm is summed in the order given), step, schedule."""
    for i in range(0, len(data), BATCH):
        x, y = (torch.stack([sample[key] for sample in data[i : i + BATCH]]) for key in ("x", "labels"))
        (model(x, y)["loss"] / accumulate).backward()
        if (i // BATCH + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(clipped, CLIP)
            wrapper.step()
            scheduler.step()
            wrapper.zero_grad()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_state(a: RiemannianWrapper, b: RiemannianWrapper) -> bool:
    """Whether moments, counters and groups are equal bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    return left["param_groups"] == right["param_groups"] and all(
        same(left["state"][i], right["state"][i]) for i in left["state"].keys() | right["state"].keys()
    )
