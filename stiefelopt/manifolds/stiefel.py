"""The Stiefel manifold St(n, p): n x p matrices with orthonormal columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .. import metrics, projections, retractions, transports
from ..errors import ConfigError
from .base import register
from .frames import Frames

_FAMILIES = {"metric": metrics, "transport": transports, "projection": projections}


@register("Stiefel")
@dataclass(frozen=True)
class Stiefel(Frames):
    """St(n, p) = {x : x^T x = I}, with its parts picked by name.

    Points are tensors (*b, n, p), n >= p; tangent vectors u, of the same shape, satisfy x^T u + u^T x = 0.

    Args:
        metric: "canonical", "euclidean" or a registered name: what the gradient means.
        retraction: "polar", "qr", "svd", "cayley", "exp", "newton_schulz", a registered name, or a plain function
            ``(x, u) -> y`` on stacks (B, n, p).
        transport: "none", "projection" or a registered name: what `RiemannianWrapper` does with first moments.
        projection: "tangent", "none" or a registered name: how a displacement becomes tangent before it is retracted.

    Raises:
        UnknownNameError: a name that is not registered.
        ConfigError: an option that is no name; a retraction that is no function, cannot be hashed, or does not serve
            the metric.
    """

    metric: str = "canonical"
    retraction: str | Callable[[Tensor, Tensor], Tensor] = "polar"
    transport: str = "none"
    projection: str = "tangent"

    def __post_init__(self) -> None:
        object.__setattr__(self, "retraction", retractions.as_option("Stiefel", self.retraction))
        for option, family in _FAMILIES.items():
            value = getattr(self, option)
            if not isinstance(value, str):
                raise ConfigError(
                    f"Stiefel({option}={value!r}): a registered name is needed, one of {family.names()}."
                )
            if value != "none" or option == "metric":
                family.get(value)

        known = self._metrics_of_retraction()
        if known and self.metric not in known:
            raise ConfigError(
                f"retraction {self.retraction!r} is the geodesic of a metric, and {self.metric!r} has none; use "
                f"another retraction, or one of the metrics {', '.join(map(repr, known))}."
            )

    def _metrics_of_retraction(self) -> tuple[str, ...]:
        """The metrics that the retraction serves; empty where it serves all."""
        return tuple(retractions.as_part(self.retraction).variants)

    # The parts, resolved. Registries are dictionaries: this costs nothing beside a step.

    @property
    def _metric(self) -> metrics.Metric:
        return metrics.get(self.metric)

    @property
    def retraction_part(self) -> retractions.Retraction:
        """The retraction, for this metric."""
        return retractions.as_part(self.retraction).for_metric(self.metric)

    @property
    def _tangent(self) -> projections.Projection:
        return projections.tangent

    @property
    def _projection(self) -> projections.Projection | None:
        return None if self.projection == "none" else projections.get(self.projection)

    @property
    def _transport(self) -> transports.Transport | None:
        return None if self.transport == "none" else transports.get(self.transport)

    def _dim(self, n: int, p: int) -> int:
        return n * p - p * (p + 1) // 2
