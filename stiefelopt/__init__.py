"""stiefelopt: any torch optimizer on the Stiefel manifold or at fixed rank, at nearly the price of its own step."""

from . import (
    errors,
    layers,
    manifolds,
    metrics,
    optim,
    projections,
    rank_retractions,
    retractions,
    transports,
)
from .errors import ConfigError, NotOnManifoldError, ShapeError, StepError, StiefelOptError, UnknownNameError
from .groups import constrain, param_groups
from .layers import (
    RiemannLoRALinear,
    StelLALinear,
    adapt,
    adapter_state_dict,
    disable_adapters,
    export_lora,
    import_lora,
    load_adapter_state_dict,
    loi_init,
    merge_adapters,
)
from .manifolds import (
    AB,
    USV,
    FixedRank,
    FixedRankPair,
    Grassmann,
    Oblique,
    SpecialOrthogonal,
    Sphere,
    Stiefel,
)
from .optim import BlockAdam, Riemannion
from .wrapper import RiemannianWrapper, attach

__version__ = "0.1.0"

__all__ = [
    "AB",
    "USV",
    "BlockAdam",
    "ConfigError",
    "FixedRank",
    "FixedRankPair",
    "Grassmann",
    "NotOnManifoldError",
    "Oblique",
    "RiemannLoRALinear",
    "RiemannianWrapper",
    "Riemannion",
    "ShapeError",
    "SpecialOrthogonal",
    "Sphere",
    "StelLALinear",
    "StepError",
    "Stiefel",
    "StiefelOptError",
    "UnknownNameError",
    "adapt",
    "adapter_state_dict",
    "attach",
    "constrain",
    "disable_adapters",
    "errors",
    "export_lora",
    "import_lora",
    "layers",
    "load_adapter_state_dict",
    "loi_init",
    "manifolds",
    "merge_adapters",
    "metrics",
    "optim",
    "param_groups",
    "projections",
    "rank_retractions",
    "retractions",
    "transports",
]
