"""geoopt's manifolds as plain text and back, and put right where their functions are not what they claim."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .extras import extra

with extra("geoopt"):
    from geoopt import linalg
    from geoopt import manifolds as theirs
    from geoopt.manifolds.siegel.vvd_metrics import RiemannianMetric


class CanonicalStiefel(theirs.CanonicalStiefel):
    """geoopt's, with a projection that is one and a retraction along u itself.

    There ``proju`` is z - x z^T x, the conversion of gradients: applied twice it is not what it is once. ``retr``
    leaves x along u + x x^T u for a tangent u; given u - x x^T u / 2 it leaves along u, by the Cayley transform.
    """

    egrad2rgrad = theirs.CanonicalStiefel.proju

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """The tangent vector nearest to u."""
        return u - x @ linalg.sym(x.mT @ u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """R(x, t u) = x + t u + O(t^2)."""
        return theirs.CanonicalStiefel.retr(self, x, u - 0.5 * x @ (x.mT @ u))

    expmap = retr

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """v, projected at y; geoopt's own needs the step that led to y."""
        return self.proju(y, v)


class UpperHalf(theirs.UpperHalf):
    """geoopt's, whose ``proju`` is the conversion of gradients; tangent vectors are the symmetric matrices."""

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """The tangent vector nearest to u."""
        return linalg.sym(u)


class BoundedDomain(theirs.BoundedDomain):
    """As `UpperHalf`."""

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """The tangent vector nearest to u."""
        return linalg.sym(u)


class BirkhoffPolytope(theirs.BirkhoffPolytope):
    """geoopt's, whose ``proju`` is the conversion of gradients too and whose ``retr`` overflows where x is small."""

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """u - (a 1^T + 1 b^T) * x with rows and columns that sum to 0: orthogonal in the Fisher metric."""
        n = x.shape[-1]
        rows, columns = torch.diag_embed(x.sum(-1)), torch.diag_embed(x.sum(-2))
        sums = torch.cat((torch.cat((rows, x), -1), torch.cat((x.mT, columns), -1)), -2)
        wanted = torch.cat((u.sum(-1), u.sum(-2)), -1)
        s = torch.linalg.pinv(sums, hermitian=True) @ wanted[..., None]
        return u - (s[..., :n, :] + s[..., n:, :].mT) * x

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """The gradient in the Fisher metric."""
        return self.proju(x, x * u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """geoopt's projx(x exp(k)), k = u / x, with the exponential continued along its tangent from k = 1 on."""
        k = u / x
        return self.projx(x * k.clamp_max(1).exp() * k.clamp_min(1)).clamp_min(1e-12)

    expmap = retr


class SphereExact(theirs.SphereExact):
    """geoopt's, with the rounding of its exponential taken back, which adds up otherwise."""

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """The geodesic, projected."""
        return self.projx(super().retr(x, u))


class EuclideanStiefelExact(theirs.EuclideanStiefelExact):
    """As `SphereExact`."""

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """The geodesic, projected."""
        return self.projx(super().retr(x, u))


_REPAIRED: dict[type, Callable[..., Any]] = {
    cls.__mro__[1]: cls
    for cls in (
        CanonicalStiefel,
        UpperHalf,
        BoundedDomain,
        BirkhoffPolytope,
        SphereExact,
        EuclideanStiefelExact,
    )
}
# The constructor's arguments, each of them an attribute too.
_ARGUMENTS: dict[type, tuple[str, ...]] = {
    theirs.BoundedDomain: (),
    theirs.BirkhoffPolytope: ("max_iter", "tol", "eps"),
    theirs.CanonicalStiefel: (),
    theirs.Euclidean: ("ndim",),
    theirs.EuclideanStiefel: (),
    theirs.EuclideanStiefelExact: (),
    theirs.Lorentz: ("k",),
    theirs.PoincareBall: ("c",),
    theirs.PoincareBallExact: ("c",),
    theirs.Sphere: (),
    theirs.SphereExact: (),
    theirs.SphereProjection: ("k",),
    theirs.SphereProjectionExact: ("k",),
    theirs.Stereographic: ("k",),
    theirs.StereographicExact: ("k",),
    theirs.UpperHalf: (),
}
# What a constructor may be given that is no number, and what that leaves where nothing was given.
_TENSORS_AND_OBJECTS = {"projector": type(None), "metric": RiemannianMetric}
_PRODUCTS = (theirs.ProductManifold, theirs.StereographicProductManifold)
_BY_NAME = {
    cls.__name__: cls for cls in (*_ARGUMENTS, *_PRODUCTS, theirs.Scaled, theirs.SymmetricPositiveDefinite)
}


class NotWritable(Exception):
    """No text can hold this manifold."""


def describe(manifold: Any) -> list[Any]:
    """The manifold as [class name, *arguments], of lists, strings and numbers.

    Raises:
        NotWritable: a parameter of it is learned, it depends on tensors, or its class is not known.
    """
    cls = type(manifold)
    if any(p.requires_grad for p in manifold.parameters(recurse=False)):
        raise NotWritable
    if cls in _PRODUCTS:
        pairs = zip(manifold.manifolds, manifold.shapes, strict=True)
        return [cls.__name__, *([describe(m), list(shape)] for m, shape in pairs)]
    if cls is theirs.Scaled:
        return ["Scaled", describe(manifold.base), float(manifold.scale)]
    if cls is theirs.SymmetricPositiveDefinite:
        return [cls.__name__, manifold.default_metric.value]
    given = {name: getattr(manifold, name) for name in _TENSORS_AND_OBJECTS if hasattr(manifold, name)}
    if cls not in _ARGUMENTS or any(type(v) is not _TENSORS_AND_OBJECTS[name] for name, v in given.items()):
        raise NotWritable
    values = [getattr(manifold, name) for name in _ARGUMENTS[cls]]
    return [cls.__name__, *(v.item() if isinstance(v, Tensor) else v for v in values)]


def rebuild(definition: Any) -> Any:
    """The manifold that `describe` described, put right. Its numbers are float64, which no operand is promoted by."""
    name, *arguments = definition
    cls = _BY_NAME[name]
    if cls in _PRODUCTS:
        return cls(*((rebuild(m), tuple(shape)) for m, shape in arguments))
    if cls is theirs.Scaled:
        return cls(rebuild(arguments[0]), arguments[1])
    numbers = cls in _ARGUMENTS and cls not in (theirs.BirkhoffPolytope, theirs.Euclidean)
    if numbers:
        arguments = [torch.tensor(a, dtype=torch.float64) for a in arguments]
    return _REPAIRED.get(cls, cls)(*arguments)


@functools.lru_cache(maxsize=256)
def built(text: str, device: torch.device) -> Any:
    """`rebuild` from JSON, once for each device.

    Raises:
        ConfigError: not a definition.
    """
    try:
        return rebuild(json.loads(text)).to(device)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"{text!r} defines no manifold of geoopt ({type(error).__name__}: {error}); make the manifold with "
            f"from_geoopt(manifold)."
        ) from None


def repaired(manifold: Any) -> Any:
    """A manifold that cannot be written, with what is known to be wrong in it put right; its parameters are shared."""
    cls = type(manifold)
    if cls in _PRODUCTS:
        pairs = zip(manifold.manifolds, manifold.shapes, strict=True)
        return cls(*((repaired(m), shape) for m, shape in pairs))
    if cls is theirs.Scaled:
        fixed = cls(repaired(manifold.base))
        fixed._buffers, fixed._parameters = manifold._buffers, manifold._parameters
        return fixed
    if cls not in _REPAIRED:
        return manifold
    fixed = _REPAIRED[cls]()
    fixed.__dict__.update(manifold.__dict__)
    return fixed
