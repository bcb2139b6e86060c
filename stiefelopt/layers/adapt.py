"""Put adapters into a model, take them out again, and save them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import load_whole, to_shards, whole
from ..errors import ConfigError
from .low_rank import LowRankLinear, check_options, is_linear, linear_sizes
from .shared import SharedBase
from .stella import StelLALinear

Targets = str | Sequence[str]

# The names of what stays trainable beside the adapters, kept in the model's __dict__.
_SAVED = "_stiefelopt_modules_to_save"


# What torch puts between a module and the one around it: activation checkpointing, torch.compile, FSDP.
_WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")


def plain_name(name: str) -> str:
    """The name of a module or tensor without the parts that torch's wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def plainly_named(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by plain name; a wrapper and the module in it have the same one, and it means the latter."""
    return {plain_name(name): module for name, module in model.named_modules()}


def ends_with(name: str, endings: Sequence[str]) -> bool:
    """PEFT's rule for lists: the whole name, or its end after a dot."""
    return any(name == e or name.endswith("." + e) for e in endings)


def _matches(name: str, targets: Targets) -> bool:
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise ConfigError(
                f"{targets!r} is no regular expression ({error}); use one, or a list of name endings."
            ) from None
    return ends_with(name, targets)


def _find_targets(
    model: nn.Module, targets: Targets, exclude: Targets | None, saved: Sequence[str]
) -> list[tuple[str, nn.Module]]:
    """The modules to adapt, in the model's order, under the names that find them, which may hold those of wrappers."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    found = []
    for place, module in model.named_modules(remove_duplicate=False):
        name, parent = plain_name(place), model.get_submodule(place.rpartition(".")[0])
        if isinstance(module, LowRankLinear):
            raise ConfigError(f"{name or 'the model'} is adapted already; merge_adapters(model) first.")
        inside_saved = any(ends_with(prefix, saved) for prefix in _prefixes(name))
        wraps = any(part in module._modules for part in _WRAPPED)
        if not name or wraps or inside_saved or (exclude is not None and _matches(name, exclude)):
            continue
        # nn.MultiheadAttention reads its out_proj's weight and never calls it: an adapter there would not act.
        dead = isinstance(parent, nn.MultiheadAttention)
        if everything:
            if is_linear(module) and module is not head and not dead:
                found.append((place, module))
        elif _matches(name, targets):
            if dead:
                raise ConfigError(
                    f"{name} belongs to nn.MultiheadAttention, which reads its weight and never "
                    "calls it, so that an adapter "
                    f"would do nothing; leave it out, or use an attention with linear layers of its own."
                )
            found.append((place, module))
    if not found:
        linear = [name for name, module in plainly_named(model).items() if name and is_linear(module)]
        shown = ", ".join(linear[:6]) + (", ..." if len(linear) > 6 else "")
        raise ConfigError(
            f"target_modules={targets!r} matches no module to adapt; the linear modules are: {shown or 'none'}."
        )
    return found


def _sizes_of(found: Sequence[tuple[str, nn.Module]]) -> list[tuple[int, int]]:
    """in_features and out_features of the modules to adapt; those that cannot be are refused by name."""
    names = {plain_name(place): module for place, module in found}
    sizes, refused = [], {}
    for place, module in found:
        name = plain_name(place)
        try:
            if place.endswith("._orig_mod"):
                raise ConfigError(
                    "the base is compiled by itself, and its code would go on without the adapter; adapt the model "
                    "first, then compile."
                )
            sizes.append(linear_sizes(module)[:2])
        except ConfigError as error:
            refused[name] = error
    if refused:
        first, reason = next(iter(refused.items()))
        way_out = f" To leave out all that cannot be adapted: exclude_modules={list(refused)}."
        raise ConfigError(f"{first}: {reason}{way_out if len(refused) > 1 else ''}")
    for name in names:
        outer = next((prefix for prefix in _prefixes(name) if prefix in names), name)
        if outer != name:
            raise ConfigError(
                f"target_modules matches {outer} and {name} inside it; one of them is needed: name the other in "
                f"exclude_modules."
            )
    return sizes


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors about a layer say which one."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _prefixes(name: str) -> Iterator[str]:
    """a.b.c -> a, a.b, a.b.c."""
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def adapt(
    model: nn.Module,
    layer: Callable[..., LowRankLinear] = StelLALinear,
    *,
    target_modules: Targets,
    exclude_modules: Targets | None = None,
    modules_to_save: Sequence[str] | None = (),
    reference_dim: int | None = None,
    **layer_options: Any,
) -> nn.Module:
    """Replace linear modules by adapted ones, in place, and freeze everything else.

    Args:
        model: any module.
        layer: the adapter.
        target_modules: as in PEFT: a regular expression that must match the whole module name, a list of
            name endings, or "all-linear" in any case (every linear module but the output embedding).
        exclude_modules: likewise, taken out again.
        modules_to_save: name endings of modules that are trained whole, such as a new head; None for none.
        reference_dim: StelLA's d, default: the most frequent in_features among the adapted layers; printed.
        layer_options: r, alpha, init, ...: see the layer.

    Returns:
        The model.

    Raises:
        ConfigError: nothing matches, a match is not linear, has a quantized or computed weight or lies in another, or
            an option is out of range. Nothing has changed, then or after any other error.

    Example:
        >>> model = adapt(model, StelLALinear, target_modules=["query", "value"], r=16, alpha=32)
    """
    if "r" not in layer_options:
        raise ConfigError("adapt needs the rank: adapt(model, target_modules=..., r=16).")
    if target_modules is None:
        raise ConfigError('adapt needs target_modules: a list of names, such as ["q_proj"], or "all-linear".')
    to_shards(model)
    if not isinstance(target_modules, str):
        target_modules = list(target_modules)
    modules_to_save = () if modules_to_save is None else modules_to_save
    if isinstance(modules_to_save, str):
        raise ConfigError(
            f"modules_to_save is the string {modules_to_save!r}; a list is needed: [{modules_to_save!r}]."
        )
    found = _find_targets(model, target_modules, exclude_modules, modules_to_save)
    sizes = _sizes_of(found)
    missing = [e for e in modules_to_save if not any(ends_with(name, [e]) for name in plainly_named(model))]
    if missing:
        raise ConfigError(f"modules_to_save names {missing[0]!r}, which no module of the model ends with.")
    scaling = layer_options.get("alpha"), layer_options.get("dropout", 0.0)
    for (place, _), (n, m) in zip(found, sizes, strict=True):
        with _naming(plain_name(place)):
            check_options(layer_options["r"], (n, m), *scaling)
    announced = ""
    if reference_dim is None:
        reference_dim = Counter(n for n, _ in sizes).most_common(1)[0][0]
        announced = f"stiefelopt.adapt: {len(found)} layers adapted, reference_dim = {reference_dim}"
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    weights = [(module, module.weight) for _, module in found]
    try:
        made: dict[nn.Module, LowRankLinear] = {}
        for name, module in found:
            if module not in made:
                with _naming(plain_name(name)):
                    made[module] = layer(module, reference_dim=reference_dim, **layer_options)
        _train(model.parameters(), False)
        for name, module in found:
            _put(model, name, made[module])
        for adapter in made.values():
            _train((getattr(adapter, factor) for factor in adapter.FACTORS), True)
        for name, module in plainly_named(model).items():
            if name and ends_with(name, modules_to_save):
                _train(module.parameters(), True)
    except Exception:
        # The very same objects: a weight that has been corrected is another one.
        for name, module in found:
            _put(model, name, module)
        for module, weight in weights:
            if module.weight is not weight:
                module.weight = weight
        for p, requires_grad in trainable:
            p.requires_grad = requires_grad
        raise
    model.__dict__[_SAVED] = list(modules_to_save)
    if announced:
        print(announced)
    return model


def _train(parameters: Iterable[Tensor], requires_grad: bool) -> None:
    for p in parameters:
        p.requires_grad = requires_grad  # what requires_grad_ does, but for parameters of lazy modules too


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def adapted_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The adapted layers by name.

    Raises:
        ConfigError: there is none.
    """
    to_shards(model)
    layers = {plain_name(name): m for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} holds no adapted layer; call adapt(model, target_modules=..., r=...) first."
        )
    return layers


def _own_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The adapted layers of a model that `adapt` has made.

    Raises:
        ConfigError: there is none, or PEFT holds them.
    """
    layers = adapted_layers(model)
    if any(isinstance(layer.base, SharedBase) for layer in layers.values()):
        raise ConfigError(
            "PEFT holds the adapters of this model; use its own methods: save_pretrained, load_adapter, "
            "merge_and_unload, disable_adapter."
        )
    return layers


def inside_wrappers(model: nn.Module) -> nn.Module:
    """The model that `adapt` was given, where it holds every adapted layer, else the model itself.

    torch.compile, DDP, or a LightningModule around it put a prefix to every name; a checkpoint has the plain ones. A
    model of transformers wraps nothing: where `adapt` was given a part of it, it is the one that others load.
    """
    layers = {m for m in model.modules() if isinstance(m, LowRankLinear)}
    given = (m for m in model.modules() if _SAVED in m.__dict__ or _is_pretrained(m))
    return next((m for m in given if layers.issubset(m.modules())), model)


def _is_pretrained(module: nn.Module) -> bool:
    """By its class's name, since transformers is an extra."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are trained whole, by name; those of every adapted model where several lie below this one."""
    endings = model.__dict__.get(_SAVED)
    if endings is None:
        below = ((child, saved_modules(module)) for child, module in model.named_children())
        return {plain_name(f"{child}.{name}"): m for child, found in below for name, m in found.items()}
    return {name: m for name, m in plainly_named(model).items() if name and ends_with(name, endings)}


def merge_adapters(model: nn.Module) -> nn.Module:
    """Add every update to its base weight and put the plain layers back, in place; returns the model (or its layer)."""
    if isinstance(model, LowRankLinear):
        model.merge()
        return model.base
    for layer in _own_layers(model).values():
        layer.check_mergeable()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, LowRankLinear):
            module.merge()
            _put(model, name, module.base)
    return model


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model computes what it did before `adapt`, bit for bit where the base weights are kept.

    What is folded or merged into a base weight is left out too. Only modules_to_save stay as they are trained: nobody
    has kept what they were. With gradient checkpointing a backward pass belongs inside as well, since it computes the
    forward again.

        with disable_adapters(model), torch.no_grad():
            reference = model(**batch).logits

    Raises:
        ConfigError: no adapted layer, or PEFT holds them (there it is ``model.disable_adapter()``).
    """
    before = {layer: layer.disabled for layer in _own_layers(model).values()}
    try:
        for layer in before:
            layer.disabled = True
        yield model
    finally:
        for layer, was in before.items():
            layer.disabled = was


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What was trained and nothing else: the factors, and the modules_to_save; detached, ready for safetensors.

    The names are those of the model that was adapted, or of the transformers model that it is a part of, whatever wraps
    it now.
    """
    model = inside_wrappers(model)
    state = {
        f"{name}.{key}" if name else key: t
        for name, module in _own_layers(model).items()
        for key, t in module.factor_state().items()
    }
    for name, saved in saved_modules(model).items():
        state.update({plain_name(f"{name}.{k}"): whole(t).detach() for k, t in saved.state_dict().items()})
    return {name: t.clone(memory_format=torch.contiguous_format) for name, t in state.items()}


def load_adapter_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `adapter_state_dict` gave into a model adapted in the same way; merged layers are unmerged.

    Raises:
        ConfigError: names or shapes differ, or a value is no tensor; nothing has changed.
    """
    given, model = model, inside_wrappers(model)
    layers, saved = _own_layers(model), saved_modules(model)
    prefix = next((name for name, module in plainly_named(given).items() if module is model), "")
    # Saved when wrappers left their names in.
    state = {plain_name(name): t for name, t in state.items()}
    if prefix and all(key.startswith(f"{prefix}.") for key in state):
        state = _below(state, prefix)
    expected = set(adapter_state_dict(model))
    optional = {f"{name}.{k}" if name else k for name in layers for k in ("U0", "V0")}
    missing, unknown = expected - optional - set(state), set(state) - expected - optional
    if missing or unknown:
        raise ConfigError(
            f"the adapter state does not fit the model: missing {sorted(missing)[:3]}, unknown "
            f"{sorted(unknown)[:3]}; adapt "
            f"the model with the targets it was saved with."
        )
    for key, t in state.items():
        if not isinstance(t, Tensor):
            raise ConfigError(
                f"{key} is a {type(t).__name__}; a tensor is needed, as adapter_state_dict gives it."
            )
    parts = {name: _below(state, name) for name in (*layers, *saved)}
    for name, module in saved.items():
        own = {plain_name(key): key for key in module.state_dict()}
        parts[name] = {own.get(key, key): t for key, t in parts[name].items()}
    for name, layer in layers.items():
        layer.check_factors(parts[name], name)
    for name, module in saved.items():
        check_state(name, module, parts[name])
    for name, module in saved.items():
        load_whole(module, parts[name])
    for name, layer in layers.items():
        layer.load_factors(parts[name])


def check_state(name: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse a module's state whose names or shapes differ."""
    own = {key: tuple(t.shape) for key, t in module.state_dict().items()}
    given = {key: tuple(t.shape) for key, t in state.items()}
    if own != given:
        key = next(k for k in (*own, *given) if own.get(k) != given.get(k))
        raise ConfigError(
            f"{name}.{key} is saved as {given.get(key)} and here {own.get(key)}; use the model it was saved from."
        )


def _below(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}." if name else ""
    return {k[len(prefix) :]: t for k, t in state.items() if k.startswith(prefix)}
