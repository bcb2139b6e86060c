"""Retractions on Stiefel: a few lines of p x p algebra each.

A retraction maps a point x and a tangent displacement u to a point y = x + u + O(u^2). Four forms:

    "normalizer"  t = f(g), y = z t, with z = x + u and its true Gram g = z^T z: drift in x corrects itself
    "gram"        a, b = f(w, q), y = x a + u b, with w = x^T u, q = u^T u; `fold` corrects drift
    "ambient"     y = f(x, u) on tall stacks: correct, but neither fused nor sharded

``names()`` lists them, ``get(name).order`` holds the declared order for each metric, and calling one,
``polar(x, u)``, retracts tensors of any batch shape. A displacement that is exactly zero returns x bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import metrics
from .errors import ConfigError, StepError, UnknownNameError
from .full_precision import full_precision
from .gram import (
    Reduce,
    Tall,
    combine,
    fold,
    gram,
    grams,
    identity_like,
    keep_where,
    predicted_gram,
    products,
    split,
    zero_matrices,
)
from .matfun import (
    accretive_inverse,
    cholesky_inverse_increment,
    distance_from_identity,
    expm,
    inverse_sqrt_increment,
    norm,
    qr_inverse,
    rough_distance_from_identity,
    spectral_bound,
)
from .registry import Registry
from .shapes import as_stacks, check_count, check_returned
from .svd_factor import svd_factor
from .transforms import host_can_look, is_differentiated, under_transform

EXACT = math.inf
FORMS = ("gram", "ambient", "normalizer")
# ||z^T z - I|| up to which one pass of a normalizer is sure to reach a few eps.
NEAR = 0.9
# ... and from which float32 Grams lose what they must resolve, so that the passes run in float64.
FAR = 8.0
PASSES = 6
# Relative error of a length in a result of somebody's own that is neither rounding nor an approximation's.
OFF = 0.1


@dataclass(frozen=True)
class Retraction:
    """A retraction as a value; call it as ``retraction(x, u)``.

    Attributes:
        name: its registered name.
        form: "normalizer", "gram" or "ambient" (see the module).
        function: the small (or ambient) part.
        order: declared order of agreement with the geodesic, for each metric; ``math.inf`` where exact.
        radius: largest ||u||_2 that it accepts; beyond it StepError.
        equivariance: "both" if R(p x q, p u q) = p R(x, u) q for orthogonal p and q, else "left".
        variants: the small part for each metric, where the metric decides (exp).
        far: the small part where ||u||_2 is seen to be large, if another one is right there; of the form "gram".
    """

    name: str
    form: str
    function: Callable[..., object] = field(repr=False)
    order: Mapping[str, float] = field(hash=False)
    radius: float = math.inf
    equivariance: str = "both"
    variants: Mapping[str, Callable[..., object]] = field(default_factory=dict, hash=False, repr=False)
    far: Callable[..., object] | None = field(default=None, repr=False)

    @property
    def is_registered(self) -> bool:
        """Whether its name means this very part."""
        return self.name in names() and get(self.name) is self

    def __reduce__(self) -> Any:
        """Pickled by its name where that is enough: the name of its function means the part itself."""
        return (_by_name, (self.name,)) if self.is_registered else super().__reduce__()

    @full_precision
    def __call__(self, x: Tensor, u: Tensor, *, metric: str | None = None) -> Tensor:
        """The point y = R(x, u).

        Args:
            x: point (*b, n, p), orthonormal columns; half precision is computed in float32.
            u: tangent vector at x, same shape.
            metric: for ``exp``, whose geodesic: "canonical" (default) or "euclidean".

        Raises:
            ShapeError: x is not tall and real, or u is not like it.
            StepError: u is beyond the radius, or too large to be resolved in this dtype.
        """
        xs, us = as_stacks(x=x, u=u)
        (y,) = self.for_metric(metric).apply([xs], [us], zero=zero_matrices([us]))
        y = y.reshape(x.shape).to(x.dtype)
        return y if y is not xs else y.clone()

    def for_metric(self, metric: str | None) -> Retraction:
        """The variant that belongs to a metric (only ``exp`` has several)."""
        if not self.variants or metric is None:
            return self
        if metric not in self.variants:
            known = ", ".join(map(repr, self.variants))
            raise UnknownNameError(
                f"{self.name} knows no geodesic of the metric {metric!r}; it knows {known}."
            )
        return replace(self, function=self.variants[metric])

    def coefficients(self, w: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """The small part: a, b with y = x a + u b for orthonormal x, w = x^T u, q = u^T u, all (*b, p, p).

        Raises:
            ConfigError: the form is ambient. StepError: the function returned something else.
        """
        if self.form == "ambient":
            raise ConfigError(
                f"retraction {self.name!r} has the ambient form: it has no p x p coefficients; call it on (x, u)."
            )
        if self.form == "gram":
            a, b = check_count("retraction", self.name, self.function(w, q), ("a", "b"))
            return self._matrix(a, w), self._matrix(b, w)
        t = self.increment(identity_like(w) + w + w.mT + q) + identity_like(w)
        return t, t

    def _matrix(self, found: object, w: Tensor) -> Tensor:
        """A coefficient; what does not depend on u may be one matrix for the batch, as I is."""
        if isinstance(found, Tensor) and found.ndim == 2 and found.shape == w.shape[-2:]:
            return found.expand_as(w)
        called = "it maps w = x^T u and q = u^T u, (B, p, p), to a and b"
        return check_returned("retraction", self.name, found, w.shape, called)

    def increment(self, g: Tensor) -> Tensor:
        """The small part of a normalizer, t - I of g, which it may overwrite.

        Raises:
            StepError: it has another shape.
        """
        called = "it maps g = (x + u)^T (x + u), (B, p, p), to t - I"
        return check_returned("retraction", self.name, self.function(g), g.shape, called)

    def apply(
        self, xs: Tall, us: Tall, *, zero: Tensor | None = None, reduce: Reduce | None = None
    ) -> list[Tensor]:
        """The retraction on stacks.

        Args:
            xs: stacks (b, n, p).
            us: stacks of tangent displacements.
            zero: mask of the zero displacements, as from `zero_matrices`.
            reduce: sums a batch over ranks.

        Raises:
            StepError: a displacement is beyond the radius or not finite, or the function returned no such stacks.
        """
        if self.form == "normalizer":
            zs = [x + u for x, u in zip(xs, us, strict=True)]
            ys = close(normalize(zs, self, reduce))
        elif self.form == "gram":
            ys = _apply_gram(self, xs, us, reduce)
        else:
            ys = [self._ambient(x, u) for x, u in zip(xs, us, strict=True)]
        if zero is None:
            return ys
        # The value of x with the derivatives of y: those of R at u = 0 are not zero.
        fixed = [
            x.detach() + (y - y.detach()) if is_differentiated(y) else x for x, y in zip(xs, ys, strict=True)
        ]
        return keep_where(zero, fixed, ys)

    def check_points(self, ys: Tall) -> None:
        """Refuse results of somebody's own code that are seen to be no points, before a parameter holds them.

        What is looked at is the length of the sum of the columns: most that leaves the manifold shows in it, not all.

        Raises:
            StepError: they are, as seen on the CPU.

        Cost: one pass over them, where the form is ambient.
        """
        if self.form != "ambient":
            return
        for y in ys:
            if host_can_look(y) and not _looks_orthonormal(y):
                c = gram([y], [y])
                off = (c - identity_like(c)).abs().amax().item()
                raise StepError(
                    f"retraction {self.name!r} left the manifold, |y^T y - I| = {off:.2g}; it has to return "
                    f"orthonormal columns, as torch.linalg.qr(x + u)[0] has, or needs shorter steps (lower lr)"
                )

    def _ambient(self, x: Tensor, u: Tensor) -> Tensor:
        """f(x, u), which is somebody's own code."""
        if self.radius < math.inf:
            z = gram([u], [u])
            z = z + identity_like(z)
            _check_radius(self, distance_from_identity(z), z)
        y = check_returned(
            "retraction",
            self.name,
            self.function(x, u),
            x.shape,
            "it is called with stacks x and u, (B, n, p)",
        )
        if host_can_look(y) and not _is_finite(y):
            raise StepError(
                f"retraction {self.name!r} returned NaN or Inf; shorten the step (lower lr, clip the gradient)."
            )
        return y


def _is_finite(y: Tensor) -> bool:
    """Whether every entry is, mostly seen from their sum, a quarter of the price."""
    return bool(torch.isfinite(y.sum())) or bool(torch.isfinite(y).all())


def _looks_orthonormal(y: Tensor) -> bool:
    """Whether the sum of the columns of every y is about as long as that of orthonormal ones, p^(1/2)."""
    if y.numel() == 0:
        return True
    lengths, root = torch.linalg.vector_norm(y.sum(-1), dim=-1), y.shape[-1] ** 0.5
    return (lengths - root).abs().amax().item() < OFF * root


# The two summands of a result, for whoever writes it out to add on the way; None where it is whole already.
OpenSum = tuple[Tensor, Tensor | None]


def close(sums: Sequence[OpenSum]) -> list[Tensor]:
    """Do the addition that was left open."""
    return [z if dz is None else z + dz for z, dz in sums]


def _apply_gram(r: Retraction, xs: Tall, us: Tall, reduce: Reduce | None) -> list[Tensor]:
    c, w, q = grams((xs, xs), (xs, us), (us, us), reduce=reduce)
    z = q + identity_like(q)  # the Gram of x + u, for a tangent u
    far = distance_from_identity(z)
    _check_radius(r, far, z)
    if far is not None and far > FAR:
        if q.dtype == torch.float32:  # Grams of so long a step are blind to x
            ys = _apply_gram(r, [x.double() for x in xs], [u.double() for u in us], reduce)
            return [y.float() for y in ys]
        r = replace(r, function=r.far or r.function)
    # The small matrices in float64: it costs next to nothing and removes most of the noise.
    small = [m.double() for m in (c, w, q)]
    a, b = r.coefficients(small[1], small[2])
    g = predicted_gram(a, b, *small)
    off = distance_from_identity(g)
    a, b = fold(a, b, g)
    moved = combine(xs, xs, (a - identity_like(a)).to(c.dtype))
    ys = combine(moved, us, b.to(c.dtype))
    # fold squares the error; what that leaves above rounding (u not tangent, or long) takes the sure way.
    if off is None or (off * off <= torch.finfo(c.dtype).eps and far <= NEAR):  # type: ignore[operator]
        return ys
    return close(normalize(ys, polar, reduce))


def _check_radius(r: Retraction, far: float | None, g: Tensor) -> None:
    """Refuse ||u||_2 beyond the radius.

    Args:
        r: the retraction.
        far: a bound of ||u||_2^2, up to p^(1/2) above it; None where the host must not look.
        g: the Gram of x + u, I + u^T u, whose eigenvalues are looked at where the bound does not settle it.

    Raises:
        StepError: it is beyond.
    """
    if far is None or not far > r.radius * r.radius:
        return
    if far < math.inf:
        far = (torch.linalg.eigvalsh(g.detach()) - 1).abs().amax().item()
    if far > r.radius * r.radius:
        raise StepError(
            f"{r.name} accepts steps up to ||u||_2 = {r.radius:g}, and this one has {math.sqrt(far):.3g}: "
            f"lower the learning rate or use retraction='polar', which takes any step."
        )


def normalize(
    zs: Tall, r: Retraction, reduce: Reduce | None = None, *, g: Tensor | None = None
) -> list[OpenSum]:
    """y = z t, t^T z^T z t = I by a normalizer; again while z was too far from orthonormal for one pass.

    Args:
        zs: stacks (b, n, p) of full column rank.
        r: a retraction of the normalizer form.
        reduce: sums a batch over ranks.
        g: z^T z where it is at hand already; overwritten.

    Returns:
        y for every stack, as an open sum.

    Cost: 4 n p^2 flops and two passes when ||z^T z - I|| <= 1. Beyond, on the CPU, further passes, from 8 on in
    float64. An accelerator, where the host must not look, always does one: its residual of about
    eps (1 + norm(u)^2) is repaired by the next step.
    """
    dtype = zs[0].dtype
    measure = rough_distance_from_identity if r.radius == math.inf else distance_from_identity
    for turn in range(PASSES):
        if turn > 0 or g is None:
            g = gram(zs, zs, reduce)
        far = measure(g)
        if turn == 0:
            _check_radius(r, far, g)
        if far is not None and NEAR < far < math.inf:
            far = min(far, spectral_bound(g.detach() - identity_like(g)).amax().item())
        if far is not None and far > FAR and g.dtype == torch.float32:
            zs = [z.double() for z in zs]
            g = gram(zs, zs, reduce)
        sums = _products_with(zs, r.increment(g))
        if far is None or far <= NEAR:
            return sums if zs[0].dtype == dtype else [(y.to(dtype), None) for y in close(sums)]
        zs = close(sums)
    raise StepError(
        f"the step is too long to be retracted: after {PASSES} passes ||y^T y - I|| is still {far:.2g} "
        f"(nan or inf where the displacement itself was not finite). Lower the learning rate or clip the gradient."
    )


def _products_with(zs: Tall, t: Tensor) -> list[OpenSum]:
    """z + z t for every stack; on an accelerator the product adds z itself, two passes less, where autograd is off."""
    if host_can_look(zs[0]) or is_differentiated(zs[0]) or under_transform():
        return list(zip(zs, products(zs, t), strict=True))
    return [(torch.baddbmm(z, z, s), None) for z, s in zip(zs, split(t, zs), strict=True)]


_registry: Registry[Retraction] = Registry("retraction")
names, get = _registry.names, _registry.get


def as_part(retraction: str | Retraction | Callable[[Tensor, Tensor], Tensor]) -> Retraction:
    """What a manifold's option ``retraction`` means: a name, a part, or a plain function, which declares nothing."""
    if isinstance(retraction, str):
        return get(retraction)
    if isinstance(retraction, Retraction):
        return retraction
    return Retraction("a plain function", "ambient", retraction, {}, equivariance="")


def as_option(
    owner: str, retraction: str | Retraction | Callable[[Tensor, Tensor], Tensor]
) -> str | Callable[[Tensor, Tensor], Tensor]:
    """What a manifold keeps as its option ``retraction``: a name where there is one.

    Args:
        owner: the manifold, for errors.
        retraction: what it was given.

    Raises:
        UnknownNameError: a name that is not registered.
        ConfigError: no function either, or one that cannot be hashed.
    """
    if isinstance(retraction, str):
        get(retraction)
        return retraction
    if isinstance(retraction, Retraction) and retraction.is_registered:
        return retraction.name
    if not callable(retraction):
        raise ConfigError(
            f"{owner}(retraction={retraction!r}): a registered name is needed, one of {names()}, or a function."
        )
    try:
        hash(retraction)
    except TypeError:
        raise ConfigError(
            f"{owner}(retraction={retraction!r}) cannot be hashed, as all options of a manifold are: give its class "
            f"__hash__, wrap it in a function, or register it and pass the name."
        ) from None
    return retraction


def _by_name(name: str) -> Retraction:
    return get(name)


def register(
    name: str,
    *,
    form: str = "gram",
    order: Mapping[str, float] | None = None,
    radius: float = math.inf,
    equivariance: str = "both",
) -> Callable[[Callable[..., object]], Retraction]:
    """Decorator that adds a retraction.

    Args:
        name: the word that ``Stiefel(retraction=...)`` will accept.
        form: "gram": ``f(w, q) -> (a, b)``, p x p, y = x a + u b, with w = x^T u and q = u^T u for orthonormal x;
            drift correction and the zero step are the library's. "ambient": ``f(x, u) -> y`` on stacks
            (B, n, p). "normalizer": ``f(g) -> t - I``, y = (x + u) t, with g = (x + u)^T (x + u), which it may
            overwrite.
        order: declared order for each metric, for example {"canonical": 1, "euclidean": 2}; default 1.
        radius: largest ||u||_2 it accepts.
        equivariance: "both" or "left".

    Raises:
        UnknownNameError: the order names a metric that is not registered.
        ConfigError: not a name, or one that is taken; another form; what is declared cannot be true.
    """
    _registry.check_name(name)
    if form not in FORMS:
        raise ConfigError(
            f"retraction {name!r} was given form={form!r}; use one of {', '.join(map(repr, FORMS))}."
        )
    declared = {"euclidean": 1, "canonical": 1} if order is None else order
    declared = checked_facts(name, declared, radius, equivariance)
    return lambda function: _registry.add(
        name, Retraction(name, form, function, declared, radius, equivariance)
    )


def checked_facts(name: str, order: object, radius: object, equivariance: object) -> dict[str, float]:
    """The order as a dict, where all that is declared of a retraction can be true.

    Raises:
        UnknownNameError: the order names a metric that is not registered.
        ConfigError: the order is no mapping to numbers from 1 on, the radius not positive, the equivariance no word.
    """
    given = f"retraction {name!r} was given"
    if not isinstance(order, Mapping):
        raise ConfigError(
            f"{given} order={order!r}; use a mapping from metric to order, such as {{'euclidean': 2}}."
        )
    for metric, value in order.items():
        metrics.get(metric)
        if not _is_number(value) or not value >= 1:
            raise ConfigError(
                f"{given} order {value!r} for the metric {metric!r}; use 1, 2 or math.inf (exact)."
            )
    if not _is_number(radius) or not radius > 0:  # type: ignore[operator]
        raise ConfigError(f"{given} radius={radius!r}; use a positive number, math.inf for none.")
    if equivariance not in ("both", "left"):
        raise ConfigError(f"{given} equivariance={equivariance!r}; use 'both' or 'left'.")
    return dict(order)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@register("polar", form="normalizer", order={"euclidean": 2, "canonical": 1})
def polar(g: Tensor) -> Tensor:
    """y = z (z^T z)^(-1/2), z = x + u: the nearest point (Absil & Malick 2012)."""
    return inverse_sqrt_increment(g, overwrite=True)


@register("qr", form="normalizer", order={"euclidean": 1, "canonical": 1}, equivariance="left")
def qr(g: Tensor) -> Tensor:
    """y = qf(x + u) with a positive diagonal, by Cholesky of the Gram (Yamamoto et al. 2015, CholeskyQR2)."""
    return cholesky_inverse_increment(g)


def _cayley(w: Tensor, q: Tensor, inverse: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Cayley transform of the tangent vector's skew matrix, one p x p solve (Wen & Yin 2013)."""
    eye = identity_like(w)
    b = inverse(eye - 0.5 * w + 0.25 * (q - w.mT @ w))
    return (2 * eye - w) @ b - eye, b


cayley = _registry.add(
    "cayley",
    Retraction(
        "cayley",
        "gram",
        partial(_cayley, inverse=accretive_inverse),
        {"euclidean": 1, "canonical": 2},
        far=partial(_cayley, inverse=qr_inverse),
    ),
)


def _exponential(w: Tensor, q: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Blocks M, N of exp([[rate w, -k/s], [s I, 0]]), k = q - w^T w, as (M - w N / s, N / s).

    The balance s = ||k||^(1/2) keeps both off-diagonal blocks alike, without which the error grows with 1/||u||.
    """
    p = w.shape[-1]
    k = q - w.mT @ w
    s = norm(k.detach()).sqrt().clamp_min(torch.finfo(w.dtype).eps)
    upper = torch.cat((rate * w, -k / s), -1)
    lower = torch.cat((s * identity_like(w), torch.zeros_like(w)), -1)
    e = expm(torch.cat((upper, lower), -2))
    n = e[..., p:, :p] / s
    return e[..., :p, :p] - w @ n, n


def exp_canonical(w: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Geodesic of the canonical metric (Edelman, Arias & Smith 1998, corollary 2.2), without their QR."""
    return _exponential(w, q, 1.0)


def exp_euclidean(w: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Geodesic of the Euclidean metric (Edelman, Arias & Smith 1998, section 2.2.2)."""
    a, b = _exponential(w, q, 2.0)
    turn = expm(-w)
    return a @ turn, b @ turn


exp = _registry.add(
    "exp",
    Retraction(
        "exp",
        "gram",
        exp_canonical,
        {"euclidean": EXACT, "canonical": EXACT},
        variants={"canonical": exp_canonical, "euclidean": exp_euclidean},
    ),
)
# Six steps from ||z^T z - I|| <= 0.49 leave 3e-25, far below float64's rounding; one step would be POGO's.
newton_schulz = register(
    "newton_schulz", form="normalizer", order={"euclidean": 2, "canonical": 1}, radius=0.7
)(partial(inverse_sqrt_increment, steps=6))


@register("svd", form="ambient", order={"euclidean": 2, "canonical": 1})
def svd(x: Tensor, u: Tensor) -> Tensor:
    """The polar retraction by batched thin SVD of x + u: the reference, about thirty times dearer."""
    try:
        return svd_factor(x + u)
    except RuntimeError as error:  # torch.linalg.LinAlgError is one
        raise StepError(
            f"x + u has no SVD, most likely because it is not finite ({error}); clip the gradient."
        ) from None


# Of which nothing but products and Cholesky factors are made, so that NaN in one matrix stays there.
CONTAINED = frozenset(names()) - {"svd"}
