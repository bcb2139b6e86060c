r"""The truncated SVD of the 2r x 2r cores of tangent steps at fixed rank, batched.

W + xi = [U, Qu] core [V, Qv]^T with core = [[c, hv^(1/2)], [hu^(1/2), 0]], where Up = Qu hu^(1/2), Vp = Qv hv^(1/2).
The dominant left and right singular subspaces of the core are spanned by [I; hu^(1/2) p] and [I; hv^(1/2) q] with

    p = (c + hv q)^(-1),   q = (c^T + hu p)^(-1),

so that those of W + xi are spanned by U + Up p and V + Vp q: neither roots nor singular vectors are needed. Repeating
the two equations from c is subspace iteration with the core; where a step is short beside the singular values of c it
converges in a few products of r x r, a fraction of LAPACK's price.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gram import identity_like
from .matfun import Eigen, inverse_sqrt_increment, symmetric_root
from .transforms import host_can_look

# Sweeps after which what has not converged goes to LAPACK, at the price of about five.
SWEEPS = 16
# Relative change of p and of q in the last sweep, of which they err by a fraction: at least this, or this share of the
# eps asked for.
CONVERGED, SHARE = 1e-12, 2**-6
# From here on oneMKL's batched LU fails with more than one thread; large cores are LAPACK's.
LARGEST = 128


class Coefficients(NamedTuple):
    """U+ = U au + Up bu, S+ = s, V+ = V av + Vp bv; all (B, r, r)."""

    au: Tensor
    bu: Tensor
    s: Tensor
    av: Tensor
    bv: Tensor


def truncated(c: Tensor, hu: Tensor, hv: Tensor, *, eps: float = 0.0) -> Coefficients:
    """The r dominant singular triples of the cores, U+ and V+ orthonormal, up to a gauge.

    Args:
        c: (B, r, r); float64.
        hu: (B, r, r), the Gram of Up; hv that of Vp.
        eps: relative accuracy needed of the subspaces, as that of float32 points. The singular values, Rayleigh
            quotients, are right to its square; U+ and V+ are orthonormal whatever it is.

    Cost: six products of r x r a sweep, 4 to 16 sweeps; LAPACK's SVD of 2r x 2r for what they do not settle, and for
        everything on an accelerator, where the host must not look.
    """
    if not host_can_look(c) or not 0 < c.shape[-1] < LARGEST:
        return by_lapack(c, hu, hv)
    found, done = _by_products(c, hu, hv, max(CONVERGED, SHARE * eps))
    if bool(done.all()):
        return found
    hard = ~done
    for t, exact in zip(found, by_lapack(c[hard], hu[hard], hv[hard]), strict=True):
        t[hard] = exact
    return found


def by_lapack(c: Tensor, hu: Tensor, hv: Tensor) -> Coefficients:
    """With core = K D L^T in r-blocks, U+ = U K1 + Up L1 D^-1, S+ = D, V+ = V L1 + Vp K1 D^-1: no inverse of the roots.

    Reference: Vandereycken (2013), algorithm 6; Absil & Oseledets (2015), section 3.
    """
    r = c.shape[-1]
    k, d, lh = core_svd(c, torch.linalg.eigh(torch.cat((hu, hv))))
    k1, l1, d = k[..., :r, :r], lh[..., :r, :r].mT, d[..., :r]
    # A singular value at rounding level has no direction to divide by; the rank is judged by the caller.
    kept = d > torch.finfo(d.dtype).eps * d[..., :1]
    inverse = (torch.where(kept, d, torch.ones_like(d)).reciprocal() * kept)[..., None, :]
    return Coefficients(k1, l1 * inverse, torch.diag_embed(d), l1, k1 * inverse)


def core_svd(c: Tensor, eigen: Eigen) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of the cores, (B, 2r, 2r), from the eigenvalues and eigenvectors of (hu, hv) one after the other."""
    ru, rv = symmetric_root(eigen).chunk(2)
    return torch.linalg.svd(torch.cat((torch.cat((c, rv), -1), torch.cat((ru, torch.zeros_like(c)), -1)), -2))


def _by_products(c: Tensor, hu: Tensor, hv: Tensor, goal: float) -> tuple[Coefficients, Tensor]:
    """The triples by subspace iteration, U^T U+ and V^T V+ symmetric and positive; and which are proven, (B,)."""
    p, q, change = _subspaces(c, hu, hv, goal)
    gu, gv = p.mT @ hu @ p, q.mT @ hv @ q
    done = (change <= goal) & _is_dominant(p, hu, hv, gv)
    if not bool(done.all()):
        # What is not done may hold anything, and the root below takes the whole batch.
        p, gu, q, gv = (torch.where(done[:, None, None], t, torch.zeros_like(t)) for t in (p, gu, q, gv))
    eye = identity_like(c)
    tu, tv = (inverse_sqrt_increment(torch.cat((gu, gv)) + eye) + eye).chunk(2)
    s = tu @ (c + p.mT @ hu + hv @ q) @ tv
    return Coefficients(tu, p @ tu, s, tv, q @ tv), done


def _subspaces(c: Tensor, hu: Tensor, hv: Tensor, goal: float) -> tuple[Tensor, Tensor, Tensor]:
    """p, q and the larger relative change (B,) of the two in the last sweep; both inverses by one Newton step a sweep.

    Neither vouches for the other: where Vp vanishes p is c^(-1) from the start, while q is still on its way from there,
    or away.
    """
    p = torch.linalg.inv_ex(c)[0]
    ct, q, change = c.mT.contiguous(), p.mT, torch.zeros_like(c[:, 0, 0])
    for sweep in range(SWEEPS):
        before = p, q
        p = torch.baddbmm(p, p @ torch.baddbmm(c, hv, q), p, beta=2, alpha=-1)
        q = torch.baddbmm(q, q @ torch.baddbmm(ct, hu, p), q, beta=2, alpha=-1)
        if sweep % 2:  # a look costs a third of a sweep
            change = torch.maximum(_relative_change(before[0], p), _relative_change(before[1], q))
            if bool((change <= goal).all()):
                break
    return p, q, change


def _relative_change(old: Tensor, new: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(new - old) / torch.linalg.matrix_norm(new)


def _is_dominant(p: Tensor, hu: Tensor, hv: Tensor, gv: Tensor) -> Tensor:
    """Whether every singular value kept is above every one left: a bound, (B,).

    With t = p^(-1) and y = hv^(1/2) q the kept ones are at least 1 / (||p|| (1 + ||y||^2)^(1/2)), the others at most
    ||hu^(1/2) p hv^(1/2)|| (1 + ||y||^2)^(1/2).
    """
    size_u, size_v, size, tilt = (torch.linalg.matrix_norm(t) for t in (hu, hv, p, gv))
    clear = (size_u * size_v).sqrt() * size.square() * (1 + tilt) < 1
    if bool(clear.all()):
        return clear
    rest, inverse, tilt = _largest_eigenvalues(torch.cat((hu @ p @ hv @ p.mT, p @ p.mT, gv))).chunk(3)
    return (rest * inverse).sqrt() * (1 + tilt) < 1


def _largest_eigenvalues(a: Tensor) -> Tensor:
    """Upper bound (tr a^8)^(1/8) of matrices whose eigenvalues are real and not negative: at most r^(1/8) too large."""
    size = torch.linalg.matrix_norm(a)
    b = a / torch.where(size > 0, size, torch.ones_like(size))[:, None, None]
    b = b @ b
    b = b @ b
    return size * (b * b.mT).sum((-2, -1)).clamp_min(0) ** 0.125
