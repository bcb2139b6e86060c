"""The hooks of `attach`: the Riemannian step around a step, a save and a load of somebody else's optimizer."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.optim import Optimizer

from .errors import ConfigError
from .manifold_step import ManifoldStep, write_specs
from .precision import reload

# The function that torch puts around every optimizer's step to run the hooks.
_RUNS_HOOKS = Optimizer.profile_hook_step(lambda *_: None).__code__
# What tells GradScaler that a step unscales for itself (torch's fused ones), seeing NaN and Inf later than our hooks.
_UNSCALES = "_step_supports_amp_scaling"


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer is running already: one that calls ``super().step()`` runs its hooks twice."""
    steps, frame = 0, sys._getframe(1)
    while frame is not None and steps < 2:
        steps += frame.f_code is _RUNS_HOOKS and frame.f_locals["args"][0] is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return steps > 1


class AttachedHooks:
    """Installed on an optimizer when made, until `remove`."""

    def __init__(self, optimizer: Optimizer, core: ManifoldStep) -> None:
        self.core = core
        self._optimizer = optimizer
        self._loading: tuple[dict[str, Any], list[dict[str, Any]]] = {}, []
        self._handles = (
            optimizer.register_step_pre_hook(self.before),
            optimizer.register_step_post_hook(self.after),
            optimizer.register_state_dict_pre_hook(self.before_save),
            optimizer.register_state_dict_post_hook(self.after_save),
            optimizer.register_load_state_dict_pre_hook(self.before_load),
            optimizer.register_load_state_dict_post_hook(self.after_load),
        )
        self._unscales = optimizer.__dict__.get(_UNSCALES)
        if self._unscales:
            optimizer.__dict__[_UNSCALES] = False

    @torch.no_grad()
    def recover(self) -> None:
        """Clean up after a step that raised, of which no hook has told us."""
        self.core.recover()

    def remove(self) -> None:
        """Let the optimizer be what it was."""
        self.recover()
        for handle in self._handles:
            handle.remove()
        self.core.lower_states()
        if self._unscales:
            self._optimizer.__dict__[_UNSCALES] = self._unscales

    @torch.no_grad()
    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Step pre-hook."""
        if any(a is not None for a in args[1:]) or kwargs.get("closure") is not None:
            raise ConfigError(
                "an attached optimizer takes no closure, since hooks run before it; compute the "
                "gradients first and call "
                "step(), or use RiemannianWrapper(optimizer)."
            )
        if not _is_nested(optimizer):
            self.core.before()

    @torch.no_grad()
    def after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Step post-hook."""
        if not _is_nested(optimizer):
            self.core.after()

    def before_save(self, _: Optimizer) -> None:
        """Pre-hook of state_dict."""
        self.recover()

    def after_save(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """Post-hook of state_dict: specs of its own, or ConfigError where a live function has none."""
        write_specs(state_dict)

    def before_load(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        """Pre-hook of load_state_dict. Nothing may change yet: without success there is no post-hook."""
        self.recover()
        self._loading = state_dict, self.core.live_settings()

    @torch.no_grad()
    def after_load(self, optimizer: Optimizer) -> None:
        """Post-hook of load_state_dict."""
        (state_dict, live), self._loading = self._loading, ({}, [])
        self.core.keep_settings(live)
        reload(optimizer, [slot.p for point in self.core.stepped_points() for slot in point], state_dict)
