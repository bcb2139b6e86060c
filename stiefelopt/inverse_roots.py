r"""(I + e)^(-1/2) of symmetric e whose spectrum has been bounded: by polynomials, iterations or eigenvalues.

With the eigenvalues of f in [-b, b], b < 1, the Chebyshev expansion of (1 + f)^(-1/2) converges like
((1 + (1 - b^2)^(1/2)) / b)^(-d), and a polynomial of degree d takes about 2 d^(1/2) products of matrices: half of
what the iterations take, as long as its terms do not magnify rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from . import coarse
from .gram import identity_like

# The degree that takes eight products. A higher one is no cheaper than Newton-Schulz, and noise in float64.
HIGHEST = 25
# The degree, of two products, from which on it is worth knowing the spectrum more closely.
NARROW = 4
# The sum of the terms' sizes, 0.9 at most in exact arithmetic, that is let to magnify rounding errors.
STABLE = 4.0
# The width from which on LAPACK's eigendecomposition, 7 to 20 products there, is no dearer than the iterations, 18
# and more, that a spectrum too wide for a polynomial takes.
LAPACK = 512
# Bounds are rounded up to powers of 2^(1/8), so that few polynomials are ever computed.
GRID = 8
# Frobenius error, in units of eps, that products in bfloat16 may bring. Rounding a point with 512 columns or more to
# float32 brings as much: ||x||_F is p^(1/2).
COARSE = 4.0
# (1 + t)^(-1/2) - 1 up to the square.
TAYLOR = (-1 / 2, 3 / 8)


def inverse_sqrt(e: Tensor) -> Tensor:
    """(I + e)^(-1/2) - I of e whose spectrum the host may look at.

    Args:
        e: (*b, p, p), symmetric, not differentiated, and overwritten. Where its eigenvalues may reach beyond 1, none
            must be negative; if one is, above -1, the result is smaller there than it should be.

    Cost: none up to ||e||_F = 3e-4, then one product of p x p up to ||e||_2 = 0.005, two to 0.05; beyond, four where
        the eigenvalues lie within 0.3 of each other's middle, eight within 0.75; for a wider spectrum 3 (steps - 1),
        or an eigendecomposition from 512 columns on (float32). Where so wide, one product as long as the cube of e is
        lost in rounding. Two to five looks at the data.
    Reference: Paterson & Stockmeyer (1973) for the evaluation; Higham, Functions of Matrices (2008), section 4.2.
    """
    eps = torch.finfo(e.dtype).eps
    size = torch.linalg.matrix_norm(e).amax().item()
    if not size < math.inf:
        return torch.full_like(e, math.nan)
    if 3 / 8 * size * size <= 0.25 * eps:
        return e.mul_(-0.5)
    square = coarse.square(e, size, 8 / 3 * COARSE * eps)
    if _cube_is_lost(e, square):
        return _evaluate(TAYLOR, e, square)
    found = coefficients(torch.linalg.matrix_norm(square).amax().item() ** 0.5, eps)
    if found is not None and len(found) <= NARROW:
        return _evaluate(found, e, square)
    centre, bound = _centred(e, square)
    found = coefficients(bound, eps)
    if found is not None:
        increment = _evaluate(found, e, square)
    elif e.shape[-1] >= LAPACK and bound < math.inf:
        increment = _by_eigenvalues(e)
    else:
        increment = newton_schulz(e, iterations_needed(bound, e.dtype))
    # (1 + c)^(-1/2) (I + increment) - I
    root = torch.expm1(-0.5 * torch.log1p(centre))
    increment.mul_(1 + root[..., None, None]).diagonal(dim1=-2, dim2=-1).add_(root[..., None])
    return increment


def _cube_is_lost(e: Tensor, square: Tensor) -> bool:
    """Whether the next term, 5/16 e^3, is less than half of what rounding a point brings, 0.3 eps p^(1/2), Frobenius.

    Asked where e is so wide that the product would cost more than the question.
    """
    p = e.shape[-1]
    if p < coarse.NARROWEST:
        return False
    return 5 / 16 * coarse.seen_norm(lambda v: (v @ square) @ e, e) <= p**0.5 / 8 * torch.finfo(e.dtype).eps


def newton_schulz(e: Tensor, steps: int) -> Tensor:
    """(I + e)^(-1/2) - I, the limit of z_k - I, by the coupled iteration.

    y_0 = I + e, z_0 = I, t_k = (I - z_k y_k) / 2, y_{k+1} = y_k + y_k t_k, z_{k+1} = z_k + t_k z_k.

    Args:
        e: (*b, p, p), symmetric, eigenvalues above -1 and below 1.
        steps: how many iterations; their products cost 3 (steps - 1).
    """
    shape, e = e.shape, e.reshape(-1, *e.shape[-2:])
    eye = identity_like(e)
    t = -0.5 * e
    z = t  # z - I
    y = eye + e
    for _ in range(steps - 1):
        y = torch.baddbmm(y, y, t)
        t = torch.baddbmm(torch.sub(0.5 * eye, y, alpha=0.5), z, y, alpha=-0.5)
        z = torch.baddbmm(z + t, t, z)
    return z.reshape(shape)


def _by_eigenvalues(e: Tensor) -> Tensor:
    """(I + e)^(-1/2) - I of symmetric e with eigenvalues above -1; nearer to it than eps they count as eps away."""
    values, vectors = torch.linalg.eigh(e)
    values.clamp_min_(torch.finfo(e.dtype).eps - 1)
    return (vectors * torch.expm1(-0.5 * torch.log1p(values))[..., None, :]) @ vectors.mT


def iterations_needed(e: float, dtype: torch.dtype) -> int:
    """Newton-Schulz iterations that bring a residual e < 1 below a quarter of the unit roundoff.

    One iteration maps an eigenvalue r of I - z y to 3/4 r^2 + 1/4 r^3, which grows with r.
    """
    goal, k = 0.25 * torch.finfo(dtype).eps, 0
    while e > goal and k < 60:
        e, k = 0.75 * e * e + 0.25 * e * e * e, k + 1
    return k


def _centred(e: Tensor, square: Tensor) -> tuple[Tensor, float]:
    """Overwrite e by f = (e - c I) / (1 + c), and its square, with a good c (*b,); returns c and a bound of ||f||_2."""
    # The entries of a square bound the spectrum better than those of e.
    bound = norm_bound(square).sqrt()
    lowest = torch.where(bound < 1, -bound, torch.zeros_like(bound))
    mean = e.diagonal(dim1=-2, dim2=-1).mean(-1)
    _shift(e, square, mean)
    bound = norm_bound(square).sqrt()
    # Half of that part of [mean - bound, mean + bound] which is known to be empty.
    cut = (lowest - (mean - bound)).clamp_min(0) / 2
    _shift(e, square, cut)
    centre = mean + cut
    scale = (1 + centre)[..., None, None]
    e.div_(scale)
    square.div_(scale.square())
    return centre, ((bound - cut) / (1 + centre)).amax().item()


def norm_bound(a: Tensor) -> Tensor:
    """An upper bound (*b,) of the spectral norm of symmetric a: row sums or Frobenius, whichever is less."""
    return torch.minimum(a.abs().sum(-1).amax(-1), torch.linalg.matrix_norm(a))


def _shift(e: Tensor, square: Tensor, c: Tensor) -> None:
    """e <- e - c I, and its square with it."""
    square.addcmul_(e, c[..., None, None], value=-2).diagonal(dim1=-2, dim2=-1).add_(c.square()[..., None])
    e.diagonal(dim1=-2, dim2=-1).sub_(c[..., None])


def _evaluate(a: Sequence[float], f: Tensor, square: Tensor) -> Tensor:
    """a_1 f + a_2 f^2 + ... by Paterson-Stockmeyer: blocks of about d^(1/2) powers, and Horner's scheme over these.

    Overwrites f, once it is needed no more.
    """
    block = max(2, math.ceil(len(a) ** 0.5))
    powers = [f, square]
    while len(powers) < block:
        powers.append(powers[-1] @ f)
    total: Tensor | None = None
    for start in reversed(range(0, len(a), block)):
        terms = zip(powers, a[start : start + block], strict=False)
        power, factor = next(terms)
        part = power * factor if start else power.mul_(factor)
        for power, factor in terms:
            part.add_(power, alpha=factor)
        if total is not None:
            part.add_(coarse.product(total, powers[-1], COARSE / 2 * torch.finfo(f.dtype).eps))
        total = part
    assert total is not None
    return total


def coefficients(bound: float, eps: float) -> tuple[float, ...] | None:
    """a_1, a_2, ... with (1 + t)^(-1/2) - 1 = a_1 t + a_2 t^2 + ... to eps / 4 for |t| <= bound; None if too many."""
    if not bound < 1:
        return None
    return _coefficients(math.ceil(GRID * math.log2(max(bound, eps))), eps)


@lru_cache(maxsize=512)
def _coefficients(step: int, eps: float) -> tuple[float, ...] | None:
    b = 2.0 ** (step / GRID)
    if not b < 1:
        return None
    # Interpolated at an even number of Chebyshev nodes: none of them is 0.
    angles = (np.arange(2 * HIGHEST + 4) + 0.5) * (np.pi / (2 * HIGHEST + 4))
    nodes = b * np.cos(angles)
    quotients = np.expm1(-0.5 * np.log1p(nodes)) / nodes
    found = np.cos(np.outer(np.arange(HIGHEST + 1), angles)) @ quotients * (2 / len(angles))
    found[0] /= 2
    decay = b / (1 + math.sqrt(1 - b * b))
    for degree in range(1, HIGHEST + 1):
        if b * abs(found[degree]) / (1 - decay) <= 0.25 * eps:
            monomial = chebyshev.cheb2poly(found[:degree])
            stable = b * np.abs(monomial).sum() <= STABLE
            return tuple(float(a) / b**k for k, a in enumerate(monomial)) if stable else None
    return None
