"""BlockAdam: Adam with one second moment for each parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from ..distributed import whole
from ..errors import ConfigError, StepError
from ..shapes import compute_dtype


class BlockAdam(Optimizer):
    """Adam whose second moment is an average of ||g||_F^2, one number for each parameter.

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) ||g||_F^2,  p <- p - lr m^ / (sqrt(v^) + eps), with bias correction.
    Wrapped on `FixedRank` with its transport it does not depend on the choice of factors, which Adam's elementwise
    moments do.

    Args:
        params: parameters or groups.
        lr: length of a step that follows a constant gradient: ||m^|| / sqrt(v^) is 1 then, for each parameter as a
            whole, where Adam's is sqrt(number of entries).
        betas: decay of the two averages.
        eps: added to sqrt(v^).

    Reference: the Adam-like variant of RiemannLoRA (arXiv 2507.12142).
    """

    def __init__(
        self, params: Any, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-12
    ) -> None:
        if not lr >= 0 or not eps >= 0 or not all(0 <= b < 1 for b in betas):
            raise ConfigError(
                f"BlockAdam(lr={lr}, betas={betas}, eps={eps}): lr, eps >= 0 and betas in [0, 1) are needed."
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.is_sparse:
                        raise StepError(
                            "BlockAdam takes dense gradients; leave out sparse=True, or use SparseAdam."
                        )
                    _step(p, p.grad, self.state[p], group)
        return loss


def _step(p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    # In half precision ||g||^2 would overflow, its average stall and eps be 0.
    dtype = compute_dtype(p.dtype)
    real = dtype.to_real()
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(p)
        state["norm_sq"] = torch.zeros((), dtype=real, device=p.device)
    b1, b2 = group["betas"]
    state["step"] += 1
    k = state["step"].item()
    state["exp_avg"].lerp_(g, 1 - b1)
    g = g.to(dtype)
    square = whole((g * g.conj()).real.sum())
    state["norm_sq"] = state["norm_sq"].to(real).lerp_(square, 1 - b2)
    root = (state["norm_sq"] / (1 - b2**k)).sqrt() + group["eps"]
    p.sub_(state["exp_avg"] * (float(group["lr"]) / ((1 - b1**k) * root)))
