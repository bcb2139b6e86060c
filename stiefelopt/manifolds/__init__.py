"""The manifolds."""

from .base import Manifold, from_spec, get, names, register
from .stiefel import Stiefel

__all__ = ["Manifold", "Stiefel", "from_spec", "get", "names", "register"]
