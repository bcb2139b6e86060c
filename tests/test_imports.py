"""Imports go downwards only (the map of the house), and the core needs torch and numpy alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import stiefelopt

ROOT = Path(stiefelopt.__file__).parent
# From the bottom up. A room may import from its own floor and from those below; circles are refused everywhere.
FLOORS = (
    ("errors",),
    (
        "alarm",
        "full_precision",
        "transforms",
        "registry",
        "shapes",
        "draws",
        "gram",
        "coarse",
        "inverse_roots",
        "matfun",
        "core_svd",
        "distributed",
        "moments",
        "scratch",
        "svd_factor",
    ),
    (
        "metrics",
        "projections",
        "retractions",
        "rank_retractions",
        "rank_pairs",
        "rank_transports",
        "transports",
    ),
    ("manifolds",),
    ("placement", "joint", "stacks", "buckets", "precision", "snapshot", "manifold_step", "hooks"),
    ("lora_pairs", "groups", "wrapper", "optim", "layers"),
    ("laws", "rank_laws", "pair_laws", "testing", "integrations"),
)
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor}
# What anybody may import but nobody inside does.
LEAVES = ("testing", "integrations")
CORE_NEEDS = {"torch", "numpy"}
FILES = sorted(path for path in ROOT.rglob("*.py"))


def module_of(path: Path) -> tuple[str, ...]:
    """("layers", "stella") of layers/stella.py; () of the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def package_of(path: Path) -> tuple[str, ...]:
    return path.relative_to(ROOT).parts[:-1]


def imports(path: Path, *, top_level: bool = False) -> Iterator[tuple[str, ...]]:
    """Dotted names as tuples; inside the package they begin with "stiefelopt"."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                package = package_of(path)
                module = ("stiefelopt", *package[: len(package) - node.level + 1], *module)
            for alias in node.names:
                yield (*module, alias.name)


def inner_modules(path: Path) -> set[tuple[str, ...]]:
    """The modules of the package that a file imports."""
    known = {module_of(p) for p in FILES}
    found = set()
    for name in imports(path):
        if name[0] == "stiefelopt":
            rest = name[1:]
            while rest not in known:
                rest = rest[:-1]
            found.add(rest)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    own = module_of(path)
    if not own:
        return
    assert own[0] in FLOOR, f"{path.name} has no floor: give it one in FLOORS"
    for other in inner_modules(path):
        assert other, f"{'.'.join(own)} imports the whole package; import the module that is meant"
        assert FLOOR[other[0]] <= FLOOR[own[0]], (
            f"{'.'.join(own)} imports {'.'.join(other)}, which lies above it"
        )
        if other[0] in LEAVES:
            assert own[0] == other[0], f"{'.'.join(own)} imports {'.'.join(other)}, which nobody may"


def test_there_are_no_circles() -> None:
    graph = {module_of(path): inner_modules(path) - {module_of(path)} for path in FILES}
    # A package's own __init__ imports its modules, which by name import through it.
    for path in FILES:
        if path.name == "__init__.py":
            package = module_of(path)
            for module in graph:
                if module[: len(package)] == package:
                    graph[module] = graph[module] - {package}
    tuple(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_core_needs_torch_and_numpy_alone(path: Path) -> None:
    if module_of(path)[:1] == ("integrations",):
        return
    needed = {name[0] for name in imports(path, top_level=True)}
    foreign = needed - CORE_NEEDS - {"stiefelopt"} - set(sys.stdlib_module_names)
    assert not foreign, f"{path.name} imports {', '.join(sorted(foreign))} at module level"


def test_extras_are_not_imported_with_the_package() -> None:
    """Neither our integrations nor what they stand on."""
    extras = "peft transformers lightning geoopt hypothesis pytest scipy sklearn matplotlib rich safetensors pymanopt"
    code = (
        "import sys, torch; before = set(sys.modules); import stiefelopt;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        f"bad = new & set('{extras}'.split());"
        "assert not bad, bad; assert not any(m.startswith('stiefelopt.integrations') for m in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("extra", ["geoopt", "lightning", "peft", "transformers"])
def test_a_missing_extra_is_named(extra: str) -> None:
    code = f"import sys; sys.modules[{extra!r}] = None; import stiefelopt.integrations.{extra}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=False
    )
    said = done.stderr.splitlines()[-1]
    assert f"Error: {extra} is missing" in said
    assert "pip install" in said


def test_the_public_names_exist() -> None:
    for name in stiefelopt.__all__:
        assert hasattr(stiefelopt, name), name
    assert len(set(stiefelopt.__all__)) == len(stiefelopt.__all__)
