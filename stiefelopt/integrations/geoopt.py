"""geoopt's manifolds under `RiemannianWrapper`: `from_geoopt`, and parameters that carry their manifold.

Importing this module lets the wrapper and `param_groups` understand ``geoopt.ManifoldParameter``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..draws import normal
from ..errors import ConfigError, NotOnManifoldError, ShapeError
from ..full_precision import full_precision
from ..gram import Reduce, Tall
from ..manifolds.base import Carrier, Manifold, register
from ..manifolds.carried import reads
from ..registry import check_word
from ..shapes import REAL, check_pair, compute_dtype
from .extras import extra
from .geoopt_manifolds import NotWritable, built, describe, repaired

with extra("geoopt"):
    from geoopt import manifolds as theirs

TRANSPORTS = ("none", "transp")


@register("Geoopt")
@dataclass(frozen=True)
class Geoopt(Manifold):
    """A manifold of geoopt; `from_geoopt` makes it.

    Points are parameters in the shape that geoopt gives them; leading dimensions are a batch. The step is
    y = retr(x, proju(x, d)) with geoopt's own functions, but where those are not what they claim
    (`geoopt_manifolds`).

    Args:
        definition: the manifold in JSON, [class name, *constructor's arguments]; empty where it cannot be written.
        transport: "none", or "transp": first moments are carried by geoopt's function of that name.
        live: the manifold itself, where it cannot be written.

    Raises:
        ConfigError: a definition that is not one. UnknownNameError: an unknown transport.

    Cost: geoopt's; ambient, neither fused nor sharded.
    """

    held: ClassVar[str] = "tensor"
    recognized: ClassVar[bool] = False  # half a step on the ball is still on the ball

    definition: str = ""
    transport: str = "none"
    live: Any = None

    def __post_init__(self) -> None:
        check_word("transport", self.transport, TRANSPORTS)
        if self.live is None:
            built(self.definition, torch.device("cpu"))

    def spec(self) -> dict[str, str | int | float | bool]:
        """The definition as a flat dict, which `manifolds.from_spec` reads back.

        Raises:
            ConfigError: the curvature is learned, or the class is not one of geoopt's.
        """
        if self.live is None:
            return {"manifold": "Geoopt", "definition": self.definition, "transport": self.transport}
        raise ConfigError(
            f"{self.live!r} is learned, depends on tensors or is of your own class, and no checkpoint can hold it: "
            f"make the parameter a geoopt.ManifoldParameter on it, and leave 'manifold' out of its group; then it "
            f"stays with the parameter."
        )

    def _at(self, x: Tensor) -> Any:
        """geoopt's manifold, where x is."""
        return self.live if self.live is not None else built(self.definition, x.device)

    # Points

    def check_shape(self, name: str, x: Tensor) -> None:
        """Refuse a tensor that no value would make a point.

        Raises:
            ShapeError: of another shape than geoopt takes, or without a floating-point dtype.
        """
        if not isinstance(x, Tensor) or (x.dtype not in REAL and not x.is_complex()):
            raise ShapeError(
                f"{name} is {getattr(x, 'dtype', type(x).__name__)}; a floating-point tensor is needed."
            )
        fits, reason = self._at(x).check_point(x.detach(), explain=True)
        if not fits:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; {self._at(x)} says: {reason}.")

    @full_precision
    def check(self, x: Tensor) -> None:
        """Refuse what is not a point, by geoopt's own check.

        Raises:
            ShapeError: as `check_shape`. NotOnManifoldError: geoopt says why.
        """
        self.check_shape("x", x)
        if x.numel() == 0:
            return
        manifold = self._at(x)
        z = _lifted(x.detach())
        # geoopt compares with its own numbers, which must then have the same dtype.
        z = z if z.is_complex() or manifold.dtype is None else z.to(manifold.dtype)
        loose = max(1e-5, 4 * torch.finfo(x.dtype).eps)
        on, reason = manifold.check_point_on_manifold(z, explain=True, atol=loose, rtol=loose)
        if not on or not bool(torch.isfinite(z).all()):
            raise NotOnManifoldError(
                f"x is no point of {manifold}: {reason or 'it holds NaN or Inf'}. Use project_point(x), geoopt's "
                f"projx, or constrain(module, name, manifold) for a parameter."
            )

    @full_precision
    def residual(self, x: Tensor) -> Tensor:
        """max |x - projx(x)| of every point, (*b,)."""
        self.check_shape("x", x)
        z, manifold = _lifted(x), self._at(x)
        if x.numel() == 0:  # of which most of geoopt's manifolds know nothing
            return z.real.new_empty(_batch(manifold, x))
        off = (z - manifold.projx(z)).abs()
        return off.amax(_own_dims(manifold, z))

    @full_precision
    def project_point(self, z: Tensor) -> Tensor:
        """geoopt's ``projx``, the nearest point on most manifolds.

        Raises:
            NotOnManifoldError: z is not finite, or what geoopt makes of it is no point.
        """
        self.check_shape("z", z)
        if not bool(torch.isfinite(z).all()):
            raise NotOnManifoldError("z holds NaN or Inf; look where it was made.")
        x = self._at(z).projx(_lifted(z)).to(z.dtype)
        self.check(x)
        return x

    def random_point(
        self,
        *shape: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """geoopt's ``random`` point of that shape; not uniform on every manifold."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        seed = int(torch.randint(2**62, (), generator=generator))
        return self._drawn(shape, seed, compute_dtype(dtype)).to(dtype=dtype, device=device)

    def _drawn(self, shape: tuple[int, ...], seed: int, dtype: torch.dtype | None = None) -> Tensor:
        """A point in that dtype, or in geoopt's own choice: complex where points are."""
        manifold = self._at(torch.empty(0))
        with torch.random.fork_rng(devices=[]):  # geoopt's takes no generator
            torch.manual_seed(seed)
            draw = getattr(manifold, "random_normal", manifold.random)  # Lorentz has no other
            return draw(*shape, dtype=manifold.dtype or dtype).detach().as_subclass(Tensor)

    def dim(self, *shape: int) -> int:
        """Dimension of the manifold of points of that shape, over the reals: the trace of the tangent projection.

        Raises:
            ShapeError: points have other shapes.

        Cost: a projection for each of the N entries of a point, N^2 numbers in pieces of 2^22.
        """
        self.check_shape("a point", torch.empty(shape))
        manifold = self._at(torch.empty(0))
        cut = len(shape) - manifold.ndim
        own = tuple(shape[cut:])
        x = self._drawn(own, seed=0)
        trace, units = 0.0, (1, 1j) if x.is_complex() else (1,)
        for entries in torch.arange(x.numel()).split(max(1, 2**22 // max(1, x.numel()))):
            for unit in units:
                basis = unit * nn.functional.one_hot(entries, x.numel()).to(x.dtype).reshape(-1, *own)
                trace += (manifold.proju(x.expand_as(basis), basis.clone()) * basis.conj()).real.sum().item()
        return math.prod(shape[:cut]) * round(trace)

    # Tangent vectors

    def _call(self, function: str, x: Tensor, *vectors: Tensor) -> Tensor:
        """geoopt's function of that name in the compute dtype, in the shape and dtype of x."""
        manifold, (z, *others) = self._at(x), _checked(x, *vectors)
        # Most of geoopt's functions know nothing of empty batches.
        return getattr(manifold, function)(z, *others).to(x.dtype) if x.numel() else x.clone()

    @full_precision
    def project_tangent(self, x: Tensor, z: Tensor) -> Tensor:
        """The projection of an ambient z to the tangent space at x."""
        return self._call("proju", x, z)

    @full_precision
    def random_tangent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A tangent vector of unit norm."""
        z = _lifted(x)
        u = normal(z.shape, z.dtype, z.device, generator).to(z.device)
        manifold = self._at(x)
        u = self._call("proju", z, self._call("proju", z, u))
        norms = self.norm(z, u).reshape(*_batch(manifold, x), *[1] * manifold.ndim)
        return (u / norms).to(x.dtype)

    @full_precision
    def gradient(self, x: Tensor, egrad: Tensor) -> Tensor:
        """geoopt's ``egrad2rgrad``."""
        _checked(x, egrad)
        return self._call("egrad2rgrad", x, egrad.clone())  # Lorentz writes to it

    @full_precision
    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """geoopt's inner product, (*b,); half precision is computed in float32."""
        manifold, (z, u, v) = self._at(x), _checked(x, u, v)
        batch = _batch(manifold, x)
        if x.numel() == 0:
            return z.new_empty(batch)
        # Without keepdim the stereographic models multiply every point with every other.
        return manifold.inner(z, u, v, keepdim=True).reshape(batch)

    def norm(self, x: Tensor, u: Tensor) -> Tensor:
        """Norm of a tangent vector, (*b,)."""
        return self.inner(x, u, u).sqrt()

    # Motion

    @full_precision
    def retract(self, x: Tensor, u: Tensor) -> Tensor:
        """y = retr(x, u) for a tangent u; where u is zero y is x bit for bit."""
        z, u = _checked(x, u)
        return _retracted(self._at(x), z, u).to(x.dtype) if x.numel() else x.clone()

    @full_precision
    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """geoopt's ``expmap``, which for some manifolds is their retraction.

        Raises:
            ConfigError: geoopt has none, as on the Siegel spaces.
        """
        try:
            return self._call("expmap", x, u)
        except NotImplementedError:
            raise ConfigError(f"geoopt has no exponential map of {self._at(x)}; use retract.") from None

    @full_precision
    def transport_vector(self, x: Tensor, u: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """v, tangent at x, as a tangent vector at y = retract(x, u)."""
        _checked(x, u)
        return self._call("transp", x, y, v)

    # The beats of the optimizer's step, on stacks (k, *shape): geoopt's functions, without what the methods add to them

    def _converted(self, x: Tensor, g: Tensor) -> Tensor:
        return self._at(x).egrad2rgrad(x, g)

    def _moved(self, x: Tensor, d: Tensor) -> Tensor:
        manifold = self._at(x)
        return _retracted(manifold, x, manifold.proju(x, d), still=d)

    def stacked_transporter(
        self, xs: Tall, ms: Tall, scales: Sequence[float], reduce: Reduce | None = None
    ) -> Carrier | None:
        """What carries first moments to the new points; None for "none"."""
        if self.transport == "none":
            return None

        def carry(index: Sequence[int], ys: Sequence[Tensor], vs: Sequence[Tensor]) -> list[Tensor]:
            return [self._at(y).transp(xs[i], y, v) for i, y, v in zip(index, ys, vs, strict=True)]

        return Carrier(carry)


def _own_dims(manifold: Any, x: Tensor) -> tuple[int, ...]:
    """The dimensions of one point; those before them are a batch."""
    return tuple(range(x.ndim - manifold.ndim, x.ndim))


def _retracted(manifold: Any, x: Tensor, u: Tensor, still: Tensor | None = None) -> Tensor:
    """R(x, u), but x bit for bit where u (or what it was projected from) is zero."""
    zero = (u if still is None else still) == 0
    return torch.where(zero.all(_own_dims(manifold, x), keepdim=True), x, manifold.retr(x, u))


def _batch(manifold: Any, x: Tensor) -> torch.Size:
    """The dimensions before those of one point."""
    return x.shape[: x.ndim - manifold.ndim]


def _checked(x: Tensor, *vectors: Tensor) -> list[Tensor]:
    """All in the compute dtype.

    Raises:
        ShapeError: a vector is not like the point.
    """
    for v in vectors:
        check_pair("x", x, "the vector", v)
    return [_lifted(t) for t in (x, *vectors)]


def _lifted(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


@reads("geoopt")
def from_geoopt(manifold: Any, *, transport: str = "none") -> Geoopt | None:
    """A manifold of geoopt for `RiemannianWrapper`, for any torch optimizer.

    Args:
        manifold: any ``geoopt.manifolds.Manifold``, products and scaled ones included.
        transport: what the wrapper does with first moments: "none", or "transp", geoopt's function of that name.

    Returns:
        The manifold for a group's key "manifold"; None, which is no constraint, for ``geoopt.Euclidean``.

    Raises:
        ConfigError: not a manifold of geoopt. UnknownNameError: an unknown transport.
    """
    if not isinstance(manifold, theirs.Manifold):
        raise ConfigError(
            f"a manifold of geoopt is needed, for example geoopt.Sphere(), got {type(manifold).__name__}."
        )
    if isinstance(manifold, theirs.Euclidean):
        return None
    try:
        return Geoopt(json.dumps(describe(manifold)), transport)
    except NotWritable:
        return Geoopt("", transport, repaired(manifold))
