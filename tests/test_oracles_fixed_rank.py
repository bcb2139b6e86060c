"""FixedRank against dense float64 matrices, truncated SVDs and pymanopt's FixedRankEmbedded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pymanopt
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from stiefelopt import USV, FixedRank, FixedRankPair
from stiefelopt.rank_laws import RankCase

SHAPES = [(7, 5, 3), (5, 9, 2), (20, 16, 6), (6, 4, 1), (4, 4, 4), (3, 6, 3)]
# Steps longer than the singular values of W, 1/2 to 3/2, too.
SCALES = [1e-6, 1e-2, 0.3, 3.0]


def near(y: Tensor, expected: Tensor, size: float = 1.0) -> None:
    torch.testing.assert_close(y, expected, atol=1e-9 * size, rtol=0)


def dense(x: USV) -> Tensor:
    return x.U @ x.S @ x.V.mT


def projected(x: USV, z: Tensor) -> Tensor:
    pu, pv = x.U @ x.U.mT, x.V @ x.V.mT
    return pu @ z + z @ pv - pu @ z @ pv


def truncated(z: Tensor, r: int) -> Tensor:
    u, s, vh = torch.linalg.svd(z)
    return (u[:, :r] * s[:r]) @ vh[:r]


def given(shape: tuple[int, ...], scale: float, seed: int = 0) -> tuple[USV, USV, Tensor]:
    """A point, a tangent vector and its dense matrix."""
    case = RankCase(shape, torch.float64, scale, seed)
    x = case.point()
    u = case.tangent(x)
    return x, u, (x.U @ u.S + u.U) @ x.V.mT + x.U @ u.V.mT


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svd_is_the_truncated_svd(shape: tuple[int, ...], scale: float) -> None:
    for seed in range(3):
        x, u, xi = given(shape, scale, seed)
        near(dense(FixedRank().retract(x, u)), truncated(dense(x) + xi, shape[-1]), 1 + scale)


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthographic_differs_by_a_normal_matrix(shape: tuple[int, ...], scale: float) -> None:
    """(W + xi) V (U^T (W + xi) V)^-1 U^T (W + xi), Absil & Oseledets (2015), equation 20."""
    x, u, xi = given(shape, scale)
    z = dense(x) + xi
    expected = z @ x.V @ torch.linalg.inv(x.U.mT @ z @ x.V) @ x.U.mT @ z
    y = dense(FixedRank("orthographic").retract(x, u))
    near(y, expected)
    near(projected(x, y - z), torch.zeros_like(z))
    assert torch.linalg.matrix_rank(y, atol=1e-9) == shape[-1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_projections_and_gradient_are_the_dense_projection(shape: tuple[int, ...]) -> None:
    x, _, _ = given(shape, 1.0)
    m, z = FixedRank(), RankCase(shape).dense()
    near(m.embed(x, m.project_dense(x, z)), projected(x, z))
    factors = [t.clone().requires_grad_() for t in x]
    (dense(USV(*factors)) * z).sum().backward()
    grads = [t.grad for t in factors]
    assert all(g is not None for g in grads)
    near(m.embed(x, m.gradient(x, USV(*grads))), projected(x, z))  # type: ignore[arg-type]


@pytest.mark.parametrize("retraction", ["svd", "orthographic"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transport_is_the_dense_projection(shape: tuple[int, ...], retraction: str) -> None:
    x, u, _ = given(shape, 0.3)
    m, v = FixedRank(retraction), RankCase(shape).tangent(x, 60)
    y = m.retract(x, u)
    near(m.embed(y, m.transport_vector(x, u, y, v)), projected(y, m.embed(x, v)))


@pytest.mark.parametrize("m", [FixedRank(), FixedRankPair()], ids=lambda m: type(m).__name__)
def test_points_that_require_grad(m: Any) -> None:
    """As parameters do: the same values, and the derivatives of finite differences; and vmap maps them."""
    draw = torch.Generator().manual_seed(0)
    x = m.random_point(2, 5, 4, rank=2, dtype=torch.float64, generator=draw)
    u, v = (m.random_tangent(x, generator=draw) for _ in range(2))
    y, z = m.retract(x, u), torch.randn(2, 5, 4, dtype=torch.float64, generator=draw)
    methods: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "transport_vector": (lambda x, y, v: m.transport_vector(x, v, y, v), (x, y, v)),
        "gradient": (m.gradient, (x, v)),
        "project_tangent": (m.project_tangent, (x, y)),
        "project_dense": (lambda x: m.project_dense(x, z.to(x[0])), (x,)),
        "random_tangent": (lambda x: m.random_tangent(x, torch.Generator().manual_seed(1)), (x,)),
    }
    for name, (method, points) in methods.items():
        kind, parts = type(x), len(x)
        flat = [t for point in points for t in point]

        def split(*tensors: Tensor, kind: Any = kind, parts: int = parts) -> list[Any]:
            return [kind(*tensors[i : i + parts]) for i in range(0, len(tensors), parts)]

        def called(*tensors: Tensor, method: Any = method, split: Any = split) -> tuple[Tensor, ...]:
            return tuple(method(*split(*tensors)))

        wanting = [t.clone().requires_grad_() for t in flat]
        assert all(map(torch.equal, called(*wanting), called(*flat))), name
        assert torch.autograd.gradcheck(called, wanting), name
        if name in ("transport_vector", "gradient", "project_tangent"):  # nothing but x, y and v in them
            for mapped, t in zip(torch.func.vmap(called)(*flat), called(*flat), strict=True):
                near(mapped, t)
        single = [t.float().requires_grad_() for t in flat]
        torch.autograd.backward([t.sum() for t in called(*single)])
        assert all(t.grad is None or bool(t.grad.isfinite().all()) for t in single), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_point_is_the_truncated_svd(shape: tuple[int, ...]) -> None:
    z = RankCase(shape).dense()
    near(dense(FixedRank().project_point(z, rank=shape[-1])), truncated(z, shape[-1]))


# pymanopt: points (u, s, vt) with a diagonal S, tangent vectors (Up, M, Vp) as here


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[2] < min(s[:2])], ids=str)
def test_pymanopts_fixed_rank_embedded(shape: tuple[int, int, int], scale: float) -> None:
    theirs, ours = pymanopt.manifolds.FixedRankEmbedded(*shape), FixedRank()
    case = RankCase(shape, torch.float64, scale)
    x = ours.project_point(dense(case.point()), rank=shape[-1])
    u, v, z = case.tangent(x), case.tangent(x, 60), case.dense()
    point = (x.U.numpy(), np.diagonal(x.S.numpy()).copy(), x.V.mT.numpy())

    def tuples(w: USV) -> Any:
        return theirs.zero_vector(point).__class__(w.U.numpy(), w.S.numpy(), w.V.numpy())

    def tensors(w: Any) -> USV:
        return USV(*(torch.from_numpy(np.array(t)) for t in w))

    for a, b in zip(ours.project_dense(x, z), tensors(theirs.projection(point, z.numpy())), strict=True):
        near(a, b)
    # Their Euclidean gradient is that of the factors of a thin SVD, ds a vector.
    factors = USV(z @ x.V @ x.S, x.U.mT @ z @ x.V, z.mT @ x.U @ x.S)
    grads = factors.U.numpy(), np.diagonal(factors.S.numpy()).copy(), factors.V.mT.numpy()
    gradient = tensors(theirs.euclidean_to_riemannian_gradient(point, grads))
    for a, b in zip(ours.gradient(x, factors), gradient, strict=True):
        near(a, b, 10)
    assert (
        abs(ours.inner(x, u, v).item() - theirs.inner_product(point, tuples(u), tuples(v))) < 1e-9 * scale**2
    )
    assert ours.dim(*shape[:2], rank=shape[2]) == theirs.dim
    near(ours.embed(x, u), torch.from_numpy(dense_of(theirs.embedding(point, tuples(u)))))

    left, values, right = theirs.retraction(point, tuples(u))
    y = ours.retract(x, u)
    near(dense(y), torch.from_numpy((left * values) @ right), 1 + scale)

    new = ours.project_point(dense(y), rank=shape[-1])
    theirs_new = (new.U.numpy(), np.diagonal(new.S.numpy()).copy(), new.V.mT.numpy())
    moved = tensors(theirs.transport(point, theirs_new, tuples(v)))
    near(ours.embed(new, ours.transport_vector(x, u, new, v)), ours.embed(new, moved))


def dense_of(parts: Any) -> NDArray[np.float64]:
    """pymanopt's embedding is (U, S, V) with U S V^T the matrix."""
    u, s, v = parts
    return u @ s @ v.T
