"""The special orthogonal group SO(n): rotations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import metrics, projections
from ..errors import NotOnManifoldError, ShapeError, StepError
from ..full_precision import full_precision
from ..gram import Reduce, Tall
from ..shapes import on_stacks
from ..svd_factor import rotation_factor, turned
from ..transforms import host_can_look
from .base import register
from .frames import Frames
from .one_metric import OneMetric

# The size of a step's entries from which on float32 may lose the point beside it; float64 does much later.
LONG = 1e3


def _check_turns(ys: Tall) -> None:
    for y in ys:
        if not bool((torch.linalg.det(y.detach().double()) > 0).all()):
            raise StepError(
                "so long a step loses the rotation beside it in rounding, and ends at a reflection; lower the learning "
                "rate or clip the gradient."
            )


@register("SpecialOrthogonal")
@dataclass(frozen=True)
class SpecialOrthogonal(OneMetric, Frames):
    """SO(n) = {x : x^T x = I, det x = 1}; tangent vectors x a, a skew-symmetric, with <u, v> = tr u^T v.

    Points are square tensors (*b, n, n). No step changes the determinant, but for one so long that rounding loses the
    point it began at, which is a StepError (not on accelerators, nor where the rows lie on several ranks).

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
        return n * (n - 1) // 2

    def _check_shape(self, shape: Sequence[int]) -> None:
        if shape[-1] != shape[-2]:
            raise ShapeError(
                f"the shape {tuple(shape)} is not square, and a rotation is (*b, n, n): use Stiefel() for n x p."
            )

    def _watch(self, step: Tensor, reduce: Reduce | None = None) -> Callable[[Tall], None] | None:
        looks = reduce is None and host_can_look(step) and step.numel() > 0
        return _check_turns if looks and bool(step.detach().abs().amax() > LONG) else None

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
        self._check_shape(z.shape)
        return on_stacks(rotation_factor, z=z)
