"""Name -> part. One registry per family; laws, tests and benchmarks enumerate them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Generic, TypeVar

from .errors import ConfigError, UnknownNameError

Part = TypeVar("Part")


def unknown(family: str, name: object, known: Sequence[str], way_out: str = "") -> UnknownNameError:
    """The error that says which names there are, and the nearest."""
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(
        f"unknown {family} {name!r}; known: {', '.join(map(repr, known))}.{hint}{way_out}"
    )


def check_word(family: str, word: object, known: Sequence[str]) -> None:
    """Refuse a word that is none of a closed list.

    Raises:
        UnknownNameError: with the known ones and the nearest.
    """
    if word not in known:
        raise unknown(family, word, known)


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
        self.check_name(name)
        if name in self._parts or name in self.words:
            raise ConfigError(f"the {self.family} name {name!r} is taken; choose another name.")
        self._parts[name] = part
        return part

    def check_name(self, name: object) -> None:
        """Refuse what is no name, at once: a decorator without parentheses takes its function for one.

        Raises:
            ConfigError: not a string, or an empty one.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"a {self.family} is registered under a non-empty string, got {name!r}: write @register('name')."
            )

    def names(self) -> tuple[str, ...]:
        """The registered names, in the order of registration."""
        return tuple(self._parts)

    def get(self, name: str) -> Part:
        """The part of that name; raises UnknownNameError with the nearest known names."""
        try:
            return self._parts[name]
        except (KeyError, TypeError):
            way_out = " Your own is added with register(name)."
            raise unknown(self.family, name, (*self._parts, *self.words), way_out) from None
