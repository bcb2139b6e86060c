"""Products in bfloat16, float32 in and out, for matrices so small beside the result that nobody sees the difference.

Machines with matrix instructions for bfloat16 multiply three to five times as fast in it. What is rounded is a
correction of second order: its relative error of 2^-8 stays below float32's rounding of what it corrects.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from .gram import gram

UNIT = 2.0**-8  # unit roundoff of bfloat16
# Measured on whole steps: 1500 columns gain 9 %, 512 gain 3 %, 256 nothing.
NARROWEST = 512
PROBES, PEAKS = 8, 4


@cache
def _has_instructions() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16")) and torch.backends.mkldnn.is_available()


def pays(a: Tensor) -> bool:
    """Whether bfloat16 is faster for products of square matrices like a."""
    return (
        a.device.type == "cpu"
        and a.dtype == torch.float32
        and a.shape[-1] >= NARROWEST
        and _has_instructions()
    )


def product(a: Tensor, b: Tensor, allowed: float) -> Tensor:
    """a b with a Frobenius error of at most `allowed` beside float32's own: in bfloat16 where that is sure.

    Cost: one product of p x p, and two norms.
    """
    if pays(a):
        # Both factors and the result are rounded.
        size = torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b)
        if bool(3.02 * UNIT * size.amax() <= allowed):
            return (a.bfloat16() @ b.bfloat16()).float()
    return a @ b


def square(a: Tensor, size: float, allowed: float) -> Tensor:
    """a^2 with a Frobenius error of at most `allowed`, as seen on a few vectors: no bound by norms is sharp enough.

    Args:
        a: (*b, p, p), symmetric.
        size: max ||a||_F.

    Cost: one product of p x p, little more than half of it where wide; bfloat16 tried in vain adds a third.
    """
    # Rounding errors are about half a unit, and ||a^2||_F is about 2 ||a||_F^2 / p^(1/2), at least half of that.
    if pays(a) and UNIT * size * size <= allowed * a.shape[-1] ** 0.5:
        half = a.bfloat16()
        rough = (half @ half).float()
        if seen_norm(lambda v: v @ rough - (v @ a) @ a, a) <= allowed:
            return rough
    stack = a.reshape(-1, *a.shape[-2:])
    return gram([stack], [stack]).view(a.shape)


def seen_norm(operator: Callable[[Tensor], Tensor], a: Tensor) -> float:
    """The largest Frobenius norm of linear operators E on vectors like a's rows, E a polynomial in a or its rounding.

    From the mean of ||v E||^2 over random signs v, and from a's largest rows as v: what has one direction or few, to
    which all the signs may be orthogonal, shows there.

    Args:
        operator: (*b, k, p) -> (*b, k, p). Eight rows times a matrix take a third to a half of the time of a matrix
            times eight columns.
        a: (*b, p, p), symmetric.
    """
    signs = _probes(a.shape[-1]).to(a.dtype).expand(*a.shape[:-2], -1, -1)
    sizes, largest = torch.linalg.vector_norm(a, dim=-1, keepdim=True).topk(min(PEAKS, a.shape[-1]), dim=-2)
    rows = a.take_along_dim(largest, dim=-2) / sizes.clamp_min(torch.finfo(a.dtype).tiny)
    seen = operator(torch.cat([signs, rows], dim=-2))
    by_signs = torch.linalg.matrix_norm(seen[..., :PROBES, :]).amax().item() / PROBES**0.5
    return max(by_signs, torch.linalg.vector_norm(seen[..., PROBES:, :], dim=-1).amax().item())


@lru_cache(maxsize=16)
def _probes(p: int) -> Tensor:
    """Random signs (8, p), the same every time: the mean of ||v E||^2 over such v is ||E||_F^2."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (PROBES, p), generator=generator, device="cpu").float() * 2 - 1
