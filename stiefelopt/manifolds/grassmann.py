"""The Grassmann manifold Gr(n, p): p-dimensional subspaces of R^n, by orthonormal bases."""

from __future__ import annotations

from dataclasses import dataclass

from .. import metrics, projections
from .base import register
from .frames import Frames
from .one_metric import OneMetric

# An orthonormal basis may turn within its subspace for nothing: w = x^T u is what a horizontal vector has none of.
_METRIC = metrics.Metric("horizontal", lambda k: k, lambda q, wu, wv: q.diagonal(dim1=-2, dim2=-1).sum(-1))
_PROJECTION = projections.Projection("horizontal", "gram", lambda w: w)


@register("Grassmann")
@dataclass(frozen=True)
class Grassmann(OneMetric, Frames):
    """Gr(n, p): the subspace that the columns of x span, x^T x = I; x and x k are one point for orthogonal k.

    Points are orthonormal bases (*b, n, p); tangent vectors are horizontal, x^T u = 0. grad = g - x x^T g, which for a
    function of the subspace alone is the Euclidean gradient itself.

    Args:
        retraction: a name registered for Stiefel, or a plain function (x, u) -> y; all serve.
        transport: "none" or "projection": what `RiemannianWrapper` does with first moments.

    Reference: Edelman, Arias & Smith (1998), sections 2.5 and 3.
    """

    @property
    def _metric(self) -> metrics.Metric:
        return _METRIC

    @property
    def _tangent(self) -> projections.Projection:
        return _PROJECTION

    def _dim(self, n: int, p: int) -> int:
        return p * (n - p)
