"""What every manifold is: frozen, stateless, shape-free, printable, and writable as plain strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor

from ..errors import ConfigError, UnknownNameError
from ..registry import Registry

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
            ConfigError: an option is a live function; register it under a name first.
        """
        spec: dict[str, str | int | float | bool] = {"manifold": type(self).__name__}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, (str, int, float, bool)):
                raise ConfigError(
                    f"{f.name}={value!r} is a plain function, which no checkpoint can hold; register it with "
                    f"@stiefelopt.{f.name}s.register('name') and pass the name."
                )
            spec[f.name] = value
        return spec


def register(name: str) -> Callable[[type[M]], type[M]]:
    """Class decorator that adds a manifold; the class name must equal the registered name."""

    def add(cls: type[M]) -> type[M]:
        if name != cls.__name__:
            raise ConfigError(
                f"manifold class {cls.__name__} is registered as {name!r}; the two names must be equal."
            )
        _registry.add(name, cls)
        return cls

    return add


def from_spec(spec: Mapping[str, Any] | Manifold) -> Manifold:
    """The manifold that ``m.spec()`` described.

    Raises:
        ConfigError: not a spec. UnknownNameError: a name in it is not registered (import what registers it).
    """
    if isinstance(spec, Manifold):
        return spec
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
