"""StelLA and RiemannLoRA as PEFT methods: PEFT's own matrix for a linear tuner, and the geometry.

Oracles: PEFT's LoRA with the same options, dense float64 weights computed from the saved files, and our own layers.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from stiefelopt import (
    ConfigError,
    RiemannianWrapper,
    RiemannLoRALinear,
    ShapeError,
    StelLALinear,
    UnknownNameError,
    adapt,
    adapter_state_dict,
    export_lora,
    import_lora,
    loi_init,
    merge_adapters,
    param_groups,
)
from stiefelopt.layers import LowRankLinear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from stiefelopt.integrations.peft import RiemannLoraConfig, StellaConfig, registration  # noqa: E402
from stiefelopt.integrations.peft.checkpoint import peft_parts  # noqa: E402
from stiefelopt.integrations.peft.config import LowRankConfig  # noqa: E402
from stiefelopt.integrations.peft.layer import AdaptedLinear  # noqa: E402
from stiefelopt.integrations.peft.model import StellaModel  # noqa: E402
from stiefelopt.integrations.peft.registration import Method  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.arange(24).reshape(4, 6)
SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **SMALL, num_key_value_heads=1, intermediate_size=24, initializer_range=0.3, **options
    )
    return transformers.LlamaForCausalLM(config).eval()


def bert(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        **SMALL, intermediate_size=24, max_position_embeddings=16, num_labels=3, initializer_range=0.3
    )
    return transformers.BertForSequenceClassification(config).eval()


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(config).eval()


Make = Callable[[], Any]
# (model, options of the config)
KINDS: dict[str, tuple[Make, dict[str, Any]]] = {
    "llama, patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"down_proj": 5, "layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "bert, head, rslora": (
        bert,
        {
            "target_modules": r".*(query|intermediate\.dense)",
            "modules_to_save": ["classifier"],
            "use_rslora": True,
        },
    ),
    "gpt2, Conv1D": (gpt2, {"target_modules": ["c_attn", "c_fc"]}),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
CONFIGS = (StellaConfig, RiemannLoraConfig)
LAYERS: dict[Any, type[LowRankLinear]] = {StellaConfig: StelLALinear, RiemannLoraConfig: RiemannLoRALinear}
both = pytest.mark.parametrize("config", CONFIGS, ids=["stella", "riemann"])
Config = type[LowRankConfig]
TARGETS = ["q_proj", "v_proj"]


def logits(model: nn.Module, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, **kwargs).logits


def near(a: Tensor, b: Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def far(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() > 1e-2


def made(config: Config, make: Make = llama, *, seed: int = 1, **options: Any) -> Any:
    base = make()
    torch.manual_seed(seed)
    options = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, **options}
    return get_peft_model(base, config(**options))


def optimizer_of(model: nn.Module, lr: float = 2e-2) -> RiemannianWrapper:
    return RiemannianWrapper(AdamW(param_groups(model, lr=lr, named=True)))


def loss_of(model: nn.Module) -> Tensor:
    out = model(IDS).logits
    return nn.functional.cross_entropy(out.flatten(0, -2), torch.arange(out.flatten(0, -2).shape[0]) % 3)


def train(model: Any, steps: int = 4, optimizer: RiemannianWrapper | None = None) -> RiemannianWrapper:
    optimizer = optimizer or optimizer_of(model)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    model.eval()
    return optimizer


def trained(config: Config, make: Make = llama, **options: Any) -> Any:
    model = made(config, make, **options)
    train(model)
    return model


def base_weights(model: nn.Module) -> list[Tensor]:
    return [m.get_base_layer().get_parameter("weight").detach().clone() for m in tuner_layers(model).values()]


def tuner_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def adapters_of(model: nn.Module, name: str = "default") -> dict[str, LowRankLinear]:
    return {key: m.adapters[name] for key, m in tuner_layers(model).items() if name in m.adapters}


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a refused call must leave alone."""
    values = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    return {"modules": {n: id(m) for n, m in model.named_modules()}, "values": values}


def assert_same_state(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert after["modules"] == before["modules"]
    assert after["values"].keys() == before["values"].keys()
    for name, (grad, value) in after["values"].items():
        assert grad == before["values"][name][0], name
        assert torch.equal(value, before["values"][name][1]), name


def with_dense_weights(make: Make, *directories: Path) -> Any:
    """The base model with the weights that the saved files mean, ranks and scales as LoRA reads the options."""
    model = make().double()
    for directory in directories:
        config = json.loads((directory / "adapter_config.json").read_text())
        tensors = {
            k.removeprefix("base_model.model."): t.double()
            for k, t in load_file(directory / "adapter_model.safetensors").items()
        }
        kind = "stella_adapter" if config["peft_type"] == "STELLA" else "riemann_lora_adapter"
        names = sorted({k.split(f".{kind}.")[0] for k in tensors if kind in k})
        # PEFT's own LoRA layers say which rank and scale the patterns mean.
        known = LoraConfig.__dataclass_fields__
        lora = get_peft_model(
            make(),
            LoraConfig(**{k: v for k, v in config.items() if k in known and k not in ("peft_type", "bias")}),
        )
        for name in names:
            layer = lora.get_submodule(f"base_model.model.{name}")
            scale, r = layer.scaling["default"], layer.r["default"]
            u, s, v = (tensors.pop(f"{name}.{kind}.{f}") for f in "USV")
            assert u.shape[1] == v.shape[1] == r
            delta = u @ (s.diag() if s.ndim == 1 else s) @ v.T
            if f"{name}.{kind}.U0" in tensors:
                delta = delta - tensors.pop(f"{name}.{kind}.U0") @ tensors.pop(f"{name}.{kind}.V0").T
            module = model.get_submodule(name)
            turned = type(module).__name__ == "Conv1D"
            module.weight.data += scale * (delta.T if turned else delta)
        model.load_state_dict(tensors, strict=False)
        assert set(tensors) <= set(model.state_dict())
    return model


def double_logits(model: nn.Module) -> Tensor:
    return logits(model).float()


# Training, saving, loading


@both
@every_kind
def test_it_trains_on_the_manifold_and_the_saved_files_hold_all_of_it(
    config: Config, kind: tuple[Make, dict[str, Any]], tmp_path: Path
) -> None:
    make, options = kind
    model = made(config, make, **options)
    first = loss_of(model.eval()).item()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = train(model, steps=12)
    assert loss_of(model).item() < first - 0.05
    assert max(optimizer.residuals().values()) < 1e-6
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    expected = logits(model)
    far(expected, logits(make()))
    model.save_pretrained(tmp_path)
    near(double_logits(with_dense_weights(make, tmp_path)), expected, atol=2e-5)
    for low_cpu_mem_usage in (False, True):
        torch.manual_seed(99)
        loaded = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not any(p.is_meta or p.requires_grad for p in loaded.parameters())
        near(logits(loaded), expected, atol=0)


@both
def test_training_resumes_from_a_saved_adapter(config: Config, tmp_path: Path) -> None:
    model = made(config)
    optimizer = train(model, 3)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    train(model, 3, optimizer)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    resumed = optimizer_of(again)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(again, 3, resumed)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("config", "options", "own"),
    [
        (StellaConfig, {}, {}),
        (StellaConfig, {"init": "pseudo-zero", "diagonal": True}, {"correction": "keep"}),
        (StellaConfig, {"init": "svd-minor", "reference_dim": 7}, {}),
        (RiemannLoraConfig, {}, {"correction": "keep"}),
        (RiemannLoraConfig, {"scale": 0.5}, {"correction": "keep"}),
    ],
    ids=["stella", "pseudo-zero", "svd-minor", "riemann", "scale"],
)
def test_it_is_our_layers_bit_for_bit(config: Config, options: dict[str, Any], own: dict[str, Any]) -> None:
    """The same factors at the start, the same steps: `adapt` and PEFT are one computation."""
    model = made(config, **options)
    plain = adapt(llama(), LAYERS[config], target_modules=TARGETS, r=3, alpha=6, **{**options, **own})
    layers = {n: m for n, m in plain.named_modules() if isinstance(m, LowRankLinear)}
    adapters = {n.removeprefix("base_model.model."): a for n, a in adapters_of(model).items()}
    assert layers.keys() == adapters.keys()
    for name, layer in layers.items():
        layer.load_factors(adapters[name].factor_state())
    assert torch.equal(logits(model), logits(plain))
    train(model, 5)
    train(plain, 5)
    assert torch.equal(logits(model), logits(plain))
    for name, layer in layers.items():
        for factor in layer.FACTORS:
            assert torch.equal(getattr(layer, factor), getattr(adapters[name], factor)), (name, factor)


@pytest.mark.parametrize(
    ("config", "init", "unchanged"),
    [
        (StellaConfig, "random", False),
        (StellaConfig, "zero", True),
        (StellaConfig, "pseudo-zero", True),
        (StellaConfig, "svd-major", False),
        (RiemannLoraConfig, "random", True),
        (RiemannLoraConfig, "loi", True),
    ],
)
def test_where_the_function_starts(config: Config, init: str, unchanged: bool) -> None:
    model = made(config, init=init, r=4, lora_alpha=None)
    base = logits(llama())
    if unchanged:
        near(logits(model), base)
    else:
        far(logits(model), base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    for adapter in adapters_of(model).values():
        assert adapter.scale == 1


# Options mean what they mean for LoRA


@both
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.1.self_attn.q_proj"]},
        {"target_modules": r".*layers\.1.*\.(k|o)_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "alpha_pattern": {"v_proj": 2}},
        {
            "target_modules": TARGETS,
            "rank_pattern": {r"layers\.0.*q_proj": 1, "^model.layers.1.self_attn.v_proj": 2},
        },
    ],
    ids=str,
)
def test_targets_ranks_and_scales_are_loras(config: Config, options: dict[str, Any]) -> None:
    ours = config(r=4, lora_alpha=6, **copy.deepcopy(options))
    model = get_peft_model(llama(), ours)
    lora = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=6, **copy.deepcopy(options)))
    assert model.targeted_module_names == lora.targeted_module_names
    assert model.targeted_module_names
    for name in model.targeted_module_names:
        layer = lora.get_submodule(f"base_model.model.{name}")
        adapter = adapters_of(model)[f"base_model.model.{name}"]
        assert (adapter.r, adapter.scale) == (layer.r["default"], layer.scaling["default"]), name


@both
@pytest.mark.parametrize("bias", ["none", "all", "only"])
def test_biases(config: Config, bias: str, tmp_path: Path) -> None:
    word = f"{config.METHOD.value.lower()}_only" if bias == "only" else bias
    options: dict[str, Any] = {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]}
    ours = config(**options, lora_alpha=2, bias=word)
    model = get_peft_model(bert(), ours)
    lora = get_peft_model(bert(), LoraConfig(**options, bias="lora_only" if bias == "only" else bias))
    biases = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".bias")}
    assert biases == {n for n, p in lora.named_parameters() if p.requires_grad and n.endswith(".bias")}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n in biases}
    train(model)
    # The bias of a key projection has a zero gradient; others must move.
    assert (
        sum(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in biases)
        >= len(biases) // 2
    )
    model.save_pretrained(tmp_path)
    near(logits(PeftModel.from_pretrained(bert(), tmp_path)), logits(model), atol=0)


@both
def test_dropout_acts_in_training_only(config: Config) -> None:
    model = made(
        config, lora_dropout=0.5, **({"init": "random"} if config is StellaConfig else {"scale": 1.0})
    )
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    assert torch.equal(logits(model), logits(model))


def test_param_groups_say_all() -> None:
    groups = param_groups(made(StellaConfig, target_modules=["q_proj", "up_proj", "down_proj"]), lr=1e-3)
    bases = [g for g in groups if g.get("manifold")]
    # q_proj and up_proj read the hidden size of 16, down_proj the inner 24.
    assert [g["reference_dim"] for g in bases] == [16]
    assert [g["displacement_scale"] for g in bases] == ["stella"]
    assert sorted(p.shape[0] for p in bases[0]["params"]) == sorted([16, 16, 16, 24, 24, 16] * 2)
    (group,) = param_groups(made(RiemannLoraConfig), lr=1e-3)
    assert group["gradient"] == "projected"
    assert [tuple(p.shape) for p in group["params"][:3]] == [(16, 3), (3, 3), (16, 3)]


def test_the_reference_dim_is_the_commonest_of_each_adapter_and_can_be_given() -> None:
    config = StellaConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(llama(), config)
    model.add_adapter("wide", StellaConfig(r=2, target_modules=["down_proj"]))
    model.add_adapter("given", StellaConfig(r=2, target_modules=["q_proj"], reference_dim=5))
    found = {n: {a.reference_dim for a in adapters_of(model, n).values()} for n in model.peft_config}
    assert found == {"default": {16}, "wide": {24}, "given": {5}}
    assert config.reference_dim is None


@both
def test_inactive_adapters_are_not_trained(config: Config) -> None:
    model = made(config)
    model.add_adapter("other", config(r=2, target_modules=["q_proj", "up_proj"]))
    names = {n for g in param_groups(model, named=True) for n, _ in g["params"]}
    assert names
    assert not any(".other." in n for n in names)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".default." in n}
    model.set_adapter("other")
    train(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


# Several adapters


def two(config: Config, tmp_path: Path) -> tuple[Any, Tensor, Tensor]:
    """A model with trained adapters a (active) and b on different layers, both saved, and their outputs."""
    torch.manual_seed(3)
    model = get_peft_model(llama(), config(r=3, target_modules=TARGETS, lora_alpha=6), adapter_name="a")
    model.add_adapter("b", config(r=2, target_modules=["q_proj", "up_proj"], lora_alpha=3))
    outputs = {}
    for name in ("b", "a"):
        model.set_adapter(name)
        train(model)
        outputs[name] = logits(model)
    model.save_pretrained(tmp_path)
    far(outputs["a"], outputs["b"])
    return model, outputs["a"], outputs["b"]


@both
def test_switching_and_adding_up(config: Config, tmp_path: Path) -> None:
    model, a, b = two(config, tmp_path)
    for name, expected in (("b", b), ("a", a)):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)
        near(double_logits(with_dense_weights(llama, tmp_path / name)), expected, 2e-5)
    model.base_model.set_adapter(["a", "b"])
    together = logits(model)
    near(together, double_logits(with_dense_weights(llama, tmp_path / "a", tmp_path / "b")), 2e-5)
    fresh = PeftModel.from_pretrained(llama(), tmp_path / "b", adapter_name="b")
    fresh.load_adapter(tmp_path / "a", adapter_name="a")
    assert torch.equal(logits(fresh), b)
    fresh.base_model.set_adapter(["a", "b"])
    assert torch.equal(logits(fresh), together)
    assert fresh.get_model_status().available_adapters == ["a", "b"]


@both
def test_deleting(config: Config, tmp_path: Path) -> None:
    model, _, b = two(config, tmp_path)
    model.delete_adapter("a")
    model.set_adapter("b")
    assert torch.equal(logits(model), b)
    assert not any(".a." in n for n, _ in model.named_parameters())
    model.delete_adapter("b")
    # PeftModel itself cannot run without an adapter, with LoRA neither.
    assert torch.equal(logits(model.base_model), logits(llama()))
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("b")


@both
def test_unload_and_disable_give_the_base_back(config: Config, tmp_path: Path) -> None:
    model, a, _ = two(config, tmp_path)
    base = logits(llama())
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), a)
    plain = model.unload()
    assert torch.equal(logits(plain), base)
    assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in llama().named_modules()}


@both
def test_mixed_batches_give_every_row_its_adapter(config: Config, tmp_path: Path) -> None:
    model, a, b = two(config, tmp_path)
    base = logits(llama())
    mixed = logits(model, adapter_names=["b", "__base__", "a", "b"])
    near(mixed, torch.stack((b[0], base[1], a[2], b[3])))
    near(logits(model), a, atol=0)


@both
def test_mixed_batches_reach_modules_to_save(config: Config) -> None:
    model = trained(config, bert, target_modules=["query"], modules_to_save=["classifier"])
    default = logits(model)
    model.add_adapter("b", config(r=2, target_modules=["value"], modules_to_save=["classifier"]))
    model.set_adapter("b")
    train(model)
    names = ["default", "b", "__base__", "default"]
    expected = torch.stack((default[0], logits(model)[1], logits(bert())[2], default[3]))
    near(logits(model, adapter_names=names), expected)


@both
def test_mixed_batches_in_beam_search(config: Config, tmp_path: Path) -> None:
    model, _, _ = two(config, tmp_path)
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "num_beams": 3,
        "do_sample": False,
        "pad_token_id": 0,
    }
    rows = []
    for i, name in enumerate(("a", "b", "b", "a")):
        model.set_adapter(name)
        rows.append(model.generate(input_ids=IDS[i : i + 1], **options)[0])
    mixed = model.generate(input_ids=IDS, adapter_names=["a", "b", "b", "a"], **options)
    assert torch.equal(mixed, torch.stack(rows))


@both
def test_mixed_batches_that_cannot_be_are_refused(config: Config, tmp_path: Path) -> None:
    model, _, _ = two(config, tmp_path)
    with pytest.raises(UnknownNameError, match=r"non-existing adapter.*nobody.*there are a, b"):
        logits(model, adapter_names=["a", "nobody", "b", "b"])
    with pytest.raises(ShapeError, match="3 names for an input of 4 rows"):
        logits(model, adapter_names=["a", "b", "b"])
    with pytest.raises(ConfigError, match=r"model.eval\(\)"):
        model.train()(IDS, adapter_names=["a"] * 4)
    with pytest.raises(ConfigError, match="alora_offsets"):
        logits(model, alora_offsets=[None] * 4)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        logits(model, adapter_names=["a"] * 4)


# Merging


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2], ids=["Linear", "Conv1D"])
def test_merging_and_back_bit_for_bit(config: Config, dtype: torch.dtype, make: Make) -> None:
    targets = TARGETS if make is llama else ["c_attn"]
    model = trained(config, lambda: make().to(dtype), target_modules=targets)
    model.add_adapter("b", config(r=2, target_modules=targets))
    model.set_adapter("b")
    train(model)
    model.base_model.set_adapter(["default", "b"])
    expected, before = logits(model), state_of(model)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging b"):
        model.merge_adapter(["b"])
    assert model.get_model_status().merged_adapters == ["b", "default"]
    near(logits(model), expected, 1e-5 if dtype == torch.float32 else 0.2)
    model.unmerge_adapter()
    assert_same_state(model, before)
    assert torch.equal(logits(model), expected)


@both
@every_kind
def test_merge_and_unload_is_the_plain_model_with_dense_weights(
    config: Config, kind: tuple[Make, dict[str, Any]], tmp_path: Path
) -> None:
    make, options = kind
    model = trained(config, make, **options)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    plain = model.merge_and_unload(safe_merge=True)
    assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in make().named_modules()}
    near(logits(plain), expected, 1e-5)
    dense = with_dense_weights(make, tmp_path)
    for name, p in plain.named_parameters():
        near(p.double(), dense.get_parameter(name), 1e-6)


@both
def test_a_broken_adapter_is_not_merged_safely(config: Config) -> None:
    model = made(config)
    last = list(adapters_of(model).values())[-1]
    with torch.no_grad():
        last.S.fill_(math.nan)
    weights = base_weights(model)
    with pytest.raises(ConfigError, match=r"NaNs detected.*default"):
        model.merge_adapter(safe_merge=True)
    assert not any(m.merged for m in tuner_layers(model).values())
    assert all(map(torch.equal, base_weights(model), weights))
    layers = tuner_layers(model)
    with pytest.raises(ConfigError, match=r"NaNs detected.*default"):
        model.merge_and_unload(safe_merge=True)
    assert tuner_layers(model) == layers
    assert all(map(torch.equal, base_weights(model), weights))


@both
def test_what_happens_while_merged(config: Config, tmp_path: Path) -> None:
    """Saving, disabling, switching and loading into a merged model."""
    model, a, b = two(config, tmp_path)
    model.merge_adapter()
    near(logits(model), a, 1e-5)
    model.save_pretrained(tmp_path / "merged")
    assert load_file(tmp_path / "merged/a/adapter_model.safetensors").keys() == (
        load_file(tmp_path / "a/adapter_model.safetensors").keys()
    )
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("a")
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("b")
    assert torch.equal(logits(model), b)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert torch.equal(logits(model), b)
    model.merge_adapter()
    model.load_adapter(tmp_path / "b", adapter_name="b")
    assert not any(m.merged for m in tuner_layers(model).values())
    assert torch.equal(logits(model), b)


@both
def test_a_tied_weight_stays_as_it_is(config: Config) -> None:
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = made(config, gpt2, target_modules=["lm_head"])
    embedding = model.base_model.model.transformer.wte.weight
    before = embedding.detach().clone()
    train(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    assert torch.equal(embedding, before)


# Precision, checkpointing, copies


@both
def test_a_half_precision_base_has_float32_factors(config: Config, tmp_path: Path) -> None:
    def half() -> Any:
        return llama().bfloat16()

    model = made(config, half)
    optimizer = train(model)
    factors = {t.dtype for a in adapters_of(model).values() for t in a.factor_state().values()}
    assert factors == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "adapter" not in n} == {torch.bfloat16}
    assert max(optimizer.residuals().values()) < 1e-6
    expected = logits(model)
    assert expected.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"autocast_adapter_dtype": False}):
        loaded = PeftModel.from_pretrained(half(), tmp_path, **options)
        assert {t.dtype for a in adapters_of(loaded).values() for t in a.factor_state().values()} == {
            torch.float32
        }
        assert torch.equal(logits(loaded), expected)
    model.half().bfloat16()
    assert {t.dtype for a in adapters_of(model).values() for t in a.factor_state().values()} == {
        torch.float32
    }


@both
def test_a_merged_base_follows_to_another_dtype(config: Config) -> None:
    model = trained(config)
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    original = base_weights(made(config))
    assert all(map(torch.equal, base_weights(model), (w.double() for w in original)))


@both
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(config: Config, reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        model = made(config)
        if checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        loss_of(model).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, g in grads[0].items():
        assert g is not None
        near(grads[1][name], g, 1e-7)


@both
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent_and_whole(config: Config, clone: Callable[[Any], Any]) -> None:
    model = trained(config)
    expected = logits(model)
    twin = clone(model)
    train(twin)
    far(logits(twin), expected)
    assert torch.equal(logits(model), expected)
    updated = logits(twin)
    near(logits(twin.merge_and_unload()), updated, 1e-5)
    assert torch.equal(logits(model), expected)


@both
def test_a_whole_state_dict_goes_through(config: Config) -> None:
    model, other = trained(config), made(config, seed=5)
    far(logits(other), logits(model)) if config is StellaConfig else None
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


# Where PEFT models come from


@both
def test_transformers_own_adapters(config: Config, tmp_path: Path) -> None:
    model = llama()
    torch.manual_seed(1)
    model.add_adapter(config(r=3, target_modules=TARGETS, lora_alpha=6))
    optimizer = train(model)
    assert max(optimizer.residuals().values()) < 1e-6
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    near(double_logits(with_dense_weights(llama, tmp_path / "adapter")), expected, 2e-5)
    loaded = llama()
    loaded.load_adapter(str(tmp_path / "adapter"))
    near(logits(loaded), expected, 0)
    export_lora(model, tmp_path / "lora")
    near(logits(PeftModel.from_pretrained(llama(), tmp_path / "lora")), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(llama()))
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), logits(llama()))


@both
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_auto_classes_find_base_and_adapter(config: Config, task: str | None, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(r=3, target_modules=TARGETS, task_type=task))
    train(model)
    for directory in ("adapter", "lora"):
        if directory == "lora":
            export_lora(model, tmp_path / "lora")
        else:
            model.save_pretrained(tmp_path / "adapter")
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / directory)
        near(logits(loaded), logits(model))
    saved = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert isinstance(saved, config)
    assert saved.task_type == task
    assert (saved.r, saved.target_modules) == (3, set(TARGETS))


@pytest.mark.slow
def test_a_fresh_process_needs_the_import_and_no_more(tmp_path: Path) -> None:
    model = trained(StellaConfig)
    model.save_pretrained(tmp_path)
    torch.save(logits(model), tmp_path / "expected.pt")
    llama().save_pretrained(tmp_path / "base")
    # Without the import the words are PEFT's own: nothing of ours runs. The page says what they mean.
    code = f"""
import torch, transformers, peft
base = transformers.LlamaForCausalLM.from_pretrained({str(tmp_path / "base")!r})
try:
    peft.PeftModel.from_pretrained(base, {str(tmp_path)!r})
except KeyError as error:
    assert error.args == ("STELLA",), error
else:
    raise AssertionError("loaded")
import stiefelopt.integrations.peft
model = peft.PeftModel.from_pretrained(base, {str(tmp_path)!r}).eval()
out = model(torch.arange(24).reshape(4, 6)).logits
assert torch.equal(out, torch.load({str(tmp_path / "expected.pt")!r})), "other outputs"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Plain LoRA, out and in


@both
@every_kind
def test_stock_lora_loads_what_is_exported(
    config: Config, kind: tuple[Make, dict[str, Any]], tmp_path: Path
) -> None:
    make, options = kind
    model = trained(config, make, **options)
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert type(loaded.peft_config["default"]) is LoraConfig
    near(logits(loaded), logits(model), 5e-6)
    near(logits(loaded.merge_and_unload()), logits(model), 1e-5)


@both
def test_one_of_several_adapters_is_exported(config: Config, tmp_path: Path) -> None:
    model, *_ = two(config, tmp_path)
    # In float64, without what float32 does inside our model.
    exact = {"a": logits(copy.deepcopy(model).double())}
    model.set_adapter("b")
    exact["b"] = logits(copy.deepcopy(model).double())
    model.set_adapter("a")
    export_lora(model, tmp_path / "active")
    export_lora(model, tmp_path / "named", adapter_name="b")
    for name, where in (("a", "active"), ("b", "named")):
        loaded = PeftModel.from_pretrained(llama(), tmp_path / where)
        near(logits(loaded), exact[name].float(), 5e-6)
        near(logits(loaded.double()), exact[name])
    with pytest.raises(UnknownNameError, match="'c'; there are 'a', 'b'"):
        export_lora(model, tmp_path / "none", adapter_name="c")
    model.base_model.set_adapter(["a", "b"])
    with pytest.raises(ConfigError, match="say which one"):
        export_lora(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@both
def test_a_tuner_on_another_tuner_leaves_it_in(config: Config) -> None:
    x = torch.randn(5, 8)
    inner = get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    expected = inner(x).detach()
    outer = get_peft_model(inner, config(r=2, target_modules=["0"]))
    layer = next(m for m in outer.modules() if isinstance(m, AdaptedLinear))
    trained_layer = layer.adapters["default"]
    near(outer(x).detach(), trained_layer.add_update(expected, x).detach())
    layer.base_layer = nn.Linear(8, 8)
    expected = trained_layer.add_update(layer.base_layer(x), x).detach()
    near(layer(x).detach(), expected)
    layer.merge()
    near(layer(x).detach(), expected)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@both
def test_torchs_encoder_packs_padded_sequences(config: Config) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    model = get_peft_model(model, config(r=4, lora_alpha=64, target_modules=["linear1", "linear2"]))
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model.train()(x, src_key_padding_mask=mask).detach() * ~mask[..., None]
    with torch.no_grad():
        near(model.eval()(x, src_key_padding_mask=mask), expected)


@both
def test_a_wrapped_model_is_exported_as_what_it_wraps(config: Config, tmp_path: Path) -> None:
    model = trained(config, bert, target_modules=["query"], modules_to_save=["classifier"])
    for wrap in (nn.DataParallel, nn.Sequential):
        loaded = PeftModel.from_pretrained(bert(), export_lora(wrap(model), tmp_path / wrap.__name__))
        near(logits(loaded), logits(model), 5e-6)
    with pytest.raises(UnknownNameError, match="pass the model that PEFT gave"):
        export_lora(model.get_base_model().bert, tmp_path)
    layers = model.get_base_model().bert.encoder.layer
    layers[0] = torch.compile(layers[0], backend="eager")
    near(logits(PeftModel.from_pretrained(bert(), export_lora(model, tmp_path))), logits(loaded), 5e-6)


def test_an_adapter_with_biases_is_no_plain_lora(tmp_path: Path) -> None:
    model = get_peft_model(bert(), StellaConfig(r=2, target_modules=["query"], bias="all"))
    with pytest.raises(ConfigError, match="trains biases"):
        export_lora(model, tmp_path / "none")


def lora_checkpoint(make: Make, directory: Path, **options: Any) -> Tensor:
    """A LoRA checkpoint that PEFT saved, with random factors; returns its outputs."""
    torch.manual_seed(2)
    config = LoraConfig(r=3, lora_alpha=6, fan_in_fan_out=make is gpt2, init_lora_weights=False, **options)
    model = get_peft_model(make(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(torch.randn_like(p), alpha=0.1)
    model.save_pretrained(directory)
    return logits(model)


@both
@every_kind
def test_a_lora_checkpoint_trains_on_with_geometry(
    config: Config, kind: tuple[Make, dict[str, Any]], tmp_path: Path
) -> None:
    make, options = kind
    expected = lora_checkpoint(make, tmp_path / "lora", **options)
    model = import_lora(make(), tmp_path / "lora", config, lora_dropout=0.1)
    assert isinstance(model, PeftModel)
    near(logits(model), expected, 1e-5)
    optimizer = train(model)
    assert max(optimizer.residuals().values()) < 1e-6
    far(logits(model), expected)
    model.save_pretrained(tmp_path / "ours")
    near(logits(PeftModel.from_pretrained(make(), tmp_path / "ours")), logits(model), 0)
    export_lora(model, tmp_path / "again")
    near(logits(PeftModel.from_pretrained(make(), tmp_path / "again")), logits(model), 1e-5)


@both
def test_an_imported_adapter_loads_into_one_that_started_elsewhere(config: Config, tmp_path: Path) -> None:
    """Files of an import hold what a fresh adapter has, and replace all of it."""
    expected = lora_checkpoint(llama, tmp_path / "lora", target_modules=TARGETS)
    model: Any = import_lora(llama(), tmp_path / "lora", config)
    model.save_pretrained(tmp_path / "ours")
    other = made(config, seed=7, lora_alpha=3)
    peft.set_peft_model_state_dict(other, load_file(tmp_path / "ours/adapter_model.safetensors"))
    near(logits(other), expected, 1e-5)
    plain = llama()
    plain.load_adapter(str(tmp_path / "ours"))
    near(logits(plain), expected, 1e-5)


@both
def test_an_untrained_lora_checkpoint_comes_in(config: Config, tmp_path: Path) -> None:
    """B = 0 has no rank: StelLA takes S = 0, RiemannLoRA a small start that it takes out again."""
    get_peft_model(llama(), LoraConfig(r=3, target_modules=TARGETS)).save_pretrained(tmp_path)
    model = import_lora(llama(), tmp_path, config)
    near(logits(model), logits(llama()))
    train(model)
    far(logits(model), logits(llama()))


@both
@pytest.mark.parametrize("make", [llama, gpt2], ids=["Linear", "Conv1D"])
def test_pefts_own_conversion_to_lora(config: Config, make: Make, tmp_path: Path) -> None:
    targets = TARGETS if make is llama else ["c_attn"]
    model = trained(config, make, target_modules=targets)
    assert model.supports_lora_conversion()
    peft.save_as_lora(tmp_path, model, rank=6)
    near(logits(PeftModel.from_pretrained(make(), tmp_path)), logits(model), 1e-5)


def test_an_import_may_train_biases_too(tmp_path: Path) -> None:
    expected = lora_checkpoint(bert, tmp_path, target_modules=["query"])
    model = import_lora(bert(), tmp_path, StellaConfig, bias="all")
    near(logits(model), expected, 1e-5)
    assert all(p.requires_grad for n, p in model.named_parameters() if n.endswith(".bias"))


def test_import_takes_a_class_and_keeps_the_task(tmp_path: Path) -> None:
    lora_checkpoint(llama, tmp_path, target_modules=TARGETS, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"object StellaConfig.*a class is needed"):
        import_lora(llama(), tmp_path, StellaConfig(r=3))
    model = import_lora(llama(), tmp_path, StellaConfig)
    assert isinstance(model, peft.PeftModelForCausalLM)


@pytest.mark.parametrize("options", [{}, {"diagonal": True}], ids=["full", "diagonal"])
@pytest.mark.parametrize("make", [llama, gpt2], ids=["Linear", "Conv1D"])
def test_pseudo_zero_stays_beside_the_base_all_the_way(
    make: Make, options: dict[str, Any], tmp_path: Path
) -> None:
    """Trained, saved, merged, exported: the start is taken out exactly once each time."""
    targets = TARGETS if make is llama else ["c_attn"]
    model = made(StellaConfig, make, init="pseudo-zero", target_modules=targets, **options)
    weights = base_weights(model)
    near(logits(model), logits(make()))
    train(model)
    expected = logits(model)
    far(expected, logits(make()))
    assert all(map(torch.equal, base_weights(model), weights))
    model.save_pretrained(tmp_path / "ours")
    near(double_logits(with_dense_weights(make, tmp_path / "ours")), expected, 2e-5)
    torch.manual_seed(9)
    near(logits(PeftModel.from_pretrained(make(), tmp_path / "ours", low_cpu_mem_usage=True)), expected, 0)
    export_lora(model, tmp_path / "lora")
    near(logits(PeftModel.from_pretrained(make(), tmp_path / "lora")), expected, 1e-5)
    near(logits(model.merge_and_unload()), expected, 1e-5)


# Locally optimal initialization


def test_loi_through_peft_is_loi() -> None:
    model = made(RiemannLoraConfig, init="loi", r=2, lora_alpha=None)
    plain = adapt(llama(), RiemannLoRALinear, target_modules=TARGETS, r=2, init="loi", correction="keep")
    for m in (model, plain):
        loi_init(m, lambda m=m: loss_of(m), generator=torch.Generator().manual_seed(0), progress=False)  # type: ignore[misc]
    near(logits(model), logits(llama()))
    adapters = list(adapters_of(model).values())
    layers = [m for m in plain.modules() if isinstance(m, RiemannLoRALinear)]
    for adapter, layer in zip(adapters, layers, strict=True):
        near(adapter.delta_weight() + 0, layer.delta_weight())
        near((adapter.U @ adapter.V.T).abs(), (layer.U @ layer.V.T).abs(), 1e-4)
    model.merge_adapter()
    before = state_of(model)
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        loi_init(model, lambda: loss_of(model), progress=False)
    assert_same_state(model, before)


# Refusals


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "rank is 0"),
        ({"r": 2.0}, "rank is 2.0"),
        ({"rank_pattern": {"q_proj": -1}}, "rank is -1"),
        ({"lora_alpha": 0}, "alpha is 0"),
        ({"lora_dropout": 1.0}, "dropout is 1.0"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"init": "gaussian"}, "init is 'gaussian'"),
        ({"target_modules": "q_proj", "layers_to_transform": 1}, "list of names"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
    ],
    ids=str,
)
def test_options_out_of_range(config: Config, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": TARGETS, "rank_pattern": {"layers.1.self_attn.v_proj": 17}},
            "layers.1.*v_proj.*rank is 17",
        ),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*linear module is needed"),
        ({"target_modules": ["no_such"]}, "not found"),
    ],
    ids=["rank", "embedding", "nothing"],
)
def test_a_refused_adapter_leaves_the_model_alone(
    config: Config, options: dict[str, Any], message: str
) -> None:
    model = llama()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(r=3, **options))
    assert_same_state(model, before)
    adapted = trained(config, target_modules=["q_proj", "up_proj"])
    expected, before = logits(adapted), state_of(adapted)
    with pytest.raises(ValueError, match=message):
        adapted.add_adapter("b", config(r=3, **options))
    assert_same_state(adapted, before)
    assert list(adapted.peft_config) == ["default"]
    assert torch.equal(logits(adapted), expected)


@both
def test_modules_that_never_call_their_weight_are_refused(config: Config) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with pytest.raises(ConfigError, match=r"MultiheadAttention.*exclude_modules"):
        get_peft_model(model, config(r=2, target_modules="all-linear"))
    adapted = get_peft_model(model, config(r=2, target_modules="all-linear", exclude_modules=["out_proj"]))
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        for layer in tuner_layers(adapted).values():
            layer.adapters["default"].S.add_(1.0)
        adapted.eval()
        fast = adapted.base_model.model(x)
        near(fast, adapted.base_model.model.train()(x))
        with adapted.disable_adapter():
            far(adapted.base_model.model.eval()(x), fast)


def test_what_adapt_made_and_what_peft_holds_are_not_mixed_up() -> None:
    model = made(StellaConfig)
    for call in (merge_adapters, adapter_state_dict):
        before = state_of(model)
        with pytest.raises(ConfigError, match="merge_and_unload"):
            call(model)
        assert_same_state(model, before)


# Registration


def test_a_model_with_pefts_own_adapters_is_refused_until_they_are_merged() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    with pytest.raises(ConfigError, match=r"merge_and_unload\(\) first"):
        StelLALinear(layer, 2)
    with pytest.raises(ConfigError, match=r"0: .*merge_and_unload\(\) first"):
        adapt(model, target_modules="all-linear", r=2)
    assert model.base_model.model[0] is layer
    adapt(model.merge_and_unload(), target_modules="all-linear", r=2)


def test_the_peft_that_is_tested_is_the_one_that_is_claimed() -> None:
    assert peft.__version__.startswith(registration.TESTED + ".")


@pytest.mark.parametrize(
    "place", ["peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING", "peft.tuners.tuners_utils.check_adapters_to_merge"]
)
def test_a_peft_that_has_moved_things_is_refused(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(registration.__file__).read_text()
    names = {"__name__": registration.__name__, "__package__": registration.__package__}
    exec(compile(source, registration.__file__, "exec"), dict(names))
    monkeypatch.delattr(place)
    with pytest.raises(ImportError, match=rf"has moved.*{place.rpartition('.')[2]}.*peft==0\.21"):
        exec(compile(source, registration.__file__, "exec"), dict(names))


def test_a_peft_with_a_method_of_that_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "STELLA", LoraConfig)
    with pytest.raises(ConfigError, match=r"has a method STELLA already.*LoraConfig.*peft==0\.21"):
        registration.register(Method.STELLA, StellaConfig, StellaModel, peft_parts)
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["STELLA"] is LoraConfig


def test_another_peft_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", "0.23.1")
    with pytest.warns(UserWarning, match=r"This is peft 0\.23\.1; .*tested with peft 0\.21"):
        registration.register(Method.STELLA, StellaConfig, StellaModel, peft_parts)


# The page


PAGE = Path(__file__).parent.parent / "docs" / "peft.md"


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {
        "load_base_model": llama,
        "batches": [{"input_ids": IDS, "labels": IDS}] * 3,
    }
    outputs = []
    for block in blocks:
        exec(block, names)
        outputs.append(logits(names["model"]))
    for later in (*outputs[1:], logits(names["plain"])):
        near(later, outputs[0], 1e-5)
    far(outputs[0], logits(llama()))


def test_the_page_names_the_peft_that_is_tested() -> None:
    assert (
        f"Tested with PEFT {registration.TESTED} ({peft.__version__}) and transformers " in PAGE.read_text()
    )
