"""Grassmann, SpecialOrthogonal, Sphere, Oblique and whatever else is registered: laws, oracles, and the wrapper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pymanopt.manifolds as pm
import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, jvp, vmap

from stiefelopt import (
    FixedRank,
    FixedRankPair,
    Grassmann,
    Oblique,
    RiemannianWrapper,
    SpecialOrthogonal,
    Sphere,
    Stiefel,
    constrain,
    manifolds,
    param_groups,
    retractions,
)
from stiefelopt.errors import ConfigError, NotOnManifoldError, ShapeError, StepError, UnknownNameError
from stiefelopt.laws import Law
from stiefelopt.manifolds import Manifold
from stiefelopt.manifolds.frames import Frames
from stiefelopt.manifolds.one_metric import OneMetric
from stiefelopt.retractions import close
from stiefelopt.shapes import tolerance
from stiefelopt.testing import MANIFOLD_LAWS, RETRACTION_LAWS, Case, check_manifold, law_drift, suite_of

KINDS: list[Any] = [
    kind
    for kind in map(manifolds.get, manifolds.names())
    if issubclass(kind, (Frames, OneMetric)) and kind is not Stiefel
]
EVERY = [kind(r) for kind in KINDS for r in retractions.names()]
SHAPES = ((6, 3), (4, 4), (5, 1), (2, 0, 5, 2))


def label(m: Any) -> str:
    return f"{type(m).__name__}-{m.retraction}"


def named(law: Law) -> str:
    return law.__name__


def case(m: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Any:
    return suite_of(m).case(shape, dtype, scale, 0)


# The laws, by enumeration


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("law", MANIFOLD_LAWS, ids=named)
def test_laws_of_manifolds(law: Law, kind: Any) -> None:
    for transport in ("none", "projection"):
        m = kind(transport=transport)
        for shape in SHAPES:
            for dtype in (torch.float32, torch.float64):
                for scale in (1e-6, 1.0, 1e2):
                    law(m, case(m, shape, dtype, scale))


@pytest.mark.parametrize("m", EVERY, ids=label)
@pytest.mark.parametrize("law", RETRACTION_LAWS, ids=named)
def test_laws_of_retractions(law: Law, m: Any) -> None:
    law(m, case(m, (6, 3)))
    law(m, case(m, (4, 4), torch.float32, 1e2))
    law(m, case(m, (3, 5, 1), torch.float32, 1e-2))


@pytest.mark.parametrize("m", EVERY, ids=label)
def test_no_drift(m: Any) -> None:
    law_drift(m, case(m, (16, 4), torch.float32, 1e-2), steps=300)


def test_check_manifold_takes_them() -> None:
    for kind in KINDS:
        check_manifold(kind(), shapes=[(5, 2)], dtypes=[torch.float64], scales=[1.0])


@pytest.mark.parametrize("m", EVERY, ids=label)
def test_beats_equal_methods(m: Any) -> None:
    """Two heights at once, two points of each, one of which does not move."""
    cases = [case(m, (2, n, 3)) for n in (5, 6)]
    xs = [c.point() for c in cases]
    ds = [0.3 * torch.randn(x.shape, dtype=x.dtype) for x in xs]
    ds[1][0] = 0
    gs = [d.clone() for d in ds]
    m.stacked_gradient(xs, gs)
    for x, d, g in zip(xs, ds, gs, strict=True):
        torch.testing.assert_close(g, m.gradient(x, d))
    ms = [x + d for x, d in zip(xs, ds, strict=True)]
    overlap = m.stacked_overlap(xs, ms)
    assert len(overlap) == 4
    ys = close(m.stacked_move(xs, ms, overlap, [1.0, 0.5], drift=tolerance(torch.float64, 6, 3)))
    for x, d, y, s in zip(xs, ds, ys, (1.0, 0.5), strict=True):
        torch.testing.assert_close(y, m.retract(x, m.project_tangent(x, s * d)), atol=1e-13, rtol=0)
    assert torch.equal(ys[1][0], xs[1][0])


# Oracles: pymanopt, in float64


def both(m: Any, theirs: Any, x: Tensor) -> dict[str, tuple[Tensor, Any]]:
    """What we compute and what pymanopt computes at x from the same ambient z and g."""
    z, g = torch.randn(2, *x.shape, dtype=x.dtype)
    u, v = m.project_tangent(x, z), m.project_tangent(x, g)
    p, tu, tv = x.numpy(), u.numpy(), v.numpy()
    y = m.exp(x, u)
    return {
        "projection": (u, theirs.projection(p, z.numpy())),
        "gradient": (m.gradient(x, g), theirs.euclidean_to_riemannian_gradient(p, g.numpy())),
        "inner": (m.inner(x, u, v), theirs.inner_product(p, tu, tv)),
        "norm": (m.norm(x, u), theirs.norm(p, tu)),
        "exp": (y, theirs.exp(p, tu)),
        "transport": (m.transport_vector(x, u, y, v), theirs.transport(p, y.numpy(), tv)),
        "dim": (torch.tensor(m.dim(*x.shape), dtype=torch.float64), theirs.dim),
    }


def agree(pairs: dict[str, tuple[Tensor, Any]], shape: tuple[int, ...]) -> None:
    for name, (ours, theirs) in pairs.items():
        expected = torch.as_tensor(np.asarray(theirs, dtype=float), dtype=torch.float64)
        expected = expected.reshape(shape) if ours.ndim else expected
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9, msg=f"{name} differs")


def test_grassmann_is_pymanopts() -> None:
    m, theirs = Grassmann(), pm.Grassmann(7, 3)
    x = m.random_point(7, 3, dtype=torch.float64)
    pairs = both(m, theirs, x)
    u = m.project_tangent(x, torch.randn_like(x))
    pairs["retraction"] = (m.retract(x, u), theirs.retraction(x.numpy(), u.numpy()))
    for name in ("exp", "retraction"):  # one subspace, whatever its basis
        ours, other = pairs.pop(name)
        torch.testing.assert_close(ours @ ours.mT, torch.from_numpy(other @ other.T), atol=1e-9, rtol=0)
    agree(pairs, (7, 3))


def test_sphere_is_pymanopts() -> None:
    for shape in ((7, 1), (4, 3)):
        m, theirs = Sphere(), pm.Sphere(*shape)
        x = m.random_point(*shape, dtype=torch.float64)
        u = m.project_tangent(x, torch.randn_like(x))
        pairs = both(m, theirs, x)
        pairs["retraction"] = (m.retract(x, u), theirs.retraction(x.numpy(), u.numpy()))
        agree(pairs, shape)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_oblique_is_pymanopts(shape: tuple[int, int]) -> None:
    m, theirs = Oblique(), pm.Oblique(*shape)
    x = m.random_point(*shape, dtype=torch.float64)
    u = m.project_tangent(x, torch.randn_like(x))
    pairs = both(m, theirs, x)
    pairs["retraction"] = (m.retract(x, u), theirs.retraction(x.numpy(), u.numpy()))
    agree(pairs, shape)


@pytest.mark.parametrize("retraction", ["qr", "polar"])
def test_special_orthogonal_is_pymanopts(retraction: str) -> None:
    """pymanopt writes a tangent vector x a as a."""
    m, theirs = SpecialOrthogonal(retraction), pm.SpecialOrthogonalGroup(4, retraction=retraction)
    x = m.random_point(4, 4, dtype=torch.float64)
    z, g = torch.randn(2, 4, 4, dtype=torch.float64)
    u, v = m.project_tangent(x, z), m.project_tangent(x, g)
    p, a, b = x.numpy(), (x.mT @ u).numpy(), (x.mT @ v).numpy()
    pairs = {
        "projection": (u, p @ theirs.projection(p, z.numpy())),
        "gradient": (m.gradient(x, g), p @ theirs.euclidean_to_riemannian_gradient(p, g.numpy())),
        "inner": (m.inner(x, u, v), theirs.inner_product(p, a, b)),
        "exp": (m.exp(x, u), theirs.exp(p, a)),
        "retraction": (m.retract(x, u), theirs.retraction(p, a)),
        "dim": (torch.tensor(m.dim(4, 4), dtype=torch.float64), theirs.dim),
    }
    agree(pairs, (4, 4))


def test_the_nearest_rotation() -> None:
    """Against every rotation on a fine grid of angles, for matrices of positive and negative determinant."""
    angles = torch.linspace(0, 2 * math.pi, 20001, dtype=torch.float64)
    grid = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), -1).reshape(-1, 2, 2)
    for z in torch.randn(8, 2, 2, dtype=torch.float64):
        y = SpecialOrthogonal().project_point(z)
        assert torch.linalg.det(y) == pytest.approx(1.0)
        assert torch.dist(y, z) <= (grid - z).norm(dim=(1, 2)).min() + 1e-12
    batch = torch.randn(50, 5, 5)
    SpecialOrthogonal().check(SpecialOrthogonal().project_point(batch))
    SpecialOrthogonal().check(SpecialOrthogonal().random_point(50, 3, 3))


def test_the_nearest_rotation_is_differentiable_where_it_is_unique() -> None:
    """Against central differences: at rotations, at repeated and zero singular values, and in batches of both kinds."""
    project = SpecialOrthogonal().project_point
    z = torch.diag_embed(
        torch.tensor([[1.0, 1, 1], [2, 2, -1], [2, 2, 2], [3, 1, 0], [3, 2, -1.5], [-1, -2, 3]]).double()
    )
    turn = torch.linalg.qr(torch.randn(6, 3, 3, dtype=torch.float64))[0]
    z = torch.cat((z[:3], turn @ z @ turn.roll(1, 0))).requires_grad_()
    assert torch.linalg.det(z).amin() < 0 < torch.linalg.det(z).amax()
    assert torch.autograd.gradcheck(project, z)
    assert torch.autograd.gradgradcheck(project, z)
    z = z.detach()
    rate = torch.randn_like(z)
    slope = (project(z + 1e-5 * rate) - project(z - 1e-5 * rate)) / 2e-5
    for transformed in (
        jvp(project, (z,), (rate,))[1],
        vmap(lambda a, b: jvp(project, (a,), (b,))[1])(z, rate),
    ):
        torch.testing.assert_close(transformed, slope, rtol=0, atol=1e-8)
    jacobians = vmap(jacrev(project))(z).flatten(3)
    along = (jacobians * rate.flatten(1)[:, None, None]).sum(-1)
    torch.testing.assert_close(along, slope, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func(kind: Any) -> None:
    """vmap maps every method, and forward mode knows the retraction's derivative at zero: the identity."""
    m: Any = kind()
    x, z = (torch.randn(4, 3, 3, dtype=torch.float64) for _ in range(2))
    x = m.project_point(x)
    u = 0.1 * m.project_tangent(x, z)
    for name in ("retract", "exp", "project_tangent", "gradient", "norm", "project_point"):
        f, inputs = getattr(m, name), (z,) if name == "project_point" else (x, u)
        torch.testing.assert_close(vmap(f)(*inputs), f(*inputs), rtol=0, atol=1e-14)
    torch.testing.assert_close(jvp(lambda v: m.retract(x, v), (0 * u,), (u,))[1], u, rtol=0, atol=1e-14)


# Unit vectors are Stiefel with p = 1


@pytest.mark.parametrize("retraction", retractions.names())
def test_oblique_is_a_stack_of_spheres(retraction: str) -> None:
    m, one = Oblique(retraction), Stiefel("euclidean", retraction)
    x = m.random_point(2, 4, 6, dtype=torch.float64)
    z = 0.1 * torch.randn_like(x)
    u, seen = m.project_tangent(x, z), x.mT[..., None]
    for ours, theirs in (
        (u, one.project_tangent(seen, z.mT[..., None])),
        (m.retract(x, u), one.retract(seen, u.mT[..., None])),
    ):
        torch.testing.assert_close(ours, theirs.squeeze(-1).mT, atol=1e-14, rtol=0)
    assert m.norm(x, m.random_tangent(x)).sub(1).abs().max() < 1e-12
    assert m.dim(2, 4, 6) == 2 * 6 * 3
    assert Sphere().dim(4, 6) == 23


# Grassmann


def test_a_gradient_of_a_function_of_the_subspace_is_horizontal_already() -> None:
    a = torch.randn(6, 6, dtype=torch.float64)
    x = Grassmann().random_point(6, 2, dtype=torch.float64).requires_grad_()
    f = (x.mT @ (a + a.mT) @ x).trace()
    (g,) = torch.autograd.grad(f, x)
    u = Grassmann().gradient(x.detach(), g)
    assert (x.mT @ u).abs().max() < 1e-13
    torch.testing.assert_close(u, Stiefel().gradient(x.detach(), g), atol=1e-12, rtol=0)


# The wrapper drives them


def fit(optimizer: Any, p: Tensor, loss: Any, steps: int = 200) -> tuple[float, float]:
    first = loss(p).item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(p).backward()
        optimizer.step()
    return first, loss(p).item()


@pytest.mark.parametrize("transport", ["none", "projection"])
def test_grassmann_finds_the_leading_subspace(transport: str) -> None:
    a = torch.diag(torch.arange(8.0, 0, -1, dtype=torch.float64))
    p = nn.Parameter(Grassmann().random_point(8, 3, dtype=torch.float64))
    groups = [{"params": [p], "manifold": Grassmann(transport=transport)}]
    optimizer = RiemannianWrapper(torch.optim.SGD(groups, lr=0.02, momentum=0.9))
    _, last = fit(optimizer, p, lambda x: -(x.mT @ a @ x).trace(), 400)
    assert last == pytest.approx(-21.0, abs=1e-8)
    if transport == "projection":
        assert (p.mT @ optimizer.state[p]["momentum_buffer"]).abs().max() < 1e-12


def test_special_orthogonal_keeps_the_determinant() -> None:
    q = SpecialOrthogonal().random_point(3, 5, 5)
    p = nn.Parameter(SpecialOrthogonal().random_point(3, 5, 5))
    groups = [{"params": [p], "manifold": SpecialOrthogonal("cayley"), "view": "batch"}]
    optimizer = RiemannianWrapper(torch.optim.AdamW(groups, lr=0.05))
    first, last = fit(optimizer, p, lambda x: (x - q).square().sum(), 300)
    assert last < 0.1 * first
    for _ in range(50):  # steps that no training makes
        p.grad = 1e3 * torch.randn_like(p)
        optimizer.step()
    assert (torch.linalg.det(p) > 0.99).all()


@pytest.mark.parametrize(
    ("manifold", "shape", "keys", "norms"),
    [
        (Sphere(), (7,), {}, lambda x: x.norm()),
        (Sphere("exp"), (4, 6), {}, lambda x: x.norm()),
        (Sphere(), (2, 5, 3), {"view": "batch"}, lambda x: x.norm(dim=(1, 2))),
        (Sphere(transport="projection"), (3, 2, 2), {"view": "matrix"}, lambda x: x.norm()),
        (Oblique(), (6, 4), {}, lambda x: x.norm(dim=0)),
        (Oblique(), (4, 6), {}, lambda x: x.norm(dim=1)),
        (Oblique(transport="projection"), (6, 4), {"orientation": "rows"}, lambda x: x.norm(dim=1)),
        (Oblique("qr"), (4, 6), {"orientation": "columns"}, lambda x: x.norm(dim=0)),
        (Oblique(), (6, 4), {"direction": "spectral"}, lambda x: x.norm(dim=0)),
    ],
)
def test_unit_vectors(manifold: Any, shape: tuple[int, ...], keys: dict[str, Any], norms: Any) -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    direction = {k: v for k, v in keys.items() if k == "direction"}
    constrain(module, "w", manifold, **{k: v for k, v in keys.items() if k not in direction})
    a = torch.randn(shape, dtype=torch.float64)
    (group,) = param_groups(module)
    optimizer = RiemannianWrapper(torch.optim.SGD([{**group, **direction}], lr=0.02, momentum=0.5))
    first, last = fit(optimizer, module.w, lambda x: (x - a).square().sum())
    assert last < first
    assert (norms(module.w) - 1).abs().max() < 1e-13
    assert optimizer.residuals()[(0, 0)] < 1e-13
    # From constraint to optimum, which is the nearest point.
    if not direction and "view" not in keys and isinstance(manifold, Sphere):
        torch.testing.assert_close(module.w.detach(), a / a.norm(), atol=1e-4, rtol=0)


def test_groups_hold_plain_specs_that_survive() -> None:
    for kind in KINDS:
        m = kind("qr", "projection")
        shape = kind.fits((4, 2))
        p = nn.Parameter(m.random_point(*shape))
        optimizer = RiemannianWrapper(torch.optim.AdamW([p]), m)
        saved = optimizer.state_dict()["param_groups"][0]["manifold"]
        assert saved == {"manifold": kind.__name__, "retraction": "qr", "transport": "projection"}
        assert manifolds.from_spec(saved) == m


def test_heights_share_a_bucket_and_half_precision_has_masters() -> None:
    for kind in KINDS:
        m = kind()
        for dtype in (torch.float64, torch.bfloat16):
            ps = [nn.Parameter(m.random_point(*kind.fits((n, 4)), dtype=dtype)) for n in (6, 5, 6)]
            optimizer = RiemannianWrapper(torch.optim.AdamW(ps, lr=1e-2), m)
            xs = [p.detach().clone() for p in ps]
            for _ in range(20):
                for p in ps:
                    p.grad = torch.randn_like(p)
                optimizer.step()
            assert not any(torch.equal(p, x) for p, x in zip(ps, xs, strict=True)) or m.dim(*ps[0].shape) == 0
            assert max(optimizer.residuals().values()) < 8 * torch.finfo(dtype).eps


# Refusals


def test_what_is_no_point_is_refused() -> None:
    reflection = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    for m, x, error, message in (
        (SpecialOrthogonal(), reflection, NotOnManifoldError, "determinant -1"),
        (SpecialOrthogonal(), torch.eye(4, 2), ShapeError, "not square"),
        (Sphere(), torch.ones(3, 1), NotOnManifoldError, "norm"),
        (Oblique(), torch.ones(3, 2), NotOnManifoldError, "norm"),
        (Grassmann(), 2 * torch.eye(4, 2), NotOnManifoldError, "project_point"),
        (Grassmann(), torch.eye(2, 4), ShapeError, "transpose"),
        (Oblique(), torch.eye(2).long(), ShapeError, "float"),
    ):
        with pytest.raises(error, match=message):
            m.check(x)
        with pytest.raises((error, ShapeError)):
            RiemannianWrapper(
                torch.optim.SGD([{"params": [x], "manifold": m, "orientation": "columns"}], lr=0.1)
            )
    with pytest.raises(ShapeError, match="vector"):
        RiemannianWrapper(torch.optim.SGD([torch.eye(3)[0]], lr=0.1), Oblique())


def test_a_rotation_is_square() -> None:
    m, x = SpecialOrthogonal(), torch.eye(4, 2)
    for call in (
        lambda: m.dim(4, 2),
        lambda: m.residual(x),
        lambda: m.retract(x, x),
        lambda: m.exp(x, x),
        lambda: m.check(x),
        lambda: m.random_tangent(x),
        lambda: m.project_point(x),
        lambda: m.random_point(4, 2),
    ):
        with pytest.raises(ShapeError, match=r"the shape \(4, 2\) is not square.*Stiefel\(\)"):
            call()


@pytest.mark.parametrize("m", [Stiefel(), SpecialOrthogonal(), Grassmann(), Sphere(), Oblique()], ids=repr)
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3,), "fewer than two dimensions"),
        ((), "fewer than two dimensions"),
        ((-2, 5, 3), "no integer from 0 on"),
        ((5, -3), "no integer from 0 on"),
        ((5, 2.0), "no integer from 0 on"),
        ((5, 0), "with n >= p >= 1|n, p >= 1"),
    ],
)
def test_shapes_of_no_point(m: Any, shape: tuple[Any, ...], message: str) -> None:
    for method in (m.dim, m.random_point):
        with pytest.raises(ShapeError, match=message):
            method(*shape)


@pytest.mark.parametrize("shape", [(), (4,), (-2, 5, 4), (5, -4), (5, 4.0)])
def test_shapes_of_no_matrix_of_fixed_rank(shape: tuple[Any, ...]) -> None:
    for m in (FixedRank(), FixedRankPair()):
        for method in (m.dim, m.random_point):
            with pytest.raises(ShapeError, match=r"fewer than two dimensions|no integer from 0 on"):
                method(*shape, rank=2)


def test_the_norm_of_zero_has_a_derivative() -> None:
    """Zero, as that of sqrt(<u, u>) anywhere else is u over it; and NaN does not become zero."""
    for kind in (Stiefel, *KINDS):
        m: Any = kind()
        x = m.random_point(*kind.fits((2, 5, 3)), dtype=torch.float64)
        u = m.random_tangent(x)
        u[0] = 0
        u.requires_grad_()
        m.norm(x, u).sum().backward()
        assert torch.equal(u.grad[0], torch.zeros_like(x[0]))
        other = u.detach().clone().requires_grad_()
        m.inner(x, other, other)[1].sqrt().backward()
        torch.testing.assert_close(u.grad[1], other.grad[1], rtol=0, atol=1e-14)
        assert m.norm(x, x * math.nan).isnan().all()
    for fixed in (FixedRank(), FixedRankPair()):
        point: Any = fixed.random_point(2, 5, 4, rank=2)
        zero = type(point)(*(torch.zeros_like(t).requires_grad_() for t in point))
        fixed.norm(point, zero).sum().backward()
        assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in zero)


def test_options() -> None:
    for kind in KINDS:
        with pytest.raises(UnknownNameError, match="pollar"):
            kind("pollar")
        with pytest.raises(UnknownNameError, match=r"unknown transport 'projecton'.*mean 'projection'"):
            kind(transport="projecton")
        with pytest.raises(ConfigError, match="registered name"):
            kind(3)
        plain = kind(lambda x, u: torch.linalg.qr(x + u)[0])
        with pytest.raises(ConfigError, match="register"):
            plain.spec()


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    for kind in KINDS:
        m = kind()
        p = nn.Parameter(m.random_point(*kind.fits((5, 3))))
        x = p.detach().clone()
        p.grad = torch.full_like(p, math.nan)
        with pytest.raises(StepError):
            RiemannianWrapper(torch.optim.SGD([p], lr=0.1), m).step()
        assert torch.equal(p.detach(), x)


def test_a_broken_manifold_is_caught() -> None:
    """One whose tangent vectors are said to be horizontal and are not."""

    class Lax(Grassmann):
        @property
        def _tangent(self) -> Any:
            return Stiefel()._tangent

    with pytest.raises(AssertionError, match="law_"):
        check_manifold(Lax(), shapes=[(5, 2)], dtypes=[torch.float64], scales=[1.0])  # type: ignore[arg-type]


def test_cases_of_the_laws_are_the_manifolds_own() -> None:
    for kind in KINDS:
        c = case(kind(), (5, 3))
        assert isinstance(c, Case)
        kind().check(c.point())


# A manifold of one's own, with the methods of the public promise and nothing else


@dataclass(frozen=True)
class UnitMatrices(Manifold):
    """Matrices of Frobenius norm 1."""

    transport: str = "none"

    def check(self, x: Tensor) -> None:
        assert bool((self.residual(x) < 1e-5).all())

    def residual(self, x: Tensor) -> Tensor:
        return (x.square().sum((-2, -1)) - 1).abs()

    def project_point(self, z: Tensor) -> Tensor:
        return z / torch.linalg.matrix_norm(z, keepdim=True)

    def project_tangent(self, x: Tensor, z: Tensor) -> Tensor:
        return z - x * (x * z).sum((-2, -1), keepdim=True)

    def gradient(self, x: Tensor, egrad: Tensor) -> Tensor:
        return self.project_tangent(x, egrad)

    def retract(self, x: Tensor, u: Tensor) -> Tensor:
        return self.project_point(x + u)

    def transport_vector(self, x: Tensor, u: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self.project_tangent(y, v)


def flat_step(x: Tensor, d: Tensor) -> Tensor:
    """The step on the sphere of vectors: d made orthogonal to x, added, divided by the norm."""
    x, d = x.flatten(), d.flatten()
    y = x + d - x * torch.dot(x, d)
    return y / y.norm()


@pytest.mark.usefixtures("scratch_registries")
@pytest.mark.parametrize("transport", ["none", "projection"])
@pytest.mark.parametrize("adam", [False, True])
def test_a_manifold_of_ones_own_trains(adam: bool, transport: str) -> None:
    """Against the inner optimizer on each vector alone, and against torch's own where nothing is constrained."""
    manifolds.register("UnitMatrices")(UnitMatrices)
    m = UnitMatrices(transport)
    shapes, inner = ((5, 3), (5, 3), (3, 5), (4, 4)), torch.optim.AdamW if adam else torch.optim.SGD
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.0} | ({} if adam else {"momentum": 0.9})
    params = [nn.Parameter(m.project_point(torch.randn(s, dtype=torch.float64))) for s in shapes]
    start = [p.detach().clone() for p in params]
    copies = [nn.Parameter(x.clone()) for x in start]
    wrapper, reference = RiemannianWrapper(inner(params, **options), m), inner(copies, **options)
    for step in range(4):
        for k, (p, q) in enumerate(zip(params, copies, strict=True)):
            g = torch.randn_like(p) if k < 3 else torch.zeros_like(p)
            x = q.detach()
            p.grad, q.grad = g.clone(), g - x * (x * g).sum()
        wrapper.step()
        before = [q.detach().clone() for q in copies]
        reference.step()
        for p, q, x in zip(params, copies, before, strict=True):
            q.data = flat_step(x, q.detach() - x).reshape(x.shape)
            if transport == "projection":
                moment = reference.state[q]["exp_avg" if adam else "momentum_buffer"]
                moment -= q.detach() * (q.detach() * moment).sum()
            torch.testing.assert_close(p.detach(), q.detach(), atol=1e-13, rtol=0, msg=f"step {step}")
    assert torch.equal(params[3].detach(), start[3])
    assert max(wrapper.residuals().values()) < 1e-14
    assert manifolds.from_spec(wrapper.state_dict()["param_groups"][0]["manifold"]) == m


@pytest.mark.usefixtures("scratch_registries")
def test_a_manifold_of_ones_own_is_refused_by_name() -> None:
    """Where it returns no point, or has not what is asked for; and nothing has changed."""

    class Narrow(UnitMatrices):
        def retract(self, x: Tensor, u: Tensor) -> Tensor:
            return x[..., :1]

    class Lost(UnitMatrices):
        def retract(self, x: Tensor, u: Tensor) -> Tensor:
            return x / 0

    for m, message in (
        (Narrow(), r"Narrow 'retract' returned \(1, 5, 1\), and \(1, 5, 3\) is needed"),
        (Lost(), r"Lost\(transport='none'\) cannot retract so long a step"),
    ):
        manifolds.register(type(m).__name__)(type(m))
        p = nn.Parameter(m.project_point(torch.randn(5, 3)))
        x, p.grad = p.detach().clone(), torch.randn(5, 3)
        wrapper = RiemannianWrapper(torch.optim.SGD([{"params": [p], "manifold": m}], lr=0.1))
        with pytest.raises(StepError, match=message):
            wrapper.step()
        assert torch.equal(p.detach(), x)
    group = {"params": [p], "manifold": m, "direction": "spectral"}
    with pytest.raises(ConfigError, match=r"Lost has none; leave 'direction' out"):
        RiemannianWrapper(torch.optim.SGD([group], lr=0.1))


@pytest.mark.parametrize("retraction", ["polar", "qr", "cayley", "exp", "svd"])
def test_a_step_that_would_lose_the_rotation_is_refused(retraction: str) -> None:
    """At 1e9 float32 rounds the point beside the step away, and what is left turns either way."""
    m, refused = SpecialOrthogonal(retraction=retraction), 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        p = nn.Parameter(m.random_point(5, 5, generator=generator))
        x, p.grad = p.detach().clone(), 1e9 * torch.randn(5, 5, generator=generator)
        try:
            RiemannianWrapper(torch.optim.SGD([p], lr=1.0), m).step()
        except StepError:
            refused += 1
            assert torch.equal(p.detach(), x)
        assert torch.linalg.det(p.detach().double()) > 0
    assert refused > 0
    assert p.grad is not None
    u = m.project_tangent(x, p.grad)
    m.check(m.retract(x, 1e-9 * u))


@pytest.mark.usefixtures("scratch_registries")
def test_a_class_whose_methods_or_options_would_be_ignored_is_not_registered() -> None:
    class Bent(Stiefel):
        def retract(self, x: Tensor, u: Tensor) -> Tensor:
            return x

    class Forgetful(UnitMatrices):
        def __init__(self, k: float = 1.0) -> None:
            object.__setattr__(self, "k", k)

    @dataclass(frozen=True)
    class Weighted(UnitMatrices):
        weights: Any = None

    for cls, message in (
        (Bent, "retract of its own, and the step that it inherits from Frames does not call it"),
        (Forgetful, "__init__ of its own"),
    ):
        with pytest.raises(ConfigError, match=message):
            manifolds.register(cls.__name__)(cls)
    manifolds.register("Weighted")(Weighted)
    with pytest.raises(ConfigError, match="weights of Weighted is a Tensor"):
        Weighted(weights=torch.eye(2)).spec()


@pytest.mark.usefixtures("scratch_registries")
def test_a_manifold_that_nobody_registered_or_finished_is_refused_by_name() -> None:
    class Bare(Manifold):
        def check(self, x: Tensor) -> None:
            pass

    p = nn.Parameter(torch.eye(3))
    p.grad = torch.ones(3, 3)
    with pytest.raises(UnknownNameError, match="'Bare'"):
        RiemannianWrapper(torch.optim.SGD([p]), Bare())
    manifolds.register("Bare")(Bare)
    with pytest.raises(ConfigError, match="Bare has no method 'gradient'"):
        RiemannianWrapper(torch.optim.SGD([p]), Bare()).step()


@pytest.mark.parametrize("m", [Stiefel(), Sphere(), FixedRank(), FixedRankPair()], ids=str)
def test_a_seed_is_no_generator(m: Any) -> None:
    rank = {"rank": 2} if m.parts > 1 else {}
    with pytest.raises(ConfigError, match=r"torch\.Generator\(\)\.manual_seed\(0\)"):
        m.random_point(5, 3, generator=0, **rank)
    with pytest.raises(ConfigError, match="manual_seed"):
        m.random_tangent(m.random_point(5, 3, **rank), 0)


@pytest.mark.parametrize("m", [FixedRank(), FixedRank("orthographic"), FixedRankPair()], ids=str)
def test_a_graph_through_a_retraction_without_derivative_raises(m: Any) -> None:
    x = m.random_point(6, 5, rank=2, dtype=torch.float64)
    u, t = m.random_tangent(x), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    y = m.retract(x, type(x)(*(t * a for a in u)))
    with pytest.raises(ConfigError, match=r"retract has no derivative here: detach\(\)"):
        m.to_dense(y).square().sum().backward()
    plain = m.retract(x, type(x)(*(0.3 * a for a in u)))
    assert not plain[0].requires_grad
    for a, b in zip(y, plain, strict=True):
        torch.testing.assert_close(a.detach(), b)


def test_the_laws_are_not_run_where_they_say_nothing() -> None:
    """Nothing is wrong with a sphere of matrices; its points have no orthonormal columns, that is all."""
    with pytest.raises(ConfigError, match=r"project_point of UnitMatrices makes points with .*fits\(shape\)"):
        check_manifold(UnitMatrices())  # type: ignore[arg-type]

    class Vectors(Sphere):
        """At n x 1, where fits() says that they have one."""

    assert suite_of(Vectors()).case((5, 3), torch.float64, 1.0, 0).shape == (5, 1)


@pytest.mark.parametrize("m", [Stiefel(), Grassmann(), Oblique()], ids=str)
def test_sizes_are_numbers_of_any_kind(m: Any) -> None:
    """As in torch.randn: numpy's integers, arrays and sizes of them, a torch.Size."""
    import numpy as np

    for shape in (
        (np.int64(6), 2),
        (np.array([6, 2]),),
        (torch.Size([6, 2]),),
        ([6, 2],),
        (np.prod((2, 3)), 2),
    ):
        assert m.random_point(*shape).shape == (6, 2)
        assert m.dim(*shape) == m.dim(6, 2)
    for wrong in ((6.0, 2), (6, -2), ("6", 2)):
        with pytest.raises(ShapeError):
            m.dim(*wrong)
