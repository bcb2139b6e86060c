"""Unit vectors: the sphere, whose point is a whole matrix, and the oblique manifold, whose columns are points of one.

Both are St(n, 1) seen through a reshape: a unit vector is a matrix with one orthonormal column.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..draws import normal
from ..errors import NotOnManifoldError, ShapeError
from ..gram import Reduce, Tall
from ..matfun import safe_root
from ..retractions import OpenSum, close
from ..shapes import as_sizes, check_matrix, check_pair, compute_dtype
from .base import Carrier, register
from .one_metric import OneMetric
from .stiefel import Stiefel


@dataclass(frozen=True)
class UnitVectors(OneMetric):
    """Tensors (*b, n, p) that are made of unit vectors; a subclass says which.

    Tangent vectors are orthogonal to the vector they start at; the metric is the Euclidean one.
    """

    wide: ClassVar[bool] = True

    @staticmethod
    def fits(shape: tuple[int, ...]) -> tuple[int, ...]:
        """(*b, n, 1): one unit vector, of which matrices are made."""
        return (*shape[:-1], 1)

    # The view

    @abstractmethod
    def _seen(self, x: Tensor) -> Tensor:
        """(*b, n, p) as unit vectors (*b, k, m, 1)."""

    @abstractmethod
    def _back(self, y: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `_seen`."""

    @property
    def _one(self) -> Stiefel:
        return Stiefel("euclidean", self.retraction, self.transport)

    def _through(self, f: Callable[..., Tensor], **tensors: Tensor) -> Tensor:
        """f of the tensors as unit vectors, and back."""
        return self._back(f(*self._checked(**tensors)), next(iter(tensors.values())).shape)

    def _checked(self, **tensors: Tensor) -> list[Tensor]:
        (name, x), *others = tensors.items()
        check_matrix(name, x, wide=True)
        for other_name, other in others:
            check_pair(name, x, other_name, other)
        return [self._seen(t) for t in tensors.values()]

    def square_of_points(self, shape: tuple[int, ...]) -> int:
        """One for every vector."""
        return self._seen(torch.empty(shape, device="meta")).shape[-3]

    # Points

    def residual(self, x: Tensor) -> Tensor:
        """max |norm^2 - 1| over the unit vectors of every point, (*b,)."""
        (seen,) = self._checked(x=x)
        return self._one.residual(seen).amax(-1)

    def check(self, x: Tensor) -> None:
        """Refuse what is not a point.

        Raises:
            ShapeError: not a real floating-point tensor (*b, n, p). NotOnManifoldError: not of norm 1.
        """
        (seen,) = self._checked(x=x)
        try:
            self._one.check(seen)
        except NotOnManifoldError as error:
            raise NotOnManifoldError(str(error).replace("|x^T x - I|", "|norm^2 - 1|")) from None

    def random_point(self, *shape: int, **options: Any) -> Tensor:
        """A point (*b, n, p), uniform."""
        shape = _as_shape(shape)
        seen = self._seen(torch.empty(shape, device="meta"))
        return self._back(self._one.random_point(*seen.shape, **options), torch.Size(shape))

    def project_point(self, z: Tensor) -> Tensor:
        """The nearest point: every vector over its norm."""
        return self._through(self._one.project_point, z=z)

    def dim(self, *shape: int) -> int:
        """Dimension of the manifold of points (*b, n, p)."""
        return self._one.dim(*self._seen(torch.empty(_as_shape(shape), device="meta")).shape)

    # Tangent vectors

    def project_tangent(self, x: Tensor, z: Tensor) -> Tensor:
        """z - x <x, z> for every unit vector."""
        return self._through(self._one.project_tangent, x=x, z=z)

    def random_tangent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A tangent vector of unit norm; zero where the manifold is a single point."""
        check_matrix("x", x, wide=True)
        if self.dim(*x.shape[-2:]) == 0:
            return torch.zeros_like(x)
        point = x.to(compute_dtype(x.dtype))
        z = normal(x.shape, x.dtype, x.device, generator).to(x.device)
        # Twice: dividing blows the first projection's rounding up where few dimensions are tangent.
        for _ in range(2):
            u = self.project_tangent(point, z)
            z = u / self.norm(point, u)[..., None, None]
        return z.to(x.dtype)

    def gradient(self, x: Tensor, egrad: Tensor) -> Tensor:
        """Riemannian gradient from the Euclidean one: its tangent part."""
        return self._through(self._one.gradient, x=x, egrad=egrad)

    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Inner product tr u^T v of tangent vectors, (*b,)."""
        return self._one.inner(*self._checked(x=x, u=u, v=v)).sum(-1)

    def norm(self, x: Tensor, u: Tensor) -> Tensor:
        """Frobenius norm of a tangent vector, (*b,)."""
        return safe_root(self.inner(x, u, u))

    # Motion

    def retract(self, x: Tensor, u: Tensor) -> Tensor:
        """The point y = R(x, u) for a tangent u; R(x, 0) is x bit for bit."""
        return self._through(self._one.retract, x=x, u=u)

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """The great circles from x in direction u at time 1."""
        return self._through(self._one.exp, x=x, u=u)

    def transport_vector(self, x: Tensor, u: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """v, tangent at x, as a tangent vector at y = retract(x, u), by projection."""
        return self._through(self._one.transport_vector, x=x, u=u, y=y, v=v)

    # The beats of the optimizer's step; every small matrix is 1 x 1, and the overlap holds one for each vector

    def _stacks(self, xs: Tall) -> list[Tensor]:
        return [self._seen(x).flatten(0, 1) for x in xs]

    def stacked_gradient(
        self, xs: Tall, gs: Tall, *, arriving: str = "factors", reduce: Reduce | None = None
    ) -> Tensor:
        """Overwrite the stacks gs by Riemannian gradients; returns what every non-finite entry shows in."""
        seen = self._stacks(gs)
        shown = self._one.stacked_gradient(self._stacks(xs), seen, reduce=reduce)
        self._write(seen, gs)
        return self._per_matrix(shown, xs)

    def stacked_overlap(self, xs: Tall, ms: Tall, reduce: Reduce | None = None) -> Tensor:
        """<x, m> - 1 for every vector, (B, k, 1), for moved points m."""
        return self._per_matrix(self._one.stacked_overlap(self._stacks(xs), self._stacks(ms), reduce), xs)

    def stacked_move(
        self,
        xs: Tall,
        ms: Tall,
        e: Tensor,
        scales: Sequence[float],
        *,
        drift: float,
        reduce: Reduce | None = None,
    ) -> list[OpenSum]:
        """Scale and project the displacements m - x and retract them: the new points."""
        e = e.reshape(-1, 1, 1)
        moved = self._one.stacked_move(
            self._stacks(xs), self._stacks(ms), e, scales, drift=drift, reduce=reduce
        )
        return [(self._unstacked(y, x), None) for y, x in zip(close(moved), xs, strict=True)]

    def stacked_transporter(
        self, xs: Tall, ms: Tall, scales: Sequence[float], reduce: Reduce | None = None
    ) -> Carrier | None:
        """What carries first moments to the new points, by projection."""
        inner = self._one.stacked_transporter(self._stacks(xs), self._stacks(ms), scales, reduce)
        if inner is None:
            return None

        def carry(index: Sequence[int], ys: Sequence[Tensor], vs: Sequence[Tensor]) -> list[Tensor]:
            carried = inner.vectors(index, self._stacks(ys), self._stacks(vs))
            return [self._unstacked(v, y) for v, y in zip(carried, ys, strict=True)]

        return Carrier(carry)

    def stacked_spectral(
        self, xs: Tall, ms: Tall, e: Tensor, rates: Sequence[float], reduce: Reduce | None = None
    ) -> Tensor:
        """Give the displacement of every vector, made tangent, the length rate; returns the overlap."""
        seen = self._stacks(ms)
        shown = self._one.stacked_spectral(self._stacks(xs), seen, e.reshape(-1, 1, 1), rates, reduce)
        self._write(seen, ms)
        return self._per_matrix(shown, xs)

    def stacked_distance(self, xs: Tall, ys: Tall, reduce: Reduce | None = None) -> float:
        """Sum of ||y - x||_F^2."""
        return self._one.stacked_distance(xs, ys, reduce)

    def _unstacked(self, y: Tensor, like: Tensor) -> Tensor:
        return self._back(y.unflatten(0, (len(like), -1)), like.shape)

    def _write(self, seen: Sequence[Tensor], out: Tall) -> None:
        """Copy what was seen back, where seeing it took a copy."""
        for s, o in zip(seen, out, strict=True):
            if s.data_ptr() != o.data_ptr():
                o.copy_(self._unstacked(s, o))

    def _per_matrix(self, small: Tensor, xs: Tall) -> Tensor:
        """(sum of b k, 1, 1) as (B, k, 1)."""
        return small.reshape(sum(len(x) for x in xs), -1, 1)


def _as_shape(shape: tuple[Any, ...]) -> tuple[int, ...]:
    """(n, p) or ((n, p),), with n >= 1 and p >= 1."""
    form = "(*b, n, p) with n, p >= 1, (n, 1) for a vector"
    found = as_sizes(shape, form)
    if min(found[-2:]) < 1:
        raise ShapeError(f"the shape {found} has no entries to be of norm 1; give {form}.")
    return found


@register("Sphere")
@dataclass(frozen=True)
class Sphere(UnitVectors):
    """{x : ||x||_F = 1}: a vector of unit norm, or a matrix (*b, n, p) as a whole; in a group also a parameter (n,).

    Args:
        retraction: a name registered for Stiefel, or a plain function (x, u) -> y; "exp" follows great circles.
        transport: "none" or "projection": what `RiemannianWrapper` does with first moments.
    """

    vectors: ClassVar[bool] = True

    def _seen(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-2], 1, math.prod(x.shape[-2:]), 1)

    def _back(self, y: Tensor, shape: torch.Size) -> Tensor:
        return y.reshape(shape)


@register("Oblique")
@dataclass(frozen=True)
class Oblique(UnitVectors):
    """{x : every column of x has norm 1}, points (*b, n, p) with any n and p: p points of a sphere.

    In a group, tall parameters have unit columns and wide ones unit rows; ``orientation`` says otherwise, for
    example "rows" for embeddings (many, dim).

    Args:
        retraction: a name registered for Stiefel, or a plain function (x, u) -> y; "exp" follows great circles.
        transport: "none" or "projection": what `RiemannianWrapper` does with first moments.

    Reference: Absil & Gallivan (2006).
    """

    def _seen(self, x: Tensor) -> Tensor:
        return x.mT.unsqueeze(-1)

    def _back(self, y: Tensor, shape: torch.Size) -> Tensor:
        return y.squeeze(-1).mT
