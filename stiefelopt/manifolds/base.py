"""What every manifold is: frozen, stateless, shape-free, printable, and writable as plain strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError, StepError, UnknownNameError
from ..gram import Tall, largest_entries, subtract_points
from ..registry import Registry
from ..retractions import OpenSum
from ..shapes import check_returned
from ..transforms import host_can_look

M = TypeVar("M", bound="Manifold")
T = TypeVar("T")

_registry: Registry[type[Manifold]] = Registry("manifold")
names, get = _registry.names, _registry.get


# From (indices of the stacks, the new points, what lives at the old ones) to what lives at the new ones, which may be
# the same tensors, overwritten.
Carry = Callable[[Sequence[int], Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


class Carrier(NamedTuple):
    """Carries an optimizer's moments to the new points: first moments as vectors, second ones as variances.

    None where these stay as they are.
    """

    vectors: Carry
    variances: Carry | None = None


def carrier_from(
    make: Callable[[Sequence[int], Sequence[Tensor]], T],
    vectors: Callable[[T, Sequence[Tensor]], Sequence[Tensor]],
    variances: Callable[[T, Sequence[Tensor]], Sequence[Tensor]],
) -> Carrier:
    """A `Carrier` whose parts share what `make` knows of old and new points, made once for each set of stacks."""
    made: dict[tuple[int, ...], T] = {}

    def carry(by: Callable[[T, Sequence[Tensor]], Sequence[Tensor]]) -> Carry:
        def apply(index: Sequence[int], ys: Sequence[Tensor], vs: Sequence[Tensor]) -> Sequence[Tensor]:
            key = tuple(index)
            if key not in made:
                made[key] = make(index, ys)
            return by(made[key], vs)

        return apply

    return Carrier(carry(vectors), carry(variances))


@dataclasses.dataclass(frozen=True)
class Manifold:
    """Base of the manifolds. A subclass is a frozen dataclass whose fields are strings and numbers.

    A manifold of one's own needs the methods that all others have (API: check, residual, gradient, project_tangent,
    retract, ...), batched. The optimizer's step is then made of gradient, project_tangent and retract, and of
    transport_vector where it has an option ``transport`` that is not "none": neither fused nor sharded.

    Attributes:
        parts: how many parameters make a point, listed one after the other in a group.
        layout: where several do, their names and shapes in the order of the group, for errors.
        lies: and which way each of them lies, "columns" or "rows".
        point_type: and the tuple that they are a point as.
        gradients: what gradients may arrive, the first by default; see the group key "gradient".
        held: how a parameter holds a point: "matrix" (tall, or the transpose of a wide one), "tensor" (in any shape
            that ``check_shape`` accepts; leading dimensions are a batch).
        vectors: whether a vector is a point, n x 1.
        wide: whether a point may have fewer rows than columns.
        recognized: whether a point can be told from what an inner optimizer's step makes of it, one parameter at a
            time.
        square: whether points are p x p, and ``check`` must see one whole.
        small_parts: which of them are p x p, and whole on every rank when the others are sharded.
        takes_small: whether ``stacked_gradient`` and ``stacked_overlap`` take ``small``, memory (B, p, p) for what they
            return.
    """

    parts: ClassVar[int] = 1
    layout: ClassVar[str] = ""
    lies: ClassVar[tuple[str, ...]] = ()
    point_type: ClassVar[Any] = None
    gradients: ClassVar[tuple[str, ...]] = ("factors",)
    held: ClassVar[str] = "matrix"
    vectors: ClassVar[bool] = False
    wide: ClassVar[bool] = False
    recognized: ClassVar[bool] = True
    square: ClassVar[bool] = False
    small_parts: ClassVar[tuple[int, ...]] = ()
    takes_small: ClassVar[bool] = False

    @staticmethod
    def fits(shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape of points near to the shape (*b, n, p) of a tall matrix: where the laws can be tried."""
        return shape

    @property
    def is_contained(self) -> bool:
        """Whether NaN in a moved matrix reaches the new point of that matrix and nothing else.

        A manifold that says so takes ``judge`` in `stacked_move`.
        """
        return False

    def square_of_points(self, shape: tuple[int, ...]) -> int | None:
        """||x||_F^2 of every point of this shape, which has no batch; None where it differs from point to point."""
        return None

    def whole_part(self) -> str | None:
        """What of this manifold needs whole matrices, in words; None where sums over ranks of p x p products do.

        A manifold that says None takes ``reduce`` in all its stacked functions, and has ``stacked_residual``.
        """
        return type(self).__name__

    # The beats of the optimizer's step, on stacks of several heights, by the methods for single points

    def stacked_gradient(self, xs: Tall, gs: Tall, *, arriving: str = "factors") -> Tensor:
        """Overwrite the stacks gs by Riemannian gradients; returns the largest entries before and after, (B, 1, 1)."""
        shown = _shown(gs)
        for x, g in zip(xs, gs, strict=True):
            g.copy_(self._converted(x, g))
        return torch.maximum(shown, _shown(gs))

    def stacked_overlap(self, xs: Tall, ms: Tall) -> Tensor:
        """Overwrite the moved points ms by displacements; returns their largest entries, (B, 1, 1)."""
        subtract_points(xs, ms)
        return _shown(ms)

    def stacked_move(
        self,
        xs: Tall,
        ms: Tall,
        e: Tensor,
        scales: Sequence[float],
        *,
        drift: float,
    ) -> list[OpenSum]:
        """Scale and project the displacements that `stacked_overlap` left in ms, and retract them: the new points.

        Raises:
            StepError: a new point is not finite.
        """
        ys = [self._moved(x, d * s) for x, d, s in zip(xs, ms, scales, strict=True)]
        for y in ys:
            if host_can_look(y) and not bool(torch.isfinite(y).all()):
                raise StepError(f"{self} cannot retract so long a step; lower the learning rate or clip")
        return [(y, None) for y in ys]

    def _converted(self, x: Tensor, g: Tensor) -> Tensor:
        """The Riemannian gradient; g may be overwritten."""
        return self._own("gradient", x, g)

    def _moved(self, x: Tensor, d: Tensor) -> Tensor:
        """The new points of displacements d that need not be tangent; x bit for bit where a parameter has not moved."""
        y = self._own("retract", x, self._own("project_tangent", x, d))
        still = (d == 0).flatten(1).all(1).view(-1, *[1] * (d.ndim - 1))
        return torch.where(still, x, y)

    def stacked_transporter(self, xs: Tall, ms: Tall, scales: Sequence[float]) -> Carrier | None:
        """What carries first moments to the new points; None where there is no transport."""
        if getattr(self, "transport", "none") == "none":
            return None
        us = [self._own("project_tangent", x, d * s) for x, d, s in zip(xs, ms, scales, strict=True)]

        def carry(index: Sequence[int], ys: Sequence[Tensor], vs: Sequence[Tensor]) -> list[Tensor]:
            return [
                self._own("transport_vector", xs[i], us[i], y, v)
                for i, y, v in zip(index, ys, vs, strict=True)
            ]

        return Carrier(carry)

    def stacked_distance(self, xs: Tall, ys: Tall) -> float:
        """Sum of ||y - x||_F^2."""
        return sum((y - x).abs().square().sum().item() for x, y in zip(xs, ys, strict=True))

    def _own(self, method: str, x: Tensor, *vectors: Tensor) -> Tensor:
        """The result of a method of the subclass, on stacks."""
        if not hasattr(self, method):
            raise ConfigError(f"{type(self).__name__} has no method {method!r}, of which the step is made.")
        found = getattr(self, method)(x, *vectors)
        return check_returned(
            type(self).__name__, method, found, x.shape, "it is called with stacks, (B, n, p)"
        )

    def replace(self: M, **changes: Any) -> M:
        """A copy with some options changed, for example ``m.replace(retraction="qr")``."""
        try:
            return dataclasses.replace(self, **changes)
        except TypeError:
            known = [f.name for f in dataclasses.fields(self)]
            wrong = [k for k in changes if k not in known]
            if not wrong:
                raise
            raise ConfigError(
                f"{type(self).__name__} has no option {wrong[0]!r}; it has: {', '.join(known)}."
            ) from None

    def spec(self) -> dict[str, str | int | float | bool]:
        """The manifold as a flat dict of strings and numbers, which `from_spec` reads back.

        Raises:
            ConfigError: an option is a live function, which must be registered under a name first, or no plain value.
            UnknownNameError: the class is not registered.
        """
        if get(type(self).__name__) is not type(self):
            raise ConfigError(
                f"another class is registered as manifold {type(self).__name__!r}; give this one a name of its own."
            )
        spec: dict[str, str | int | float | bool] = {"manifold": type(self).__name__}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if callable(value):
                raise ConfigError(
                    f"{f.name}={value!r} is a plain function, which no checkpoint can hold; register it with "
                    f"@stiefelopt.{f.name}s.register('name') and pass the name."
                )
            if not isinstance(value, (str, int, float, bool)):
                raise ConfigError(
                    f"{f.name} of {type(self).__name__} is a {type(value).__name__}, which the plain groups of a "
                    f"checkpoint cannot hold: let the option be a number or a name, and make the rest from it."
                )
            spec[f.name] = value
        return spec


def _shown(stacks: Tall) -> Tensor:
    """The largest entry of every parameter, (B, 1, 1), in which NaN and Inf show."""
    return torch.cat([largest_entries(t) for t in stacks])[:, None, None]


def register(name: str) -> Callable[[type[M]], type[M]]:
    """Class decorator that adds a manifold; the class name must equal the registered name.

    Raises:
        ConfigError: not a name, or one that is taken or not the class's; options that are no fields; methods that the
            optimizer's step would not call.
    """
    _registry.check_name(name)

    def add(cls: type[M]) -> type[M]:
        if name != cls.__name__:
            raise ConfigError(
                f"manifold class {cls.__name__} is registered as {name!r}; the two names must be equal."
            )
        if "__init__" in vars(cls) and "__dataclass_fields__" not in vars(cls):
            raise ConfigError(
                f"{name} has an __init__ of its own, and its options would be lost in spec() and every checkpoint: "
                f"decorate it with @dataclass(frozen=True) and let them be fields."
            )
        _check_overrides(cls)
        _registry.add(name, cls)
        return cls

    return add


# What the generic step of `Manifold` calls, by the function of the step that calls it.
_CALLED_BY = {
    "gradient": "stacked_gradient",
    "project_tangent": "stacked_move",
    "retract": "stacked_move",
    "transport_vector": "stacked_transporter",
}


def _check_overrides(cls: type[Manifold]) -> None:
    """Refuse to ignore a method: a subclass of Stiefel has Stiefel's step, whatever its own ``retract`` says."""
    for method, beat in _CALLED_BY.items():
        ours, caller = _definer(cls, method), _definer(cls, beat)
        if ours is not None and caller is not Manifold and ours is not caller and issubclass(ours, caller):
            raise ConfigError(
                f"{cls.__name__} has a {method} of its own, and the step that it inherits from {caller.__name__} does "
                f"not call it: define {beat} as well, or derive the class from stiefelopt.manifolds.Manifold, whose "
                f"step is made of gradient, project_tangent and retract."
            )


def _definer(cls: type, name: str) -> Any:
    return next((base for base in cls.__mro__ if name in vars(base)), None)


def spec_or_live(manifold: Manifold) -> dict[str, str | int | float | bool] | Manifold:
    """The manifold as a spec; itself where an option keeps it from being one, as a live function does.

    Raises:
        UnknownNameError: its class is not registered.
    """
    try:
        return manifold.spec()
    except ConfigError:
        return manifold


def from_spec(spec: Mapping[str, Any] | Manifold) -> Manifold:
    """The manifold that ``m.spec()`` described.

    Raises:
        ConfigError: not a spec. UnknownNameError: a name in it is not registered (import what registers it).
    """
    if isinstance(spec, Manifold):
        return spec
    if type(spec).__module__.partition(".")[0] == "geoopt":
        raise ConfigError(f"{spec!r} is geoopt's: pass stiefelopt.integrations.geoopt.from_geoopt(manifold).")
    if not isinstance(spec, Mapping) or "manifold" not in spec:
        raise ConfigError(
            f"a manifold or its spec (a dict with the key 'manifold') is needed, got {spec!r}; "
            f"use for example Stiefel() or Stiefel().spec()."
        )
    options = {k: v for k, v in spec.items() if k != "manifold"}
    try:
        return get(spec["manifold"])(**options)
    except TypeError as error:
        if isinstance(error, (ConfigError, UnknownNameError)):
            raise
        raise ConfigError(f"the spec {dict(spec)!r} does not fit {spec['manifold']}: {error}") from None
