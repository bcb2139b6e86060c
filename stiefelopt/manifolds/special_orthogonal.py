"""The special orthogonal group SO(n): rotations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import metrics, projections
from ..errors import NotOnManifoldError, ShapeError
from ..full_precision import full_precision
from ..transforms import under_transform
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
        return n * (n - 1) // 2

    @full_precision
    def check(self, x: Tensor) -> None:
        """Refuse what is no rotation.

        Raises:
            ShapeError: not square. NotOnManifoldError: not orthogonal, or a reflection.
        """
        super().check(x)
        _check_square(x.shape)
        if x.numel() and not bool((torch.linalg.det(x.detach().double()) > 0).all()):
            raise NotOnManifoldError(
                "x has determinant -1, and no step leads from a reflection to a rotation: use project_point(x), or "
                "constrain(module, name, manifold) for a parameter; Stiefel() takes both."
            )

    def random_point(self, *shape: int, **options: Any) -> Tensor:
        """A rotation (*b, n, n), uniform in the Haar measure."""
        _check_square(as_shape(shape))
        return _turned(super().random_point(*shape, **options))

    @full_precision
    def project_point(self, z: Tensor) -> Tensor:
        """The nearest rotation: U diag(1, ..., 1, det U V^T) V^T of the SVD z = U D V^T.

        Reference: Umeyama (1991), lemma.
        """
        y = super().project_point(z)
        _check_square(z.shape)
        reflected = torch.linalg.det(y.double()) < 0
        if not under_transform() and not bool(reflected.any()):
            return y
        u, _, vh = torch.linalg.svd(z.double())
        return torch.where(reflected[..., None, None], _turned(u, vh).to(z.dtype), y)


def _turned(u: Tensor, vh: Tensor | None = None) -> Tensor:
    """u vh, with the last column of u turned around where that is a reflection."""
    x = u if vh is None else u @ vh
    sign = torch.linalg.det(x.double()).sign().to(u.dtype)[..., None]
    signs = torch.cat((torch.ones_like(x[..., 0, 1:]), sign), -1)
    turned = u * signs[..., None, :]
    return turned if vh is None else turned @ vh


def _check_square(shape: Any) -> None:
    if shape[-1] != shape[-2]:
        raise ShapeError(
            f"the shape {tuple(shape)} is not square, and a rotation is (*b, n, n): use Stiefel() for n x p."
        )
