"""transformers' Trainer, with no subclass: it does what a loop by hand does, resumes bit for bit, and logs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.optim import AdamW

from stiefelopt import RiemannianWrapper, adapt, param_groups
from stiefelopt.errors import ConfigError
from tests.training import BATCH, CLIP, Net, bits, by_hand, same, same_state, samples, wrapped

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from stiefelopt.integrations.transformers import RiemannianCallback, riemannian


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": CLIP,
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changed,
    }
    return TrainingArguments(**settings)


def trainer_of(model: nn.Module, folder: Path, data: Any = None, **changed: Any) -> Trainer:
    return Trainer(
        model=model,
        args=arguments(folder, **changed),
        train_dataset=samples(32) if data is None else data,
        optimizers=(wrapped(model), None),
    )


def wrapper_of(trainer: Trainer) -> RiemannianWrapper:
    """Inside accelerate's optimizer."""
    assert type(trainer.optimizer).__name__ == "AcceleratedOptimizer"
    return trainer.optimizer.optimizer


def worst(trainer: Trainer) -> float:
    return max(wrapper_of(trainer).residuals().values())


@pytest.mark.parametrize("accumulate", [1, 4])
def test_it_does_what_a_loop_by_hand_does(accumulate: int, tmp_path: Path) -> None:
    trainer = trainer_of(Net(), tmp_path, gradient_accumulation_steps=accumulate)
    trainer.train()
    hand, steps = Net(), 8 // accumulate
    wrapper = wrapped(hand)
    scheduler = get_scheduler("cosine", wrapper, num_warmup_steps=2, num_training_steps=steps)
    by_hand(hand, wrapper, scheduler, samples(32), accumulate, list(hand.parameters()))
    assert trainer.state.global_step == steps
    assert same(bits(trainer.model), bits(hand))
    assert same_state(wrapper_of(trainer), wrapper)
    assert not same(bits(hand), bits(Net()))
    assert worst(trainer) < 1e-6


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    precision: dict[str, bool], tmp_path: Path
) -> None:
    settings = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2, **precision}
    whole = trainer_of(Net(), tmp_path / "whole", samples(48), **settings)
    whole.train()
    resumed = trainer_of(Net(seed=1), tmp_path / "resumed", samples(48), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == whole.state.global_step == 6
    assert same(bits(resumed.model), bits(whole.model))
    assert same_state(wrapper_of(resumed), wrapper_of(whole))
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
    assert worst(whole) < 1e-6


def test_bfloat16_trains_nearly_as_float32_does(tmp_path: Path) -> None:
    """fp16 is not tested here: on a CPU accelerate ignores it. test_wrapper.py has GradScaler."""
    rounded, exact = trainer_of(Net(), tmp_path, bf16=True), trainer_of(Net(), tmp_path)
    for trainer in (rounded, exact):
        trainer.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (rounded, exact)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_language_model_with_recomputed_activations(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    tokens = torch.randint(0, 32, (16, 6), generator=torch.Generator().manual_seed(1))
    losses = []
    for recomputed in (True, False):
        torch.manual_seed(0)
        model = adapt(LlamaForCausalLM(config), target_modules="all-linear", r=2)
        trainer = trainer_of(
            model,
            tmp_path,
            [{"input_ids": t, "labels": t} for t in tokens],
            activation_checkpointing=recomputed,
            gradient_accumulation_steps=2,
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert worst(trainer) < 1e-6
    assert losses[0] == losses[1]


def test_a_compiled_model_trains_alike(tmp_path: Path) -> None:
    compiled = trainer_of(Net(), tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    eager = trainer_of(Net(), tmp_path)
    for trainer in (compiled, eager):
        trainer.train()
    torch._dynamo.reset()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (compiled, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert worst(compiled) < 1e-6


class Recorder(TrainerCallback):
    """Stands where TensorBoard's or W&B's callback stands."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def test_residual_and_share_are_in_the_log_and_reach_every_reporter(tmp_path: Path) -> None:
    trainer = trainer_of(Net(), tmp_path, logging_steps=2)
    trainer.add_callback(recorder := Recorder())
    RiemannianCallback.add_to(trainer)
    trainer.train()
    for entries in (trainer.state.log_history, recorder.seen):
        of_training = [entry for entry in entries if "loss" in entry]
        assert len(of_training) == 4
        assert all(0 < entry["residual"] < 1e-6 for entry in of_training)
        assert all(0 < entry["optimizer_share"] < 1 for entry in of_training)
        assert all("residual" not in entry for entry in entries if "loss" not in entry)
    assert of_training[-1]["residual"] == worst(trainer)


class SlowAdamW(AdamW):
    def step(self, closure: Any = None) -> Any:
        time.sleep(0.05)
        return super().step(closure)


class SlowNet(Net):
    def forward(self, x: Any, labels: Any = None) -> Any:
        time.sleep(0.05)
        return super().forward(x, labels)


@pytest.mark.parametrize(
    ("make", "cls", "low", "high"), [(Net, SlowAdamW, 0.6, 1.0), (SlowNet, AdamW, 0.0, 0.4)]
)
def test_the_share_tells_a_slow_optimizer_from_a_slow_model(
    make: type[Net], cls: type[AdamW], low: float, high: float, tmp_path: Path
) -> None:
    model = make()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=4, logging_steps=4),
        train_dataset=samples(32),
        optimizers=(RiemannianWrapper(cls(param_groups(model, lr=1e-2))), None),
        callbacks=[RiemannianCallback()],
    )
    trainer.train()
    assert low < trainer.state.log_history[0]["optimizer_share"] < high


def test_the_callback_refuses_an_optimizer_without_points(tmp_path: Path) -> None:
    model = Net()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=samples(8),
        optimizers=(AdamW(model.parameters()), None),
        callbacks=[RiemannianCallback()],
    )
    with pytest.raises(ConfigError, match=r"AdamW.*RiemannianWrapper"):
        trainer.train()


def test_the_optimizer_can_be_made_by_the_trainer(tmp_path: Path) -> None:
    """With model_init, where `optimizers=` is refused, the same run comes out."""
    trainer = Trainer(
        model_init=lambda: Net(),
        args=arguments(tmp_path),
        train_dataset=samples(32),
        optimizer_cls_and_kwargs=riemannian(AdamW, lr=2e-2, groups={"weight_decay": 0.1}),
    )
    trainer.train()
    given = trainer_of(Net(), tmp_path)
    given.train()
    assert same(bits(trainer.model), bits(given.model))
