"""Which versions of an export an entry has loaded: by its own policy, and by what is published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trilith.errors import InvalidRequestError
from trilith.serving.published import Published

__all__ = ["Plan", "VersionPolicy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionPolicy:
    """How many versions, or which.

    Attributes:
        keep: The newest so many are loaded.
        only: This one is, and no other; 0: the newest ones.
    """

    keep: int = 1
    only: int = 0

    @classmethod
    def parse(cls, text: str) -> VersionPolicy:
        """From "latest", "keep:N", or the number of a version.

        Raises:
            InvalidRequestError: It is nothing of that.
        """
        kind, _, number = text.rpartition(":")
        if text == "latest":
            return cls()
        if number.isascii() and number.isdecimal() and int(number) > 0:
            if kind == "keep":
                return cls(keep=int(number))
            if not kind and ":" not in text:
                return cls(only=int(number))
        raise InvalidRequestError(
            f"version {text!r} is none of latest, keep:N (the N newest ones, N from 1), and the number of a version"
        )

    def __str__(self) -> str:
        if self.only:
            return str(self.only)
        return "latest" if self.keep == 1 else f"keep:{self.keep}"

    def plan(self, versions: Sequence[int], published: Published) -> Plan:
        """What to load of the versions that a directory has."""
        there = tuple(sorted(set(versions) - set(published.withdrawn), reverse=True))
        pinned = self.only or published.pinned
        return Plan(there=there, keep=self.keep if self.keep > 1 or not pinned else 0, pinned=pinned)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What shall be loaded.

    Attributes:
        there: Versions that may be served, newest first.
        keep: How many of them, those that cannot be loaded not counted.
        pinned: The version that answers, beside them; 0: the newest that is loaded.
    """

    there: tuple[int, ...]
    keep: int
    pinned: int = 0
