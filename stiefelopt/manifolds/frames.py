"""What manifolds of orthonormal columns share: points, motion and the optimizer's step in Gram form."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import metrics, projections, retractions, transports
from ..draws import normal
from ..errors import ConfigError, NotOnManifoldError, ShapeError
from ..full_precision import full_precision
from ..gram import Reduce, Tall, gram, identity_like, keep_where, split, squared_norm, unmoved_matrices
from ..matfun import inverse_symmetric_root, safe_root
from ..retractions import OpenSum, close, normalize
from ..shapes import as_sizes, as_stacks, check_matrix, on_stacks, tolerance
from .base import Carrier, Manifold


@dataclass(frozen=True)
class Frames(Manifold):
    """Matrices (*b, n, p) with orthonormal columns; a subclass says which vectors are tangent.

    Everything here is small algebra between `gram` and `combine`, whatever the subclass picks.
    """

    takes_small: ClassVar[bool] = True

    # What a subclass says

    if TYPE_CHECKING:  # options, or constants

        @property
        def metric(self) -> str:
            """What the gradient means."""

        @property
        def transport(self) -> str:
            """What the wrapper does with first moments."""

    @property
    @abstractmethod
    def _metric(self) -> metrics.Metric:
        """What the gradient means."""

    @property
    @abstractmethod
    def _tangent(self) -> projections.Projection:
        """The orthogonal projection to the tangent space, of the Gram form."""

    @property
    @abstractmethod
    def retraction_part(self) -> retractions.Retraction:
        """The retraction, with the order that it has on this manifold."""

    @property
    def _projection(self) -> projections.Projection | None:
        """How a displacement becomes tangent; None leaves it as it is."""
        return self._tangent

    @property
    def _transport(self) -> transports.Transport | None:
        """How the wrapper carries first moments; None leaves them as they are."""
        return None if self.transport == "none" else self._by_projection()

    @abstractmethod
    def _dim(self, n: int, p: int) -> int:
        """Dimension of the manifold of single points (n, p)."""

    def _check_shape(self, shape: Sequence[int]) -> None:
        """Refuse a shape (*b, n, p) that points of Stiefel may have and these have not."""

    def whole_part(self) -> str | None:
        """The part of ambient form, if there is one."""
        parts: dict[str, Any] = {
            "retraction": self.retraction_part,
            "projection": self._projection,
            "transport": self._transport,
        }
        found = [
            f"{option} {p.name!r}" for option, p in parts.items() if p is not None and p.form == "ambient"
        ]
        return found[0] if found else None

    # Points

    @full_precision
    def residual(self, x: Tensor) -> Tensor:
        """max |x^T x - I| of every matrix, (*b,), in the compute dtype."""
        xs = as_stacks(x=x)
        self._check_shape(x.shape)
        return self.stacked_residual(xs).reshape(x.shape[:-2])

    def stacked_residual(self, xs: Tall, reduce: Reduce | None = None) -> Tensor:
        """`residual` of stacks, (B,)."""
        c = gram(xs, xs, reduce)
        return (c - identity_like(c)).abs().amax((-2, -1))

    def check(self, x: Tensor) -> None:
        """Refuse what is not a point.

        Raises:
            ShapeError: not a real floating-point tensor (*b, n, p) with n >= p >= 1.
            NotOnManifoldError: columns are not orthonormal to 10 eps sqrt(n p), or not finite.
        """
        check_matrix("x", x)
        if x.numel() == 0:
            return
        worst = self.residual(x.detach()).amax().item()
        allowed = tolerance(x.dtype, *x.shape[-2:])
        if not worst <= allowed:
            raise NotOnManifoldError(
                f"x has max |x^T x - I| = {worst:.2g}, and {allowed:.2g} is allowed for {tuple(x.shape)} in {x.dtype}: "
                f"use project_point(x); for a parameter, also after .double(), constrain(module, name, manifold)."
            )

    def random_point(
        self,
        *shape: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A point (*b, n, p), uniform in the Haar measure: the Q of a Gaussian, signs fixed (Mezzadri 2007)."""
        shape = as_shape(shape)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        z = torch.empty(shape, dtype=dtype, device="meta")
        check_matrix("random_point's result", z)
        self._check_shape(shape)
        z = normal(shape, dtype, device, generator)
        q, r = torch.linalg.qr(z)
        signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
        # LAPACK's columns lie one after the other; a parameter's rows should.
        return (q * signs[..., None, :]).to(dtype=dtype, device=device).contiguous()

    def project_point(self, z: Tensor) -> Tensor:
        """The point nearest to z: its polar factor, by SVD; see `projections.polar_factor`."""
        return projections.polar_factor(z)

    def dim(self, *shape: int) -> int:
        """Dimension of the manifold of points (*b, n, p)."""
        *batch, n, p = as_shape(shape)
        self._check_shape((n, p))
        return math.prod(batch) * self._dim(n, p)

    # Tangent vectors

    def project_tangent(self, x: Tensor, z: Tensor) -> Tensor:
        """The orthogonal projection of an ambient z (*b, n, p): z - x sym(x^T z) on Stiefel."""
        return self._tangent(x, z)

    @full_precision
    def random_tangent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A tangent vector of unit norm in the metric; zero where the manifold is a single point."""
        self._check_shape(check_matrix("x", x).shape)
        z = normal(x.shape, x.dtype, x.device, generator).to(x.device)
        # As on St(1, 1) = {-1, 1}: every tangent vector is zero, but for rounding.
        if self._dim(*x.shape[-2:]) == 0:
            return torch.zeros_like(x)
        point = x.to(z.dtype)
        u = self._unit(point, self.project_tangent(point, z))
        # Where few dimensions are tangent, dividing blew the first projection's rounding up; the second removes it.
        return self._unit(point, self.project_tangent(point, u)).to(x.dtype)

    def _unit(self, x: Tensor, u: Tensor) -> Tensor:
        return u / self.norm(x, u)[..., None, None]

    def gradient(self, x: Tensor, egrad: Tensor) -> Tensor:
        """Riemannian gradient from the Euclidean one: <gradient, v>_x = <egrad, v> for every tangent v.

        Args:
            x: point (*b, n, p).
            egrad: ordinary gradient, same shape.

        Returns:
            Tangent vector (*b, n, p). Cost: 4 n p^2 flops, two passes.
        """
        return on_stacks(lambda x, egrad: self._metric.gradient([x], [egrad])[0][0], x=x, egrad=egrad)

    @full_precision
    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Inner product <u, v>_x of tangent vectors in the metric, (*b,)."""
        xs, us, vs = as_stacks(x=x, u=u, v=v)
        return self._metric.inner([xs], [us], [vs]).reshape(x.shape[:-2])

    def norm(self, x: Tensor, u: Tensor) -> Tensor:
        """Norm of a tangent vector in the metric, (*b,)."""
        return safe_root(self.inner(x, u, u))

    # Motion

    def retract(self, x: Tensor, u: Tensor) -> Tensor:
        """The point y = R(x, u) for a tangent u, by the manifold's retraction; R(x, 0) is x bit for bit."""
        self._check_shape(check_matrix("x", x).shape)
        y, watch = self.retraction_part(x, u), self._watch(u)
        if watch is not None:
            watch([y])
        return y

    def _watch(self, step: Tensor, reduce: Reduce | None = None) -> Callable[[Tall], None] | None:
        """What looks at the new points of such a step, u or x^T u; None where there is nothing to see."""
        return None

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """The geodesic of this metric from x in direction u at time 1."""
        self._check_shape(check_matrix("x", x).shape)
        if self.metric not in retractions.exp.variants:
            raise ConfigError(
                f"no closed geodesic is known for metric {self.metric!r}; use retract, or one of the metrics "
                f"{', '.join(map(repr, retractions.exp.variants))}."
            )
        return retractions.exp(x, u, metric=self.metric)

    def transport_vector(self, x: Tensor, u: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """v, tangent at x, as a tangent vector at y = retract(x, u): by projection, or the registered rule."""
        return (self._transport or self._by_projection())(x, u, y, v)

    def _by_projection(self) -> transports.Transport:
        return transports.Transport("projection", "gram", self._tangent.function)

    # The beats of the optimizer's step, on stacks of several heights at once

    def stacked_gradient(
        self,
        xs: Tall,
        gs: Tall,
        *,
        arriving: str = "factors",
        reduce: Reduce | None = None,
        small: Tensor | None = None,
    ) -> Tensor:
        """Overwrite the stacks gs by Riemannian gradients; returns x^T g, in which every non-finite entry shows."""
        return self._metric.gradient(xs, gs, reduce, out=gs, small=small)[1]

    @property
    def _normalizes_moved(self) -> bool:
        """Whether new points are made from moved ones as they are, and nothing else."""
        return self._projection is None and self.retraction_part.form == "normalizer"

    def stacked_overlap(
        self, xs: Tall, ms: Tall, reduce: Reduce | None = None, small: Tensor | None = None
    ) -> Tensor:
        """Small matrices (B, p, p) in which a non-finite moved point m shows, near zero where m = x.

        x^T m - I, which is x^T d of the displacement; m^T m - I where that is all that the new points need.
        """
        w = gram(ms if self._normalizes_moved else xs, ms, reduce, out=small)
        w.diagonal(dim1=-2, dim2=-1).sub_(1)
        return w

    def stacked_move(
        self,
        xs: Tall,
        ms: Tall,
        e: Tensor,
        scales: Sequence[float],
        *,
        drift: float,
        reduce: Reduce | None = None,
        judge: Callable[[list[Tensor]], Tensor] | None = None,
    ) -> list[OpenSum]:
        """Scale and project the displacements m - x and retract them: the new points, as open sums.

        Args:
            xs: stacks (b, n, p), the points.
            ms: the moved points; overwritten.
            e: their overlap; overwritten.
            scales: factor of the displacement, for each stack.
            drift: the largest |x^T x - I| there may be.
            reduce: sums a batch over ranks.
            judge: of the new points, a mask (B,) of those to be left where they were, if the manifold `is_contained`;
                the result then lies in ms.

        Raises:
            StepError: the displacement cannot be retracted, or a retraction of one's own left the manifold.
        """
        still, watch = unmoved_matrices(xs, ms, e, drift, reduce), self._watch(e, reduce)
        ys = self._new_points(xs, ms, e, scales, reduce)
        if watch is not None:
            watch(close(ys))
        if judge is not None:
            news = close(ys)
            unfit = judge(news)
            still = unfit if still is None else still | unfit
            return [(y, None) for y in keep_where(still, xs, news, out=ms)]
        return ys if still is None else [(y, None) for y in keep_where(still, xs, close(ys))]

    def _new_points(
        self, xs: Tall, ms: Tall, e: Tensor, scales: Sequence[float], reduce: Reduce | None
    ) -> list[OpenSum]:
        """The new points, but for x bit for bit where nothing has moved."""
        projection, retraction = self._projection, self.retraction_part
        if self._normalizes_moved and all(s == 1.0 for s in scales):
            e.diagonal(dim1=-2, dim2=-1).add_(1)
            return normalize(ms, retraction, reduce, g=e)
        if projection is self._tangent and retraction.form == "normalizer":
            zs = _projected(xs, ms, projection.function(e), scales)
            return normalize(zs, retraction, reduce, g=gram(zs, zs, reduce, out=e))
        ds = _scaled_displacements(xs, ms, scales, out=ms)
        if projection is not None:
            ds = projection.apply(xs, ds, reduce=reduce, out=ds)
        ys = retraction.apply(xs, ds, reduce=reduce)
        retraction.check_points(ys)
        return [(y, None) for y in ys]

    def square_of_points(self, shape: tuple[int, ...]) -> int:
        """p."""
        return shape[-1]

    @property
    def is_contained(self) -> bool:
        """Where nothing but our own p x p algebra of each matrix is done; somebody else's may stumble over NaN."""
        return (
            self.retraction_part.name in retractions.CONTAINED
            and self._projection in (None, self._tangent)
            and self._transport is None
            and type(self).stacked_move is Frames.stacked_move
        )

    def stacked_transporter(
        self, xs: Tall, ms: Tall, scales: Sequence[float], reduce: Reduce | None = None
    ) -> Carrier | None:
        """What carries first moments from the stacks xs to the new ones, made before `stacked_move` overwrites ms."""
        transport = self._transport
        if transport is None:
            return None
        if transport.form == "gram":
            return Carrier(lambda index, ys, vs: transport.apply(ys, ys, ys, vs, reduce))
        us = _scaled_displacements(xs, ms, scales)
        if self._projection is not None:
            us = self._projection.apply(xs, us)
        return Carrier(
            lambda index, ys, vs: transport.apply([xs[i] for i in index], [us[i] for i in index], ys, vs)
        )

    def stacked_spectral(
        self, xs: Tall, ms: Tall, e: Tensor, rates: Sequence[float], reduce: Reduce | None = None
    ) -> Tensor:
        """Give every displacement, made tangent, the singular values rate instead of its own; returns the overlap.

        Reference: SPEL and Muon, whose direction this is: msign(u) = u (u^T u)^(-1/2).
        """
        us = self._tangent.apply(xs, _scaled_displacements(xs, ms, [1.0] * len(xs)), reduce=reduce)
        eps = torch.finfo(us[0].dtype).eps
        roots = split(inverse_symmetric_root(torch.linalg.eigh(gram(us, us, reduce).double()), eps), us)
        for x, m, u, root, rate in zip(xs, ms, us, roots, rates, strict=True):
            torch.baddbmm(x, u, root.to(u.dtype), alpha=rate, out=m)
        return self.stacked_overlap(xs, ms, reduce)

    def stacked_distance(self, xs: Tall, ys: Tall, reduce: Reduce | None = None) -> float:
        """Sum of ||y - x||_F^2."""
        return squared_norm([y - x for x, y in zip(xs, ys, strict=True)], reduce)


def _scaled_displacements(
    xs: Tall, ms: Tall, scales: Sequence[float], out: Tall | None = None
) -> list[Tensor]:
    """s (m - x) for every stack."""
    outs = [None] * len(xs) if out is None else out
    ds = [torch.sub(m, x, out=o) for x, m, o in zip(xs, ms, outs, strict=True)]
    return [d if s == 1.0 else d.mul_(s) for d, s in zip(ds, scales, strict=True)]


def _projected(xs: Tall, ms: Tall, normal: Tensor, scales: Sequence[float]) -> list[Tensor]:
    """x + s (d - x normal) with d = m - x as s m + x ((1 - s) I - s normal): one product, no pass for d."""
    zs = []
    for x, m, small, s in zip(xs, ms, split(normal, xs), scales, strict=True):
        if s == 1.0:
            zs.append(torch.baddbmm(m, x, small, alpha=-1, out=m))
        else:
            zs.append(torch.baddbmm(m, x, (1 - s) * identity_like(small) - s * small, beta=s, out=m))
    return zs


def as_shape(shape: tuple[Any, ...]) -> tuple[int, ...]:
    """(n, p) or ((n, p),), as in torch.randn, with n >= p >= 1."""
    found = as_sizes(shape, "(*b, n, p) with n >= p >= 1, for example (64, 8)")
    if not found[-2] >= found[-1] >= 1:
        raise ShapeError(
            f"the shape {found} is not (*b, n, p) with n >= p >= 1; swap the last two of a wide one."
        )
    return found
