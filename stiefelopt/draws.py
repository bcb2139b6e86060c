"""Random numbers from the caller's generator, on the device where it lives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ConfigError
from .shapes import compute_dtype


def check_generator(generator: object) -> None:
    """Refuse a seed in a generator's place."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ConfigError(
            f"generator is {generator!r}; pass torch.Generator().manual_seed({generator!r}), or leave it out."
        )


def normal(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Standard normal numbers in the compute dtype, on the generator's device where there is one."""
    check_generator(generator)
    source = device if generator is None else generator.device
    return torch.randn(shape, dtype=compute_dtype(dtype), device=source, generator=generator)
