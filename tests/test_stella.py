"""The wrapper around AdamW on real StelLA layers is Algorithm 1 of StelLA, by an independent rendering in numpy.

Nothing below the line "numpy only" uses torch: forward, backward, AdamW, the schedule and the geometry are
written out again from the paper (arXiv 2510.01938), with a thin SVD for the polar factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from stiefelopt import RiemannianWrapper, StelLALinear, Stiefel, adapt, param_groups

torch.set_num_threads(1)

STEPS, WARMUP = 60, 10
LR, SCALE_LR, DECAY, BETAS, EPS = 0.03, 0.02, 0.1, (0.9, 0.95), 1e-8
# (widths of the network, rank, alpha, diagonal S, rsLoRA, reference_dim)
Case = tuple[tuple[int, ...], int, float, bool, bool, int]
CASES: dict[str, Case] = {
    "one layer, tall": ((7, 12), 3, 6.0, False, False, 16),
    "one layer, wide": ((12, 7), 3, 6.0, False, False, 16),
    "square factors": ((4, 9), 4, 4.0, False, False, 9),
    "two layers": ((6, 11, 8), 3, 4.0, False, False, 11),
    "two layers, diagonal, rsLoRA": ((6, 11, 8), 2, 4.0, True, True, 32),
}


def schedule(step: int) -> float:
    """Linear warm-up, then a half cosine."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


# numpy only

Array = np.ndarray


@dataclass
class Factors:
    """One adapted layer: y = x w^T + b + scale x V S^T U^T."""

    w: Array
    b: Array
    u: Array
    s: Array
    v: Array
    scale: float

    def forward(self, x: Array) -> Array:
        s = np.diag(self.s) if self.s.ndim == 1 else self.s
        return x @ (self.w + self.scale * self.u @ s @ self.v.T).T + self.b

    def backward(self, x: Array, dy: Array) -> tuple[dict[str, Array], Array]:
        s = np.diag(self.s) if self.s.ndim == 1 else self.s
        g = self.scale * dy.T @ x
        gs = self.u.T @ g @ self.v
        grads = {"u": g @ self.v @ s.T, "s": np.diag(gs) if self.s.ndim == 1 else gs, "v": g.T @ self.u @ s}
        return grads, dy @ (self.w + self.scale * self.u @ s @ self.v.T)


@dataclass
class NumpyAdamW:
    """Loshchilov & Hutter 2019, algorithm 2, for one array."""

    m: Array | float = 0.0
    v: Array | float = 0.0
    t: int = 0

    def step(self, p: Array, g: Array, lr: float, decay: float) -> Array:
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g**2
        m_hat, v_hat = self.m / (1 - BETAS[0] ** self.t), self.v / (1 - BETAS[1] ** self.t)
        return p - lr * decay * p - lr * m_hat / (np.sqrt(v_hat) + EPS)


def polar(z: Array) -> Array:
    left, _, right = np.linalg.svd(z, full_matrices=False)
    return left @ right


@dataclass
class Algorithm1:
    """StelLA over a chain of layers with tanh between them and a mean squared error."""

    layers: list[Factors]
    reference_dim: int
    omit: str = ""
    moments: dict[tuple[int, str], NumpyAdamW] = field(default_factory=dict)

    def gradients(self, x: Array, target: Array) -> tuple[float, list[dict[str, Array]]]:
        inputs, y = [], x
        for i, layer in enumerate(self.layers):
            inputs.append(np.tanh(y) if i else y)
            y = layer.forward(inputs[-1])
        error = y - target
        dy = error / len(x)
        grads: list[dict[str, Array]] = []
        for i in reversed(range(len(self.layers))):
            g, dx = self.layers[i].backward(inputs[i], dy)
            grads.insert(0, g)
            dy = dx * (1 - inputs[i] ** 2)
        return 0.5 * float((error**2).sum()) / len(x), grads

    def step(self, x: Array, target: Array, factor: float) -> float:
        loss, grads = self.gradients(x, target)
        for i, (layer, g) in enumerate(zip(self.layers, grads, strict=True)):
            inner = {name: self.moments.setdefault((i, name), NumpyAdamW()) for name in "usv"}
            for name in "uv":
                setattr(layer, name, self.move(getattr(layer, name), g[name], inner[name], LR * factor))
            layer.s = inner["s"].step(layer.s, g["s"], SCALE_LR * factor, DECAY)
        return loss

    def move(self, y: Array, g: Array, inner: NumpyAdamW, lr: float) -> Array:
        """Lines 4 to 9: Riemannian gradient, the Euclidean step, scale, projection, retraction."""
        if self.omit != "gradient":
            g = g - y @ g.T @ y
        d = inner.step(y, g, lr, 0.0) - y
        if self.omit != "scale":
            d = d * math.sqrt(self.reference_dim / len(y))
        if self.omit != "projection":
            w = y.T @ d
            d = d - y @ (w + w.T) / 2
        return polar(y + d)


# torch


class Chain(nn.Module):
    """Linear layers with tanh between them."""

    def __init__(self, widths: tuple[int, ...], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        sizes = pairwise(widths)
        self.linears = nn.ModuleList([nn.Linear(n, m, dtype=torch.float64) for n, m in sizes])

    def forward(self, x: Tensor) -> Tensor:
        for i, linear in enumerate(self.linears):
            x = linear(torch.tanh(x) if i else x)
        return x


def copy_of(layer: Any, scale: float) -> Factors:
    w, b, u, s, v = (
        np.array(t.tolist()) for t in (layer.base.weight, layer.base.bias, layer.U, layer.S, layer.V)
    )
    return Factors(w, b, u, s, v, scale)


def make(case: Case, omit: str = "") -> tuple[Chain, Algorithm1, Tensor, Tensor]:
    """The same start twice, and data."""
    widths, r, alpha, diagonal, rslora, reference_dim = case
    model = Chain(widths, seed=1)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20, widths[0], dtype=torch.float64, generator=generator)
    target = torch.randn(20, widths[-1], dtype=torch.float64, generator=generator)
    options: dict[str, Any] = {
        "r": r,
        "alpha": alpha,
        "diagonal": diagonal,
        "use_rslora": rslora,
        "generator": generator,
    }
    adapt(model, StelLALinear, target_modules="all-linear", reference_dim=reference_dim, **options)
    scale = alpha / (math.sqrt(r) if rslora else r)
    copies = [copy_of(layer, scale) for layer in model.linears]
    return model, Algorithm1(copies, reference_dim, omit), x, target


def optimizer_for(model: nn.Module, wrap: Callable = RiemannianWrapper) -> tuple[RiemannianWrapper, LambdaLR]:
    groups = param_groups(model, lr=LR, weight_decay=DECAY, scale_lr=SCALE_LR)
    wrapper = wrap(AdamW(groups, betas=BETAS, eps=EPS))
    return wrapper, LambdaLR(wrapper, schedule)


def distance(model: Chain, reference: Algorithm1) -> float:
    """The largest difference of any factor."""
    pairs = [
        (getattr(ours, big).detach().numpy(), getattr(theirs, small))
        for ours, theirs in zip(model.linears, reference.layers, strict=True)
        for big, small in (("U", "u"), ("S", "s"), ("V", "v"))
    ]
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def train_both(case: Case, omit: str = "") -> tuple[list[float], list[tuple[float, float]]]:
    """Distances and (our loss, their loss) after each step."""
    model, reference, x, target = make(case, omit)
    wrapper, scheduler = optimizer_for(model)
    distances, losses = [], []
    for step in range(STEPS):
        wrapper.zero_grad()
        loss = 0.5 * (model(x) - target).square().sum() / len(x)
        loss.backward()
        wrapper.step()
        scheduler.step()
        losses.append((loss.item(), reference.step(x.numpy(), target.numpy(), schedule(step))))
        distances.append(distance(model, reference))
    return distances, losses


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_wrapper_is_algorithm_1_to_1e_9_over_60_steps(case: Case) -> None:
    distances, losses = train_both(case)
    assert max(distances) < 1e-9
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-9)
    assert losses[-1][0] < 0.9 * losses[0][0]


@pytest.mark.parametrize("omit", ["gradient", "scale", "projection"])
def test_an_algorithm_that_omits_a_line_is_told_apart(omit: str) -> None:
    distances, _ = train_both(CASES["two layers"], omit)
    assert distances[-1] > 1e-4


def test_decoupled_decay_of_the_bases_is_removed_by_the_projection() -> None:
    """AdamW's decay of U and V is normal to the manifold: the trajectory is the one without it."""
    ends = []
    for decay in (0.0, 0.5):
        model, _, x, target = make(CASES["two layers"])
        wrapper, scheduler = optimizer_for(model)
        for group in wrapper.param_groups:
            if "manifold" in group:
                group["weight_decay"] = decay
        for _ in range(20):
            wrapper.zero_grad()
            (model(x) - target).square().mean().backward()
            wrapper.step()
            scheduler.step()
        ends.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_groups_say_what_the_paper_says() -> None:
    model, *_ = make(CASES["two layers"])
    groups = param_groups(model, lr=LR, weight_decay=DECAY, scale_lr=SCALE_LR)
    by_parameter = {id(p): group for group in groups for p in group["params"]}
    assert len(by_parameter) == sum(p.requires_grad for p in model.parameters()) == 6
    for layer in model.linears:
        for factor in (layer.U, layer.V):
            group = by_parameter[id(factor)]
            assert Stiefel(metric="canonical", retraction="polar").spec() == group["manifold"]
            assert group["displacement_scale"] == "stella"
            assert group["reference_dim"] == 11
            assert (group["lr"], group["weight_decay"]) == (LR, 0.0)
        group = by_parameter[id(layer.S)]
        assert "manifold" not in group
        assert (group["lr"], group["weight_decay"]) == (SCALE_LR, DECAY)


def test_float32_follows_float64() -> None:
    """Adam amplifies rounding; ten steps at a large epsilon do not."""
    ends = []
    for dtype in (torch.float64, torch.float32):
        model, _, x, target = make(CASES["two layers"])
        model.to(dtype)
        wrapper = RiemannianWrapper(AdamW(param_groups(model, lr=LR), eps=1e-2))
        for _ in range(10):
            wrapper.zero_grad()
            (model(x.to(dtype)) - target.to(dtype)).square().mean().backward()
            wrapper.step()
        ends.append([p.detach().double() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
