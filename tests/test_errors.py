"""Bad input, one table: the error's class, that it names the thing and the way out, and that nothing has changed."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import stiefelopt
from stiefelopt import (
    USV,
    BlockAdam,
    ConfigError,
    FixedRank,
    NotOnManifoldError,
    RiemannianWrapper,
    Riemannion,
    RiemannLoRALinear,
    ShapeError,
    StelLALinear,
    StepError,
    Stiefel,
    StiefelOptError,
    UnknownNameError,
    adapt,
    adapter_state_dict,
    attach,
    constrain,
    export_lora,
    import_lora,
    load_adapter_state_dict,
    loi_init,
    manifolds,
    merge_adapters,
    metrics,
    param_groups,
    projections,
    rank_retractions,
    retractions,
    transports,
)

torch.set_num_threads(1)

# What the type checker would refuse already.
AnyStiefel: Any = Stiefel
AnyFixedRank: Any = FixedRank
AnyWrapper: Any = RiemannianWrapper
from_spec: Any = manifolds.from_spec
register_metric: Any = metrics.register
any_param_groups: Any = param_groups

FAMILIES: dict[str, Any] = {
    "retraction": retractions,
    "fixed-rank retraction": rank_retractions,
    "metric": metrics,
    "transport": transports,
    "projection": projections,
    "manifold": manifolds,
}


class World:
    """Everything that a refused call could have changed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.point = nn.Parameter(Stiefel().random_point(8, 3))
        self.other = nn.Parameter(Stiefel().random_point(6, 2))
        self.off = nn.Parameter(torch.ones(8, 3))
        self.vector = nn.Parameter(torch.ones(4))
        self.kernel = nn.Parameter(Stiefel().random_point(12, 8).mT.reshape(8, 3, 2, 2).clone())
        self.integer = nn.Parameter(torch.eye(4, 2, dtype=torch.int64), requires_grad=False)
        self.imaginary = nn.Parameter(torch.eye(4, 2, dtype=torch.complex64))
        self.x, self.u = Stiefel().random_point(7, 3), torch.zeros(7, 3)
        self.usv = [nn.Parameter(t) for t in FixedRank().random_point(8, 6, rank=3)]
        self.step = USV(torch.zeros(8, 3), torch.zeros(3, 3), torch.zeros(6, 3))
        self.module = nn.ModuleDict(
            {
                "query": nn.Linear(6, 6),
                "value": nn.Linear(6, 4),
                "embed": nn.Embedding(5, 6),
                "norm": nn.LayerNorm(6),
                "conv": nn.Conv2d(2, 3, 2),
            }
        )
        self.adapted = nn.Sequential(StelLALinear(nn.Linear(6, 5), 2), nn.Linear(5, 5))
        self.riemann = nn.Sequential(RiemannLoRALinear(nn.Linear(6, 5), 2), nn.Linear(5, 5))
        self.watched: list[Any] = []

    def watch(self, thing: Any) -> Any:
        self.watched.append(thing)
        return thing

    def gradient(self) -> Tensor:
        assert self.point.grad is not None
        return self.point.grad

    def sgd(self, *params: Any, **keys: Any) -> Optimizer:
        """SGD over one group of these parameters."""
        return self.watch(SGD([{"params": list(params), **keys}], lr=0.1, momentum=0.9))

    def wrapped(self, *params: Any, **options: Any) -> RiemannianWrapper:
        """A wrapper that has stepped twice, with gradients in place."""
        wrapper = self.watch(
            RiemannianWrapper(self.sgd(*(params or (self.point, self.other))), Stiefel(), **options)
        )
        for step in range(3):
            for p in wrapper.param_groups[0]["params"]:
                p.grad = torch.full_like(p, 0.1 * (step + 1)).cumsum(0)
            if step < 2:
                wrapper.step()
        return wrapper

    def spoiled(self, value: float) -> RiemannianWrapper:
        """The same with a bad number in the second parameter's gradient."""
        wrapper = self.wrapped()
        assert self.other.grad is not None
        self.other.grad[0, 0] = value
        return wrapper

    def attached(self) -> Optimizer:
        optimizer = self.sgd(self.point)
        attach(optimizer, Stiefel())
        self.point.grad = torch.ones_like(self.point)
        return optimizer


def picture(thing: Any) -> Any:
    """All of an object's state that we could have changed, comparable with ==."""
    if isinstance(thing, Tensor):
        t = thing.detach()
        grad = None if thing.grad is None else (id(thing.grad), picture(thing.grad))
        values = t.to_dense() if t.layout != torch.strided else t
        return (thing.dtype, thing.requires_grad, grad, repr(values.tolist()))
    if isinstance(thing, nn.Module):
        modules = {n: (id(m), type(m), sorted(m.__dict__)) for n, m in thing.named_modules()}
        return (modules, {n: picture(p) for n, p in (*thing.named_parameters(), *thing.named_buffers())})
    if isinstance(thing, Optimizer):
        groups = [{k: v for k, v in g.items() if k != "params"} for g in thing.param_groups]
        params = [[(id(p), picture(p)) for p in g["params"]] for g in thing.param_groups]
        state = [
            {k: picture(v) for k, v in thing.state.get(p, {}).items()}
            for g in thing.param_groups
            for p in g["params"]
        ]
        hooks = len(thing._optimizer_step_pre_hooks), len(thing._optimizer_step_post_hooks)
        return (copy.deepcopy(groups), params, state, hooks)
    if isinstance(thing, World):
        own = {k: picture(v) for k, v in vars(thing).items() if k != "watched"}
        return (own, [picture(w) for w in thing.watched])
    return repr(thing)


@dataclass(frozen=True)
class Case:
    """setup(world) makes what act then misuses."""

    error: type[StiefelOptError]
    names: str
    way_out: str
    act: Callable[[Any], object]
    setup: Callable[[World], Any] = lambda w: w


def wrap(o: Any) -> object:
    return RiemannianWrapper(o, Stiefel())


def wrap_own(o: Any) -> object:
    return RiemannianWrapper(o)


def step(o: Optimizer) -> object:
    return o.step()


def plain_function(x: Tensor, u: Tensor) -> Tensor:
    return x


def sparse(w: World) -> RiemannianWrapper:
    wrapper = w.wrapped()
    w.other.grad = torch.ones(6, 2).to_sparse()
    return wrapper


def function_wrapper(w: World) -> RiemannianWrapper:
    return RiemannianWrapper(w.sgd(w.point), Stiefel(retraction=plain_function))


def replaced_spec(key: str, value: object) -> Callable[[World], Any]:
    def setup(w: World) -> Any:
        wrapper = w.wrapped()
        wrapper.param_groups[0][key] = value
        return wrapper

    return setup


ON_GROUPS: dict[str, Case] = {
    "a vector": Case(
        ShapeError,
        r"parameter 0 of group 0.*vector.*\(4,\)",
        r"param_groups",
        wrap,
        lambda w: w.sgd(w.vector),
    ),
    "a named vector": Case(
        ShapeError, r"'head\.bias'.*vector", r"param_groups", wrap, lambda w: w.sgd(("head.bias", w.vector))
    ),
    "a vector behind a point": Case(
        ShapeError, r"parameter 1 of group 0", r"param_groups", wrap, lambda w: w.sgd(w.point, w.vector)
    ),
    "an integer parameter": Case(
        ShapeError, r"parameter 0 of group 0.*int64", r"float", wrap, lambda w: w.sgd(w.integer)
    ),
    "a complex parameter": Case(
        ShapeError, r"parameter 0 of group 0.*complex64", r"real", wrap, lambda w: w.sgd(w.imaginary)
    ),
    "a kernel without a view": Case(
        ConfigError,
        r"parameter 0 of group 0.*4 dimensions",
        r"view='matrix'.*view='batch'",
        wrap,
        lambda w: w.sgd(w.kernel),
    ),
    "not orthonormal": Case(
        NotOnManifoldError, r"parameter 0 of group 0", r"constrain", wrap, lambda w: w.sgd(w.off)
    ),
    "NaN in the point": Case(
        NotOnManifoldError,
        r"parameter 0 of group 0.*nan",
        r"constrain|project",
        wrap,
        lambda w: w.sgd(w.watch(nn.Parameter(torch.full((4, 2), math.nan)))),
    ),
    "an unknown view": Case(
        ConfigError, r"'view'.*'flat'", r"'matrix' or 'batch'", wrap, lambda w: w.sgd(w.kernel, view="flat")
    ),
    "an unknown orientation": Case(
        ConfigError,
        r"'orientation'.*'tall'",
        r"'columns' or 'rows'",
        wrap,
        lambda w: w.sgd(w.point, orientation="tall"),
    ),
    "an orientation that does not fit": Case(
        ShapeError,
        r"parameter 0 of group 0.*8 x 3",
        r"orientation='columns'",
        wrap,
        lambda w: w.sgd(w.point, orientation="rows"),
    ),
    "a scale of zero": Case(
        ConfigError,
        r"displacement_scale is 0",
        r"positive number",
        wrap,
        lambda w: w.sgd(w.point, displacement_scale=0),
    ),
    "a scale that is not finite": Case(
        ConfigError,
        r"displacement_scale is nan",
        r"positive",
        wrap,
        lambda w: w.sgd(w.point, displacement_scale=math.nan),
    ),
    "an unknown scale": Case(
        ConfigError,
        r"displacement_scale is 'Stella'",
        r"'stella'",
        wrap,
        lambda w: w.sgd(w.point, displacement_scale="Stella"),
    ),
    "StelLA's scale without its d": Case(
        ConfigError,
        r"reference_dim is None",
        r"reference_dim=768",
        wrap,
        lambda w: w.sgd(w.point, displacement_scale="stella"),
    ),
    "a negative d": Case(
        ConfigError,
        r"reference_dim is -4",
        r"reference_dim=768",
        wrap,
        lambda w: w.sgd(w.point, displacement_scale="stella", reference_dim=-4),
    ),
    "an unknown direction": Case(
        ConfigError, r"'direction'.*'muon'", r"'plain'", wrap, lambda w: w.sgd(w.point, direction="muon")
    ),
    "a FixedRank key": Case(
        ConfigError,
        r"'gradient'.*FixedRank",
        r"leave it out",
        wrap,
        lambda w: w.sgd(w.point, gradient="projected"),
    ),
    "a manifold by its name": Case(
        ConfigError, r"'Stiefel'", r"Stiefel\(\)", wrap_own, lambda w: w.sgd(w.point, manifold="Stiefel")
    ),
    "a manifold's class": Case(
        ConfigError, r"Stiefel", r"Stiefel\(\)", wrap_own, lambda w: w.sgd(w.point, manifold=Stiefel)
    ),
    "a spec with an unknown name": Case(
        UnknownNameError,
        r"'Flag'.*'Stiefel'",
        r"register",
        wrap_own,
        lambda w: w.sgd(w.point, manifold={"manifold": "Flag"}),
    ),
    "a spec with an unknown option": Case(
        ConfigError,
        r"'curvature'",
        r"Stiefel",
        wrap_own,
        lambda w: w.sgd(w.point, manifold={"manifold": "Stiefel", "curvature": 1}),
    ),
    "coupled decay": Case(
        ConfigError,
        r"group 0.*weight_decay=0\.1.*SGD",
        r"weight_decay=0.*AdamW",
        wrap,
        lambda w: w.sgd(w.point, weight_decay=0.1),
    ),
    "coupled decay in Adam": Case(
        ConfigError,
        r"group 0.*weight_decay=0\.01.*Adam",
        r"weight_decay=0.*AdamW",
        wrap,
        lambda w: w.watch(Adam([w.point], weight_decay=0.01)),
    ),
    "a bad group behind a good one": Case(
        ShapeError,
        r"parameter 0 of group 1",
        r"param_groups",
        wrap,
        lambda w: w.watch(AdamW([{"params": [w.point]}, {"params": [w.vector]}])),
    ),
    "the same, attached": Case(
        ShapeError,
        r"parameter 0 of group 1",
        r"param_groups",
        lambda o: attach(o, Stiefel()),
        lambda w: w.watch(AdamW([{"params": [w.point]}, {"params": [w.vector]}])),
    ),
}

ON_WRAPPING: dict[str, Case] = {
    "Riemannion on one tensor": Case(
        ConfigError, r"list of parameters", r"param_groups\(model\)", lambda w: Riemannion(w.point)
    ),
    "Riemannion on nothing": Case(ConfigError, r"empty list", r"param_groups", lambda w: Riemannion([])),
    "Riemannion with a momentum of 1": Case(
        ConfigError, r"momentum is 1", r"\[0, 1\)", lambda w: Riemannion([w.point], momentum=1)
    ),
    "Riemannion on two of three factors": Case(
        ConfigError,
        r"lists 2 parameters",
        r"triples U, S, V",
        lambda w: Riemannion([{"params": [w.point, w.other], "manifold": FixedRank()}]),
    ),
    "BlockAdam with a beta of 1": Case(
        ConfigError, r"betas=\(1\.0, 0\.9\)", r"\[0, 1\)", lambda w: BlockAdam([w.point], betas=(1.0, 0.9))
    ),
    "a group without parameters": Case(
        ConfigError,
        r"key 'params'.*'parms'",
        r"'params'",
        lambda w: RiemannianWrapper(AdamW([w.point])).add_param_group(
            {"parms": [w.other], "manifold": Stiefel()}
        ),
    ),
    "constrain on no module": Case(
        ConfigError,
        r"int",
        r"module.*name",
        lambda w: constrain(3, "weight", Stiefel()),  # type: ignore[arg-type]
    ),
    "a seed for a generator": Case(
        ConfigError,
        r"generator is 3",
        r"manual_seed\(3\)",
        lambda w: constrain(w.module, "query.weight", Stiefel(), init="random", generator=3),  # type: ignore[arg-type]
    ),
    "an optimizer's class": Case(ConfigError, r"class AdamW", r"instance.*AdamW\(", lambda w: wrap(AdamW)),
    "no optimizer": Case(
        ConfigError, r"Linear", r"torch\.optim\.Optimizer", lambda w: wrap(w.module["query"])
    ),
    "a scheduler": Case(
        ConfigError,
        r"StepLR",
        r"torch\.optim\.Optimizer",
        lambda s: wrap(s),
        lambda w: torch.optim.lr_scheduler.StepLR(w.sgd(w.point), 1),
    ),
    "wrapping twice": Case(ConfigError, r"wrapped already", r"add_param_group", wrap, lambda w: w.wrapped()),
    "attaching to a wrapper": Case(
        ConfigError, r"wrapped already", r"add_param_group", attach, lambda w: w.wrapped()
    ),
    "attaching twice": Case(ConfigError, r"attached already", r"remove\(\)", attach, lambda w: w.attached()),
    "wrapping what is attached": Case(
        ConfigError, r"attached already", r"remove\(\)", wrap, lambda w: w.attached()
    ),
    "LBFGS": Case(ConfigError, r"LBFGS", r"use SGD", wrap, lambda w: w.watch(torch.optim.LBFGS([w.point]))),
    "SparseAdam": Case(
        ConfigError, r"SparseAdam", r"use Adam", wrap, lambda w: w.watch(torch.optim.SparseAdam([w.point]))
    ),
    "an unknown nonfinite": Case(
        ConfigError,
        r"nonfinite is 'ignore'",
        r"'raise', 'restore' or 'skip'",
        lambda o: RiemannianWrapper(o, nonfinite="ignore"),
        lambda w: w.sgd(w.point),
    ),
    "moments as one string": Case(
        ConfigError,
        r"moments.*'exp_avg'",
        r"list|\[",
        lambda o: RiemannianWrapper(o, moments="exp_avg"),
        lambda w: w.sgd(w.point),
    ),
    "the manifold's class": Case(
        ConfigError,
        r"Stiefel",
        r"Stiefel\(\)",
        lambda o: AnyWrapper(o, Stiefel),
        lambda w: w.sgd(w.point),
    ),
}

ON_LIVE: dict[str, Case] = {
    "a group that is no dict": Case(
        ConfigError,
        r"group is a dict.*list",
        r"'params'",
        lambda o: o.add_param_group([nn.Parameter(torch.ones(3))]),
        lambda w: w.wrapped(),
    ),
    "a set of parameters": Case(
        ConfigError,
        r"set",
        r"list",
        lambda o: o.add_param_group({"params": {torch.ones(3)}}),
        lambda w: w.wrapped(),
    ),
    "an added vector": Case(
        ShapeError,
        r"parameter 0 of group 1",
        r"param_groups",
        lambda o: o.add_param_group({"params": torch.ones(3)}),
        lambda w: w.wrapped(),
    ),
    "added off the manifold": Case(
        NotOnManifoldError,
        r"parameter 0 of group 1",
        r"constrain",
        lambda o: o.add_param_group({"params": [torch.ones(3, 2)]}),
        lambda w: w.wrapped(),
    ),
    "added with coupled decay": Case(
        ConfigError,
        r"group 1.*weight_decay=0\.5",
        r"weight_decay=0",
        lambda o: o.add_param_group({"params": [torch.eye(4, 2)], "weight_decay": 0.5}),
        lambda w: w.wrapped(),
    ),
    "NaN in a gradient": Case(
        StepError,
        r"\(0, 1\).*not finite",
        r"nothing has changed.*clip.*'skip'",
        step,
        lambda w: w.spoiled(math.nan),
    ),
    "Inf in a gradient": Case(
        StepError, r"\(0, 1\).*not finite", r"clip", step, lambda w: w.spoiled(math.inf)
    ),
    "overflow in the small matrices": Case(StepError, r"\(0, 1\)", r"clip", step, lambda w: w.spoiled(3e38)),
    "a sparse gradient": Case(ConfigError, r"\(0, 1\).*sparse", r"sparse=False", step, sparse),
    "an unknown retraction set between steps": Case(
        UnknownNameError,
        r"'poler'",
        r"'polar'",
        step,
        replaced_spec("manifold", {"manifold": "Stiefel", "retraction": "poler"}),
    ),
    "a class set between steps": Case(
        ConfigError, r"Stiefel", r"Stiefel\(\)", step, replaced_spec("manifold", Stiefel)
    ),
    "an orientation set between steps": Case(
        ShapeError,
        r"parameter 0 of group 0.*8 x 3",
        r"orientation='columns'",
        step,
        replaced_spec("orientation", "rows"),
    ),
    "a closure for an attached optimizer": Case(
        ConfigError, r"closure", r"RiemannianWrapper", lambda o: o.step(lambda: 0.0), lambda w: w.attached()
    ),
    "saving a plain function": Case(
        ConfigError,
        r"retraction=<function plain_function",
        r"register",
        lambda o: o.state_dict(),
        function_wrapper,
    ),
}


def get_nope(family: str, _: World) -> object:
    return FAMILIES[family].get("nope")


def make_nope(family: str, _: World) -> object:
    return AnyStiefel(**{family: "nope"})


ON_PARTS: dict[str, Case] = {
    **{
        f"an unknown {family}": Case(
            UnknownNameError, rf"unknown {family} 'nope'", r"known: '", partial(get_nope, family)
        )
        for family in FAMILIES
    },
    **{
        f"Stiefel with an unknown {family}": Case(
            UnknownNameError, rf"unknown {family} 'nope'", r"known: '", partial(make_nope, family)
        )
        for family in FAMILIES
        if family not in ("manifold", "fixed-rank retraction")
    },
    "a near miss": Case(
        UnknownNameError, r"'caley'", r"Did you mean 'cayley'", lambda w: Stiefel(retraction="caley")
    ),
    "a retraction that is a number": Case(
        ConfigError, r"retraction=3", r"'polar'", lambda w: AnyStiefel(retraction=3)
    ),
    "a metric that is a function": Case(
        ConfigError, r"metric=<function", r"'canonical'", lambda w: AnyStiefel(metric=plain_function)
    ),
    "replace with an unknown option": Case(
        ConfigError, r"'curvature'", r"metric, retraction", lambda w: Stiefel().replace(curvature=1)
    ),
    "a spec that is a string": Case(
        ConfigError, r"'Stiefel'", r"Stiefel\(\)\.spec\(\)", lambda w: from_spec("Stiefel")
    ),
    "a taken name": Case(
        ConfigError,
        r"'polar' is taken",
        r"another name",
        lambda w: retractions.register("polar")(plain_function),
    ),
    "the name none": Case(
        ConfigError,
        r"'none' is taken",
        r"another name",
        lambda w: transports.register("none")(plain_function),
    ),
    "an empty name": Case(
        ConfigError,
        r"metric.*''",
        r"non-empty string",
        lambda w: register_metric("", inner=plain_function)(plain_function),
    ),
    "an unknown form": Case(
        ConfigError, r"'mine'.*'dense'", r"'gram'", lambda w: retractions.register("mine", form="dense")
    ),
    "exp of an unknown metric": Case(
        UnknownNameError, r"'nope'", r"'canonical'", lambda w: retractions.exp(w.x, w.u, metric="nope")
    ),
}

ON_TENSORS: dict[str, Case] = {
    "mismatched shapes": Case(
        ShapeError,
        r"u has shape \(6, 3\), x has \(7, 3\)",
        r"must agree",
        lambda w: Stiefel().retract(w.x, w.u[1:]),
    ),
    "mismatched dtypes": Case(
        ShapeError, r"u has dtype torch.float64", r"\.to\(", lambda w: retractions.qr(w.x, w.u.double())
    ),
    "mismatched batches": Case(
        ShapeError,
        r"v has shape \(2, 7, 3\)",
        r"expand",
        lambda w: Stiefel().inner(w.x, w.u, w.u.expand(2, 7, 3)),
    ),
    "a wide matrix": Case(ShapeError, r"x has shape \(3, 7\)", r"\.mT", lambda w: Stiefel().check(w.x.mT)),
    "a vector for a matrix": Case(
        ShapeError, r"z has shape \(7,\)", r"\[:, None\]", lambda w: Stiefel().project_point(w.x[:, 0])
    ),
    "an integer matrix": Case(
        ShapeError, r"z is torch\.int64", r"\.float\(\)", lambda w: projections.polar_factor(w.x.long())
    ),
    "a complex matrix": Case(ShapeError, r"complex64", r"real", lambda w: Stiefel().project_point(w.x + 0j)),
    "a list": Case(ShapeError, r"x is a list", r"tensor", lambda w: AnyStiefel().residual([[1.0]])),
    "a numpy array": Case(
        ShapeError, r"egrad is a ndarray", r"tensor", lambda w: Stiefel().gradient(w.x, w.u.numpy())
    ),
    "NaN projected to a point": Case(
        NotOnManifoldError, r"z holds NaN", r"look", lambda w: Stiefel().project_point(w.x * math.nan)
    ),
    "no point": Case(NotOnManifoldError, r"x has max", r"project_point", lambda w: Stiefel().check(2 * w.x)),
    "a shape of one number": Case(ShapeError, r"\(7,\)", r"\(64, 8\)", lambda w: Stiefel().random_point(7)),
    "a wide shape": Case(ShapeError, r"\(3, 7\)", r"n >= p", lambda w: Stiefel().random_point(3, 7)),
    "a negative size": Case(ShapeError, r"-7", r"n >= p|positive", lambda w: Stiefel().random_point(-7, 3)),
    "the dimension of a wide shape": Case(ShapeError, r"\(3, 7\)", r"n >= p", lambda w: Stiefel().dim(3, 7)),
    "an integer point": Case(
        ShapeError, r"int32", r"floating", lambda w: Stiefel().random_point(7, 3, dtype=torch.int32)
    ),
    "a step beyond the radius": Case(
        StepError,
        r"newton_schulz",
        r"learning rate|polar",
        lambda w: retractions.newton_schulz(w.x, 50 + w.u),
    ),
    "a step of NaN": Case(
        StepError, r"nan", r"learning rate|clip", lambda w: retractions.polar(w.x, w.u + math.nan)
    ),
    "coefficients of an ambient retraction": Case(
        ConfigError,
        r"'svd'.*ambient",
        r"call it on",
        lambda w: retractions.svd.coefficients(torch.eye(2), torch.eye(2)),
    ),
}


def layer(base: nn.Module, *args: Any, **options: Any) -> object:
    return StelLALinear(base, *args, **options)


ON_LAYERS: dict[str, Case] = {
    "rank 0": Case(ConfigError, r"rank is 0", r"from 1 to 4", lambda w: layer(w.module["value"], 0)),
    "a rank above the size": Case(
        ConfigError, r"rank is 5", r"from 1 to 4", lambda w: layer(w.module["value"], 5)
    ),
    "a rank that is no integer": Case(
        ConfigError, r"rank is 2\.0", r"integer", lambda w: layer(w.module["value"], 2.0)
    ),
    "a rank that is a bool": Case(
        ConfigError, r"rank is True", r"integer", lambda w: layer(w.module["value"], True)
    ),
    "alpha 0": Case(ConfigError, r"alpha is 0", r"positive", lambda w: layer(w.module["value"], 2, 0)),
    "alpha NaN": Case(
        ConfigError, r"alpha is nan", r"positive", lambda w: layer(w.module["value"], 2, math.nan)
    ),
    "alpha as a string": Case(
        ConfigError, r"alpha is '8'", r"positive", lambda w: layer(w.module["value"], 2, "8")
    ),
    "dropout 1": Case(
        ConfigError, r"dropout is 1", r"\[0, 1\)", lambda w: layer(w.module["value"], 2, dropout=1.0)
    ),
    "dropout below 0": Case(
        ConfigError, r"dropout is -0\.1", r"\[0, 1\)", lambda w: layer(w.module["value"], 2, dropout=-0.1)
    ),
    "an unknown init": Case(
        ConfigError, r"'ortho'", r"'pseudo-zero'", lambda w: layer(w.module["value"], 2, init="ortho")
    ),
    "reference_dim 0": Case(
        ConfigError,
        r"reference_dim.*0",
        r"positive|hidden size",
        lambda w: layer(w.module["value"], 2, reference_dim=0),
    ),
    "a base that is not linear": Case(
        ConfigError, r"Embedding", r"nn\.Linear", lambda w: layer(w.module["embed"], 2)
    ),
    "a base that is a convolution": Case(
        ConfigError, r"Conv2d", r"nn\.Linear", lambda w: layer(w.module["conv"], 2)
    ),
    "a base that is adapted": Case(
        ConfigError, r"StelLALinear", r"merge_adapters|base", lambda w: layer(w.adapted[0], 2)
    ),
    "adapt without targets that match": Case(
        ConfigError, r"'q_proj'", r"query", lambda w: adapt(w.module, target_modules=["q_proj"], r=2)
    ),
    "adapt without a rank": Case(
        ConfigError, r"rank", r"r=16", lambda w: adapt(w.module, target_modules=["query"])
    ),
    "adapt on a norm": Case(
        ConfigError, r"LayerNorm", r"nn\.Linear", lambda w: adapt(w.module, target_modules=["norm"], r=2)
    ),
    "adapt with one rank too large": Case(
        ConfigError,
        r"rank is 5",
        r"from 1 to 4",
        lambda w: adapt(w.module, target_modules="all-linear", r=5, init="pseudo-zero"),
    ),
    "adapt with a bad expression": Case(
        ConfigError,
        r"'query\['",
        r"regular expression",
        lambda w: adapt(w.module, target_modules="query[", r=2),
    ),
    "adapt twice": Case(
        ConfigError,
        r"adapted already",
        r"merge_adapters",
        lambda w: adapt(w.adapted, target_modules=["1"], r=2),
    ),
    "a module to save that is none": Case(
        ConfigError,
        r"modules_to_save.*'score'",
        r"module",
        lambda w: adapt(w.module, target_modules=["query"], modules_to_save=["score"], r=2),
    ),
    "modules to save as one string": Case(
        ConfigError,
        r"modules_to_save.*'norm'",
        r"list|\[",
        lambda w: adapt(w.module, target_modules=["query"], modules_to_save="norm", r=2),
    ),
    "merging a plain model": Case(
        ConfigError, r"ModuleDict holds no adapted layer", r"adapt\(", lambda w: merge_adapters(w.module)
    ),
    "the adapter state of a plain model": Case(
        ConfigError, r"ModuleDict holds no adapted layer", r"adapt\(", lambda w: adapter_state_dict(w.module)
    ),
    "an adapter state with other names": Case(
        ConfigError,
        r"unknown \['1\.U'\]",
        r"targets",
        lambda w: load_adapter_state_dict(w.adapted, {"1.U": torch.zeros(2)}),
    ),
    "an adapter state of another rank": Case(
        ConfigError,
        r"\(5, 1\).*\(5, 2\)",
        r"rank",
        lambda w: load_adapter_state_dict(
            w.adapted, {**adapter_state_dict(w.adapted), "0.U": torch.zeros(5, 1)}
        ),
    ),
    "exporting a plain model": Case(
        ConfigError,
        r"ModuleDict holds no adapted layer",
        r"adapt\(",
        lambda w: export_lora(w.module, "/nonexistent/out"),
    ),
    "importing from nowhere": Case(
        ConfigError,
        r"/nonexistent",
        r"save_pretrained",
        lambda w: import_lora(w.module, Path("/nonexistent")),
    ),
    "constrain what is not there": Case(
        ConfigError,
        r"'query\.wieght'",
        r"query\.weight",
        lambda w: constrain(w.module, "query.wieght", Stiefel()),
    ),
    "constrain a bias": Case(
        ShapeError, r"query\.bias.*vector", r"matri", lambda w: constrain(w.module, "query.bias", Stiefel())
    ),
    "constrain a kernel without a view": Case(
        ConfigError,
        r"conv\.weight.*4 dimensions",
        r"view='matrix'",
        lambda w: constrain(w.module, "conv.weight", Stiefel()),
    ),
    "constrain and keep what is off": Case(
        NotOnManifoldError,
        r"query\.weight",
        r"project",
        lambda w: constrain(w.module, "query.weight", Stiefel(), init="keep"),
    ),
    "constrain with an unknown init": Case(
        ConfigError,
        r"'haar'",
        r"'random'",
        lambda w: constrain(w.module, "query.weight", Stiefel(), init="haar"),
    ),
    "constrain with a plain function": Case(
        ConfigError,
        r"retraction=<function plain_function",
        r"register",
        lambda w: constrain(w.module, "query.weight", Stiefel(retraction=plain_function)),
    ),
    "param_groups of a frozen model": Case(
        ConfigError,
        r"Linear has no parameter to train",
        r"requires_grad_",
        lambda m: param_groups(m),
        lambda w: w.module["query"].requires_grad_(False),
    ),
    "a point frozen in part": Case(
        ConfigError,
        r"'?0'? has S frozen",
        r"requires_grad of all three",
        lambda m: param_groups(m),
        lambda w: (w.riemann[0].S.requires_grad_(False), w.riemann)[1],
    ),
    "a learning rate for S alone": Case(
        ConfigError, r"scale_lr.*FixedRank", r"manifold_lr", lambda w: param_groups(w.riemann, scale_lr=0.1)
    ),
    "an unknown correction": Case(
        ConfigError,
        r"correction is 'folded'",
        r"'fold', 'keep', 'none'",
        lambda w: adapt(
            w.module, RiemannLoRALinear, target_modules=["query"], r=2, correction="folded", reference_dim=6
        ),
    ),
    "an init of the other layer": Case(
        ConfigError,
        r"init is 'pseudo-zero'",
        r"'random', 'loi'",
        lambda w: RiemannLoRALinear(w.module["query"], 2, init="pseudo-zero"),
    ),
    "a start without rank": Case(
        ConfigError,
        r"scale is 0",
        r"other than 0",
        lambda w: RiemannLoRALinear(w.module["query"], 2, scale=0),
    ),
    "folding into half precision": Case(
        ConfigError,
        r"'fold'.*bfloat16",
        r"'keep'",
        lambda base: RiemannLoRALinear(base, 2, correction="fold"),
        lambda w: w.module["query"].bfloat16(),
    ),
    "half of a correction": Case(
        ConfigError,
        r"V0 is missing",
        r"together",
        lambda w: load_adapter_state_dict(
            w.riemann, {k: t for k, t in adapter_state_dict(w.riemann).items() if k != "0.V0"}
        ),
    ),
    "loi_init of the other layer": Case(
        ConfigError,
        r"no RiemannLoRALinear",
        r"adapt\(",
        lambda w: loi_init(w.adapted, lambda: w.adapted(torch.ones(2, 6)).sum()),
    ),
    "loi_init of a number": Case(
        ConfigError,
        r"scalar loss with its graph",
        r"no \.item\(\)",
        lambda w: loi_init(
            w.riemann, lambda: w.riemann(torch.ones(2, 6)).sum().item(), generator=torch.Generator()
        ),
    ),
    "loi_init at zero": Case(
        ConfigError,
        r"scale is 0\.0",
        r"other than 0",
        lambda w: loi_init(w.riemann, lambda: w.riemann(torch.ones(2, 6)).sum(), scale=0.0),
    ),
    "loi_init on NaN": Case(
        StepError,
        r"gradient at 0 is not finite",
        r"the loss and the batch",
        lambda w: loi_init(
            w.riemann, lambda: w.riemann(torch.ones(2, 6)).sum() * math.nan, generator=torch.Generator()
        ),
    ),
    "param_groups of a list": Case(
        ConfigError,
        r"list",
        r"[mM]odule",
        lambda w: any_param_groups([w.point]),
    ),
}


def wrap_rank(o: Any) -> object:
    return RiemannianWrapper(o, FixedRank())


def with_part(part: int, change: Callable[[Tensor], Tensor]) -> Callable[[World], Optimizer]:
    """SGD over the triple with one factor changed."""

    def setup(w: World) -> Optimizer:
        made = nn.Parameter(change(w.usv[part].detach()), requires_grad=False)
        return w.sgd(*w.usv[:part], w.watch(made), *w.usv[part + 1 :])

    return setup


def rank_lost(w: World) -> RiemannianWrapper:
    """A wrapper whose next step would leave S singular."""
    s = w.usv[1].detach()
    for p in w.usv:
        p.grad = torch.zeros_like(p)
    w.usv[1].grad = torch.diag(torch.tensor([0.0, 0.0, 1.0])) @ s
    # No momentum: a refused move leaves the inner optimizer's moments changed, which is documented.
    inner = w.watch(SGD([{"params": w.usv, "gradient": "projected"}], lr=1.0))
    return RiemannianWrapper(inner, FixedRank())


def make_floor(floor: object, _: World) -> object:
    return AnyFixedRank(floor=floor)


ON_FIXED_RANK: dict[str, Case] = {
    "two parameters": Case(
        ConfigError,
        r"group 0.*2 parameters",
        r"U, S, V.*param_groups",
        wrap_rank,
        lambda w: w.sgd(*w.usv[:2]),
    ),
    "factors of different ranks": Case(
        ShapeError,
        r"parameter 0 of group 0.*\(8, 3\), \(3, 3\), \(6, 2\)",
        r"\(\*b, m, r\).*are needed",
        wrap_rank,
        with_part(2, lambda v: v[:, :2].clone()),
    ),
    "factors in the wrong order": Case(
        ShapeError,
        r"parameter 0 of group 0",
        r"are needed",
        wrap_rank,
        lambda w: w.sgd(*w.usv[::-1][1:], w.usv[2]),
    ),
    "factors of different dtypes": Case(
        ShapeError, r"x\.V is torch\.float64", r"\.to\(", wrap_rank, with_part(2, lambda v: v.double())
    ),
    "a wide factor": Case(
        ShapeError, r"3 x 6|\(3, 6\)", r"transpose", wrap_rank, with_part(2, lambda v: v.mT.clone())
    ),
    "a singular S": Case(
        NotOnManifoldError,
        r"parameter 0 of group 0: S is singular",
        r"orthogonal S|smaller rank",
        wrap_rank,
        with_part(1, lambda s: s * torch.tensor([1.0, 1.0, 0.0])),
    ),
    "S = 0": Case(
        NotOnManifoldError, r"S is singular", r"small multiple", wrap_rank, with_part(1, torch.zeros_like)
    ),
    "NaN in S": Case(
        NotOnManifoldError, r"S holds NaN", r"look", wrap_rank, with_part(1, lambda s: s * math.nan)
    ),
    "a V off the manifold": Case(
        NotOnManifoldError, r"V has max", r"project_point|constrain", wrap_rank, with_part(2, lambda v: 2 * v)
    ),
    "an integer S": Case(ShapeError, r"int64", r"\.float\(\)", wrap_rank, with_part(1, lambda s: s.long())),
    "a complex U": Case(ShapeError, r"complex64", r"real", wrap_rank, with_part(0, lambda u: u + 0j)),
    "rows": Case(
        ConfigError,
        r"orientation='rows'",
        r"leave out",
        wrap_rank,
        lambda w: w.sgd(*w.usv, orientation="rows"),
    ),
    "a kernel's view": Case(
        ConfigError, r"view='matrix'", r"leave out", wrap_rank, lambda w: w.sgd(*w.usv, view="matrix")
    ),
    "StelLA's scale on FixedRank": Case(
        ConfigError,
        r"displacement_scale='stella'",
        r"number|leave it out",
        wrap_rank,
        lambda w: w.sgd(*w.usv, displacement_scale="stella", reference_dim=8),
    ),
    "an unknown gradient": Case(
        ConfigError,
        r"'gradient'.*'dense'",
        r"'factors' or 'projected'",
        wrap_rank,
        lambda w: w.sgd(*w.usv, gradient="dense"),
    ),
    "a negative decay": Case(
        ConfigError,
        r"manifold_decay is -1",
        r"not negative",
        wrap_rank,
        lambda w: w.sgd(*w.usv, manifold_decay=-1),
    ),
    "decay without a learning rate": Case(
        ConfigError,
        r"lr is None",
        r"set lr to a number \(relative_step=False\)",
        wrap_rank,
        lambda w: w.sgd(*w.usv, manifold_decay=0.1, lr=None),
    ),
    "decay on Stiefel": Case(
        ConfigError, r"manifold_decay", r"leave it out", wrap, lambda w: w.sgd(w.point, manifold_decay=0.1)
    ),
    "coupled decay on FixedRank": Case(
        ConfigError, r"weight_decay=0\.1.*SGD", r"AdamW", wrap_rank, lambda w: w.sgd(*w.usv, weight_decay=0.1)
    ),
    "rank lost in a step": Case(StepError, r"loses rank", r"floor=1e-3.*put back", step, rank_lost),
    "FixedRank with an unknown retraction": Case(
        UnknownNameError, r"'polar'", r"'svd'", lambda w: FixedRank("polar")
    ),
    "a retraction that is a function": Case(
        UnknownNameError, r"plain_function", r"register", lambda w: AnyFixedRank(plain_function)
    ),
    "an unknown transport on FixedRank": Case(
        UnknownNameError,
        r"transport 'projecton'",
        r"known: 'projection', 'none'\. Did you mean 'projection'",
        lambda w: FixedRank(transport="projecton"),
    ),
    **{
        f"a floor of {floor}": Case(ConfigError, r"floor=", r"\[0, 1\)", partial(make_floor, floor))
        for floor in (-0.1, 1, math.nan, "1e-3", None, True)
    },
    "a taken fixed-rank name": Case(
        ConfigError,
        r"'svd' is taken",
        r"another name",
        lambda w: rank_retractions.register("svd")(rank_retractions.get("svd").function),
    ),
    "constrain on FixedRank": Case(
        ConfigError,
        r"three parameters U, S, V",
        r"RiemannLoRALinear|triples",
        lambda w: constrain(w.module, "query.weight", FixedRank()),
    ),
    "a dense matrix for a point": Case(
        ShapeError,
        r"x is a Tensor",
        r"project_point\(W, rank=r\)",
        lambda w: AnyFixedRank().retract(w.x, w.u),
    ),
    "a tuple of two": Case(
        ShapeError, r"x is a list", r"USV", lambda w: AnyFixedRank().residual(list(w.usv[:2]))
    ),
    "a step of another shape": Case(
        ShapeError,
        r"u\.V has shape \(5, 3\), x\.V has \(6, 3\)",
        r"must agree",
        lambda w: FixedRank().retract(USV(*w.usv), w.step._replace(V=torch.zeros(5, 3))),
    ),
    "a step of another dtype": Case(
        ShapeError,
        r"u\.S has dtype torch\.float64",
        r"\.to\(",
        lambda w: FixedRank().retract(USV(*w.usv), w.step._replace(S=torch.zeros(3, 3).double())),
    ),
    "a dense matrix of another shape": Case(
        ShapeError, r"z", r"8, 6", lambda w: FixedRank().project_dense(USV(*w.usv), torch.zeros(6, 8))
    ),
    "a dense matrix of another dtype": Case(
        ShapeError,
        r"z.*float64",
        r"\.to\(",
        lambda w: FixedRank().project_dense(USV(*w.usv), torch.zeros(8, 6).double()),
    ),
    "a rank that is too large": Case(
        ShapeError, r"rank is 7", r"from 1 to 6", lambda w: FixedRank().random_point(8, 6, rank=7)
    ),
    "a matrix of lower rank": Case(
        NotOnManifoldError,
        r"S is singular",
        r"smaller rank",
        lambda w: FixedRank().project_point(torch.ones(4, 3), rank=2),
    ),
    "NaN in a dense matrix": Case(
        NotOnManifoldError,
        r"z holds NaN",
        r"look",
        lambda w: FixedRank().project_point(torch.full((4, 3), math.nan), rank=2),
    ),
    "the geodesic of FixedRank": Case(
        ConfigError, r"geodesic", r"retract", lambda w: FixedRank().exp(USV(*w.usv), w.step)
    ),
    "a step of NaN on FixedRank": Case(
        StepError,
        r"not finite",
        r"clip",
        lambda w: FixedRank().retract(USV(*w.usv), w.step._replace(S=torch.full((3, 3), math.nan))),
    ),
}

TABLE = {**ON_FIXED_RANK, **ON_GROUPS, **ON_WRAPPING, **ON_LIVE, **ON_PARTS, **ON_TENSORS, **ON_LAYERS}


@pytest.mark.parametrize("case", TABLE.values(), ids=list(TABLE))
def test_bad_input(case: Case) -> None:
    world = World()
    thing = case.setup(world)
    before = picture(world), {name: module.names() for name, module in FAMILIES.items()}
    with pytest.raises(case.error) as caught:
        case.act(thing)
    message = str(caught.value)
    assert type(caught.value) is case.error
    assert re.search(case.names, message, re.DOTALL), f"does not name the thing: {message}"
    assert re.search(case.way_out, message, re.DOTALL), f"does not name the way out: {message}"
    assert "tensor(" not in message, "a tensor's contents have no place in a message"
    assert len(message) < 600
    assert (picture(world), {name: module.names() for name, module in FAMILIES.items()}) == before


def test_the_table_is_long_and_without_doubles() -> None:
    parts = (ON_FIXED_RANK, ON_GROUPS, ON_WRAPPING, ON_LIVE, ON_PARTS, ON_TENSORS, ON_LAYERS)
    assert len(TABLE) == sum(map(len, parts)) >= 40


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ShapeError, ValueError),
        (NotOnManifoldError, ValueError),
        (UnknownNameError, LookupError),
        (ConfigError, ValueError),
        (ConfigError, TypeError),
        (StepError, RuntimeError),
    ],
)
def test_the_hierarchy(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, StiefelOptError)
    assert issubclass(error, builtin)
    assert getattr(stiefelopt.errors, error.__name__) is error


def test_a_picture_sees_every_kind_of_change() -> None:
    """The check behind the table can fail."""
    changes: list[Callable[[World, RiemannianWrapper], object]] = [
        lambda w, o: w.point.data.add_(1e-6),
        lambda w, o: w.gradient().add_(1),
        lambda w, o: setattr(w.point, "grad", w.gradient().clone()),
        lambda w, o: w.module["query"].requires_grad_(False),
        lambda w, o: w.module.update({"query": nn.Linear(6, 6)}),
        lambda w, o: w.module["query"].__dict__.update(_mark=1),
        lambda w, o: o.state[w.point]["momentum_buffer"].add_(1),
        lambda w, o: o.param_groups[0].update(lr=0.2),
        lambda w, o: o.param_groups[0]["manifold"].update(retraction="qr"),
        lambda w, o: o.optimizer.register_step_pre_hook(lambda *_: None),
    ]
    for change in changes:
        world = World()
        wrapper = world.wrapped()
        before = picture(world)
        assert picture(world) == before
        change(world, wrapper)
        assert picture(world) != before
