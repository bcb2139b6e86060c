"""The tuners: they put our layers into a model; everything else is PEFT's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar, cast

from torch import nn

from ...errors import ConfigError, UnknownNameError
from ...layers import StelLALinear
from .config import LowRankConfig, StellaConfig
from .layer import BASE, AdaptedLinear, RiemannLoraLinear, StellaLinear
from .registration import TARGET_MODULES, AuxiliaryTrainingWrapper, BaseTuner, LoraConfig, get_pattern_key


class LowRankModel(BaseTuner):
    """A model with adapted layers."""

    tuner_layer_cls: ClassVar[type[AdaptedLinear]]
    target_module_mapping = TARGET_MODULES

    def _create_and_replace(
        self,
        peft_config: LowRankConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, nn.MultiheadAttention):
            raise ConfigError(
                f"{current_key} belongs to nn.MultiheadAttention, which reads its weight and never calls it, so that "
                f"an adapter would do nothing; leave it out with exclude_modules."
            )
        ranks, alphas = peft_config.rank_pattern, peft_config.alpha_pattern
        r = ranks.get(get_pattern_key(ranks.keys(), current_key), peft_config.r)
        alpha = alphas.get(get_pattern_key(alphas.keys(), current_key), peft_config.lora_alpha)
        try:
            if isinstance(target, self.tuner_layer_cls):
                target.update_layer(adapter_name, peft_config, r, alpha)
            else:
                made = self.tuner_layer_cls(target, adapter_name, peft_config, r, alpha)
                self._replace_module(parent, target_name, made, target)
        except ConfigError as error:
            raise ConfigError(f"{current_key}: {error}") from None

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; an adapter that does not fit leaves the model as it was."""
        trainable = [(p, p.requires_grad) for p in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self._take_out(model, adapter_name)
            for p, requires_grad in trainable:
                p.requires_grad_(requires_grad)
            raise
        self._complete(self.peft_config[adapter_name], _layers_of(model, adapter_name))

    def _take_out(self, model: nn.Module, adapter_name: str) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, self.tuner_layer_cls) and adapter_name in module.adapters:
                del module.adapters[adapter_name]
                if not module.adapters:
                    parent, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(parent), leaf, module.base_layer)

    def _complete(self, config: LowRankConfig, layers: list[Any]) -> None:
        """Tell the new layers what depends on all of them."""

    def _check_target_module_compatiblity(
        self, peft_config: LowRankConfig, model: nn.Module, target_name: str
    ) -> None:
        # What PEFT refuses for LoRA (layers whose weight is read past their forward) it must refuse for us.
        super()._check_target_module_compatiblity(LoraConfig(), model, target_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT; if ``safe_merge`` refuses an adapter, no layer is merged."""
        merged = self._merged()
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except ConfigError:
            _unmerge_to(merged)
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge and safe_merge:  # the whole model before the first layer is taken out
            merged = self._merged()
            self.merge_adapter(adapter_names, safe_merge=True)
            _unmerge_to(merged)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _merged(self) -> dict[AdaptedLinear, int]:
        return {m: len(m.merged_adapters) for m in self.modules() if isinstance(m, AdaptedLinear)}

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """While this is entered, every layer is told the adapter of each row (``adapter_names``)."""
        if kwargs.get("alora_offsets") is not None:
            raise ConfigError("alora_offsets is for activated LoRA; leave it out.")
        names = kwargs.get("adapter_names")
        with ExitStack() as hooks:
            if names is not None:
                self._check_adapter_names(names)
                beams = kwargs.get("num_beams") or 1
                # Beam search repeats the rows of a decoder; an encoder sees them once.
                encoder = set(_encoder_modules(self.model)) if beams > 1 else set()
                for module in self.modules():
                    if isinstance(module, (AdaptedLinear, AuxiliaryTrainingWrapper)):
                        times = 1 if module in encoder else beams
                        rows = [name for name in names for _ in range(times)]
                        hook = partial(_with_names, rows)
                        hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield

    def _check_adapter_names(self, names: Sequence[str]) -> None:
        if self.training:
            raise ConfigError("adapter_names is for inference; call model.eval() first.")
        known = {name for m in self.modules() if isinstance(m, AdaptedLinear) for name in m.adapters}
        unknown = sorted(set(names) - known - {BASE})
        if unknown:
            raise UnknownNameError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there are "
                f"{', '.join(sorted(known))}, and {BASE!r} for none."
            )


def _layers_of(model: nn.Module, adapter_name: str) -> list[Any]:
    found = (m.adapters.get(adapter_name) for m in model.modules() if isinstance(m, AdaptedLinear))
    return [layer for layer in found if layer is not None]


def _unmerge_to(merged: dict[AdaptedLinear, int]) -> None:
    for layer, count in merged.items():
        layer.unmerge_to(count)


def _with_names(
    rows: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": rows}


def _encoder_modules(model: nn.Module) -> Iterator[nn.Module]:
    encoder = cast(Any, model).get_encoder() if hasattr(model, "get_encoder") else None
    if encoder is not None and encoder is not model:
        yield from encoder.modules()


class StellaModel(LowRankModel):
    """PEFT's tuner for `StellaConfig`."""

    prefix = "stella_"
    tuner_layer_cls = StellaLinear

    def _complete(self, config: LowRankConfig, layers: list[StelLALinear]) -> None:
        assert isinstance(config, StellaConfig)
        if layers and config.reference_dim is None:
            common = Counter(layer.in_features for layer in layers).most_common(1)[0][0]
            for layer in layers:
                layer.set_reference_dim(common)


class RiemannLoraModel(LowRankModel):
    """PEFT's tuner for `RiemannLoraConfig`."""

    prefix = "riemann_lora_"
    tuner_layer_cls = RiemannLoraLinear
