"""Functions of p x p matrices, batched: inverse square root, Cholesky inverse, balanced exponential.

No LAPACK eigensolver on the default step: Newton-Schulz iterations are matrix products, run at GEMM speed on every
device, and stay differentiable at repeated eigenvalues, where the derivative of an eigendecomposition is not. Only
what may be singular goes by its eigenvalues: roots of the Grams of tangent vectors (fixed rank, spectral directions).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .gram import identity_like

# Iterations of the scaled coupled iteration that turn any condition number up to about 1e4 into full float32
# accuracy; used where the host must not look at the data.
BLIND_ITERATIONS = 16

Eigen = tuple[Tensor, Tensor]  # eigenvalues, ascending, and eigenvectors


def host_can_look(a: Tensor) -> bool:
    """Whether reading a number back costs nothing (an accelerator would have to synchronize)."""
    return a.device.type == "cpu"


def distance_from_identity(g: Tensor) -> float | None:
    """max ||g - I||_F over the batch, a bound of the spectral norm, on the CPU; None where looking would synchronize.

    NaN stays NaN.
    """
    if not host_can_look(g):
        return None
    if g.numel() == 0:
        return 0.0
    return torch.linalg.matrix_norm(g.detach() - identity_like(g)).amax().item()


def rough_distance_from_identity(g: Tensor) -> float | None:
    """`distance_from_identity` without a copy of g, from ||g||^2 - 2 tr g + p: right to about (eps p)^(1/2)."""
    if not host_can_look(g):
        return None
    if g.numel() == 0:
        return 0.0
    g = g.detach()
    trace = g.diagonal(dim1=-2, dim2=-1).sum(-1).double()
    square = torch.linalg.matrix_norm(g).double().square() - 2 * trace + g.shape[-1]
    return math.sqrt(max(square.amax().item(), 0.0)) if bool(torch.isfinite(square).all()) else math.inf


def spectral_bound(a: Tensor) -> Tensor:
    """An upper bound (*b,) of the spectral norm of symmetric a, from a^2; the Frobenius norm may be p^(1/2) off.

    Cost: one product of p x p.
    """
    square = a @ a
    return torch.minimum(square.abs().sum(-1).amax(-1), torch.linalg.matrix_norm(square)).sqrt()


def iterations_needed(e: float, dtype: torch.dtype) -> int:
    """Newton-Schulz iterations that bring a residual e < 1 below a quarter of the unit roundoff.

    One iteration maps an eigenvalue r of I - z y to 3/4 r^2 + 1/4 r^3, which grows with r.
    """
    goal, k = 0.25 * torch.finfo(dtype).eps, 0
    while e > goal and k < 60:
        e, k = 0.75 * e * e + 0.25 * e * e * e, k + 1
    return k


def inverse_sqrt_increment(g: Tensor, steps: int | None = None) -> Tensor:
    r"""g^(-1/2) - I of symmetric positive definite matrices, by matrix products alone.

    Near I the binomial series in e = g - I, cut where the next term is below rounding; elsewhere, and wherever the
    host must not look, the coupled Newton-Schulz iteration, y_0 = g / s, z_0 = I,
    t_k = (3 I - z_k y_k) / 2, y_{k+1} = y_k t_k, z_{k+1} = t_k z_k, z_k -> (g / s)^(-1/2).

    Args:
        g: (*b, p, p), symmetric positive definite, with ||g - I||_F < 1 or no eigenvalue below 1, as the Gram of
            x + u has for a tangent u.
        steps: exactly so many scaled iterations. Default: as many as the distance of g from I asks for on the
            CPU, 16 elsewhere.

    Returns:
        (*b, p, p). The increment is kept apart from I so that a g near I loses nothing to rounding.

    Cost: none, one or two products of p x p near I, 3 (steps - 1) beyond; one or two looks at the data on the
        CPU, none elsewhere.
    Accuracy: a few eps times the condition number of g.
    Reference: Higham, Functions of Matrices (2008), section 6.3 and eq. 6.35.
    """
    # Differentiated, the value must have converged in its derivatives too, which a cut series has not.
    if steps is None and host_can_look(g) and g.numel() and not g.requires_grad:
        series = _inverse_sqrt_series(g - identity_like(g))
        if series is not None:
            return series
    return _newton_schulz(g, steps)


def _inverse_sqrt_series(e: Tensor) -> Tensor | None:
    """(I + e)^(-1/2) - I = -1/2 e + 3/8 e^2 - 5/16 e^3 + 35/128 e^4 - ..., or None where e is too large for it."""
    goal = 0.25 * torch.finfo(e.dtype).eps
    size = torch.linalg.matrix_norm(e).amax().item()
    if not size < 1:
        return None
    if 3 / 8 * size**2 <= goal:
        return -0.5 * e
    square = e @ e
    # e is symmetric, so ||e||_2^2 = ||e^2||_2: a bound nearer to the spectral norm.
    size = min(size, math.sqrt(torch.linalg.matrix_norm(square).amax().item()))
    if 5 / 16 * size**3 <= goal:
        return square.mul_(3 / 8).add_(e, alpha=-0.5)
    if 63 / 256 * size**5 <= goal:
        tail = torch.add(e.mul(-5 / 16), square, alpha=35 / 128)
        tail.diagonal(dim1=-2, dim2=-1).add_(3 / 8)
        return (square @ tail).add_(e, alpha=-0.5)
    return None


def _newton_schulz(g: Tensor, steps: int | None) -> Tensor:
    eye = identity_like(g)
    scale, steps = _scale_and_steps(g, eye, steps)
    if scale is not None:
        g = g / scale
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


def _scale_and_steps(g: Tensor, eye: Tensor, steps: int | None) -> tuple[Tensor | None, int]:
    """What g is divided by (None: nothing) for Newton-Schulz to converge, and in how many iterations it does."""
    e = distance_from_identity(g)
    if e is not None and e < 0.5:
        return None, _iterations(e, g) if steps is None else steps
    if e is not None and e < float("inf") and steps is None and not g.requires_grad:
        found = _centered(g - eye)
        if found is not None:
            return found[0], _iterations(found[1], g)
    # Any upper bound of the largest eigenvalue will do; row sums and Frobenius are the two cheap ones.
    scale = torch.minimum(g.abs().sum(-1).amax(-1), torch.linalg.matrix_norm(g)).detach()[..., None, None]
    scale = scale.clamp_min(torch.finfo(g.dtype).tiny)
    if steps is None:
        steps = BLIND_ITERATIONS if e is None else 1
        if e is not None and e < float("inf"):
            # The smallest eigenvalue is at least 1 - e, and for the Gram of x + u with u tangent at least 1: enough
            # for e >= 1, since normalize() looks at what came out and passes again where it was less.
            smallest = 1 - e if e < 1 else 1.0
            steps = _iterations(1 - smallest / max(1.0, scale.max().item()), g)
    return scale, steps


def _iterations(e: float, g: Tensor) -> int:
    return max(1, iterations_needed(e, g.dtype)) + int(g.requires_grad)


def _centered(off: Tensor) -> tuple[Tensor, float] | None:
    """The scale that puts the eigenvalues of I + off around 1, and the distance that is left; None if they overflow.

    With b^2 a bound of off^2 they lie between 1 and 1 + b if b >= 1 (see the caller), else within b of 1. The product
    off^2 bounds the spectrum of a large matrix much more tightly than its entries do, and saves three for every
    iteration that is not needed.
    """
    bound = spectral_bound(off)
    if not bool(torch.isfinite(bound).all()):
        return None
    scale = torch.where(bound < 1, torch.ones_like(bound), 1 + bound / 2)
    left = torch.where(bound < 1, bound, bound / (2 + bound))
    return scale[..., None, None], left.amax().item()


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


def accretive_inverse(a: Tensor) -> Tensor:
    """a^(-1) for a + a^T >= 2 I, as (a^T a)^(-1) a^T with a Cholesky factor.

    Squaring the condition number costs nothing here: the caller computes in float64, and no singular value is below
    1. An LU would do with a third of the work, but oneMKL's batched one fails and then hangs on two threads from
    p = 256 on (torch 2.13: "Parameter 6 was incorrect on entry to DLASWP").

    Args:
        a: (*b, p, p).
    """
    return torch.cholesky_solve(a.mT, torch.linalg.cholesky_ex(a.mT @ a).L)


def symmetric_root(eigen: Eigen) -> Tensor:
    """h^(1/2) of symmetric positive semidefinite matrices (*b, p, p); not differentiable at equal eigenvalues.

    Negative eigenvalues, which rounding gives to a Gram of dependent columns, count as zero.

    Args:
        eigen: torch.linalg.eigh(h).
    """
    values, vectors = eigen
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT


def inverse_symmetric_root(eigen: Eigen, eps: float) -> Tensor:
    """The pseudo-inverse of h^(1/2): directions whose eigenvalue is below rounding stay zero.

    Args:
        eigen: torch.linalg.eigh(h), h (*b, p, p) a Gram, symmetric positive semidefinite.
        eps: of the precision that the Gram was computed in; an eigenvalue counts from that part of the largest on.
    """
    values, vectors = eigen
    kept = values > eps * values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
    inverse = torch.where(kept, values, torch.ones_like(values)).rsqrt() * kept
    return (vectors * inverse[..., None, :]) @ vectors.mT


def expm(a: Tensor) -> Tensor:
    """Matrix exponential of a batch (B, m, m).

    torch's, which for a single float64 matrix of 1-norm between 3e-4 and 5e-2 is off by up to 2e-10 (torch 2.13, a
    wrong coefficient on that path alone, pytorch#196592): a batch of one is computed as two.
    """
    return torch.linalg.matrix_exp(torch.cat((a, a)))[:1] if a.shape[0] == 1 else torch.linalg.matrix_exp(a)


def norm(a: Tensor) -> Tensor:
    """Frobenius norm as (*b, 1, 1), without a NaN derivative at zero."""
    square = a.square().sum((-2, -1), keepdim=True)
    return torch.where(square > 0, square, torch.ones_like(square)).sqrt() * (square > 0)
