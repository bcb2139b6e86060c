"""Riemannian metrics on Stiefel, in Gram form.

A metric is given by two functions of small matrices: the normal part m of the gradient,
grad = g - x m(x^T g), and the inner product from q = u^T v, wu = x^T u, wv = x^T v.
They belong together through <grad, v>_x = <g, v> for every tangent v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .errors import ConfigError
from .gram import Reduce, Tall, combine, gram, sym
from .registry import Registry
from .shapes import check_returned, on_stacks

InnerProduct = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Metric:
    """A metric: ``normal(k)`` with k = x^T g, and ``product(q, wu, wv) -> (*b,)``."""

    name: str
    normal: Callable[[Tensor], Tensor]
    product: InnerProduct

    def gradient(
        self,
        xs: Tall,
        gs: Tall,
        reduce: Reduce | None = None,
        *,
        out: Tall | None = None,
        small: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Riemannian gradients of stacks, and the Gram k = x^T g, in which any non-finite entry of g shows.

        Args:
            xs: stacks (b, n, p), the points.
            gs: stacks of gradients.
            reduce: sums a batch over ranks.
            out: stacks to write the gradients to.
            small: (B, p, p) to write k to.

        Raises:
            StepError: the normal part has another shape.
        """
        k = gram(xs, gs, reduce, out=small)
        m = check_returned("metric", self.name, self.normal(k), k.shape, "it maps k = x^T g, (B, p, p), to m")
        return combine(gs, xs, m, alpha=-1.0, out=out), k

    def inner(self, xs: Tall, us: Tall, vs: Tall, reduce: Reduce | None = None) -> Tensor:
        """<u, v>_x for every matrix of the stacks, (B,).

        Raises:
            StepError: the inner product has another shape.
        """
        q = gram(us, vs, reduce)
        found = self.product(q, gram(xs, us, reduce), gram(xs, vs, reduce))
        return check_returned(
            "metric", self.name, found, q.shape[:1], "its inner product maps (B, p, p) to (B,)"
        )


_registry: Registry[Metric] = Registry("metric")
names, get = _registry.names, _registry.get


def register(
    name: str, *, inner: InnerProduct | None = None
) -> Callable[[Callable[[Tensor], Tensor]], Metric]:
    """Decorator that adds a metric from the normal part of its gradient.

    Args:
        name: the word that ``Stiefel(metric=...)`` will accept.
        inner: ``inner(q, wu, wv) -> (*b,)`` with q = u^T v, wu = x^T u, wv = x^T v.

    The decorated function maps k = x^T g to m, and the gradient is g - x m.

    Raises:
        ConfigError: not a name, or one that is taken; no inner product.
    """
    _registry.check_name(name)
    if not callable(inner):
        raise ConfigError(f"metric {name!r} needs inner=, a function (q, wu, wv) -> (*b,); got {inner!r}.")

    def add(normal: Callable[[Tensor], Tensor]) -> Metric:
        return _registry.add(name, Metric(name, normal, inner))

    return add


def _trace(a: Tensor) -> Tensor:
    return a.diagonal(dim1=-2, dim2=-1).sum(-1)


@register("canonical", inner=lambda q, wu, wv: _trace(q) - 0.5 * (wu * wv).sum((-2, -1)))
def canonical(k: Tensor) -> Tensor:
    """<u, v> = tr u^T (I - x x^T / 2) v, grad = g - x g^T x (Edelman, Arias & Smith 1998, eq. 2.53)."""
    return k.mT


@register("euclidean", inner=lambda q, wu, wv: _trace(q))
def euclidean(k: Tensor) -> Tensor:
    """<u, v> = tr u^T v, grad = g - x sym(x^T g)."""
    return sym(k)


def canonical_gradient(x: Tensor, g: Tensor) -> Tensor:
    """Riemannian gradient g - x g^T x for the canonical metric.

    Args:
        x: point (*b, n, p), orthonormal columns.
        g: Euclidean gradient, same shape.

    Returns:
        The tangent vector (*b, n, p). Cost: 4 n p^2 flops, two passes, no host synchronization.
    """
    return on_stacks(lambda x, g: get("canonical").gradient([x], [g])[0][0], x=x, g=g)


def euclidean_gradient(x: Tensor, g: Tensor) -> Tensor:
    """Riemannian gradient g - x sym(x^T g) for the Euclidean metric.

    Args:
        x: point (*b, n, p), orthonormal columns.
        g: Euclidean gradient, same shape.

    Returns:
        The tangent vector (*b, n, p). Cost: 4 n p^2 flops, two passes, no host synchronization.
    """
    return on_stacks(lambda x, g: get("euclidean").gradient([x], [g])[0][0], x=x, g=g)
