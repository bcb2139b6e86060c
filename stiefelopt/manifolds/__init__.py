"""The manifolds."""

from .base import Manifold, from_spec, get, names, register
from .fixed_rank import USV, FixedRank
from .fixed_rank_pair import AB, FixedRankPair
from .stiefel import Stiefel

__all__ = [
    "AB",
    "USV",
    "FixedRank",
    "FixedRankPair",
    "Manifold",
    "Stiefel",
    "from_spec",
    "get",
    "names",
    "register",
]
