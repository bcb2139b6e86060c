"""Manifolds of orthonormal columns that have one metric, whose geodesics Stiefel's two metrics share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from .. import retractions, transports
from ..errors import ConfigError
from .frames import Frames

TRANSPORTS = ("none", "projection")


@dataclass(frozen=True)
class OneMetric(Frames):
    """A submanifold or quotient of Stiefel on which the canonical and the Euclidean geodesics are the same curves.

    A retraction of Stiefel serves as it is, and with the better of its two orders.
    """

    metric: ClassVar[str] = "euclidean"

    retraction: str | Callable[[Tensor, Tensor], Tensor] = "polar"
    transport: str = "none"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.retraction, str):
            retractions.get(self.retraction)
        elif not callable(self.retraction):
            raise ConfigError(
                f"{name}(retraction={self.retraction!r}): a registered name is needed, one of {retractions.names()}."
            )
        if self.transport not in TRANSPORTS:
            raise ConfigError(
                f"{name}(transport={self.transport!r}); use {' or '.join(map(repr, TRANSPORTS))}."
            )

    @property
    def retraction_part(self) -> retractions.Retraction:
        """The retraction, with the order that it has on this manifold."""
        part = retractions.as_part(self.retraction).for_metric(self.metric)
        return replace(part, order={self.metric: max(part.order.values())}) if part.order else part

    @property
    def _transport(self) -> transports.Transport | None:
        return None if self.transport == "none" else self._by_projection()

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """The geodesic from x in direction u at time 1."""
        return retractions.exp(x, u, metric=self.metric)
