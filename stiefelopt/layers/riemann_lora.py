"""RiemannLoRALinear: a low-rank adapter trained on the manifold of fixed-rank matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import shared_generator, to_shards, write_whole
from ..draws import check_generator
from ..errors import ConfigError
from ..groups import declare
from ..manifolds import FixedRank, Stiefel
from ..shapes import HALF
from ..transforms import under_transform
from .low_rank import LowRankLinear, linear_sizes
from .shared import SharedBase
from .update import LowRankUpdate

INITS = ("random", "loi")


def check_scale(scale: object) -> None:
    """Refuse what is no start S = scale I."""
    if scale is not None and not (isinstance(scale, (int, float)) and 0 < abs(scale) < math.inf):
        raise ConfigError(
            f"scale is {scale!r}; a finite number other than 0 is needed: a point of rank r has no zero S."
        )


class RiemannLoRALinear(LowRankLinear):
    """y = base(x) + (alpha / r) (dropout(x) V) S^T U^T with (U, S, V) a point of `FixedRank`.

    It starts at a small U S V^T = scale U V^T that is taken out again, so that the function starts unchanged.
    ``.grad`` of its factors is G V, U^T G V, G^T U, where G is the gradient by U S V^T: not the derivatives by the
    factors, but what the Riemannian gradient is made of, with no inverse of S. `stiefelopt.param_groups` says so to
    the wrapper. Differentiable once.

    Args:
        base: nn.Linear, transformers' Conv1D, or a module with in_features, out_features and a weight; it is frozen.
        r: rank, 1 to min(in, out).
        alpha: numerator of the update's factor, default r.
        init: "random": U, V Haar uniform. "loi": the same until `stiefelopt.loi_init` fills them.
        correction: how the start is taken out. "fold": subtracted from the base weight, at no cost in time; the old
            weight is kept for an exact undo, which is the memory of a second base weight (float32 or float64 base).
            "keep": frozen factors beside the base weight, which is untouched (half precision, or a base that others
            read); about twice the products of the adapter. "none": left in. Default: "fold" where the base is float32
            or float64, else "keep".
        scale: S = scale I at the start, default 0.01 / sqrt(r).
        dropout: on the adapter's input.
        use_rslora: the update's factor is alpha / sqrt(r).
        reference_dim: accepted for `adapt`, which passes it to every layer; nothing here depends on it.
        generator: for the random start, on its own device.

    Raises:
        ConfigError: a base that is not linear, an option out of range, "fold" on a half-precision base.

    Reference: Bogachev et al., RiemannLoRA (arXiv 2507.12142).
    """

    CORRECTIONS = ("fold", "keep", "none")
    PROJECTED = True

    def __init__(
        self,
        base: nn.Module | SharedBase,
        r: int,
        alpha: float | None = None,
        *,
        init: str = "random",
        correction: str | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        reference_dim: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if init not in INITS:
            raise ConfigError(f"init is {init!r}; use one of {', '.join(map(repr, INITS))}.")
        check_scale(scale)
        check_generator(generator)
        linear_sizes(base)
        if base.weight.dtype in HALF:
            if correction == "fold":
                raise ConfigError(
                    f"correction='fold' rounds away in a {base.weight.dtype} base weight; use 'keep', the default "
                    f"there."
                )
            correction = correction or "keep"
        super().__init__(base, r, alpha, correction=correction, dropout=dropout, use_rslora=use_rslora)
        self.init, self.start = init, 0.01 / math.sqrt(r) if scale is None else float(scale)
        for name in self.FACTORS:
            declare(self, name, manifold=FixedRank().spec(), gradient="projected")
        # What replaces the update while `loi_init` looks for a start.
        self._probe: Callable[[Tensor, Tensor], Tensor] | None = None
        self.reset_parameters(generator)

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        """As in the base class, but for `loi_init`'s probe."""
        return super().add_update(y, x) if self._probe is None else self._probe(y, x)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start again at random U and V; a correction of the base weight is undone first."""
        to_shards(self)
        generator = shared_generator(self.U, generator)
        u, v = (
            f if f.is_meta else Stiefel().random_point(*f.shape, dtype=f.dtype, generator=generator)
            for f in (self.U, self.V)
        )
        self.start_at(u, v)

    @torch.no_grad()
    def start_at(self, u: Tensor, v: Tensor, scale: float | None = None) -> None:
        """Start at scale u v^T, u (out, r) and v (in, r) orthonormal; the function is the base's, but with "none"."""
        self.start = self.start if scale is None else scale
        if self.correction == "fold":
            self._check_base_is_whole("correction='fold'", ", or use correction='keep'")
        self._correct(None, None)
        self.folds = self.correction == "fold"  # a loaded state may have been the other way
        write_whole(self.U, u)
        write_whole(self.V, v)
        write_whole(self.S, self.start * torch.eye(self.r, dtype=self.S.dtype))
        if self.correction != "none":
            u, v = (t.to(self.U.device, self.U.dtype) for t in (u, v))
            self._correct(self.start * u, v)

    def factors_from(self, u: Tensor, s: Tensor, v: Tensor) -> dict[str, Tensor]:
        """As in the base class; where rank is missing, S gets the start's size and the correction takes it out.

        Beside a shared base it is never left out, zero or not: PEFT loads only the tensors that a fresh adapter has.
        """
        present = s > 1e-6 * s.max()
        raised = torch.where(present, s, torch.full_like(s, abs(self.start)))
        state = super().factors_from(u, raised, v)
        if self.correction != "none" and (isinstance(self.base, SharedBase) or not bool(present.all())):
            state.update(U0=u * (raised - s), V0=v)
        return state

    def check_factors(self, state: Any, layer: str = "the layer") -> None:
        """As in the base class; a correction that this layer would leave out is refused."""
        super().check_factors(state, layer)
        if "U0" in state and self.correction == "none":
            raise ConfigError(
                f"{layer} was saved with a correction, and has correction='none' here; use 'fold' or 'keep'."
            )

    def _plus_update(self, y: Tensor, h: Tensor) -> Tensor:
        transformed = under_transform()
        if transformed and torch.is_grad_enabled() and any(t.requires_grad for t in (self.U, self.S, self.V)):
            raise ConfigError(
                "RiemannLoRALinear's gradients G V, U^T G V, G^T U are no derivatives, and torch.func knows no others: "
                "call it under torch.no_grad(), freeze U, S and V, or use StelLALinear."
            )
        # What is traced is not trained, and a function of Python can be neither saved nor transformed.
        if transformed or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return super()._plus_update(y, h)
        dtype = h.dtype
        # Autocast leaves float64 alone.
        if torch.is_autocast_enabled(h.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(h.device.type)
        factors = (self.U, self.S, self.V, *self._correction_beside())
        u, s, v, u0, v0 = (t if t is None else t.to(dtype) for t in factors)
        return LowRankUpdate.apply(y, h.to(dtype), u, s, v, self.scale, self.PROJECTED, u0, v0)

    def may_fuse(self, x: Tensor) -> bool:
        """As in the base class, but for `loi_init`'s probe."""
        return self._probe is None and super().may_fuse(x)

    def extra_repr(self) -> str:
        """Rank, scale and correction, for print(model)."""
        return f"{super().extra_repr()}, correction={self.correction!r}"
