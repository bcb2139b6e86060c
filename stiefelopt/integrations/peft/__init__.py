"""StelLA and RiemannLoRA as PEFT methods: importing this module registers them.

    from stiefelopt.integrations.peft import StellaConfig
    model = peft.get_peft_model(model, StellaConfig(r=16, target_modules=["q_proj", "v_proj"]))
    optimizer = RiemannianWrapper(AdamW(stiefelopt.param_groups(model), lr=1e-3))

A process that only loads a saved adapter needs the import too: PEFT finds a method by its name, once registered.
"""

from .checkpoint import peft_parts
from .config import RiemannLoraConfig, StellaConfig
from .layer import RiemannLoraLinear, StellaLinear
from .model import RiemannLoraModel, StellaModel
from .registration import Method, register

__all__ = [
    "RiemannLoraConfig",
    "RiemannLoraLinear",
    "RiemannLoraModel",
    "StellaConfig",
    "StellaLinear",
    "StellaModel",
]

register(Method.STELLA, StellaConfig, StellaModel, peft_parts)
register(Method.RIEMANN_LORA, RiemannLoraConfig, RiemannLoraModel, peft_parts)
