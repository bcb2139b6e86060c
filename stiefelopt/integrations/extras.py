"""What an integration stands on, and what to install where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the imports of an extra's package.

    Raises:
        ModuleNotFoundError: it is missing; with the extra's name. One that is there but fails to import says so itself.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        way_out = f"{name} is missing ({error}): pip install 'stiefelopt[{name}]'"
        raise ModuleNotFoundError(way_out, name=error.name) from error
