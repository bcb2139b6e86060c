"""RiemannianWrapper and attach: any torch optimizer, stepping on manifolds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from .errors import ConfigError, StepError
from .hooks import AttachedHooks
from .manifold_step import FIRST_MOMENTS, ManifoldStep, settings_of, write_specs
from .manifolds import Manifold, from_spec
from .precision import lifted

_REFUSED = {
    "LBFGS": "evaluates its closure several times inside one step, off the manifold; use SGD with momentum, or AdamW",
    "SparseAdam": "takes sparse gradients only, and a Riemannian gradient is dense; use Adam",
}


def check_optimizer(optimizer: object) -> Optimizer:
    """Refuse what cannot be wrapped."""
    if isinstance(optimizer, type):
        raise ConfigError(
            f"the class {optimizer.__name__} was given; an instance is needed: {optimizer.__name__}(groups, lr=...)."
        )
    if isinstance(optimizer, RiemannianWrapper):
        raise ConfigError("the optimizer is wrapped already; add further groups with add_param_group.")
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"a torch.optim.Optimizer is needed, got {type(optimizer).__name__}.")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ConfigError(
            "differentiable=True asks for derivatives through the step, and points are written back in place: leave it "
            "out, and differentiate manifold.retract(x, u) yourself."
        )
    # An optimizer around another may never have called Optimizer.__init__.
    pre_hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    if any(isinstance(getattr(hook, "__self__", None), AttachedHooks) for hook in pre_hooks):
        raise ConfigError(
            "the optimizer is attached already, and would be converted twice; call handle.remove() first."
        )
    for cls in type(optimizer).__mro__:
        if cls.__module__.startswith("torch.optim") and cls.__name__ in _REFUSED:
            raise ConfigError(f"{cls.__name__} cannot be wrapped: it {_REFUSED[cls.__name__]}.")
    return optimizer


class RiemannianWrapper(Optimizer):
    """A torch optimizer that keeps the parameters of its manifold groups on their manifolds.

    The inner optimizer reads Riemannian gradients and steps as it always does; what it did to a parameter, its
    displacement, is projected to the tangent space and retracted. Groups without a manifold are untouched. The
    wrapper owns no state: ``param_groups``, ``state``, ``defaults`` and ``state_dict()`` are the inner optimizer's.
    ``.grad`` stays the Euclidean gradient: that is what ``clip_grad_norm_``, accumulation and GradScaler see, and what
    is clipped is converted afterwards.

    Args:
        optimizer: any ``torch.optim.Optimizer`` instance (not LBFGS, not SparseAdam).
        manifold: for the groups that name none themselves; None leaves those Euclidean.
        nonfinite: what a gradient or displacement that is not finite does: "raise" StepError, or "skip" the point.
            Where NaN is born inside the inner step, "raise" puts the points back, while moments, counters and
            Euclidean groups have changed; "restore" puts back these too, for a copy of all of it every step (measured:
            11 % of an AdamW step where all parameters are constrained, 28 % beside four times as many that are not).
            On an accelerator no step waits for the device: such a point keeps its value, its moments see a zero
            gradient, all else is stepped, and the error comes with the next step. "restore" waits.
        moments: names under which the inner optimizer keeps averages of gradients; manifolds with a ``transport``
            carry them to the new point.

    On a CPU torch's own elementwise optimizers (SGD, AdamW, ...) step all parameters of a group that have one shape as
    one tensor: the same numbers in fewer calls, the state each parameter's own. Hooks on the inner optimizer's step, a
    subclass of it, or ``nonfinite="skip"``, keep them apart.

    A group may carry ``manifold`` (a manifold or its spec), ``orientation`` ("columns" | "rows"; default: tall ->
    columns, wide -> rows, square -> columns), ``view`` ("matrix" | "batch", needed above two dimensions),
    ``displacement_scale`` (a number, or "stella" with ``reference_dim``).

    Raises:
        ConfigError, ShapeError, NotOnManifoldError, UnknownNameError: before anything has changed.

    Cost: six tall products of 2 n p^2 flops beside the inner step; memory for two copies of the constrained
    parameters. Reference: Li et al., StelLA (arXiv 2510.01938), algorithm 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        manifold: Manifold | Mapping[str, Any] | None = None,
        *,
        nonfinite: str = "raise",
        moments: Sequence[str] = FIRST_MOMENTS,
    ) -> None:
        self.optimizer = check_optimizer(optimizer)
        self.manifold = None if manifold is None else from_spec(manifold)
        self._core = ManifoldStep(optimizer, nonfinite, moments, join=True)
        self._core.adopt_all(self.manifold)
        self._init_hooks()

    def _init_hooks(self) -> None:
        """What torch.optim.Optimizer.__init__ would set; it is not called, since the groups are another's."""
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._patch_step_function()
        _WRAPPERS.add(self)

    # The inner optimizer's own, never copies.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    # The torch contract

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. The closure, if any, is evaluated once, before anything else; its value is returned.

        The inner optimizer gets a closure that returns this value, once.

        Raises:
            StepError: a non-finite gradient (nothing has changed), or a displacement that cannot be retracted
                (the points have not; the inner optimizer's moments have). On an accelerator, a step later.
        """
        loss: Any = None
        known: tuple[_Evaluated, ...] = ()
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            known = (_Evaluated(loss),)
        with torch.no_grad():
            self._core.before()
            try:
                self.optimizer.step(*known)
            except BaseException:
                self._core.undo()
                raise
            self._core.after()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as torch does."""
        # Not every optimizer's zero_grad takes an argument; where it is torch's default there is nothing to say.
        if set_to_none:
            self.optimizer.zero_grad()
        else:
            self.optimizer.zero_grad(set_to_none=False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with or without a manifold, after the same checks as in the constructor."""
        if not isinstance(param_group, dict):
            raise ConfigError(
                f"a parameter group is a dict with the key 'params', got {type(param_group).__name__}."
            )
        group = dict(param_group)
        if "params" not in group:
            raise ConfigError(f"a parameter group needs the key 'params'; this one has {sorted(group)}.")
        params = group["params"]
        if isinstance(params, set):
            raise ConfigError(
                "a set of parameters has no order, and the state would be mixed up on load; pass a list."
            )
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        named = [p for p in group["params"] if isinstance(p, tuple)]
        trial = {**self.defaults, **group, "params": [p[1] for p in named] if named else group["params"]}
        if named:
            trial["param_names"] = [p[0] for p in named]
        self._core.adopt(trial, len(self.param_groups), self.manifold)
        self.optimizer.add_param_group({**group, **settings_of(trial)})

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state_dict; manifolds are in its groups as plain dicts.

        Raises:
            ConfigError: a group's retraction is a live function; register it.
        """
        for pre in self._optimizer_state_dict_pre_hooks.values():
            pre(self)
        state = self.optimizer.state_dict()
        write_specs(state)
        for post in self._optimizer_state_dict_post_hooks.values():
            changed = post(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the inner optimizer's state. Where saved and live manifold keys differ, the live ones stay.

        Raises:
            ConfigError: a saved group has coupled weight decay, and its live one is on a manifold.
        """
        state_dict = state_dict.copy()  # as in torch: hooks may write to it
        for pre in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._core.check_saved(state_dict)
        live = self._core.live_settings()
        with lifted(self.optimizer, [slot.p for point in self._core.stepped_points() for slot in point]):
            self.optimizer.load_state_dict(state_dict)
        self._core.keep_settings(live)
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: as in torch without hooks, and not the step that a scheduler patched in."""
        core = self._core
        return {
            "optimizer": self.optimizer,
            "manifold": self.manifold,
            "core": (core.nonfinite, core.moments),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizer, self.manifold = state["optimizer"], state["manifold"]
        self._core = ManifoldStep(self.optimizer, *state["core"], join=True)
        self._init_hooks()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"

    # Ours

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Of the last step, for loggers: call it after ``step`` and before ``zero_grad``.

        Returns:
            "gradient_norm": Frobenius norm of all Riemannian gradients (NaN once ``.grad`` is gone);
            "displacement_norm": of all changes of points; "skipped": how many parameters ``nonfinite="skip"`` has left
            alone so far. Cost: four tall products for each point, nothing when not called.
        """
        return self._core.diagnostics()

    def residuals(self) -> dict[object, float]:
        """Drift of every constrained parameter: max |x^T x - I| by parameter name, or by (group, index)."""
        return self._core.residuals()


_WRAPPERS: WeakSet[RiemannianWrapper] = WeakSet()


class _Evaluated:
    """The closure that the inner optimizer gets: the loss is known, and asking twice would mean a point elsewhere."""

    def __init__(self, loss: Any) -> None:
        self._loss, self._asked = loss, False

    def __call__(self) -> Any:
        if self._asked:
            raise StepError(
                "the inner optimizer evaluates its closure more than once in a step, at points off the manifold; use "
                "one that takes the loss once, as all of torch.optim but LBFGS do."
            )
        self._asked = True
        return self._loss


class AttachHandle:
    """What `attach` returns: `remove()` takes the behaviour off again."""

    def __init__(self, hooks: AttachedHooks) -> None:
        self._hooks = hooks

    def remove(self) -> None:
        """Take the hooks off; the optimizer is Euclidean again."""
        self._hooks.remove()

    def residuals(self) -> dict[object, float]:
        """Drift of every constrained parameter: max |x^T x - I| by parameter name, or by (group, index)."""
        self._hooks.recover()
        return self._hooks.core.residuals()


def attach(optimizer: Optimizer, manifold: Manifold | Mapping[str, Any] | None = None) -> AttachHandle:
    """Install the behaviour of `RiemannianWrapper` as step hooks on an existing optimizer.

    GradScaler unscales before the step, also for fused optimizers, and ``load_state_dict`` keeps the live manifolds,
    with a warning. torch runs no hook when a step raises: points and gradients are then put back by what comes first,
    the next step, ``state_dict`` or ``load_state_dict``, or the handle's ``residuals`` or ``remove``. Gradients
    computed and points loaded in between are kept. With sharded points that communicates: after a step that failed,
    call any of these on all ranks. Hooks stay behind when an optimizer is copied or pickled: attach to the copy.

    Args:
        optimizer: as for the wrapper. Its step must be called without a closure: hooks cannot run between
            the closure and the step.
        manifold: for the groups that name none themselves.

    Returns:
        A handle with ``remove()`` and ``residuals()``.
    """
    if not hasattr(check_optimizer(optimizer), "_optimizer_step_pre_hooks"):
        raise ConfigError(
            f"{type(optimizer).__name__} never called Optimizer.__init__ and has no hooks to attach to: use "
            f"RiemannianWrapper(optimizer), or attach to the optimizer inside it."
        )
    if any(wrapper.optimizer is optimizer for wrapper in _WRAPPERS):
        raise ConfigError(
            "the optimizer is inside a RiemannianWrapper, and would be converted twice; use that."
        )
    core = ManifoldStep(optimizer)
    core.adopt_all(None if manifold is None else from_spec(manifold))
    return AttachHandle(AttachedHooks(optimizer, core))
