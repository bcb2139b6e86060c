"""The error hierarchy: every message says what was given, what is needed and the way out."""


class StiefelOptError(Exception):
    """Base of every error that stiefelopt raises on purpose."""


class ShapeError(StiefelOptError, ValueError):
    """A tensor's shape, dtype or device does not fit."""


class NotOnManifoldError(StiefelOptError, ValueError):
    """A tensor that must be a point of a manifold is not one."""


class UnknownNameError(StiefelOptError, LookupError):
    """A name that no registry holds."""


class ConfigError(StiefelOptError, ValueError, TypeError):
    """A combination of options that cannot work."""


class StepError(StiefelOptError, RuntimeError):
    """An optimizer step or a retraction that could not be carried out."""
