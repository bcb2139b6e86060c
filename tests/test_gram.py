"""Tall to small where it is wide: symmetric products by blocks, and the memory that buckets share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stiefelopt import RiemannianWrapper, Stiefel
from stiefelopt.gram import BLOCK, LONE_BLOCK, gram
from stiefelopt.manifolds import Sphere
from stiefelopt.scratch import LARGE, Scratch


def stack(b: int, n: int, p: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(p)
    return torch.randn(b, n, p, dtype=dtype, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 2 * LONE_BLOCK, 3 * BLOCK + 44])
@pytest.mark.parametrize("b", [1, 3])
def test_wide_grams(b: int, p: int, dtype: torch.dtype) -> None:
    """Rows, columns and transposed layouts; into fresh memory, and into what held something else."""
    x = stack(b, p + 40, p, dtype)
    expected = x.double().mT @ x.double()
    # Sums of n terms, whose sizes add up to about n.
    allowed = torch.finfo(dtype).eps * x.shape[1] ** 1.5
    for y in (x, x.mT.contiguous().mT):
        found = gram([y], [y])
        torch.testing.assert_close(found.double(), expected, atol=allowed, rtol=0)
        if p >= 2 * BLOCK:
            assert torch.equal(found, found.mT)
        space = torch.full((2 * b, p, p), torch.nan, dtype=dtype)
        gram([y, y], [y, y], out=space)
        torch.testing.assert_close(space.double(), torch.cat((expected, expected)), atol=allowed, rtol=0)


def test_a_wide_gram_shows_what_is_not_finite() -> None:
    x = stack(2, 300, 300)
    x[1, 7, 290] = torch.nan
    found = gram([x], [x])
    assert torch.isfinite(found[0]).all()
    assert found[1, 290].isnan().all()
    assert found[1, :, 290].isnan().all()


def test_wide_grams_are_differentiated_and_mapped() -> None:
    x = stack(2, 280, 260, torch.float64)
    weights = stack(2, 260, 260, torch.float64)
    leaf = x.clone().requires_grad_()
    (gram([leaf], [leaf]) * weights).sum().backward()
    torch.testing.assert_close(leaf.grad, x @ (weights + weights.mT))
    mapped = torch.func.vmap(lambda y: gram([y[None]], [y[None]])[0])(x)
    torch.testing.assert_close(mapped, x.mT @ x)
    turned = torch.func.jvp(lambda y: gram([y], [y]), (x,), (torch.ones_like(x),))[1]
    cross = x.mT @ torch.ones_like(x)
    torch.testing.assert_close(turned, cross + cross.mT)


# Shared memory


def test_memory_is_kept_from_a_size_on_and_grows() -> None:
    scratch, like = Scratch(), torch.empty(0)
    assert scratch.take((LARGE // 4 - 1,), like) is None
    first = scratch.take((LARGE // 4,), like)
    assert first is not None
    again = scratch.take((1, LARGE // 4), like)
    assert again is not None
    assert (again.shape, again.data_ptr()) == ((1, LARGE // 4), first.data_ptr())
    more = scratch.take((LARGE,), like)
    assert more is not None
    assert more.numel() == LARGE
    other = scratch.take((LARGE,), like.double())
    assert other is not None
    assert (other.dtype, other.data_ptr() != more.data_ptr()) == (torch.float64, True)
    assert scratch.take((LARGE,), like.to("meta")) is None


def test_buckets_that_share_memory_step_as_each_alone() -> None:
    """Three widths, two precisions: all have small matrices of more than LARGE."""
    shapes = [(520, 512, torch.float32), (700, 600, torch.float32), (400, 384, torch.float64)]
    xs = [torch.linalg.qr(stack(1, n, p, dtype)[0]).Q.contiguous() for n, p, dtype in shapes]

    def moved(points: list[Tensor]) -> list[Tensor]:
        params = [torch.nn.Parameter(x.clone()) for x in points]
        optimizer = RiemannianWrapper(torch.optim.Adam([{"params": params, "manifold": Stiefel()}], lr=1e-3))
        for k in range(3):
            for p in params:
                p.grad = torch.cos(torch.arange(p.numel(), dtype=p.dtype) * (k + 1)).view(p.shape)
            optimizer.step()
        return [p.detach() for p in params]

    together = moved(xs)
    for x, y in zip(xs, together, strict=True):
        (alone,) = moved([x])
        assert torch.equal(y, alone)
        assert Stiefel().residual(y) <= 20 * torch.finfo(y.dtype).eps
        assert not torch.equal(x, y)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    ("b", "n", "p"), [(1, 300_007, 1), (2, 70_000, 2), (1, 40_000, 8), (2, 2051, 5), (2, 40_001, 16)]
)
def test_long_grams_are_summed_in_pieces(b: int, n: int, p: int, flipped: bool) -> None:
    """Where one entry is near 1 and all others are small a BLAS loses these, one chain of sums for a column."""
    x = torch.full((b, n, p), 1e-4)
    x[:, :p] = torch.eye(p)
    y = stack(b, n, p) / n**0.5
    x, y = (t.mT.contiguous().mT if flipped else t for t in (x, y))
    for first, second in ((x, x), (y, y), (x, y)):
        expected = first.double().mT @ second.double()
        out = torch.empty(b, p, p)
        assert gram([first], [second], out=out) is out
        for found in (gram([first], [second]), out):
            assert (found.double() - expected).abs().max() <= 5e-6


def test_a_sphere_of_millions_of_entries_knows_its_points() -> None:
    torch.manual_seed(0)
    m = Sphere()
    x = m.random_point(1024, 1024)
    m.check(x)
    y = m.retract(x, m.project_tangent(x, torch.randn(1024, 1024) / 1e4))
    assert abs(y.double().square().sum().item() - 1) < 2e-6
