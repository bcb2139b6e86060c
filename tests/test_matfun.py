"""Matrix functions against float64 LAPACK, and their derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from stiefelopt import matfun
from stiefelopt.gram import fold, gram, identity_like, predicted_gram, sym
from stiefelopt.inverse_roots import iterations_needed
from stiefelopt.matfun import (
    accretive_inverse,
    cholesky_inverse_increment,
    distance_from_identity,
    expm,
    inverse_sqrt_increment,
    norm,
)

EPS = {torch.float32: 1.2e-7, torch.float64: 2.2e-16}


def spd(p: int, low: float, high: float, batch: int = 3, seed: int = 0) -> Tensor:
    """Symmetric, float64, eigenvalues spread from low to high."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(batch, p, p, dtype=torch.float64, generator=generator))
    values = torch.logspace(np.log10(low), np.log10(high), p, dtype=torch.float64)
    return sym((q * values) @ q.mT)


def dense_inverse_sqrt(g: Tensor) -> Tensor:
    values, q = np.linalg.eigh(g.double().numpy())
    return torch.from_numpy((q / np.sqrt(values)[..., None, :]) @ q.swapaxes(-1, -2))


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("p", [1, 2, 5, 16])
@pytest.mark.parametrize("high", [1.0, 1 + 1e-9, 1 + 1e-5, 1.01, 1.1, 1.5, 3.0, 1e2, 1e4])
def test_inverse_sqrt_of_grams(high: float, p: int, dtype: torch.dtype) -> None:
    """The smallest eigenvalue 1 is what the Gram of x + u has."""
    g = spd(p, 1.0, high).to(dtype)
    t = inverse_sqrt_increment(g) + identity_like(g)
    assert t.dtype == dtype
    # Backward error: t g t = I to a few eps times the condition number.
    residual = t.double() @ g.double() @ t.double() - torch.eye(p)
    assert residual.abs().max() <= 20 * EPS[dtype] * np.sqrt(p) * high
    assert (t.double() - dense_inverse_sqrt(g)).abs().max() <= 20 * EPS[dtype] * np.sqrt(p) * high


@pytest.mark.parametrize("high", [1e6, 1e8])
def test_inverse_sqrt_up_to_condition_1e8(high: float) -> None:
    g = spd(6, 1.0, high)
    t = inverse_sqrt_increment(g) + identity_like(g)
    assert (t - dense_inverse_sqrt(g)).abs().max() <= 20 * 2.2e-16 * high
    assert torch.linalg.matrix_norm(t @ g @ t - torch.eye(6)).max() <= 1e-6


@pytest.mark.parametrize("low", [0.9, 0.5, 0.1, 0.01])
def test_inverse_sqrt_of_what_shrinks(low: float) -> None:
    """Eigenvalues below 1, as of x + d with a displacement d that is not tangent, while ||g - I||_F < 1."""
    g = spd(2, low, 1.0)
    expected = dense_inverse_sqrt(g)
    assert (inverse_sqrt_increment(g) + identity_like(g) - expected).abs().max() <= 100 * 2.2e-16 / low**1.5


def test_the_increment_keeps_what_the_sum_would_round_away() -> None:
    e = 1e-9 * spd(4, 0.5, 2.0)
    g = torch.eye(4, dtype=torch.float64) + e
    torch.testing.assert_close(inverse_sqrt_increment(g), -0.5 * (g - torch.eye(4)), rtol=1e-8, atol=0)


@pytest.mark.parametrize("high", [1.0, 1.3, 4.0, 1e2, 1e4])
def test_the_blind_path_of_accelerators_converges(high: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host must not look, 16 iterations serve every condition up to 1e4 in float32."""
    monkeypatch.setattr(matfun, "host_can_look", lambda a: False)
    g = spd(6, 1.0, high).float()
    assert distance_from_identity(g) is None
    t = inverse_sqrt_increment(g) + identity_like(g)
    assert (t.double() - dense_inverse_sqrt(g)).abs().max() <= 20 * EPS[torch.float32] * high


def test_a_batch_of_unequal_conditions() -> None:
    g = torch.cat([spd(4, 1.0, high, batch=1) for high in (1.0, 1.001, 2.0, 1e4)])
    t = inverse_sqrt_increment(g) + identity_like(g)
    assert (t - dense_inverse_sqrt(g)).abs().max() <= 1e-12


def test_what_is_not_finite_stays_visible() -> None:
    g = torch.eye(3).expand(2, 3, 3).clone()
    g[1, 0, 0] = torch.nan
    assert not torch.isfinite(inverse_sqrt_increment(g)[1]).all()
    assert np.isnan(distance_from_identity(g) or 0.0)
    indefinite = torch.diag(torch.tensor([1.0, -1.0]))
    assert torch.isnan(cholesky_inverse_increment(indefinite)).any()


def test_empty_batches() -> None:
    empty = torch.empty(0, 3, 3)
    for f in (inverse_sqrt_increment, cholesky_inverse_increment):
        assert f(empty).shape == (0, 3, 3)
    assert distance_from_identity(empty) == 0


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("high", [1.0, 1.5, 1e4, 1e8])
def test_cholesky_inverse(high: float, dtype: torch.dtype) -> None:
    if high * EPS[dtype] > 0.1:
        high = 1e5
    g = spd(5, 1.0, high).to(dtype)
    t = cholesky_inverse_increment(g) + identity_like(g)
    expected = np.linalg.inv(np.linalg.cholesky(g.double().numpy())).swapaxes(-1, -2)
    assert torch.equal(t, t.triu())
    assert (t.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert (t.double() - torch.from_numpy(expected)).abs().max() <= 20 * EPS[dtype] * high


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-4, 1e-3, 1e-2, 4e-2, 0.1, 0.5, 1.0, 3.0, 30.0])
def test_expm_against_scipy(scale: float, batch: int) -> None:
    """Also for a batch of one, where torch's own is off by 2e-10 (pytorch#196592)."""
    for p in (2, 6):
        a = torch.randn(batch, p, p, dtype=torch.float64)
        a = a - 0.9 * a.mT
        a *= scale / a.abs().sum(-2).amax()
        expected = torch.from_numpy(np.stack([scipy.linalg.expm(one) for one in a.numpy()]))
        torch.testing.assert_close(expm(a), expected, atol=2e-15 * (1 + scale) ** 2, rtol=1e-13 * (1 + scale))


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e2])
def test_accretive_inverse(size: float) -> None:
    """Of I + skew + positive, what cayley solves with."""
    s = torch.randn(3, 5, 5, dtype=torch.float64)
    a = torch.eye(5, dtype=torch.float64) + size * (s - s.mT) + size**2 * s.mT @ s
    inverse = accretive_inverse(a)
    error = torch.linalg.matrix_norm(inverse @ a - torch.eye(5)).amax()
    assert error <= 1e-14 * (1 + torch.linalg.cond(a).max() ** 2)
    torch.testing.assert_close(inverse, torch.linalg.inv(a), atol=1e-9, rtol=0)
    if size <= 1:
        assert gradcheck(lambda d: accretive_inverse(a + d), (torch.zeros_like(a).requires_grad_(),))


@pytest.mark.parametrize("f", [inverse_sqrt_increment, cholesky_inverse_increment], ids=lambda f: f.__name__)
@pytest.mark.parametrize("high", [1.0, 1.0001, 1.4, 5.0, 1e3])
def test_derivatives(f: object, high: float) -> None:
    """Also at g = I, where all eigenvalues agree and the derivative of an eigendecomposition is NaN."""
    g = spd(3, 1.0, high, batch=2)
    a = torch.zeros_like(g).requires_grad_()
    assert gradcheck(lambda a: f(g + sym(a)), (a,))  # type: ignore[operator]
    assert gradgradcheck(lambda a: f(g + sym(a)), (a,), fast_mode=True)  # type: ignore[operator]


def test_a_value_is_the_same_with_and_without_a_graph() -> None:
    for high in (1.0001, 1.4, 30.0):
        g = spd(4, 1.0, high)
        with_graph = inverse_sqrt_increment(g.clone().requires_grad_()).detach()
        torch.testing.assert_close(with_graph, inverse_sqrt_increment(g), atol=1e-14, rtol=0)


def test_iterations_needed_grow_with_the_distance_and_the_precision() -> None:
    steps = [iterations_needed(e, torch.float32) for e in (0.0, 1e-9, 1e-3, 0.5, 0.9, 1 - 1e-6)]
    assert steps == sorted(steps)
    assert steps[0] == 0
    assert iterations_needed(0.5, torch.float64) > iterations_needed(0.5, torch.float32)
    assert iterations_needed(1.0, torch.float32) == 60  # never converges, but ends


def test_distance_bounds_the_spectral_norm() -> None:
    g = spd(5, 0.3, 7.0)
    distance = distance_from_identity(g)
    assert distance is not None
    assert distance >= torch.linalg.matrix_norm(g - torch.eye(5), 2).max()


def test_norm_has_a_derivative_at_zero() -> None:
    a = torch.zeros(2, 3, 3, dtype=torch.float64, requires_grad=True)
    norm(a).sum().backward()
    assert a.grad is not None
    assert torch.equal(a.grad, torch.zeros_like(a))
    b = torch.randn(2, 3, 3)
    torch.testing.assert_close(norm(b), torch.linalg.matrix_norm(b, keepdim=True))


def test_fold_is_one_newton_schulz_step_on_the_predicted_gram() -> None:
    """Coefficients that are wrong by e give a Gram that is wrong by e^2 times 3/4."""
    x = torch.linalg.qr(torch.randn(1, 8, 3, dtype=torch.float64))[0] * (1 + 1e-3)  # drifted
    u = 0.1 * torch.randn(1, 8, 3, dtype=torch.float64)
    c, w, q = gram([x], [x]), gram([x], [u]), gram([u], [u])
    a = b = inverse_sqrt_increment(c + w + w.mT + q) + identity_like(c) + 1e-4
    g = predicted_gram(a, b, c, w, q)
    y = x @ a + u @ b
    torch.testing.assert_close(g, y.mT @ y)
    before = distance_from_identity(g)
    a, b = fold(a, b, g)
    y = x @ a + u @ b
    after = distance_from_identity(y.mT @ y)
    assert before is not None
    assert after is not None
    assert after <= before**2
