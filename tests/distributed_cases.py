"""What the ranks of tests/test_distributed.py run, one process each: many cases in one gloo process group.

    python -m tests.distributed_cases FOLDER [CASE ...]

Every rank writes its results to FOLDER/SIZE/RANK.json after each case, so that the parent can name one that failed or
hung.
"""

from __future__ import annotations

import copy
import datetime
import importlib
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from benchmarks.communication import Collectives, fork_ranks
from stiefelopt import (
    BlockAdam,
    ConfigError,
    FixedRank,
    NotOnManifoldError,
    RiemannianWrapper,
    Riemannion,
    RiemannLoRALinear,
    StelLALinear,
    StepError,
    Stiefel,
    adapt,
    adapter_state_dict,
    attach,
    constrain,
    export_lora,
    load_adapter_state_dict,
    loi_init,
    manifolds,
    merge_adapters,
    param_groups,
    retractions,
    transforms,
)
from stiefelopt.manifolds import FixedRankPair, Oblique, SpecialOrthogonal, Sphere

Case = Callable[[], None]
CASES: dict[str, Case] = {}
STEPS = 3


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


# What the cases are made of


def world() -> int:
    return dist.get_world_size()


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (world(),))


def whole(t: Tensor) -> Tensor:
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t


def gap(a: Tensor, b: Tensor) -> float:
    a, b = whole(a), whole(b)
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a - b).abs().max().item() if a.numel() else 0.0


def close_to(a: Sequence[Tensor], b: Sequence[Tensor], within: float) -> None:
    assert len(a) == len(b)
    gaps = [gap(x, y) for x, y in zip(a, b, strict=True)]
    assert max(gaps) <= within, gaps


def everywhere_equal(t: Tensor) -> bool:
    """Whether every rank holds the same bits."""
    found = [torch.empty_like(t) for _ in range(world())]
    dist.all_gather(found, t.detach().contiguous())
    return all(torch.equal(f, found[0]) for f in found)


def agreed(number: float) -> None:
    """Fails on every rank unless all have the same number."""
    assert everywhere_equal(torch.tensor([number], dtype=torch.float64)), number


@contextmanager
def refused(error: type[Exception], *words: str) -> Iterator[None]:
    """The block must raise this error, with these words."""
    try:
        yield
    except error as found:
        if not all(word in str(found) for word in words):
            raise AssertionError(f"{words} are not all in: {found}") from found
    else:
        raise AssertionError(f"no {error.__name__}")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(shapes: Sequence[torch.Size], step: int, dtype: torch.dtype) -> list[Tensor]:
    """The same on every rank."""
    return [
        torch.randn(s, generator=seeded(1000 * step + i), dtype=torch.float64).to(dtype)
        for i, s in enumerate(shapes)
    ]


def cut(t: Tensor, where: DeviceMesh, placements: Sequence[Any]) -> DTensor:
    """This rank's part of what all of them hold."""
    return distribute_tensor(t, where, placements, src_data_rank=None)


def shard(values: Sequence[Tensor], where: DeviceMesh, placements: Sequence[Any]) -> list[Any]:
    return [nn.Parameter(cut(v.clone(), where, placements)) for v in values]


def trained(params: Sequence[Any], optimizer: Any, *, steps: int = STEPS, size: float = 1.0) -> list[Any]:
    """Stepped along the same gradients, whether the parameters are sharded or not."""
    for step in range(steps):
        grads = gradients([p.shape for p in params], step, params[0].dtype)
        for p, g in zip(params, grads, strict=True):
            p.grad = None
            p.grad = cut(g * size, p.device_mesh, p.placements) if isinstance(p, DTensor) else g * size
        optimizer.step()
    return list(params)


def points(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Of Stiefel; the wide ones have orthonormal rows."""
    found = []
    for i, (n, p) in enumerate(shapes):
        x = Stiefel().random_point(max(n, p), min(n, p), dtype=dtype, generator=seeded(seed + i))
        found.append(x if n >= p else x.mT.contiguous())
    return found


def triple(m: int, n: int, r: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return list(FixedRank().random_point(m, n, rank=r, dtype=dtype, generator=seeded(3)))


def groups_of(params: Sequence[nn.Parameter], manifold: Any, **keys: Any) -> list[dict[str, Any]]:
    return [{"params": list(params), "manifold": manifold, "weight_decay": 0.0, **keys}]


# Uneven shards, and on two or three ranks empty ones.
TALL = ((31, 4), (9, 4), (31, 4), (2, 1))


def both_ways(
    values: Sequence[Tensor],
    make: Any,
    *,
    within: float = 1e-11,
    placements: Sequence[Any] = (Shard(0),),
    where: DeviceMesh | None = None,
    **options: Any,
) -> None:
    """Train sharded and on one process, compare parameters and state."""
    alone = [nn.Parameter(v.clone()) for v in values]
    reference = make(alone)
    trained(alone, reference, **options)
    params = shard(values, where or mesh(), placements)
    optimizer = make(params)
    trained(params, optimizer, **options)
    close_to(params, alone, within)
    for p, q in zip(params, alone, strict=True):
        state, other = optimizer.state[p], reference.state[q]
        for name in other:
            if isinstance(other[name], Tensor) and other[name].ndim:
                assert isinstance(state[name], DTensor), f"{name} is not sharded"
                assert state[name].placements == p.placements
                assert gap(state[name], other[name]) <= within, name
        assert isinstance(p.grad, DTensor)
        assert p.grad.placements == p.placements


# The sharded step equals the step of one process


@case
def every_retraction_on_sharded_rows() -> None:
    for name in retractions.names():
        if retractions.get(name).form == "ambient":
            continue
        manifold = Stiefel(retraction=name, metric="canonical", transport="projection")
        both_ways(
            points(*TALL), lambda params, m=manifold: RiemannianWrapper(AdamW(groups_of(params, m), lr=3e-2))
        )


@case
def other_parts_on_sharded_rows() -> None:
    for manifold in (
        Stiefel(metric="euclidean", retraction="exp"),
        Stiefel(metric="euclidean", transport="projection"),
        Stiefel(projection="none", retraction="cayley"),
    ):
        both_ways(
            points(*TALL),
            lambda params, m=manifold: RiemannianWrapper(SGD(groups_of(params, m), lr=0.1, momentum=0.9)),
        )


@case
def steps_of_any_length() -> None:
    """From none, which moves no bit, to those that take several passes and float64."""
    for size in (1e-12, 1.0, 1e3):
        for name in ("polar", "qr", "exp"):
            both_ways(
                points(*TALL, dtype=torch.float32),
                lambda params, n=name: RiemannianWrapper(
                    SGD(groups_of(params, Stiefel(retraction=n)), lr=0.1)
                ),
                within=1e-3 if size > 1 else 1e-6,
                size=size,
                steps=2,
            )
    for name in ("polar", "cayley"):
        values = points(*TALL, dtype=torch.float32)
        params = shard(values, mesh(), [Shard(0)])
        trained(params, RiemannianWrapper(SGD(groups_of(params, Stiefel(retraction=name)), lr=0.0)))
        assert all(torch.equal(whole(p), v) for p, v in zip(params, values, strict=True))


class _Nudge(SGD):
    """Moves one entry of the first parameter, whatever the gradients are."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        p = self.param_groups[0]["params"][0]
        if not isinstance(p, DTensor):
            p[0, 0] += 0.1
        elif dist.get_rank() == 0:
            p.to_local()[0, 0] += 0.1


@case
def a_row_that_moves_on_one_rank_alone() -> None:
    """The mask of still points must not be each rank's own; a still one beside it sends everyone to look."""
    for manifold, values in ((Stiefel(), points((12, 3), (12, 3))), (FixedRank(), triple(12, 8, 2))):
        params, alone = shard(values, mesh(), [Shard(0)]), [nn.Parameter(v.clone()) for v in values]
        trained(params, RiemannianWrapper(_Nudge(groups_of(params, manifold))), steps=2)
        trained(alone, RiemannianWrapper(_Nudge(groups_of(alone, manifold))), steps=2)
        close_to(params, alone, 1e-12)
        assert gap(params[0], values[0]) > 1e-3


@case
def fixed_rank_triples() -> None:
    for retraction in ("svd", "orthographic"):
        for transport in ("projection", "none"):
            manifold = FixedRank(retraction=retraction, transport=transport)
            both_ways(
                [*triple(20, 13, 3), *triple(17, 13, 3)],
                lambda params, m=manifold: RiemannianWrapper(AdamW(groups_of(params, m), lr=1e-2)),
                within=1e-7,
            )
    both_ways(
        triple(20, 13, 3),
        lambda params: RiemannianWrapper(
            SGD(
                groups_of(params, FixedRank(), gradient="projected", manifold_decay=0.1),
                lr=1e-2,
                momentum=0.9,
            )
        ),
        within=1e-10,
    )
    # S of 2 x 2: on three ranks one holds none of it.
    both_ways(
        triple(5, 4, 2),
        lambda params: RiemannianWrapper(BlockAdam(groups_of(params, FixedRank()), lr=1e-2)),
        within=1e-10,
    )


@case
def fixed_rank_with_small_singular_values() -> None:
    """What sends float32 products to float64 does so on all ranks."""
    u, _, v = triple(20, 13, 3, torch.float32)
    both_ways(
        [u, torch.diag(torch.tensor([1.0, 1e-3, 1e-5])), v],
        lambda params: RiemannianWrapper(SGD(groups_of(params, FixedRank(floor=1e-4)), lr=1e-3)),
        within=1e-3,
        steps=2,
        size=1e-3,
    )


@case
def riemannion_steps() -> None:
    both_ways(
        triple(20, 13, 3), lambda params: Riemannion(groups_of(params, FixedRank()), lr=1e-2), within=1e-9
    )
    both_ways(points(*TALL), lambda params: Riemannion(groups_of(params, Stiefel()), lr=1e-2), within=1e-9)


@case
def wide_matrices_along_their_long_side() -> None:
    both_ways(
        points((4, 31), (3, 9)),
        lambda params: RiemannianWrapper(AdamW(groups_of(params, Stiefel()), lr=3e-2)),
        placements=[Shard(1)],
    )


@case
def views_of_more_dimensions() -> None:
    kernels = Stiefel().random_point(18, 5, dtype=torch.float64, generator=seeded(1)).mT.reshape(5, 2, 3, 3)
    both_ways(
        [kernels],
        lambda params: RiemannianWrapper(AdamW(groups_of(params, Stiefel(), view="matrix"), lr=3e-2)),
        placements=[Shard(1)],
    )
    batch = Stiefel().random_point(3, 10, 2, dtype=torch.float64, generator=seeded(2))
    both_ways(
        [batch],
        lambda params: RiemannianWrapper(AdamW(groups_of(params, Stiefel(), view="batch"), lr=3e-2)),
        placements=[Shard(1)],
    )


@case
def replicated_tensors_may_use_every_part() -> None:
    both_ways(
        points((31, 4), (4, 9)),
        lambda params: RiemannianWrapper(AdamW(groups_of(params, Stiefel(retraction="svd")), lr=3e-2)),
        placements=[Replicate()],
    )


@case
def replicas_on_two_meshes_stand_in_one_group() -> None:
    meshes = [init_device_mesh("cpu", (1, world()), mesh_dim_names=(f"a{i}", f"b{i}")) for i in (0, 1)]
    values = points((9, 3), (9, 3))
    cut_ones = [
        shard([p], where[f"b{i}"], [Replicate()])[0]
        for i, (p, where) in enumerate(zip(values, meshes, strict=True))
    ]
    alone = [nn.Parameter(v.clone()) for v in values]
    for params in (cut_ones, alone):
        trained(params, RiemannianWrapper(AdamW(groups_of(params, Stiefel()), lr=1e-2)), steps=3)
    close_to([whole(p) for p in cut_ones], alone, 1e-12)


@case
def meshes_of_two_dimensions() -> None:
    """Hybrid shards, whose Grams are summed over one dimension alone, and rows cut twice."""
    for shape, placements in (
        ((1, world()), [Replicate(), Shard(0)]),
        ((world(), 1), [Replicate(), Shard(0)]),
        ((world(), 1), [Shard(0), Replicate()]),
        ((1, world()), [Shard(0), Shard(0)]),
    ):
        where = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        for values, manifold in ((points(*TALL), Stiefel()), (triple(20, 13, 3), FixedRank())):
            both_ways(
                values,
                lambda params, m=manifold: RiemannianWrapper(AdamW(groups_of(params, m), lr=1e-2)),
                where=where,
                placements=placements,
                within=1e-7,
                steps=2,
            )


# What goes over the wire


@case
def the_step_sends_small_numbers_alone() -> None:
    """p x p numbers for each matrix and phase, however tall they are, and few messages."""
    sent = {}
    (tall_one,) = shard(points((64, 4)), mesh(), [Shard(0)])
    with Collectives() as seen:
        whole(tall_one)
    assert seen.bytes >= 64 * 4 * 8, "the counter does not see what is gathered"
    for tall in (1, 8):
        p, count = 4, 6
        params = shard(points(*[(32 * tall * world(), p)] * count, dtype=torch.float32), mesh(), [Shard(0)])
        optimizer = RiemannianWrapper(AdamW(groups_of(params, Stiefel()), lr=1e-2))
        trained(params, optimizer, steps=1)
        with Collectives() as seen:
            optimizer.step()
        assert seen.names == {"allreduce_"}, seen.names
        sent[tall] = seen.bytes
        assert len(seen.sizes) == 3, seen.sizes  # gradient, displacement, retraction
        assert seen.bytes == 3 * count * p * p * 4, seen.sizes
    assert sent[1] == sent[8]
    for tall in (1, 8):
        r = 4
        params = shard(triple(32 * tall * world(), 16 * tall * world(), r, torch.float32), mesh(), [Shard(0)])
        optimizer = RiemannianWrapper(AdamW(groups_of(params, FixedRank()), lr=1e-3))
        trained(params, optimizer, steps=2)
        with Collectives() as seen:
            optimizer.step()
        assert seen.names == {"allreduce_"}, seen.names
        assert max(seen.sizes) <= 4 * r * r * 8, seen.sizes
        assert seen.bytes <= 40 * r * r * 8, seen.sizes


# Refusals


@case
def what_cannot_be_sharded_is_refused_by_name() -> None:
    def step(values: list[Tensor], manifold: Any, placement: Any, **keys: Any) -> None:
        params = shard(values, mesh(), [placement])
        before = [whole(p).clone() for p in params]
        try:
            RiemannianWrapper(AdamW(groups_of(params, manifold, **keys)))
        finally:
            assert all(torch.equal(whole(p), b) for p, b in zip(params, before, strict=True))

    tall, wide = points((12, 3)), points((3, 12))
    with refused(ConfigError, "parameter 0 of group 0", "retraction 'svd'", "polar"):
        step(tall, Stiefel(retraction="svd"), Shard(0))
    own: Any = manifolds.register("Own")(dataclass(frozen=True)(type("Own", (manifolds.Manifold,), {})))
    with refused(ConfigError, "parameter 0 of group 0", "Own needs whole matrices"):
        step(tall, own(), Shard(0))
    with refused(ConfigError, "a plain function", "polar"):
        step(tall, Stiefel(retraction=lambda x, u: x + u), Shard(0))
    with refused(ConfigError, "parameter 0 of group 0", "dimension 0", "Shard(1)", "average its gradient"):
        step(wide, Stiefel(), Shard(0))
    with refused(ConfigError, "dimension 1", "Shard(0)"):
        step(tall, Stiefel(), Shard(1))
    with refused(ConfigError, "dimension 0", "Shard(1)"):
        batch = Stiefel().random_point(4, 10, 2, dtype=torch.float64, generator=seeded(2))
        step([batch], Stiefel(), Shard(0), view="batch")
    with refused(ConfigError, "bfloat16", "MixedPrecisionPolicy"):
        step([tall[0].bfloat16()], Stiefel(), Shard(0))
    u, s, v = triple(12, 8, 2)
    cut = [*shard([u], mesh(), [Shard(0)]), *shard([s, v], mesh(), [Replicate()])]
    with refused(ConfigError, "different ways"):
        RiemannianWrapper(AdamW(groups_of(cut, FixedRank())))
    with refused(NotOnManifoldError, "all ranks"):
        step([2 * tall[0]], Stiefel(), Shard(0))
    with refused(NotOnManifoldError, "singular"):
        step([u, torch.zeros_like(s), v], FixedRank(), Shard(0))
    for manifold, values, names in (
        (Oblique(), tall, "Oblique"),
        (Sphere(), tall, "Sphere"),
        (Sphere(), [nn.functional.normalize(torch.ones(12, dtype=torch.float64), dim=0)], "Sphere"),
        (FixedRankPair(), [wide[0], tall[0]], "FixedRankPair"),
    ):
        with refused(
            ConfigError,
            f"{names} needs whole matrices",
            "gather: keep the parameter whole",
            "average its gradient",
        ):
            step(values, manifold, Shard(0))
    rotation = SpecialOrthogonal().random_point(6, 6, dtype=torch.float64, generator=seeded(4))
    step([rotation], SpecialOrthogonal(), Shard(0))
    with refused(NotOnManifoldError, "determinant -1"):
        step([rotation * torch.tensor([[-1.0], *[[1.0]] * 5])], SpecialOrthogonal(), Shard(0))


@case
def an_optimizer_that_shows_no_moments_is_refused_where_they_are_carried() -> None:
    """ZeroRedundancyOptimizer inside steps what needs none as one process does, and around the wrapper, too."""
    values = [v.float() for v in points((9, 3), (9, 3), (12, 3))]
    for manifold in (Stiefel(transport="projection"), FixedRank()):
        given = values[:1] if manifold.parts == 1 else [t.float() for t in triple(12, 8, 2)]
        groups = groups_of([nn.Parameter(v.clone()) for v in given], manifold)
        with refused(ConfigError, "ZeroRedundancyOptimizer", "fully_shard", "nonfinite='skip'"):
            RiemannianWrapper(ZeroRedundancyOptimizer(groups, optimizer_class=AdamW, lr=1e-2))

    def inside(params: list[Any]) -> Any:
        zero = ZeroRedundancyOptimizer(groups_of(params, Stiefel()), optimizer_class=AdamW, lr=1e-2)
        return RiemannianWrapper(zero)

    def around(params: list[Any]) -> Any:
        return ZeroRedundancyOptimizer(
            groups_of(params, Stiefel(transport="projection")),
            optimizer_class=lambda ps, **options: RiemannianWrapper(  # type: ignore[arg-type]
                AdamW(ps, **options), nonfinite="skip"
            ),
            lr=1e-2,
        )

    for make, manifold in ((inside, Stiefel()), (around, Stiefel(transport="projection"))):
        runs = []
        for build in (
            make,
            lambda params, m=manifold: RiemannianWrapper(AdamW(groups_of(params, m), lr=1e-2)),
        ):
            params = [nn.Parameter(v.clone()) for v in values]
            trained(params, build(params), steps=3)
            runs.append(params)
        close_to(runs[0], runs[1], 1e-6)


@case
def averages_of_points_are_taken_only_where_ranks_then_agree() -> None:
    def made(p: nn.Parameter, manifold: Any, **keys: Any) -> RiemannianWrapper:
        sgd = SGD(groups_of([p], manifold, **keys), lr=0.3)
        return RiemannianWrapper(PostLocalSGDOptimizer(sgd, PeriodicModelAverager(period=2)))

    for manifold, keys in (
        (Stiefel(), {}),
        (Oblique(), {}),
        (Stiefel(projection="none", retraction="cayley"), {}),
        (Stiefel(projection="none"), {"displacement_scale": 0.5}),
    ):
        with refused(ConfigError, "PostLocalSGDOptimizer", "DistributedDataParallel", "projection='none'"):
            made(nn.Parameter(points((12, 3))[0]), manifold, **keys)
    for retraction in ("polar", "qr"):
        p = nn.Parameter(points((12, 3))[0])
        optimizer = made(p, Stiefel(projection="none", retraction=retraction))
        for step in range(5):
            p.grad = torch.randn(12, 3, generator=seeded(100 * step + dist.get_rank()), dtype=torch.float64)
            optimizer.step()
            assert everywhere_equal(p) == (step % 2 == 0)
        assert Stiefel().residual(p) < 1e-12


class _Event:
    """The accelerator's events, of which a CPU has none."""

    def __init__(self, device: torch.device) -> None:
        self.record, self.synchronize = lambda stream: None, lambda: None


@case
def on_accelerators_all_ranks_hear_of_a_nan_on_one_a_step_later() -> None:
    event, host, stream = torch.Event, transforms.HOST, torch.accelerator.current_stream
    torch.Event, transforms.HOST = _Event, ()  # type: ignore[misc, assignment]
    torch.accelerator.current_stream = lambda device: device  # type: ignore[assignment, misc]
    try:
        for manifold, values in ((Stiefel(), points(*TALL[:2])), (FixedRank(), triple(20, 13, 3))):
            params = shard(values, mesh(), [Shard(0)])
            optimizer = RiemannianWrapper(AdamW(groups_of(params, manifold), lr=1e-2))
            trained(params, optimizer, steps=1)
            before = [whole(p).clone() for p in params]
            if dist.get_rank() == world() - 1:
                params[0].grad.to_local()[-1] = float("nan")
            optimizer.step()
            assert torch.equal(whole(params[0]), before[0])
            with refused(StepError, "step before this one"):
                optimizer.step()
            optimizer.step()
            assert max(optimizer.residuals().values()) < 1e-12
    finally:
        torch.Event, transforms.HOST = event, host  # type: ignore[misc]
        torch.accelerator.current_stream = stream


@case
def nan_on_one_rank_is_an_error_on_all() -> None:
    for manifold, values in ((Stiefel(), points(*TALL[:2])), (FixedRank(), triple(20, 13, 3))):
        for nonfinite in ("raise", "restore", "skip"):
            params = shard(values, mesh(), [Shard(0)])
            optimizer = RiemannianWrapper(AdamW(groups_of(params, manifold), lr=1e-2), nonfinite=nonfinite)
            trained(params, optimizer, steps=1)
            before = [whole(p).clone() for p in params]
            for p in params:
                p.grad = DTensor.from_local(
                    torch.full_like(p.to_local(), 0.1),
                    p.device_mesh,
                    p.placements,
                    shape=p.shape,
                    stride=p.stride(),
                )
            if dist.get_rank() == world() - 1:
                params[0].grad.to_local()[-1] = float("nan")
            if nonfinite == "skip":
                optimizer.step()
                agreed(optimizer.diagnostics()["skipped"])
                assert optimizer.diagnostics()["skipped"] >= 1
            else:
                with refused(StepError, "not finite", "nothing has changed"):
                    optimizer.step()
            assert torch.equal(whole(params[0]), before[0])


class _Poison(AdamW):
    """An inner optimizer that moves a row of one rank to NaN, or fails, when it is told to."""

    harm = ""

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        if self.harm == "nan" and dist.get_rank() == 0:
            self.param_groups[0]["params"][0].to_local()[0] = float("nan")
        if self.harm == "fail":
            raise RuntimeError("failed")
        return found


@case
def a_step_that_fails_is_taken_back_on_all_ranks() -> None:
    for nonfinite in ("raise", "restore"):
        params = shard(points(*TALL), mesh(), [Shard(0)])
        inner = _Poison(groups_of(params, Stiefel()), lr=1e-2)
        optimizer = RiemannianWrapper(inner, nonfinite=nonfinite)
        trained(params, optimizer, steps=2)
        before = [whole(p).clone() for p in params]
        moments = [whole(optimizer.state[p]["exp_avg"]).clone() for p in params]
        for harm, error in (("nan", StepError), ("fail", RuntimeError)):
            inner.harm = harm
            with refused(error):
                optimizer.step()
            assert all(torch.equal(whole(p), b) for p, b in zip(params, before, strict=True))
            if nonfinite == "restore" and harm == "nan":
                found = [whole(optimizer.state[p]["exp_avg"]) for p in params]
                assert all(map(torch.equal, found, moments))
    params = shard(points(*TALL), mesh(), [Shard(0)])
    inner = _Poison(groups_of(params, Stiefel()), lr=1e-2)
    handle = attach(inner)
    trained(params, inner, steps=2)
    before = [whole(p).clone() for p in params]
    inner.harm = "fail"
    with refused(RuntimeError):
        inner.step()
    assert max(handle.residuals().values()) < 1e-12
    assert all(torch.equal(whole(p), b) for p, b in zip(params, before, strict=True))


@case
def a_lost_rank_is_an_error_on_all() -> None:
    params = shard(triple(20, 13, 3), mesh(), [Shard(0)])
    optimizer = RiemannianWrapper(SGD(groups_of(params, FixedRank(), gradient="projected"), lr=1.0))
    for i, p in enumerate(params):
        p.grad = p.detach().clone() if i == 1 else torch.zeros_like(p)
    with refused(StepError, "rank"):
        optimizer.step()


# What is read off the wrapper


@case
def numbers_are_the_same_on_all_ranks_and_on_one_process() -> None:
    for manifold, values in ((Stiefel(), points(*TALL)), (FixedRank(), triple(20, 13, 3))):
        alone = [nn.Parameter(v.clone()) for v in values]
        reference = RiemannianWrapper(AdamW(groups_of(alone, manifold), lr=1e-2))
        trained(alone, reference)
        params = shard(values, mesh(), [Shard(0)])
        optimizer = RiemannianWrapper(AdamW(groups_of(params, manifold), lr=1e-2))
        trained(params, optimizer)
        for name, number in reference.diagnostics().items():
            found = optimizer.diagnostics()[name]
            agreed(found)
            assert abs(found - number) <= 1e-9 * max(1.0, number), name
        residuals = optimizer.residuals()
        assert list(residuals) == list(reference.residuals())
        for number in residuals.values():
            agreed(number)
            assert number < 1e-13


@case
def attached_hooks_do_the_same() -> None:
    values = points(*TALL)
    params, other = (shard(values, mesh(), [Shard(0)]) for _ in range(2))
    trained(params, RiemannianWrapper(AdamW(groups_of(params, Stiefel()), lr=1e-2)))
    inner = AdamW(groups_of(other, Stiefel()), lr=1e-2)
    handle = attach(inner)
    trained(other, inner)
    assert all(torch.equal(whole(p), whole(q)) for p, q in zip(params, other, strict=True))
    for number in handle.residuals().values():
        agreed(number)


# Models under fully_shard and DDP


def network(layer: Any = StelLALinear, *, seed: int = 0, device: str = "cpu", **options: Any) -> Any:
    """Two adapted linear layers, a plain one and a norm; float64."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = nn.Sequential(
            nn.Linear(9, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 7), nn.Linear(7, 2)
        )
        model = model.double()
        if layer is not None:
            adapt(
                model,
                layer,
                target_modules=["0", "3"],
                modules_to_save=["2", "4"],
                r=3,
                alpha=3,
                reference_dim=9,
                **options,
            )
    return model


def loss_of(model: nn.Module, step: int, part: slice, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of this part of the batch, weighted so that the mean over parts is the loss of the whole."""
    x = torch.randn(6 * 2, 9, generator=seeded(step), dtype=torch.float64).to(dtype)
    return (model(x[part]).square().sum(-1) - 1).square().mean()


def my_part() -> slice:
    size = 12 // world()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def fit(model: nn.Module, optimizer: Any, part: slice, steps: range = range(5)) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, part).backward()
        optimizer.step()


def fully(model: Any, **options: Any) -> Any:
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def optimizer_for(model: nn.Module, **options: Any) -> RiemannianWrapper:
    return RiemannianWrapper(AdamW(param_groups(model, lr=1e-2, weight_decay=0.01, named=True)), **options)


def same_models(model: nn.Module, other: nn.Module, within: float) -> None:
    named = dict(other.named_parameters())
    for name, p in model.named_parameters():
        assert gap(p, named[name.removeprefix("module.")]) <= within, (
            name,
            gap(p, named[name.removeprefix("module.")]),
        )


LAYERS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (StelLALinear, {}),
    (StelLALinear, {"init": "pseudo-zero", "diagonal": True}),
    (RiemannLoRALinear, {}),
    (RiemannLoRALinear, {"correction": "keep"}),
)


@case
def adapters_under_fully_shard() -> None:
    for layer, options in LAYERS:
        alone, model = network(layer, **options), fully(network(layer, **options))
        fit(alone, optimizer_for(alone), slice(None))
        optimizer = optimizer_for(model)
        fit(model, optimizer, my_part())
        same_models(model, alone, 1e-9)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        names = {name for name, number in optimizer.residuals().items() if number < 1e-12}
        assert names == ({"0.U", "0.V", "3.U", "3.V"} if layer is StelLALinear else {"0.U", "3.U"}), names


@case
def declarations_survive_fully_shard() -> None:
    def make() -> nn.Module:
        model = network(None)
        constrain(model, "0.weight", Stiefel(retraction="qr"), orientation="columns")
        return constrain(model, "3.weight", Stiefel())

    model = fully(make())
    with refused(ConfigError, "3.weight", "dimension 0", "Shard(1)"):
        optimizer_for(model)
    alone = make()
    model = fully(make(), shard_placement_fn=lambda p: Shard(1) if p.shape == (7, 12) else None)
    optimizer = optimizer_for(model)
    assert [g["manifold"]["retraction"] for g in optimizer.param_groups if "manifold" in g] == ["qr", "polar"]
    fit(alone, optimizer_for(alone), slice(None))
    fit(model, optimizer, my_part())
    same_models(model, alone, 1e-9)
    assert len(optimizer.residuals()) == 2


@case
def models_begun_on_meta() -> None:
    for layer, options in (LAYERS[0], LAYERS[3]):
        model = fully(network(layer, device="meta", **options))
        model.to_empty(device="cpu")
        torch.manual_seed(dist.get_rank())  # ranks that are not seeded alike still get one point
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                nn.init.constant_(module.weight, 0.1)
                nn.init.zeros_(module.bias)
        for module in model.modules():
            if isinstance(module, (StelLALinear, RiemannLoRALinear)):
                module.reset_parameters()
        optimizer = optimizer_for(model)
        assert max(optimizer.residuals().values()) < 1e-13
        fit(model, optimizer, my_part())
        assert max(optimizer.residuals().values()) < 1e-13
        assert len(optimizer.residuals()) == (4 if layer is StelLALinear else 2)
    refused_ones: tuple[tuple[Any, dict[str, Any]], ...] = (
        (RiemannLoRALinear, {"correction": "fold"}),
        (StelLALinear, {"init": "pseudo-zero"}),
        (StelLALinear, {"init": "svd-major"}),
    )
    for layer, options in refused_ones:
        model = fully(network(layer, **options))
        with refused(ConfigError, "before fully_shard"):
            model[0].reset_parameters()
    model = network(None, device="meta")
    constrain(model, "0.weight", Stiefel())
    fully(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.1)
    with refused(NotOnManifoldError, "0.weight"):
        optimizer_for(model)
    with refused(ConfigError, "whole", "random"):
        constrain(model, "0.weight", Stiefel(), init="project")
    torch.manual_seed(dist.get_rank())
    constrain(model, "0.weight", Stiefel(), init="random")
    assert optimizer_for(model).residuals()["0.weight"] < 1e-13


@case
def adapters_leave_a_sharded_model_whole() -> None:
    for layer, options in (LAYERS[0], LAYERS[3]):
        alone, model = network(layer, **options), fully(network(layer, **options))
        for name, t in adapter_state_dict(model).items():
            assert not isinstance(t, DTensor)
            assert torch.equal(t, adapter_state_dict(alone)[name]), name
        for ours, theirs in zip(model[0].to_lora(), alone[0].to_lora(), strict=True):
            assert torch.equal(ours, theirs)
        other = network(layer, seed=1, **options)
        model[0].load_factors(other[0].factor_state())
        assert torch.equal(whole(model[0].U), other[0].U)
        with refused(ConfigError, "merge()", "before fully_shard"):
            model[0].merge()
        load_adapter_state_dict(model, adapter_state_dict(other))
        for name, t in adapter_state_dict(model).items():
            assert torch.equal(t, adapter_state_dict(other)[name]), name
        folders = [FOLDER / f"{layer.__name__}-{which}" for which in ("sharded", f"alone-{dist.get_rank()}")]
        for m, folder in zip((model, other), folders, strict=True):
            export_lora(m, folder)
        ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        assert set(ours) == set(theirs)
        assert any("modules_to_save" in name or ".4." in name for name in ours)
        configs = [(folder / "adapter_config.json").read_text() for folder in folders]
        assert configs[0] == configs[1]
        close_to([ours[name] for name in ours], [theirs[name] for name in ours], 1e-12)


@case
def after_an_evaluation_the_shards_are_read_and_written() -> None:
    """The root's own layers hold whole parameters then, which the next forward pass throws away."""

    def evaluated(layer: Any, **options: Any) -> Any:
        model = network(layer, **options)
        fully_shard(model[0])
        fully_shard(model)
        return evaluate(model)

    def evaluate(model: Any) -> Any:
        with torch.no_grad():
            model(torch.ones(4, 9, dtype=torch.float64))
        assert not isinstance(model[3].U, DTensor)
        return model

    for layer, options in (LAYERS[0], LAYERS[3]):
        other = network(layer, seed=1, **options)
        best = adapter_state_dict(other)

        model = evaluated(layer, **options)
        load_adapter_state_dict(model, best)
        assert all(torch.equal(t, best[name]) for name, t in adapter_state_dict(evaluate(model)).items())
        model = evaluated(layer, **options)
        for adapter, whole_one in ((model[0], other[0]), (model[3], other[3])):
            adapter.load_factors(whole_one.factor_state())
        evaluate(model)
        for read in (
            lambda m: m.to_lora(),
            lambda m: m.factor_state().values(),
            lambda m: [m.delta_weight()],
        ):
            assert all(map(torch.equal, read(model[3]), read(other[3])))
            assert isinstance(model[3].U, DTensor)
            evaluate(model)
        optimizer = optimizer_for(model)
        for group in optimizer.param_groups:
            assert all(isinstance(p, DTensor) for p in group["params"])
        export_lora(evaluate(model), FOLDER / f"evaluated-{layer.__name__}")
        assert isinstance(model[3].U, DTensor)
        with refused(ConfigError, "merge()", "before fully_shard"):
            evaluate(model)[3].merge()
        with refused(ConfigError, "merge()", "before fully_shard"):
            merge_adapters(evaluate(model))
        torch.manual_seed(dist.get_rank())
        evaluate(model)[3].reset_parameters()
        started = whole(model[3].U)
        assert Stiefel().residual(started) < 1e-12  # no rows of different matrices
        assert torch.equal(evaluate(model)[3].U, started)
    model = network(None)
    fully_shard(model[3])
    fully_shard(model)
    with torch.no_grad():
        loss_of(model, 0, my_part())
    torch.manual_seed(dist.get_rank())
    constrain(model, "0.weight", Stiefel(), init="random")
    started = whole(model[0].weight)
    assert Stiefel().residual(started) < 1e-12
    with torch.no_grad():
        loss_of(model, 0, my_part())
    assert torch.equal(model[0].weight, started)
    with refused(ConfigError, "adapt the model first, then shard it"):
        adapt(model, target_modules=["0"], r=2)


@case
def what_comes_too_late_for_whole_layers_is_refused() -> None:
    model = network(RiemannLoRALinear, correction="keep")
    fully_shard(model[3])
    layers = list(model)
    with refused(ConfigError, "merge()", "before fully_shard"):
        merge_adapters(model)
    assert list(model) == layers
    with refused(ConfigError, "adapt the model first, then shard it"):
        adapt(fully(network(None)), target_modules=["0"], r=2)
    model = network(RiemannLoRALinear, correction="keep")
    with refused(ConfigError, "call it before DDP"):
        loi_init(DistributedDataParallel(model), lambda: loss_of(model, 0, my_part()))


@case
def mixed_precision_clipping_and_accumulation() -> None:
    """Three micro-batches to a step, gradients reduced with the last, clipped by a norm over all ranks."""

    def run(model: Any, part: slice, sync: bool) -> RiemannianWrapper:
        optimizer = optimizer_for(model)
        for step in range(3):
            optimizer.zero_grad()
            for micro in range(3):
                if sync:
                    model.set_requires_gradient_sync(micro == 2)
                loss_of(model, 10 * step + micro, part).backward()
            norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.05)
            assert whole(norm).item() > 0.05
            optimizer.step()
        return optimizer

    for layer, options in LAYERS[::2]:
        alone, model = network(layer, **options), fully(network(layer, **options))
        run(alone, slice(None), False)
        run(model, my_part(), True)
        same_models(model, alone, 1e-8)
    beside = (StelLALinear, {"init": "pseudo-zero", "correction": "keep"})
    for layer, options in (LAYERS[0], LAYERS[2], LAYERS[3], beside):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = fully(network(layer, **options).float(), mp_policy=policy)
        start = [whole(p).clone() for p in model.parameters()]
        optimizer = optimizer_for(model)
        for step in range(5):
            optimizer.zero_grad()
            loss_of(model, step, my_part(), torch.bfloat16).backward()
            optimizer.step()
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert max(optimizer.residuals().values()) < 1e-6
        assert any(gap(p, s) > 1e-3 for p, s in zip(model.parameters(), start, strict=True))


@case
def parameters_offloaded_to_the_cpu() -> None:
    alone, model = network(), fully(network(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    fit(alone, optimizer_for(alone), slice(None))
    fit(model, optimizer_for(model), my_part())
    same_models(model, alone, 1e-9)


@case
def hybrid_shards_of_a_model() -> None:
    for shape in ((1, world()), (world(), 1)):
        where = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        alone, model = network(), fully(network(), mesh=where)
        fit(alone, optimizer_for(alone), slice(None))
        fit(model, optimizer_for(model), my_part())
        same_models(model, alone, 1e-9)


@case
def data_parallel_ranks_stay_equal() -> None:
    """Bit for bit, and to rounding what one process makes of the whole batch; DDP broadcasts the start."""
    for layer, options in LAYERS:
        model = DistributedDataParallel(network(layer, seed=dist.get_rank(), **options))
        alone = network(layer, **options)
        buffers = dict(model.module.named_buffers())
        assert all(everywhere_equal(b) for b in buffers.values())
        for p, q in zip(model.module.parameters(), alone.parameters(), strict=True):
            assert torch.equal(p, q)
        optimizer = optimizer_for(model)
        fit(alone, optimizer_for(alone), slice(None))
        fit(model, optimizer, my_part(), range(2))
        for step in range(2, 5):  # accumulation of two halves, the first without communication
            optimizer.zero_grad()
            size = 12 // world() // 2
            first = my_part().start
            with model.no_sync():
                (loss_of(model, step, slice(first, first + size)) / 2).backward()
            (loss_of(model, step, slice(first + size, first + 2 * size)) / 2).backward()
            optimizer.step()
        assert all(everywhere_equal(p) for p in model.parameters())
        same_models(model, alone, 1e-9)


@case
def data_parallel_ranks_stay_equal_in_half_precision() -> None:
    """Their gradients are averaged after steps and loads, too; optimizers around others cannot have it."""

    def network_of_halves() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).bfloat16()
        return constrain(model, "0.weight", Stiefel())

    for wrap in (RiemannianWrapper, attach):
        for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
            module = network_of_halves()
            model = DistributedDataParallel(module, **options)  # type: ignore[arg-type]
            optimizer = AdamW(param_groups(module, lr=1e-2))
            handle = wrap(optimizer)
            stepping = handle if isinstance(handle, RiemannianWrapper) else optimizer
            for step in range(4):
                if step == 2:
                    stepping.load_state_dict(copy.deepcopy(stepping.state_dict()))
                stepping.zero_grad()
                x = torch.randn(8, 6, generator=seeded(10 * step + dist.get_rank()))
                model(x.bfloat16()).square().mean().backward()
                assert all(everywhere_equal(p.grad) for p in model.parameters() if p.grad is not None)
                stepping.step()
            assert all(everywhere_equal(p) for p in model.parameters())
    zero = ZeroRedundancyOptimizer(param_groups(network_of_halves()), optimizer_class=AdamW)
    with refused(ConfigError, "bfloat16", "ZeroRedundancyOptimizer", "autocast"):
        RiemannianWrapper(zero)


# Checkpoints: saved on two ranks, loaded on one and three


def _state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


def _checkpointed() -> Iterator[tuple[str, Any, nn.Module]]:
    for layer, _ in LAYERS[::2]:
        model = network(layer, correction="keep") if layer is RiemannLoRALinear else network(layer)
        yield layer.__name__, layer, model


def save_a_checkpoint() -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    for name, _, model in _checkpointed():
        fully(model)
        optimizer = optimizer_for(model)
        fit(model, optimizer, my_part(), range(3))
        save(_state(model, optimizer), checkpoint_id=FOLDER.parent / name)


def load_a_checkpoint() -> None:
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    for name, layer, alone in _checkpointed():
        fit(alone, optimizer_for(alone), slice(None))
        model = fully(
            network(layer, seed=1, **({"correction": "keep"} if layer is RiemannLoRALinear else {}))
        )
        optimizer = optimizer_for(model)
        state = _state(model, optimizer)
        load(state, checkpoint_id=FOLDER.parent / name)
        model.load_state_dict(state["model"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            set_optimizer_state_dict(model, optimizer, state["optimizer"])
        assert max(optimizer.residuals().values()) < 1e-13
        fit(model, optimizer, my_part(), range(3, 5))
        same_models(model, alone, 1e-9)
        assert max(optimizer.residuals().values()) < 1e-13


PLAN: tuple[tuple[int, tuple[Case, ...]], ...] = (
    (2, (*CASES.values(), save_a_checkpoint)),
    (3, (*CASES.values(), load_a_checkpoint)),
    (1, (load_a_checkpoint,)),
)
FOLDER = Path()
GIVE_UP = datetime.timedelta(seconds=40)


def run_rank(size: int, folder: Path, cases: Sequence[Case], rank: int) -> None:
    """Run the cases; where one fails on some ranks alone, the others wait for it until the group gives up."""
    global FOLDER
    FOLDER = folder
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=GIVE_UP)
    results: dict[str, str] = {}

    def say(name: str, result: str) -> None:
        results[name] = result
        (folder / f"{rank}.json").write_text(json.dumps(results))

    for function in cases:
        name, begun = function.__name__, time.perf_counter()
        say(name, "hung")
        torch.manual_seed(0)
        try:
            function()
            say(name, "")
        except Exception:
            say(name, traceback.format_exc())
        print(f"{time.perf_counter() - begun:6.2f} s  {size} ranks  {name}", flush=True)
        failed = torch.tensor([float(bool(results[name]))])
        dist.all_reduce(failed)
        if 0 < failed.item() < size:
            return  # out of step


def main(folder: Path, names: Sequence[str]) -> None:
    for size, cases in PLAN:
        chosen = [c for c in cases if not names or c.__name__ in names]
        (folder / str(size)).mkdir()
        fork_ranks(size, partial(run_rank, size, folder / str(size), chosen))


if __name__ == "__main__":
    importlib.import_module("torch._dynamo")  # seconds, which every rank would spend at its first optimizer
    main(Path(sys.argv[1]), sys.argv[2:])
