"""RiemannianWrapper: any torch optimizer, stepping on manifolds. The path of a parameter is in `ManifoldStep`."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .buckets import Bucket, Slot, make_buckets
from .errors import ConfigError, StepError
from .manifolds import Manifold, from_spec
from .placement import KEYS, Placement, check_parameter, read_placement, resolve_orientation

# torch's own optimizers whose weight_decay is added to the gradient (L2), unless a flag decouples it.
_COUPLED = ("ASGD", "Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
_REFUSED = {
    "LBFGS": "evaluates its closure several times inside one step, off the manifold; use SGD with momentum, or AdamW",
    "SparseAdam": "takes sparse gradients only, and a Riemannian gradient is dense; use Adam",
}

Settings = dict[str, Any]


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
    if any(isinstance(hook, _BeforeHook) for hook in optimizer._optimizer_step_pre_hooks.values()):
        raise ConfigError("the optimizer is attached already, and would be converted twice; call handle.remove() first.")
    for cls in type(optimizer).__mro__:
        if cls.__module__.startswith("torch.optim") and cls.__name__ in _REFUSED:
            raise ConfigError(f"{cls.__name__} cannot be wrapped: it {_REFUSED[cls.__name__]}.")
    return optimizer


def label_of(group: Mapping[str, Any], group_index: int, index: int) -> object:
    """The parameter's name where the group is named, else (group, index)."""
    names = group.get("param_names")
    return names[index] if names else (group_index, index)


def settings_of(group: Mapping[str, Any]) -> Settings:
    """A copy of what a group says about its manifold; of the spec too, which may be changed in place."""
    found = {key: group[key] for key in KEYS if key in group}
    return {key: dict(value) if isinstance(value, dict) else value for key, value in found.items()}


class ManifoldStep:
    """The eight lines of a step, around any optimizer: `before` it and `after` it.

    Holds workspaces, never state: twice the bytes of the constrained parameters.
    """

    def __init__(self, optimizer: Optimizer, nonfinite: str = "raise") -> None:
        if nonfinite not in ("raise", "skip"):
            raise ConfigError(f"nonfinite is {nonfinite!r}; use 'raise' or 'skip'.")
        self.optimizer = optimizer
        self.nonfinite = nonfinite
        self.skipped = 0
        self._warned = False
        self._buckets: list[Bucket] = []
        self._signature: list[tuple[Settings, list[Tensor]]] | None = None

    # Groups

    def adopt_all(self, default: Manifold | None = None) -> None:
        """`adopt` every group; a refused one leaves the others as they were."""
        groups = self.optimizer.param_groups
        trial = [dict(group) for group in groups]
        for i, group in enumerate(trial):
            self.adopt(group, i, default)
        for group, checked in zip(groups, trial, strict=True):
            group.update(settings_of(checked))

    def adopt(self, group: dict[str, Any], index: int, default: Manifold | None = None) -> None:
        """Check one group and store its manifold keys as plain strings and numbers."""
        if default is not None:
            group.setdefault("manifold", default)
        if group.get("manifold") is None:
            return
        placement = read_placement(group)
        for i, p in enumerate(group["params"]):
            check_parameter(label_of(group, index, i), p, placement)
        self._check_decay(group, index)
        orientation = resolve_orientation(placement, [p.shape for p in group["params"]])
        group.update(manifold=_plain(placement.manifold), orientation=orientation)

    def _check_decay(self, group: Mapping[str, Any], index: int) -> None:
        decay = group.get("weight_decay", 0)
        if isinstance(decay, Tensor) or not decay or group.get("decoupled_weight_decay"):
            return
        cls = type(self.optimizer)
        if cls.__module__.startswith("torch.optim"):
            if cls.__name__ in _COUPLED:
                raise ConfigError(
                    f"group {index} has weight_decay={decay:g}, which {cls.__name__} adds to the gradient (coupled L2): on "
                    f"a manifold it only disturbs the moments. Set weight_decay=0 for this group, or use AdamW, whose "
                    f"decoupled decay the projection removes."
                )
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"group {index} has weight_decay={decay:g}; if {cls.__name__} adds it to the gradient, it disturbs the "
                f"moments of a manifold group: set weight_decay=0 there.",
                stacklevel=4,
            )

    def slots(self, *, with_gradient: bool = False) -> list[Slot]:
        """The constrained parameters of all groups."""
        found = []
        for g, group in enumerate(self.optimizer.param_groups):
            if group.get("manifold") is None:
                continue
            placement = read_placement(group)
            for i, p in enumerate(group["params"]):
                if not with_gradient or (p.grad is not None and p.numel()):
                    found.append(Slot(p, label_of(group, g, i), placement))
        return found

    def residuals(self) -> dict[object, float]:
        """max |x^T x - I| of every constrained parameter."""
        return {
            s.label: s.placement.manifold.residual(s.placement.as_tall(s.p.detach())).amax().item()  # type: ignore[attr-defined]
            for s in self.slots()
            if s.p.numel()
        }

    def _current_buckets(self) -> list[Bucket]:
        """The buckets of this step's parameters, made anew whenever groups, parameters or gradients changed."""
        if self._signature is None or not _same(self._sign(), self._signature):
            self.adopt_all()
            slots = self.slots(with_gradient=True)
            _check_gradients(slots)
            self._buckets = make_buckets(slots)
            self._signature = self._sign()
        return self._buckets

    def _sign(self) -> list[tuple[Settings, list[Tensor]]]:
        """All that the buckets were made from."""
        signs = []
        for group in self.optimizer.param_groups:
            if group.get("manifold") is not None:
                params = [p for p in group["params"] if p.grad is not None]
                settings = settings_of(group)
                settings["storage"] = {(p.dtype, p.device) for p in params}
                signs.append((settings, params))
        return signs

    # The step

    def before(self) -> None:
        """Turn gradients into Riemannian ones, in workspaces that the optimizer then reads.

        Raises:
            StepError: a gradient is not finite; nothing has changed.
        """
        buckets = self._current_buckets()
        bad = [slot for bucket in buckets for slot in bucket.convert_gradients()]
        if bad and self.nonfinite == "raise":
            raise StepError(
                f"the gradient (or the point) of {bad[0].label!r} is not finite, or too large to be converted; nothing has "
                f"changed. Lower the learning rate, clip, or pass nonfinite='skip' to leave such points alone."
            )
        self.skipped += len(bad)
        refused = {id(slot.p) for slot in bad}
        for stack in (s for b in buckets for s in b.stacks):
            # Without a gradient the optimizer leaves the parameter alone, and a zero displacement moves no bit.
            stack.lend_gradients([id(p) not in refused for p in stack.params])

    def after(self) -> None:
        """Bring the parameters back to their manifolds, and their own gradients back to them.

        Raises:
            StepError: a displacement is not finite or cannot be retracted; every point is where it was.
        """
        self.return_gradients()
        try:
            for bucket in reversed(self._buckets):  # the last parameters stepped are still in the cache
                self.skipped += len(bucket.move(skip_bad=self.nonfinite == "skip"))
        except BaseException as error:
            self.restore_points()
            if isinstance(error, StepError):
                raise StepError(f"{error}. The points were put back to where they were before the step.") from None
            raise

    def return_gradients(self) -> None:
        """Undo what `before` did to the gradients."""
        for bucket in self._buckets:
            for stack in bucket.stacks:
                stack.return_gradients()

    def restore_points(self) -> None:
        """Put every point back to where it was before the step."""
        for bucket in self._buckets:
            for stack in bucket.stacks:
                stack.restore()


def _plain(manifold: Manifold) -> object:
    """The manifold as a spec; itself where a live function keeps it from being one."""
    try:
        return manifold.spec()
    except ConfigError:
        return manifold


def _same(now: Sequence[tuple[Settings, list[Tensor]]], then: Sequence[tuple[Settings, list[Tensor]]]) -> bool:
    return len(now) == len(then) and all(
        a == b and len(p) == len(q) and all(map(is_, p, q)) for (a, p), (b, q) in zip(now, then, strict=True)
    )


def _check_gradients(slots: Sequence[Slot]) -> None:
    for slot in slots:
        if slot.p.grad is not None and slot.p.grad.layout != torch.strided:
            raise ConfigError(
                f"parameter {slot.label!r} has a {slot.p.grad.layout} gradient; a manifold needs a dense one: build the "
                f"embedding with sparse=False, or give it a group without a manifold."
            )


class RiemannianWrapper(Optimizer):
    """A torch optimizer that keeps the parameters of its manifold groups on their manifolds.

    The inner optimizer reads Riemannian gradients and steps as it always does; what it did to a parameter, its
    displacement, is projected to the tangent space and retracted. Groups without a manifold are untouched. The
    wrapper owns no state: ``param_groups``, ``state``, ``defaults`` and ``state_dict()`` are the inner optimizer's.

    Args:
        optimizer: any ``torch.optim.Optimizer`` instance (not LBFGS, not SparseAdam).
        manifold: for the groups that name none themselves; None leaves those Euclidean.
        nonfinite: what a gradient or displacement that is not finite does: "raise" StepError, or "skip" the point.

    A group may carry ``manifold`` (a manifold or its spec), ``orientation`` ("columns" | "rows"; default: tall ->
    columns, wide -> rows, square -> columns), ``view`` ("matrix" | "batch", needed above two dimensions),
    ``displacement_scale`` (a number, or "stella" with ``reference_dim``).

    Raises:
        ConfigError, ShapeError, NotOnManifoldError, UnknownNameError: before anything has changed.

    Cost: six tall products of 2 n p^2 flops beside the inner step; memory for two copies of the constrained
    parameters. Reference: Li et al., StelLA (arXiv 2510.01938), algorithm 1.
    """

    def __init__(
        self, optimizer: Optimizer, manifold: Manifold | Mapping[str, Any] | None = None, *, nonfinite: str = "raise"
    ) -> None:
        self.optimizer = check_optimizer(optimizer)
        self.manifold = None if manifold is None else from_spec(manifold)
        self._core = ManifoldStep(optimizer, nonfinite)
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

    # The inner optimizer's own, never copies.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    # The torch contract

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. The closure, if any, is evaluated once, before anything else; its value is returned.

        Raises:
            StepError: a non-finite gradient (nothing has changed), or a displacement that cannot be retracted
                (the points have not; the inner optimizer's moments have).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._core.before()
            try:
                self.optimizer.step()
            except BaseException:
                self._core.return_gradients()
                self._core.restore_points()
                raise
            self._core.after()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as torch does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with or without a manifold, after the same checks as in the constructor."""
        if not isinstance(param_group, dict):
            raise ConfigError(f"a parameter group is a dict with the key 'params', got {type(param_group).__name__}.")
        group = dict(param_group)
        params = group.get("params")
        if isinstance(params, set):
            raise ConfigError("a set of parameters has no order, and the state would be mixed up on load; pass a list.")
        group["params"] = [params] if isinstance(params, Tensor) else list(params or ())
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
        for group in self.param_groups:
            if isinstance(group.get("manifold"), Manifold):
                group["manifold"].spec()
        state = self.optimizer.state_dict()
        for post in self._optimizer_state_dict_post_hooks.values():
            changed = post(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Load the inner optimizer's state. Where saved and live manifold keys differ, the live ones stay."""
        for pre in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre(self, state_dict)
            state_dict = state_dict if changed is None else changed
        live = [settings_of(group) for group in self.param_groups]
        self.optimizer.load_state_dict(state_dict)
        for i, (group, own) in enumerate(zip(self.param_groups, live, strict=True)):
            saved = settings_of(group)
            if saved != own:
                warnings.warn(
                    f"group {i} was saved with {saved} and is now {own}; the live choice is kept.", stacklevel=2
                )
            for key in saved:
                del group[key]
            group.update(own)
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: as in torch without hooks, and not the step that a scheduler patched in."""
        return {"optimizer": self.optimizer, "manifold": self.manifold, "nonfinite": self._core.nonfinite}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizer, self.manifold = state["optimizer"], state["manifold"]
        self._core = ManifoldStep(self.optimizer, state["nonfinite"])
        self._init_hooks()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"

    # Ours

    def residuals(self) -> dict[object, float]:
        """Drift of every constrained parameter: max |x^T x - I| by parameter name, or by (group, index)."""
        return self._core.residuals()


class _BeforeHook:
    """The step pre-hook of `attach`; a class, so that an attached optimizer can be recognized."""

    def __init__(self, core: ManifoldStep) -> None:
        self._core = core

    @torch.no_grad()
    def __call__(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(a is not None for a in args[1:]) or kwargs.get("closure") is not None:
            raise ConfigError(
                "an attached optimizer takes no closure, since hooks run before it; compute the gradients first and call "
                "step(), or use RiemannianWrapper(optimizer)."
            )
        self._core.before()


class AttachHandle:
    """What `attach` returns: `remove()` takes the behaviour off again."""

    def __init__(self, core: ManifoldStep, hooks: Sequence[Any]) -> None:
        self._core, self._hooks = core, hooks

    def remove(self) -> None:
        """Take the hooks off; the optimizer is Euclidean again."""
        for hook in self._hooks:
            hook.remove()

    def residuals(self) -> dict[object, float]:
        """Drift of every constrained parameter: max |x^T x - I| by parameter name, or by (group, index)."""
        return self._core.residuals()


def attach(optimizer: Optimizer, manifold: Manifold | Mapping[str, Any] | None = None) -> AttachHandle:
    """Install the behaviour of `RiemannianWrapper` as step hooks on an existing optimizer.

    Args:
        optimizer: as for the wrapper. Its step must be called without a closure: hooks cannot run between
            the closure and the step.
        manifold: for the groups that name none themselves.

    Returns:
        A handle with ``remove()`` and ``residuals()``.
    """
    core = ManifoldStep(check_optimizer(optimizer))
    core.adopt_all(None if manifold is None else from_spec(manifold))

    @torch.no_grad()
    def after(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        core.after()

    hooks = optimizer.register_step_pre_hook(_BeforeHook(core)), optimizer.register_step_post_hook(after)
    return AttachHandle(core, hooks)
