"""docs/training_loops.md says what runs: its blocks are executed in order, in one namespace."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

from stiefelopt import RiemannianWrapper, adapt

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
PAGE = Path(__file__).parent.parent / "docs" / "training_loops.md"
SECTIONS = dict(
    re.findall(r"^(?:## )?([^\n]+)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
)


def blocks(title: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", SECTIONS[title], re.DOTALL))


@pytest.fixture
def names(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What the page's first block defines, and the folder that it writes to."""
    threads = torch.get_num_threads()
    found: dict[str, Any] = {"__name__": "page", "folder": str(tmp_path)}
    exec(blocks("# Training loops: what to change in yours"), found)
    yield found
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def run(title: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(blocks(title), title, "exec"), names)
    return names


def test_plain_loop(names: dict[str, Any]) -> None:
    found = run("A plain loop", names)
    assert 0 < max(found["optimizer"].residuals().values()) < 1e-6


def test_trainer(names: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    found = run("transformers' Trainer", names)
    assert isinstance(found["trainer"].optimizer.optimizer, RiemannianWrapper)
    assert found["trainer"].state.global_step == 2


@pytest.mark.filterwarnings("ignore::FutureWarning:lightning", "ignore:.*does not have many workers")
def test_lightning(names: dict[str, Any]) -> None:
    pytest.importorskip("lightning")
    found = run("Lightning", names)
    assert 0 < found["fitted"].callback_metrics["residual"] < 1e-6


def test_trl(names: dict[str, Any]) -> None:
    """With `pip install trl datasets`, which the test extra leaves out."""
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<end>", "a", "point", "moves", "and", "stays"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    names["language_model"] = model = adapt(LlamaForCausalLM(config), target_modules="all-linear", r=2)
    names["texts"] = datasets.Dataset.from_list([{"text": "a point moves and stays"}] * 16)
    names["tokenizer"] = tokenizer
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    found = run("TRL", names)
    assert found["trainer"].state.global_step == 2
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert max(found["trainer"].optimizer.optimizer.residuals().values()) < 1e-6


def test_compile(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: real(f, backend="eager"))  # the inductor takes a minute
    found = run("torch.compile", names)
    assert 0 < max(found["optimizer"].residuals().values()) < 1e-6
