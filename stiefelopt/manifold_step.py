"""The eight lines of a Riemannian step, around any torch optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .alarm import Alarm
from .buckets import Bucket, make_buckets
from .distributed import count_ranks
from .errors import ConfigError, StepError, StiefelOptError
from .full_precision import full_precision
from .joint import JointStep
from .manifolds import Manifold, awaits_manifold, carried, from_spec, may_carry, spec_or_live
from .placement import (
    KEYS,
    Placement,
    check_point,
    name_of,
    read_placement,
    residual_of,
    resolve_orientation,
)
from .precision import inner_optimizers, lower_state
from .scratch import Scratch
from .shapes import HALF
from .snapshot import Snapshot
from .stacks import Slot, Stack

# torch's own optimizers whose weight_decay is added to the gradient (L2), unless a flag decouples it.
_COUPLED = ("ASGD", "Adadelta", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
# What torch.optim and most others call an average of gradients, which transport carries along.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")

Settings = dict[str, Any]
# What a group says, its parameters, and which of them have a gradient.
Signed = tuple[Settings, list[Tensor], list[bool]]
# What refuses parameters that make no point, given their label and placement.
Check = Callable[[object, Sequence[Tensor], Placement], None]


def label_of(group: Mapping[str, Any], group_index: int, index: int) -> object:
    """The parameter's name where the group is named, else (group, index)."""
    names = group.get("param_names") or ()
    return names[index] if index < len(names) else (group_index, index)


def settings_of(group: Mapping[str, Any]) -> Settings:
    """A copy of what a group says about its manifold; of the spec too, which may be changed in place."""
    found = {key: group[key] for key in KEYS if key in group}
    return {key: dict(value) if isinstance(value, dict) else value for key, value in found.items()}


def write_specs(state: Mapping[str, Any]) -> None:
    """Let the groups of a state_dict hold specs of their own.

    Raises:
        ConfigError: a group's retraction is a live function, which has none; register it.
    """
    for saved in _saved_groups(state):
        if saved.get("manifold") is not None:
            saved["manifold"] = dict(from_spec(saved["manifold"]).spec())


def _saved_groups(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups in a state_dict. An optimizer around another (Lookahead) keeps that one's state_dict in its own."""
    for found in (state, *state.values()):
        if isinstance(found, Mapping) and "param_groups" in found:
            return found["param_groups"]
    raise ConfigError(f"the optimizer's state_dict holds no param_groups, only {sorted(map(str, state))}.")


class ManifoldStep:
    """The eight lines of a step, around any optimizer: `before` it and `after` it.

    Holds workspaces, never state: twice the bytes of the constrained parameters, and the small
    matrices of the largest bucket.

    Args:
        optimizer: the inner optimizer.
        nonfinite: "raise", "restore" or "skip", see `RiemannianWrapper`.
        moments: names of the first moments in its state.
        join: whether it may be shown a stack of parameters as one; its step must come between `before` and `after`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        nonfinite: str = "raise",
        moments: Sequence[str] = FIRST_MOMENTS,
        *,
        join: bool = False,
    ) -> None:
        if nonfinite not in ("raise", "restore", "skip"):
            raise ConfigError(f"nonfinite is {nonfinite!r}; use 'raise', 'restore' or 'skip'.")
        self.optimizer = optimizer
        self.nonfinite = nonfinite
        self._snapshot = Snapshot(optimizer) if nonfinite == "restore" else None
        if isinstance(moments, str):
            raise ConfigError(f"moments is the string {moments!r}; a list of names is needed: [{moments!r}].")
        self.moments = tuple(moments)
        self.skipped = 0
        self._warned = False
        self._begun = False
        # A skipped point needs what the inner optimizer made of the others a second time.
        self._join = join and nonfinite != "skip"
        self._joint_step = JointStep(optimizer, [])
        self._buckets: list[Bucket] = []
        self._scratch = Scratch()
        self._alarm = Alarm()
        self._unpaired: list[Tensor] = []
        self._withheld: list[tuple[Tensor, Tensor]] = []
        self._signature: list[Signed] | None = None
        self._built_for: list[object] = []
        # A compiled step is the inner optimizer's: ours looks at its data, which breaks it into a hundred graphs.
        self._untraced = tuple(map(torch.compiler.disable, (ManifoldStep._before, ManifoldStep._after)))

    # Groups

    def adopt_all(self, default: Manifold | None = None, check: Check | None = None) -> None:
        """`adopt` every group; a refused one leaves the others as they were."""
        groups = self.optimizer.param_groups
        trial = [dict(group) for group in groups]
        for i, group in enumerate(trial):
            self.adopt(group, i, default, check)
        for group, checked in zip(groups, trial, strict=True):
            group.update(settings_of(checked))

    def adopt(
        self, group: dict[str, Any], index: int, default: Manifold | None = None, check: Check | None = None
    ) -> None:
        """Check one group and store its manifold keys as plain strings and numbers."""
        if "manifold" not in group:
            _check_unnamed(group, index, default)
        if default is not None:
            group.setdefault("manifold", default)
        points = _points(group, index)
        for i, params, placement in points:
            (check or check_point)(label_of(group, index, i), params, placement)
        if points:
            self._check_decay(group, index)
            self._check_state(points, index)
        if group.get("manifold") is None:
            return
        placement = read_placement(group)
        orientation = resolve_orientation(placement, [p.shape for p in group["params"]])
        group.update(manifold=spec_or_live(placement.manifold), orientation=orientation)

    @property
    def _couples_decay(self) -> bool:
        """Whether it is known to add weight decay to the gradient."""
        cls = type(self.optimizer)
        return cls.__module__.startswith("torch.optim") and cls.__name__ in _COUPLED

    def _check_decay(self, group: Mapping[str, Any], index: int) -> None:
        decay = _coupled_decay(group)
        if not decay:
            return
        cls = type(self.optimizer)
        if self._couples_decay:
            raise ConfigError(
                f"group {index} has weight_decay={decay:g}, which {cls.__name__} adds to the gradient (coupled L2): on "
                f"a manifold it only disturbs the moments. Set weight_decay=0 for this group, or use AdamW, whose "
                f"decoupled decay the projection removes."
            )
        if not (self._warned or cls.__module__.startswith("torch.optim")):
            self._warned = True
            warnings.warn(
                f"group {index} has weight_decay={decay:g}; if {cls.__name__} adds it to the gradient, it disturbs the "
                f"moments of a manifold group: set weight_decay=0 there.",
                stacklevel=4,
            )

    def _check_state(self, points: Sequence[tuple[int, list[Tensor], Placement]], index: int) -> None:
        """Refuse to carry along moments that ZeroRedundancyOptimizer keeps out of sight, a part on each rank.

        And half precision in optimizers around others, where the ranks' gradients would no longer be averaged, and
        averages of points, where what becomes of these depends on where each rank came from.
        """
        half = next((p.dtype for _, params, _ in points for p in params if p.dtype in HALF), None)
        if half is not None and inner_optimizers(self.optimizer) and count_ranks() > 1:
            raise ConfigError(
                f"group {index} has {half} parameters, which {type(self.optimizer).__name__}, an optimizer around "
                f"another, can only step if they turn float32 in each step, and that takes them away from "
                f"DistributedDataParallel: keep them in float32 and compute in half precision (torch.autocast), or "
                f"wrap the inner optimizer alone."
            )
        found = (getattr(placement.manifold, "transport", "none") for _, _, placement in points)
        transport = next((name for name in found if name != "none"), None)
        classes = {cls.__name__ for cls in type(self.optimizer).__mro__}
        if "ZeroRedundancyOptimizer" in classes and transport is not None:
            raise ConfigError(
                f"group {index} carries its moments to every new point (transport={transport!r}), and "
                f"ZeroRedundancyOptimizer shows none: use fully_shard, a manifold with transport='none', or, for one "
                f"parameter a point, ZeroRedundancyOptimizer(groups, optimizer_class=lambda params, **options: "
                f"RiemannianWrapper(AdamW(params, **options), nonfinite='skip')): each rank sees its own points alone, "
                f"and would raise alone while the others wait for it."
            )
        if "PostLocalSGDOptimizer" in classes and not all(_forgets_start(p) for _, _, p in points):
            raise ConfigError(
                f"group {index} is on a manifold, and PostLocalSGDOptimizer averages points inside its step: each rank "
                f"would retract that average from its own point, and replicas would never agree. Let "
                f"DistributedDataParallel average gradients in every step, without PostLocalSGDOptimizer, or use "
                f"Stiefel(projection='none', retraction='polar') without a displacement_scale."
            )

    def check_saved(self, state: Mapping[str, Any]) -> None:
        """Refuse what `adopt` would refuse in a group's own settings, before they are loaded."""
        groups = zip(self.optimizer.param_groups, _saved_groups(state), strict=False)
        for i, (group, saved) in enumerate(groups):
            if _points(group, i):
                self._check_decay(saved, i)

    def points(self) -> list[list[Slot]]:
        """The constrained parameters of all groups, as many together as make a point."""
        found = []
        for g, group in enumerate(self.optimizer.param_groups):
            for first, params, placement in _points(group, g):
                labels = [label_of(group, g, first + i) for i in range(len(params))]
                lying = [placement.of_part(i) for i in range(len(params))]
                found.append([Slot(*slot, g) for slot in zip(params, labels, lying, strict=True)])
        return found

    def stepped_points(self) -> list[list[Slot]]:
        """Those that are not empty."""
        return [point for point in self.points() if all(s.p.numel() for s in point)]

    def lower_states(self, points: Sequence[Sequence[Slot]] = ()) -> None:
        """Let half-precision parameters have state of their own dtype, but for those of these points."""
        here = {id(slot.p) for point in points for slot in point}
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            if p.dtype in HALF and id(p) not in here:
                lower_state(self.optimizer, p)

    def live_settings(self) -> list[Settings]:
        """What every group says now, to be kept over a load."""
        return [settings_of(group) for group in self.optimizer.param_groups]

    def keep_settings(self, live: Sequence[Settings]) -> None:
        """After a load: where saved and live manifold keys differ, warn, and let the live ones stay."""
        for i, (group, own) in enumerate(zip(self.optimizer.param_groups, live, strict=True)):
            saved = settings_of(group)
            if saved != own:
                warnings.warn(
                    f"group {i} was saved with {saved} and is now {own}; the live choice is kept.",
                    stacklevel=3,
                )
            for key in saved:
                del group[key]
            group.update(own)

    def residuals(self) -> dict[object, float]:
        """Distance from the constraint of every point, by the label of its first parameter."""
        return {
            slots[0].label: residual_of(slots[0].label, [s.p for s in slots], slots[0].placement)
            if slots[0].p.numel()
            else 0.0
            for slots in self.points()
        }

    @full_precision
    def diagnostics(self) -> dict[str, float]:
        """Norms of the last step, computed when asked for."""
        pairs = [bucket.squared_norms() for bucket in self._buckets]
        gradient, moved = (
            (math.sqrt(sum(squares)) for squares in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
        )
        return {
            "gradient_norm": gradient,
            "displacement_norm": moved,
            "skipped": float(self.skipped + len(self._left_alone())),
        }

    def _current_buckets(self) -> list[Bucket]:
        """The buckets of this step's parameters, made anew whenever groups, parameters or gradients changed."""
        if self._signature is None or not _same(self._sign(), self._signature):
            self.adopt_all(check=_check_present)
            points = self.stepped_points()
            self.lower_states(points)
            whole = [point for point in points if _has_gradients(point)]
            _check_gradients([slot for point in whole for slot in point])
            self._joint_step.dissolve()
            for stack in self._stacks():
                stack.release_moments()
            self.skipped += len(self._left_alone())  # the counts go with the buckets
            self._buckets = make_buckets(
                whole,
                self.optimizer,
                self._scratch,
                join=self._join,
                looks=self.nonfinite == "restore",  # which needs to know before it is too late
            )
            self._joint_step = JointStep(self.optimizer, [j for s in self._stacks() for j in s.joints])
            # A point moves as a whole or not at all.
            self._unpaired = [s.p for point in points if not _has_gradients(point) for s in point]
            self._signature, self._built_for = self._sign(), self._kinds()
        return self._buckets

    def _stacks(self) -> Iterator[Stack]:
        return (stack for bucket in self._buckets for stack in bucket.stacks)

    def _sign(self) -> list[Signed]:
        """What was checked, and what the buckets were made from. Shapes and dtypes show when they are gathered.

        Parameters without a gradient too: the lists that the optimizer is lent and what is withheld name them.
        """
        return [
            (
                # The index: slots and joints know their group by it. A decay that may be refused; what is decoupled
                # a schedule may change freely.
                {
                    **settings_of(group),
                    "index": i,
                    "weight_decay": self._couples_decay and _coupled_decay(group),
                },
                list(group["params"]),
                [p.grad is not None for p in group["params"]],
            )
            for i, group in enumerate(self.optimizer.param_groups)
            if group.get("manifold") is not None or any(map(may_carry, group["params"]))
        ]

    # The step

    def before(self) -> None:
        """Turn gradients into Riemannian ones, in workspaces that the optimizer then reads.

        Raises:
            StepError: a gradient is not finite; nothing has changed. On an accelerator: one was not in the step
                before, or a displacement.
        """
        self._untraced[0](self, torch.compiler.is_compiling())

    @full_precision
    def _before(self, compiling: bool) -> None:
        self.recover()
        self._hear()
        buckets = self._current_buckets()
        try:
            self._convert(buckets, compiling)
        except (RuntimeError, TypeError) as error:
            # What torch says when it gathers a parameter whose shape or dtype was changed behind its name, or whose
            # gradient has become sparse: begin again, with all the checks. Where a rank is lost there is no again.
            if isinstance(error, StiefelOptError) or self._kinds() == self._built_for:
                raise
            self._signature = None
            self._convert(self._current_buckets(), compiling)

    def _kinds(self) -> list[object]:
        """What the stacks take for granted of their parameters and gradients."""
        params = [p for stack in self._stacks() for p in stack.params]
        return [(p.stride(), *[t if t is None else _kind(t) for t in (p, p.grad)]) for p in params]

    def _hear(self) -> None:
        """What accelerators have left alone in the step before."""
        if not self._alarm.rings():
            return
        bad = self._left_alone()
        self.skipped += len(bad)
        for bucket in self._buckets:
            bucket.forget_left()
        if bad:
            raise StepError(
                f"in the step before this one the gradient of {bad[0].label!r}, or the displacement that the inner "
                f"optimizer made of it, was not finite or too long to be retracted there (or the point is not finite); "
                f"the point has kept its value, all else has been stepped, and this step has changed nothing. Lower "
                f"the learning rate, clip, or pass nonfinite='skip' to leave such points alone, or 'restore' to be "
                f"told at once."
            )

    def _left_alone(self) -> list[Slot]:
        return [slot for bucket in self._buckets for slot in bucket.left_alone()]

    def _convert(self, buckets: list[Bucket], compiling: bool) -> None:
        bad = [slot for bucket in buckets for slot in bucket.convert_gradients()]
        if bad and self.nonfinite != "skip":
            raise StepError(
                f"the gradient (or the point) of {bad[0].label!r} is not finite, or too large to be "
                f"converted; nothing has changed. Lower the learning rate, clip, or pass nonfinite='skip' to "
                f"leave such points alone."
            )
        self.skipped += len(bad)
        refused = {id(slot.p) for slot in bad}
        if self._snapshot is not None:
            self._snapshot.take()
        self._begun = True
        try:
            joined = not (refused or compiling) and self._joint_step.enter()
            for stack in self._stacks():
                # Without a gradient the optimizer leaves the parameter alone, and a zero displacement moves no bit.
                stack.lend(refused, joined=joined)
            self._withheld = [(p, p.grad) for p in self._unpaired if p.grad is not None]
            for p, _ in self._withheld:
                p.grad = None
        except BaseException:
            self.undo()
            raise

    def after(self) -> None:
        """Bring the parameters back to their manifolds, and their own gradients back to them.

        Raises:
            StepError: a displacement is not finite or cannot be retracted; every point is where it was.
        """
        self._untraced[1](self)

    @full_precision
    def _after(self) -> None:
        self._begun = False
        self.return_gradients()
        try:
            for bucket in reversed(self._buckets):  # the last parameters stepped are still in the cache
                bad = bucket.move(skip_bad=self.nonfinite == "skip", moments=self.moments)
                self.skipped += len(bad)
        except BaseException as error:
            self.restore_points()
            if isinstance(error, StepError):
                what = "The points were" if self._snapshot is None else "Everything was"
                raise StepError(
                    f"{str(error).rstrip('.')}. {what} put back to where it was before the step."
                ) from None
            raise

        if self.nonfinite != "skip":
            self._alarm.send([bucket.left for bucket in self._buckets if not bucket.looks])

    def return_gradients(self) -> None:
        """Undo what `before` did to the gradients."""
        for stack in self._stacks():  # before the joints: stand-ins went into their lists
            stack.return_gradients()
        self._joint_step.leave()
        self._return_withheld()

    def _return_withheld(self) -> None:
        for p, grad in self._withheld:
            if p.grad is None:
                p.grad = grad
        self._withheld = []

    def restore_points(self) -> None:
        """Put every point back to where it was before the step; with "restore", all else that the step changes."""
        if self._snapshot is not None:
            self._snapshot.put_back()
        for stack in self._stacks():
            stack.restore()

    def undo(self) -> None:
        """Put gradients and points back: the inner step has raised."""
        self._begun = False
        self.return_gradients()
        self.restore_points()

    def recover(self) -> None:
        """`undo` as soon as we hear of it: torch runs no hook when a step raises, and the user may have gone on."""
        if self._begun:
            self._begun = False
            self._return_withheld()
            for stack in self._stacks():
                stack.recover()


def _coupled_decay(group: Mapping[str, Any]) -> float:
    """The group's weight decay, unless it says that it is decoupled, or lies on an accelerator: no look at it there."""
    decay = group.get("weight_decay", 0)
    if isinstance(decay, Tensor):
        decay = decay.item() if decay.device.type == "cpu" and decay.numel() == 1 else 0.0
    return 0.0 if group.get("decoupled_weight_decay") else decay or 0.0


def _forgets_start(placement: Placement) -> bool:
    """Whether a new point depends on where the inner optimizer left it, and not on where it was before."""
    return placement.displacement_scale == 1 and getattr(placement.manifold, "_normalizes_moved", False)


def _points(group: Mapping[str, Any], index: int) -> list[tuple[int, list[Tensor], Placement]]:
    """(index of the first, the parameters, how they lie) of every point of a group.

    Where the group names no manifold, these are the parameters that carry one themselves.
    """
    params = list(group["params"])
    if group.get("manifold") is None:
        own = [(i, p, carried(p)) for i, p in enumerate(params)]
        return [(i, [p], read_placement({**group, "manifold": m})) for i, p, m in own if m is not None]
    placement = read_placement(group)
    parts = placement.manifold.parts
    if len(params) % parts:
        raise ConfigError(
            f"group {index} is on {type(placement.manifold).__name__} and lists {len(params)} parameters; its points "
            f"are consecutive {placement.manifold.layout}: build the groups with stiefelopt.param_groups(model), or "
            f"list all {parts}."
        )
    return [(i, params[i : i + parts], placement) for i in range(0, len(params), parts)]


def _check_unnamed(group: Mapping[str, Any], index: int, default: Manifold | None) -> None:
    """Refuse to leave out the manifold that a parameter was given, or to put another in its place, in silence."""
    way_out = "build the groups with stiefelopt.param_groups(model), or name the group's manifold"
    if default is not None and any(map(carried, group["params"])):
        raise ConfigError(
            f"group {index} names no manifold and holds parameters that carry their own, which the wrapper's default "
            f"would replace: {way_out}."
        )
    for i, p in enumerate(group["params"]):
        if awaits_manifold(p):
            raise ConfigError(
                f"{name_of(label_of(group, index, i))}, {tuple(p.shape)}, was put on a manifold (by constrain, adapt "
                f"or an attribute), and its group names none: {way_out} (None to step it without)."
            )


def _same(now: Sequence[Signed], then: Sequence[Signed]) -> bool:
    return len(now) == len(then) and all(
        a == b
        and some == others
        and all(map(is_, p, q))  # as many parameters, if as many are said to have gradients
        for (a, p, some), (b, q, others) in zip(now, then, strict=True)
    )


def _kind(t: Tensor) -> object:
    return type(t), t.layout, t.dtype, t.shape, t.device


def _check_present(label: object, params: Sequence[Tensor], placement: Placement) -> None:
    """`check_point` between steps, when a frozen parameter may be offloaded, an empty tensor in its place."""
    if any(p.numel() or p.grad is not None for p in params):
        check_point(label, params, placement)


def _has_gradients(point: Sequence[Slot]) -> bool:
    return all(slot.p.grad is not None for slot in point)


def _check_gradients(slots: Sequence[Slot]) -> None:
    for slot in slots:
        assert slot.p.grad is not None
        if slot.p.grad.layout != torch.strided:
            raise ConfigError(
                f"parameter {slot.label!r} has a {slot.p.grad.layout} gradient; a manifold needs a "
                "dense one: build the "
                f"embedding with sparse=False, or give it a group without a manifold."
            )
