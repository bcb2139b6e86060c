"""The special orthogonal group SO(n): rotations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import metrics, projections
from ..errors import NotOnManifoldError, ShapeError
from ..full_precision import full_precision
from ..shapes import check_matrix, on_stacks
from ..svd_factor import rotation_factor, turned
from .base import register
from .frames import Frames, as_shape
from .one_metric import OneMetric


@register("SpecialOrthogonal")
@dataclass(frozen=True)
class SpecialOrthogonal(OneMetric, Frames):
    """SO(n) = {x : x^T x = I, det x = 1}; tangent vectors x a, a skew-symmetric, with <u, v> = tr u^T v.

    Points are square tensors (*b, n, n). No step changes the determinant, which is looked at by `check` alone.

    Args:
        retraction: a name registered for Stiefel, or a plain function (x, u) -> y; "cayley" and "exp" are the group's.
        transport: "none" or "projection": what `RiemannianWrapper` does with first moments.
    """

    square: ClassVar[bool] = True

    @staticmethod
    def fits(shape: tuple[int, ...]) -> tuple[int, ...]:
        """(*b, p, p)."""
        return (*shape[:-2], shape[-1], shape[-1])

    @property
    def _metric(self) -> metrics.Metric:
        return metrics.euclidean

    @property
    def _tangent(self) -> projections.Projection:
        return projections.tangent

    def _dim(self, n: int, p: int) -> int:
        _check_square((n, p))
        return n * (n - 1) // 2

    def residual(self, x: Tensor) -> Tensor:
        """max |x^T x - I| of every matrix, (*b,), in the compute dtype.

        Raises:
            ShapeError: not square.
        """
        _check_square(check_matrix("x", x).shape)
        return super().residual(x)

    def retract(self, x: Tensor, u: Tensor) -> Tensor:
        """The point y = R(x, u) for a tangent u; R(x, 0) is x bit for bit.

        Raises:
            ShapeError: not square. StepError: u is too long to be retracted.
        """
        _check_square(check_matrix("x", x).shape)
        return super().retract(x, u)

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """x expm(x^T u).

        Raises:
            ShapeError: not square.
        """
        _check_square(check_matrix("x", x).shape)
        return super().exp(x, u)

    @full_precision
    def check(self, x: Tensor) -> None:
        """Refuse what is no rotation.

        Raises:
            ShapeError: not square. NotOnManifoldError: not orthogonal, or a reflection.
        """
        super().check(x)
        if x.numel() and not bool((torch.linalg.det(x.detach().double()) > 0).all()):
            raise NotOnManifoldError(
                "x has determinant -1, and no step leads from a reflection to a rotation: use project_point(x), or "
                "constrain(module, name, manifold) for a parameter; Stiefel() takes both."
            )

    def random_point(self, *shape: int, **options: Any) -> Tensor:
        """A rotation (*b, n, n), uniform in the Haar measure."""
        _check_square(as_shape(shape))
        return turned(super().random_point(*shape, **options))

    def project_point(self, z: Tensor) -> Tensor:
        """The nearest rotation: U diag(1, ..., 1, det U V^T) V^T of the SVD z = U D V^T.

        Where several are nearest, as to a reflection whose two smallest singular values are equal, one of them, without
        a derivative.

        Raises:
            ShapeError: not square. NotOnManifoldError: z is not finite.

        Reference: Umeyama (1991), lemma.
        """
        projections.check_finite(z)
        _check_square(z.shape)
        return on_stacks(rotation_factor, z=z)


def _check_square(shape: Any) -> None:
    if shape[-1] != shape[-2]:
        raise ShapeError(
            f"the shape {tuple(shape)} is not square, and a rotation is (*b, n, n): use Stiefel() for n x p."
        )
