"""Functions of p x p matrices, batched: inverse square root, Cholesky inverse, balanced exponential.

No LAPACK eigensolver: Newton-Schulz iterations are matrix products, run at GEMM speed on every device, and
stay differentiable at repeated eigenvalues, where the derivative of an eigendecomposition is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import identity_like

# Iterations of the scaled coupled iteration that turn any condition number up to about 1e4 into full float32
# accuracy; used where the host must not look at the data.
BLIND_ITERATIONS = 16


def host_can_look(a: Tensor) -> bool:
    """Whether reading a number back costs nothing (an accelerator would have to synchronize)."""
    return a.device.type == "cpu"


def distance_from_identity(g: Tensor) -> float | None:
    """Upper bound of max ||g - I||_2 over the batch on the CPU; None where looking would synchronize.

    The smaller of the largest row sum and the Frobenius norm, both of which bound the spectral norm.
    NaN stays NaN.
    """
    if not host_can_look(g):
        return None
    if g.numel() == 0:
        return 0.0
    e = g.detach() - identity_like(g)
    rows = e.abs().sum(-1).amax(-1)
    return torch.minimum(rows, torch.linalg.matrix_norm(e)).amax().item()


def iterations_needed(e: float, dtype: torch.dtype) -> int:
    """Newton-Schulz iterations that bring a residual e < 1 below a quarter of the unit roundoff.

    One iteration maps an eigenvalue r of I - z y to 3/4 r^2 + 1/4 r^3, which grows with r.
    """
    goal, k = 0.25 * torch.finfo(dtype).eps, 0
    while e > goal and k < 60:
        e, k = 0.75 * e * e + 0.25 * e * e * e, k + 1
    return k


def inverse_sqrt_increment(g: Tensor, steps: int | None = None) -> Tensor:
    r"""g^(-1/2) - I of symmetric positive definite matrices, by the coupled Newton-Schulz iteration.

    y_0 = g / s, z_0 = I, t_k = (3 I - z_k y_k) / 2, y_{k+1} = y_k t_k, z_{k+1} = t_k z_k, z_k -> (g / s)^(-1/2).

    Args:
        g: (*b, p, p), symmetric positive definite.
        steps: iterations. Default: as many as the distance of g from I asks for (CPU), or 16.

    Returns:
        (*b, p, p). The increment is kept apart from I so that a g near I loses nothing to rounding.

    Cost: 3 (steps - 1) products of p x p; one look at the data on the CPU, none elsewhere.
    Accuracy: a few eps times the condition number of g.
    Reference: Higham, Functions of Matrices (2008), section 6.3 and eq. 6.35.
    """
    eye = identity_like(g)
    e = distance_from_identity(g)
    scale = None
    if e is None or not e < 0.5:
        # Any upper bound of the largest eigenvalue will do; row sums and Frobenius are the two cheap ones.
        scale = torch.minimum(g.abs().sum(-1).amax(-1), torch.linalg.matrix_norm(g)).detach()[..., None, None]
        scale = scale.clamp_min(torch.finfo(g.dtype).tiny)
        g = g / scale
    if steps is None:
        steps = _steps_for(g, e, scale)
    t = -0.5 * (g - eye)
    z = t  # z - I
    y = g
    for _ in range(steps - 1):
        y = y + y @ t
        t = -0.5 * (y - eye + z @ y)
        z = z + t + t @ z
    if scale is None:
        return z
    root = scale.rsqrt()
    return z * root + eye * (root - 1)


def _steps_for(g: Tensor, e: float | None, scale: Tensor | None) -> int:
    if e is None:
        return BLIND_ITERATIONS
    if not e < float("inf"):
        return 1
    if scale is not None:
        # The Gram of x + u has no eigenvalue below 1 when u is tangent.
        e = 1 - 1 / max(1.0, scale.max().item())
    # Differentiated, the iteration must have converged in its derivative too: one more step.
    return max(1, iterations_needed(e, g.dtype)) + int(g.requires_grad)


def cholesky_inverse_increment(g: Tensor) -> Tensor:
    """R^(-1) - I with g = R^T R, R upper triangular with a positive diagonal.

    Args:
        g: (*b, p, p), symmetric positive definite.

    Cost: 2/3 p^3 flops; no host synchronization (`cholesky_ex`). An indefinite g gives non-finite numbers.
    """
    lower, info = torch.linalg.cholesky_ex(g)
    bad = (info != 0)[..., None, None]
    lower = torch.where(bad, torch.full_like(lower, float("nan")), lower)
    eye = identity_like(g)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(g), upper=False)
    return inverse.mT - eye


def norm(a: Tensor) -> Tensor:
    """Frobenius norm as (*b, 1, 1), without a NaN derivative at zero."""
    square = a.square().sum((-2, -1), keepdim=True)
    return torch.where(square > 0, square, torch.ones_like(square)).sqrt() * (square > 0)
