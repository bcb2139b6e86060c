"""What a law is, whatever the manifold: how a claim is made, how it breaks, how an order is measured."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import StepError
from .manifolds import Manifold, from_spec

Law = Callable[..., None]

DTYPES = (torch.float32, torch.float64)
SCALES = (1e-6, 1e-2, 1.0, 1e2)
# A step that no training makes, but that must not end in NaN.
HUGE = 1e4
# The largest residual after thousands of steps, in eps: 5e-6 in float32.
DRIFT = 5e-6 / torch.finfo(torch.float32).eps


class Broken(Exception):
    """A claim that does not hold; `law` adds which and where."""


def law_at(make_case: Callable[[], Any]) -> Callable[[Law], Law]:
    """Decorator of a law: a broken claim ends in an AssertionError that begins with the law's name.

    A StepError, of a part that refuses a step within its radius, stays one and is named likewise.

    Args:
        make_case: the case that the law is tried at where none is given.
    """

    def law(function: Law) -> Law:
        @functools.wraps(function)
        def checked(m: Any, case: Any = None, **options: Any) -> None:
            case = make_case() if case is None else case
            try:
                function(m, case, **options)
            except Broken as broken:
                raise AssertionError(f"{function.__name__}: {broken}; for {m!r} at {case}") from None
            except StepError as error:
                raise StepError(
                    f"{function.__name__}: {error}; a part that takes no such steps declares radius=; "
                    f"for {m!r} at {case}"
                ) from error

        return checked

    return law


def at_most(claim: str, error: Tensor | float, bound: float) -> None:
    """The claim holds where |error| <= bound; NaN breaks it."""
    if isinstance(error, Tensor):
        error = error.detach().abs().amax().item() if error.numel() else 0.0
    if not error <= bound:
        raise Broken(f"{claim}: off by {error:.3g}, {bound:.3g} is allowed")


def holds(claim: str, truth: bool) -> None:
    """The claim holds where it is true."""
    if not truth:
        raise Broken(f"{claim}: it is not so")


def matrix_norms(z: Tensor) -> Tensor:
    """Frobenius norms, (*b, 1, 1)."""
    return torch.linalg.matrix_norm(z, keepdim=True)


def rescaled(z: Tensor, norm: float) -> Tensor:
    """Every matrix at that Frobenius norm; rounding noise about zero becomes zero."""
    size = matrix_norms(z)
    return torch.where(size > 1e-8, z * (norm / size.clamp_min(1e-8)), torch.zeros_like(z))


def slope(ts: Sequence[float], errors: Sequence[float], floor: float = 1e-14) -> float:
    """Exponent k of errors ~ t^k, by regression of the logarithms.

    Args:
        ts: positive step lengths.
        errors: one for each; those below the floor are left out.
        floor: where rounding begins.

    Returns:
        The exponent; ``math.inf`` where fewer than three errors lie above the floor.
    """
    points = [(math.log(t), math.log(e)) for t, e in zip(ts, errors, strict=True) if e > floor]
    if len(points) < 3:
        return math.inf
    t, e = torch.tensor(points, dtype=torch.float64).mT
    return (((t - t.mean()) * (e - e.mean())).sum() / (t - t.mean()).square().sum()).item()


def check_slope(what: str, error: Callable[[Tensor], Tensor], order: float | None, shows: bool) -> None:
    """|error(t)| ~ t^(order + 1): not less, and for order 1 not more where that shows; undeclared: at least 1."""
    k = slope_of(error, torch.arange(-3.75, -1.75, 0.25))
    declared = 1 if order is None else order
    holds(f"{what} has slope {k:.2f}, order {declared:g} needs {declared + 0.7:g}", k >= declared + 0.7)
    if order == 1 and shows:
        holds(
            f"{what} has slope {k:.2f}, which is more than the declared order 1 (the default; say 2)", k < 2.5
        )


def slope_of(error: Callable[[Tensor], Tensor], exponents: Tensor) -> float:
    """`slope` of a function of step lengths (k, 1, 1), which returns the norms of k matrices."""
    ts = 10.0 ** exponents.double()
    return slope(ts.tolist(), error(ts[:, None, None]).flatten().tolist())


def check_spec(m: Manifold) -> None:
    """A manifold survives being written as plain strings and numbers, also through torch.load(weights_only=True)."""
    spec = m.spec()
    holds("spec() is plain", all(type(v) in (str, int, float, bool) for v in spec.values()))
    file = io.BytesIO()
    torch.save(spec, file)
    file.seek(0)
    for copy in (from_spec(spec), from_spec(torch.load(file, weights_only=True)), m.replace()):
        holds("from_spec(m.spec()) == m", copy == m and hash(copy) == hash(m))
