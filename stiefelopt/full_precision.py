"""Arithmetic in the precision of what is given, whatever autocast and torch's settings for products say.

Models are trained with autocast, TF32 or bfloat16 products (``torch.set_float32_matmul_precision("high")``). Points
computed so would lie 1e-4 to 1e-3 off their manifold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu")
# Only what this build of torch multiplies with: a look takes 2 us.
_PRODUCTS: tuple[Any, ...] = (
    *((torch.backends.cuda.matmul,) if torch.backends.cuda.is_built() else ()),
    *((torch.backends.mkldnn.matmul,) if torch.backends.mkldnn.is_available() else ()),  # type: ignore[attr-defined]
)

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(f: Callable[P, R]) -> Callable[P, R]:
    """Let a function compute without autocast, and multiply float32 matrices in float32.

    The settings for products belong to the process: other threads see the change while the function runs. A compiler
    sees none: it compiles products as they are set.
    """

    @functools.wraps(f)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return exact(*args, **kwargs)
        if not torch.compiler.is_compiling() and _rounded_products():
            with _exact_products():
                return f(*args, **kwargs)
        return f(*args, **kwargs)

    return exact


def _rounded_products() -> bool:
    """Whether float32 products may be computed in TF32 or bfloat16."""
    for products in _PRODUCTS:  # noqa: SIM110 - a generator is a third of the time
        if products.fp32_precision not in ("none", "ieee"):
            return True
    return False


@contextmanager
def _exact_products() -> Iterator[None]:
    """Float32 products in float32, and after them the settings as they were."""
    kept = [(products, products.fp32_precision) for products in _PRODUCTS]
    # torch holds this word beside its newer settings, and raises at its own users where the two disagree.
    word = _overall_word()
    if word is not None:
        torch.set_float32_matmul_precision("highest")
    for products, _ in kept:
        products.fp32_precision = "ieee"
    try:
        yield
    finally:
        if word is not None:
            torch.set_float32_matmul_precision(word)  # sets the others too: they come after
        for products, precision in kept:
            products.fp32_precision = "none"  # inherits again what it inherited
            if products.fp32_precision != precision:
                products.fp32_precision = precision


def _overall_word() -> str | None:
    """What `torch.set_float32_matmul_precision` was last given; None where torch refuses to tell."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
