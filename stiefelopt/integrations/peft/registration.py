"""The one place that touches PEFT's tables.

PEFT's own `register_peft_method` insists on a member of the closed enumeration PeftType. Its tables are dictionaries by
that type, and a string enumeration of our own is as good a key, since it equals its name and hashes like it.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import peft

from ...errors import ConfigError
from ...layers.lora import READERS, Reader
from .config import LowRankConfig
from .model import LowRankModel

TESTED = "0.21"  # the PEFT series that the tests have run with

_TABLES = {
    "PEFT_TYPE_TO_CONFIG_MAPPING": "config",
    "PEFT_TYPE_TO_TUNER_MAPPING": "tuner",
    "PEFT_TYPE_TO_PREFIX_MAPPING": "prefix",
}


def _tables() -> dict[str, dict[Any, Any]]:
    """PEFT's tables by what they hold.

    Raises:
        ConfigError: this PEFT keeps them elsewhere.
    """
    mapping = importlib.import_module("peft.mapping")
    tables = {what: getattr(mapping, name, None) for name, what in _TABLES.items()}
    missing = [name for name, what in _TABLES.items() if not isinstance(tables[what], dict)]
    if missing:
        raise ConfigError(
            f"peft {peft.__version__} has no dictionary peft.mapping.{missing[0]}, where methods are registered; "
            f"stiefelopt's tuners are tested with peft {TESTED}: pip install 'peft=={TESTED}.*'."
        )
    return {what: table for what, table in tables.items() if table is not None}


def register(config: type[LowRankConfig], tuner: type[LowRankModel], reader: Reader) -> None:
    """Make a method known to PEFT, and its models to `export_lora`. Registered twice is registered once.

    Raises:
        ConfigError: this PEFT has other tables, or a method of that name of its own.
    """
    tables = _tables()
    key = config.METHOD
    known = tables["config"].get(key)
    if known is not None and known.__module__ != config.__module__:
        raise ConfigError(
            f"peft {peft.__version__} has a method {key.value} already ({known.__module__}.{known.__name__}); "
            f"stiefelopt's is tested with peft {TESTED}: pip install 'peft=={TESTED}.*'."
        )
    if not peft.__version__.startswith(f"{TESTED}."):
        warnings.warn(
            f"stiefelopt's tuners are tested with peft {TESTED}; this is {peft.__version__}.", stacklevel=2
        )
    tables["config"][key], tables["tuner"][key], tables["prefix"][key] = config, tuner, tuner.prefix
    if reader not in READERS:
        READERS.append(reader)
