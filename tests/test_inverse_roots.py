"""Inverse square roots by bounded spectra: the polynomials against numpy, the matrices against LAPACK in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stiefelopt import coarse, inverse_roots
from stiefelopt.inverse_roots import coefficients, inverse_sqrt
from stiefelopt.retractions import polar

EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def symmetric(values: Tensor, batch: int = 2, seed: int = 0) -> Tensor:
    """Random eigenvectors, these eigenvalues, float64."""
    p = values.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(batch, p, p, dtype=torch.float64, generator=generator))[0]
    e = (q * values.double()) @ q.mT
    return (e + e.mT) / 2


def exact(e: Tensor) -> Tensor:
    values, q = np.linalg.eigh(e.double().numpy())
    return torch.from_numpy((q * np.expm1(-0.5 * np.log1p(values))[..., None, :]) @ q.swapaxes(-1, -2))


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("bound", [1e-9, 1e-5, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
def test_polynomials_are_right_on_their_interval(bound: float, dtype: torch.dtype) -> None:
    a = coefficients(bound, EPS[dtype])
    if a is None:
        assert dtype == torch.float64
        assert bound >= 0.5
        return
    t = np.linspace(-bound, bound, 1001, dtype=np.longdouble)
    value = sum(np.longdouble(c) * t**k for k, c in enumerate(a, start=1))
    # Float64's own coefficients are rounded.
    assert (
        np.abs(value - np.expm1(-0.5 * np.log1p(t))).max()
        <= (0.5 if dtype == torch.float32 else 4) * EPS[dtype]
    )
    assert sum(abs(c) * bound**k for k, c in enumerate(a, start=1)) <= inverse_roots.STABLE


def test_degrees_grow_with_the_bound_and_end() -> None:
    bounds = (0.0, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.6)
    degrees = [len(coefficients(b, EPS[torch.float32]) or ()) for b in bounds]
    assert degrees == sorted(degrees)
    assert degrees[0] == 1
    assert all(
        coefficients(b, EPS[torch.float32]) is None for b in (0.95, 1.0, 3.0, float("inf"), float("nan"))
    )


SPECTRA = {
    "zero": torch.zeros(9),
    "equal": torch.full((9,), 0.7),
    "one long": torch.tensor([0.0] * 8 + [2.0]),
    "one short": torch.tensor([0.0] * 8 + [-0.9]),
    "both signs": torch.linspace(-0.3, 0.3, 9),
    "tiny": torch.linspace(0, 1e-8, 9),
    "small": torch.linspace(0, 1e-3, 9),
    "near": torch.linspace(0, 0.03, 9),
    "middle": torch.linspace(0, 0.5, 9),
    "long": torch.linspace(0, 3, 9),
    "very long": torch.logspace(-3, 3, 9),
}


@pytest.fixture(params=["iterations", "LAPACK"])
def _wide_spectra(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By which way a spectrum goes that is too wide for a polynomial: their width decides, which here is 9."""
    monkeypatch.setattr(inverse_roots, "LAPACK", 1 if request.param == "LAPACK" else 512)


@pytest.mark.usefixtures("_wide_spectra")
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("name", SPECTRA)
def test_against_eigenvalues(name: str, dtype: torch.dtype) -> None:
    e = symmetric(SPECTRA[name]).to(dtype)
    condition = (1 + SPECTRA[name]).max() / (1 + SPECTRA[name]).min()
    found, expected = inverse_sqrt(e.clone()).double(), exact(e)
    assert (found - expected).abs().max() <= 8 * EPS[dtype] * condition**1.5
    single = inverse_sqrt(e[0].clone())
    torch.testing.assert_close(
        single.double(), expected[0], atol=float(8 * EPS[dtype] * condition**1.5), rtol=0
    )


@pytest.mark.usefixtures("_wide_spectra")
def test_unequal_spectra_in_one_batch() -> None:
    e = torch.cat([symmetric(values, batch=1) for values in SPECTRA.values()])
    assert (inverse_sqrt(e.clone()) - exact(e)).abs().max() <= 1e-10


@pytest.mark.usefixtures("_wide_spectra")
@pytest.mark.parametrize("values", [[-0.99, 3.0], [-0.8, 1.5], [-0.6, 5.0, 0.0]])
def test_a_spectrum_that_was_not_promised_is_not_overshot(values: list[float]) -> None:
    """Of x + d with d not tangent: what comes out must be nearer to I and positive, for the next pass to take over."""
    lengths = 1 + torch.tensor(values)
    t = torch.diagonal(inverse_sqrt(torch.diag(lengths - 1)[None])[0]) + 1
    after = lengths.sqrt() * t
    assert (after > 0).all()
    assert (after <= 1 + 1e-5).all()
    assert (after >= lengths.sqrt().clamp_max(1) - 1e-5).all()


@pytest.mark.parametrize(("bound", "limit"), [(1e-5, 0), (4e-3, 1), (0.04, 2), (0.3, 4), (0.6, 7)])
def test_the_price_in_products(bound: float, limit: int) -> None:
    """Newton-Schulz takes 6 products for 0.04, 9 for 0.3 and 12 for 0.6."""
    e = symmetric(torch.tensor([-bound, bound]), batch=1).float()
    with FlopCounterMode(display=False) as counted:
        inverse_sqrt(e)
    assert counted.get_total_flops() <= limit * 2 * e.shape[-1] ** 3


@pytest.mark.usefixtures("_wide_spectra")
def test_what_is_not_finite_stays_visible() -> None:
    for bad in (torch.nan, torch.inf, 1e30):
        e = torch.zeros(2, 3, 3)
        e[1, 0, 0] = bad
        assert not torch.isfinite(inverse_sqrt(e)).all()


# Products in bfloat16


@pytest.fixture
def instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine can do."""
    monkeypatch.setattr(coarse, "_has_instructions", lambda: True)


def gram_like(size: float, p: int = 512) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, p, p, generator=generator)
    e = a + a.mT
    return e * (size / torch.linalg.matrix_norm(e).amax())


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("kind", ["random", "equal entries", "one direction"])
def test_coarse_products_keep_to_what_is_allowed(kind: str) -> None:
    e = gram_like(0.05)
    if kind == "equal entries":
        e = torch.full((1, 512, 512), 0.05 / 512)
    if kind == "one direction":
        v = torch.linspace(1, 2, 512)[:, None]
        e = (0.05 * v @ v.mT / v.square().sum())[None]
    size = torch.linalg.matrix_norm(e).amax().item()
    expected = e.double() @ e.double()
    coarsely = torch.linalg.matrix_norm((e.bfloat16() @ e.bfloat16()).double() - expected).amax().item()
    for allowed in (10 * coarsely, coarsely / 10):
        for found in (coarse.square(e, size, allowed), coarse.product(e, e, allowed)):
            off = torch.linalg.matrix_norm(found.double() - expected).amax().item()
            assert off <= 1.5 * allowed + 1e-6 * size * size
    fine = torch.linalg.matrix_norm(coarse.square(e, size, 0.0).double() - expected).amax().item()
    assert fine <= 1e-2 * coarsely


def in_one_direction(kind: str, p: int) -> Tensor:
    """v v^T of a unit vector to which all the random signs are orthogonal: of two entries, or of all."""
    signs = coarse._probes(p).double()
    if kind == "all entries":
        basis = torch.linalg.qr(signs.mT)[0]
        v = torch.linspace(1, 2, p, dtype=torch.float64)
        v -= basis @ (basis.mT @ v)
    else:
        overlap = (signs.mT @ signs).triu(1)
        i, j = (overlap == coarse.PROBES).nonzero()[0].tolist()
        v = torch.zeros(p, dtype=torch.float64)
        v[i], v[j] = 1, -1
    assert (signs @ v).abs().max() < 1e-12
    v /= v.norm()
    return torch.outer(v, v)[None]


@pytest.mark.parametrize("kind", ["two entries", "all entries"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_orthogonal_to_all_probes_is_seen(dtype: torch.dtype, kind: str) -> None:
    for size in (0.01, 0.1, 0.5):
        e = (size * in_one_direction(kind, 512)).to(dtype)
        found = inverse_sqrt(e.clone()).double()
        assert (found - exact(e)).abs().max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("kind", ["two entries", "all entries"])
def test_a_coarse_square_of_one_direction_is_as_good_as_said(kind: str) -> None:
    e = (0.01 * in_one_direction(kind, 512)).float()
    exactly = e.double() @ e.double()
    coarsely = torch.linalg.matrix_norm((e.bfloat16() @ e.bfloat16()).double() - exactly).item()
    found = coarse.square(e, 0.01, coarsely / 4)
    assert torch.linalg.matrix_norm(found.double() - exactly).item() <= coarsely / 4


@pytest.mark.usefixtures("instructions")
def test_coarse_products_are_used_and_only_where_they_pay() -> None:
    e = gram_like(0.02)
    assert coarse.pays(e)
    assert not torch.equal(coarse.square(e, 0.02, 1e-6), e @ e)
    assert not torch.equal(coarse.product(e, e, 1e-3), e @ e)
    for other in (e.double(), e[:, :16, :16].contiguous()):
        assert not coarse.pays(other)
        assert torch.equal(coarse.product(other, other, 1.0), other @ other)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("length", [0.02, 0.1, 0.5])
def test_a_polar_step_is_as_exact_with_them(length: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(640, 512, generator=generator))[0]
    d = torch.randn(640, 512, generator=generator).sign()
    w = x.mT @ d
    u = d - x @ (w + w.mT) / 2
    u *= length / torch.linalg.matrix_norm(u, 2)
    y = polar(x, u).double()
    a, _, bh = torch.linalg.svd((x + u).double(), full_matrices=False)
    assert (y - a @ bh).abs().max() <= 1e-6
    assert (y.mT @ y - torch.eye(512)).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cube_is_left_out_only_where_rounding_a_point_brings_more(dtype: torch.dtype) -> None:
    """What is left out is measured by the cube itself in float64; where it is more, it is not left out."""
    p, eps = 512, torch.finfo(dtype).eps
    rounding = 0.3 * p**0.5 * eps
    unit = gram_like(1.0, p).to(dtype)
    cube = torch.linalg.matrix_norm(unit.double() @ unit.double() @ unit.double()).amax().item()
    for share, lost in ((0.25, True), (1.5, False)):
        e = unit * (share * rounding / (5 / 16 * cube)) ** (1 / 3)
        assert inverse_roots._cube_is_lost(e, e @ e) is lost
        found = inverse_sqrt(e.clone()).double()
        assert torch.linalg.matrix_norm(found - exact(e)).amax() <= rounding
    assert not inverse_roots._cube_is_lost(e[:, :64, :64], e[:, :64, :64] @ e[:, :64, :64])
