"""What every test gets: one thread, a seed, and registries that are as they were when it ends."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from stiefelopt import manifolds, metrics, projections, rank_retractions, retractions, transports
from stiefelopt.registry import Registry

# The quick suite draws the same cases every time; HYPOTHESIS_PROFILE=explore looks for new ones.
_COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("quick", derandomize=True, max_examples=12, **_COMMON)
settings.register_profile("explore", max_examples=100, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

REGISTRIES: tuple[Registry[Any], ...] = (
    retractions._registry,
    rank_retractions._registry,
    metrics._registry,
    projections._registry,
    transports._registry,
    manifolds.base._registry,
)

# The matrices are small and the machine is shared: a second thread only waits.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def scratch_registries() -> Iterator[None]:
    """Registrations made in the test are taken back."""
    before = [dict(registry._parts) for registry in REGISTRIES]
    yield
    for registry, parts in zip(REGISTRIES, before, strict=True):
        registry._parts.clear()
        registry._parts.update(parts)
