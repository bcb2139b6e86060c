"""For each law of fixed rank a broken counter-example, which it must refuse by its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stiefelopt import USV, FixedRank, rank_laws, rank_retractions
from stiefelopt.core_svd import Coefficients
from stiefelopt.errors import StepError
from stiefelopt.laws import Law
from stiefelopt.rank_laws import RANK_MANIFOLD_LAWS, RANK_RETRACTION_LAWS, RankCase
from stiefelopt.testing import check_manifold

EXAMPLES: list[tuple[Law, str, Callable[[], FixedRank], str]] = []
good = FixedRank()


def breaks(law: Law, claim: str) -> Callable[[Callable[[], FixedRank]], Callable[[], FixedRank]]:
    """Collect a function that makes a manifold for which the law must refuse the claim."""

    def add(make: Callable[[], FixedRank]) -> Callable[[], FixedRank]:
        EXAMPLES.append((law, claim, make, make.__name__))
        return make

    return add


def broken(retraction: str = "svd", **methods: Callable[..., Any]) -> FixedRank:
    """A FixedRank with some methods replaced."""
    return type("Broken", (FixedRank,), methods)(retraction)


def retracting(f: Callable[[USV, USV], USV]) -> FixedRank:
    return broken(retract=lambda self, x, u: f(x, u))


def times(x: USV, factor: float) -> USV:
    return USV(*(factor * t for t in x))


def is_zero(u: USV) -> bool:
    return all(bool((t == 0).all()) for t in u)


@breaks(rank_laws.law_rank_membership, "residual is max")
def residual_of_one_factor() -> FixedRank:
    return broken(residual=lambda self, x: good.residual(x._replace(V=torch.linalg.qr(x.V)[0])))


@breaks(rank_laws.law_rank_membership, "it accepted a singular S")
def check_that_ignores_s() -> FixedRank:
    def check(self: FixedRank, x: USV) -> None:
        if bool(torch.isfinite(x.S).all()):
            eye = torch.eye(x.S.shape[-1], dtype=x.S.dtype).expand_as(x.S)
            good.check(x._replace(S=eye))
        else:
            good.check(x)

    return broken(check=check)


@breaks(rank_laws.law_rank_project_point, "nearest")
def project_point_to_other_directions() -> FixedRank:
    def project(self: FixedRank, z: Tensor, *, rank: int) -> USV:
        u, s, vh = torch.linalg.svd(z, full_matrices=False)
        last = (*range(rank - 1), s.shape[-1] - 1) if s[rank:].sum() > 1e-9 else tuple(range(rank))
        return USV(u[:, last], torch.diag(s[list(last)]), vh[last, :].mT)

    return broken(project_point=project)


@breaks(rank_laws.law_rank_project_tangent, "the result is tangent")
def projection_of_one_factor() -> FixedRank:
    return broken(project_tangent=lambda self, x, z: good.project_tangent(x, z)._replace(V=z.V))


@breaks(rank_laws.law_rank_project_tangent, "fixes tangent vectors")
def projection_that_forgets_m() -> FixedRank:
    def project(self: FixedRank, x: USV, z: USV) -> USV:
        u = good.project_tangent(x, z)
        return u._replace(S=torch.zeros_like(u.S))

    return broken(project_tangent=project)


@breaks(rank_laws.law_rank_project_tangent, "self-adjoint")
def projection_that_moves_the_normal_part_to_m() -> FixedRank:
    def project(self: FixedRank, x: USV, z: USV) -> USV:
        return good.project_tangent(x, z)._replace(S=z.S + x.U.mT @ z.U)

    return broken(project_tangent=project)


@breaks(rank_laws.law_rank_project_tangent, "project_dense is the orthogonal projection")
def dense_projection_with_m_twice() -> FixedRank:
    def project(self: FixedRank, x: USV, z: Tensor) -> USV:
        u = good.project_dense(x, z)
        return u._replace(S=2 * u.S)

    return broken(project_dense=project)


@breaks(rank_laws.law_rank_project_tangent, "rank is the dimension")
def dimension_of_the_parameters() -> FixedRank:
    return broken(dim=lambda self, m, n, rank: (m + n + rank) * rank)


@breaks(rank_laws.law_rank_project_tangent, "dim counts a batch's points")
def dimension_of_one_point() -> FixedRank:
    return broken(dim=lambda self, *shape, rank: good.dim(*shape[-2:], rank=rank))


@breaks(rank_laws.law_rank_membership, "other seeds draw other points")
def random_point_that_is_always_the_same() -> FixedRank:
    def random_point(
        self: FixedRank, *shape: int, rank: int, dtype: Any = None, generator: Any = None
    ) -> USV:
        return good.random_point(*shape, rank=rank, dtype=dtype, generator=torch.Generator().manual_seed(0))

    return broken(random_point=random_point)


@breaks(rank_laws.law_rank_membership, "equal generators draw equal tangent vectors")
def random_tangent_without_its_generator() -> FixedRank:
    return broken(random_tangent=lambda self, x, generator=None: good.random_tangent(x))


@breaks(rank_laws.law_rank_membership, "other seeds draw other tangent vectors")
def random_tangent_that_is_always_the_same() -> FixedRank:
    def random_tangent(self: FixedRank, x: USV, generator: Any = None) -> USV:
        return good.random_tangent(x, torch.Generator().manual_seed(0))

    return broken(random_tangent=random_tangent)


@breaks(rank_laws.law_rank_dense, "to_dense")
def dense_of_a_transposed_s() -> FixedRank:
    return broken(to_dense=lambda self, x: x.U @ x.S.mT @ x.V.mT)


@breaks(rank_laws.law_rank_dense, "embed")
def embed_with_the_factors_motion() -> FixedRank:
    """Up S V^T + U M V^T + U S Vp^T: the velocity of the product, not the vector that the coordinates mean."""

    def embed(self: FixedRank, x: USV, u: USV) -> Tensor:
        return (x.U @ u.S + u.U @ x.S) @ x.V.mT + x.U @ x.S @ u.V.mT

    return broken(embed=embed)


@breaks(rank_laws.law_rank_gradient, "= <G, v>")
def gradient_that_is_the_projected_factors() -> FixedRank:
    return broken(gradient=lambda self, x, g: good.project_tangent(x, g))


@breaks(rank_laws.law_rank_gradient, "= <G, v>")
def gradient_by_a_transposed_inverse() -> FixedRank:
    def gradient(self: FixedRank, x: USV, g: USV) -> USV:
        inverse = torch.linalg.inv(x.S)
        return good.project_tangent(x, USV(g.U @ inverse, g.S, g.V @ inverse.mT))

    return broken(gradient=gradient)


@breaks(rank_laws.law_rank_metric, "of the dense matrices")
def metric_of_the_factors() -> FixedRank:
    return broken(inner=lambda self, x, u, v: good.inner(x, u, v._replace(U=v.U @ x.S @ x.S.mT)))


@breaks(rank_laws.law_rank_metric, "norm(x, u)^2")
def norm_without_its_root() -> FixedRank:
    return broken(norm=lambda self, x, u: 2 * good.norm(x, u))


@breaks(rank_laws.law_rank_transport, "tangent at y")
def transport_that_does_nothing() -> FixedRank:
    return broken(transport_vector=lambda self, x, u, y, v: times(v, 1.0))


@breaks(rank_laws.law_rank_transport, "the projection of the dense matrix")
def transport_by_coordinates() -> FixedRank:
    """Up and Vp projected and M kept, as if the factors had not turned."""
    return broken(transport_vector=lambda self, x, u, y, v: good.project_tangent(y, v))


@breaks(rank_laws.law_rank_spec, "from_spec")
def spec_that_forgets_the_floor() -> FixedRank:
    m = type("Broken", (FixedRank,), {"spec": lambda self: {"manifold": "FixedRank"}})
    return m(floor=1e-3)


@breaks(rank_laws.law_rank_retraction, "lies on the manifold")
def retraction_that_only_adds() -> FixedRank:
    return retracting(lambda x, u: USV(*(a + b for a, b in zip(x, u, strict=True))))


@breaks(rank_laws.law_rank_retraction, "W + u + O(u^2)")
def retraction_of_each_factor_alone() -> FixedRank:
    """Takes (Up, M, Vp) for the motion of U, S and V."""

    def retract(x: USV, u: USV) -> USV:
        return USV(torch.linalg.qr(x.U + u.U)[0] * -1.0, x.S + u.S, torch.linalg.qr(x.V + u.V)[0] * -1.0)

    return retracting(retract)


@breaks(rank_laws.law_rank_retraction, "it is finite (equal columns)")
def retraction_by_the_inverse_of_a_gram() -> FixedRank:
    def retract(x: USV, u: USV) -> USV:
        y = good.retract(x, u)
        return y._replace(S=y.S + 0 * torch.linalg.inv_ex(u.U.mT @ u.U)[0])

    return retracting(retract)


@breaks(rank_laws.law_rank_nearest, "nearest matrix of rank r (u.V times 1e-14)")
def retraction_that_believes_p_alone() -> FixedRank:
    """One sweep of subspace iteration, whose q is still S^-T where Vp is zero and p is right already."""

    def hasty(c: Tensor, hu: Tensor, hv: Tensor) -> Coefficients:
        p = torch.linalg.inv(c)
        q = 2 * p.mT - p.mT @ (c.mT + hu @ p) @ p.mT
        eye = torch.eye(c.shape[-1], dtype=c.dtype)
        tu, tv = (torch.linalg.inv(torch.linalg.cholesky(eye + h)).mT for h in (p.mT @ hu @ p, q.mT @ hv @ q))
        return Coefficients(tu, p @ tu, tu.mT @ (c + p.mT @ hu + hv @ q) @ tv, tv, q @ tv)

    def retract(x: USV, u: USV) -> USV:
        y = good.retract(x, u)
        if bool((u.V.abs().amax() > 1e-13 * u.U.abs().amax()) | (u.V == 0).all()):
            return y
        au, bu, s, av, bv = hasty(x.S + u.S, u.U.mT @ u.U, u.V.mT @ u.V)
        return USV(x.U @ au + u.U @ bu, s, x.V @ av + u.V @ bv)

    return retracting(retract)


@breaks(rank_laws.law_rank_gauge, "is symmetric")
def gauge_that_diagonalizes_s() -> FixedRank:
    def retract(x: USV, u: USV) -> USV:
        y = good.retract(x, u)
        a, d, bh = torch.linalg.svd(y.S)
        return USV(y.U @ a, torch.diag_embed(d), y.V @ bh.mT)

    return retracting(retract)


@breaks(rank_laws.law_rank_gauge, "is positive")
def gauge_with_the_other_sign() -> FixedRank:
    def retract(x: USV, u: USV) -> USV:
        y = good.retract(x, u)
        return USV(-y.U, y.S, -y.V)

    return retracting(retract)


@breaks(rank_laws.law_rank_zero_step, "bit for bit")
def zero_step_that_rounds() -> FixedRank:
    tiny = 1 + 1e-15

    def retract(x: USV, u: USV) -> USV:
        y = good.retract(x, u)
        return y._replace(S=y.S * tiny)

    return retracting(retract)


@breaks(rank_laws.law_rank_zero_step, "within a batch")
def zero_step_seen_for_the_whole_batch_only() -> FixedRank:
    def retract(x: USV, u: USV) -> USV:
        y = good.retract(x, u)
        return times(x, 1.0) if is_zero(u) else y._replace(S=y.S * (1 + 1e-15))

    return retracting(retract)


@breaks(rank_laws.law_rank_zero_step, "only part is V")
def zero_step_seen_in_two_parts() -> FixedRank:
    def retract(x: USV, u: USV) -> USV:
        still = is_zero(u._replace(V=torch.zeros_like(u.V)))
        return times(x, 1.0) if still else good.retract(x, u)

    return retracting(retract)


@breaks(rank_laws.law_rank_order, "order 2 needs")
def order_of_a_longer_step() -> FixedRank:
    """Off by t^2 in the tangent direction."""

    def retract(x: USV, u: USV) -> USV:
        size = good.norm(x, u)[..., None, None]
        return good.retract(x, USV(*(t * (1 + size) for t in u)))

    return retracting(retract)


@breaks(rank_laws.law_rank_order, "more than the declared order 1")
def order_that_is_declared_too_low() -> FixedRank:
    rank_retractions.register("modest", order=1)(rank_retractions.get("svd").function)
    return FixedRank("modest")


@breaks(rank_laws.law_rank_order, "order 2 needs")
def order_of_a_retraction_without_second_order_terms() -> FixedRank:
    """U + Up S^-1, S + M and V + Vp S^-T, with the old S for c: wrong where M turns it."""

    def careless(c: Tensor, hu: Tensor, hv: Tensor) -> Coefficients:
        au, bu, s, av, bv = rank_retractions.get("orthographic").function(c, hu, hv)
        return Coefficients(au, bu, s + hu @ c, av, bv)

    rank_retractions.register("careless", order=2)(careless)
    return FixedRank("careless")


@breaks(rank_laws.law_rank_huge, "norm 10000")
def huge_step_that_is_silently_wrong() -> FixedRank:
    def retract(x: USV, u: USV) -> USV:
        y = good.retract(x, u)
        long = good.norm(x, u) > 100
        return y._replace(U=torch.where(long[..., None, None], 1.01 * y.U, y.U))

    return retracting(retract)


@breaks(rank_laws.law_rank_loss, "raises StepError: it did not")
def rank_that_is_lost_silently() -> FixedRank:
    def retract(self: FixedRank, x: USV, u: USV) -> USV:
        try:
            return good.retract(x, u)
        except StepError:
            return x._replace(S=x.S + u.S)

    return broken(retract=retract)


@breaks(rank_laws.law_rank_loss, "message names the floor")
def rank_that_is_lost_without_a_way_out() -> FixedRank:
    def retract(self: FixedRank, x: USV, u: USV) -> USV:
        try:
            return good.retract(x, u)
        except StepError:
            raise StepError("singular") from None

    return broken(retract=retract)


@breaks(rank_laws.law_rank_loss, "at least the floor")
def floor_that_is_a_hundredth_of_itself() -> FixedRank:
    def retract(self: FixedRank, x: USV, u: USV) -> USV:
        return good.replace(floor=self.floor / 100).retract(x, u)

    return broken(retract=retract)


@breaks(rank_laws.law_rank_equivariance, "other factors: the same matrix")
def retraction_that_reads_the_diagonal_of_s() -> FixedRank:
    def retract(x: USV, u: USV) -> USV:
        d = torch.diag_embed(x.S.diagonal(dim1=-2, dim2=-1))
        return good.retract(x, u._replace(S=u.S + d * (u.S * u.S).sum((-2, -1), keepdim=True)))

    return retracting(retract)


@breaks(rank_laws.law_rank_equivariance, "rotated: the same matrix")
def retraction_with_a_weight_on_rows() -> FixedRank:
    def retract(x: USV, u: USV) -> USV:
        weight = torch.linspace(0.5, 1.5, x.U.shape[-2], dtype=x.U.dtype)[:, None]
        return good.retract(x, good.project_tangent(x, u._replace(U=u.U * weight)))

    return retracting(retract)


@breaks(rank_laws.law_rank_stack, "stack = loop")
def stack_that_shares_a_norm() -> FixedRank:
    def retract(x: USV, u: USV) -> USV:
        return good.retract(x, u._replace(S=u.S * (1 + u.S.square().sum())))

    return retracting(retract)


@breaks(rank_laws.law_rank_stack, "empty batch")
def stack_that_flattens_an_empty_batch() -> FixedRank:
    def embed(self: FixedRank, x: USV, u: USV) -> Tensor:
        z = good.embed(x, u)
        return z if z.numel() else z.reshape(-1)[:1]

    return broken(embed=embed)


@breaks(rank_laws.law_rank_dtype, "dtype is kept")
def dtype_that_is_lost() -> FixedRank:
    return broken(norm=lambda self, x, u: good.norm(x, u).float())


@breaks(rank_laws.law_rank_dtype, "float32 is near float64")
def dtype_that_is_rounded_inside() -> FixedRank:
    def project(self: FixedRank, x: USV, z: Tensor) -> USV:
        return good.project_dense(x, z.bfloat16().float() if z.dtype == torch.float32 else z)

    return broken(project_dense=project)


@breaks(rank_laws.law_rank_dtype, "half precision is computed in float32")
def half_precision_that_is_not_lifted() -> FixedRank:
    return broken(to_dense=lambda self, x: x.U @ x.S @ x.V.mT)


@breaks(rank_laws.law_rank_pure, "arguments are unchanged")
def step_that_writes_to_its_argument() -> FixedRank:
    return retracting(lambda x, u: good.retract(x, u._replace(S=u.S.mul_(0.5))))


@breaks(rank_laws.law_rank_pure, "new memory")
def projection_that_returns_its_argument() -> FixedRank:
    return broken(project_tangent=lambda self, x, z: good.project_tangent(x, z)._replace(S=z.S))


@breaks(rank_laws.law_rank_drift, "after 5000 steps")
def retraction_that_adds_up_rounding() -> FixedRank:
    """As U+ = U au + Up bu would without the correction."""
    return retracting(lambda x, u: USV(x.U * (1 + 1e-8), x.S, x.V))


SMALL = {
    rank_laws.law_rank_drift: RankCase((7, 5, 2)),
    rank_laws.law_rank_retraction: RankCase(scale=0.05),
}


@pytest.mark.usefixtures("scratch_registries")
@pytest.mark.parametrize(("law", "claim", "make"), [e[:3] for e in EXAMPLES], ids=[e[3] for e in EXAMPLES])
def test_the_law_catches(law: Law, claim: str, make: Callable[[], FixedRank]) -> None:
    with pytest.raises(AssertionError, match=rf"^{law.__name__}: .*{re.escape(claim)}.* at RankCase\(shape="):
        law(make(), SMALL.get(law, RankCase()))


@pytest.mark.parametrize(
    "law",
    [*RANK_MANIFOLD_LAWS, *RANK_RETRACTION_LAWS, rank_laws.law_rank_drift],
    ids=lambda law: law.__name__,
)
def test_every_law_has_a_counter_example_and_holds_for_ours(law: Law) -> None:
    assert any(example[0] is law for example in EXAMPLES)
    if law is not rank_laws.law_rank_drift:
        law(FixedRank(), SMALL.get(law, RankCase()))


def test_check_manifold_names_the_law() -> None:
    with pytest.raises(AssertionError, match=r"^law_rank_gradient"):
        check_manifold(gradient_by_a_transposed_inverse(), shapes=[(5, 4, 2)])


@pytest.mark.usefixtures("scratch_registries")
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda c: (c, c), r"'bad' returned 2 results, and 5 are needed: au, bu, s, av, bv"),
        (
            lambda c: (c, c, c[..., :1], c, c),
            r"'bad' returned \(1, 2, 1\), and \(1, 2, 2\) is needed: it maps c",
        ),
    ],
)
def test_a_retraction_that_returns_another_shape_is_named(
    result: Callable[[Tensor], Any], message: str
) -> None:
    rank_retractions.register("bad")(lambda c, hu, hv: result(c))
    x = FixedRank().random_point(5, 4, rank=2)
    with pytest.raises(StepError, match=message):
        FixedRank("bad").retract(x, FixedRank().random_tangent(x))
