"""The laws of fixed rank on pairs (A, B): those of `rank_laws` that do not speak of U, S and V, and three more.

What they compare with is computed here, densely and in float64: the bases U, V from SVDs of the factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import StiefelOptError
from .laws import HUGE, Broken, Law, at_most, holds, law_at, matrix_norms
from .manifolds import AB, FixedRankPair
from .rank_laws import (
    SAFE,
    RankCase,
    cast,
    constraint_error,
    drawn,
    draws_unit_tangents,
    factor_gradients,
    law_rank_dense,
    law_rank_dtype,
    law_rank_gradient,
    law_rank_huge,
    law_rank_metric,
    law_rank_nearest,
    law_rank_order,
    law_rank_project_point,
    law_rank_project_tangent,
    law_rank_pure,
    law_rank_retraction,
    law_rank_spec,
    law_rank_stack,
    law_rank_transport,
    law_rank_zero_step,
    matrix_of,
    normal_part,
    off_span,
    tangent_matrix,
    tangent_part,
)


@dataclass(frozen=True)
class PairCase(RankCase):
    """A `RankCase` of pairs, whose factors are neither balanced nor orthogonal."""

    def mixing(self, key: int) -> Tensor:
        """Invertible matrices (*b, r, r), singular values in [1/2, 2]."""
        r = self.sizes[-1]
        a, b = (torch.linalg.qr(self.normal(key + k, r, r))[0] for k in (0, 1))
        return a * 2 ** torch.tanh(self.normal(key + 2, r))[..., None, :] @ b

    def point(self, key: int = 0) -> AB:  # type: ignore[override]
        """A point whose W has its singular values in [1/2, 3/2]."""
        x = RankCase(self.shape, torch.float64, self.scale, self.seed).point(key)
        t = self.mixing(key + 70)
        return cast(AB(torch.linalg.solve(t, x.V.mT), x.U @ x.S @ t), self.dtype)

    def weak_point(self) -> AB:  # type: ignore[override]
        """A point whose W has a condition number of about 1e3."""
        x = self.point()
        return x._replace(B=(x.B.double() @ self.weak()).to(self.dtype))

    def ambient(self, key: int = 10) -> AB:  # type: ignore[override]
        """Coordinates (Y^T, X), not tangent, of norm ``scale`` together."""
        m, n, r = self.sizes
        return self._scaled(AB(self.normal(key, r, n), self.normal(key + 1, m, r)))

    def tangent(self, x: AB, key: int = 30, columns: Tensor | None = None) -> AB:  # type: ignore[override]
        """A tangent vector of norm ``scale``; ``columns`` (r x r) makes X and Y deficient."""
        z, v = cast(self.ambient(key), torch.float64), _bases(x)[1]
        k = torch.eye(x.A.shape[-2], dtype=torch.float64) if columns is None else columns
        return self._scaled(AB((off_span(v, off_span(v, z.A.mT)) @ k).mT, z.B @ k))

    def deficient(self, x: AB) -> dict[str, AB]:  # type: ignore[override]
        """Tangent vectors with zero or dependent columns, or with one part alone."""
        r = self.sizes[-1]
        u = self.tangent(x)
        return {
            "equal columns": self.tangent(x, 31, torch.ones(r, r, dtype=torch.float64) / r),
            "a zero column": self.tangent(x, 32, torch.diag((torch.arange(r) > 0).double())),
            "only X": u._replace(A=torch.zeros_like(u.A)),
            "only Y": u._replace(B=torch.zeros_like(u.B)),
        }

    def _scaled(self, z: AB) -> AB:
        size = (
            torch.stack([t.square().sum((-2, -1), keepdim=True) for t in z]).sum(0).sqrt().clamp_min(1e-300)
        )
        return cast(AB(*(t * (self.scale / size) for t in z)), self.dtype)


law = law_at(PairCase)


def _bases(x: AB) -> tuple[Tensor, Tensor]:
    """U and V: the polar factors of B and A^T."""
    found = []
    for t in (x.B.double(), x.A.double().mT):
        u, s, vh = torch.linalg.svd(t, full_matrices=False)
        found.append((u * (s > 1e-7 * s[..., :1])[..., None, :]) @ vh)
    return found[0], found[1]


@matrix_of.register
def _(x: AB) -> Tensor:
    return x.B.double() @ x.A.double()


@tangent_matrix.register
def _(x: AB, u: AB) -> Tensor:
    left, right = _bases(x)
    return u.B.double() @ right.mT + left @ u.A.double()


@tangent_part.register
def _(x: AB, z: Tensor) -> Tensor:
    u, v = _bases(x)
    left = z - u @ (u.mT @ z)
    return z - (left - left @ v @ v.mT)


@constraint_error.register
def _(x: AB) -> Tensor:
    return x.A.new_zeros(*x.A.shape[:-2], 1, 1)


@normal_part.register
def _(x: AB, u: AB) -> Tensor:
    return u.A.double() @ _bases(x)[1]


@factor_gradients.register
def _(x: AB, z: Tensor) -> AB:
    return AB(x.B.mT @ z, z @ x.A.mT)


@law
def law_pair_membership(m: FixedRankPair, case: PairCase) -> None:
    """Any two finite factors are a point; ``random_point`` is a balanced one of full rank."""
    rows, columns, r = case.sizes
    x, batch = drawn(m, case), case.shape[:-3]
    holds("random_point has the shapes asked for", x.A.shape == (*batch, r, columns))
    holds("random_point has the shapes asked for", x.B.shape == (*batch, rows, r))
    a, b = (cast(x, torch.float64).A, cast(x, torch.float64).B)
    at_most("random_point is balanced", a @ a.mT - b.mT @ b, case.tolerance(4))
    for point in (x, case.point(), AB(x.A, torch.zeros_like(x.B))):
        m.check(point)
        at_most("every point has residual 0", m.residual(point), 0.0)
    draws_unit_tangents(m, case, x)
    if x.A.numel():
        try:
            m.check(x._replace(B=x.B * math.nan))
        except StiefelOptError:
            return
        raise Broken("check refuses what is not a point: it accepted NaN in B")


@law
def law_pair_split(m: FixedRankPair, case: PairCase) -> None:
    """B -> B t, A -> t^-1 A changes no W+ and no gradient; A A^T is kept where A is not too small for B."""
    x, t, z = case.point(), case.mixing(90), case.dense()
    other = cast(AB(torch.linalg.solve(t, x.A.double()), x.B.double() @ t), case.dtype)
    bound = case.tolerance(20 * (1 + case.scale) ** 2)
    found = []
    for point in (x, other):
        g = cast(factor_gradients(cast(point, torch.float64), z.double()), case.dtype)
        u = m.gradient(point, g)
        y = m.retract(point, AB(*(-t for t in u)))
        found.append((tangent_matrix(point, u), matrix_of(y)))
        if case.scale <= SAFE:
            kept = y.A.double() @ y.A.double().mT - point.A.double() @ point.A.double().mT
            at_most("A A^T is kept", kept, case.tolerance(20))
    at_most("the same gradient", found[0][0] - found[1][0], bound)
    at_most("the same matrix", found[0][1] - found[1][1], bound)


@law
def law_pair_singular(m: FixedRankPair, case: PairCase) -> None:
    """At singular factors, B = 0 above all: finite, the best matrix of rank r, and the rows of A that count stay."""
    r, z = case.sizes[-1], case.dense()
    x = case.point()
    short = torch.diag((torch.arange(r) > 0).to(case.dtype))
    points = {
        "B = 0": AB(x.A, torch.zeros_like(x.B)),
        "A = 0": AB(torch.zeros_like(x.A), x.B),
        "a zero column of B": AB(x.A, x.B @ short),
        "a zero row of A": AB(short @ x.A, x.B),
    }
    for name, point in points.items():
        u = m.project_dense(point, z)
        at_most(
            f"the projection ({name})",
            tangent_matrix(point, u) - tangent_part(point, z.double()),
            case.tolerance(20 * case.scale),
        )
        y = m.retract(point, u)
        holds(f"it is finite ({name})", all(bool(torch.isfinite(t).all()) for t in y))
        goal = matrix_of(point) + tangent_matrix(point, u)
        values = torch.linalg.svdvals(goal)
        best = values[..., r:].square().sum(-1).sqrt()
        distance = matrix_norms(goal - matrix_of(y))[..., 0, 0]
        at_most(f"nearest ({name})", distance - best, case.tolerance(20 * (1 + case.scale)))
        if name in ("B = 0", "a zero column of B") and case.scale <= SAFE:
            kept = y.A.double() @ y.A.double().mT - point.A.double() @ point.A.double().mT
            at_most(f"A A^T is kept ({name})", kept, case.tolerance(20))
        far = AB(*(t * (HUGE / max(case.scale, 1e-6)) for t in u))
        holds(
            f"no NaN after a huge step ({name})",
            not any(bool(t.isnan().any()) for t in m.retract(point, far)),
        )


PAIR_LAWS: tuple[Law, ...] = (
    law_pair_membership,
    law_pair_split,
    law_pair_singular,
    law_rank_project_point,
    law_rank_project_tangent,
    law_rank_dense,
    law_rank_gradient,
    law_rank_metric,
    law_rank_transport,
    law_rank_spec,
    law_rank_retraction,
    law_rank_nearest,
    law_rank_zero_step,
    law_rank_order,
    law_rank_huge,
    law_rank_stack,
    law_rank_dtype,
    law_rank_pure,
)
