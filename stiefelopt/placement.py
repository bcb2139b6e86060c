"""How one parameter lies on its manifold: which way, seen how, moved at what scale. Read from plain group keys."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .distributed import RowSum, is_distributed, local, row_sum, sharded_dims, whole
from .errors import ConfigError, NotOnManifoldError, ShapeError
from .manifolds import Manifold, from_spec
from .shapes import HALF, check_matrix, tolerance

KEYS = (
    "manifold",
    "orientation",
    "view",
    "displacement_scale",
    "reference_dim",
    "gradient",
    "direction",
    "manifold_decay",
)
ORIENTATIONS = ("columns", "rows", "auto")
VIEWS = ("matrix", "batch")
GRADIENTS = ("factors", "projected")
DIRECTIONS = ("plain", "spectral")


@dataclass(frozen=True)
class Placement:
    """What a group says about its parameters."""

    manifold: Manifold
    orientation: str = "auto"
    view: str | None = None
    displacement_scale: float | str = 1.0
    reference_dim: float | None = None
    gradient: str = "factors"
    direction: str = "plain"
    manifold_decay: float = 0.0

    @property
    def needs_rate(self) -> bool:
        """Whether the step asks for the group's learning rate."""
        return self.direction != "plain" or self.manifold_decay > 0

    def matrix_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """(*b, rows, columns) of a parameter of that shape under the view; a vector is one column."""
        if self.manifold.held == "tensor":
            return tuple(shape)
        return (shape[0], math.prod(shape[1:])) if self.view == "matrix" or len(shape) == 1 else tuple(shape)

    def is_rows(self, shape: torch.Size) -> bool:
        """Whether the rows, not the columns, are orthonormal: stated, or a wide matrix."""
        if self.manifold.held == "tensor":
            return False
        rows, columns = self.matrix_shape(shape)[-2:]
        return self.orientation == "rows" or (self.orientation == "auto" and rows < columns)

    def oriented(self, shape: torch.Size) -> Placement:
        """The same, with the orientation of a parameter of that shape said: a shard's own shape does not show it."""
        return replace(self, orientation="rows" if self.is_rows(shape) else "columns")

    def tall_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """(*b, n, p) of a parameter of that shape."""
        found = self.matrix_shape(shape)
        return (*found[:-2], found[-1], found[-2]) if self.is_rows(shape) else found

    def tall_dims(self, shape: torch.Size) -> tuple[int, ...]:
        """The parameter's dimensions that run along n, where cutting leaves rows of the tall matrix whole."""
        if self.view == "matrix":
            return tuple(range(1, len(shape))) if self.is_rows(shape) else (0,)
        return (len(shape) - (1 if self.is_rows(shape) else 2),)

    def of_part(self, index: int) -> Placement:
        """The same for one of the parameters of a point: which way it lies is the manifold's choice."""
        lies = self.manifold.lies
        return replace(self, orientation=lies[index]) if lies else self

    def as_tall(self, t: Tensor) -> Tensor:
        """The points (*b, n, p) in a parameter-shaped tensor; a view of a contiguous one."""
        t = t.reshape(self.matrix_shape(t.shape))
        return t.mT if self.is_rows(t.shape) else t

    def scale(self, shape: torch.Size) -> float:
        """Factor of the displacement: the number given, or StelLA's sqrt(reference_dim / n)."""
        if self.displacement_scale != "stella":
            return float(self.displacement_scale)
        assert self.reference_dim is not None
        return math.sqrt(self.reference_dim / max(self.matrix_shape(shape)[-2:]))


def read_placement(group: Mapping[str, Any]) -> Placement:
    """Check a group's keys and return what they say.

    Raises:
        ConfigError: a key's value is not one of those allowed.
    """
    given = {key: group[key] for key in KEYS if group.get(key) is not None}
    placement = Placement(
        from_spec(given["manifold"]),
        _one_of("orientation", given.get("orientation", "auto"), ORIENTATIONS),
        None if "view" not in given else _one_of("view", given["view"], VIEWS),
        _displacement_scale(given),
        given.get("reference_dim"),
        _one_of("gradient", given.get("gradient", "factors"), GRADIENTS),
        _one_of("direction", given.get("direction", "plain"), DIRECTIONS),
        _decay(given.get("manifold_decay", 0.0)),
    )
    if placement.needs_rate and "lr" in group and group["lr"] is None:
        raise ConfigError(
            "the group's lr is None, as where Adafactor chooses its own (relative_step), and manifold_decay and "
            "direction='spectral' multiply by it: set lr to a number (relative_step=False), or leave them out."
        )
    if placement.manifold.held == "tensor":
        return _as_tensor(placement, given)
    if placement.direction == "spectral" and not hasattr(placement.manifold, "stacked_spectral"):
        raise ConfigError(
            f"direction='spectral' needs a manifold that has stacked_spectral, and {type(placement.manifold).__name__} "
            f"has none; leave 'direction' out of its group."
        )
    return _of_several(placement) if placement.manifold.parts > 1 else _as_matrix(placement, given)


def _as_matrix(placement: Placement, given: Mapping[str, Any]) -> Placement:
    name = type(placement.manifold).__name__
    if "gradient" in given:
        raise ConfigError(
            f"the group key 'gradient' belongs to FixedRank groups; leave it out of a {name} group."
        )
    if placement.manifold_decay:
        raise ConfigError(
            f"manifold_decay shrinks a matrix, and a point of {name} cannot shrink; leave it out, it is for FixedRank."
        )
    return placement


def _as_tensor(placement: Placement, given: Mapping[str, Any]) -> Placement:
    """As it is: which dimensions are a batch, and which way a matrix lies, is the manifold's own business."""
    for key in ("orientation", "view", "gradient", "direction", "manifold_decay", "reference_dim"):
        if given.get(key) not in (None, "columns", "plain", "factors", 0):
            raise ConfigError(
                f"{key}={given[key]!r} does not apply to a {type(placement.manifold).__name__} group, whose parameters "
                f"are points as they lie; leave it out."
            )
    return replace(placement, orientation="columns")


def _of_several(placement: Placement) -> Placement:
    """The parameters of a point lie as their manifold says."""
    name, layout = type(placement.manifold).__name__, placement.manifold.layout
    if placement.orientation == "rows" or placement.view == "matrix":
        raise ConfigError(
            f"the parameters of a {name} group are {layout}: leave out orientation='rows' and view='matrix', and "
            f"store a factor that lies otherwise transposed."
        )
    if placement.displacement_scale == "stella":
        raise ConfigError(
            f"displacement_scale='stella' is for Stiefel groups; in a {name} group use a number, or leave it out."
        )
    if placement.gradient not in placement.manifold.gradients:
        raise ConfigError(
            f"gradient={placement.gradient!r} in a {name} group; only {placement.manifold.gradients[0]!r} arrives "
            f"there, by ordinary autograd: leave it out."
        )
    return replace(placement, orientation="columns")


def _one_of(key: str, value: object, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise ConfigError(f"the group key {key!r} is {value!r}; use {' or '.join(map(repr, allowed))}.")
    return value


def _decay(value: object) -> float:
    if value == 0:
        return 0.0
    if not _positive(value):
        raise ConfigError(f"manifold_decay is {value!r}; a number that is not negative is needed.")
    return float(value)  # type: ignore[arg-type]


def _displacement_scale(given: Mapping[str, Any]) -> float | str:
    scale, reference = given.get("displacement_scale", 1.0), given.get("reference_dim")
    if scale == "stella":
        if not _positive(reference):
            raise ConfigError(
                f"displacement_scale='stella' is sqrt(reference_dim / n) and reference_dim is {reference!r}; put the "
                f"model's hidden size into the group, for example reference_dim=768."
            )
        return "stella"
    if not _positive(scale):
        raise ConfigError(f"displacement_scale is {scale!r}; use a positive number or 'stella'.")
    return float(scale)


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def check_point(label: object, params: Sequence[Tensor], placement: Placement) -> None:
    """Refuse parameters that do not make a point of their manifold.

    Args:
        label: of the first.
        params: one for Stiefel, U, S, V for FixedRank, A, B for FixedRankPair.
        placement: of their group.

    Raises:
        ShapeError, ConfigError: as `check_parameter_shape`. NotOnManifoldError: not orthonormal, S singular.
    """
    for i, p in enumerate(params):
        check_parameter_shape(label, p, placement.of_part(i))
        if p.is_meta:
            raise ConfigError(
                f"{name_of(label)} is on the meta device and has no values yet: materialize the model first (to_empty, "
                f"then reset_parameters or a checkpoint), and make the optimizer after that."
            )
    manifold: Any = placement.manifold
    try:
        if sharding_of(label, params, placement) is None:
            manifold.check(point_of(params, placement))
        else:
            _check_shards(label, params, placement)
    except (NotOnManifoldError, ShapeError) as error:
        rows = manifold.parts == 1 and placement.is_rows(params[0].shape)
        raise type(error)(f"{name_of(label)}{', by its rows' if rows else ''}: {error}") from None


def _check_shards(label: object, params: Sequence[Tensor], placement: Placement) -> None:
    manifold: Any = placement.manifold
    residual = residual_of(label, params, placement)
    allowed = max(tolerance(p.dtype, *placement.tall_shape(p.shape)[-2:]) for p in params)
    if not residual <= allowed:
        raise NotOnManifoldError(
            f"max |x^T x - I| over all ranks is {residual:.2g}, and {allowed:.2g} is allowed: constrain the parameter "
            f"before fully_shard, on ranks seeded alike (it broadcasts nothing), or make it anew with "
            f"reset_parameters() or constrain(..., init='random') after it."
        )
    if manifold.square:
        manifold.check(placement.as_tall(whole(params[0])))
    if manifold.small_parts:
        manifold.check_small([whole(params[i]) for i in manifold.small_parts])


def point_of(params: Sequence[Tensor], placement: Placement) -> Any:
    """The point that the parameters are: a matrix, or the manifold's tuple of several."""
    if placement.manifold.parts > 1:
        return placement.manifold.point_type(*(local(p.detach()) for p in params))
    return placement.as_tall(local(params[0].detach()))


def residual_of(label: object, params: Sequence[Tensor], placement: Placement) -> float:
    """Distance of a point from its constraint, the largest of a batch; the same number on every rank."""
    manifold: Any = placement.manifold
    over = sharding_of(label, params, placement)
    if over is None:
        return manifold.residual(point_of(params, placement)).amax().item()
    stacks = [rows_here(p, placement) for p in params]
    return manifold.stacked_residual(stacks, over).amax().item()


def rows_here(p: Tensor, placement: Placement) -> Tensor:
    """The rows of a sharded parameter's tall matrices that lie on this rank, as one stack (b, n, p)."""
    tall = placement.oriented(p.shape).as_tall(local(p.detach()))
    return tall.reshape(math.prod(tall.shape[:-2]), *tall.shape[-2:])


def sharding_of(label: object, params: Sequence[Tensor], placement: Placement) -> RowSum | None:
    """How Grams of a point are summed over the ranks; None where every rank has all of it.

    Raises:
        ConfigError: sharded in a way, or on a manifold, that would need whole matrices; half precision.
    """
    if not any(map(is_distributed, params)):
        return None
    name = name_of(label)
    first, *others = (row_sum(p) for p in params)
    if first is not None or any(others):
        _check_sums(name, placement)
    for p in params:
        _check_cut(name, p, placement)
    if any(other != first for other in others):
        raise ConfigError(
            f"{name} and the other factors of its point are sharded in different ways; U, S and V must be cut along "
            f"dimension 0 over the same ranks, as fully_shard does, or all be replicated."
        )
    return first


def _check_sums(name: str, placement: Placement) -> None:
    """Refuse to shard what sums of p x p products over ranks do not serve."""
    obstacle, manifold = placement.manifold.whole_part(), type(placement.manifold).__name__
    if obstacle is None:
        return
    instead = "a retraction of p x p algebra ('polar', 'qr', 'cayley', 'exp', 'newton_schulz')"
    raise ConfigError(
        f"{name} is sharded, and {obstacle} needs whole matrices, which the step does not gather: "
        f"{'' if obstacle == manifold else f'use {instead}, or '}keep the parameter whole (Replicate(), or "
        f"fully_shard's ignored_params, and average its gradient over the ranks yourself, which FSDP2 does not)."
    )


def _check_cut(name: str, p: Tensor, placement: Placement) -> None:
    if is_distributed(p) and p.dtype in HALF:
        raise ConfigError(
            f"{name} is a {p.dtype} DTensor; keep parameters in float32 and compute in half precision: "
            f"fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype={p.dtype}))."
        )
    allowed = placement.tall_dims(p.shape)
    wrong = [dim for dim in sharded_dims(p).values() if dim not in allowed]
    if wrong:
        rows, columns = placement.matrix_shape(p.shape)[-2:]
        how = f"cut along dimension {wrong[0]}" if wrong[0] >= 0 else "a sum over ranks (Partial)"
        raise ConfigError(
            f"{name}, {tuple(p.shape)}, is {how}; its {min(rows, columns)} orthonormal "
            f"{'rows' if placement.is_rows(p.shape) else 'columns'} must be cut along the long side, dimension "
            f"{allowed[0]}, to be stepped without gathering: fully_shard(..., shard_placement_fn=lambda p: "
            f"Shard({allowed[0]})) where p is this parameter, or keep it whole (Replicate(), or "
            f"ignored_params, and average its gradient over the ranks yourself, which FSDP2 does not)."
        )


def name_of(label: object) -> str:
    """A parameter in words, by its name or by (group, index)."""
    return f"parameter {label!r}" if isinstance(label, str) else f"parameter {label[1]} of group {label[0]}"  # type: ignore[index]


def check_parameter_shape(label: object, p: Tensor, placement: Placement) -> None:
    """Refuse a parameter that no value would make a point.

    Raises:
        ShapeError: a vector, an integer or complex tensor, an orientation that does not fit.
        ConfigError: more than two dimensions and no view.
    """
    name = name_of(label)
    if placement.manifold.held == "tensor":
        if is_distributed(p):
            raise ConfigError(
                f"{name} is a DTensor, which a {type(placement.manifold).__name__} manifold cannot step; keep it whole."
            )
        placement.manifold.check_shape(name, p)  # type: ignore[attr-defined]
        return
    if p.ndim < (1 if placement.manifold.vectors else 2):
        raise ShapeError(
            f"{name} is a vector of shape {tuple(p.shape)} in a manifold group; matrices are needed (Sphere() takes "
            f"vectors, FixedRank torch.diag(S)): build the groups with stiefelopt.param_groups(model), or give "
            f"vectors a group without 'manifold'."
        )
    if p.ndim > 2 and placement.view is None:
        raise ConfigError(
            f"{name} has {p.ndim} dimensions, {tuple(p.shape)}; say in its group how to see it: view='matrix' (first "
            f"dimension against the rest, for convolutions) or view='batch' (a batch of matrices)."
        )
    rows, columns = placement.matrix_shape(p.shape)[-2:]
    long_side = columns if placement.is_rows(p.shape) else rows
    if long_side < max(rows, columns) and placement.manifold.parts > 1:
        manifold = placement.manifold
        raise ShapeError(
            f"{name} is {rows} x {columns}, and a {type(manifold).__name__} group lists {manifold.layout} with "
            f"r <= m, n: use this order, store it transposed, or use a smaller rank."
        )
    if long_side < max(rows, columns) and not placement.manifold.wide:
        raise ShapeError(
            f"{name} is {rows} x {columns}, and {min(rows, columns)} orthonormal {placement.orientation} at most fit: "
            f"use orientation='{'rows' if rows < columns else 'columns'}', or leave it out, in a group "
            f"of its own (a group's orientation is settled by its first parameters)."
        )
    like = torch.empty(placement.tall_shape(p.shape), dtype=p.dtype, device="meta")
    check_matrix(name, like, wide=placement.manifold.wide)


def resolve_orientation(placement: Placement, shapes: Iterable[torch.Size]) -> str:
    """The word to store in the group: what every parameter's orientation is, "auto" where they differ."""
    words = {"rows" if placement.is_rows(s) else "columns" for s in shapes}
    return words.pop() if len(words) == 1 else "auto"
