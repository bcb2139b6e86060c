"""Optimizers nobody here wrote, bare and wrapped: `python -m benchmarks.third_party` (needs the extra "test").

It drives every optimizer that the package pytorch_optimizer lists, and prints the figures of docs/optimizers.md. The
problem is one for both: f(x) = 1/4 |x x^T - a|^2 is bounded below for every matrix, and on the Stiefel manifold it
is -1/2 tr(x^T a x) and a constant, so that its minimum is the leading subspace of a.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stiefelopt import RiemannianWrapper, Stiefel

SHAPE = (40, 6)
STEPS = 40
LRS = (1e-3, 1e-2, 1e-1)
MAX_RESIDUAL = 2e-5
# A loss that has fallen by less of the way than this has not descended: float32 rounding alone moves it by 1e-6.
LEAST = 1e-4


class Subspace:
    """The leading 6-dimensional subspace of a fixed positive definite 40 x 40 matrix, from a random point."""

    def __init__(self, count: int = 1) -> None:
        generator = torch.Generator().manual_seed(0)
        n, p = SHAPE
        basis = Stiefel().random_point(n, n, dtype=torch.float64, generator=generator)
        spectrum = torch.cat((torch.linspace(2, 1.5, p), torch.linspace(0.5, 0.01, n - p))).double()
        self.exact = basis * spectrum @ basis.mT
        self.a = self.exact.float()
        start = Stiefel().random_point(n, p, generator=generator)
        # The first of several points is wide, which is how LoRA's pairs come.
        self.params = [nn.Parameter(start.mT.contiguous()) for _ in range(count - 1)]
        self.params.append(nn.Parameter(start.clone()))
        rest = spectrum[p:].square().sum().item() / 4
        self.least = {False: rest, True: rest + (spectrum[:p] - 1).square().sum().item() / 4}

    @torch.no_grad()
    def set_gradients(self) -> None:
        """The derivative of the loss, in closed form."""
        for param in self.params:
            x = _tall(param)
            g = x @ (x.mT @ x) - self.a @ x
            param.grad = g if x.shape == param.shape else g.mT.contiguous()

    @torch.no_grad()
    def loss(self) -> float:
        """The mean of f over the points, in float64."""
        points = [_tall(p).double() for p in self.params]
        return sum((x @ x.mT - self.exact).square().sum().item() / 4 for x in points) / len(points)

    @torch.no_grad()
    def residual(self) -> float:
        """max |x^T x - I| over the points; infinite where a point is not finite."""
        worst = max(distance(p.detach()) for p in self.params)
        return worst if math.isfinite(worst) else math.inf


def _tall(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.shape[0] >= x.shape[1] else x.mT


def distance(x: Tensor) -> float:
    """max |x^T x - I| of one matrix, tall or wide, in float64."""
    x = _tall(x).double()
    return (x.mT @ x - torch.eye(x.shape[1], dtype=x.dtype)).abs().max().item()


# How they are built


class _Model(nn.Module):
    """For optimizers that ask for a model."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(params)


Build = Callable[..., Optimizer]
PAIRED = ("lorarite",)  # steps the two factors of a LoRA pair together, and leaves a lone matrix alone


def _muon(cls: Any, params: list[nn.Parameter], lr: float, **options: Any) -> Optimizer:
    return cls([{"params": params, "use_muon": True}], lr=lr, **options)


def _of_model(cls: Any, params: list[nn.Parameter], lr: float, **options: Any) -> Optimizer:
    return cls(_Model(params), lr=lr, **options)


def _ranger21(cls: Any, params: list[nn.Parameter], lr: float, **options: Any) -> Optimizer:
    return cls(params, lr=lr, num_iterations=STEPS, **options)


def _bsam(cls: Any, params: list[nn.Parameter], lr: float, **options: Any) -> Optimizer:
    return cls(params, lr=lr, num_data=1, **options)


def _alig(cls: Any, params: list[nn.Parameter], lr: float, **options: Any) -> Optimizer:
    return cls(params, max_lr=lr, **options)


def _plain(cls: Any, params: list[nn.Parameter], lr: float, **options: Any) -> Optimizer:
    return cls(params, lr=lr, **options)


_BUILDERS: dict[str, Build] = {
    **dict.fromkeys(("adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon"), _muon),
    **dict.fromkeys(("adalomo", "adammini", "lomo"), _of_model),
    "alig": _alig,
    "bsam": _bsam,
    "ranger21": _ranger21,
}


# Options with which an optimizer does what it does not do by default: move within 40 steps, or keep points.
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"d0": 0.1} for name in ("dadaptadagrad", "dadaptlion", "dadaptsgd")},
    "nero": {"constraints": False},
    "sara": {"threshold": 1.0},
    **{name: {"use_shadow": True} for name in ("emofact", "emolynx", "emonavi")},
}


def names() -> list[str]:
    """Every optimizer that the package lists."""
    return list(pytorch_optimizer.get_supported_optimizers())


def build(name: str, params: list[nn.Parameter], lr: float, **options: Any) -> Optimizer:
    """An optimizer of the list, with its own defaults but for the learning rate and the options."""
    make = _BUILDERS.get(name, _plain)
    return make(pytorch_optimizer.load_optimizer(name), params, lr, **options)


def _around_adamw(cls: Any, params: list[nn.Parameter], lr: float) -> Optimizer:
    return cls(torch.optim.AdamW(params, lr=lr))


def _schedule_free(cls: Any, params: list[nn.Parameter], lr: float) -> Optimizer:
    optimizer = cls(torch.optim.SGD(params, lr=lr))
    optimizer.train()
    return optimizer


# Those of its optimizers around another optimizer that step like one; they are not in its list.
AROUND: dict[str, Build] = {
    "Lookahead": _around_adamw,
    "OrthoGrad": _around_adamw,
    "ScheduleFreeWrapper": _schedule_free,
    "TRAC": _around_adamw,
}


def build_around(name: str, params: list[nn.Parameter], lr: float) -> Optimizer:
    """One of AROUND, around AdamW or SGD."""
    return AROUND[name](getattr(pytorch_optimizer, name), params, lr)


# How they do


@dataclass(frozen=True)
class Run:
    """What became of one run: the share of the way to the minimum, and the largest residual on it."""

    gain: float
    residual: float


def run(make: Build, lr: float, *, wrapped: bool, count: int = 1) -> tuple[Run, Optimizer]:
    """40 steps from the same point; `make(params, lr)` builds the optimizer."""
    torch.manual_seed(0)  # some of them draw
    problem = Subspace(count)
    start, worst = problem.loss(), 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weight decay by default, and advice on how to call them
        optimizer = make(problem.params, lr)
        stepping = RiemannianWrapper(optimizer, Stiefel()) if wrapped else optimizer
        for _ in range(STEPS):
            problem.set_gradients()
            stepping.step()
            worst = max(worst, problem.residual())
    return Run((start - problem.loss()) / (start - problem.least[wrapped]), worst), optimizer


def runs(name: str, *, wrapped: bool, **options: Any) -> Iterator[Run]:
    """One run for each learning rate, made as they are asked for."""

    def make(params: list[nn.Parameter], lr: float) -> Optimizer:
        return build(name, params, lr, **options)

    for lr in LRS:
        yield run(make, lr, wrapped=wrapped, count=2 if name in PAIRED else 1)[0]


# Points in their state


def tensors(thing: object, key: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that hangs on an optimizer, in state, groups or attributes, with the last name on the way."""
    seen = set() if seen is None else seen
    if isinstance(thing, Tensor):
        yield key, thing
    elif id(thing) in seen or isinstance(thing, type):
        return
    elif isinstance(thing, Mapping):
        seen.add(id(thing))
        for name, value in thing.items():
            yield from tensors(value, name if isinstance(name, str) else key, seen)
    elif isinstance(thing, (list, tuple, deque)):
        seen.add(id(thing))
        for value in thing:
            yield from tensors(value, key, seen)
    elif hasattr(thing, "__dict__"):
        seen.add(id(thing))
        yield from tensors(vars(thing), key, seen)


def _alike(t: Tensor, points: list[Tensor]) -> bool:
    """Whether a tensor points where a parameter does, at whatever scale: averages that begin at zero are short."""
    flat = t.detach().flatten().double()
    cosines = [torch.cosine_similarity(flat, x.flatten().double(), dim=0).abs().item() for x in points]
    return max(cosines) > 0.8


def points_in_state(make: Build, count: int = 1) -> set[str]:
    """The names under which an optimizer keeps points.

    The parameter is far from zero (about 15 in every coordinate, with random signs), and the gradients, of size 1,
    know nothing of it. What is made of gradients alone is then almost orthogonal to it (cosines below 0.2, measured),
    what is made of points is almost parallel (above 0.9).
    """
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    signs = torch.where(torch.rand(SHAPE, generator=generator) < 0.5, -1.0, 1.0)
    far = signs * (10 + 10 * torch.rand(SHAPE, generator=generator))
    params = [nn.Parameter(far.mT.contiguous()) for _ in range(count - 1)] + [nn.Parameter(far.clone())]
    found = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make(params, 1e-2)
        for group in optimizer.param_groups:
            if "weight_decay" in group:
                group["weight_decay"] = 0.0  # coupled decay puts the point into the gradient
        for _ in range(8):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
            found |= _names_of_points(optimizer, params, far)
    return found


def _names_of_points(optimizer: Optimizer, params: list[nn.Parameter], far: Tensor) -> set[str]:
    own = {p.data_ptr() for p in params} | {p.grad.data_ptr() for p in params if p.grad is not None}
    return {
        key
        for key, t in tensors(optimizer)
        if t.is_floating_point() and t.numel() == far.numel() and t.data_ptr() not in own
        if _alike(_tall(t) if t.ndim == 2 else t.view(far.shape), [far, _tall(params[-1])])
    }


# Two ways off the manifold


def after_eval(name: str, lr: float = 0.1) -> tuple[nn.Parameter, Optimizer]:
    """The parameter and the inner optimizer after 40 wrapped steps and eval(), which loads an average."""
    problem = Subspace()
    optimizer = build(name, problem.params, lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper = RiemannianWrapper(optimizer, Stiefel())
    for _ in range(STEPS):
        problem.set_gradients()
        wrapper.step()
    optimizer.eval()  # type: ignore[attr-defined]
    return problem.params[0], optimizer


def wrong_order(name: str, lr: float = 0.01) -> Run:
    """An optimizer around the wrapper, instead of the wrapper around it."""

    def make(params: list[nn.Parameter], lr: float) -> Optimizer:
        wrapper = RiemannianWrapper(torch.optim.AdamW(params, lr=lr), Stiefel())
        optimizer = getattr(pytorch_optimizer, name)(wrapper)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return run(make, lr, wrapped=False)[0]


# The figures of docs/optimizers.md

AVERAGED = ("schedulefreeadamw", "schedulefreeradam", "schedulefreesgd", "splus")
STEPPING_AFTER = ("Lookahead", "ScheduleFreeWrapper", "TRAC")


def _line(name: str, make: Build, count: int) -> str:
    try:
        bare = [run(make, lr, wrapped=False, count=count)[0] for lr in LRS]
    except Exception as error:  # any class: they are not ours
        return f"| {name} | {type(error).__name__}: {str(error)[:60]} | | | |"
    done = [run(make, lr, wrapped=True, count=count) for lr in LRS]
    best = max(done, key=lambda pair: pair[0].gain)
    worst = max(r.residual for r, _ in done)
    keys = points_in_state(make, count)
    kept = {key: distance(t) for key, t in tensors(best[1]) if key in keys and t.numel() == math.prod(SHAPE)}
    stored = ", ".join(f"{key} {value:.1g}" for key, value in sorted(kept.items()))
    return f"| {name} | {max(r.gain for r in bare):.2g} | {best[0].gain:.2g} | {worst:.0e} | {stored} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line for each optimizer."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.third_party", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument(
        "names", nargs="*", help="of the list (default: all, and those around another optimizer)"
    )
    chosen = parser.parse_args(arguments).names
    torch.set_num_threads(1)
    print("| optimizer | bare | wrapped | largest residual | points in its state, with their residuals |")
    print("|---|---|---|---|---|")
    for name in chosen or names():
        print(_line(name, lambda p, lr, n=name: build(n, p, lr), 2 if name in PAIRED else 1), flush=True)
    if chosen:
        return 0
    for name, options in OPTIONS.items():
        label = f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})"
        print(_line(label, lambda p, lr, n=name, o=options: build(n, p, lr, **o), 1), flush=True)
    for name in AROUND:
        print(_line(name, lambda p, lr, n=name: build_around(n, p, lr), 1), flush=True)
    for name in AVERAGED:
        print(f"{name}: residual {distance(after_eval(name)[0].detach()):.2g} after eval()")
    for name in STEPPING_AFTER:
        print(f"{name}(RiemannianWrapper(AdamW)): residual {wrong_order(name).residual:.2g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
