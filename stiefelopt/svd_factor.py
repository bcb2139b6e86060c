r"""The orthonormal factor U V^T of a thin SVD, with a derivative that repeated singular values do not break.

With y = U V^T and h = y^T z = V S V^T the differential is

    dy = y O + (I - y y^T) dz h^(-1),   h O + O h = y^T dz - dz^T y,

which asks for no two singular values to differ, as the SVD's own derivative does, only for none to be zero.
Reference: Higham, Functions of Matrices (2008), chapter 8; Kenney & Laub (1991).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gram import sym
from .shapes import compute_dtype


def svd_factor(z: Tensor) -> Tensor:
    """U V^T of the thin SVD of a stack (B, n, p), differentiable any number of times where z has full rank.

    LAPACK's float32 divide and conquer sometimes fails on many nearly equal singular values, which is what
    matrices near the manifold have; such a stack is done again in float64.
    """
    return _SvdFactor.apply(z)


def _svd_factor(z: Tensor) -> Tensor:
    # A common scale changes no singular vector, and keeps 1e-30 and 1e30 inside the range of the squares.
    scale = z.abs().amax((-2, -1), keepdim=True) if z.numel() else torch.ones_like(z)
    z = z / torch.where(scale > 0, scale, torch.ones_like(scale))
    try:
        u, _, vh = torch.linalg.svd(z, full_matrices=False)
    except RuntimeError:  # torch.linalg.LinAlgError is one
        if z.dtype == torch.float64:
            raise
        return _svd_factor(z.double()).to(compute_dtype(z.dtype))
    return u @ vh


def _differential(y: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    """dy of dz; it is its own adjoint."""
    h, w = sym(y.mT @ z), y.mT @ dz
    turn = _Lyapunov.apply(h, w - w.mT)
    return y @ turn + torch.linalg.solve(h, dz - y @ w, left=False)


class _SvdFactor(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return _svd_factor(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs)
        ctx.save_for_forward(output, *inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        y, z = ctx.saved_tensors
        return _differential(y, z, dy)

    @staticmethod
    def jvp(ctx: Any, dz: Tensor) -> Tensor:
        y, z = ctx.saved_tensors
        return _differential(y, z, dz)


class _Lyapunov(torch.autograd.Function):
    """X of h X + X h = k, for symmetric positive definite h."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, k: Tensor) -> Tensor:
        values, v = torch.linalg.eigh(h)
        return v @ ((v.mT @ k @ v) / (values[..., :, None] + values[..., None, :])) @ v.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor]:
        h, x = ctx.saved_tensors
        dk = _Lyapunov.apply(h, dx)
        return -(dk @ x.mT + x.mT @ dk), dk

    @staticmethod
    def jvp(ctx: Any, dh: Tensor, dk: Tensor) -> Tensor:
        h, x = ctx.saved_tensors
        return _Lyapunov.apply(h, dk - dh @ x - x @ dh)
