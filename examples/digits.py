"""Orthonormal layers do not amplify noise: handwritten digits.

Two small networks with three hidden layers learn scikit-learn's 8 x 8 digits. In one of them the hidden weights are
orthonormal, so that no layer can stretch a difference between two images. Both read clean digits equally well; then
noise is added to the test images.

    python examples/digits.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from stiefelopt import RiemannianWrapper, Stiefel, constrain, param_groups

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WIDTH, TRAINING = 64, 1200  # pixels and units of a layer; images to learn from, of 1,797
NOISE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # standard deviation; pixels lie between 0 and 1
SHOWN = 4  # the level of noise that the table shows
COLOURS = {"orthonormal": "#0072B2", "unconstrained": "#D55E00"}


@dataclass(frozen=True)
class Digits:
    """Images (N, 64) and the digits they show (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Result:
    """Of one trained network."""

    accuracy: list[float]  # at every level of noise
    stretch: float  # the most by which the hidden layers can stretch a difference between two images
    residual: float  # distance of the hidden weights from orthonormal ones


def load() -> tuple[Digits, Digits]:
    """For training and for the test."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.as_tensor(images, dtype=torch.float32)[order] / 16
    digits = torch.as_tensor(labels)[order]
    return Digits(pixels[:TRAINING], digits[:TRAINING]), Digits(pixels[TRAINING:], digits[TRAINING:])


def network() -> nn.Sequential:
    hidden = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))


def hidden_layers(model: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in model if isinstance(layer, nn.Linear)][:-1]


def optimizer_for(model: nn.Sequential, name: str, lr: float) -> torch.optim.Optimizer:
    if name == "unconstrained":
        return torch.optim.AdamW(model.parameters(), lr=lr)
    for layer in hidden_layers(model):
        constrain(layer, "weight", Stiefel())  # moves the weight to the nearest orthonormal one
    return RiemannianWrapper(torch.optim.AdamW(param_groups(model, lr=lr)))


def train(
    model: nn.Sequential, optimizer: torch.optim.Optimizer, digits: Digits, epochs: int
) -> Iterator[int]:
    """Yields after every epoch."""
    for epoch in range(epochs):
        for rows in torch.randperm(TRAINING).split(64):
            loss = functional.cross_entropy(model(digits.images[rows]), digits.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield epoch


@torch.no_grad()
def judge(model: nn.Sequential, digits: Digits) -> Result:
    """The noise is the same for every network."""
    noise = torch.randn(20, *digits.images.shape, generator=torch.Generator().manual_seed(2))
    answers = (model(digits.images + level * noise).argmax(dim=-1) for level in NOISE)
    weights = torch.stack([layer.weight for layer in hidden_layers(model)])
    return Result(
        accuracy=[(answer == digits.labels).float().mean().item() for answer in answers],
        stretch=torch.linalg.matrix_norm(weights, 2).prod().item(),
        residual=Stiefel().residual(weights).max().item(),
    )


def table(results: dict[str, list[Result]]) -> Table:
    title = "Test digits read correctly, mean and range over seeds"
    view = Table("hidden weights", "clean, %", f"noise {NOISE[SHOWN]}, %", "stretch", "residual", title=title)
    for name, runs in results.items():
        clean, noisy = (_mean_and_range([100 * run.accuracy[k] for run in runs]) for k in (0, SHOWN))
        stretch, residual = max(run.stretch for run in runs), max(run.residual for run in runs)
        view.add_row(name, clean, noisy, f"{stretch:.1f}", f"{residual:.0e}")
    return view


def _mean_and_range(values: list[float]) -> str:
    return f"{mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def save_plot(path: Path, results: dict[str, list[Result]], image: Tensor) -> None:
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (strip, axes) = plt.subplots(
        2, 1, figsize=(8, 6), height_ratios=(1, 5), sharex=True, layout="constrained"
    )
    for name, runs in results.items():
        values = 100 * np.array([run.accuracy for run in runs])
        axes.plot(NOISE, values.mean(axis=0), color=COLOURS[name], marker="o", linewidth=2, label=name)
        low, high = values.min(axis=0), values.max(axis=0)
        axes.fill_between(NOISE, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
    axes.legend(frameon=False, labelcolor="linecolor", title="hidden weights", alignment="left")
    axes.set(xlabel="standard deviation of the noise (pixels lie between 0 and 1)")
    axes.set(ylabel="test digits read correctly (%)", ylim=(None, 100))
    axes.grid(color="#e6e6e6")
    noise = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    for level in NOISE:
        place = strip.inset_axes((level - 0.045, 0, 0.09, 1), transform=strip.get_xaxis_transform())
        place.imshow((image + level * noise).reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
        place.axis("off")
    strip.axis("off")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()

    torch.set_num_threads(1)  # the matrices are small: a second thread would cost more than it brings
    console = Console()
    training, test = load()
    results: dict[str, list[Result]] = {name: [] for name in COLOURS}
    with Progress(console=console) as progress:
        bars = {name: progress.add_task(name, total=args.seeds * args.epochs) for name in COLOURS}
        for seed in range(args.seeds):
            for name in COLOURS:
                torch.manual_seed(seed)  # both networks start alike and see the same batches
                model = network()
                optimizer = optimizer_for(model, name, args.learning_rate)
                for _ in train(model, optimizer, training, args.epochs):
                    progress.advance(bars[name])
                results[name].append(judge(model, test))
    console.print(table(results))
    args.output.mkdir(parents=True, exist_ok=True)
    save_plot(args.output / "digits.png", results, test.images[test.labels == 3][0])
    console.print(f"Saved {args.output / 'digits.png'}")


if __name__ == "__main__":
    main()
