"""Against code that others wrote: LAPACK, scipy's expm, dense n x n formulas, geoopt, pymanopt, POGO."""

from __future__ import annotations

import geoopt
import numpy as np
import pymanopt
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from stiefelopt import StepError, Stiefel, metrics, projections, retractions
from stiefelopt.matfun import inverse_sqrt_increment
from stiefelopt.testing import Case, geodesic

Array = NDArray[np.float64]

SHAPES = [(7, 3), (5, 1), (4, 4), (20, 6), (3, 2)]
STEPS = [1e-6, 1e-2, 0.3, 3.0, 50.0]


def given(shape: tuple[int, ...], scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    case = Case(shape, torch.float64, scale, seed)
    x = case.point()
    return x, case.tangent(x)


def near(y: Tensor, expected: Array | Tensor, size: float = 1.0) -> None:
    n, p = y.shape[-2:]
    expected = expected if isinstance(expected, Tensor) else torch.from_numpy(np.array(expected))
    torch.testing.assert_close(y, expected, atol=20 * 2.2e-16 * np.sqrt(n * p) * size, rtol=0)


# LAPACK


@pytest.mark.parametrize("name", ["polar", "svd"])
@pytest.mark.parametrize("scale", STEPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_polar_is_the_unitary_factor(shape: tuple[int, ...], scale: float, name: str) -> None:
    x, u = given(shape, scale)
    left, _, right = np.linalg.svd((x + u).numpy(), full_matrices=False)
    near(retractions.get(name)(x, u), left @ right)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_is_the_unitary_factor_within_its_radius(shape: tuple[int, ...]) -> None:
    for scale in (1e-6, 1e-2, 0.3, 0.69):
        x, u = given(shape, scale)
        near(retractions.newton_schulz(x, u), scipy.linalg.polar((x + u).numpy())[0])


@pytest.mark.parametrize("rank", [1, 20, 64])
@pytest.mark.parametrize("length", [0.25, 0.69, 0.71])
def test_the_radius_is_that_of_the_spectral_norm(length: float, rank: int) -> None:
    """Many columns make the Frobenius norm long, and are no reason to refuse."""
    x, q, k = (torch.linalg.qr(torch.randn(s, 64, dtype=torch.float64))[0] for s in (200, 200, 64))
    q = torch.linalg.qr(q - x @ (x.mT @ q))[0]
    u = length * q[:, :rank] @ k[:, :rank].mT
    if length > retractions.newton_schulz.radius:
        with pytest.raises(StepError, match=r"0\.7, and this one has 0\.71:"):
            retractions.newton_schulz(x, u)
    else:
        near(retractions.newton_schulz(x, u), scipy.linalg.polar((x + u).numpy())[0])


@pytest.mark.parametrize("scale", STEPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qr_is_lapacks_with_a_positive_diagonal(shape: tuple[int, ...], scale: float) -> None:
    x, u = given(shape, scale)
    q, r = np.linalg.qr((x + u).numpy())
    near(retractions.qr(x, u), q * np.sign(np.diag(r)), size=1 + scale**2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_point_is_the_unitary_factor(shape: tuple[int, ...]) -> None:
    for seed, scale in enumerate((1e-30, 1e-3, 1.0, 1e30)):
        z = Case(shape, torch.float64, scale, seed).ambient()
        near(Stiefel().project_point(z), scipy.linalg.polar(z.numpy())[0], size=100)


# Dense geodesics


def canonical_geodesic(x: Array, u: Array) -> Array:
    """Expm of the n x n skew matrix that generates the motion, in a completed basis [x, x_perp]."""
    n, p = x.shape
    q = np.linalg.qr(np.hstack((x, np.random.default_rng(0).standard_normal((n, n - p)))))[0]
    q[:, :p] = x
    a, b = x.T @ u, q[:, p:].T @ u
    k = np.block([[a, -b.T], [b, np.zeros((n - p, n - p))]])
    return (q @ scipy.linalg.expm(k))[:, :p]


def euclidean_geodesic(x: Array, u: Array) -> Array:
    """Edelman, Arias & Smith (1998), section 2.2.2, as it stands there."""
    p = x.shape[1]
    a, s = x.T @ u, u.T @ u
    block = scipy.linalg.expm(np.block([[a, -s], [np.eye(p), a]]))[:, :p]
    return np.hstack((x, u)) @ block @ scipy.linalg.expm(-a)


GEODESICS = {"canonical": canonical_geodesic, "euclidean": euclidean_geodesic}


@pytest.mark.parametrize("metric", GEODESICS)
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 0.1, 0.3, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exp_is_the_geodesic(shape: tuple[int, ...], scale: float, metric: str) -> None:
    for seed in range(3):
        x, u = given(shape, scale, seed)
        expected = GEODESICS[metric](x.numpy(), u.numpy())
        near(Stiefel(metric).exp(x, u), expected, size=1 + scale)
        near(Stiefel(metric, "exp").retract(x, u), expected, size=1 + scale)


@pytest.mark.parametrize("metric", GEODESICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_of_the_laws_is_the_geodesic(shape: tuple[int, ...], metric: str) -> None:
    for scale in (1e-6, 1e-2, 0.3, 3.0):
        x, u = given(shape, scale)
        near(geodesic(metric, x, u), GEODESICS[metric](x.numpy(), u.numpy()), size=1 + scale)


@pytest.mark.parametrize("scale", STEPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cayley_is_the_dense_transform(shape: tuple[int, ...], scale: float) -> None:
    """(I - a/2)^-1 (I + a/2) x with the n x n skew a = h u x^T - x u^T h, h = I - x x^T / 2."""
    x, u = given(shape, scale)
    eye = torch.eye(shape[0], dtype=torch.float64)
    h = eye - 0.5 * x @ x.mT
    a = h @ u @ x.mT - x @ u.mT @ h
    near(retractions.cayley(x, u), torch.linalg.solve(eye - 0.5 * a, (eye + 0.5 * a) @ x), size=1 + scale)


# geoopt


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 6, 2)], ids=str)
def test_geoopts_euclidean_stiefel(shape: tuple[int, ...]) -> None:
    theirs, ours = geoopt.EuclideanStiefel(), Stiefel("euclidean", "qr")
    case = Case(shape)
    x, z = case.point(), case.ambient()
    u, v = case.tangent(x, 5), case.tangent(x, 6)
    near(ours.project_tangent(x, z), theirs.proju(x, z))
    near(ours.gradient(x, z), theirs.egrad2rgrad(x, z))
    near(ours.retract(x, u), theirs.retr(x, u))
    near(ours.project_point(x + 0.3 * z), theirs.projx(x + 0.3 * z))
    near(ours.transport_vector(x, u, ours.retract(x, u), v), theirs.transp(x, theirs.retr(x, u), v))
    torch.testing.assert_close(ours.inner(x, u, v), theirs.inner(x, u, v), atol=1e-14, rtol=0)
    if len(shape) == 2:  # geoopt's expmap; a stack of exponentials is torch's own business
        near(ours.exp(x, u), euclidean_geodesic(x.numpy(), u.numpy()))


def test_geoopts_canonical_stiefel_where_it_is_right() -> None:
    theirs, ours = geoopt.CanonicalStiefel(), Stiefel("canonical", "cayley")
    case = Case((7, 3))
    x, z = case.point(), case.ambient()
    u, v = case.tangent(x, 5), case.tangent(x, 6)
    near(ours.gradient(x, z), theirs.egrad2rgrad(x, z))
    torch.testing.assert_close(ours.inner(x, u, v), theirs.inner(x, u, v), atol=1e-14, rtol=0)
    # Its Cayley map is ours for vectors that do not turn within the span of x.
    off = u - x @ (x.mT @ u)
    near(ours.retract(x, off), theirs.retr(x, off))


def test_geoopts_canonical_stiefel_where_it_is_wrong() -> None:
    """One formula serves it as projection, gradient and generator: what turns within span(x) counts twice.

    For a tangent u = x a + b, x^T b = 0: proju(x, u) = u + x a, twice that is u + 3 x a, and retr starts with velocity
    u + x a in place of u.
    """
    theirs, ours = geoopt.CanonicalStiefel(), Stiefel("canonical", "cayley")
    x, u = given((7, 3), 1.0)
    turn = x @ (x.mT @ u)
    assert 0.2 < turn.norm() < 1
    once = theirs.proju(x, u)
    near(once, u + turn)
    near(theirs.proju(x, once), u + 3 * turn)
    h = 1e-6
    for retract, error in ((theirs.retr, turn), (ours.retract, torch.zeros_like(turn))):
        velocity = (retract(x, h * u) - retract(x, -h * u)) / (2 * h)
        torch.testing.assert_close(velocity - u, error, atol=1e-9, rtol=0)


# pymanopt


@pytest.mark.parametrize("shape", [(7, 3), (4, 4), (20, 6)], ids=str)
def test_pymanopts_stiefel(shape: tuple[int, int]) -> None:
    theirs = pymanopt.manifolds.Stiefel(*shape)
    case = Case(shape)
    x, z = case.point(), case.ambient()
    u, v = case.tangent(x, 5), case.tangent(x, 6)
    xn, zn, un, vn = (t.numpy() for t in (x, z, u, v))
    ours = Stiefel("euclidean")
    near(ours.project_tangent(x, z), theirs.projection(xn, zn))
    near(ours.gradient(x, z), theirs.euclidean_to_riemannian_gradient(xn, zn))
    near(ours.retract(x, u), pymanopt.manifolds.Stiefel(*shape, retraction="polar").retraction(xn, un))
    near(retractions.qr(x, u), theirs.retraction(xn, un))
    near(ours.exp(x, u), theirs.exp(xn, un))
    y = ours.retract(x, u)
    near(ours.transport_vector(x, u, y, v), theirs.transport(xn, y.numpy(), vn))
    assert abs(ours.inner(x, u, v).item() - theirs.inner_product(xn, un, vn)) < 1e-14
    assert ours.dim(*shape) == theirs.dim


# Gradients against autograd


def tangent_basis(x: Tensor) -> list[Tensor]:
    """x (e_i e_j^T - e_j e_i^T) and x_perp e_i e_j^T."""
    n, p = x.shape
    perp = torch.linalg.svd(x)[0][:, p:]
    basis = []
    for i in range(p):
        for j in range(i):
            a = torch.zeros(p, p, dtype=x.dtype)
            a[i, j], a[j, i] = 1, -1
            basis.append(x @ a)
    for i in range(n - p):
        for j in range(p):
            b = torch.zeros(n - p, p, dtype=x.dtype)
            b[i, j] = 1
            basis.append(perp @ b)
    return basis


DENSE_INNER = {
    "canonical": lambda x, u, v: (u * v).sum() - 0.5 * ((x @ x.mT @ u) * v).sum(),
    "euclidean": lambda x, u, v: (u * v).sum(),
}


@pytest.mark.parametrize("metric", DENSE_INNER)
@pytest.mark.parametrize("shape", [(6, 3), (5, 1), (4, 4)], ids=str)
def test_gradient_against_autograd_along_curves(shape: tuple[int, ...], metric: str) -> None:
    """Slopes of f along dense Cayley curves in every direction of a basis, solved with the dense metric."""
    x, _ = given(shape, 1.0)
    weight = Case(shape).ambient(9)

    def f(y: Tensor) -> Tensor:
        return torch.sin(3 * y * weight).sum() + (y @ y.mT @ weight).square().sum()

    eye = torch.eye(shape[0], dtype=x.dtype)
    basis = tangent_basis(x)
    slopes = []
    for u in basis:
        h = eye - 0.5 * x @ x.mT
        a = h @ u @ x.mT - x @ u.mT @ h
        t = torch.zeros((), dtype=x.dtype, requires_grad=True)
        y = torch.linalg.solve(eye - 0.5 * t * a, (eye + 0.5 * t * a) @ x)
        slopes.append(torch.autograd.grad(f(y), t)[0])
    dense = DENSE_INNER[metric]
    products = torch.stack([torch.stack([dense(x, u, v) for v in basis]) for u in basis])
    coefficients = torch.linalg.solve(products, torch.stack(slopes))
    expected = sum(c * u for c, u in zip(coefficients, basis, strict=True))

    z = x.clone().requires_grad_()
    egrad = torch.autograd.grad(f(z), z)[0]
    near(Stiefel(metric).gradient(x, egrad), expected, size=10)
    near(getattr(metrics, f"{metric}_gradient")(x, egrad), expected, size=10)
    for u in basis[:3]:
        for v in basis[-3:]:
            assert abs(Stiefel(metric).inner(x, u, v) - dense(x, u, v)) < 1e-14


def test_tangent_projection_against_least_squares() -> None:
    x, _ = given((6, 3), 1.0)
    z = Case((6, 3)).ambient(9)
    basis = torch.stack([u.flatten() for u in tangent_basis(x)], 1)
    nearest = basis @ torch.linalg.lstsq(basis, z.flatten()[:, None]).solution
    near(projections.tangent(x, z), nearest.reshape(6, 3))


# POGO


def test_one_unscaled_newton_schulz_step_is_pogos() -> None:
    """Z (3 I - z^T z) / 2 with z = x + u: residual 3/4 |u|^4, where polar goes all the way."""
    pogo = pytest.importorskip("pogo")
    base = pytest.importorskip("pogo.base")
    x, _ = given((9, 4), 1.0)
    g = Case((9, 4)).ambient(3)
    theirs = torch.nn.Parameter(x[None].clone())
    theirs.grad = g[None].clone()
    pogo.POGO([theirs], base.SGD(), lr=0.4, rows=False).step()

    # Its direction is half of the canonical gradient, at the metric's own scale.
    u = -0.4 * 0.5 * metrics.canonical_gradient(x, g)
    z = x + u
    y = z + z @ inverse_sqrt_increment(z.mT @ z, steps=1)
    near(y, theirs.detach()[0])
    near(y, 1.5 * z - 0.5 * z @ z.mT @ z)

    def residual(t: float) -> Tensor:
        z = x + t * u
        y = z + z @ inverse_sqrt_increment(z.mT @ z, steps=1)
        return y.mT @ y - torch.eye(4, dtype=x.dtype)

    q = u.mT @ u
    torch.testing.assert_close(residual(1.0), -0.75 * q @ q + 0.25 * q @ q @ q, atol=1e-14, rtol=0)
    assert Stiefel(retraction="newton_schulz").residual(retractions.newton_schulz(x, u)) < 1e-15
