"""Optimizers made for manifolds."""

from .block_adam import BlockAdam
from .riemannion import Riemannion

__all__ = ["BlockAdam", "Riemannion"]
