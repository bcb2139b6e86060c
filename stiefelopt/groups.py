"""From modules to plain groups: `constrain` declares a parameter, `param_groups` collects what was declared."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import local, shared_generator, to_shards, write_whole
from .draws import check_generator
from .errors import ConfigError, NotOnManifoldError
from .lora_pairs import lora_pairs
from .manifolds import FixedRankPair, Manifold, carried, from_spec, mark
from .placement import Placement, check_parameter_shape, check_point, read_placement, sharding_of

# Declarations lie in the module's __dict__ under parameter names: unlike attributes of a Parameter they survive
# fully_shard, DDP, deepcopy and torch.compile.
_DECLARED = "_stiefelopt_declared"
_COUNT = {2: "two", 3: "three"}
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm)


def declare(module: nn.Module, name: str, **keys: Any) -> None:
    """Say what group keys a parameter of the module wants; layers call this for their factors.

    The key "role": "scale" marks a factor such as StelLA's S, whose learning rate is ``scale_lr``.
    """
    module.__dict__.setdefault(_DECLARED, {})[name] = keys
    p = module._parameters.get(name)
    if p is not None and keys.get("manifold"):
        mark(p)


def declared(module: nn.Module) -> Mapping[str, dict[str, Any]]:
    """What `declare` and `constrain` said about this module's own parameters."""
    return module.__dict__.get(_DECLARED, {})


@torch.no_grad()
def constrain(
    module: nn.Module,
    name: str,
    manifold: Manifold | Mapping[str, Any],
    *,
    init: str = "project",
    orientation: str | None = None,
    view: str | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Put a parameter on a manifold and declare it there, for `param_groups` to find.

    Said again of the same manifold, as after ``.double()``, it projects anew and keeps what was declared.

    Args:
        module: the module, or a parent of the one that holds the parameter.
        name: the parameter's name in it, dots allowed, for example "rnn.weight_hh_l0".
        manifold: a manifold or its spec.
        init: "project" (to the nearest point), "random" (Haar) or "keep" (it must be a point already). A sharded
            parameter takes "random", the same point on all ranks whatever their seeds, or "keep"; one on the meta
            device is declared, and gets its values later.
        orientation: "columns" or "rows"; default: tall -> columns, wide -> rows, square -> columns.
        view: above two dimensions, "matrix" or "batch"; see `RiemannianWrapper`.
        generator: for "random".

    Returns:
        The module.

    Raises:
        ConfigError: no such parameter, an unknown init, or a retraction that is a live function, which a module's
            copies and checkpoints cannot hold. ShapeError, NotOnManifoldError: it does not fit.
    """
    if not isinstance(module, nn.Module) or not isinstance(name, str):
        raise ConfigError(
            f"constrain takes a module and a parameter's name in it, got {type(module).__name__} and "
            f"{type(name).__name__}: constrain(model, 'rnn.weight_hh_l0', Stiefel())."
        )
    check_generator(generator)
    to_shards(module)
    owner, leaf, p = _find(module, name)
    manifold = from_spec(manifold)
    if manifold.parts > 1:
        raise ConfigError(
            f"a point of {type(manifold).__name__} is made of {_COUNT[manifold.parts]} parameters "
            f"{', '.join(manifold.point_type._fields)}, and constrain takes one: adapt a linear layer with "
            f"RiemannLoRALinear, pass lora='fixed-rank' to param_groups for PEFT's LoRA, or list the "
            f"{manifold.layout} in a group by hand."
        )
    said, spec = declared(owner).get(leaf, {}), manifold.spec()
    keys: dict[str, Any] = dict(said) if said.get("manifold") == spec else {"manifold": spec}
    now = {"orientation": orientation, "view": view}
    keys.update((key, value) for key, value in now.items() if value is not None)
    placement = read_placement(keys)
    if init not in ("project", "random", "keep"):
        raise ConfigError(f"init is {init!r}; use 'project', 'random' or 'keep'.")
    check_parameter_shape(name, p, placement)
    if not p.is_meta:  # else its values come later, as with torch.nn.init; the optimizer checks them
        _start(name, p, placement, init, generator)
    declare(owner, leaf, **keys)
    return module


def _find(module: nn.Module, name: str) -> tuple[nn.Module, str, nn.Parameter]:
    path, _, leaf = name.rpartition(".")
    p = None
    with contextlib.suppress(AttributeError):  # no such module
        owner = module.get_submodule(path)
        p = owner._parameters.get(leaf)
    if p is None:
        known = [n for n, _ in module.named_parameters()]
        shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        raise ConfigError(f"{type(module).__name__} has no parameter {name!r}; it has: {shown or 'none'}.")
    if isinstance(p, nn.parameter.UninitializedParameter):
        raise ConfigError(f"{name!r} has no shape yet; run the lazy module once, then constrain it.")
    return owner, leaf, p


def _start(name: str, p: Tensor, placement: Placement, init: str, generator: torch.Generator | None) -> None:
    """Give a parameter, or the part of it that lies here, its value."""
    over = sharding_of(name, [p], placement)
    if over is not None and init == "project":
        raise ConfigError(
            f"{name} is sharded, and init='project' needs the whole matrix: constrain it before fully_shard, or use "
            f"'random' or 'keep'."
        )
    if init == "keep":
        check_point(name, [p], placement)
    else:
        write_whole(p, _initial_point(name, p, placement, init, shared_generator(p, generator)))


def _initial_point(
    name: str, p: Tensor, placement: Placement, init: str, generator: torch.Generator | None
) -> Tensor:
    manifold: Any = placement.manifold
    if init == "random":
        shape = placement.tall_shape(p.shape)
        point = manifold.random_point(*shape, dtype=p.dtype, device=p.device, generator=generator)
    else:
        try:
            point = manifold.project_point(placement.as_tall(local(p)))
        except NotOnManifoldError as error:
            raise NotOnManifoldError(f"parameter {name!r}: {error}") from None
    return (point.mT if placement.is_rows(p.shape) else point).reshape(p.shape)


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    manifold_lr: float | None = None,
    scale_lr: float | None = None,
    trainable_only: bool = True,
    named: bool = False,
    lora: str | None = None,
) -> list[dict[str, Any]]:
    """Sort a model's parameters into plain groups for any torch optimizer.

    One group for each distinct declaration (manifold, scale, ...), without weight decay, also for parameters that carry
    their manifold (geoopt's, once ``stiefelopt.integrations.geoopt`` is imported); one for scale factors such
    as StelLA's S; one for decayed weights; one for biases and norms, not decayed.

    Args:
        model: any module, DDP-wrapped or not; call it after ``fully_shard``, which replaces parameters.
        lr: learning rate of all groups; None leaves the optimizer's default.
        weight_decay: for the decayed weights; None leaves the optimizer's default. Fixed-rank groups get it as
            "manifold_decay", which shrinks W = U S V^T (or B A) and is decoupled whatever the optimizer.
        manifold_lr: learning rate of manifold groups, default ``lr``.
        scale_lr: learning rate of scale factors, default ``lr``.
        trainable_only: leave out parameters that need no gradient.
        named: give (name, parameter) pairs, so that `residuals` and errors can speak names.
        lora: "fixed-rank" puts the factors of PEFT's plain LoRA layers on `FixedRankPair`, in one group that lists
            consecutive pairs lora_A, lora_B; the modules and their checkpoints stay plain LoRA. None leaves them alone.

    Returns:
        Groups, none of them empty.

    Raises:
        ConfigError: nothing to train, a fixed-rank point frozen in part, one shared parameter declared in two ways, an
            unknown ``lora``, or LoRA layers that are not plain (DoRA, embeddings, convolutions, ...).
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"an nn.Module is needed, got {type(model).__name__}; pass the model.")
    to_shards(model)
    if trainable_only:
        _check_whole(model)
    groups: list[dict[str, Any]] = []
    index: dict[str, dict[str, Any]] = {}
    seen: dict[int, str] = {}
    for name, p, keys in (*_lora_walk(model, lora, trainable_only), *_walk(model)):
        if trainable_only and not p.requires_grad:
            continue
        key, settings = _settings(p, keys, lr, weight_decay, manifold_lr, scale_lr)
        if id(p) in seen:
            if keys.get("manifold") and seen[id(p)] != key:
                raise ConfigError(f"the shared parameter {name!r} is declared in two ways; declare it once.")
            continue
        seen[id(p)] = key
        if key not in index:
            index[key] = {"params": [], **settings}
            groups.append(index[key])
        index[key]["params"].append((name, p) if named else p)
    if not groups:
        raise ConfigError(
            f"{type(model).__name__} has no parameter to train; unfreeze some (requires_grad_) or "
            "pass trainable_only=False."
        )
    return groups


def _lora_walk(
    model: nn.Module, lora: str | None, trainable_only: bool
) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """`_walk` over the LoRA pairs alone, A and B of one after the other."""
    if lora is None:
        return
    if lora != "fixed-rank":
        raise ConfigError(f"lora is {lora!r}; use 'fixed-rank', or leave it out.")
    keys = {"manifold": FixedRankPair().spec()}
    for pair in lora_pairs(model, trainable_only=trainable_only):
        yield pair.a_name, pair.a, keys
        yield pair.b_name, pair.b, keys


def _check_whole(model: nn.Module) -> None:
    """Refuse a point of which some factors are frozen: it moves as a whole or not at all."""
    for prefix, module in model.named_modules():
        factors = {
            leaf: module._parameters.get(leaf) for leaf, k in declared(module).items() if _is_fixed_rank(k)
        }
        frozen = [leaf for leaf, p in factors.items() if p is not None and not p.requires_grad]
        if frozen and len(frozen) < len(factors):
            raise ConfigError(
                f"{prefix or type(module).__name__} has {', '.join(frozen)} frozen and trains the rest of its "
                f"{', '.join(factors)}, which move as one point: set requires_grad of all three, or of none."
            )


def _walk(model: nn.Module) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """(name, parameter, declared keys), declared parameters first wherever a parameter is shared."""
    found = []
    for prefix, module in model.named_modules():
        said = declared(module)
        _check_present(prefix or type(module).__name__, module, said)
        exempt = isinstance(module, _NORMS) or "norm" in type(module).__name__.lower()
        for leaf, p in module._parameters.items():
            if p is not None:
                name = f"{prefix}.{leaf}" if prefix else leaf
                own = said.get(leaf) or _carried_keys(p)
                found.append((name, p, own or ({"role": "plain"} if exempt or p.ndim < 2 else {})))
    order = {id(p): keys for _, p, keys in found if keys.get("manifold")}
    for name, p, keys in found:
        yield name, p, keys if keys.get("manifold") else order.get(id(p), keys)


def _check_present(label: str, module: nn.Module, said: Mapping[str, dict[str, Any]]) -> None:
    """Refuse a module one of whose constrained parameters has gone, and another may have come in its place."""
    gone = [leaf for leaf, keys in said.items() if keys.get("manifold") and leaf not in module._parameters]
    if gone:
        raise ConfigError(
            f"{', '.join(gone)} of {label} was put on a manifold and is no parameter of it any more (prune, "
            f"parametrize, weight_norm, FSDP's flat parameters, del?): what has taken its place would be trained "
            f"without its constraint. Undo that, or make the module anew."
        )


def _carried_keys(p: Tensor) -> dict[str, Any]:
    """The keys of a parameter that carries its manifold; with one that no spec can hold, it goes on carrying it."""
    manifold = carried(p)
    if manifold is None:
        return {}
    try:
        return {"manifold": manifold.spec()}
    except ConfigError:
        return {"role": "manifold"}


def _is_fixed_rank(keys: Mapping[str, Any]) -> bool:
    return bool(keys.get("manifold")) and from_spec(keys["manifold"]).parts > 1


def _settings(
    p: Tensor,
    keys: dict[str, Any],
    lr: float | None,
    weight_decay: float | None,
    manifold_lr: float | None,
    scale_lr: float | None,
) -> tuple[str, dict[str, Any]]:
    """The key of a parameter's group and what the group says."""
    if scale_lr is not None and _is_fixed_rank(keys):
        raise ConfigError(
            "scale_lr is for factors S with a group of their own (StelLALinear); on FixedRank the factors move as one "
            "point with one learning rate: use manifold_lr."
        )
    role = keys.get("role", "manifold" if keys.get("manifold") else "decayed")
    own_lr = {"manifold": manifold_lr, "scale": scale_lr}.get(role)
    # A copy: groups may be edited in place, declarations stay.
    settings: dict[str, Any] = copy.deepcopy({k: v for k, v in keys.items() if k != "role"})
    rate = lr if own_lr is None else own_lr
    if rate is not None:
        settings["lr"] = rate
    decay = weight_decay if role in ("decayed", "scale") else 0.0
    if decay is not None:
        settings["weight_decay"] = decay
    if weight_decay is not None and _is_fixed_rank(keys):
        settings["manifold_decay"] = weight_decay
    return f"{role} {sorted(keys.items(), key=str)}", settings
