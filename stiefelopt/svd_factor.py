r"""The orthonormal factor U V^T of a thin SVD, with a derivative that repeated singular values do not break.

With y = U V^T and h = y^T z = V S V^T the differential is

    dy = y O + (I - y y^T) dz h^(-1),   h O + O h = y^T dz - dz^T y,  O skew,

which asks for no two singular values to differ, as the SVD's own derivative does, only for none to be zero. The nearest
rotation to a square z, y = U diag(1, ..., 1, det U V^T) V^T, has the same one: h then has one negative eigenvalue -s_n,
and what is asked for is that s_n, which may be zero, differs from the others.
Reference: Higham, Functions of Matrices (2008), chapter 8; Kenney & Laub (1991).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .gram import identity_like, sym
from .shapes import compute_dtype


def svd_factor(z: Tensor) -> Tensor:
    """U V^T of the thin SVD of a stack (B, n, p), differentiable any number of times where z has full rank.

    LAPACK's float32 divide and conquer sometimes fails on many nearly equal singular values, which is what
    matrices near the manifold have; such a stack is done again in float64.
    """
    return _SvdFactor.apply(z)


def rotation_factor(z: Tensor) -> Tensor:
    """U diag(1, ..., 1, det U V^T) V^T of a stack (B, n, n), differentiable any number of times where it is unique.

    Computed in float64.
    """
    return _RotationFactor.apply(z)


def turned(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Orthogonal x (*b, n, n), its last column turned around where ``like``, by default x itself, is a reflection."""
    sign = torch.linalg.det((x if like is None else like).double()).sign().to(x.dtype)[..., None]
    signs = torch.cat((torch.ones_like(x[..., 0, 1:]), sign), -1)
    return x * signs[..., None, :]


def _svd_factor(z: Tensor) -> Tensor:
    u, vh = _singular_vectors(z)
    return u @ vh


def _rotation_factor(z: Tensor) -> Tensor:
    u, vh = _singular_vectors(z.double())
    return (turned(u, u @ vh) @ vh).to(z.dtype)


def _singular_vectors(z: Tensor) -> tuple[Tensor, Tensor]:
    # A common scale changes no singular vector, and keeps 1e-30 and 1e30 inside the range of the squares.
    scale = z.abs().amax((-2, -1), keepdim=True) if z.numel() else torch.ones_like(z)
    z = z / torch.where(scale > 0, scale, torch.ones_like(scale))
    try:
        u, _, vh = torch.linalg.svd(z, full_matrices=False)
    except RuntimeError:  # torch.linalg.LinAlgError is one
        if z.dtype == torch.float64:
            raise
        u, vh = (t.to(compute_dtype(z.dtype)) for t in _singular_vectors(z.double()))
    return u, vh


def _differential(y: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    """dy of dz; it is its own adjoint."""
    h, w = sym(y.mT @ z), y.mT @ dz
    dy = y @ _Lyapunov.apply(h, w - w.mT)
    if y.shape[-2] == y.shape[-1]:  # y y^T = I
        return dy
    return dy + torch.linalg.solve(h, dz - y @ w, left=False)


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


class _RotationFactor(_SvdFactor):
    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return _rotation_factor(z)


class _Lyapunov(torch.autograd.Function):
    """The skew X of h X + X h = k for skew k and symmetric h, no two of whose eigenvalues sum to zero.

    Of a k that is not skew, as a cotangent, the skew part: the other has no effect on a differential.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, k: Tensor) -> Tensor:
        values, v = torch.linalg.eigh(h)
        k = v.mT @ (0.5 * (k - k.mT)) @ v
        # The diagonal of a skew k is zero, whatever it is divided by.
        sums = values[..., :, None] + values[..., None, :]
        diagonal = identity_like(h).bool()
        x = (k / sums.masked_fill(diagonal, 1)).masked_fill(diagonal, 0)
        return v @ x @ v.mT

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
