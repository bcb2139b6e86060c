"""StelLA's published step, written here as the reference that ours is measured against.

Algorithm 1 of StelLA (arXiv 2510.01938) as its authors run it: two hooks around an ordinary optimizer. Per
parameter Y (n x p, orthonormal columns) the pre-hook replaces the gradient by the canonical Riemannian one,

    grad Y = g - Y g^T Y,

the inner optimizer steps to Y~, the post-hook projects the scaled displacement and takes the polar factor,

    D = sqrt(d / n) (Y~ - Y),   Delta = D - Y sym(Y^T D),   Y+ = U V^T with U S V^T = Y + Delta,

through a thin SVD batched over parameters of the same shape. All but the SVD is a loop over parameters.
It is a yardstick: simple, eager, no drift correction, not meant for use.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


def canonical_gradient(y: Tensor, g: Tensor) -> Tensor:
    """The Riemannian gradient g - y g^T y of the canonical metric."""
    return g - y @ (g.mH @ y)


def project_tangent(y: Tensor, d: Tensor) -> Tensor:
    """The orthogonal projection d - y sym(y^T d) to the tangent space at y."""
    w = y.mH @ d
    return d - y @ ((w + w.mH) / 2)


def batched_polar(z: Tensor) -> Tensor:
    """U V^T of the thin SVD of each matrix of a stack.

    LAPACK's float32 divide and conquer now and then gives up on a matrix whose singular values are all
    nearly 1 (seen at 512 x 512), which is every matrix here: such a stack is done again in float64. On CUDA
    the driver is the authors' choice, gesvda.
    """
    driver = "gesvda" if z.is_cuda else None
    try:
        u, _, vh = torch.linalg.svd(z, full_matrices=False, driver=driver)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        u, _, vh = torch.linalg.svd(z.double(), full_matrices=False)
    return (u @ vh).to(z.dtype)


def polar_factors(tall: Sequence[Tensor], *, batched: bool = True) -> list[Tensor]:
    """The nearest point to each matrix, one thin SVD for each distinct shape, or for each matrix."""
    if not batched:
        return [batched_polar(z) for z in tall]
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, z in enumerate(tall):
        by_shape[z.shape].append(index)
    factors: list[Tensor] = list(tall)
    for indices in by_shape.values():
        for i, factor in zip(indices, batched_polar(torch.stack([tall[i] for i in indices])), strict=True):
            factors[i] = factor
    return factors


class StellaHooks:
    """The two hooks, installed on `optimizer` for the parameters in `points`.

    Args:
        optimizer: any torch optimizer; it sees the Riemannian gradient and steps in the ambient space.
        points: the parameters (n, p) with orthonormal columns.
        reference_dim: d in the displacement scale sqrt(d / n); None means no scaling.
        batched: one SVD for all parameters of a shape, what the paper found 15 to 25 times faster than one by one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        points: Sequence[Tensor],
        reference_dim: int | None = None,
        *,
        batched: bool = True,
    ) -> None:
        self.points, self.batched = list(points), batched
        self.scales = [
            1.0 if reference_dim is None else math.sqrt(reference_dim / y.shape[-2]) for y in points
        ]
        self.before: list[Tensor] = []
        self.handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self.convert_gradients),
            optimizer.register_step_post_hook(self.return_to_manifold),
        ]

    @torch.no_grad()
    def convert_gradients(self, *_: object) -> None:
        """Before the step: remember the points, replace their gradients."""
        self.before = [y.detach().clone() for y in self.points]
        for y in self.points:
            if y.grad is not None:
                y.grad = canonical_gradient(y, y.grad)

    @torch.no_grad()
    def return_to_manifold(self, *_: object) -> None:
        """After the step: scale and project the displacement, then the polar factor."""
        ambient = [
            y + project_tangent(y, scale * (moved - y))
            for y, moved, scale in zip(self.before, self.points, self.scales, strict=True)
        ]
        for point, factor in zip(self.points, polar_factors(ambient, batched=self.batched), strict=True):
            point.copy_(factor)
        self.before = []
