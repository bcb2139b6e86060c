"""The manifolds."""

from .base import Manifold, from_spec, get, names, register
from .carried import carried, may_carry
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
    "carried",
    "from_spec",
    "get",
    "may_carry",
    "names",
    "register",
]
