"""Name -> part. One registry per family; laws, tests and benchmarks enumerate them."""

from __future__ import annotations

import difflib
from typing import Generic, TypeVar

from .errors import ConfigError, UnknownNameError

Part = TypeVar("Part")


class Registry(Generic[Part]):
    """A family of named parts.

    Args:
        family: what one part is called in messages, for example "retraction".
        words: names that options accept but that are no part, for example "none".
    """

    def __init__(self, family: str, words: tuple[str, ...] = ()) -> None:
        self.family = family
        self.words = words
        self._parts: dict[str, Part] = {}

    def add(self, name: str, part: Part) -> Part:
        """Store a part; a taken name is refused, so that nothing changes under a running program."""
        if not isinstance(name, str) or not name:
            raise ConfigError(f"a {self.family} is registered under a non-empty string, got {name!r}.")
        if name in self._parts or name in self.words:
            raise ConfigError(f"the {self.family} name {name!r} is taken; choose another name.")
        self._parts[name] = part
        return part

    def names(self) -> tuple[str, ...]:
        """The registered names, in the order of registration."""
        return tuple(self._parts)

    def get(self, name: str) -> Part:
        """The part of that name; raises UnknownNameError with the nearest known names."""
        try:
            return self._parts[name]
        except (KeyError, TypeError):
            known = (*self._parts, *self.words)
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UnknownNameError(
                f"unknown {self.family} {name!r}; known: {', '.join(map(repr, known))}.{hint} "
                f"Your own is added with register(name)."
            ) from None
