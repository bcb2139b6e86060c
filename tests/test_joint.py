"""Parameters that the inner optimizer steps as one: the same numbers, the same state, and nothing the user can see."""

from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import adam, sgd

from stiefelopt import FixedRank, RiemannianWrapper, Stiefel, joint
from stiefelopt.joint import ELEMENTWISE
from stiefelopt.moments import Block

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9, "nesterov": True}],
    "AdamW": [{}, {"amsgrad": True}, {"fused": True}, {"foreach": True}],
    "RMSprop": [{"momentum": 0.9, "centered": True}],
}
CASES = [
    pytest.param(cls, options, id=f"{cls.__name__}-{'-'.join(options)}")
    for cls in sorted(ELEMENTWISE, key=lambda cls: cls.__name__)
    for options in OPTIONS.get(cls.__name__, [{}])
]


def points() -> list[nn.Parameter]:
    """Two heights and both memory layouts on Stiefel, one alone, then three points of fixed rank."""
    g = torch.Generator().manual_seed(0)
    stiefel = [Stiefel().random_point(n, 4, generator=g) for n in (12, 12, 9, 12, 12, 12)]
    stiefel[4:] = [t.mT.contiguous().mT for t in stiefel[4:]]
    ranked = [t for _ in range(3) for t in FixedRank().random_point(8, 6, rank=3, generator=g)]
    free = [torch.randn(5, generator=g)]
    return [nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in (*stiefel, *ranked, *free)]


def wrapped(params: list[nn.Parameter], cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> Any:
    """Three groups: the second has points of the first one's shape, the last holds a free parameter."""
    groups = [
        {"params": params[:2], "manifold": Stiefel(transport="projection")},
        {"params": params[2:6], "manifold": Stiefel(transport="projection"), "lr": 0.02},
        {"params": params[6:15], "manifold": FixedRank()},
        {"params": params[15:]},
    ]
    return RiemannianWrapper(cls(groups, lr=0.01, **options))  # type: ignore[arg-type, call-arg]


def wrapped_alone(
    params: list[nn.Parameter], cls: type[torch.optim.Optimizer], options: dict[str, Any]
) -> Any:
    return RiemannianWrapper(cls([{"params": params, "manifold": Stiefel()}], lr=0.01, **options))  # type: ignore[call-arg]


def train(params: list[nn.Parameter], optimizer: Any, steps: range, without: int | None = None) -> None:
    for k in steps:
        g = torch.Generator().manual_seed(100 + k)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=g)
            p.grad = None if i == without else torch.empty_like(p).copy_(grad)
        optimizer.step()


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches joining off and on."""
    own = joint.steps_elementwise

    def switch(off: bool) -> None:
        monkeypatch.setattr(joint, "steps_elementwise", (lambda _: False) if off else own)

    return switch


def is_joined(optimizer: Any) -> bool:
    joined = [stack.joined for stack in optimizer._core._stacks() if stack.joints]
    assert len(set(joined)) <= 1
    return any(joined)


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize(("cls", "options"), CASES)
def test_joined_and_apart_are_equal_bit_for_bit(
    cls: type[torch.optim.Optimizer], options: dict[str, Any], apart: Callable[[bool], None]
) -> None:
    runs = []
    for off in (False, True):
        apart(off)
        params = points()
        optimizer = wrapped(params, cls, options)
        train(params, optimizer, range(5))
        assert is_joined(optimizer) is not off
        runs.append((params, optimizer.state_dict()))
    if options.get("fused"):  # its kernel rounds the last few entries of a tensor otherwise than the rest
        torch.testing.assert_close(*(run[0] for run in runs), rtol=1e-5, atol=1e-6)
    else:
        assert same(*runs)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_a_run_may_change_between_both_at_any_step(
    cls: type[torch.optim.Optimizer], apart: Callable[[bool], None]
) -> None:
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    whole, parts = points(), points()
    train(whole, wrapped(whole, cls, options), range(6))
    optimizer = wrapped(parts, cls, options)
    for k in range(6):
        apart(k % 2 == 0)
        train(parts, optimizer, range(k, k + 1))
    assert same(whole, parts)


@pytest.mark.parametrize("how", ["save", "deepcopy", "state_dict"])
def test_saved_copied_and_loaded_state_goes_on_joined(how: str) -> None:
    params = points()
    optimizer = wrapped(params, torch.optim.AdamW, {})
    train(params, optimizer, range(3))
    if how == "deepcopy":
        params_too, optimizer_too = copy.deepcopy((params, optimizer))
    else:
        params_too = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
        optimizer_too = wrapped(params_too, torch.optim.AdamW, {})
        state = copy.deepcopy(optimizer.state_dict())
        if how == "save":
            file = io.BytesIO()
            torch.save(state, file)
            # As large as separate tensors: views of one memory are stored once.
            assert (
                file.tell() < 2 * sum(t.nbytes for p in params for t in optimizer.state[p].values()) + 2**15
            )
            file.seek(0)
            state = torch.load(file)
        optimizer_too.load_state_dict(state)
    train(params, optimizer, range(3, 6))
    train(params_too, optimizer_too, range(3, 6))
    assert is_joined(optimizer_too)
    assert same(params, params_too)


def test_a_parameter_that_sits_out_keeps_its_own_state(apart: Callable[[bool], None]) -> None:
    runs = []
    for off in (False, True):
        apart(off)
        params = points()
        optimizer = wrapped(params, torch.optim.AdamW, {})
        train(params, optimizer, range(2))
        train(params, optimizer, range(2, 4), without=1)
        train(params, optimizer, range(4, 6))
        # Its step count is not that of its neighbours now: they have no state in common.
        assert not is_joined(optimizer)
        assert [optimizer.state[p]["step"].item() for p in params[:3]] == [6, 4, 6]
        runs.append((params, optimizer.state_dict()))
    assert same(*runs)


@pytest.mark.parametrize("what", ["pre-hook", "post-hook", "patched step", "subclass", "skip"])
def test_who_may_look_at_parameters_sees_each(what: str) -> None:
    class Own(torch.optim.AdamW):
        pass

    params = points()
    optimizer = wrapped(params, Own if what == "subclass" else torch.optim.AdamW, {})
    inner, seen = optimizer.optimizer, []  # type: Any, list[bool]

    def look(*_: Any) -> None:
        seen.append(inner.param_groups[0]["params"][0] is params[0])

    if what == "pre-hook":
        inner.register_step_pre_hook(look)
    elif what == "post-hook":
        inner.register_step_post_hook(look)
    elif what == "patched step":
        step = inner.step

        def looked(*args: Any) -> None:
            look()
            step(*args)

        inner.step = looked
    elif what == "skip":
        optimizer = RiemannianWrapper(inner, nonfinite="skip")
    train(params, optimizer, range(2))
    assert not is_joined(optimizer)
    assert all(seen)
    assert len(seen) == (0 if what in ("subclass", "skip") else 2)


def test_a_scheduler_of_the_inner_optimizer_does_not_keep_them_apart() -> None:
    params = points()
    optimizer = wrapped(params, torch.optim.AdamW, {})
    schedule = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1)
    train(params, optimizer, range(2))
    schedule.step()
    assert is_joined(optimizer)


def test_an_inner_step_that_raises_leaves_groups_points_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = points()
    optimizer = wrapped(params, torch.optim.AdamW, {})
    train(params, optimizer, range(2))
    before = [p.detach().clone() for p in params]
    lists = [group["params"] for group in optimizer.param_groups]

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(adam, "_single_tensor_adam", fail)
        for p in params:
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match="no"):
            optimizer.step()
    assert all(a["params"] is b for a, b in zip(optimizer.param_groups, lists, strict=True))
    assert same(before, [p.detach() for p in params])
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in params if p.grad is not None)
    assert set(optimizer.state) == set(params)
    train(params, optimizer, range(2, 3))
    assert is_joined(optimizer)


def test_the_inner_optimizer_makes_as_few_calls_as_there_are_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    own = adam._single_tensor_adam

    def count(params: list[Tensor], *args: Any, **kwargs: Any) -> None:
        seen.append(len(params))
        own(params, *args, **kwargs)

    monkeypatch.setattr(adam, "_single_tensor_adam", count)
    params = [nn.Parameter(Stiefel().random_point(16, 4)) for _ in range(50)]
    optimizer = RiemannianWrapper(torch.optim.AdamW([{"params": params, "manifold": Stiefel()}]))
    train(params, optimizer, range(2))
    assert seen == [1, 1]


def test_gradients_do_not_outlive_the_step() -> None:
    params = points()
    optimizer = wrapped(params, torch.optim.AdamW, {})
    train(params, optimizer, range(2))
    grads = [weakref.ref(p.grad) for p in params if p.grad is not None]
    optimizer.zero_grad()
    assert len(grads) == len(params)
    assert not any(grad() is not None for grad in grads)


def test_pieces_that_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several to a stack, their state one block all the same, so that carrying it gathers nothing."""
    runs = []
    for size in (2**18, 200):
        monkeypatch.setattr(joint, "PIECE_BYTES", size)
        params = points()
        optimizer = wrapped(params, torch.optim.AdamW, {"amsgrad": True})
        train(params, optimizer, range(2))
        # As from a file that holds every tensor by itself: they move once, all of a stack together.
        for state in optimizer.state.values():
            state.update(
                {name: value.clone(memory_format=torch.preserve_format) for name, value in state.items()}
            )
        train(params, optimizer, range(2, 5))
        ranked = params[6:15:3]
        runs.append((params, optimizer.state_dict()))
        assert is_joined(optimizer)
        assert len({optimizer.state[p]["exp_avg"].untyped_storage().data_ptr() for p in ranked}) == 1
    pieces = [len(j.wholes) for stack in optimizer._core._stacks() for j in stack.joints]
    assert max(pieces) > 1
    assert same(*runs)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(("cls", "options"), CASES)
def test_a_large_parameter_is_stepped_in_pieces(
    cls: type[torch.optim.Optimizer],
    options: dict[str, Any],
    flipped: bool,
    apart: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same numbers and the same state, whether it lies by rows or by columns, and from a checkpoint too."""
    monkeypatch.setattr(joint, "PIECE_BYTES", 256 // torch.get_num_threads())
    start = Stiefel().random_point(40, 20, generator=torch.Generator().manual_seed(0))
    runs = []
    for off in (False, True):
        apart(off)
        params = [nn.Parameter(start.mT.contiguous().mT.clone() if flipped else start.clone())]
        optimizer = wrapped_alone(params, cls, options)
        train(params, optimizer, range(3))
        state = copy.deepcopy(optimizer.state_dict())
        optimizer = wrapped_alone(params, cls, options)
        optimizer.load_state_dict(state)
        train(params, optimizer, range(3, 5))
        assert is_joined(optimizer) is not off
        pieces = [len(j.wholes) for stack in optimizer._core._stacks() for j in stack.joints]
        assert pieces == [13]
        runs.append((params, optimizer.state_dict()))
    if options.get("fused"):
        torch.testing.assert_close(*(run[0] for run in runs), rtol=1e-5, atol=1e-6)
    else:
        assert same(*runs)


def test_a_step_that_fails_between_pieces_leaves_no_half_of_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "PIECE_BYTES", 256 // torch.get_num_threads())
    params = [nn.Parameter(Stiefel().random_point(40, 20))]
    optimizer = wrapped_alone(params, torch.optim.SGD, {"momentum": 0.9})
    before = params[0].detach().clone()
    inner = sgd.sgd

    def fail(pieces: list[Tensor], *args: Any, **kwargs: Any) -> None:
        inner(pieces[:3], *(a[:3] for a in args), **kwargs)
        optimizer.state[pieces[0]]["momentum_buffer"] = torch.ones_like(pieces[0])
        raise RuntimeError("no")

    params[0].grad = torch.ones_like(params[0])
    with monkeypatch.context() as patch:
        patch.setattr(sgd, "sgd", fail)
        with pytest.raises(RuntimeError, match="no"):
            optimizer.step()
    assert torch.equal(params[0], before)
    assert set(optimizer.state) <= set(params)
    assert "momentum_buffer" not in optimizer.state.get(params[0], {})
    train(params, optimizer, range(2))
    assert is_joined(optimizer)
    assert optimizer.state[params[0]]["momentum_buffer"].shape == params[0].shape


def test_state_that_somebody_else_holds_a_view_of_stays_where_it_is() -> None:
    flat = torch.randn(3, 4, 5)
    shared = [flat[2], flat[0]]
    block = Block()
    assert block.of(shared, lambda: torch.empty(2, 4, 5)) is None
    assert shared[0].data_ptr() == flat[2].data_ptr()
    own = [torch.randn(4, 5) for _ in range(2)]
    values = [t.clone() for t in own]
    whole = block.of(own, lambda: torch.empty(2, 4, 5))
    assert whole is not None
    assert same([list(whole), own], [values, values])
    whole += 1
    assert same(own, [v + 1 for v in values])
    block.dissolve()
    whole += 1
    assert same(own, [v + 1 for v in values])


def squares(cls: Any = torch.optim.AdamW, **options: Any) -> tuple[list[nn.Parameter], Any]:
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(Stiefel().random_point(4, 4, generator=g)) for _ in range(3)]
    return params, wrapped_alone(params, cls, options)


@pytest.mark.parametrize("how", ["t_", "data", "copy_"])
def test_a_moment_transposed_where_it_lies_is_seen(how: str, apart: Callable[[bool], None]) -> None:
    runs = []
    for off in (False, True):
        apart(off)
        params, optimizer = squares(torch.optim.SGD, momentum=0.9)
        train(params, optimizer, range(2))
        moment = optimizer.state[params[1]]["momentum_buffer"]
        if how == "t_":
            moment.t_()
        elif how == "data":
            moment.data = moment.data.mT
        else:
            moment.copy_(moment.mT.clone())
        train(params, optimizer, range(2, 4))
        runs.append(params)
    assert same(*runs)


def test_moments_in_memory_shared_with_other_processes_stay_there() -> None:
    params, optimizer = squares()
    seen = {}
    for k in range(4):
        if k in (1, 3):  # made by the optimizer, then moved by us
            optimizer.state[params[0]]["exp_avg"].share_memory_()
            seen = {p: optimizer.state[p]["exp_avg"].view(-1) for p in params[:1]}
        train(params, optimizer, range(k, k + 1), without=2 if k == 3 else None)
        for p, view in seen.items():
            assert optimizer.state[p]["exp_avg"].is_shared()
            assert torch.equal(view.view(4, 4), optimizer.state[p]["exp_avg"])


@pytest.mark.parametrize("what", ["moments moved", "stacks made anew"])
def test_a_step_in_inference_mode_leaves_memory_that_later_steps_can_write_to(what: str) -> None:
    params, optimizer = squares()
    at = 1 if what == "moments moved" else 3
    for k in range(6):
        with torch.inference_mode(k == at):
            train(params, optimizer, range(k, k + 1), without=0 if k == 3 else None)
    optimizer.optimizer.register_step_pre_hook(lambda *_: None)  # now each by itself
    train(params, optimizer, range(6, 8))
    assert max(optimizer.residuals().values()) < 1e-5


@pytest.mark.parametrize("mine", [lambda: np.zeros(3), lambda: [torch.zeros(2)], lambda: {"a": 1}])
def test_state_of_the_users_that_is_no_plain_value_stays_each_parameters_own(mine: Callable[[], Any]) -> None:
    params, optimizer = squares()
    train(params, optimizer, range(1))
    own = [mine() for _ in params]
    for p, value in zip(params, own, strict=True):
        optimizer.state[p]["mine"] = value
    train(params, optimizer, range(1, 3))
    assert all(optimizer.state[p]["mine"] is value for p, value in zip(params, own, strict=True))


def test_a_stack_whose_moment_is_replaced_is_joined_again() -> None:
    params, optimizer = squares()
    train(params, optimizer, range(2))
    optimizer.state[params[1]]["exp_avg"] = torch.zeros_like(params[1])
    train(params, optimizer, range(2, 4))
    assert is_joined(optimizer)


def changed_groups(params: list[nn.Parameter], how: str, optimizer: Any, extra: nn.Parameter) -> None:
    """What a user may do to the groups between steps."""
    groups = optimizer.param_groups
    if how == "a group added":
        optimizer.add_param_group({"params": [extra], "lr": 0.5})
    elif how == "a free parameter replaced":
        groups[-1]["params"] = [extra]
    elif how == "a free parameter added":
        groups[-1]["params"].append(extra)
    elif how == "a free group emptied":
        groups[-1]["params"].clear()
    elif how == "groups reordered":
        groups.reverse()
    elif how == "a group removed":
        del groups[1]


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(
    "how",
    [
        *("a group added", "a free parameter replaced", "a free parameter added", "a free group emptied"),
        *("groups reordered", "a group removed"),
    ],
)
def test_groups_may_change_between_steps(cls: type[torch.optim.Optimizer], how: str) -> None:
    """The joined steps are those of parameters kept apart, whose groups the optimizer reads as they are."""
    runs = []
    for apart in (False, True):
        params, extra = points(), nn.Parameter(torch.zeros(3))
        optimizer = wrapped(params, cls, {})
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.01 * (i + 1)
        if apart:
            optimizer.optimizer.register_step_pre_hook(lambda *_: None)
        train([*params, extra], optimizer, range(2))
        assert is_joined(optimizer) != apart
        changed_groups(params, how, optimizer, extra)
        train([*params, extra], optimizer, range(2, 4))
        runs.append([*params, extra])
    assert same(*([p.detach() for p in run] for run in runs))


@pytest.mark.parametrize("fails", [False, True])
def test_half_precision_beside_joined_points_in_one_group(
    fails: bool, apart: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both put others in their place into the group's list, which is as it was after each step."""
    runs = []
    for off in (False, True):
        apart(off)
        dtypes = [torch.float32] * 2 + [torch.bfloat16] * 4
        params = [nn.Parameter(p.detach().to(d)) for p, d in zip(points(), dtypes, strict=False)]
        optimizer = wrapped_alone(params, torch.optim.AdamW, {})
        found = optimizer.param_groups[0]["params"]
        train(params, optimizer, range(2))
        assert is_joined(optimizer) is not off
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(adam, "_single_tensor_adam", raise_error)
                with pytest.raises(ArithmeticError):
                    train(params, optimizer, range(2, 3))
        train(params, optimizer, range(3, 5))
        assert optimizer.param_groups[0]["params"] is found
        assert all(p is q for p, q in zip(params, found, strict=True))
        runs.append((params, optimizer.state_dict()))
    assert same(*runs)


def raise_error(*_: Any, **__: Any) -> None:
    raise ArithmeticError
