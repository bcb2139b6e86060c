"""The whole list of pytorch_optimizer inside RiemannianWrapper, and which of them keep points in their state.

docs/optimizers.md tells users what is found here; its tables are checked below.
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.third_party import (
    AROUND,
    AVERAGED,
    LEAST,
    LRS,
    MAX_RESIDUAL,
    OPTIONS,
    PAIRED,
    STEPPING_AFTER,
    Build,
    Run,
    Subspace,
    after_eval,
    build,
    build_around,
    distance,
    names,
    points_in_state,
    run,
    runs,
    wrong_order,
)
from stiefelopt import RiemannianWrapper, Stiefel

torch.set_num_threads(1)
# Many have a weight decay by default, and the wrapper advises against it.
pytestmark = pytest.mark.filterwarnings("ignore:group 0 has weight_decay")

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"
NAMES = names()
LEAST_RATE = 0.97


@dataclass(frozen=True)
class Skip:
    """Why an optimizer cannot be driven by gradient and step() alone, and what it says then (a regular expression)."""

    kind: str
    reason: str
    says: str


SKIPPED = {
    "adahessian": Skip(
        "second derivative",
        "differentiates the gradient: backward(create_graph=True)",
        "does not require grad",
    ),
    "adalomo": Skip("model", "steps inside the backward pass of a model: fused_backward(loss, lr)", "^$"),
    "alig": Skip("closure", "reads the loss from its closure to choose the step", "requires closure"),
    "bsam": Skip("second forward pass", "evaluates the gradient at perturbed points", "requires closure"),
    "demo": Skip("world size", "gathers its momentum from all processes", "einops|[Pp]rocess group"),
    "distributedmuon": Skip("world size", "shares its work among all processes", "process group"),
    "lbfgs": Skip("closure", "evaluates its closure several times in a step", "closure"),
    "lomo": Skip("model", "steps inside the backward pass of a model: fused_backward(loss, lr)", "^$"),
    "sophiah": Skip(
        "second derivative",
        "differentiates the gradient: backward(create_graph=True)",
        "does not require grad",
    ),
}


# Why these do not descend bare in 40 steps. With their OPTIONS they do.
_DISTANCE = "begins with a step of the size of d0 = 1e-6"
IDLE = {
    "dadaptadagrad": _DISTANCE,
    "dadaptlion": _DISTANCE,
    "dadaptsgd": _DISTANCE,
    "nero": "centers and normalizes the rows of the parameter itself",
    "sara": "steps only the entries below 1e-3, here 2 of 240",
}
JUDGED = [name for name in NAMES if name not in SKIPPED]
# These keep points with an option although their defaults do not.
SHADOWED = {f"{n}(use_shadow=True)": n for n, options in OPTIONS.items() if "use_shadow" in options}


@cache
def descends_bare(name: str) -> bool:
    """With the best of the learning rates; an optimizer that raises here belongs into SKIPPED."""
    return any(r.gain > LEAST for r in runs(name, wrapped=False))


@cache
def wrapped_runs(name: str) -> tuple[Run, ...]:
    return tuple(runs(name, wrapped=True))


def stays(found: tuple[Run, ...]) -> bool:
    return all(r.residual < MAX_RESIDUAL for r in found)


def passes(name: str) -> bool:
    """On the manifold at every step of every run, and the loss is lower at the end of one."""
    found = wrapped_runs(name)
    return stays(found) and max(r.gain for r in found) > LEAST


# The list


def test_the_tables_name_what_the_package_has() -> None:
    assert len(NAMES) >= 128
    assert set(SKIPPED) | set(IDLE) | set(PAIRED) <= set(NAMES)
    assert not set(SKIPPED) & set(IDLE)
    assert all(hasattr(pytorch_optimizer, name) for name in AROUND)


@pytest.mark.parametrize("name", NAMES)
def test_it_descends_wrapped_where_it_descends_bare(name: str) -> None:
    if name in SKIPPED:
        pytest.skip(f"{SKIPPED[name].kind}: {SKIPPED[name].reason}")
    assert descends_bare(name) == (name not in IDLE)
    assert stays(wrapped_runs(name))
    assert name in IDLE or passes(name), wrapped_runs(name)


@pytest.mark.parametrize("name", IDLE)
def test_one_that_is_idle_by_default_descends_with_options(name: str) -> None:
    assert any(r.gain > LEAST for r in runs(name, wrapped=False, **OPTIONS[name]))
    found = tuple(runs(name, wrapped=True, **OPTIONS[name]))
    assert stays(found)
    assert max(r.gain for r in found) > LEAST


def test_at_least_97_percent_of_those_that_descend_bare_pass_wrapped() -> None:
    """Every name is judged, idle or skipped. The denominator holds whatever descends bare with its defaults."""
    descending = [name for name in JUDGED if descends_bare(name)]
    assert len(descending) + len(IDLE) + len(SKIPPED) == len(NAMES)
    failed = [name for name in descending if not passes(name)]
    assert 1 - len(failed) / len(descending) >= LEAST_RATE, failed


@pytest.mark.parametrize("name", SKIPPED)
def test_a_skipped_one_raises_bare_and_changes_nothing_wrapped(name: str) -> None:
    """It is in the table because it must be; and inside the wrapper it says so and leaves the point alone."""
    for wrapped in (False, True):
        problem = Subspace()
        problem.set_gradients()
        before, grad = problem.params[0].detach().clone(), problem.params[0].grad
        with pytest.raises(Exception, match=SKIPPED[name].says):
            drive(name, problem, wrapped)
        assert torch.equal(problem.params[0], before)
        assert problem.params[0].grad is grad


def drive(name: str, problem: Subspace, wrapped: bool) -> None:
    optimizer = build(name, problem.params, 1e-2)
    (RiemannianWrapper(optimizer, Stiefel()) if wrapped else optimizer).step()


@pytest.mark.parametrize("name", AROUND)
def test_an_optimizer_around_an_optimizer_descends_wrapped(name: str) -> None:
    found = tuple(run(maker(name), lr, wrapped=True)[0] for lr in LRS)
    assert stays(found)
    assert max(r.gain for r in found) > 0.1


# Points in their state


def maker(name: str) -> Build:
    def make(params: list[nn.Parameter], lr: float) -> Optimizer:
        if name in AROUND:
            return build_around(name, params, lr)
        if name in SHADOWED:
            return build(SHADOWED[name], params, lr, **OPTIONS[SHADOWED[name]])
        return build(name, params, lr)

    return make


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the page, without its head."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1]
    table = section[section.index("\n|") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def documented_points() -> dict[str, set[str]]:
    return {name: set(code(row[1])) for row in rows("Which keep points") for name in code(row[0])}


def test_the_table_of_points_names_what_exists() -> None:
    assert set(documented_points()) <= {*JUDGED, *AROUND, *SHADOWED}


@pytest.mark.parametrize("name", [*JUDGED, *AROUND, *SHADOWED])
def test_the_page_says_who_keeps_points(name: str) -> None:
    found = points_in_state(maker(name), count=2 if name in PAIRED else 1)
    assert found == documented_points().get(name, set())


def test_the_page_says_who_is_skipped_and_why() -> None:
    documented = {name: row[1] for row in rows("Which are skipped") for name in code(row[0])}
    assert documented == {name: skip.kind for name, skip in SKIPPED.items()}


def test_the_page_counts_right() -> None:
    counts = {row[0]: int(row[1]) for row in rows("What was measured")}
    assert counts == {
        "in the list": len(NAMES),
        "run bare": len(JUDGED),
        "descend bare": len(JUDGED) - len(IDLE),
        "of these, pass wrapped": sum(passes(name) for name in JUDGED if name not in IDLE),
        "do not descend bare": len(IDLE),
        "skipped": len(SKIPPED),
    }


@pytest.mark.parametrize("name", AVERAGED)
def test_an_average_must_be_projected_and_training_goes_on(name: str) -> None:
    """The page's recipe: the copy is put back after train(), which can only undo its own eval()."""
    p, optimizer = after_eval(name)
    assert 0.01 < distance(p.detach()) < 0.2
    optimizer.train()  # type: ignore[attr-defined]
    copy = p.detach().clone()
    assert distance(copy) < 1e-6
    optimizer.eval()  # type: ignore[attr-defined]
    p.data.copy_(Stiefel().project_point(p.detach()))
    assert distance(p.detach()) < 1e-6
    optimizer.train()  # type: ignore[attr-defined]
    p.data.copy_(copy)
    problem = Subspace()
    problem.params[0] = p
    problem.set_gradients()
    RiemannianWrapper(optimizer, Stiefel()).step()
    assert distance(p.detach()) < 1e-6


@pytest.mark.parametrize("name", STEPPING_AFTER)
def test_an_optimizer_around_the_wrapper_leaves_the_manifold(name: str) -> None:
    assert wrong_order(name).residual > 1e-4


# Checkpoints and half precision, where others store things their own way


def step(problem: Subspace, wrapper: RiemannianWrapper, count: int) -> None:
    for i in range(count):
        torch.manual_seed(i)  # some of them draw
        problem.set_gradients()
        wrapper.step()


@pytest.mark.parametrize("name", ["Lookahead", "ScheduleFreeWrapper", "TRAC", "magma", "prodigy", "soap"])
def test_it_resumes_bitwise_from_a_state_dict(name: str) -> None:
    """Lookahead, ScheduleFreeWrapper and magma keep another optimizer's state_dict inside theirs."""
    problem, other = Subspace(), Subspace()
    wrapper = RiemannianWrapper(maker(name)(problem.params, 1e-2), Stiefel())
    step(problem, wrapper, 7)
    other.params[0].data.copy_(problem.params[0])
    resumed = RiemannianWrapper(maker(name)(other.params, 1e-2), Stiefel())
    resumed.load_state_dict(deepcopy(wrapper.state_dict()))  # as from a file: torch's shares its tensors
    for p, w in ((problem, wrapper), (other, resumed)):
        step(p, w, 5)
    assert torch.equal(problem.params[0], other.params[0])


@pytest.mark.parametrize("name", ["Lookahead", "adafactor", "flashadamw", "schedulefreeadamw", "soap"])
def test_a_bfloat16_point_stays_and_descends(name: str) -> None:
    """adafactor keeps its average of gradients in bfloat16 of its own choice, beside float32 gradients."""
    problem = Subspace()
    p = nn.Parameter(problem.params[0].detach().bfloat16())
    wrapper = RiemannianWrapper(maker(name)([p], 1e-2), Stiefel())
    problem.params[0].data.copy_(p)
    start = problem.loss()
    for _ in range(10):
        problem.params[0].data.copy_(p)
        problem.set_gradients()
        grad = problem.params[0].grad
        assert grad is not None
        p.grad = grad.bfloat16()
        wrapper.step()
    problem.params[0].data.copy_(p)
    assert problem.loss() < start
    assert max(wrapper.residuals().values()) < 2 * torch.finfo(torch.bfloat16).eps
