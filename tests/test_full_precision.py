"""Neither autocast nor torch's settings for float32 products reach the geometry, and they are left as they were.

Where a machine multiplies in bfloat16 (AMX) or TF32, the bits below differ without `full_precision`; what the parts see
is tested on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from stiefelopt import FixedRank, RiemannianWrapper, Stiefel, StiefelOptError, attach
from stiefelopt.full_precision import full_precision
from stiefelopt.layers import RiemannLoRALinear, StelLALinear
from stiefelopt.manifolds import FixedRankPair, Grassmann

ALL: Any = torch.backends
CUDA, MKLDNN = ALL.cuda.matmul, ALL.mkldnn.matmul


def word(precision: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(precision)


def set_to(where: Any, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(where, name, value)


# What users write.
SETTINGS = {
    "high": word("high"),
    "medium": word("medium"),
    "allow_tf32": set_to(CUDA, "allow_tf32", True),
    "cuda tf32": set_to(CUDA, "fp32_precision", "tf32"),
    "mkldnn bf16": set_to(MKLDNN, "fp32_precision", "bf16"),
    "all of mkldnn bf16": set_to(ALL.mkldnn, "fp32_precision", "bf16"),
    "everything tf32": set_to(ALL, "fp32_precision", "tf32"),
    "everything bf16": set_to(ALL, "fp32_precision", "bf16"),
}


def settings() -> tuple[str | None, ...]:
    """All that can be read of them; None where torch refuses, as it does where old and new settings disagree."""

    def read(f: Callable[[], object]) -> str | None:
        try:
            return str(f())
        except RuntimeError:
            return None

    return (
        read(torch.get_float32_matmul_precision),
        read(lambda: CUDA.allow_tf32),
        *(str(where.fp32_precision) for where in (CUDA, MKLDNN, ALL.mkldnn, ALL)),
    )


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("stiefelopt.full_precision._PRODUCTS", (CUDA, MKLDNN))  # on any build of torch
    yield
    torch.set_float32_matmul_precision("highest")
    for where in (ALL, ALL.mkldnn, CUDA, MKLDNN):
        where.fp32_precision = "none"


def seen_inside() -> tuple[str, str]:
    found: list[tuple[str, str]] = []
    full_precision(lambda: found.append((CUDA.fp32_precision, MKLDNN.fp32_precision)))()
    return found[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_products_are_exact_inside_and_the_settings_as_before_outside(name: str) -> None:
    SETTINGS[name]()
    before = settings()
    assert set(before) & {"tf32", "bf16"}
    assert set(seen_inside()) <= {"ieee", "none"}
    assert settings() == before


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_are_put_back_when_a_function_raises(name: str) -> None:
    SETTINGS[name]()
    before = settings()
    with pytest.raises(StiefelOptError):
        Stiefel().residual(torch.zeros(3, 4))
    assert settings() == before


def test_two_ways_of_setting_that_disagree() -> None:
    torch.set_float32_matmul_precision("high")
    CUDA.fp32_precision = "ieee"
    before = settings()
    assert None in before
    assert set(seen_inside()) == {"ieee"}
    assert settings() == before


def test_what_was_inherited_is_inherited_afterwards() -> None:
    ALL.fp32_precision = "tf32"
    seen_inside()
    ALL.fp32_precision = "none"
    assert (CUDA.fp32_precision, MKLDNN.fp32_precision) == ("none", "none")


def test_nothing_is_set_where_products_are_exact_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stiefelopt.full_precision._exact_products", None)
    assert seen_inside() == ("none", "none")


def test_autocast_and_products_together() -> None:
    torch.set_float32_matmul_precision("medium")
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = full_precision(torch.mm)(a, a)
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(inside, a @ a)


# The step and the parts, bit for bit

SHAPE = (512, 64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stepped(wrap: Callable[[torch.optim.Optimizer], Any], manifold: Any) -> list[Tensor]:
    seed = torch.Generator().manual_seed(0)
    options = {"rank": 32} if isinstance(manifold, FixedRank | FixedRankPair) else {}
    x = manifold.random_point(*SHAPE, generator=seed, **options)
    parts = [torch.nn.Parameter(t.clone()) for t in (x if isinstance(x, tuple) else (x,))]
    optimizer = torch.optim.AdamW([{"params": parts, "manifold": manifold}], lr=1e-2, weight_decay=0)
    wrapped = wrap(optimizer)
    for k in range(3):
        for i, p in enumerate(parts):
            p.grad = random(*p.shape, seed=10 * k + i)
        (optimizer if wrapped is None else wrapped).step()
    return [p.detach() for p in parts]


def attached(optimizer: torch.optim.Optimizer) -> None:
    attach(optimizer)


MANIFOLDS = (
    Stiefel(),
    Stiefel(metric="euclidean", retraction="cayley", transport="projection"),
    Stiefel(retraction="exp"),
    Grassmann(),
    FixedRank(),
    FixedRankPair(),
)


@pytest.mark.parametrize("wrap", [RiemannianWrapper, attached])
@pytest.mark.parametrize("manifold", MANIFOLDS, ids=repr)
def test_a_step_gives_the_same_bits(manifold: Any, wrap: Callable[..., Any]) -> None:
    exact = stepped(wrap, manifold)
    torch.set_float32_matmul_precision("medium")
    rounded = stepped(wrap, manifold)
    assert all(map(torch.equal, rounded, exact))
    assert (
        manifold.residual(
            rounded[0] if len(rounded) == 1 else type(manifold.random_point(2, 2, **{"rank": 1}))(*rounded)
        )
        < 1e-5
    )


def results(m: Any) -> list[Any]:
    """Of every public method of a manifold of orthonormal matrices."""
    seed = torch.Generator().manual_seed(0)
    x = m.random_point(*SHAPE, generator=seed)
    z = random(*SHAPE, seed=1)
    u = 0.1 * m.project_tangent(x, z)
    y = m.retract(x, u)
    return [
        *(x, u, y, m.residual(y), m.random_tangent(x, seed), m.project_point(z), m.gradient(x, z)),
        *(m.inner(x, u, z), m.norm(x, u), m.exp(x, u), m.transport_vector(x, u, y, u)),
    ]


def rank_results(m: Any) -> list[Any]:
    """Of every public method of a manifold of fixed rank."""
    seed = torch.Generator().manual_seed(0)
    x = m.random_point(*SHAPE, rank=32, generator=seed)
    u, z = m.random_tangent(x, seed), random(*SHAPE, seed=1)
    y = m.retract(x, u)
    v = m.project_dense(x, z)
    found = [x, u, y, v, m.project_point(z, rank=32), m.project_tangent(x, v), m.gradient(x, v)]
    found += [m.transport_vector(x, u, y, v)]
    dense = [m.to_dense(y), m.embed(x, u), m.residual(y), m.inner(x, u, v), m.norm(x, u)]
    return [t for point in found for t in point] + dense


@pytest.mark.parametrize("manifold", MANIFOLDS, ids=repr)
def test_every_method_gives_the_same_bits(manifold: Any) -> None:
    of = rank_results if isinstance(manifold, FixedRank | FixedRankPair) else results
    exact = of(manifold)
    torch.set_float32_matmul_precision("medium")
    assert all(map(torch.equal, of(manifold), exact))


@pytest.mark.parametrize("layer", [StelLALinear, RiemannLoRALinear])
def test_layers_start_merge_and_export_with_the_same_bits(layer: Any) -> None:
    def made() -> list[Tensor]:
        torch.manual_seed(0)
        adapted = layer(torch.nn.Linear(*SHAPE), r=32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            adapted.S.add_(1)
        start, pair, delta = adapted.weight.detach().clone(), adapted.to_lora(), adapted.delta_weight()
        adapted.merge()
        return [start, *pair, delta, adapted.weight]

    exact = made()
    torch.set_float32_matmul_precision("medium")
    assert all(map(torch.equal, made(), exact))
