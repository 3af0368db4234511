"""Combiner: how the rows of a bag become one vector, by one name in code, files and messages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

from trilith.errors import InvalidRequestError

__all__ = ["FIRST", "MAX", "MEAN", "SQRTN", "SUM", "Combiner", "CombinerLike", "FirstN", "combiner_of"]

Kind: TypeAlias = Literal["sum", "mean", "sqrtn", "max", "first"]

SUM, MEAN, SQRTN, FIRST, MAX = range(5)
"""What kernels call them; the reference system's messages give sum, mean and first the same numbers."""

_POOLED: tuple[Kind, ...] = ("sum", "mean", "sqrtn", "max")
_CODES = {"sum": SUM, "mean": MEAN, "sqrtn": SQRTN, "first": FIRST, "max": MAX}


@dataclass(frozen=True, slots=True)
class Combiner:
    """How the rows of a bag become one vector; an empty bag gives zeros.

    Attributes:
        kind: "sum"; "mean"; "sqrtn", the sum divided by the square root of the bag's size; "max", of each float the
            largest, whose gradient goes to the row that has it, of several to the first of the bag; or "first", the
            first `n` rows side by side, zeros behind them, the others not looked up.
        n: Rows that "first" keeps; 0 for the others.
    """

    kind: Kind
    n: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _CODES or (self.kind == "first") != (self.n > 0):
            raise InvalidRequestError(
                f"combiner {self.kind!r} with n={self.n} is none of {', '.join(_POOLED)}, first n"
            )

    @property
    def code(self) -> int:
        """SUM, MEAN, SQRTN, FIRST or MAX."""
        return _CODES[self.kind]

    @property
    def adds(self) -> bool:
        """Whether a vector is a sum of the bag's rows, times a factor."""
        return self.code in (SUM, MEAN, SQRTN)

    def shape(self, dim: int) -> tuple[int, ...]:
        """Of what becomes of a bag of rows of `dim` floats."""
        return (self.n, dim) if self.n else (dim,)

    def __str__(self) -> str:
        return f"first({self.n})" if self.n else self.kind


FirstN = partial(Combiner, "first")
"""The combiner that keeps the first n rows: `FirstN(n)`."""

CombinerLike: TypeAlias = Combiner | Kind | str
"""A combiner or its name: "sum", "mean", "sqrtn", "max", "first(n)"."""

_FIRST = re.compile(r"first\((\d+)\)")


def combiner_of(given: CombinerLike) -> Combiner:
    """The combiner of this name; a combiner is itself."""
    if isinstance(given, Combiner):
        return given
    for name in _POOLED:
        if given == name:
            return Combiner(name)
    first = _FIRST.fullmatch(str(given))
    if first is None:
        raise InvalidRequestError(f"combiner {given!r} is none of {', '.join(_POOLED)}, first(n), FirstN(n)")
    return Combiner("first", int(first[1]))
