"""Lightning: configure_optimizers returns the wrapper, and nothing else changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from stiefelopt import RiemannianWrapper, Stiefel, constrain, param_groups
from stiefelopt.errors import ConfigError
from tests.training import BATCH, CLIP, Net, bits, by_hand, same, same_state, samples, wrapped

pytest.importorskip("lightning")

from lightning import pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from stiefelopt.integrations.lightning import RiemannianCallback

pytestmark = [
    # Lightning's own remarks: on torch's deprecations, the loader's workers, callbacks that only the first run has.
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
TOTAL = 20  # steps of the learning rate's cycle, more than are taken


class Module(pl.LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = Net(seed)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.net(**batch)["loss"]

    def configure_optimizers(self) -> Any:
        wrapper = wrapped(self)
        scheduler = OneCycleLR(wrapper, 2e-2, total_steps=TOTAL)
        return {"optimizer": wrapper, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module: Any, folder: Path, count: int = 32, resume: Path | None = None, **changed: Any) -> Any:
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "gradient_clip_val": CLIP,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
        **changed,
    }
    trainer = pl.Trainer(**settings)
    data: Any = samples(count)  # a list is a map from indices to samples
    trainer.fit(module, DataLoader(data, batch_size=BATCH), ckpt_path=resume)
    return trainer


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_it_does_what_a_loop_by_hand_does(accumulate: int, tmp_path: Path) -> None:
    module = Module()
    trainer = fit(module, tmp_path, accumulate_grad_batches=accumulate)
    hand = Net()
    wrapper = wrapped(hand)
    in_order = [p for group in wrapper.param_groups for p in group["params"]]
    by_hand(hand, wrapper, OneCycleLR(wrapper, 2e-2, total_steps=TOTAL), samples(32), accumulate, in_order)
    assert trainer.global_step == 8 // accumulate
    assert same(bits(module.net), bits(hand))
    assert same_state(trainer.optimizers[0], wrapper)
    assert not same(bits(hand), bits(Net()))
    assert max(wrapper.residuals().values()) < 1e-6


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(precision: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"precision": precision, "accumulate_grad_batches": 2, "max_epochs": 2}
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_epochs=1, save_top_k=-1)
    whole, resumed = Module(), Module(seed=1)
    first = fit(whole, tmp_path, callbacks=[saving], enable_checkpointing=True, **settings)
    [saved] = tmp_path.glob("epoch=0*.ckpt")
    second = fit(resumed, tmp_path, resume=saved, **settings)
    assert first.global_step == second.global_step == 8
    assert same(bits(resumed), bits(whole))
    assert same_state(second.optimizers[0], first.optimizers[0])
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert max(first.optimizers[0].residuals().values()) < 1e-6


def test_half_precision_parameters_are_stepped_in_float32(tmp_path: Path) -> None:
    """precision="bf16-true" turns the module's parameters to bfloat16; ours keep their float32 masters."""

    class Half(Module):
        def __init__(self) -> None:
            super().__init__()
            del self.net
            self.layer = nn.Linear(6, 1)
            constrain(self.layer, "weight", Stiefel())

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return (self.layer(batch["x"]) - batch["labels"]).square().mean()

    module = Half()
    weight = module.layer.weight
    before = weight.detach().clone()
    trainer = fit(module, tmp_path, precision="bf16-true")
    assert weight.dtype == torch.bfloat16
    assert not torch.equal(weight, before.bfloat16())
    assert trainer.optimizers[0].state[weight]["exp_avg"].dtype == torch.float32
    assert max(trainer.optimizers[0].residuals().values()) < 1e-2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_callback_reaches_logger_and_metrics(accumulate: int, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    module = Module()
    trainer = fit(
        module,
        tmp_path,
        logger=logger,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
        callbacks=[RiemannianCallback()],
    )
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    logged = [dict(zip(header.split(","), map(float, row.split(",")), strict=True)) for row in rows]
    assert len(logged) == 8 // accumulate // 2
    assert all(0 < entry["residual"] < 1e-6 and 0 < entry["optimizer_share"] < 1 for entry in logged)
    worst = max(trainer.optimizers[0].residuals().values())
    assert trainer.callback_metrics["residual"].item() == pytest.approx(worst)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_manual_optimization_with_a_second_optimizer(tmp_path: Path) -> None:
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(1, 1)

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            ours, other = self.optimizers()
            loss = self.other(self.net(batch["x"])["logits"]).square().mean()
            self.manual_backward(loss)
            for optimizer in (ours, other):
                optimizer.step()
                optimizer.zero_grad()
            return loss

        def configure_optimizers(self) -> Any:
            ours = RiemannianWrapper(AdamW(param_groups(self.net, lr=1e-2)))
            return ours, SGD(self.other.parameters(), lr=1e-2)

    module = Manual()
    before = bits(module.net)
    trainer = fit(
        module,
        tmp_path,
        gradient_clip_val=None,
        logger=(logger := CSVLogger(tmp_path)),
        log_every_n_steps=4,
        callbacks=[RiemannianCallback()],
    )
    assert not same(bits(module.net), before)
    assert max(trainer.optimizers[0].residuals().values()) < 1e-6
    assert len((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()) == 1 + 8 // 4


@pytest.mark.parametrize("breaks", [False, True])
def test_the_callback_leaves_no_hook_behind(breaks: bool, tmp_path: Path) -> None:
    class Breaking(Module):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            if breaks and index == 1:
                raise ZeroDivisionError
            return super().training_step(batch, index)

        def configure_optimizers(self) -> Any:
            self.wrapper = wrapped(self)
            return self.wrapper

    module = Breaking()
    with pytest.raises(ZeroDivisionError) if breaks else contextlib.nullcontext():
        fit(module, tmp_path, callbacks=[RiemannianCallback()])
    assert not module.wrapper._optimizer_step_post_hooks


def test_the_callback_refuses_a_module_without_points(tmp_path: Path) -> None:
    class Plain(Module):
        def configure_optimizers(self) -> Any:
            return AdamW(self.parameters())

    with pytest.raises(ConfigError, match=r"AdamW.*RiemannianWrapper"):
        fit(Plain(), tmp_path, callbacks=[RiemannianCallback()])
