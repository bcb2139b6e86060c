"""Projections: how an ambient displacement becomes tangent, and how a matrix becomes a point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError, NotOnManifoldError
from .gram import Reduce, Tall, combine, gram, sym
from .registry import Registry
from .shapes import check_matrix, check_returned, on_stacks
from .svd_factor import svd_factor
from .transforms import under_transform

GRAM, AMBIENT = "it maps w = x^T z, (B, p, p), to s", "it is called with stacks x and z, (B, n, p)"


@dataclass(frozen=True)
class Projection:
    """A projection to the tangent space; call it as ``projection(x, z)``.

    Form "gram": z - x f(x^T z). Form "ambient": f(x, z) on stacks (B, n, p).
    """

    name: str
    form: str
    function: Callable[..., Tensor]

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Tangent vector at x nearest to z in this projection's sense; x and z are (*b, n, p)."""
        return on_stacks(lambda x, z: self.apply([x], [z])[0], x=x, z=z)

    def apply(
        self,
        xs: Tall,
        zs: Tall,
        *,
        w: Tensor | None = None,
        reduce: Reduce | None = None,
        out: Tall | None = None,
    ) -> list[Tensor]:
        """The projection on stacks; w = x^T z where it is at hand already.

        Raises:
            StepError: the function returned another shape.
        """
        if self.form == "ambient":
            return [self._returned(self.function(x, z), x, AMBIENT) for x, z in zip(xs, zs, strict=True)]
        w = gram(xs, zs, reduce) if w is None else w
        return combine(zs, xs, self._returned(self.function(w), w, GRAM), alpha=-1.0, out=out)

    def _returned(self, found: object, like: Tensor, called: str) -> Tensor:
        return check_returned("projection", self.name, found, like.shape, called)


_registry: Registry[Projection] = Registry("projection", words=("none",))
names, get = _registry.names, _registry.get


def register(name: str, *, form: str = "gram") -> Callable[[Callable[..., Tensor]], Projection]:
    """Decorator that adds a projection.

    Args:
        name: the word that ``Stiefel(projection=...)`` will accept.
        form: "gram": ``f(w) -> s`` with w = x^T z, and the result is z - x s; "ambient": ``f(x, z) -> u``.

    Raises:
        ConfigError: not a name, or one that is taken; another form.
    """
    _registry.check_name(name)
    if form not in ("gram", "ambient"):
        raise ConfigError(
            f"projection {name!r} was given form={form!r}; use 'gram' (w -> s) or 'ambient' ((x, z) -> u)."
        )
    return lambda function: _registry.add(name, Projection(name, form, function))


@register("tangent")
def tangent(w: Tensor) -> Tensor:
    """z - x sym(x^T z): the orthogonal projection, self-adjoint in the Euclidean metric. Cost: 4 n p^2 flops."""
    return sym(w)


def polar_factor(z: Tensor) -> Tensor:
    """The orthonormal matrix nearest to z in every unitarily invariant norm: U V^T of the thin SVD.

    Args:
        z: (*b, n, p), n >= p, any finite values; where z is rank deficient one of the nearest is returned.

    Raises:
        ShapeError: not a tall real matrix.
        NotOnManifoldError: z is not finite.

    Cost: one batched thin SVD, about 6 n p^2 flops at LAPACK speed. Accuracy: a few eps.
    Reference: Higham, Functions of Matrices (2008), theorem 8.4.
    """
    check_finite(z)
    return on_stacks(svd_factor, z=z)


def check_finite(z: Tensor) -> None:
    """Refuse what no orthonormal matrix is nearest to.

    Raises:
        ShapeError: not a tall real matrix.
        NotOnManifoldError: not finite.
    """
    check_matrix("z", z)
    if not under_transform() and not bool(torch.isfinite(z).all()):
        raise NotOnManifoldError(
            "z holds NaN or Inf, and no orthonormal matrix is nearest to it; look where it was made."
        )
