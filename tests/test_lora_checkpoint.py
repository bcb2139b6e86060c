"""Adapters on disk: our own state dicts, and stock PEFT LoRA checkpoints in both directions."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.optim import AdamW

from stiefelopt import (
    ConfigError,
    RiemannianWrapper,
    RiemannLoRALinear,
    StelLALinear,
    Stiefel,
    UnknownNameError,
    adapt,
    adapter_state_dict,
    export_lora,
    import_lora,
    load_adapter_state_dict,
    merge_adapters,
    param_groups,
)

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)

INITS = ("random", "zero", "pseudo-zero", "svd-major", "svd-minor")
every_init = pytest.mark.parametrize("init", INITS)
IDS = torch.arange(12).reshape(2, 6)


def bert(seed: int = 0) -> Any:
    """A classifier made of nn.Linear."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
        initializer_range=0.3,
    )
    return transformers.BertForSequenceClassification(config).eval()


def gpt2(seed: int = 0) -> Any:
    """A language model made of Conv1D, with a tied head."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(config).eval()


# (model, what is adapted, what is trained whole)
Kind = tuple[Callable[[], nn.Module], list[str], tuple[str, ...]]
KINDS: dict[str, Kind] = {
    "Linear": (bert, ["query", "value", "intermediate.dense"], ()),
    "Linear and a head": (bert, ["query", "value"], ("classifier",)),
    "Conv1D": (gpt2, ["c_attn", "c_fc"], ()),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def disturb(model: nn.Module) -> nn.Module:
    """Factors and saved modules as after training."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, StelLALinear):
                for factor in (module.U, module.V):
                    factor.copy_(Stiefel().random_point(*factor.shape, generator=generator).to(factor))
                module.S.copy_(torch.randn(module.S.shape, generator=generator))
        for name, p in model.named_parameters():
            if p.requires_grad and name.endswith(("weight", "bias")):
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model


def adapted(kind: Kind, **options: Any) -> nn.Module:
    make, targets, saved = kind
    options = {"r": 3, "alpha": 6.0, "generator": torch.Generator().manual_seed(5), **options}
    return adapt(make(), StelLALinear, target_modules=targets, modules_to_save=saved, **options)


def assert_near(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def everything(model: nn.Module) -> Any:
    """Modules, trainability and values: what a refused call must leave alone."""
    modules = {n: (type(m), id(m)) for n, m in model.named_modules()}
    return modules, {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}


def assert_unchanged(model: nn.Module, before: Any) -> None:
    modules, parameters = everything(model)
    assert modules == before[0]
    for name, (requires_grad, value) in parameters.items():
        assert requires_grad == before[1][name][0], name
        assert torch.equal(value, before[1][name][1]), name


# adapter_state_dict


@every_kind
@every_init
def test_the_adapter_state_goes_through_safetensors(kind: Kind, init: str, tmp_path: Path) -> None:
    model = disturb(adapted(kind, init=init))
    save_file(adapter_state_dict(model), tmp_path / "adapter.safetensors")
    fresh = adapted(kind, init=init, generator=torch.Generator().manual_seed(99))
    assert (logits(fresh) - logits(model)).abs().max() > 1e-2
    load_adapter_state_dict(fresh, load_file(tmp_path / "adapter.safetensors"))
    assert_near(logits(fresh), logits(model))


@every_kind
def test_the_adapter_state_is_what_was_trained_and_nothing_else(kind: Kind) -> None:
    model = adapted(kind, init="pseudo-zero")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    corrections = {
        f"{n}.{k}" for n, m in model.named_modules() if isinstance(m, StelLALinear) for k in ("U0", "V0")
    }
    state = adapter_state_dict(model)
    assert set(state) == trained | corrections
    assert all(not t.requires_grad and t.is_contiguous() for t in state.values())


def test_the_adapter_state_is_a_copy() -> None:
    model = adapted(KINDS["Linear and a head"])
    state = adapter_state_dict(model)
    before = {k: t.clone() for k, t in state.items()}
    disturb(model)
    assert all(torch.equal(state[k], before[k]) for k in state)


@pytest.mark.parametrize("saved", INITS)
@pytest.mark.parametrize("live", ["random", "pseudo-zero"])
def test_states_load_across_inits(saved: str, live: str) -> None:
    """A correction folded into the live base weight is undone before the saved one is taken out."""
    model = disturb(adapted(KINDS["Conv1D"], init=saved))
    other = adapted(KINDS["Conv1D"], init=live, generator=torch.Generator().manual_seed(99))
    load_adapter_state_dict(other, adapter_state_dict(model))
    assert_near(logits(other), logits(model))


def test_loading_unmerges() -> None:
    model, other = disturb(adapted(KINDS["Linear"])), adapted(KINDS["Linear"])
    for module in other.modules():
        if isinstance(module, StelLALinear):
            module.merge()
    load_adapter_state_dict(other, adapter_state_dict(model))
    assert not any(m.merged for m in other.modules() if isinstance(m, StelLALinear))
    assert_near(logits(other), logits(model))


def test_saving_while_merged_saves_the_factors() -> None:
    model = disturb(adapted(KINDS["Linear"], init="pseudo-zero"))
    expected = logits(model)
    for module in model.modules():
        if isinstance(module, StelLALinear):
            module.merge()
    other = adapted(KINDS["Linear"])
    load_adapter_state_dict(other, adapter_state_dict(model))
    assert_near(logits(other), expected)


def test_a_lone_layer_has_a_state_too() -> None:
    layers = [StelLALinear(nn.Linear(6, 5), 2, init="pseudo-zero") for _ in range(2)]
    layers[1].base.load_state_dict(merge_adapters(copy.deepcopy(layers[0])).state_dict())
    state = adapter_state_dict(layers[0])
    assert set(state) == {"U", "S", "V", "U0", "V0"}
    load_adapter_state_dict(layers[1], state)
    assert torch.equal(layers[1].U, layers[0].U)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("query", "key"): t for k, t in state.items()}


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {k: t for k, t in state.items() if not k.endswith(part)}


def with_shape(ending: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {k: torch.zeros(shape) if k.endswith(ending) else t for k, t in state.items()}


BAD_STATES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "wrong names": (renamed, r"missing .*query.*unknown .*key"),
    "a missing factor": (
        without("layer.1.attention.self.query.S"),
        r"missing .*layer\.1\.attention\.self\.query\.S",
    ),
    "an unknown factor": (lambda s: {**s, "extra.U": torch.zeros(2, 2)}, r"unknown .*extra\.U"),
    "a missing saved module": (without("classifier.bias"), r"missing .*classifier\.bias"),
    "another rank": (with_shape("layer.1.attention.self.query.U", 16, 2), r"U.*\(16, 2\).*\(16, 3\)"),
    "another head": (with_shape("classifier.weight", 5, 16), r"classifier.*\(?\[?5, 16"),
    "half a correction": (without("layer.1.attention.self.query.V0"), r"query\.V0"),
    "a correction of another shape": (with_shape("layer.1.attention.self.query.U0", 2, 2), r"U0"),
    "empty": (lambda _: {}, r"missing"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_STATES.values(), ids=list(BAD_STATES))
def test_a_state_that_does_not_fit_changes_nothing(
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    model = adapted(KINDS["Linear and a head"], init="pseudo-zero")
    state = spoil(adapter_state_dict(disturb(copy.deepcopy(model))))
    before = everything(model)
    with pytest.raises(ConfigError, match=message):
        load_adapter_state_dict(model, state)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "use", [adapter_state_dict, lambda m: load_adapter_state_dict(m, {}), lambda m: export_lora(m, "x")]
)
def test_a_plain_model_has_no_adapter_state(use: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ConfigError, match=r"no adapted layer.*adapt\("):
        use(bert())


class Parent(nn.Module):
    """What a LightningModule is to the model in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "a parent": Parent,
    "both": lambda model: Parent(nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=list(WRAPPERS))
def test_a_wrapped_model_has_the_plain_models_checkpoints(wrap: Callable[..., Any], tmp_path: Path) -> None:
    kind = KINDS["Linear and a head"]
    model = disturb(adapted(kind))
    plain, state = adapter_state_dict(model), adapter_state_dict(wrap(model))
    assert state.keys() == plain.keys()
    for name in (n for n in plain if "classifier" in n):
        assert torch.equal(state[name], plain[name])
    fresh = adapted(kind, generator=torch.Generator().manual_seed(99))
    load_adapter_state_dict(wrap(fresh), plain)
    assert_near(logits(fresh), logits(model), 0)
    assert_near(logits(exported_to_peft(wrap(model), bert, tmp_path)), logits(model))


def checkpointed(model: Any) -> Any:
    layers = any(isinstance(module, StelLALinear) for module in model.modules())
    kinds = (type(model.bert.encoder.layer[0]), StelLALinear if layers else nn.Linear)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kinds))
    return model


def compiled_in_part(model: Any) -> Any:
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0], backend="eager")
    return model


@pytest.mark.parametrize("wrap", [checkpointed, compiled_in_part])
def test_wrappers_inside_a_model_have_no_part_in_names(wrap: Callable[..., Any], tmp_path: Path) -> None:
    kind = KINDS["Linear and a head"]
    model = disturb(adapted(kind))
    plain, wrapped = adapter_state_dict(model), wrap(copy.deepcopy(model))
    state = adapter_state_dict(wrapped)
    assert state.keys() == plain.keys()
    fresh = wrap(adapted(kind, generator=torch.Generator().manual_seed(99)))
    load_adapter_state_dict(fresh, plain)
    assert_near(logits(fresh), logits(model))
    assert_near(logits(exported_to_peft(wrapped, bert, tmp_path)), logits(model))
    assert_near(logits(merge_adapters(wrapped)), logits(model))


@pytest.mark.parametrize("wrap", [checkpointed, compiled_in_part])
def test_wrappers_inside_a_model_do_not_hide_what_is_to_be_adapted(
    wrap: Callable[..., Any], tmp_path: Path
) -> None:
    make, targets, saved = KINDS["Linear and a head"]
    regex = rf"bert\.encoder\.layer\.\d\.attention\.self\.({'|'.join(targets)})"
    options: dict[str, Any] = {"modules_to_save": saved, "r": 3, "alpha": 6.0}
    model = disturb(adapt(wrap(make()), target_modules=regex, **options))
    assert adapter_state_dict(model).keys() == adapter_state_dict(adapted(KINDS["Linear and a head"])).keys()
    export_lora(model, tmp_path)
    assert_near(logits(import_lora(wrap(make()), tmp_path)), logits(model))


@pytest.mark.parametrize("wrap", [lambda m: m, Parent], ids=["bare", "wrapped"])
def test_a_model_adapted_in_part_has_names_of_its_own(wrap: Callable[..., Any], tmp_path: Path) -> None:
    model = gpt2().requires_grad_(False)
    disturb(adapt(model.transformer, target_modules=["c_attn"], modules_to_save=["ln_f"], r=3))
    given = wrap(model)
    state = adapter_state_dict(given)
    assert all(name.startswith("transformer.") for name in state)
    load_adapter_state_dict(given, state)
    assert_near(logits(exported_to_peft(given, gpt2, tmp_path)), logits(model))


def test_two_adapted_models_in_one_parent_keep_both_heads() -> None:
    kind = KINDS["Linear and a head"]
    pair = nn.ModuleDict({"a": disturb(adapted(kind)), "b": adapted(kind)})
    state = adapter_state_dict(pair)
    assert {n.split(".")[0] for n in state if n.endswith("classifier.weight")} == {"a", "b"}
    fresh: Any = nn.ModuleDict({"a": adapted(kind), "b": adapted(kind)})
    load_adapter_state_dict(fresh, state)
    assert_near(logits(fresh["a"]), logits(pair["a"]), 0)


# export


def exported_to_peft(model: nn.Module, make: Callable[[], nn.Module], path: Path) -> Any:
    export_lora(model, path)
    return peft.PeftModel.from_pretrained(make(), path)


@every_kind
@every_init
@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_stock_peft_loads_an_exported_model_with_the_same_outputs(
    kind: Kind, init: str, diagonal: bool, tmp_path: Path
) -> None:
    model = disturb(adapted(kind, init=init, diagonal=diagonal))
    loaded = exported_to_peft(model, kind[0], tmp_path)
    assert_near(logits(loaded), logits(model))
    assert (logits(loaded) - logits(kind[0]())).abs().max() > 1e-2
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 6 if init == "pseudo-zero" else 3)
    assert config["r"] == config["lora_alpha"]
    assert config["fan_in_fan_out"] == (kind[0] is gpt2)


@pytest.mark.parametrize("kind", [KINDS["Linear"], KINDS["Conv1D"]], ids=["Linear", "Conv1D"])
def test_peft_merges_what_was_exported(kind: Kind, tmp_path: Path) -> None:
    model = disturb(adapted(kind))
    merged = exported_to_peft(model, kind[0], tmp_path).merge_and_unload()
    assert_near(logits(merged), logits(model))
    for p, q in zip(merged.parameters(), merge_adapters(model).parameters(), strict=True):
        assert_near(p.detach(), q.detach(), 1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_exporting_changes_nothing_and_works_merged(merged: bool, tmp_path: Path) -> None:
    kind = KINDS["Linear"]
    model = disturb(adapted(kind, init="pseudo-zero", use_rslora=True, dropout=0.1))
    if merged:
        for module in model.modules():
            if isinstance(module, StelLALinear):
                module.merge()
    before, expected = everything(model), logits(model)
    path = tmp_path / "a" / "b"
    assert export_lora(model, str(path)) == path
    assert_unchanged(model, before)
    assert_near(logits(peft.PeftModel.from_pretrained(bert(), path)), expected)


def test_a_checkpoint_holds_only_peft_names(tmp_path: Path) -> None:
    export_lora(adapted(KINDS["Linear and a head"]), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    layer = "base_model.model.bert.encoder.layer"
    factors = {
        f"{layer}.{i}.attention.self.{t}.lora_{ab}.weight"
        for i in range(2)
        for t in ("query", "value")
        for ab in "AB"
    }
    assert names == factors | {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_is_exported_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapt(bert().to(dtype), target_modules=["query"], r=3)
    disturb(model)
    export_lora(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    loaded = peft.PeftModel.from_pretrained(bert().to(dtype), tmp_path)
    assert_near(logits(loaded).float(), logits(model).float(), 0.1)


def test_exporting_over_an_older_checkpoint(tmp_path: Path) -> None:
    for kind in (KINDS["Linear and a head"], KINDS["Linear"]):
        model = disturb(adapted(kind))
        loaded = exported_to_peft(model, kind[0], tmp_path)
    assert_near(logits(loaded), logits(model))


class Nested(nn.Module):
    """A name, 'lin', that is also the ending of another, 'inner.lin'."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"lin": nn.Linear(6, 6), "lin2": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["lin2"](torch.tanh(self.inner["lin"](torch.tanh(self.lin(x)))))


@pytest.mark.parametrize("targets", ["lin", r"inner\.lin", r"lin|inner\.lin2"])
def test_only_the_adapted_layers_are_targets_of_the_checkpoint(targets: str, tmp_path: Path) -> None:
    model = disturb(adapt(Nested(), target_modules=targets, r=2))
    x = torch.randn(4, 6)
    export_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(Nested(), tmp_path)
    assert_near(loaded(x).detach(), model(x).detach())
    ours = {n for n, m in model.named_modules() if isinstance(m, StelLALinear)}
    prefix = "base_model.model."
    theirs = {
        n.removeprefix(prefix) for n, m in loaded.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert theirs == ours


def test_conv1d_and_linear_go_out_and_come_in_together(tmp_path: Path) -> None:
    """PEFT corrects fan_in_fan_out layer by layer."""
    model = disturb(adapt(untied(), target_modules=["c_attn", "lm_head"], r=3))
    loaded = exported_to_peft(model, untied, tmp_path)
    assert_near(logits(loaded), logits(model))
    assert_near(logits(loaded.merge_and_unload()), logits(model))
    assert_near(logits(import_lora(untied(), tmp_path)), logits(model))


def test_a_module_used_in_two_places_cannot_be_exported(tmp_path: Path) -> None:
    """PEFT would adapt it in one of them."""
    model: Any = Nested()
    model.inner["lin2"] = model.inner["lin"]
    adapt(model, target_modules=["lin", "lin2"], r=2)
    with pytest.raises(ConfigError, match=r"inner\.lin and inner\.lin2 are one module.*merge_adapters"):
        export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("saved", [["wte"], ["lm_head"], ["wte", "lm_head"]], ids=str)
@pytest.mark.filterwarnings("error:.*ensure_weight_tying")
def test_a_tied_weight_that_is_trained_is_exported_in_all_its_places(
    saved: list[str], tmp_path: Path
) -> None:
    """PEFT trains copies of modules_to_save, and ties them again; then it comes in again, tied."""
    model = disturb(adapt(gpt2(), target_modules=["c_attn"], modules_to_save=saved, r=2))
    loaded = exported_to_peft(model, gpt2, tmp_path / "ours")
    assert_near(logits(loaded), logits(model))
    copies = {p for n, p in loaded.named_parameters(remove_duplicate=False) if "modules_to_save" in n}
    assert len(copies) == 1
    back: Any = import_lora(gpt2(), tmp_path / "ours")
    assert_near(logits(back), logits(model))
    assert back.lm_head.weight is back.transformer.wte.weight
    assert back.lm_head.weight.requires_grad
    loaded.save_pretrained(tmp_path / "theirs")
    assert_near(logits(import_lora(gpt2(), tmp_path / "theirs")), logits(model))


def encoder_decoder() -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 30,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    }
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
def test_what_peft_cannot_tie_is_exported_as_copies(tmp_path: Path) -> None:
    model: Any = adapt(encoder_decoder(), target_modules=["q"], modules_to_save=["shared"], r=2)
    disturb(model)
    loaded = exported_to_peft(model, encoder_decoder, tmp_path)
    back: Any = import_lora(encoder_decoder(), tmp_path)
    with torch.no_grad():
        expected = model(IDS, labels=IDS).logits
        assert_near(loaded(input_ids=IDS, labels=IDS).logits, expected)
        assert_near(back(IDS, labels=IDS).logits, expected)
    assert back.lm_head.weight is back.shared.weight


def test_an_adapted_head_on_a_trained_embedding_cannot_be_exported(tmp_path: Path) -> None:
    model = adapt(gpt2(), target_modules=["lm_head"], modules_to_save=["wte"], r=2)
    with pytest.raises(ConfigError, match=r"lm_head holds.*trained in transformer\.wte.*adapter_state_dict"):
        export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("saved", [("wte",), ("lm_head",), ("wte", "lm_head")], ids=str)
@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
def test_copies_of_a_tied_weight_come_in_where_it_is_untied(saved: tuple[str, ...], tmp_path: Path) -> None:
    theirs = peft_checkpoint((gpt2, ["c_attn"], saved), tmp_path)
    model: Any = gpt2()
    before = everything(model)
    with pytest.raises(
        ConfigError, match=r"wte\.weight and lm_head\.weight are one.*lm_head\.weight\.detach"
    ):
        import_lora(model, tmp_path)
    assert_unchanged(model, before)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert_near(logits(import_lora(model, tmp_path)), logits(theirs))


def test_a_parent_used_in_two_places_is_exported(tmp_path: Path) -> None:
    """PEFT, too, changes what is inside it for both."""

    def make() -> nn.Module:
        block = Nested()
        return nn.Sequential(block, block)

    model = disturb(adapt(make(), target_modules=["lin"], r=2))
    x = torch.randn(4, 6)
    assert_near(exported_to_peft(model, make, tmp_path)(x).detach(), model(x).detach())


def test_an_untied_head_is_saved_by_transformers(tmp_path: Path) -> None:
    """As docs/training_loops.md says."""
    model = gpt2()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    adapt(model, target_modules=["lm_head"], r=2).save_pretrained(tmp_path)  # type: ignore[operator]
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["lm_head.base.weight"], saved["transformer.wte.weight"])
    with pytest.raises(RuntimeError, match="shared tensors"):
        adapt(gpt2(), target_modules=["lm_head"], r=2).save_pretrained(tmp_path)  # type: ignore[operator]


def test_a_tied_head_that_is_adapted_cannot_be_tied_again() -> None:
    model: Any = adapt(gpt2(), target_modules=["lm_head"], r=2)
    before = logits(model)
    for call in (model.tie_weights, lambda: model.resize_token_embeddings(40)):
        assert_near(logits(model), before, 0)
        with pytest.raises(ConfigError, match=r"StelLALinear.*another weight.*merge_adapters\(model\) first"):
            call()
    model = merge_adapters(adapt(gpt2(), target_modules=["lm_head"], r=2))
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_saved_modules_are_exported_however_they_lie_in_memory(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 6))

    model: Any = adapt(make(), target_modules=["2"], modules_to_save=["0"], r=2)
    disturb(model.to(memory_format=torch.channels_last))
    x = torch.randn(4, 3, 3, 3)
    assert_near(exported_to_peft(model, make, tmp_path)(x).detach(), model(x).detach())


def decoder_classifier() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 29}
    return transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes, num_labels=3)).eval()


@pytest.mark.parametrize(
    ("make", "target", "task", "auto", "kind"),
    [
        (gpt2, "c_attn", None, "AutoPeftModel", "PeftModel"),
        (gpt2, "c_attn", None, "AutoPeftModelForCausalLM", "PeftModelForCausalLM"),
        (gpt2, "c_attn", "CAUSAL_LM", "AutoPeftModelForCausalLM", "PeftModelForCausalLM"),
        (bert, "query", None, "AutoPeftModel", "PeftModel"),
        (
            bert,
            "query",
            "SEQ_CLS",
            "AutoPeftModelForSequenceClassification",
            "PeftModelForSequenceClassification",
        ),
        (
            decoder_classifier,
            "c_attn",
            "SEQ_CLS",
            "AutoPeftModelForSequenceClassification",
            "PeftModelForSequenceClassification",
        ),
    ],
)
def test_pefts_auto_classes_find_model_and_adapter(
    make: Any, target: str, task: str | None, auto: str, kind: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path / "base")
    base = type(make()).from_pretrained(tmp_path / "base")
    model = disturb(adapt(base, target_modules=[target], r=2))
    export_lora(model, tmp_path / "lora", task_type=task)
    loaded = getattr(peft, auto).from_pretrained(tmp_path / "lora")
    assert type(loaded).__name__ == kind
    assert_near(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("task", "message"),
    [("LM", r"'LM'; use one of 'CAUSAL_LM'"), ("SEQ_CLS", r"SEQ_CLS.*classifier whole.*adapted")],
)
def test_tasks_that_peft_could_not_load_are_refused(task: str, message: str, tmp_path: Path) -> None:
    model = adapt(bert(), target_modules=["query", "classifier"], r=2)
    with pytest.raises((UnknownNameError, ConfigError), match=message):
        export_lora(model, tmp_path / "out", task_type=task)
    assert not (tmp_path / "out").exists()


def test_an_adapter_name_means_nothing_here(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapter_name"):
        export_lora(adapted(KINDS["Linear"]), tmp_path / "out", "default")
    assert not (tmp_path / "out").exists()


# import


def peft_checkpoint(kind: Kind, path: Path, **options: Any) -> Any:
    """A LoRA of PEFT's own, trained somewhere, saved; returns the model with it."""
    make, targets, saved = kind
    settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, **options}
    fan = make is gpt2
    config = peft.LoraConfig(
        target_modules=targets, modules_to_save=list(saved) or None, fan_in_fan_out=fan, **settings
    )
    torch.manual_seed(11)
    model = peft.get_peft_model(make(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(torch.randn(p.shape), alpha=0.1)
    model.save_pretrained(path)
    return model


@every_kind
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("diagonal", [False, True], ids=["full", "diagonal"])
def test_a_peft_checkpoint_comes_in_with_the_same_outputs(
    kind: Kind, use_rslora: bool, diagonal: bool, tmp_path: Path
) -> None:
    theirs = peft_checkpoint(kind, tmp_path, use_rslora=use_rslora)
    ours = kind[0]()
    assert import_lora(ours, tmp_path, diagonal=diagonal) is ours
    assert_near(logits(ours), logits(theirs))
    layers = [m for m in ours.modules() if isinstance(m, StelLALinear)]
    assert len(layers) == sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in theirs.modules())
    for layer in layers:
        Stiefel().check(layer.U)
        Stiefel().check(layer.V)
    trainable = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 1)[1] for n in trainable if "classifier" not in n} == set("USV")


def test_training_goes_on_with_geometry_after_an_import(tmp_path: Path) -> None:
    peft_checkpoint(KINDS["Linear"], tmp_path)
    model = import_lora(bert(), tmp_path, StelLALinear, dropout=0.1)
    assert all(m.dropout.p == 0.1 for m in model.modules() if isinstance(m, StelLALinear))
    wrapper = RiemannianWrapper(AdamW(param_groups(model, lr=5e-3)))
    losses = []
    for _ in range(5):
        wrapper.zero_grad()
        loss = nn.functional.cross_entropy(model.eval()(IDS).logits, torch.tensor([0, 2]))
        loss.backward()
        wrapper.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert max(wrapper.residuals().values()) < 2e-6


@every_init
@every_kind
def test_out_and_in_again(kind: Kind, init: str, tmp_path: Path) -> None:
    model = disturb(adapted(kind, init=init))
    export_lora(model, tmp_path)
    back = import_lora(kind[0](), tmp_path)
    assert_near(logits(back), logits(model))


def untied(head: float = 1.0, size: int = 30) -> Any:
    """A language model with a head of its own, a multiple of the embedding."""
    model = gpt2()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(head * model.lm_head.weight.detach())
    model.resize_token_embeddings(size)
    return model


@pytest.mark.parametrize("layer", [StelLALinear, RiemannLoRALinear])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(gpt2, gpt2), (untied, untied), (lambda: untied(2.0), untied)],
    ids=["tied", "untied", "another head"],
)
@pytest.mark.parametrize("init", [False, True], ids=["trained", "B = 0"])
def test_the_head_that_peft_saves_below_its_adapter_comes_in(
    layer: Any, theirs: Any, ours: Any, init: bool, tmp_path: Path
) -> None:
    expected = logits(peft_checkpoint((theirs, ["lm_head"], ()), tmp_path, init_lora_weights=init))
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert_near(logits(import_lora(ours(), tmp_path, layer)), expected)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (
            lambda: untied(size=33),
            untied,
            r"'lm_head\.weight' as \(33, 16\).*\(30, 16\).*resize_token_embeddings\(33\)",
        ),
        (lambda: untied(2.0), gpt2, r"wte\.weight and lm_head\.weight are one parameter.*changes them apart"),
    ],
    ids=["resized", "tied here"],
)
def test_a_head_that_does_not_fit_changes_nothing(
    theirs: Any, ours: Any, message: str, tmp_path: Path
) -> None:
    peft_checkpoint((theirs, ["lm_head"], ()), tmp_path)
    model = ours()
    before = everything(model)
    with pytest.raises(ConfigError, match=message):
        import_lora(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_of_the_heads_that_peft_names_those_that_are_there_come_in(task: str, tmp_path: Path) -> None:
    """It writes modules_to_save = ["classifier", "score"], whichever the model has."""
    theirs = peft_checkpoint(KINDS["Linear and a head"], tmp_path, task_type=task)
    assert "score" in json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    assert_near(logits(import_lora(bert(), tmp_path)), logits(theirs.base_model.model))


def test_an_untrained_checkpoint_has_b_zero(tmp_path: Path) -> None:
    peft_checkpoint(KINDS["Linear"], tmp_path, init_lora_weights=True)
    model = import_lora(bert(), tmp_path)
    assert_near(logits(model), logits(bert()))
    RiemannianWrapper(AdamW(param_groups(model)))


@pytest.mark.parametrize(
    "pattern",
    [
        {"query": 9},
        {"bert.encoder.layer.0.attention.self.query": 9},
        {r"layer\.1\..*\.value": 9},
        {r".*layer\.0\..*": 9},
    ],
    ids=["an ending", "a whole name", "a regex", "a regex from the start"],
)
def test_alpha_patterns_mean_what_peft_says(pattern: dict[str, int], tmp_path: Path) -> None:
    theirs = peft_checkpoint(KINDS["Linear"], tmp_path, alpha_pattern=pattern)
    assert_near(logits(import_lora(bert(), tmp_path)), logits(theirs))


@pytest.mark.parametrize("layer", [StelLALinear, RiemannLoRALinear])
@pytest.mark.parametrize(
    "options",
    [{"rank_pattern": {"value": 2, "layer.1.attention.self.query": 7}}, {"r": 20}],
    ids=["several", "more than the layer's size"],
)
def test_any_ranks_come_in(layer: Any, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft_checkpoint(KINDS["Linear"], tmp_path, **options)
    model = import_lora(bert(), tmp_path, layer)
    assert_near(logits(model), logits(theirs))
    ranks = {
        n.removeprefix("base_model.model."): min(m.r["default"], m.in_features, m.out_features)
        for n, m in theirs.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert {n: m.r for n, m in model.named_modules() if isinstance(m, layer)} == ranks


@pytest.mark.parametrize("layer", [StelLALinear, RiemannLoRALinear])
def test_a_start_taken_out_at_a_large_rank_goes_out_and_in(layer: Any, tmp_path: Path) -> None:
    """Pairs of rank 2 r, more than the layer has."""
    init: Any = {"init": "pseudo-zero"} if layer is StelLALinear else {}
    model = adapt(bert(), layer, target_modules=["query", "intermediate.dense"], r=12, **init)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".S"):
                p.add_(torch.randn(p.shape), alpha=0.1)
    assert_near(logits(exported_to_peft(model, bert, tmp_path)), logits(model))
    assert_near(logits(import_lora(bert(), tmp_path, layer)), logits(model))


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return edit


def _other_layers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace("layer.1.", "layer.7."): t for k, t in tensors.items()}


def _too_wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        k: torch.zeros(3, 17) if k.endswith("layer.1.attention.self.value.lora_A.weight") else t
        for k, t in tensors.items()
    }


def _with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.weight"
    return {**tensors, name: tensors[name] * float("nan")}


def _without_a_b(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t for k, t in tensors.items() if not k.endswith("layer.1.attention.self.value.lora_B.weight")}


def _with_embedding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "base_model.model.bert.embeddings.word_embeddings.lora_embedding_"
    return {**tensors, f"{name}A": torch.ones(3, 30), f"{name}B": torch.ones(16, 3)}


def _with_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        **tensors,
        "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.bias": torch.ones(16),
    }


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda p: (p / "adapter_config.json").unlink(), r"adapter_config\.json.*save_pretrained"),
    "no weights": (
        lambda p: (p / "adapter_model.safetensors").unlink(),
        r"adapter_model\.safetensors.*save_pretrained",
    ),
    "another method": (edit_config(peft_type="LOHA"), r"LOHA.*LoRA is needed"),
    "DoRA": (edit_config(use_dora=True), r"DoRA.*plain LoRA"),
    "activated LoRA": (edit_config(alora_invocation_tokens=[1, 2]), r"alora_invocation_tokens.*plain LoRA"),
    "Arrow": (edit_config(arrow_config={"top_k": 3}), r"Arrow.*plain LoRA"),
    "replicated layers": (edit_config(layer_replication=[[0, 2], [1, 2]]), r"layer_replication.*plain LoRA"),
    "a quantized base": (edit_config(init_lora_weights="loftq"), r"'loftq'.*base weights.*plain LoRA"),
    "layers the model lacks": (edit_tensors(_other_layers), r"layer\.7"),
    "shapes that do not fit": (edit_tensors(_too_wide), r"layer\.1\.attention\.self\.value.*17"),
    "NaN": (edit_tensors(_with_nan), r"layer\.1\.attention\.self\.value.*NaN"),
    "A without B": (edit_tensors(_without_a_b), r"layer\.1\.attention\.self\.value.*lora_B"),
    "an adapted embedding": (edit_tensors(_with_embedding), r"word_embeddings"),
    "trained biases": (edit_tensors(_with_bias), r"bias"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_CHECKPOINTS.values(), ids=list(BAD_CHECKPOINTS))
def test_a_checkpoint_that_does_not_fit_changes_nothing(
    spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    peft_checkpoint(KINDS["Linear"], tmp_path)
    spoil(tmp_path)
    model = bert()
    before = everything(model)
    with pytest.raises(ConfigError, match=message):
        import_lora(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("options", [{"r": 3}, {"alpha": 6.0}, {"target_modules": ["query"]}])
def test_options_that_the_checkpoint_decides_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    peft_checkpoint(KINDS["Linear"], tmp_path)
    with pytest.raises(
        ConfigError, match=rf"{next(iter(options))}, which the checkpoint decides.*leave it out"
    ):
        import_lora(bert(), tmp_path, **options)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_shape("classifier.weight", 5, 16), r"classifier\.weight.*\(5, 16\)"),
        (without("classifier.bias"), r"classifier\.bias"),
    ],
    ids=["another shape", "in part"],
)
def test_a_saved_head_that_does_not_fit_changes_nothing(
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    peft_checkpoint(KINDS["Linear and a head"], tmp_path)
    edit_tensors(spoil)(tmp_path)
    model = bert()
    before = everything(model)
    with pytest.raises(ConfigError, match=message):
        import_lora(model, tmp_path)
    assert_unchanged(model, before)


def test_dora_saved_by_peft_is_refused(tmp_path: Path) -> None:
    peft_checkpoint(KINDS["Linear"], tmp_path, use_dora=True)
    with pytest.raises(ConfigError, match=r"DoRA.*plain LoRA"):
        import_lora(bert(), tmp_path)


@pytest.mark.parametrize("value", [None, np.zeros((3, 3), dtype=np.float32)], ids=["None", "numpy"])
def test_a_state_of_something_else_than_tensors_changes_nothing(value: Any) -> None:
    model = disturb(adapted(KINDS["Linear and a head"]))
    before, state = everything(model), adapter_state_dict(adapted(KINDS["Linear and a head"]))
    state[next(name for name in reversed(state) if name.endswith(".S"))] = value
    with pytest.raises(ConfigError, match=rf"\.S is a {type(value).__name__}; a tensor is needed"):
        load_adapter_state_dict(model, state)
    assert_unchanged(model, before)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_inits_that_change_the_base_come_in_once_peft_has_converted_them(init: str, tmp_path: Path) -> None:
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["query"]}
    torch.manual_seed(3)
    theirs = peft.get_peft_model(bert(), peft.LoraConfig(init_lora_weights=init, **options))
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's documentation says
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn(p.shape), alpha=0.3)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "raw")
    with pytest.raises(ConfigError, match=rf"{init}.*path_initial_model_for_weight_conversion"):
        import_lora(bert(), tmp_path / "raw")
    theirs.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    assert_near(logits(import_lora(bert(), tmp_path / "plain")), expected)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_inits_that_leave_the_base_alone_come_in(init: str, tmp_path: Path) -> None:
    theirs = peft_checkpoint(KINDS["Linear"], tmp_path)
    edit_config(init_lora_weights=init)(tmp_path)
    assert_near(logits(import_lora(bert(), tmp_path)), logits(theirs))


def test_trained_biases_saved_by_peft_are_refused_or_kept(tmp_path: Path) -> None:
    theirs = peft_checkpoint(KINDS["Linear"], tmp_path, bias="lora_only")
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad and name.endswith("bias"):
                p.fill_(0.5)
    theirs.save_pretrained(tmp_path)
    model = bert()
    with contextlib.suppress(ConfigError):
        assert_near(logits(import_lora(model, tmp_path)), logits(theirs))


def test_endings_that_match_more_than_the_checkpoint_holds(tmp_path: Path) -> None:
    """Of 'lin' and 'inner.lin' only the first was adapted; the other must stay plain."""
    model = disturb(adapt(Nested(), target_modules="lin", r=2))
    x = torch.randn(4, 6)
    export_lora(model, tmp_path)
    back = import_lora(Nested(), tmp_path)
    assert_near(back(x).detach(), model(x).detach())
    assert {n for n, m in back.named_modules() if isinstance(m, StelLALinear)} == {"lin"}
