"""The options of manifolds made of orthonormal columns that have one metric only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from .. import retractions
from ..registry import check_word
from .base import Manifold

TRANSPORTS = ("none", "projection")


@dataclass(frozen=True)
class OneMetric(Manifold):
    """A submanifold or quotient of Stiefel on which the canonical and the Euclidean geodesics are the same curves.

    A retraction of Stiefel serves as it is, and with the better of its two orders.
    """

    metric: ClassVar[str] = "euclidean"

    retraction: str | Callable[[Tensor, Tensor], Tensor] = "polar"
    transport: str = "none"

    def __post_init__(self) -> None:
        retraction = retractions.as_option(type(self).__name__, self.retraction)
        object.__setattr__(self, "retraction", retraction)
        check_word("transport", self.transport, TRANSPORTS)

    @property
    def retraction_part(self) -> retractions.Retraction:
        """The retraction, with the order that it has on this manifold."""
        part = retractions.as_part(self.retraction).for_metric(self.metric)
        return replace(part, order={self.metric: max(part.order.values())}) if part.order else part
