"""The manifolds."""

from .base import Manifold, from_spec, get, names, register
from .fixed_rank import USV, FixedRank
from .stiefel import Stiefel

__all__ = ["USV", "FixedRank", "Manifold", "Stiefel", "from_spec", "get", "names", "register"]
