"""stiefelopt: any torch optimizer on the Stiefel manifold, at nearly the price of its own step."""

from . import errors, layers, manifolds, metrics, projections, retractions, transports
from .errors import ConfigError, NotOnManifoldError, ShapeError, StepError, StiefelOptError, UnknownNameError
from .groups import constrain, param_groups
from .layers import (
    StelLALinear,
    adapt,
    adapter_state_dict,
    export_lora,
    import_lora,
    load_adapter_state_dict,
    merge_adapters,
)
from .manifolds import Stiefel
from .wrapper import RiemannianWrapper, attach

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "NotOnManifoldError",
    "RiemannianWrapper",
    "ShapeError",
    "StelLALinear",
    "StepError",
    "Stiefel",
    "StiefelOptError",
    "UnknownNameError",
    "adapt",
    "adapter_state_dict",
    "attach",
    "constrain",
    "errors",
    "export_lora",
    "import_lora",
    "layers",
    "load_adapter_state_dict",
    "manifolds",
    "merge_adapters",
    "metrics",
    "param_groups",
    "projections",
    "retractions",
    "transports",
]
