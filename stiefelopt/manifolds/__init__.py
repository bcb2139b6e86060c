"""The manifolds."""

from .base import Manifold, from_spec, get, names, register, spec_or_live
from .carried import awaits_manifold, carried, mark, may_carry
from .fixed_rank import USV, FixedRank
from .fixed_rank_pair import AB, FixedRankPair
from .grassmann import Grassmann
from .special_orthogonal import SpecialOrthogonal
from .sphere import Oblique, Sphere
from .stiefel import Stiefel

__all__ = [
    "AB",
    "USV",
    "FixedRank",
    "FixedRankPair",
    "Grassmann",
    "Manifold",
    "Oblique",
    "SpecialOrthogonal",
    "Sphere",
    "Stiefel",
    "awaits_manifold",
    "carried",
    "from_spec",
    "get",
    "mark",
    "may_carry",
    "names",
    "register",
    "spec_or_live",
]
