"""constrain declares a parameter, param_groups collects what modules declared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import AdamW

from stiefelopt import (
    ConfigError,
    NotOnManifoldError,
    RiemannianWrapper,
    RiemannLoRALinear,
    ShapeError,
    StelLALinear,
    Stiefel,
    UnknownNameError,
    adapt,
    attach,
    constrain,
    param_groups,
)
from stiefelopt.manifolds import Oblique

torch.set_num_threads(1)

LR, MANIFOLD_LR, SCALE_LR, DECAY = 1e-3, 2e-3, 3e-3, 0.05


class RMSNormOfOurOwn(nn.Module):
    """A norm that is none of torch's classes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Model(nn.Module):
    """Every kind of parameter that param_groups sorts."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.rnn = nn.RNN(8, 8, batch_first=True)
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.layer_norm, self.batch_norm = nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.own_norm = RMSNormOfOurOwn()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        constrain(self, "rnn.weight_hh_l0", Stiefel(retraction="cayley"))


DECAYED = {"embed.weight", "rnn.weight_ih_l0", "linear.weight", "conv.weight"}
CONSTRAINED = {"rnn.weight_hh_l0"}
FROZEN = {"frozen.weight", "frozen.bias"}


def names_of(model: nn.Module, params: Any) -> set[str]:
    by_id = {id(p): n for n, p in model.named_parameters()}
    return {by_id[id(p)] for p in params}


def group_with(groups: list[dict[str, Any]], model: nn.Module, name: str) -> dict[str, Any]:
    p = model.get_parameter(name)
    found = [g for g in groups if any(q is p for q in g["params"])]
    assert len(found) == 1
    return found[0]


def all_groups(model: nn.Module, **more: Any) -> list[dict[str, Any]]:
    return param_groups(model, lr=LR, weight_decay=DECAY, manifold_lr=MANIFOLD_LR, scale_lr=SCALE_LR, **more)


# param_groups


def test_every_parameter_lands_in_one_group_with_its_role() -> None:
    model = Model()
    groups = all_groups(model)
    roles = {name: group_with(groups, model, name) for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(g["params"]) for g in groups) == len(roles)
    for name, group in roles.items():
        decay = DECAY if name in DECAYED else 0.0
        lr = MANIFOLD_LR if name in CONSTRAINED else LR
        assert (group["lr"], group["weight_decay"]) == (lr, decay), name
        assert ("manifold" in group) == (name in CONSTRAINED), name
    assert roles["rnn.weight_hh_l0"]["manifold"] == Stiefel(retraction="cayley").spec()
    assert all(g["params"] for g in groups)


def test_the_groups_are_plain_data() -> None:
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(map(plain, value.values()))
        return isinstance(value, (str, int, float, bool))

    for group in all_groups(adapt(Model(), target_modules=["linear"], r=2)):
        assert all(plain(v) for k, v in group.items() if k != "params")


def test_options_left_out_leave_the_optimizers_defaults() -> None:
    groups = param_groups(Model())
    assert all("lr" not in g for g in groups)
    decayed = [g for g in groups if "weight_decay" not in g]
    assert len(decayed) == 1
    optimizer = AdamW(groups, lr=0.5, weight_decay=0.25)
    assert {g["lr"] for g in optimizer.param_groups} == {0.5}
    assert sorted(g["weight_decay"] for g in optimizer.param_groups) == [0.0, 0.0, 0.25]


def test_manifold_and_scale_rates_default_to_lr() -> None:
    model = adapt(Model(), target_modules=["linear"], r=2)
    assert {g["lr"] for g in param_groups(model, lr=0.125)} == {0.125}


@pytest.mark.parametrize("zero", [{"manifold_lr": 0.0}, {"scale_lr": 0.0}])
def test_a_rate_of_zero_is_a_rate(zero: dict[str, Any]) -> None:
    model = adapt(Model(), target_modules=["linear"], r=2)
    rates = [g["lr"] for g in param_groups(model, lr=0.125, **zero)]
    assert sorted(rates) == [0.0, 0.125]


def test_stella_factors_and_what_trains_beside_them() -> None:
    model = adapt(Model(), target_modules=["linear"], modules_to_save=["conv"], r=2, reference_dim=32)
    groups = all_groups(model)
    bases, s = group_with(groups, model, "linear.U"), group_with(groups, model, "linear.S")
    assert names_of(model, bases["params"]) == {"linear.U", "linear.V"}
    assert (bases["lr"], bases["weight_decay"], bases["reference_dim"]) == (MANIFOLD_LR, 0.0, 32)
    assert (bases["manifold"], bases["displacement_scale"]) == (Stiefel().spec(), "stella")
    assert names_of(model, s["params"]) == {"linear.S"}
    assert (s["lr"], s["weight_decay"]) == (SCALE_LR, DECAY)
    assert group_with(groups, model, "conv.weight")["weight_decay"] == DECAY
    assert group_with(groups, model, "conv.bias")["weight_decay"] == 0.0
    assert len(groups) == 4


def test_a_diagonal_s_is_still_a_scale() -> None:
    layer = StelLALinear(nn.Linear(6, 5), 2, diagonal=True)
    assert group_with(all_groups(layer), layer, "S")["lr"] == SCALE_LR


def test_layers_of_one_kind_share_a_group_and_others_do_not() -> None:
    layers: list[nn.Module] = [StelLALinear(nn.Linear(6, 5), 2, reference_dim=d) for d in (6, 6, 9)]
    model = nn.ModuleList([*layers, nn.Linear(4, 4, bias=False)])
    constrain(model[3], "weight", Stiefel())
    sizes = sorted(len(g["params"]) for g in param_groups(model) if "manifold" in g)
    assert sizes == [1, 2, 4]


@pytest.mark.parametrize("trainable_only", [True, False])
def test_frozen_parameters(trainable_only: bool) -> None:
    model = Model()
    found = {
        n for g in all_groups(model, trainable_only=trainable_only) for n in names_of(model, g["params"])
    }
    assert found == {n for n, _ in model.named_parameters()} - (FROZEN if trainable_only else set())


def test_named_groups_carry_the_names_to_residuals() -> None:
    model = Model()
    groups = all_groups(model, named=True)
    assert {n for g in groups for n, _ in g["params"]} == {n for n, _ in model.named_parameters()} - FROZEN
    wrapper = RiemannianWrapper(AdamW(groups))
    assert set(wrapper.residuals()) == CONSTRAINED


class DataParallelLike(nn.Module):
    """What DDP is to param_groups: a module around the model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


@pytest.mark.parametrize("wrap", [DataParallelLike, nn.Sequential, copy.deepcopy])
def test_wrapped_and_copied_models_are_sorted_as_plain_ones(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = adapt(Model(), target_modules=["linear"], modules_to_save=["rnn"], r=2)

    def shape(groups: list[dict[str, Any]]) -> list[Any]:
        return [
            ({k: v for k, v in g.items() if k != "params"}, [p.shape for p in g["params"]]) for g in groups
        ]

    assert shape(all_groups(wrap(model))) == shape(all_groups(model))


def test_groups_work_in_the_wrapper_and_keep_the_model_on_its_manifolds() -> None:
    model: Any = adapt(Model(), target_modules=["linear"], modules_to_save=["rnn", "embed"], r=2)
    wrapper = RiemannianWrapper(AdamW(all_groups(model)))
    for step in range(5):
        wrapper.zero_grad()
        x, _ = model.rnn(model.embed(torch.arange(9)[None]))
        model.linear(x).square().mean().backward()
        wrapper.step()
        assert len(wrapper.residuals()) == 3
        assert max(wrapper.residuals().values()) < 2e-6, step


# Shared parameters


def tied(constrain_first: bool = False, constrain_second: bool = False) -> nn.ModuleList:
    first, second = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
    second.weight = first.weight
    for module, wanted in ((first, constrain_first), (second, constrain_second)):
        if wanted:
            constrain(module, "weight", Stiefel())
    return nn.ModuleList([first, second])


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True)])
def test_a_shared_parameter_declared_anywhere_is_constrained_once(first: bool, second: bool) -> None:
    model = tied(first, second)
    groups = param_groups(model)
    assert [len(g["params"]) for g in groups] == [1]
    assert groups[0]["manifold"] == Stiefel().spec()


def test_a_plain_shared_parameter_is_given_once() -> None:
    groups = param_groups(tied(), weight_decay=0.1)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.1)]


def test_a_shared_parameter_declared_in_two_ways_is_refused() -> None:
    model = tied(constrain_first=True)
    constrain(model[1], "weight", Stiefel(retraction="qr"))
    with pytest.raises(ConfigError, match=r"1\.weight.*two ways.*once"):
        param_groups(model)


def test_a_module_used_twice_is_given_once() -> None:
    linear = nn.Linear(3, 3)
    assert sum(len(g["params"]) for g in param_groups(nn.Sequential(linear, linear))) == 2


@pytest.mark.parametrize(
    "model",
    [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)],
    ids=["no parameters", "all frozen"],
)
def test_nothing_to_train_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"no parameter to train.*trainable_only=False"):
        param_groups(model)


def test_something_that_is_no_module_is_an_error_of_ours() -> None:
    with pytest.raises(ConfigError, match=r"Module"):
        param_groups([nn.Parameter(torch.ones(2, 2))])  # type: ignore[arg-type]


# constrain


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def residual(p: Tensor) -> float:
    x = p.detach().double()
    x = x.mT if x.shape[-2] < x.shape[-1] else x
    return (x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype)).abs().max().item()


@pytest.mark.parametrize("sizes", [(4, 9), (9, 4), (5, 5)], ids=["tall", "wide", "square"])
def test_project_is_the_nearest_point(sizes: tuple[int, int]) -> None:
    module = nn.Linear(*sizes)
    before = module.weight.detach().clone()
    assert constrain(module, "weight", Stiefel()) is module
    u, _, vh = torch.linalg.svd(before.double(), full_matrices=False)
    torch.testing.assert_close(module.weight.detach().double(), u @ vh, rtol=0, atol=1e-5)
    assert residual(module.weight) < 2e-6


@pytest.mark.parametrize("sizes", [(4, 9), (9, 4)], ids=["tall", "wide"])
def test_random_is_reproducible_and_forgets_the_weight(sizes: tuple[int, int]) -> None:
    drawn = []
    for fill, seed in ((0.0, 1), (1.0, 1), (1.0, 2)):
        module = nn.Linear(*sizes)
        nn.init.constant_(module.weight, fill)
        constrain(module, "weight", Stiefel(), init="random", generator=generator(seed))
        assert residual(module.weight) < 2e-6
        drawn.append(module.weight.detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_keep_moves_no_bit_of_a_point() -> None:
    module = nn.Linear(4, 9)
    nn.init.orthogonal_(module.weight)
    before = module.weight.detach().clone()
    constrain(module, "weight", Stiefel(), init="keep")
    assert torch.equal(module.weight, before)
    assert "manifold" in group_with(param_groups(module), module, "weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("init", ["project", "random"])
def test_a_half_precision_parameter_is_the_rounding_of_a_point(dtype: torch.dtype, init: str) -> None:
    module = nn.Linear(4, 9).to(dtype)
    constrain(module, "weight", Stiefel(), init=init)
    assert module.weight.dtype == dtype
    assert residual(module.weight) < 2 * torch.finfo(dtype).eps
    RiemannianWrapper(AdamW(param_groups(module)))


def test_the_parameter_stays_the_same_object() -> None:
    module = nn.Linear(4, 9)
    p, version = module.weight, module.weight.data_ptr()
    constrain(module, "weight", Stiefel())
    assert module.weight is p
    assert p.data_ptr() == version
    assert p.requires_grad
    assert type(p) is nn.Parameter


@pytest.mark.parametrize(
    "manifold", [Stiefel(retraction="qr"), Stiefel(retraction="qr").spec()], ids=["object", "spec"]
)
@pytest.mark.parametrize("at_root", [True, False], ids=["dotted name", "owner"])
def test_dotted_names_and_specs(manifold: Any, at_root: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 9), nn.Sequential(nn.Linear(9, 4)))
    if at_root:
        constrain(model, "1.0.weight", manifold)
    else:
        constrain(model[1][0], "weight", manifold)
    group = group_with(param_groups(model), model, "1.0.weight")
    assert group["manifold"]["retraction"] == "qr"
    assert "manifold" not in group_with(param_groups(model), model, "0.weight")


def test_a_module_under_two_names_is_constrained_by_either() -> None:
    model: Any = nn.Module()
    model.a = model.b = nn.Linear(4, 9)
    constrain(model, "b.weight", Stiefel())
    assert "manifold" in group_with(param_groups(model), model, "a.weight")
    assert residual(model.a.weight) < 1e-5


@pytest.mark.parametrize("orientation", ["columns", "rows"])
def test_a_stated_orientation_reaches_the_group(orientation: str) -> None:
    module = constrain(nn.Linear(5, 5), "weight", Stiefel(), orientation=orientation)
    assert group_with(param_groups(module), module, "weight")["orientation"] == orientation
    wrapper = RiemannianWrapper(AdamW(param_groups(module)))
    assert wrapper.param_groups[0]["orientation"] == orientation


def test_conv_kernels_as_a_matrix_and_as_a_batch() -> None:
    matrix, batch = nn.Conv2d(3, 8, 2), nn.Conv2d(2, 4, 3)
    constrain(matrix, "weight", Stiefel(), view="matrix")
    constrain(batch, "weight", Stiefel(), view="batch")
    assert residual(matrix.weight.reshape(8, 12)) < 2e-6
    assert max(residual(k) for k in batch.weight.reshape(-1, 3, 3)) < 2e-6
    for module, view in ((matrix, "matrix"), (batch, "batch")):
        group = group_with(param_groups(module), module, "weight")
        assert group["view"] == view
        module(torch.randn(2, module.in_channels, 5, 5)).square().sum().backward()
        wrapper = RiemannianWrapper(AdamW(param_groups(module)))
        wrapper.step()
        assert max(wrapper.residuals().values()) < 2e-6


def test_constraining_again_replaces_the_declaration() -> None:
    module = constrain(nn.Linear(5, 9), "weight", Stiefel())
    constrain(module, "weight", Stiefel(retraction="exp"), init="keep")
    assert group_with(param_groups(module), module, "weight")["manifold"]["retraction"] == "exp"


def test_declarations_survive_a_deepcopy_and_stay_apart() -> None:
    module = constrain(nn.Linear(5, 9), "weight", Stiefel())
    twin = copy.deepcopy(module)
    constrain(twin, "weight", Stiefel(retraction="qr"), init="keep")
    retractions = [group_with(param_groups(m), m, "weight")["manifold"]["retraction"] for m in (module, twin)]
    assert retractions == ["polar", "qr"]


def test_groups_do_not_share_their_spec_with_the_declaration() -> None:
    """Changing one optimizer's group must not change the module, nor the next optimizer."""
    module = constrain(nn.Linear(5, 9), "weight", Stiefel())
    group_with(param_groups(module), module, "weight")["manifold"]["retraction"] = "qr"
    assert group_with(param_groups(module), module, "weight")["manifold"]["retraction"] == "polar"


def test_a_state_dict_of_a_constrained_module_is_a_plain_one() -> None:
    module = nn.Linear(5, 9)
    constrain(module, "weight", Stiefel())
    assert set(module.state_dict()) == {"weight", "bias"}
    fresh = nn.Linear(5, 9)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh.weight, module.weight)


def half_bias_none() -> nn.Module:
    return nn.Linear(4, 9, bias=False)


BAD_CONSTRAIN: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any], type[Exception], str]] = {
    "no such parameter": (lambda: nn.Linear(4, 9), "wieght", {}, ConfigError, r"'wieght'.*weight, bias"),
    "no such module": (
        lambda: nn.Linear(4, 9),
        "rnn.weight",
        {},
        ConfigError,
        r"'rnn\.weight'.*weight, bias",
    ),
    "an empty name": (lambda: nn.Linear(4, 9), "", {}, ConfigError, r"no parameter ''.*weight, bias"),
    "a bias that is None": (half_bias_none, "bias", {}, ConfigError, r"'bias'.*weight"),
    "a buffer": (lambda: nn.BatchNorm1d(4), "running_mean", {}, ConfigError, r"'running_mean'"),
    "a module": (lambda: nn.Sequential(nn.Linear(4, 9)), "0", {}, ConfigError, r"'0'.*0\.weight"),
    "a vector": (lambda: nn.Linear(4, 9), "bias", {}, ShapeError, r"'?bias'? .*vector"),
    "a kernel without a view": (
        lambda: nn.Conv2d(3, 8, 2),
        "weight",
        {},
        ConfigError,
        r"'?weight'?.*view='matrix'",
    ),
    "an unknown init": (lambda: nn.Linear(4, 9), "weight", {"init": "qr"}, ConfigError, r"'qr'.*'project'"),
    "an unknown view": (
        lambda: nn.Conv2d(3, 8, 2),
        "weight",
        {"view": "flat"},
        ConfigError,
        r"'flat'.*'matrix'",
    ),
    "an unknown orientation": (
        lambda: nn.Linear(4, 9),
        "weight",
        {"orientation": "tall"},
        ConfigError,
        r"'tall'.*'columns'",
    ),
    "an orientation that does not fit": (
        lambda: nn.Linear(4, 9),
        "weight",
        {"orientation": "rows"},
        ShapeError,
        r"'?weight'?.*9 x 4.*orientation='columns'",
    ),
    "keep off the manifold": (
        lambda: nn.Linear(4, 9),
        "weight",
        {"init": "keep"},
        NotOnManifoldError,
        r"'weight'.*project",
    ),
    "the class": (lambda: nn.Linear(4, 9), "weight", {"manifold": Stiefel}, ConfigError, r"Stiefel\(\)"),
    "a name": (lambda: nn.Linear(4, 9), "weight", {"manifold": "Stiefel"}, ConfigError, r"Stiefel\(\)"),
    "an unknown spec": (
        lambda: nn.Linear(4, 9),
        "weight",
        {"manifold": {"manifold": "Stiefle"}},
        UnknownNameError,
        r"Stiefle.*Stiefel",
    ),
    "complex": (
        lambda: nn.Linear(4, 9, dtype=torch.complex64),
        "weight",
        {},
        ShapeError,
        r"'?weight'?.*complex64",
    ),
}


@pytest.mark.parametrize(
    ("make", "name", "options", "error", "message"), BAD_CONSTRAIN.values(), ids=list(BAD_CONSTRAIN)
)
@pytest.mark.parametrize("init", ["project", "random"])
def test_a_refused_constrain_changes_and_declares_nothing(
    make: Callable[[], nn.Module],
    name: str,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    init: str,
) -> None:
    module = make()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    keys = set(module.__dict__)
    with pytest.raises(error, match=message):
        constrain(module, name, **{"manifold": Stiefel(), "init": init, **options})
    assert set(module.__dict__) == keys
    for n, p in module.named_parameters():
        assert torch.equal(p, before[n])


def test_a_weight_with_nan_cannot_be_projected() -> None:
    module = nn.Linear(4, 9)
    module.weight.data[0, 0] = float("nan")
    with pytest.raises(NotOnManifoldError, match=r"weight.*NaN"):
        constrain(module, "weight", Stiefel())
    constrain(module, "weight", Stiefel(), init="random")
    assert residual(module.weight) < 2e-6


def pruned(linear: nn.Linear) -> None:
    prune.random_unstructured(linear, "weight", 0.1)


def renamed(linear: nn.Linear) -> None:
    weight = linear.weight
    del linear.weight
    linear.other = weight


@pytest.mark.parametrize("change", [pruned, renamed, torch.nn.utils.parametrizations.weight_norm])
def test_a_declared_parameter_that_has_gone_is_refused(change: Callable[[nn.Linear], Any]) -> None:
    linear = nn.Linear(3, 12)
    constrain(linear, "weight", Stiefel())
    change(linear)
    with pytest.raises(ConfigError, match=r"weight of \w*Linear was put on a manifold"):
        param_groups(linear)


@pytest.mark.parametrize("start", [RiemannianWrapper, attach])
@pytest.mark.parametrize(
    "model",
    [
        constrain(nn.Linear(8, 3), "weight", Stiefel()),
        StelLALinear(nn.Linear(8, 8), 2),
        RiemannLoRALinear(nn.Linear(8, 8), 2),
    ],
    ids=["constrain", "StelLA", "RiemannLoRA"],
)
def test_what_was_declared_is_not_stepped_without_its_manifold(
    start: Callable[..., Any], model: nn.Module
) -> None:
    """By a group that names none, or by the wrapper's default; None said in the group is a choice."""
    for options in ((), (Stiefel(),)):
        with pytest.raises(ConfigError, match=r"was put on a manifold .*param_groups\(model\)"):
            start(AdamW(model.parameters(), weight_decay=0.0), *options)
    start(AdamW(param_groups(model)))
    start(AdamW([{"params": list(model.parameters()), "manifold": None}]))


def test_an_attribute_set_by_hand_is_not_overlooked() -> None:
    p = nn.Parameter(torch.eye(3))
    p.manifold = Stiefel()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="was put on a manifold"):
        RiemannianWrapper(AdamW([p]))


@pytest.mark.parametrize(
    ("module", "keys"),
    [
        (nn.Linear(8, 3), {}),
        (nn.Conv2d(3, 16, 3), {"view": "matrix"}),
        (nn.Embedding(30, 8), {"orientation": "rows"}),
    ],
    ids=["wide", "convolution", "rows"],
)
def test_constraining_again_after_double_is_the_way_out_that_the_error_names(
    module: Any, keys: dict[str, Any]
) -> None:
    manifold = Oblique() if keys.get("orientation") else Stiefel()
    constrain(module, "weight", manifold, **keys).double()
    before = module.weight.detach().clone()
    with pytest.raises(NotOnManifoldError, match=r"by its rows: .*after \.double\(\), constrain\("):
        RiemannianWrapper(AdamW(param_groups(module)))
    constrain(module, "weight", manifold)
    group = param_groups(module)[0]
    assert {k: group[k] for k in keys} == keys
    assert max(RiemannianWrapper(AdamW([group])).residuals().values()) < 1e-13
    torch.testing.assert_close(module.weight.detach(), before, atol=1e-6, rtol=0)


def test_a_lazy_parameter_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'weight' has no shape yet"):
        constrain(nn.LazyLinear(3), "weight", Stiefel())
