"""The layer y = base(x) + scale (x V) S^T U^T, on which StelLALinear and RiemannLoRALinear stand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from operator import index
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import is_lazy

from ..distributed import is_distributed, to_shards, whole, write_whole
from ..errors import ConfigError
from ..full_precision import full_precision
from ..manifolds import Stiefel
from ..shapes import HALF, tolerance
from ..transforms import under_transform
from .nested import over_rows
from .shared import SharedBase
from .update import LowRankUpdate, factors_of_update, plus_product

# Where quantized linear modules without a plain weight keep it: GPTQ and AWQ, HQQ, torch's own, AQLM.
_PACKED = ("qweight", "W_q", "_packed_params", "codes")


def linear_sizes(base: nn.Module | SharedBase) -> tuple[int, int, bool]:
    """(in_features, out_features, whether the weight lies (in, out)) of a linear module.

    nn.Linear, transformers' Conv1D, and anything with in_features, out_features and such a weight.

    Raises:
        ConfigError: not linear, or a weight that an update cannot be added to: quantized, offloaded, or computed at
            every use.
    """
    if isinstance(base, SharedBase):
        return linear_sizes(base.module)
    if isinstance(base, LowRankLinear):
        raise ConfigError(
            f"the base is a {type(base).__name__}, adapted already; use its own base, or merge_adapters first."
        )
    sizes = _sizes(base)
    if sizes is None and _is_packed(base):
        raise _quantized(base, "whose weight is packed, or parted among ranks")
    if sizes is None:
        raise ConfigError(
            f"the base is a {type(base).__name__}; a linear module is needed: nn.Linear, transformers' Conv1D, or one "
            f"with in_features, out_features and a weight (out_features, in_features)."
        )
    _check_weight(base)
    return sizes


def is_linear(module: nn.Module) -> bool:
    """Whether a module is linear by its sizes; `linear_sizes` says whether it can be adapted."""
    return _sizes(module) is not None or _is_packed(module)


def _sizes(base: nn.Module) -> tuple[int, int, bool] | None:
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    if type(base).__name__ == "Conv1D" and hasattr(base, "nf"):
        return weight.shape[0], weight.shape[1], True
    sizes = getattr(base, "in_features", None), getattr(base, "out_features", None)
    return (weight.shape[1], weight.shape[0], False) if sizes == (weight.shape[1], weight.shape[0]) else None


def _is_packed(base: nn.Module) -> bool:
    """Whether it is linear with a weight of another form: quantized by bitsandbytes to 4 bits, GPTQ, AWQ, HQQ, ..."""
    sizes = getattr(base, "in_features", None), getattr(base, "out_features", None)
    weight: Any = getattr(base, "weight", None)
    if not all(isinstance(size, int) for size in sizes) or is_lazy(weight):
        return False
    whole_numbers = isinstance(weight, Tensor) and not (weight.is_floating_point() or weight.is_complex())
    return isinstance(base, nn.Linear) or whole_numbers or any(hasattr(base, name) for name in _PACKED)


def _quantized(base: nn.Module, what: str) -> ConfigError:
    return ConfigError(
        f"the base is a {type(base).__name__} {what}; a linear module is needed whose weight (out_features, "
        f"in_features) is float16, bfloat16, float32 or float64: load the model without quantization, or leave the "
        f"module out."
    )


def _check_weight(base: nn.Module) -> None:
    """Refuse a weight whose numbers are not its values, or that is made anew at every use, with what is added lost."""
    if is_distributed(cast(Tensor, base.weight)):
        raise ConfigError(
            f"the base is a {type(base).__name__} whose weight is sharded, and fully_shard would not know of factors "
            f"made now; a whole weight is needed: adapt the model first, then shard it."
        )
    if cast(Tensor, base.weight).is_meta and hasattr(base, "_hf_hook"):
        raise ConfigError(
            f"the base is a {type(base).__name__} whose weight accelerate keeps elsewhere (offloaded to the CPU or to "
            f"disk) and brings for each forward, so that there is nothing to add to; a weight that stays is needed: "
            f"load the model without offloading, or leave the module out."
        )
    weight = cast(Tensor, base.weight)
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise _quantized(base, f"with a weight in {weight.dtype}")
    # torchao's says that it is in the dtype that it is multiplied in.
    kind = type(weight.data)
    if kind is not Tensor and not isinstance(weight.data, FakeTensor):
        raise _quantized(base, f"whose weight is a {kind.__name__}, quantized and not a plain tensor")
    if "weight" not in base._parameters and "weight" not in base._buffers:
        raise ConfigError(
            f"the base is a {type(base).__name__} whose weight is computed from others (weight_norm, spectral_norm, "
            f"another parametrization, pruning, PEFT's adapters), so that what is added to it would be lost; a weight "
            f"of its own is needed: remove_weight_norm, remove_spectral_norm, remove_parametrizations, prune.remove "
            f"or merge_and_unload() first."
        )


def check_options(r: object, sizes: tuple[int, int], alpha: object, dropout: object) -> int:
    """Refuse ranks, scales and rates that no adapter can have; returns the rank."""
    rank = as_rank(r)
    if rank is None or not 1 <= rank <= min(sizes):
        raise ConfigError(
            f"the rank is {r!r}; a layer {sizes[0]} -> {sizes[1]} takes an integer from 1 to {min(sizes)}: use a "
            f"smaller one, or leave the layer out (adapt's exclude_modules; modules_to_save trains it whole)."
        )
    check_scaling(alpha, dropout)
    return rank


def as_rank(r: Any) -> int | None:
    """An integer of any kind, numpy's too, as Python's; None for what is none."""
    try:
        return None if isinstance(r, bool) else index(r)
    except TypeError:
        return None


def check_scaling(alpha: object, dropout: object) -> None:
    """Refuse scales and dropout rates that no adapter can have."""
    if alpha is not None and not (isinstance(alpha, (int, float)) and 0 < alpha < math.inf):
        raise ConfigError(f"alpha is {alpha!r}; a positive number is needed (default: r).")
    if not (isinstance(dropout, (int, float)) and 0 <= dropout < 1):
        raise ConfigError(f"dropout is {dropout!r}; a probability in [0, 1) is needed.")


class LowRankLinear(nn.Module):
    """A frozen linear module with a trainable low-rank update U S V^T beside it.

    A correction is what the initialization takes out again, so that the function starts unchanged: "fold" subtracts it
    from the base weight, "keep" applies it as frozen factors beside it, "none" leaves it in. Default: "fold", or "keep"
    where others hold the base too.

    Attributes:
        base: the frozen module. U (out, r), S (r, r) or (r,), V (in, r): the factors, float32, or float64 when
            the base is; half precision never reaches them.
        scale: alpha / r, or alpha / sqrt(r) with ``use_rslora``.
        merged: whether the update lies in the base weight.
    """

    FACTORS = ("U", "S", "V")
    CORRECTIONS: tuple[str, ...] = ("fold", "keep")
    disabled = False  # by `disable_adapters`
    PROJECTED = False  # what gradients the factors get, see `LowRankUpdate`
    base: nn.Module  # or a `SharedBase`, which stands in for one
    U0: Tensor | None
    V0: Tensor | None

    def __init__(
        self,
        base: nn.Module | SharedBase,
        r: int,
        alpha: float | None = None,
        *,
        correction: str | None = None,
        diagonal: bool = False,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        if correction is None:
            correction = "keep" if isinstance(base, SharedBase) else "fold"
        if correction not in self.CORRECTIONS:
            known = ", ".join(map(repr, self.CORRECTIONS))
            raise ConfigError(f"correction is {correction!r}; use one of {known}.")
        if correction == "fold" and isinstance(base, SharedBase):
            raise ConfigError("correction='fold' changes a base that others hold too; use 'keep'.")
        self.in_features, self.out_features, self.fan_in_fan_out = linear_sizes(base)
        r = check_options(r, (self.in_features, self.out_features), alpha, dropout)
        self.r, self.alpha = r, float(r if alpha is None else alpha)
        self.use_rslora, self.diagonal = use_rslora, diagonal
        self.scale = self.alpha / (math.sqrt(r) if use_rslora else r)
        self.base = cast(nn.Module, base.requires_grad_(False))
        self.correction = correction
        self.folds = correction == "fold"  # whether a correction lies in the base weight, not beside it
        weight = self.weight
        options: dict[str, Any] = {
            "dtype": torch.float64 if weight.dtype == torch.float64 else torch.float32,
            "device": weight.device,
        }
        self.U = nn.Parameter(torch.empty(self.out_features, r, **options))
        self.S = nn.Parameter(torch.empty((r,) if diagonal else (r, r), **options))
        self.V = nn.Parameter(torch.empty(self.in_features, r, **options))
        # What was taken out of the base weight at the start, U0 V0^T scale; empty where nothing was.
        self.register_buffer("U0", None)
        self.register_buffer("V0", None)
        self.dropout = nn.Dropout(dropout)
        # The weight before merging, and the one before any correction: a half-precision weight that is added to and
        # subtracted from would wear out.
        self._kept: dict[str, Tensor] = {}  # in a dict, so that no module takes them for its parameters
        self.register_state_dict_post_hook(_save_unmerged)
        # torch's fast paths (nn.TransformerEncoderLayer in eval) read .weight and would pass the adapter by; a hook
        # switches them off.
        self.register_forward_pre_hook(forbid_fast_path)

    @property
    def weight(self) -> Tensor:
        """The base weight as it lies in the base."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias  # type: ignore[return-value]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch; refuses to be given another base weight, as by transformers' tie_weights."""
        if name in ("weight", "bias"):
            raise ConfigError(
                f"an adapted layer ({type(self).__name__}) cannot be given another {name}, as tie_weights and "
                f"resize_token_embeddings do with an adapted head: call them before adapt, or merge_adapters(model) "
                f"first; to set the base's own, assign to layer.base.{name}."
            )
        super().register_parameter(name, param)

    @property
    def merged(self) -> bool:
        """Whether the update lies in the base weight."""
        return "unmerged" in self._kept

    def forward(self, x: Tensor) -> Tensor:
        """base(x) + scale (dropout(x) V) S^T U^T, in the base's output dtype."""
        if self.disabled:
            return self._without_update(x)
        if x.is_nested:
            return over_rows(self.forward, x)
        if self.may_fuse(x):
            return self._fused(x)
        y = self.base(x)
        return y if self.merged else self.add_update(y, x)

    def may_fuse(self, x: Tensor) -> bool:
        """Whether base and update may be computed as one: a frozen nn.Linear that nobody listens to, in one dtype."""
        base: Any = self.base
        if isinstance(base, SharedBase):
            base = base.module
        if type(base) is not nn.Linear:
            return False
        weight, bias = base.weight, base.bias
        return (
            type(weight) is nn.Parameter
            and x.dtype == weight.dtype == self.V.dtype
            and not (weight.requires_grad or (bias is not None and bias.requires_grad))
            and not (self.merged or (self.training and self.dropout.p))
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
            and not (base._backward_pre_hooks or _has_any_global_hook())
            and "forward" not in base.__dict__  # what accelerate's hooks are: they replace it
            and not torch.is_autocast_enabled(x.device.type)
            and not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined]
            and not under_transform()
            and forward_ad._current_level < 0
        )

    def _fused(self, x: Tensor) -> Tensor:
        """`forward` in one differentiable step: both sums are made in place, and nobody sees the base's output."""
        base: Any = self.base
        factors = self.U, self.S, self.V, self.scale, self.PROJECTED, *self._correction_beside()
        return LowRankUpdate.apply(None, x, *factors, base.weight, base.bias)

    def _without_update(self, x: Tensor) -> Tensor:
        """What the base gave before it was adapted, whatever has been folded or merged into it since."""
        weight = self._original_weight()
        if weight is self.weight:
            return cast(Tensor, self.base(x))
        return cast(Tensor, functional_call(self.base, {"weight": weight}, (x,)))

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Y + scale (dropout(x) V) S^T U^T, in y's dtype; y is base(x)."""
        h = self.dropout(x)
        if not torch.is_autocast_enabled(x.device.type):
            h = h.to(self.V.dtype)
        return self._plus_update(y, h)

    def _plus_update(self, y: Tensor, h: Tensor) -> Tensor:
        """Y + scale (h V) S^T U^T, less the correction beside it."""
        u0, v0 = self._correction_beside()
        z, wide = factors_of_update(h, self.U, self.S, self.V, self.scale, u0, v0)
        return plus_product(y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1]), wide).reshape(y.shape)

    def _correction_beside(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """U0 and V0, where the correction is applied beside the base weight; FSDP casts U and V, and no buffers."""
        pair = None if self.folds else self._corrected_by()
        return (None, None) if pair is None else (pair[0].to(self.U.dtype), pair[1].to(self.V.dtype))

    # The update as a matrix

    def _oriented(self, delta: Tensor) -> Tensor:
        """(out, in) as the base weight lies."""
        return delta.T if self.fan_in_fan_out else delta

    def _corrected_by(self) -> tuple[Tensor, Tensor] | None:
        """U0 and V0, where something was taken out of the base weight."""
        return None if self.U0 is None or self.V0 is None else (self.U0, self.V0)

    def _whole_factors(self) -> tuple[Tensor, Tensor]:
        """U S and V with all their rows; gathered where they are sharded, which every rank must ask for."""
        to_shards(self)
        u, s, v = (whole(t) for t in (self.U, self.S, self.V))
        return (u * s if self.diagonal else u @ s), v

    def _product(self) -> Tensor:
        us, v = self._whole_factors()
        return self.scale * (us @ v.T)

    def _correction(self) -> Tensor | None:
        """What the initialization took out of the base weight, (out, in)."""
        pair = self._corrected_by()
        return None if pair is None else self.scale * (pair[0] @ pair[1].T)

    @torch.no_grad()
    @full_precision
    def delta_weight(self) -> Tensor:
        """The net change to the original base weight, (out, in), in the factors' dtype."""
        correction = self._correction()
        return self._product() if correction is None else self._product() - correction

    @torch.no_grad()
    @full_precision
    def to_lora(self) -> tuple[Tensor, Tensor]:
        """A (k, in) and B (out, k) with B A = `delta_weight`: k = r, or 2 r where the start was corrected."""
        us, v = self._whole_factors()
        a, b = v.T.clone(), self.scale * us
        pair = self._corrected_by()
        if pair is not None and bool(pair[0].any()):
            a, b = torch.cat((a, pair[1].T)), torch.cat((b, -self.scale * pair[0]), 1)
        return a.contiguous(), b.contiguous()

    @torch.no_grad()
    @full_precision
    def merge(self) -> None:
        """Add the update to the base weight, computed in the factors' precision. Merged twice is merged once.

        The base gets a new weight and the layer keeps the old one, so that a weight shared with another module (a
        tied embedding) stays as it is there.
        """
        if not self.merged:
            self.check_mergeable()
            self._kept["unmerged"] = self._replace_weight(
                self._product() if self.folds else self.delta_weight()
            )

    def check_mergeable(self) -> None:
        """Refuse a sharded layer, whose update no rank holds whole."""
        self._check_base_is_whole("merge()", ", or merge in a copy that was loaded from the full state")

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the old base weight back, bit for bit."""
        if self.merged:
            self.base.weight = self._kept.pop("unmerged")

    def require_own_weight(self) -> None:
        """Refuse a layer that is merged into a base that others may be merged into too: unmerging has an order."""
        if self.merged and isinstance(self.base, SharedBase):
            raise ConfigError(
                "the adapter is merged into a shared base; call the model's unmerge_adapter() first."
            )

    def _replace_weight(self, delta: Tensor) -> Tensor:
        """Give the base its weight plus delta (out, in); returns the weight it had."""
        old = self.weight
        total = (old.to(delta.dtype) + self._oriented(delta)).to(old.dtype)
        self.base.weight = (
            nn.Parameter(total, requires_grad=False) if isinstance(old, nn.Parameter) else total
        )
        return old

    @torch.no_grad()
    @full_precision
    def _original_weight(self) -> Tensor:
        """The base weight before any correction and merge."""
        if "original" in self._kept:
            return self._kept["original"]
        weight = self._kept.get("unmerged", self.weight)
        before = self._correction() if self.folds else None  # loaded by nn.Module.load_state_dict
        return weight if before is None else (weight.to(before) + self._oriented(before)).to(weight)

    def _check_base_is_whole(self, what: str, way_out: str = "") -> None:
        """Refuse what reads or changes the whole base weight of a sharded layer."""
        to_shards(self)
        if is_distributed(self.weight):
            raise ConfigError(
                f"{what} needs the whole base weight, which is sharded: do it before fully_shard{way_out}."
            )

    @torch.no_grad()
    @full_precision
    def _correct(self, u: Tensor | None, v: Tensor | None) -> None:
        """Take scale u v^T out of the original base weight, in place of what was taken out before.

        A base weight on meta has nothing to take it out of; `reset_parameters` does so when it has been filled.
        """
        to_shards(self)
        self.require_own_weight()
        if self.folds and self.weight.is_meta:
            return
        if self.folds and (u is not None or self._kept or self.U0 is not None):
            self._check_base_is_whole("a correction of the base weight")
        self.unmerge()
        if "original" in self._kept:
            self.base.weight = self._kept.pop("original")
        elif self.folds and (before := self._correction()) is not None:  # loaded by nn.Module.load_state_dict
            self._replace_weight(before)
        self.U0 = None if u is None else u.detach().clone()
        self.V0 = None if v is None else v.detach().clone()
        if self.folds and (after := self._correction()) is not None:
            self._kept["original"] = self._replace_weight(-after)

    # State

    def factors_from(self, u: Tensor, s: Tensor, v: Tensor) -> dict[str, Tensor]:
        """The state whose update is scale u diag(s) v^T, for `load_factors`."""
        return {"U": u, "S": s if self.diagonal else s.diag(), "V": v}

    def check_factors(self, state: Mapping[str, Tensor], layer: str = "the layer") -> None:
        """Refuse factors of other shapes, or half of a correction."""
        if ("U0" in state) != ("V0" in state):
            missing = "V0" if "U0" in state else "U0"
            raise ConfigError(f"{layer}.{missing} is missing; a correction is saved as U0 and V0 together.")
        for name, like in (("U0", self.U), ("V0", self.V)):
            if name in state and state[name].shape != like.shape:
                raise ConfigError(
                    f"{layer}: {name} is saved as {tuple(state[name].shape)}; {tuple(like.shape)} is needed."
                )
        for name in self.FACTORS:
            given, own = tuple(state[name].shape), tuple(getattr(self, name).shape)
            if given != own:
                raise ConfigError(
                    f"{layer}: {name} is saved as {given} and here {own}; adapt with the saved rank."
                )

    @torch.no_grad()
    def load_factors(self, state: Mapping[str, Tensor]) -> None:
        """Load U, S, V (and U0, V0); a correction folded into the base weight is undone first."""
        self.check_factors(state)
        self._correct(*(state[k].to(self.U) if k in state else None for k in ("U0", "V0")))
        for name in self.FACTORS:
            write_whole(getattr(self, name), state[name])
        self._refine(state["U"].dtype, state["V"].dtype)

    def factor_state(self) -> dict[str, Tensor]:
        """U, S, V, and U0, V0 where there are any, detached; sharded ones put together, on every rank."""
        to_shards(self)
        tensors = {name: getattr(self, name) for name in (*self.FACTORS, "U0", "V0")}
        return {name: whole(t).detach() for name, t in tensors.items() if t is not None}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A whole-model state carries the base weight as it was corrected: take U0 and V0 as they come.

        One without the base weight (strict=False) is an adapter's alone: correct the weight that is here.
        """
        saved = [state_dict.get(prefix + name) for name in ("U0", "V0")]
        own = [
            None if t is None else torch.empty(f.shape, dtype=f.dtype, device=f.device)
            for t, f in zip(saved, (self.U, self.V), strict=True)
        ]
        adapter = all(prefix + name in state_dict for name in self.FACTORS)
        if prefix + "base.weight" in state_dict and (adapter or self.folds):
            self.unmerge()
            u0, v0 = saved
            if u0 is not None and v0 is not None:
                metadata: Mapping[str, Any] = args[0] if args else kwargs["local_metadata"]
                weight = state_dict[prefix + "base.weight"]
                self.folds = metadata["folds"] if "folds" in metadata else self._tell_folds(weight, u0, v0)
            self._kept.clear()
            self.U0, self.V0 = own
        elif adapter:
            fits = [t is None or o is None or t.shape == o.shape for t, o in zip(saved, own, strict=True)]
            self._correct(*(t if t is None else t.to(self.U) for t in (saved if all(fits) else own)))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if adapter:
            self._refine(*(state_dict[prefix + name].dtype for name in "UV"))

    @torch.no_grad()
    @full_precision
    def _tell_folds(self, saved: Tensor, u0: Tensor, v0: Tensor) -> bool:
        """Whether a saved base weight has its correction in it, for a state without metadata (safetensors has none).

        The weight here before any correction tells, where the state began with the same one. Elsewhere the layer that
        was saved is taken to be like this one.
        """
        here = (self.weight, self.U, self.V)
        if any(is_distributed(t) or t.is_meta for t in (saved, *here)):
            return self.folds
        if [t.shape for t in (saved, u0, v0)] != [t.shape for t in here]:
            return self.folds  # refused when it is loaded
        before = self._correction() if self.folds and "original" not in self._kept else None
        original = self._kept.get("original", self.weight).to(self.U.dtype)
        original = original if before is None else original + self._oriented(before)
        change = saved.to(original) - original
        correction = self._oriented(self.scale * (u0.to(original) @ v0.to(original).T))
        kept, folded = change.abs().max(), (change + correction).abs().max()
        rounding = 8 * torch.finfo(saved.dtype).eps * original.abs().max()
        neither, either = min(kept, folded) > rounding, max(kept, folded) <= rounding
        return self.folds if neither or either else bool(folded < kept)

    @torch.no_grad()
    def _refine(self, *was: torch.dtype) -> None:
        """Make U and V orthonormal to their own precision, where they were to that of these dtypes and no more."""
        for p, dtype in zip((self.U, self.V), was, strict=True):
            now, then = (tolerance(d, *p.shape) for d in (p.dtype, dtype))
            if now < then and not (is_distributed(p) or p.is_meta) and now < Stiefel().residual(p) <= then:
                p.copy_(Stiefel().project_point(p))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Follow the model to another device or to float64, never to half precision: steps would round away."""
        own = {id(t) for t in (*self._parameters.values(), *self._buffers.values()) if t is not None}
        own |= {id(p.grad) for p in self._parameters.values() if p is not None and p.grad is not None}

        def guarded(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if id(t) in own and moved.dtype in HALF else moved

        was = self.U.dtype, self.V.dtype
        super()._apply(guarded, recurse)
        self._refine(*was)
        for kept in self._kept.values():
            kept.data = fn(kept.data)
        return self

    def extra_repr(self) -> str:
        """Rank and scale, for print(model)."""
        return f"r={self.r}, alpha={self.alpha:g}, scale={self.scale:g}, diagonal={self.diagonal}, merged={self.merged}"


def _save_unmerged(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """A state holds the base weight without the update, whose factors it holds beside it.

    Its metadata, which torch.save keeps, says whether that weight has the correction in it. A key of its own would
    survive safetensors too, but older states lack it, and averages of states would take it for a weight.
    """
    assert isinstance(module, LowRankLinear)
    metadata["folds"] = module.folds
    if module.merged and prefix + "base.weight" in state:
        state[prefix + "base.weight"] = module._kept["unmerged"].detach()


def forbid_fast_path(module: nn.Module, args: object) -> None:
    """Nothing to do: that there is a hook is what counts."""
