"""How an optimizer's moments come along to the next point of the fixed-rank manifold.

First moments are tangent vectors, carried by projection. That is a linear map of their entries, so second moments are
carried as the variances of independent entries are: by the squares of its coefficients. Without this Adam is lost: the
projection mixes large entries of the first moment into places where the second one is small, and the step,
m / sqrt(v), grows without bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .gram import Reduce, Tall, combine, grams, mix
from .rank_retractions import Factors


@dataclass
class Turn:
    """From the points x to the points y."""

    x: Factors
    y: Factors
    reduce: Reduce | None = None

    @cached_property
    def overlaps(self) -> list[Tensor]:
        """a = U^T U+ and c = V^T V+."""
        return self.grams(self.x, self.y)

    def grams(self, a: Factors, b: Factors) -> list[Tensor]:
        """The products of the tall factors, summed over the ranks."""
        return grams((a.us, b.us), (a.vs, b.vs), reduce=self.reduce)


def transported(turn: Turn, v: Factors, out: Factors | None = None) -> Factors:
    """The projection at y of v, tangent at x; its tall parts go to out, which may be v.

    With a = U^T U+, b = Up^T U+, c = V^T V+, d = Vp^T V+: M+ = a^T (M c + d) + b^T c,
    Up+ = U (M c + d) + Up c - U+ M+, Vp+ = V (M^T a + b) + Vp a - V+ M+^T.

    Cost: ten tall products.
    """
    x, y = turn.x, turn.y
    a, c = turn.overlaps
    b, d = turn.grams(v, y)
    right, left = v.s @ c + d, v.s.mT @ a + b
    m = a.mT @ right + b.mT @ c
    to_u, to_v = (None, None) if out is None else (out.us, out.vs)
    up = mix((v.us, c), (x.us, right), (y.us, -m), out=to_u)
    return Factors(up, m, mix((v.vs, a), (x.vs, left), (y.vs, -m.mT), out=to_v))


def spread(turn: Turn, v: Factors, out: Factors | None = None) -> Factors:
    """Variances v of the entries of a vector tangent at x, as those of its projection at y; out as in `transported`.

    Squares are entrywise, and Ru = (U+ - U a)^2, Rv = (V+ - V c)^2 is how the factors have turned away from
    themselves: b = v_U^T Ru, d = v_V^T Rv, M+ = (a^2)^T (M c^2 + d) + b^T c^2,
    Up+ = Up c^2 + Ru (M c^2 + d), Vp+ = Vp a^2 + Rv (M^T a^2 + b).

    Cost: eight tall products after `transported`.
    """
    x, y = turn.x, turn.y
    a, c = turn.overlaps
    ru, rv = _turned(x.us, y.us, a), _turned(x.vs, y.vs, c)
    a, c = a.square(), c.square()
    b, d = grams((v.us, ru), (v.vs, rv), reduce=turn.reduce)
    right, left = v.s @ c + d, v.s.mT @ a + b
    to_u, to_v = (None, None) if out is None else (out.us, out.vs)
    up, vp = mix((v.us, c), (ru, right), out=to_u), mix((v.vs, a), (rv, left), out=to_v)
    return Factors(up, a.mT @ right + b.mT @ c, vp)


def _turned(xs: Tall, ys: Tall, a: Tensor) -> list[Tensor]:
    """(y - x a)^2, entrywise."""
    return [r.square_() for r in combine(ys, xs, a, alpha=-1.0)]
