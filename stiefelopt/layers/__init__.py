"""Low-rank adapters with geometry."""

from .adapt import adapt, adapter_state_dict, disable_adapters, load_adapter_state_dict, merge_adapters
from .loi import loi_init
from .lora_export import export_lora
from .lora_import import import_lora
from .low_rank import LowRankLinear
from .riemann_lora import RiemannLoRALinear
from .stella import StelLALinear

__all__ = [
    "LowRankLinear",
    "RiemannLoRALinear",
    "StelLALinear",
    "adapt",
    "adapter_state_dict",
    "disable_adapters",
    "export_lora",
    "import_lora",
    "load_adapter_state_dict",
    "loi_init",
    "merge_adapters",
]
