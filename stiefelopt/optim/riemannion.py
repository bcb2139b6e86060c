"""Riemannion: Muon's direction on the manifold of fixed-rank matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from ..errors import ConfigError
from ..manifolds import from_spec
from ..wrapper import RiemannianWrapper


class Riemannion(RiemannianWrapper):
    """Heavy ball on the manifold, stepped along its orthogonalized direction.

    The raw momentum M <- momentum P(M) + grad is carried from tangent space to tangent space; its nonzero singular
    values, at most 2r of them, are set to 1, the result is projected to the tangent space again, and the step is
    W+ = R(W, -lr (direction + weight_decay W)). All of it is algebra of 2r x 2r matrices. Loss scale does not matter.
    Groups without a manifold are stepped by AdamW.

    On Stiefel groups the direction is the orthogonal factor of the tangent momentum, projected. SPEL, msign(x - lr
    msign(m)), is the same but for where it projects, if m is tangent; with m an ambient momentum its last msign takes
    back what points along x, and on a leading-subspace problem it was far behind. Manifold Muon solves for the best
    tangent direction of spectral norm 1 by dual ascent; where x^T g is symmetric that is ours.

    Args:
        groups: as from `stiefelopt.param_groups`, which may set ``lr`` for each group.
        lr: default learning rate: on manifold groups the spectral norm of a step.
        momentum: of the heavy ball; what OneCycleLR and CyclicLR cycle.
        weight_decay: decoupled; of fixed-rank matrices W, where their group sets neither ``weight_decay`` nor
            ``manifold_decay`` (0 there: none), and of AdamW's groups, where these set none themselves.
        betas: of AdamW.
        eps: of AdamW.
        nonfinite: as in `RiemannianWrapper`.

    Reference: Bogachev et al., LoRA meets Riemannion (arXiv 2507.12142), equations 10 to 12; the printed algorithm
    stores the orthogonalized direction as momentum, the equations the raw one, which is right.
    """

    def __init__(
        self,
        groups: Any,
        lr: float = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        nonfinite: str = "raise",
    ) -> None:
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum is {momentum!r}; a number in [0, 1) is needed.")
        self._momentum = momentum
        prepared = [self._prepared(group, weight_decay) for group in _as_groups(groups)]
        super().__init__(
            _HeavyBallAndAdamW(prepared, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay),
            nonfinite=nonfinite,
        )

    def _prepared(self, group: Mapping[str, Any], weight_decay: float) -> dict[str, Any]:
        group = {"momentum": self._momentum, **group}
        if group.get("manifold") is None:
            return group
        group.setdefault("direction", "spectral")
        if from_spec(group["manifold"]).parts > 1:
            group.setdefault("manifold_decay", group.get("weight_decay") or weight_decay)
        return {**group, "weight_decay": 0.0}

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's, with momentum for betas: schedulers that cycle either then reach the heavy ball."""
        known = {name: value for name, value in self.optimizer.defaults.items() if name != "betas"}
        return {**known, "momentum": self._momentum}

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with or without a manifold."""
        known = isinstance(param_group, dict)
        decay = self.defaults["weight_decay"]
        super().add_param_group(self._prepared(param_group, decay) if known else param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, which may be AdamW's."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("momentum", self._momentum)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "momentum": self._momentum}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._momentum = state.get("momentum", 0.9)
        super().__setstate__(state)


def _as_groups(groups: Any) -> list[Mapping[str, Any]]:
    if isinstance(groups, (Tensor, Mapping)) or not isinstance(groups, Iterable):
        raise ConfigError(
            "Riemannion needs a list of parameters or groups; build it with stiefelopt.param_groups(model)."
        )
    found = list(groups)
    if not found:
        raise ConfigError(
            "Riemannion got an empty list; build the groups with stiefelopt.param_groups(model)."
        )
    return found if isinstance(found[0], Mapping) else [{"params": found}]


class _HeavyBallAndAdamW(AdamW):
    """SGD with momentum for the groups with a manifold, AdamW for the others, in one state."""

    unit_steps = True  # where only their direction counts, see `_steps`
    _free: int | None = None  # how many groups had no manifold in the last step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the wrapper has evaluated the closure."""
        every = self.param_groups
        for group in every:
            if group.get("manifold") is not None:
                self._heavy_ball(group)
        try:
            self.param_groups = [group for group in every if group.get("manifold") is None]
            if self._free != len(self.param_groups):
                self._forget_heavy_ball()
                self._free = len(self.param_groups)
            return _adamw_step()(self, closure)
        finally:
            self.param_groups = every

    def _forget_heavy_ball(self) -> None:
        """A parameter whose group has lost its manifold begins AdamW's averages anew."""
        for group in self.param_groups:
            for p in group["params"]:
                if "momentum_buffer" in self.state.get(p, {}):
                    del self.state[p]

    def _heavy_ball(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                # "step": AdamW asks every state for it.
                self.state[p].update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p))
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, [p.grad for p in params], alpha=-1 if group["maximize"] else 1)
        torch._foreach_add_([self.state[p]["step"] for p in params], 1)
        torch._foreach_add_(params, _steps(buffers, group))


def _adamw_step() -> Callable[..., Any]:
    """AdamW's step without the hooks that torch puts around it once there is an AdamW: ours has run them."""
    step: Any = AdamW.step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step


def _steps(buffers: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
    """What moves the parameters: -lr M, or for "spectral", which reads its direction alone, -M of unit norm.

    A short step would be lost in the rounding of p + step, and the direction with it. One factor for each point.
    """
    if group.get("direction", "plain") == "plain":
        return list(torch._foreach_mul(buffers, -float(group["lr"])))
    parts = from_spec(group["manifold"]).parts
    # In float32 squares of entries beyond 1e19 overflow, and below 1e-23 they vanish.
    exact = torch.float32 if buffers[0].device.type == "mps" else torch.float64
    each = torch._foreach_norm(buffers, 2, exact)
    norms = torch.stack([n.to(each[0]) for n in each]).view(-1, parts).norm(dim=1)
    factors = -torch.where(norms > 0, norms, torch.ones_like(norms)).reciprocal()
    pairs = zip(factors.repeat_interleave(parts), buffers, strict=True)
    return list(torch._foreach_mul(buffers, [factor.to(b) for factor, b in pairs]))
