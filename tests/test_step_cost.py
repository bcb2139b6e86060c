"""The price of a step in operations, which no busy machine changes: products, copies, allocations, looks, LAPACK.

Each limit is what the step does today, so that a pass more than needed fails here before a benchmark would show it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stiefelopt import FixedRank, RiemannianWrapper, Stiefel, retractions

N, P, COUNT = 96, 8, 3  # 2 p = 16 < n: what is taller than 2 p is tall
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
LAPACK = (
    "linalg_qr",
    "_linalg_svd",
    "_linalg_eigh",
    "linalg_cholesky_ex",
    "geqrf",
    "linalg_householder_product",
)
LOOKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Cost(TorchDispatchMode):
    """Counts, by kind, what runs inside; tall tensors are the ones with N rows or columns."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        tall = any(map(_is_tall, (*inputs, *outputs)))
        if name in PRODUCTS and tall:
            self.found["tall products"] += 1
        elif name in LAPACK and any(map(_is_tall, inputs)):
            self.found["tall LAPACK"] += 1
        elif name in LOOKS:
            self.found["looks"] += 1
        elif name in ("copy_", "_foreach_copy_", "cat", "stack", "clone") and tall:
            self.found["tall copies"] += 1
        fresh = [t for t in outputs if _is_tall(t) and t.untyped_storage().data_ptr() not in before]
        # A view of something older is no allocation.
        if fresh and name not in ("view", "_unsafe_view", "alias", "detach"):
            self.found["tall allocations"] += 1
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _is_tall(t: Tensor) -> bool:
    return t.ndim >= 2 and N in t.shape[-2:]


class Still(torch.optim.SGD):
    """An inner optimizer that costs one operation a parameter, which no count below is about."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"])


def stiefel(retraction: str, **options: str) -> RiemannianWrapper:
    torch.manual_seed(0)
    points = [torch.nn.Parameter(Stiefel().random_point(N, P)) for _ in range(COUNT)]
    return wrapped(points, Stiefel(retraction=retraction, **options))


def fixed_rank(transport: str = "none") -> RiemannianWrapper:
    torch.manual_seed(0)
    manifold = FixedRank(transport=transport)
    points = [torch.nn.Parameter(t) for _ in range(COUNT) for t in manifold.random_point(N, N, rank=P)]
    return wrapped(points, manifold, gradient="projected")


def wrapped(points: list[torch.nn.Parameter], manifold: Any, **keys: Any) -> RiemannianWrapper:
    for p in points:
        p.grad = torch.randn_like(p)
    return RiemannianWrapper(Still([{"params": points, "manifold": manifold, **keys}], lr=1e-3))


def adam(count: int) -> RiemannianWrapper:
    """Fixed rank with moments to carry, and an inner optimizer that steps all of one shape at once."""
    torch.manual_seed(0)
    points = [torch.nn.Parameter(t) for _ in range(count) for t in FixedRank().random_point(N, N, rank=P)]
    for p in points:
        p.grad = 1e-3 * torch.randn_like(p)
    group = {"params": points, "manifold": FixedRank(), "gradient": "projected"}
    return RiemannianWrapper(torch.optim.AdamW([group], lr=1e-3, weight_decay=0))


def cost(optimizer: RiemannianWrapper) -> Counter[str]:
    """Of a step after the first, which makes what stays."""
    optimizer.step()
    with Cost() as counted:
        optimizer.step()
    return counted.found


# Two products convert the gradient, two make the displacement tangent, two retract; four more where the retraction
# needs the displacement itself. Copies: points, gradients and moved points in, new points out.
GRAM = {"tall products": 6, "tall copies": 4, "tall allocations": 1, "looks": 7}
EXPLICIT = {"tall products": 10, "tall copies": 5, "tall allocations": 2, "looks": 5}
LIMITS = {"polar": GRAM, "qr": GRAM, "newton_schulz": GRAM, "cayley": EXPLICIT, "exp": EXPLICIT}


def within(found: Counter[str], limits: dict[str, int]) -> bool:
    return all(found[kind] <= limits.get(kind, 0) for kind in {*found, *limits})


@pytest.mark.parametrize("retraction", sorted(set(retractions.names()) - {"svd"}))
def test_stiefel(retraction: str) -> None:
    found = cost(stiefel(retraction))
    assert within(found, LIMITS[retraction]), dict(found)


def test_without_a_projection_two_products_fewer() -> None:
    found = cost(stiefel("polar", projection="none"))
    assert within(found, GRAM | {"tall products": 4}), dict(found)


def test_more_parameters_cost_no_more_operations() -> None:
    few = cost(stiefel("polar"))
    torch.manual_seed(0)
    points = [torch.nn.Parameter(Stiefel().random_point(N, P)) for _ in range(10 * COUNT)]
    assert cost(wrapped(points, Stiefel())) == few


def test_a_manifold_costs_nothing_where_there_is_none() -> None:
    points = [torch.nn.Parameter(torch.randn(N, P)) for _ in range(COUNT)]
    assert not cost(wrapped(points, None))


@pytest.mark.parametrize(
    ("transport", "limits"),
    [
        # Per factor: two for the gradient, five to retract.
        ("none", {"tall products": 14, "tall copies": 10, "tall allocations": 2, "looks": 22}),
        # No moments to carry: the same.
        ("projection", {"tall products": 14, "tall copies": 10, "tall allocations": 2, "looks": 22}),
    ],
)
def test_fixed_rank(transport: str, limits: dict[str, int]) -> None:
    found = cost(fixed_rank(transport))
    assert within(found, limits), dict(found)


def test_moments_are_carried_where_they_lie() -> None:
    # Per factor: two products for the gradient, five to retract, five to carry the first moment, four the second.
    # Copies: points and gradients in, points once more for the inner optimizer, new points out.
    limits = {"tall products": 32, "tall copies": 10, "tall allocations": 12, "looks": 24}
    few = cost(adam(COUNT))
    assert within(few, limits), dict(few)
    assert cost(adam(10 * COUNT)) == few


def test_the_counts_see_what_is_too_much() -> None:
    assert cost(stiefel("svd"))["tall LAPACK"] > 0
    x = torch.randn(2, N, P)
    with Cost() as counted:
        torch.bmm(x.mT, x)
        x.clone()
        bool((x > 0).any())
    assert counted.found == {"tall products": 1, "tall copies": 1, "tall allocations": 2, "looks": 1}
