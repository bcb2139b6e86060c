"""Functions of p x p matrices, batched: inverse square root, Cholesky inverse, balanced exponential.

No LAPACK eigensolver on the default step: polynomials and Newton-Schulz iterations are matrix products, run at GEMM
speed on every device, and the latter stay differentiable at repeated eigenvalues, where the derivative of an
eigendecomposition is not. By eigenvalues go what may be singular, roots of the Grams of tangent vectors (fixed rank,
spectral directions), and wide matrices after very long steps, see `inverse_roots`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .gram import identity_like
from .inverse_roots import inverse_sqrt, iterations_needed, newton_schulz, norm_bound
from .transforms import host_can_look, is_differentiated

# Iterations of the scaled coupled iteration that turn any condition number up to about 1e4 into full float32
# accuracy; used where the host must not look at the data.
BLIND_ITERATIONS = 16

Eigen = tuple[Tensor, Tensor]  # eigenvalues, ascending, and eigenvectors


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
    return norm_bound(a @ a).sqrt()


def inverse_sqrt_increment(g: Tensor, steps: int | None = None, *, overwrite: bool = False) -> Tensor:
    r"""g^(-1/2) - I of symmetric positive definite matrices, by matrix products alone.

    A polynomial where the host may look at the spectrum; else, and where derivatives are asked for, the coupled
    Newton-Schulz iteration of g / s, s above the largest eigenvalue.

    Args:
        g: (*b, p, p), symmetric positive definite, with ||g - I||_F < 1 or no eigenvalue below 1, as the Gram of
            x + u has for a tangent u.
        steps: exactly so many scaled iterations. Default: as many as the distance of g from I asks for on the
            CPU, 16 elsewhere.
        overwrite: whether g may be, where it is not differentiated.

    Returns:
        (*b, p, p). The increment is kept apart from I so that a g near I loses nothing to rounding.

    Cost: see `inverse_roots.inverse_sqrt`; 3 (steps - 1) products of p x p by iterations.
    Accuracy: a few eps times the condition number of g.
    Reference: Higham, Functions of Matrices (2008), section 6.3 and eq. 6.35.
    """
    # As many iterations for every g: a length that g decides is compiled anew.
    if torch.compiler.is_compiling():
        return _scaled_newton_schulz(g, BLIND_ITERATIONS if steps is None else steps)
    # Differentiated, the value must have converged in its derivatives too, which a polynomial's has not.
    if steps is None and host_can_look(g) and g.numel() and not is_differentiated(g):
        e = g if overwrite else g.clone()
        e.diagonal(dim1=-2, dim2=-1).sub_(1)
        return inverse_sqrt(e)
    return _scaled_newton_schulz(g, steps)


def _scaled_newton_schulz(g: Tensor, steps: int | None) -> Tensor:
    eye = identity_like(g)
    scale, steps = _scale_and_steps(g, steps)
    if scale is None:
        return newton_schulz(g - eye, steps)
    root = scale.rsqrt()
    return newton_schulz(g / scale - eye, steps) * root + eye * (root - 1)


def _scale_and_steps(g: Tensor, steps: int | None) -> tuple[Tensor | None, int]:
    """What g is divided by (None: nothing) for Newton-Schulz to converge, and in how many iterations it does."""
    e = distance_from_identity(g)
    if e is not None and 0.5 <= e < math.inf:
        e = min(e, spectral_bound(g.detach() - identity_like(g)).amax().item())
    if e is not None and e < 0.5:
        return None, _iterations(e, g) if steps is None else steps
    scale = norm_bound(g.detach())[..., None, None].clamp_min(torch.finfo(g.dtype).tiny)
    if e is not None and e < math.inf:
        scale = scale.clamp_max(1 + e)
    if steps is None:
        steps = BLIND_ITERATIONS if e is None else 1
        if e is not None and e < float("inf"):
            # The smallest eigenvalue is at least 1 - e, and for the Gram of x + u with u tangent at least 1: enough
            # for e >= 1, since normalize() looks at what came out and passes again where it was less.
            smallest = 1 - e if e < 1 else 1.0
            steps = _iterations(1 - smallest / max(1.0, scale.max().item()), g)
    return scale, steps


def _iterations(e: float, g: Tensor) -> int:
    """With one for the derivatives, which are why the host iterates at all."""
    return max(1, iterations_needed(e, g.dtype)) + 1


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

    Squaring the condition number costs nothing near I: the caller computes in float64, and no singular value is below
    1. An LU would do with a third of the work, but oneMKL's batched one fails and then hangs on two threads from
    p = 256 on (torch 2.13: "Parameter 6 was incorrect on entry to DLASWP").

    Args:
        a: (*b, p, p).
    """
    return torch.cholesky_solve(a.mT, torch.linalg.cholesky_ex(a.mT @ a).L)


def qr_inverse(a: Tensor) -> Tensor:
    """a^(-1) to eps times its condition number, where `accretive_inverse` has its square; twice the price.

    Args:
        a: (*b, p, p), not singular.
    """
    q, r = torch.linalg.qr(a)
    return torch.linalg.solve_triangular(r, q.mT, upper=True)


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
    return safe_root(a.square().sum((-2, -1), keepdim=True))


def safe_root(square: Tensor) -> Tensor:
    """square^(1/2), zero where it is not positive, without a NaN derivative there; NaN stays NaN."""
    nothing = square <= 0
    return square.masked_fill(nothing, 1).sqrt().masked_fill(nothing, 0)
