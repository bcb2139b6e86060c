"""What the user says: LoraConfig's fields as far as they apply, and our layers' own options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, ClassVar

from torch import nn

from ...errors import ConfigError
from ...layers import LowRankLinear, RiemannLoRALinear, StelLALinear
from ...layers import riemann_lora as riemann_layer
from ...layers import stella as stella_layer
from ...layers.lora_export import exact_targets, rank_patterns
from ...layers.low_rank import as_rank, check_scaling
from ...layers.shared import SharedBase
from .registration import Method, PeftConfig, get_peft_model


@dataclass
class LowRankConfig(PeftConfig):
    """The fields that both methods share; they mean what they mean in `peft.LoraConfig`.

    Args:
        r: rank.
        target_modules: name endings, a regular expression, or "all-linear"; default by the model's type, as for LoRA.
        exclude_modules: likewise, taken out again.
        lora_alpha: numerator of the update's factor lora_alpha / r; default: each layer's rank, a factor of 1.
        lora_dropout: on the adapter's input.
        bias: "none", "all", or "stella_only" / "riemann_lora_only" for the biases of adapted layers.
        use_rslora: the factor is lora_alpha / sqrt(r).
        modules_to_save: modules trained whole and saved with the adapter.
        layers_to_transform, layers_pattern: indices of the layers to adapt, and the name of their list.
        rank_pattern, alpha_pattern: names or regular expressions -> ranks and alphas other than the default.
        init: how the factors start; see the layer.
        registered_by: for the reader of a saved adapter_config.json, whose PEFT does not know the method.

    Raises:
        ConfigError: an option out of range. What depends on the model is checked when layers are made.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init: str = "random"
    registered_by: str = "import stiefelopt.integrations.peft"

    METHOD: ClassVar[Method]
    LAYER: ClassVar[type[LowRankLinear]]
    INITS: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.METHOD
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        self.rank_pattern, self.alpha_pattern = dict(self.rank_pattern or {}), dict(self.alpha_pattern or {})
        for rank in (self.r, *self.rank_pattern.values()):
            if (as_rank(rank) or 0) < 1:
                raise ConfigError(f"the rank is {rank!r}; a positive integer is needed.")
        # Python's own, which JSON knows.
        self.r, self.rank_pattern = index(self.r), {k: index(r) for k, r in self.rank_pattern.items()}
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            check_scaling(alpha, self.lora_dropout)
        self._check_words()
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError("layers_to_transform needs target_modules as a list of names, not a string.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern needs layers_to_transform, the indices of the layers to adapt.")

    def _check_words(self) -> None:
        biases = ("none", "all", f"{self.METHOD.value.lower()}_only")
        for name, known in (("bias", biases), ("init", self.INITS)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; use one of {', '.join(map(repr, known))}."
                )

    def layer_options(self) -> dict[str, Any]:
        """What our layer gets beside rank and alpha."""
        return {"dropout": self.lora_dropout, "use_rslora": self.use_rslora, "init": self.init}

    def make_layer(self, base: nn.Module, r: int, alpha: float | None) -> LowRankLinear:
        """One adapter beside a base layer that others may share; a correction stays beside it."""
        return self.LAYER(SharedBase(base), r, alpha, **self.layer_options())

    @classmethod
    def put_in(
        cls,
        model: nn.Module,
        ranks: Mapping[str, int],
        modules_to_save: Sequence[str],
        about: Mapping[str, Any],
        **options: Any,
    ) -> nn.Module:
        """A PeftModel with adapters of these ranks and scale 1 in exactly these modules, for `import_lora`."""
        r, rank_pattern = rank_patterns(ranks)
        config = cls(
            r=r,
            rank_pattern=rank_pattern,
            target_modules=exact_targets(model, ranks),
            modules_to_save=list(modules_to_save) or None,
            **{**about, **options},
        )
        return get_peft_model(model, config)


def _as_set(names: list[str] | set[str] | str | None) -> set[str] | str | None:
    return set(names) if isinstance(names, (list, tuple)) else names


@dataclass
class StellaConfig(LowRankConfig):
    """StelLA: U and V on Stiefel manifolds, U S V^T beside each adapted layer; the fields of `LowRankConfig`, and more.

    Args:
        diagonal: S is a vector.
        reference_dim: the d of the displacement scale sqrt(d / n); default: the most frequent in_features among the
            adapted layers.

    Reference: Li et al., StelLA (arXiv 2510.01938); `stiefelopt.StelLALinear`.
    """

    diagonal: bool = False
    reference_dim: int | None = None

    METHOD: ClassVar[Method] = Method.STELLA
    LAYER: ClassVar[type[LowRankLinear]] = StelLALinear
    INITS: ClassVar[tuple[str, ...]] = stella_layer.INITS

    def layer_options(self) -> dict[str, Any]:
        """What our layer gets beside rank and alpha."""
        return {**super().layer_options(), "diagonal": self.diagonal, "reference_dim": self.reference_dim}


@dataclass
class RiemannLoraConfig(LowRankConfig):
    """RiemannLoRA: U S V^T on the manifold of fixed-rank matrices; the fields of `LowRankConfig`, and more.

    The small start is taken out again by frozen factors beside the base weight, which stays as it is.

    Args:
        scale: S = scale I at the start, default 0.01 / sqrt(r).

    Reference: Bogachev et al., RiemannLoRA (arXiv 2507.12142); `stiefelopt.RiemannLoRALinear`.
    """

    scale: float | None = None

    METHOD: ClassVar[Method] = Method.RIEMANN_LORA
    LAYER: ClassVar[type[LowRankLinear]] = RiemannLoRALinear
    INITS: ClassVar[tuple[str, ...]] = riemann_layer.INITS

    def __post_init__(self) -> None:
        super().__post_init__()
        riemann_layer.check_scale(self.scale)

    def layer_options(self) -> dict[str, Any]:
        """What our layer gets beside rank and alpha."""
        return {**super().layer_options(), "scale": self.scale}
