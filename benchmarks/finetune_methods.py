"""The methods that `benchmarks.finetune` compares. A new method is one entry in METHODS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import stiefelopt
from stiefelopt import RiemannianWrapper, Riemannion, RiemannLoRALinear, StelLALinear, loi_init
from stiefelopt.layers import LowRankLinear


@dataclass(frozen=True)
class Adapter:
    """What every method is given alike: rank, alpha and the names of the layers it adapts."""

    rank: int
    alpha: float
    targets: str | list[str]


@dataclass(frozen=True)
class Rates:
    """Learning rates: of the adapter (each method's own) and of the new linear head (the same for all)."""

    adapter: float
    head: float


Losses = list[Callable[[], Tensor]]


@dataclass(frozen=True)
class Method:
    """How the encoder is adapted, which optimizer trains it, and the learning rate that was tuned for it."""

    adapt: Callable[[nn.Module, Adapter], nn.Module]
    optimizer: Callable[[nn.Module, nn.Module, Rates], torch.optim.Optimizer]
    learning_rate: float
    start: Callable[[nn.Module, Losses], None] | None = (
        None  # what is done to the adapters on the first batches
    )


def lora(**flags: Any) -> Callable[[nn.Module, Adapter], nn.Module]:
    """LoRA and its relatives, by PEFT's own flags."""

    def adapt(encoder: nn.Module, adapter: Adapter) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=adapter.targets, **flags)
        return get_peft_model(encoder, config)

    return adapt


def adamw(encoder: nn.Module, head: nn.Module, rates: Rates) -> torch.optim.Optimizer:
    adapters = [p for p in encoder.parameters() if p.requires_grad]
    groups = [{"params": adapters, "lr": rates.adapter}, {"params": head.parameters(), "lr": rates.head}]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def preconditioned_adamw(encoder: nn.Module, head: nn.Module, rates: Rates) -> torch.optim.Optimizer:
    """PEFT's Riemannian preconditioned LoRA (arXiv 2402.02347): damped r x r inverses, one pair after the other."""
    from peft.optimizers import create_riemannian_optimizer

    optimizer = create_riemannian_optimizer(encoder, torch.optim.AdamW, lr=rates.adapter, weight_decay=0.0)
    optimizer.add_param_group({"params": list(head.parameters()), "lr": rates.head})
    return optimizer


def ours(layer: Callable[..., LowRankLinear], **options: Any) -> Callable[[nn.Module, Adapter], nn.Module]:
    """StelLA (arXiv 2510.01938) or RiemannLoRA (arXiv 2507.12142), by the layer's own options."""

    def adapt(encoder: nn.Module, adapter: Adapter) -> nn.Module:
        return stiefelopt.adapt(
            encoder,
            layer,
            target_modules=adapter.targets,
            r=adapter.rank,
            alpha=adapter.alpha,
            **options,
        )

    return adapt


def riemannian_adamw(encoder: nn.Module, head: nn.Module, rates: Rates) -> torch.optim.Optimizer:
    groups = stiefelopt.param_groups(encoder, lr=rates.adapter, weight_decay=0.0)
    groups += stiefelopt.param_groups(head, lr=rates.head, weight_decay=0.0)
    return RiemannianWrapper(torch.optim.AdamW(groups))


def fixed_rank_adamw(encoder: nn.Module, head: nn.Module, rates: Rates) -> torch.optim.Optimizer:
    """PEFT's own LoRA modules, their pairs (A, B) on the fixed-rank manifold."""
    groups = stiefelopt.param_groups(encoder, lr=rates.adapter, weight_decay=0.0, lora="fixed-rank")
    groups += stiefelopt.param_groups(head, lr=rates.head, weight_decay=0.0)
    return RiemannianWrapper(torch.optim.AdamW(groups))


def riemannion(encoder: nn.Module, head: nn.Module, rates: Rates) -> torch.optim.Optimizer:
    groups = stiefelopt.param_groups(encoder, lr=rates.adapter)
    return Riemannion(groups + stiefelopt.param_groups(head, lr=rates.head, weight_decay=0.0))


def locally_optimal(encoder: nn.Module, losses: Losses) -> None:
    loi_init(encoder, losses, progress=False)


# The rates of lora and stella were chosen from 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2 by validation cross-entropy of the
# default job, averaged over two seeds that no reported run uses (results/finetune_sweep.json):
#     lora    0.4605  0.4471  0.4545  0.6932  0.6933  0.6934      stella  0.4640  0.4459  0.4496  0.4656  0.6876  0.6931
# LoRA's relatives take its rate, StelLA's initializations take StelLA's. riemannlora's and riemannion's are the
# best of 2e-4, 5e-4, 1e-3, 2e-3, 5e-3 on one seed (results/convergence_*.json). lora-fixed-rank's is LoRA's, not tuned.
METHODS: dict[str, Method] = {
    "lora": Method(lora(), adamw, learning_rate=1e-3),
    "lora-fixed-rank": Method(lora(), fixed_rank_adamw, learning_rate=1e-3),
    "dora": Method(lora(use_dora=True), adamw, learning_rate=1e-3),
    "pissa": Method(lora(init_lora_weights="pissa"), adamw, learning_rate=1e-3),
    "olora": Method(lora(init_lora_weights="olora"), adamw, learning_rate=1e-3),
    "lora-preconditioned": Method(lora(), preconditioned_adamw, learning_rate=1e-3),
    "stella": Method(ours(StelLALinear, init="random"), riemannian_adamw, learning_rate=1e-3),
    "stella-zero": Method(ours(StelLALinear, init="zero"), riemannian_adamw, learning_rate=1e-3),
    "stella-pseudo-zero": Method(
        ours(StelLALinear, init="pseudo-zero"), riemannian_adamw, learning_rate=1e-3
    ),
    "stella-svd-major": Method(ours(StelLALinear, init="svd-major"), riemannian_adamw, learning_rate=1e-3),
    "stella-svd-minor": Method(ours(StelLALinear, init="svd-minor"), riemannian_adamw, learning_rate=1e-3),
    "riemannlora": Method(
        ours(RiemannLoRALinear), riemannian_adamw, learning_rate=5e-4, start=locally_optimal
    ),
    "riemannlora-keep": Method(
        ours(RiemannLoRALinear, correction="keep"),
        riemannian_adamw,
        learning_rate=5e-4,
        start=locally_optimal,
    ),
    "riemannlora-random": Method(ours(RiemannLoRALinear), riemannian_adamw, learning_rate=5e-4),
    "riemannion": Method(ours(RiemannLoRALinear), riemannion, learning_rate=2e-3, start=locally_optimal),
}
