"""The truncated SVD of tangent steps, by products and by LAPACK, against numpy's SVD of the dense matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from stiefelopt import FixedRank, core_svd
from stiefelopt.core_svd import by_lapack, truncated

M, N = 24, 20


def orthonormal(*shape: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64, generator=g))[0]


def step(b: int, r: int, length: float, *, smallest: float = 0.5, scale: float = 1.0) -> tuple[Tensor, ...]:
    """U, C, V, Up, Vp of a batch: singular values of C from 1 down to the smallest, ||Up|| = ||Vp|| = length."""
    values = torch.logspace(0, np.log10(smallest), r, dtype=torch.float64)
    c = orthonormal(b, r, r, seed=1) * values @ orthonormal(b, r, r, seed=2)
    u, v = orthonormal(b, M, r, seed=3), orthonormal(b, N, r, seed=4)
    up, vp = (
        (t - x @ (x.mT @ t)) * torch.linspace(1, 0.3, r, dtype=torch.float64)
        for x, t in ((u, orthonormal(b, M, r, seed=5)), (v, orthonormal(b, N, r, seed=6)))
    )
    up, vp = (t * (length / torch.linalg.matrix_norm(t, 2))[:, None, None] for t in (up, vp))
    return u, scale * c, v, scale * up, scale * vp


def moved(u: Tensor, c: Tensor, v: Tensor, up: Tensor, vp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The new factors of W + xi."""
    found = truncated(c, up.mT @ up, vp.mT @ vp)
    return u @ found.au + up @ found.bu, found.s, v @ found.av + vp @ found.bv


def nearest(u: Tensor, c: Tensor, v: Tensor, up: Tensor, vp: Tensor) -> np.ndarray:
    """The matrix of rank r nearest to W + xi, dense."""
    a, d, bh = np.linalg.svd((u @ c @ v.mT + up @ v.mT + u @ vp.mT).numpy(), full_matrices=False)
    r = c.shape[-1]
    return (a[..., :r] * d[..., None, :r]) @ bh[..., :r, :]


def check(parts: tuple[Tensor, ...], tolerance: float) -> None:
    y, s, z = moved(*parts)
    wanted = nearest(*parts)
    r = s.shape[-1]
    for factor in (y, z):
        assert np.abs((factor.mT @ factor).numpy() - np.eye(r)).max() < tolerance
    error = np.linalg.norm((y @ s @ z.mT).numpy() - wanted, axis=(-2, -1))
    assert (error <= tolerance * np.linalg.norm(wanted, axis=(-2, -1))).all()


@pytest.mark.parametrize("r", [1, 2, 5])
@pytest.mark.parametrize("length", [0.0, 1e-9, 1e-3, 0.1, 0.3])
def test_short_steps_need_no_lapack(r: int, length: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_svd, "by_lapack", lambda *_: pytest.fail("LAPACK was called"))
    check(step(6, r, length), 1e-12)


@pytest.mark.parametrize("r", [1, 2, 5])
@pytest.mark.parametrize("length", [0.5, 1.0, 3.0, 1e3])
def test_long_steps(r: int, length: float) -> None:
    check(step(6, r, length), 1e-11)


@pytest.mark.parametrize("scale", [1e-60, 1e-30, 1e30, 1e60])
@pytest.mark.parametrize("length", [1e-2, 0.4, 2.0])
def test_any_scale(scale: float, length: float) -> None:
    check(step(4, 3, length, scale=scale), 1e-11)


@pytest.mark.parametrize("smallest", [1e-3, 1e-6, 1e-9])
def test_ill_conditioned(smallest: float) -> None:
    check(step(4, 4, smallest / 4, smallest=smallest), 1e-15 / smallest + 1e-12)
    check(step(4, 4, 0.1, smallest=smallest), 1e-11)


@pytest.mark.parametrize("tiny", [1e-4, 1e-6, 1e-8, 1e-10, 1e-14, 1e-30, 0.0])
@pytest.mark.parametrize("length", [1e-2, 0.3, 10.0])
@pytest.mark.parametrize("smallest", [0.5, 1e-3])
def test_one_sided_steps(tiny: float, length: float, smallest: float) -> None:
    """Where Vp is about zero p is right at once, and says nothing of q, nor the other way round."""
    u, c, v, up, vp = step(6, 4, length, smallest=smallest)
    check((u, c, v, up, tiny * vp), 1e-11)
    check((u, c, v, tiny * up, vp), 1e-11)


def test_one_sided_steps_from_an_ill_conditioned_point_are_finite() -> None:
    """float32, where the iteration for q overflows."""
    f, g = FixedRank(), torch.Generator().manual_seed(0)
    x = f.random_point(40, 30, rank=4, generator=g)
    x = x._replace(S=torch.diag(torch.tensor([1, 1e-2, 1e-4, 1e-6])))
    t = f.random_tangent(x, generator=g)
    for zero in (t._replace(V=0 * t.V), t._replace(U=0 * t.U)):
        u = zero._replace(S=0 * t.S)
        y = f.retract(x, u)
        wanted = (
            x.U.double() @ x.S.double() + u.U.double()
        ) @ x.V.double().mT + x.U.double() @ u.V.double().mT
        found = y.U.double() @ y.S.double() @ y.V.double().mT
        assert torch.linalg.matrix_norm(found - wanted) < 1e-5


def test_short_and_long_ones_in_one_batch() -> None:
    u, c, v, up, vp = step(6, 3, 0.1)
    factor = torch.tensor([1.0, 30.0, 0.0, 1.0, 300.0, 1e-3], dtype=torch.float64)[:, None, None]
    check((u, c, v, factor * up, factor * vp), 1e-11)
    # Where S + M is singular, the displacement alone decides.
    c = c.clone()
    c[2], c[3] = 0, 0
    found = truncated(c, up.mT @ up, vp.mT @ vp)
    assert all(bool(torch.isfinite(t[[0, 1, 3, 4, 5]]).all()) for t in found)


def test_a_direction_that_is_small_in_w_and_large_in_the_step() -> None:
    """Subspace iteration from W must not settle on the small singular value."""
    c = torch.diag_embed(torch.tensor([[1.0, 1e-9], [1.0, 1e-3]], dtype=torch.float64))
    h = torch.diag_embed(torch.tensor([[0.0, 1.0], [0.0, 4e-6]], dtype=torch.float64))
    found, exact = truncated(c, h, h), by_lapack(c, h, h)
    assert torch.allclose(torch.linalg.svdvals(found.s), torch.linalg.svdvals(exact.s), rtol=1e-12, atol=0)


def test_the_proof_of_dominance_refuses_a_subspace_that_is_not() -> None:
    """With p = q = t^(-1) of the small singular value of [[c, h], [h, 0]] the bound must say no."""
    c, h = torch.full((1, 1, 1), 1e-2, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    small = (c - (c * c + 4 * h).sqrt()) / 2  # an eigenvalue, below the other in size
    p = small.reciprocal()
    assert torch.allclose(p.reciprocal(), c + h * p)
    assert not bool(core_svd._is_dominant(p, h, h, p.mT @ h @ p).any())


def test_an_empty_batch() -> None:
    found = truncated(*(torch.empty(0, 3, 3, dtype=torch.float64) for _ in range(3)))
    assert all(t.shape == (0, 3, 3) for t in found)
