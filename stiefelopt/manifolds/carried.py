"""Parameters that have a manifold before any group says so: geoopt's carry one, declared ones are marked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import ConfigError
from .base import Manifold

Reader = TypeVar("Reader", bound=Callable[..., Manifold | None])

# What reads the manifolds of a library; an integration registers its own when it is imported.
_READERS: dict[str, Callable[..., Manifold | None]] = {}
_INTEGRATIONS = {"geoopt": "stiefelopt.integrations.geoopt"}
_MARK = "_stiefelopt_constrained"


def reads(library: str) -> Callable[[Reader], Reader]:
    """Decorator: this function turns that library's manifolds into ours, None where they constrain nothing."""

    def add(reader: Reader) -> Reader:
        _READERS[library] = reader
        return reader

    return add


def may_carry(p: Tensor) -> bool:
    """Whether a parameter has a manifold of its own, be it one that constrains nothing; cheap."""
    return type(p) not in (nn.Parameter, Tensor) and getattr(p, "manifold", None) is not None


def carried(p: Tensor) -> Manifold | None:
    """The manifold in a parameter's own attribute ``manifold``; None where it carries none.

    Raises:
        ConfigError: it is another library's, and what reads it has not been imported.
    """
    if not may_carry(p):
        return None
    theirs: Any = p.manifold  # type: ignore[attr-defined]
    for cls in type(theirs).__mro__:
        library = cls.__module__.partition(".")[0]
        if library in _READERS:
            return _READERS[library](theirs)
        if library in _INTEGRATIONS:
            raise ConfigError(
                f"a parameter of shape {tuple(p.shape)} carries the manifold {theirs!r} of {library}: "
                f"`import {_INTEGRATIONS[library]}` first, or pass a plain nn.Parameter to leave it unconstrained."
            )
    return None


def mark(p: Tensor) -> None:
    """Note that a module has declared this parameter: what holds it in a group without a manifold forgot that.

    Copies, and what fully_shard makes of it, are not marked: the declaration itself lies in the module.
    """
    setattr(p, _MARK, True)


def awaits_manifold(p: Tensor) -> bool:
    """Whether somebody wants this parameter on one of our manifolds: a module, or a hand that wrote ``p.manifold``."""
    return hasattr(p, _MARK) or isinstance(getattr(p, "manifold", None), Manifold)
