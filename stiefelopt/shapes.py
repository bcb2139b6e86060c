"""What a public function accepts: checked, lifted from half precision, flattened to one stack, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import index

import torch
from torch import Tensor

from .errors import ShapeError, StepError
from .full_precision import full_precision

HALF = (torch.float16, torch.bfloat16)
REAL = (*HALF, torch.float32, torch.float64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic runs in: half precision is lifted to float32."""
    return torch.float32 if dtype in HALF else dtype


def tolerance(dtype: torch.dtype, n: int, p: int) -> float:
    """The largest max |x^T x - I| that still counts as orthonormal, for n x p in that dtype.

    10 eps sqrt(n p); for a half-precision point, which is the rounding of an exact one, 4 eps / sqrt(n), at
    least 2 eps.
    """
    eps = torch.finfo(dtype).eps
    return max(4 * eps / math.sqrt(n), 2 * eps) if dtype in HALF else 10 * eps * math.sqrt(n * p)


def as_sizes(shape: tuple[object, ...], form: str) -> tuple[int, ...]:
    """(n, p) or ((n, p),), as in torch.randn.

    Args:
        shape: what was given.
        form: what is needed, with an example.

    Raises:
        ShapeError: fewer than two dimensions, or a size that is no number from 0 on.
    """
    if len(shape) == 1 and isinstance(shape[0], Iterable):
        shape = tuple(shape[0])
    if len(shape) < 2:
        raise ShapeError(f"the shape {shape} has fewer than two dimensions; give {form}.")
    try:  # numpy's integers, too, and sizes that are being traced
        sizes = tuple(size if isinstance(size, torch.SymInt) else index(size) for size in shape)  # type: ignore[arg-type]
    except TypeError:
        sizes = (-1,)
    if not all(size >= 0 for size in sizes):
        raise ShapeError(f"the shape {shape} has a size that is no integer from 0 on; give {form}.")
    return sizes  # type: ignore[return-value]


def check_matrix(name: str, x: object, *, wide: bool = False) -> Tensor:
    """Refuse what is not a real floating-point tensor (*b, n, p) with n >= p >= 1, or n < p where wide ones fit."""
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} is a {type(x).__name__}; a torch tensor (*b, n, p) is needed.")
    if x.is_complex():
        raise ShapeError(
            f"{name} is {x.dtype}; only real matrices are supported. Constrain the real matrix "
            f"[[Re, -Im], [Im, Re]] instead."
        )
    if x.dtype not in REAL:
        raise ShapeError(f"{name} is {x.dtype}; a floating-point dtype is needed: call .float() first.")
    if x.ndim < 2:
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}; a matrix (*b, n, p) is needed: use [:, None] for p = 1."
        )
    n, p = x.shape[-2:]
    if p < 1 or (n < p and not wide):
        raise ShapeError(
            f"{name} has shape {tuple(x.shape)}; n >= p >= 1 is needed: pass the transpose, "
            f"{name}.mT, of a wide matrix."
        )
    return x


def check_pair(name: str, x: Tensor, other_name: str, other: object) -> None:
    """Refuse a second argument whose shape, dtype or device differs from the point's."""
    if not isinstance(other, Tensor):
        raise ShapeError(f"{other_name} is a {type(other).__name__}; a tensor like {name} is needed.")
    for what in ("shape", "dtype", "device"):
        given, needed = getattr(other, what), getattr(x, what)
        if given != needed:
            given, needed = (tuple(given), tuple(needed)) if what == "shape" else (given, needed)
            way_out = "use expand or reshape" if what == "shape" else "convert it with .to(...)"
            raise ShapeError(
                f"{other_name} has {what} {given}, {name} has {needed}; they must agree: {way_out}."
            )


def check_returned(family: str, name: str, found: object, shape: tuple[int, ...], called: str) -> Tensor:
    """Refuse what somebody's own function returned, where it is no tensor of the shape needed.

    Args:
        family: what the function is, "retraction" for example.
        name: and its name.
        found: what it returned.
        shape: what is needed.
        called: how it is called and what it should return, in words.

    Raises:
        StepError: it is something else.
    """
    if isinstance(found, Tensor) and found.shape == shape:
        return found
    given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise StepError(f"{family} {name!r} returned {given}, and {tuple(shape)} is needed: {called}.")


def check_count(family: str, name: str, found: object, parts: Sequence[str]) -> Sequence[object]:
    """Refuse what somebody's own function returned, where it is not one result for each of the parts.

    Raises:
        StepError: it is something else.
    """
    if isinstance(found, (tuple, list)) and len(found) == len(parts):
        return found
    given = f"{len(found)} results" if isinstance(found, (tuple, list)) else type(found).__name__
    raise StepError(f"{family} {name!r} returned {given}, and {len(parts)} are needed: {', '.join(parts)}.")


def as_stacks(**tensors: Tensor) -> list[Tensor]:
    """Check the named tensors (the first is the point) and return each as one stack (B, n, p)."""
    (first, x), *others = tensors.items()
    check_matrix(first, x)
    for name, other in others:
        check_pair(first, x, name, other)
    dtype = compute_dtype(x.dtype)
    return [t.to(dtype).reshape(-1, *x.shape[-2:]) for t in tensors.values()]


@full_precision
def on_stacks(f: Callable[..., Tensor], **tensors: Tensor) -> Tensor:
    """Apply a function of stacks (B, n, p) -> (B, n, p) to tensors of any batch shape and dtype."""
    x = next(iter(tensors.values()))
    return f(*as_stacks(**tensors)).reshape(x.shape).to(x.dtype)
