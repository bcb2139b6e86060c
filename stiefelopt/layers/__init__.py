"""Low-rank adapters with geometry."""

from .adapt import adapt, adapter_state_dict, load_adapter_state_dict, merge_adapters
from .lora import export_lora, import_lora
from .low_rank import LowRankLinear
from .stella import StelLALinear

__all__ = [
    "LowRankLinear",
    "StelLALinear",
    "adapt",
    "adapter_state_dict",
    "export_lora",
    "import_lora",
    "load_adapter_state_dict",
    "merge_adapters",
]
