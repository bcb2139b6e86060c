"""StelLALinear: a low-rank adapter with its two bases on Stiefel manifolds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..distributed import shared_generator, write_whole
from ..draws import check_generator
from ..errors import ConfigError
from ..groups import declare
from ..manifolds import Stiefel
from .low_rank import LowRankLinear
from .shared import SharedBase

INITS = ("random", "zero", "pseudo-zero", "svd-major", "svd-minor")


class StelLALinear(LowRankLinear):
    """y = base(x) + (alpha / r) (dropout(x) V) S^T U^T with U and V orthonormal.

    `stiefelopt.param_groups` gives U and V their manifold (canonical metric, polar retraction), StelLA's
    displacement scale sqrt(reference_dim / n) and no weight decay, and S a group of its own.

    Args:
        base: nn.Linear, transformers' Conv1D, or a module with in_features, out_features and a weight; it is frozen.
        r: rank, 1 to min(in, out).
        alpha: numerator of the scale, default r.
        init: "random": U, V Haar uniform, S = I, base untouched (the paper's). "zero": the same with S = 0.
            "pseudo-zero": the same with S = I and (alpha / r) U V^T taken out of the base weight, so that the function
            starts unchanged. "svd-major", "svd-minor": U, V the r leading or trailing singular vectors of the
            base weight, S = I, base untouched.
        correction: how "pseudo-zero" takes it out: "fold" (default), subtracted from the base weight, or "keep", frozen
            factors beside it, at about twice the products of the adapter.
        diagonal: S is a vector (r,) instead of a matrix.
        dropout: on the adapter's input.
        use_rslora: scale alpha / sqrt(r).
        reference_dim: the d of the displacement scale, default in_features; `adapt` sets the model's.
        generator: for the random initializations, on its own device.

    Raises:
        ConfigError: a base that is not linear, an option out of range, or singular vectors of a weight with NaN.

    Reference: Li et al., StelLA (arXiv 2510.01938, NeurIPS 2025).
    """

    def __init__(
        self,
        base: nn.Module | SharedBase,
        r: int,
        alpha: float | None = None,
        *,
        init: str = "random",
        correction: str | None = None,
        diagonal: bool = False,
        dropout: float = 0.0,
        use_rslora: bool = False,
        reference_dim: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if init not in INITS:
            raise ConfigError(f"init is {init!r}; use one of {', '.join(map(repr, INITS))}.")
        _check_reference_dim(reference_dim)
        check_generator(generator)
        options: dict[str, Any] = {"diagonal": diagonal, "dropout": dropout, "use_rslora": use_rslora}
        super().__init__(base, r, alpha, correction=correction, **options)
        self.init = init
        self.set_reference_dim(reference_dim)
        declare(self, "S", role="scale")
        self.reset_parameters(generator)

    def set_reference_dim(self, reference_dim: int | None) -> None:
        """Set the d of the displacement scale, None for in_features, and declare U and V with it.

        Raises:
            ConfigError: no positive integer.
        """
        _check_reference_dim(reference_dim)
        self.reference_dim = self.in_features if reference_dim is None else reference_dim
        keys = {
            "manifold": Stiefel().spec(),
            "orientation": "columns",
            "displacement_scale": "stella",
            "reference_dim": self.reference_dim,
        }
        declare(self, "U", **keys)
        declare(self, "V", **keys)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialize the factors again; a correction of the base weight is undone first."""
        if self.init in ("pseudo-zero", "svd-major", "svd-minor"):
            self._check_base_is_whole(f"init={self.init!r}")
        self._correct(None, None)
        self.folds = self.correction == "fold"  # a loaded state may have been the other way
        if self.init.startswith("svd") and not self.U.is_meta:
            self._set_singular_vectors(leading=self.init == "svd-major")
        else:
            self._set_random_bases(generator)
        one = torch.ones(self.r) if self.diagonal else torch.eye(self.r)
        write_whole(self.S, torch.zeros_like(one) if self.init == "zero" else one)
        if self.init == "pseudo-zero":
            self._correct(self.U, self.V)

    def _set_random_bases(self, generator: torch.Generator | None) -> None:
        if self.U.is_meta:
            return
        generator = shared_generator(self.U, generator)
        for factor in (self.U, self.V):
            write_whole(
                factor, Stiefel().random_point(*factor.shape, dtype=factor.dtype, generator=generator)
            )

    def _set_singular_vectors(self, *, leading: bool) -> None:
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        if not bool(torch.isfinite(weight).all()):
            raise ConfigError(
                f"init={self.init!r} needs singular vectors, and the base weight holds NaN or infinite values; load "
                f"the model's weights first, or use another init."
            )
        # float64: trailing singular vectors of a float32 weight are orthonormal to 1e-5 only.
        u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        part = slice(None, self.r) if leading else slice(-self.r, None)
        self.U.copy_(u[:, part])
        self.V.copy_(vh[part].T)


def _check_reference_dim(reference_dim: object) -> None:
    if reference_dim is not None and not (isinstance(reference_dim, int) and reference_dim > 0):
        raise ConfigError(
            f"reference_dim is {reference_dim!r}; a positive integer is needed: the model's hidden size."
        )
