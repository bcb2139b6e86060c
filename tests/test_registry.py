"""Names and specs: unknown ones are refused with the nearest, taken ones stay, and every manifold survives a file."""

from __future__ import annotations

import io
import math
import pickle
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from stiefelopt import (
    Grassmann,
    Oblique,
    RiemannianWrapper,
    SpecialOrthogonal,
    Sphere,
    Stiefel,
    manifolds,
    metrics,
    projections,
    rank_retractions,
    retractions,
    transports,
)
from stiefelopt.errors import ConfigError, StiefelOptError, UnknownNameError
from stiefelopt.manifolds import Manifold, from_spec
from stiefelopt.registry import Registry
from stiefelopt.testing import check_retraction

FAMILIES: dict[str, Any] = {
    "retraction": retractions,
    "metric": metrics,
    "projection": projections,
    "transport": transports,
}
EVERY = [
    Stiefel(metric, retraction, transport, projection)
    for metric in metrics.names()
    for retraction in retractions.names()
    for transport in ("none", *transports.names())
    for projection in ("none", *projections.names())
]


WRONG_FACTS: list[tuple[dict[str, Any], str]] = [
    ({"order": 2}, r"'mine' was given order=2; use a mapping"),
    ({"order": {"canonical": "2"}}, r"order '2' for the metric 'canonical'; use 1, 2 or math.inf"),
    ({"order": {"canonical": 0}}, r"order 0 for"),
    ({"order": {"canonical": math.nan}}, r"order nan for"),
    ({"radius": 0.0}, r"radius=0.0; use a positive number"),
    ({"radius": "far"}, r"radius='far'"),
    ({"radius": math.nan}, r"radius=nan"),
]
EVERY_FAMILY: tuple[Any, ...] = (*FAMILIES.values(), rank_retractions, manifolds)


def plain(x: Tensor, u: Tensor) -> Tensor:
    return x + u


# Names


def test_what_is_promised_is_registered() -> None:
    assert set(retractions.names()) >= {"polar", "qr", "svd", "cayley", "exp", "newton_schulz"}
    assert set(metrics.names()) >= {"canonical", "euclidean"}
    assert "projection" in transports.names()
    assert "tangent" in projections.names()
    assert "Stiefel" in manifolds.names()
    assert retractions.get("polar").order == {"euclidean": 2, "canonical": 1}
    assert retractions.get("polar") is retractions.polar


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_name_lists_the_known_ones(family: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown {family} 'nonsense'") as caught:
        Stiefel(**{family: "nonsense"})
    message = str(caught.value)
    assert all(repr(name) in message for name in FAMILIES[family].names())
    assert "register" in message
    assert isinstance(caught.value, (StiefelOptError, LookupError))


@pytest.mark.parametrize(
    ("option", "typo", "nearest"),
    [
        ("retraction", "pollar", "polar"),
        ("retraction", "newton-schulz", "newton_schulz"),
        ("metric", "euclidian", "euclidean"),
        ("transport", "non", "none"),
        ("projection", "tangents", "tangent"),
    ],
)
def test_a_typo_is_told_the_nearest_name(option: str, typo: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError, match=f"Did you mean '{nearest}'?"):
        Stiefel(**{option: typo})


@pytest.mark.parametrize("get", [*(f.get for f in FAMILIES.values()), manifolds.get])
@pytest.mark.parametrize("name", [None, 3, ["polar"], "", "POLAR"])
def test_what_is_no_name_is_unknown(get: Any, name: object) -> None:
    with pytest.raises(UnknownNameError):
        get(name)


@pytest.mark.parametrize("option", ["metric", "transport", "projection"])
def test_only_a_retraction_may_be_a_function(option: str) -> None:
    with pytest.raises(ConfigError, match="registered name is needed"):
        Stiefel(**{option: plain})  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        Stiefel(retraction=3)  # type: ignore[arg-type]


# Registration


@pytest.mark.usefixtures("scratch_registries")
def test_taken_names_are_refused() -> None:
    registers: list[Any] = [
        retractions.register("polar"),
        metrics.register("canonical", inner=lambda q, wu, wv: q.sum()),
        projections.register("none"),
        transports.register("none"),
        transports.register("projection"),
    ]
    for register in registers:
        with pytest.raises(ConfigError, match="is taken"):
            register(plain)
    retractions.register("mine")(plain)
    with pytest.raises(ConfigError, match="'mine' is taken"):
        retractions.register("mine")(plain)


@pytest.mark.usefixtures("scratch_registries")
@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda: retractions.register("mine", form="dense"), "'dense'; use one of"),
        (lambda: retractions.register("mine", equivariance="right"), "'both' or 'left'"),
        (lambda: projections.register("mine", form="dense"), "'gram'"),
        (lambda: transports.register("mine", form="dense"), "'gram'"),
        (lambda: metrics.register("mine", inner=3), "needs inner="),  # type: ignore[arg-type]
        (lambda: retractions.register("")(plain), "non-empty string"),
        (lambda: retractions.register(7)(plain), "non-empty string"),  # type: ignore[arg-type]
        *(
            (partial(family.register, plain), r"got <function plain.*register\('name'\)")
            for family in EVERY_FAMILY
        ),
        (lambda: metrics.register("mine"), "needs inner="),
        *((partial(retractions.register, "mine", **facts), message) for facts, message in WRONG_FACTS),
    ],
)
def test_a_wrong_registration_says_what_is_right(register: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register()


def test_a_metric_in_an_order_is_one_that_is_registered() -> None:
    """Else its order would never be looked at."""
    for declare in (partial(retractions.register, "mine"), partial(check_retraction, "polar")):
        with pytest.raises(UnknownNameError, match=r"unknown metric 'euclidian'.*mean 'euclidean'"):
            declare(order={"euclidian": 2})
    assert "mine" not in retractions.names()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"order": "second"}, r"order='second'; use a mapping"),
        ({"order": math.nan}, r"order nan"),
        ({"order": {"euclidean": True}}, r"order True"),
        ({"equivariance": "right"}, r"'both' or 'left'"),
        ({"radius": -1.0}, r"radius=-1.0; use a positive number"),
    ],
)
def test_what_is_to_be_checked_is_checked_itself(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_retraction("polar", **facts)


def test_names_keep_the_order_of_registration() -> None:
    registry: Registry[int] = Registry("number", words=("none",))
    for i, name in enumerate(("one", "two", "three")):
        assert registry.add(name, i) == i
    assert registry.names() == ("one", "two", "three")
    assert registry.get("two") == 1
    with pytest.raises(UnknownNameError, match="known: 'one', 'two', 'three', 'none'"):
        registry.get("none")


# Specs


def through_file(value: object) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "m", EVERY, ids=lambda m: "-".join((m.metric, m.retraction, m.transport, m.projection))
)
def test_every_manifold_survives_a_file(m: Stiefel) -> None:
    spec = m.spec()
    assert spec["manifold"] == "Stiefel"
    assert all(type(value) is str for value in spec.values())
    for copy in (from_spec(spec), from_spec(through_file(spec)), from_spec(m)):
        assert copy == m
        assert hash(copy) == hash(m)
    assert eval(repr(m)) == m


def test_specs_may_leave_out_defaults() -> None:
    assert from_spec({"manifold": "Stiefel"}) == Stiefel()
    assert from_spec({"manifold": "Stiefel", "retraction": "qr"}) == Stiefel(retraction="qr")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({}, ConfigError, "key 'manifold'"),
        ("Stiefel", ConfigError, "key 'manifold'"),
        (None, ConfigError, "key 'manifold'"),
        ({"manifold": "Stieffel"}, UnknownNameError, "Did you mean 'Stiefel'"),
        ({"manifold": "Stiefel", "retraction": "mine"}, UnknownNameError, "unknown retraction 'mine'"),
        ({"manifold": "Stiefel", "colour": "red"}, ConfigError, "does not fit Stiefel"),
        ({"manifold": "Stiefel", "metric": 3}, ConfigError, "registered name"),
    ],
)
def test_a_wrong_spec_says_why(spec: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_spec(spec)


def test_replace() -> None:
    m = Stiefel("euclidean")
    assert m.replace(retraction="qr") == Stiefel("euclidean", "qr")
    assert m == Stiefel("euclidean")
    with pytest.raises(ConfigError, match="has no option 'retractions'; it has: metric, retraction"):
        m.replace(retractions="qr")
    with pytest.raises(UnknownNameError):
        m.replace(retraction="nonsense")


def test_manifolds_are_frozen_values() -> None:
    m = Stiefel()
    with pytest.raises(AttributeError):
        m.metric = "euclidean"  # type: ignore[misc]
    assert len({m, Stiefel(), Stiefel("euclidean"), m.replace(retraction="qr")}) == 3
    assert isinstance(m, Manifold)
    assert (
        repr(m) == "Stiefel(metric='canonical', retraction='polar', transport='none', projection='tangent')"
    )


# Plain functions


def householder(x: Tensor, u: Tensor) -> Tensor:
    q, r = torch.linalg.qr(x + u)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def test_a_plain_function_is_live_but_not_saved() -> None:
    m = Stiefel(retraction=householder)
    x = m.random_point(6, 2)
    assert m.residual(m.retract(x, m.random_tangent(x))) < 1e-6
    assert hash(m) == hash(Stiefel(retraction=householder))
    with pytest.raises(ConfigError, match=r"@stiefelopt\.retractions\.register"):
        m.spec()


@pytest.mark.usefixtures("scratch_registries")
@pytest.mark.parametrize("kind", [Stiefel, Grassmann, SpecialOrthogonal, Sphere, Oblique])
def test_a_registered_part_is_its_name(kind: Any) -> None:
    own = retractions.register("mine", form="ambient")(plain)
    for name in retractions.names():
        m = kind(retraction=retractions.get(name))
        assert m == kind(retraction=name)
        assert m.spec()["retraction"] == name
    changed = replace(own, radius=0.5)  # the name does not mean this one
    with pytest.raises(ConfigError, match="register"):
        kind(retraction=changed).spec()


@pytest.mark.usefixtures("scratch_registries")
def test_retractions_are_pickled() -> None:
    """By name where that means the very part; by what they hold where not."""
    retractions.register("mine", form="ambient")(plain)
    for name in retractions.names():
        part = retractions.get(name)
        assert pickle.loads(pickle.dumps(part)) is part
        assert deepcopy(part) is part
    changed = replace(retractions.get("mine"), radius=0.5)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(changed, protocol))
        assert back == changed
        assert back is not changed


def test_a_retraction_that_cannot_be_hashed_is_refused() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, x: Tensor, u: Tensor) -> Tensor:
            return plain(x, u)

    for kind in (Stiefel, Grassmann, SpecialOrthogonal, Sphere, Oblique):
        with pytest.raises(ConfigError, match=rf"{kind.__name__}\(retraction=.*cannot be hashed.*__hash__"):
            kind(retraction=Unhashable())


def test_the_state_of_a_wrapper_with_a_plain_function_is_refused() -> None:
    m = Stiefel(retraction=householder)
    p = torch.nn.Parameter(m.random_point(6, 2))
    optimizer = RiemannianWrapper(torch.optim.SGD([p], lr=0.1), m)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert m.residual(p.detach()) < 1e-6
    with pytest.raises(ConfigError, match="register"):
        optimizer.state_dict()
