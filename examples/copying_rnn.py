"""An orthonormal recurrent matrix does not forget: the copying problem.

The network reads ten symbols, then a hundred blanks, then a sign to repeat the symbols. A recurrent matrix with
singular values away from 1 shrinks or blows up what it has read; an orthonormal one turns it and keeps its length
(Arjovsky, Shah & Bengio 2016, arXiv 1511.06464; Henaff, Szlam & LeCun 2016, arXiv 1602.06662).

Three recurrent matrices with one learning rate: kept orthonormal; orthonormal at the start only; torch's usual start.
The third learns nothing. The second shows what a good start is worth: it learns once the falling learning rate has
become small enough (with --learning-rate 3e-4 it does so at once), while the constrained one is not so choosy.

    python examples/copying_rnn.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from stiefelopt import RiemannianWrapper, Stiefel, constrain, param_groups

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SYMBOLS, COPIED = 8, 10
BLANK, REPEAT = SYMBOLS, SYMBOLS + 1


class Memory(nn.Module):
    """h <- modReLU(W h + input), read out while the symbols are to be repeated."""

    def __init__(self, width: int, recurrent: Tensor) -> None:
        super().__init__()
        self.read = nn.Embedding(SYMBOLS + 2, width)
        nn.init.normal_(self.read.weight, std=width**-0.5)
        self.recurrent = nn.Parameter(recurrent)
        self.threshold = nn.Parameter(torch.zeros(width))
        self.answer = nn.Linear(width, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs = self.read(tokens).unbind(dim=1)
        state, answers = torch.zeros_like(inputs[0]), []
        for time, given in enumerate(inputs):
            turned = torch.addmm(given, state, self.recurrent.T)
            state = turned.sign() * functional.relu(turned.abs() + self.threshold)
            if time >= len(inputs) - COPIED:
                answers.append(self.answer(state))
        return torch.stack(answers, dim=1)


@dataclass
class Student:
    """A network, its optimizer, and the share of symbols it recalled in every step."""

    name: str
    colour: str
    model: Memory
    optimizer: torch.optim.Optimizer
    recalled: list[float] = field(default_factory=list)


def students(lr: float, width: int = 128) -> list[Student]:
    orthonormal = nn.init.orthogonal_(torch.empty(width, width))
    usual = nn.init.uniform_(torch.empty(width, width), -(width**-0.5), width**-0.5)  # as torch.nn.RNN starts
    kept, free, plain = (Memory(width, start) for start in (orthonormal, orthonormal.clone(), usual))

    constrain(kept, "recurrent", Stiefel(), init="keep")  # it is orthonormal already, and shall stay so
    riemannian = RiemannianWrapper(torch.optim.RMSprop(param_groups(kept, lr=lr), alpha=0.9))
    return [
        Student("kept orthonormal", "#0072B2", kept, riemannian),
        Student("orthonormal start", "#D55E00", free, torch.optim.RMSprop(free.parameters(), lr, alpha=0.9)),
        Student("torch's start", "#777777", plain, torch.optim.RMSprop(plain.parameters(), lr, alpha=0.9)),
    ]


def batch(size: int, blanks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (size, blanks + 20) and the symbols to repeat (size, 10)."""
    symbols = torch.randint(SYMBOLS, (size, COPIED), generator=generator)
    tokens = torch.full((size, blanks + 2 * COPIED), BLANK)
    tokens[:, :COPIED] = symbols
    tokens[:, blanks + COPIED - 1] = REPEAT
    return tokens, symbols


def train_step(student: Student, tokens: Tensor, symbols: Tensor) -> None:
    answers = student.model(tokens)
    loss = functional.cross_entropy(answers.flatten(0, 1), symbols.flatten())
    student.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
    student.optimizer.step()
    student.recalled.append(share_recalled(answers, symbols))


def share_recalled(answers: Tensor, symbols: Tensor) -> float:
    return (answers.argmax(dim=-1) == symbols).float().mean().item()


def train(group: list[Student], steps: int, blanks: int, console: Console) -> None:
    """All students see the same batches, fresh ones in every step."""
    generator = torch.Generator().manual_seed(1)
    schedules = [torch.optim.lr_scheduler.LinearLR(s.optimizer, 1.0, 0.05, steps) for s in group]
    columns = TextColumn("{task.description:17}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        bars = [progress.add_task(student.name, total=steps, note="") for student in group]
        for _ in range(steps):
            tokens, symbols = batch(64, blanks, generator)
            for student, schedule, bar in zip(group, schedules, bars, strict=True):
                train_step(student, tokens, symbols)
                schedule.step()
                progress.update(bar, advance=1, note=f"recalls {student.recalled[-1]:.0%}")


def singular_values(student: Student) -> Tensor:
    return torch.linalg.svdvals(student.model.recurrent.detach())


def table(group: list[Student], blanks: int) -> Table:
    title = f"Copying over {blanks} blanks"
    view = Table("recurrent matrix", "loss", "recalled", "singular values", title=title)
    tokens, symbols = batch(500, blanks, torch.Generator().manual_seed(2))
    for student in group:
        with torch.no_grad():
            answers = student.model(tokens)
        loss = functional.cross_entropy(answers.flatten(0, 1), symbols.flatten())
        values = singular_values(student)
        spread = f"{values.min():.3f} to {values.max():.3f}"
        view.add_row(student.name, f"{loss:.3f}", f"{share_recalled(answers, symbols):.1%}", spread)
    return view


def save_plot(path: Path, group: list[Student], blanks: int) -> None:
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=(3, 2), layout="constrained")
    for student in group:
        left.plot([100 * share for share in student.recalled], color=student.colour, label=student.name)
        right.plot(singular_values(student).numpy(), color=student.colour, linewidth=2.5)
    left.axhline(100 / SYMBOLS, color="black", linestyle=":", label="guessing")
    left.legend(frameon=False, labelcolor="linecolor", loc="center right")
    left.set(title="Memory", xlabel="training step", ylabel=f"symbols recalled after {blanks} blanks (%)")
    right.set(title="Recurrent matrix at the end", xlabel="index, largest first", ylabel="singular value")
    left.set_ylim(0, 103)
    right.set_ylim(bottom=0)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--blanks", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("results"))
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)  # the matrices are small: a second thread would cost more than it brings
    console = Console()
    group = students(args.learning_rate)
    train(group, args.steps, args.blanks, console)
    console.print(table(group, args.blanks))
    args.output.mkdir(parents=True, exist_ok=True)
    save_plot(args.output / "copying_rnn.png", group, args.blanks)
    console.print(f"Saved {args.output / 'copying_rnn.png'}")


if __name__ == "__main__":
    main()
