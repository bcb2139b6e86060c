"""The one place that reaches into PEFT: what the tuners stand on, and the tables in which methods are registered.

PEFT's own `register_peft_method` insists on a member of the closed enumeration PeftType. Its tables are dictionaries by
that type, and a string enumeration of our own is as good a key, since it equals its name and hashes like it.
"""

from __future__ import annotations

import warnings
from enum import Enum
from typing import Any

from ...errors import ConfigError
from ...layers.lora_parts import READERS, Reader

TESTED = "0.21"  # the PEFT series that the tests have run with
_WAY_OUT = f"stiefelopt's tuners are tested with peft {TESTED}: pip install 'peft=={TESTED}.*'"

try:
    import peft
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGET_MODULES
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key
except ImportError as error:
    raise ImportError(f"peft is missing, or has moved what is needed here ({error}). {_WAY_OUT}") from error

__all__ = [
    "TARGET_MODULES",
    "TESTED",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "LoraConfig",
    "Method",
    "ModulesToSaveWrapper",
    "PeftConfig",
    "PeftModel",
    "check_adapters_to_merge",
    "get_pattern_key",
    "get_peft_model",
    "register",
]


class Method(str, Enum):
    """Our members of PEFT's PeftType: equal to their names and hashed like them."""

    STELLA = "STELLA"
    RIEMANN_LORA = "RIEMANN_LORA"


def register(method: Method, config: type[Any], tuner: type[Any], reader: Reader) -> None:
    """Make a method known to PEFT, and its models to `export_lora`. Registered twice is registered once.

    Raises:
        ConfigError: this PEFT has a method of that name of its own.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(method)
    if known is not None and known.__module__ != config.__module__:
        raise ConfigError(
            f"peft {peft.__version__} has a method {method.value} already ({known.__module__}.{known.__name__}). "
            f"{_WAY_OUT}."
        )
    if not peft.__version__.startswith(f"{TESTED}."):
        warnings.warn(f"This is peft {peft.__version__}; {_WAY_OUT}.", stacklevel=2)
    PEFT_TYPE_TO_CONFIG_MAPPING[method] = config
    PEFT_TYPE_TO_TUNER_MAPPING[method] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[method] = tuner.prefix
    if reader not in READERS:
        READERS.append(reader)
