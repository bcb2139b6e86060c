"""The Stiefel manifold St(n, p): n x p matrices with orthonormal columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import metrics, projections, retractions, transports
from ..errors import ConfigError, NotOnManifoldError, ShapeError
from ..gram import Reduce, Tall, gram, identity_like, split, squared_norm, sym, unmoved_matrices
from ..matfun import inverse_symmetric_root
from ..retractions import OpenSum, normalize
from ..shapes import as_stacks, check_matrix, compute_dtype, on_stacks, tolerance, without_autocast
from .base import Carrier, Manifold, register

_FAMILIES = {"metric": metrics, "retraction": retractions, "transport": transports, "projection": projections}


@register("Stiefel")
@dataclass(frozen=True)
class Stiefel(Manifold):
    """St(n, p) = {x : x^T x = I}, with its parts picked by name.

    Points are tensors (*b, n, p), n >= p; tangent vectors u, of the same shape, satisfy x^T u + u^T x = 0.

    Args:
        metric: "canonical", "euclidean" or a registered name: what the gradient means.
        retraction: "polar", "qr", "svd", "cayley", "exp", "newton_schulz", a registered name, or a plain function
            ``(x, u) -> y`` on stacks (B, n, p).
        transport: "none", "projection" or a registered name: what `RiemannianWrapper` does with first moments.
        projection: "tangent", "none" or a registered name: how a displacement becomes tangent before it is retracted.

    Raises:
        UnknownNameError: a name that is not registered.
    """

    metric: str = "canonical"
    retraction: str | Callable[[Tensor, Tensor], Tensor] = "polar"
    transport: str = "none"
    projection: str = "tangent"

    def __post_init__(self) -> None:
        for option, family in _FAMILIES.items():
            value = getattr(self, option)
            if isinstance(value, str):
                if value != "none" or option not in ("transport", "projection"):
                    family.get(value)
            elif option != "retraction" or not callable(value):
                raise ConfigError(
                    f"Stiefel({option}={value!r}): a registered name is needed, one of {family.names()}."
                )

        known = self._metrics_of_retraction()
        if known and self.metric not in known:
            raise ConfigError(
                f"retraction {self.retraction!r} is the geodesic of a metric, and {self.metric!r} has none; use "
                f"another retraction, or one of the metrics {', '.join(map(repr, known))}."
            )

    def _metrics_of_retraction(self) -> tuple[str, ...]:
        """The metrics that the retraction serves; empty where it serves all."""
        found = retractions.get(self.retraction) if isinstance(self.retraction, str) else self.retraction
        return tuple(found.variants) if isinstance(found, retractions.Retraction) else ()

    # The parts, resolved. Registries are dictionaries: this costs nothing beside a step.

    @property
    def _metric(self) -> metrics.Metric:
        return metrics.get(self.metric)

    @property
    def _retraction(self) -> retractions.Retraction:
        if isinstance(self.retraction, str):
            return retractions.get(self.retraction).for_metric(self.metric)
        if isinstance(self.retraction, retractions.Retraction):
            return self.retraction.for_metric(self.metric)
        return retractions.Retraction("a plain function", "ambient", self.retraction, {})

    def whole_part(self) -> str | None:
        """The part of ambient form, if there is one."""
        parts: dict[str, Any] = {"retraction": self._retraction}
        if self.projection != "none":
            parts["projection"] = projections.get(self.projection)
        if self.transport != "none":
            parts["transport"] = transports.get(self.transport)
        found = [f"{option} {part.name!r}" for option, part in parts.items() if part.form == "ambient"]
        return found[0] if found else None

    # Points

    @without_autocast
    def residual(self, x: Tensor) -> Tensor:
        """max |x^T x - I| of every matrix, (*b,), in the compute dtype."""
        return self.stacked_residual(as_stacks(x=x)).reshape(x.shape[:-2])

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
                f"use project_point(x), or constrain(module, name, manifold) for a parameter."
            )

    def random_point(
        self,
        *shape: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A point (*b, n, p), uniform in the Haar measure: the Q of a Gaussian, signs fixed (Mezzadri 2007)."""
        shape = _as_shape(shape)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        z = torch.empty(shape, dtype=dtype, device="meta")
        check_matrix("random_point's result", z)
        source = device if generator is None else generator.device
        z = torch.randn(shape, dtype=compute_dtype(dtype), device=source, generator=generator)
        q, r = torch.linalg.qr(z)
        signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
        # LAPACK's columns lie one after the other; a parameter's rows should.
        return (q * signs[..., None, :]).to(dtype=dtype, device=device).contiguous()

    def project_point(self, z: Tensor) -> Tensor:
        """The point nearest to z: its polar factor, by SVD; see `projections.polar_factor`."""
        return projections.polar_factor(z)

    def dim(self, *shape: int) -> int:
        """Dimension of the manifold of points (*b, n, p): n p - p (p + 1) / 2 for each matrix."""
        *batch, n, p = _as_shape(shape)
        return math.prod(batch) * (n * p - p * (p + 1) // 2)

    # Tangent vectors

    def project_tangent(self, x: Tensor, z: Tensor) -> Tensor:
        """The orthogonal projection z - x sym(x^T z) of an ambient z (*b, n, p)."""
        return projections.tangent(x, z)

    @without_autocast
    def random_tangent(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A tangent vector of unit norm in the metric; zero where the manifold is a single point."""
        check_matrix("x", x)
        source = x.device if generator is None else generator.device
        z = torch.randn(x.shape, dtype=compute_dtype(x.dtype), device=source, generator=generator).to(
            x.device
        )
        if x.shape[-2:] == (1, 1):  # St(1, 1) = {-1, 1}: every tangent vector is zero, but for rounding
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

    @without_autocast
    def inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Inner product <u, v>_x of tangent vectors in the metric, (*b,)."""
        xs, us, vs = as_stacks(x=x, u=u, v=v)
        return self._metric.inner([xs], [us], [vs]).reshape(x.shape[:-2])

    def norm(self, x: Tensor, u: Tensor) -> Tensor:
        """Norm of a tangent vector in the metric, (*b,)."""
        return self.inner(x, u, u).clamp_min(0).sqrt()

    # Motion

    def retract(self, x: Tensor, u: Tensor) -> Tensor:
        """The point y = R(x, u) for a tangent u, by the manifold's retraction; R(x, 0) is x bit for bit."""
        return self._retraction(x, u)

    def exp(self, x: Tensor, u: Tensor) -> Tensor:
        """The geodesic of this metric from x in direction u at time 1."""
        if self.metric not in retractions.exp.variants:
            raise ConfigError(
                f"no closed geodesic is known for metric {self.metric!r}; use retract, or one of the metrics "
                f"{', '.join(map(repr, retractions.exp.variants))}."
            )
        return retractions.exp(x, u, metric=self.metric)

    def transport_vector(self, x: Tensor, u: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """v, tangent at x, as a tangent vector at y = retract(x, u): by projection, or the registered rule."""
        return transports.get("projection" if self.transport == "none" else self.transport)(x, u, y, v)

    # The beats of the optimizer's step, on stacks of several heights at once

    def stacked_gradient(
        self, xs: Tall, gs: Tall, *, arriving: str = "factors", reduce: Reduce | None = None
    ) -> Tensor:
        """Overwrite the stacks gs by Riemannian gradients; returns x^T g, in which every non-finite entry shows."""
        return self._metric.gradient(xs, gs, reduce, out=gs)[1]

    def stacked_overlap(self, xs: Tall, ms: Tall, reduce: Reduce | None = None) -> Tensor:
        """x^T m - I, (B, p, p), for moved points m: x^T d of the displacement, where a non-finite one shows."""
        w = gram(xs, ms, reduce)
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
    ) -> list[OpenSum]:
        """Scale and project the displacements m - x and retract them: the new points, as open sums.

        Args:
            xs: stacks (b, n, p), the points.
            ms: the moved points; overwritten.
            e: their overlap.
            scales: factor of the displacement, for each stack.
            drift: the largest |x^T x - I| there may be.
            reduce: sums a batch over ranks.
        """
        unmoved = unmoved_matrices(xs, ms, e, drift, reduce)
        if unmoved is None and self.projection == "tangent" and self._retraction.form == "normalizer":
            return normalize(_projected(xs, ms, e, scales), self._retraction, reduce)
        ds = _scaled_displacements(xs, ms, scales, out=ms)
        if self.projection != "none":
            ds = projections.get(self.projection).apply(xs, ds, reduce=reduce, out=ds)
        return [(y, None) for y in self._retraction.apply(xs, ds, zero=unmoved, reduce=reduce)]

    def stacked_transporter(
        self, xs: Tall, ms: Tall, scales: Sequence[float], reduce: Reduce | None = None
    ) -> Carrier | None:
        """What carries first moments from the stacks xs to the new ones, made before `stacked_move` overwrites ms."""
        if self.transport == "none":
            return None
        transport = transports.get(self.transport)
        if transport.form == "gram":
            return Carrier(lambda index, ys, vs: transport.apply(ys, ys, ys, vs, reduce))
        us = _scaled_displacements(xs, ms, scales)
        if self.projection != "none":
            us = projections.get(self.projection).apply(xs, us)
        return Carrier(
            lambda index, ys, vs: transport.apply([xs[i] for i in index], [us[i] for i in index], ys, vs)
        )

    def stacked_spectral(
        self, xs: Tall, ms: Tall, e: Tensor, rates: Sequence[float], reduce: Reduce | None = None
    ) -> Tensor:
        """Give every displacement, made tangent, the singular values rate instead of its own; returns the overlap.

        Reference: SPEL and Muon, whose direction this is: msign(u) = u (u^T u)^(-1/2).
        """
        us = projections.tangent.apply(xs, _scaled_displacements(xs, ms, [1.0] * len(xs)), reduce=reduce)
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


def _projected(xs: Tall, ms: Tall, e: Tensor, scales: Sequence[float]) -> list[Tensor]:
    """x + s (d - x sym(x^T d)) with d = m - x as s m + x ((1 - s) I - s sym(e)): one product, no pass for d."""
    zs = []
    for x, m, small, s in zip(xs, ms, split(sym(e), xs), scales, strict=True):
        if s == 1.0:
            zs.append(torch.baddbmm(m, x, small, alpha=-1, out=m))
        else:
            zs.append(torch.baddbmm(m, x, (1 - s) * identity_like(small) - s * small, beta=s, out=m))
    return zs


def _as_shape(shape: tuple[Any, ...]) -> tuple[int, ...]:
    """(n, p) or ((n, p),), as in torch.randn."""
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = tuple(shape[0])
    if len(shape) >= 2 and not (shape[-2] >= shape[-1] >= 1 and min(shape) >= 0):
        raise ShapeError(
            f"the shape {tuple(shape)} is not (*b, n, p) with n >= p >= 1; swap the last two of a wide one."
        )
    if len(shape) < 2:
        raise ShapeError(
            f"the shape {shape} has fewer than two dimensions; give (*b, n, p), for example (64, 8)."
        )
    return shape
