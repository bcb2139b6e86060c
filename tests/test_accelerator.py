"""The step on an accelerator, without one: nothing waits for the device, and what is not finite is told a step later.

Where nothing may wait is seen on a device that is pretended (accelerator_cases.py); what the numbers become, on the
CPU, with the host forbidden to look.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from stiefelopt import (
    FixedRank,
    RiemannianWrapper,
    Riemannion,
    StepError,
    Stiefel,
    alarm,
    attach,
    retractions,
    transforms,
)
from stiefelopt.manifolds import Oblique, SpecialOrthogonal, Sphere

CASES = Path(__file__).with_name("accelerator_cases.py")
# r x r (or 2r x 2r) decompositions of torch.linalg, which check on the host; everything else waits for nothing.
DECOMPOSED = (
    *("stiefel svd", "stiefel exp", "stiefel spectral", "fixed rank", "fixed rank orthographic"),
    *("fixed rank projected", "Riemannion", "RiemannLoRALinear", "RiemannLoRALinear keep"),
)
LAPACK = {"_linalg_svd", "_linalg_eigh", "linalg_matrix_exp"}


class Tried(NamedTuple):
    """What accelerator_cases.py says of a case: what was wrong, what waits, passes over the parameters, float64."""

    error: str
    waits: list[str]
    passes: float
    doubles: bool


@pytest.fixture(scope="module")
def pretended() -> dict[str, Tried]:
    """What was tried, by name."""
    root = str(CASES.parents[1])
    done = subprocess.run(
        [sys.executable, str(CASES)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    return {name: Tried(*found) for name, found in json.loads(done.stdout.splitlines()[-1]).items()}


def test_no_step_waits_for_the_device(pretended: dict[str, Tried]) -> None:
    wrong = {name: found.error for name, found in pretended.items() if found.error}
    assert list(wrong) == ["restore"]
    assert "DataDependent" in wrong["restore"]  # so a look is seen
    assert len(pretended) >= 20
    waiting = {name: set(found.waits) for name, found in pretended.items() if found.waits}
    assert set(waiting) == set(DECOMPOSED)
    assert set.union(*waiting.values()) <= LAPACK


def test_passes_over_the_parameters(pretended: dict[str, Tried]) -> None:
    """As many tensors touched as today: what an accelerator's step costs where memory is what it waits for."""
    beyond = pretended["tall"].passes - pretended["bare AdamW"].passes
    assert beyond <= 29.7
    assert beyond >= 20  # and they are counted


def test_no_float64_where_none_is_needed(pretended: dict[str, Tried]) -> None:
    """MPS has none."""
    single = (
        "stiefel",
        "stiefel qr",
        "stiefel newton_schulz",
        "stiefel none",
        "Grassmann",
        "Sphere",
        "StelLALinear",
    )
    assert [name for name in single if pretended[name].doubles] == []
    assert pretended["fixed rank"].doubles  # so it is seen


class Event:
    """A CPU has none, and needs none."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.recorded = device, False

    def record(self, stream: torch.device) -> None:
        assert stream == self.device  # not the stream of whatever device is current
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on the host must not look."""

    def begin() -> None:
        monkeypatch.setattr(transforms, "HOST", ())
        monkeypatch.setattr(torch, "Event", Event)
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: device)

    return begin


class Problem:
    """Three points, or triples, and gradients that are the same in every run."""

    def __init__(self, manifold: Any, dtype: torch.dtype = torch.float32) -> None:
        self.manifold = manifold
        self.draw = torch.Generator().manual_seed(0)
        if isinstance(manifold, FixedRank):
            points = [manifold.random_point(12, 10, rank=3, generator=self.draw) for _ in range(3)]
            tensors = [t for point in points for t in point]
        else:
            tensors = [manifold.random_point(n, 3, generator=self.draw) for n in (8, 8, 12)]
        self.params = [nn.Parameter(t.to(dtype)) for t in tensors]
        self.parts = manifold.parts

    def wrap(self, optimizer: Callable[..., Any], **options: Any) -> RiemannianWrapper:
        group = {"params": self.params, "manifold": self.manifold}
        if optimizer is Riemannion:
            return Riemannion([group], lr=0.05, weight_decay=0.1, **options)
        return RiemannianWrapper(optimizer([group], lr=0.05), **options)

    def gradients(self) -> None:
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=self.draw).to(p.dtype)

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


MANIFOLDS = [
    Stiefel(),
    Stiefel(transport="projection"),
    Stiefel(projection="none"),
    *(Stiefel(retraction=r) for r in ("qr", "svd", "cayley", "exp", "newton_schulz")),
    FixedRank(),
    FixedRank(retraction="orthographic"),
]
every_manifold = pytest.mark.parametrize("manifold", MANIFOLDS, ids=str)


@every_manifold
@pytest.mark.parametrize("optimizer", [AdamW, Riemannion])
def test_a_host_that_may_not_look_gets_the_same_points(
    manifold: Any, optimizer: Any, blind: Callable[[], None]
) -> None:
    seen, unseen = Problem(manifold), Problem(manifold)
    for problem in (seen, unseen):
        if problem is unseen:
            blind()
        wrapped = problem.wrap(optimizer)
        for _ in range(5):
            problem.gradients()
            wrapped.step()
        assert max(wrapped.residuals().values()) < 2e-6
    for a, b in zip(seen.values(), unseen.values(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


@every_manifold
@pytest.mark.parametrize("optimizer", [AdamW, Riemannion])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_what_is_not_finite_stays_where_it_is_and_is_told_a_step_later(
    manifold: Any, optimizer: Any, bad: float, blind: Callable[[], None]
) -> None:
    """The point keeps its value bit for bit, its moments stay finite, the others move, the next step is refused."""
    blind()
    problem = Problem(manifold)
    wrapped, parts = problem.wrap(optimizer), problem.parts
    for _ in range(2):
        problem.gradients()
        wrapped.step()
    problem.gradients()
    problem.params[parts].grad.view(-1)[:2] = bad
    before = problem.values()
    wrapped.step()
    stayed = [torch.equal(a, b) for a, b in zip(before, problem.values(), strict=True)]
    assert stayed == [False] * parts + [True] * parts + [False] * parts
    problem.gradients()
    before = problem.values()
    with pytest.raises(StepError, match=rf"step before this one the gradient of \(0, {parts}\)"):
        wrapped.step()
    assert all(torch.equal(a, b) for a, b in zip(before, problem.values(), strict=True))
    wrapped.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, problem.values(), strict=True))
    assert all(t.isfinite().all() for state in wrapped.state.values() for t in state.values())
    assert max(wrapped.residuals().values()) < 2e-6


@pytest.mark.parametrize("manifold", [Stiefel(), FixedRank()], ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_skipped_points_are_counted(manifold: Any, half: bool, blind: Callable[[], None]) -> None:
    blind()
    problem = Problem(manifold, torch.bfloat16 if half else torch.float32)
    wrapped = problem.wrap(AdamW, nonfinite="skip")
    for step in range(4):
        problem.gradients()
        if step in (1, 2):
            problem.params[-1].grad.fill_(float("nan"))  # type: ignore[union-attr]
        wrapped.step()
    assert wrapped.diagnostics()["skipped"] == wrapped.diagnostics()["skipped"] == 2 * problem.parts
    wrapped.add_param_group({"params": Problem(manifold).params[: problem.parts], "manifold": manifold})
    for p in wrapped.param_groups[1]["params"]:
        p.grad = torch.ones_like(p)
    wrapped.step()
    assert wrapped.diagnostics()["skipped"] == 2 * problem.parts
    assert max(wrapped.residuals().values()) < (2e-2 if half else 2e-6)


def test_who_asks_how_many_were_skipped_is_told_all_the_same(blind: Callable[[], None]) -> None:
    blind()
    problem = Problem(Stiefel())
    wrapped = problem.wrap(SGD)
    problem.gradients()
    problem.params[0].grad.fill_(float("nan"))  # type: ignore[union-attr]
    wrapped.step()
    assert wrapped.diagnostics()["skipped"] == 1
    with pytest.raises(StepError, match="step before this one"):
        wrapped.step()
    assert wrapped.diagnostics()["skipped"] == 1


def test_a_displacement_that_is_not_finite_is_told_too(blind: Callable[[], None]) -> None:
    """The gradient is fine, the inner optimizer is not; a parameter that holds several matrices loses one step each."""

    class Bursting(SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            self.param_groups[0]["params"][0].data[1] = float("nan")
            return loss

    blind()
    x = nn.Parameter(Stiefel().random_point(3, 8, 2, generator=torch.Generator().manual_seed(0)))
    wrapped = RiemannianWrapper(Bursting([{"params": [x], "manifold": Stiefel(), "view": "batch"}], lr=0.1))
    x.grad, before = torch.ones_like(x), x.detach().clone()
    wrapped.step()
    assert [torch.equal(a, b) for a, b in zip(x, before, strict=True)] == [False, True, False]
    with pytest.raises(StepError, match="displacement"):
        wrapped.step()


def test_attached_hooks_tell_a_step_later_and_restore_tells_at_once(blind: Callable[[], None]) -> None:
    blind()
    problem = Problem(Stiefel())
    optimizer = SGD([{"params": problem.params, "manifold": Stiefel()}], lr=0.1)
    attach(optimizer)
    problem.gradients()
    problem.params[0].grad.fill_(float("inf"))  # type: ignore[union-attr]
    optimizer.step()
    with pytest.raises(StepError, match="step before this one"):
        optimizer.step()
    problem = Problem(Stiefel())
    wrapped = problem.wrap(SGD, nonfinite="restore")
    problem.gradients()
    problem.params[0].grad.fill_(float("inf"))  # type: ignore[union-attr]
    with pytest.raises(StepError, match="nothing has changed"):
        wrapped.step()


LONG = [
    *(Stiefel(retraction=r) for r in ("polar", "qr", "cayley", "exp")),
    *(SpecialOrthogonal(), Sphere(), Oblique()),
]


@pytest.mark.parametrize("manifold", LONG, ids=str)
@pytest.mark.parametrize("lr", [1e6, 1e8, 1e12])
def test_a_step_too_long_for_one_pass_keeps_the_point(
    manifold: Any, lr: float, blind: Callable[[], None]
) -> None:
    """float32 and one pass, which the host cannot repeat: a point that is none, NaN or collapsed is never stored."""
    blind()
    generator = torch.Generator().manual_seed(0)
    shape = (8, 8) if isinstance(manifold, SpecialOrthogonal) else (20, 6)
    x = nn.Parameter(manifold.random_point(*shape, generator=generator))
    wrapped = RiemannianWrapper(SGD([{"params": [x], "manifold": manifold}], lr=lr))
    told = 0
    for _ in range(4):
        x.grad, before = torch.randn(shape, generator=generator), x.detach().clone()
        try:
            wrapped.step()
        except StepError:
            told += 1
        assert torch.equal(x, before) or manifold.residual(x) < 0.1
    assert told or manifold.residual(x) < 0.1
    wrapped.param_groups[0]["lr"] = 1e-3
    for _ in range(3):
        with contextlib.suppress(StepError):  # of the last long one
            wrapped.step()
    assert manifold.residual(x) < 1e-5


def test_a_retraction_that_makes_nan_keeps_the_point(blind: Callable[[], None]) -> None:
    blind()
    x = nn.Parameter(Stiefel().random_point(8, 3, generator=torch.Generator().manual_seed(0)))
    manifold = Stiefel(retraction=lambda x, u: (x + u) * float("nan"))
    wrapped = RiemannianWrapper(SGD([{"params": [x], "manifold": manifold}], lr=0.1))
    x.grad, before = torch.ones_like(x), x.detach().clone()
    wrapped.step()
    assert torch.equal(x, before)
    with pytest.raises(StepError, match="step before this one"):
        wrapped.step()


def test_what_a_captured_graph_counts_is_told_outside(
    blind: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sent or read while it is captured; what was sent before is not taken for what it has found."""
    blind()
    problem = Problem(Stiefel())
    wrapped = problem.wrap(SGD)
    problem.gradients()
    wrapped.step()
    with monkeypatch.context() as capture:
        capture.setattr(alarm, "_is_capturing", lambda device: True)
        problem.params[0].grad.fill_(float("nan"))  # type: ignore[union-attr]
        for _ in range(3):
            wrapped.step()
    problem.gradients()
    with pytest.raises(StepError, match="step before this one"):
        wrapped.step()
    wrapped.step()
    assert wrapped.diagnostics()["skipped"] == 3


def test_a_master_stays_in_its_memory() -> None:
    x = nn.Parameter(Stiefel().random_point(8, 3, generator=torch.Generator().manual_seed(0)).bfloat16())
    wrapped = RiemannianWrapper(SGD([{"params": [x], "manifold": Stiefel()}], lr=1e-4))
    seen = set()
    for _ in range(4):
        x.grad = torch.ones_like(x)
        wrapped.step()
        seen.add(wrapped.state[x]["master"].data_ptr())
    assert len(seen) == 1
    assert Stiefel().residual(wrapped.state[x]["master"]) < 1e-6


@pytest.mark.usefixtures("scratch_registries")
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_somebody_elses_part_sees_no_nan(nonfinite: str, blind: Callable[[], None]) -> None:
    """LAPACK, which a part of one's own may call, stumbles over it."""

    @retractions.register("by_eigenvalues")
    def by_eigenvalues(w: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(torch.eye(w.shape[-1], dtype=q.dtype) + w + w.mT + q)
        root = (vectors * values.rsqrt()[..., None, :]) @ vectors.mT
        return root, root

    class Bursting(SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            self.param_groups[0]["params"][0].data.fill_(float("nan"))
            return loss

    blind()
    problem = Problem(Stiefel(retraction="by_eigenvalues"))
    wrapped = problem.wrap(Bursting, nonfinite=nonfinite)
    problem.gradients()
    before = problem.values()
    wrapped.step()
    assert [torch.equal(a, b) for a, b in zip(before, problem.values(), strict=True)] == [True, False, False]
    assert max(wrapped.residuals().values()) < 2e-6
