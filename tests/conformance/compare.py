"""Compares what a vector gave with what it expects."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Absent", "Members", "Partial", "differ", "in_order", "mismatch", "plain", "with_absent"]

_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Partial(dict[str, Any]):
    """A result of which only the keys that are expected are compared.

    Attributes:
        order: The keys that a list stands for.
    """

    order: tuple[str, ...] = ()

    def in_order(self, *keys: str) -> Partial:
        """Itself, to be compared with a list of these too."""
        self.order = keys
        return self


class Members(dict[str, Any]):
    """An object of a vector. What it expects, but leaves out, is `Absent`: it is checked on what it has.

    Attributes:
        expecting: Names of members that say what is expected; any other that is left out is a KeyError.
    """

    expecting: frozenset[str] = frozenset()

    def __missing__(self, key: str) -> Any:
        if key in self.expecting:
            return Absent()
        raise KeyError(key)


class Absent(dict[str, Any]):
    """What a vector leaves out: all is right, and there is nothing in it."""

    def __missing__(self, key: str) -> Any:
        return self


def with_absent(value: Any, expecting: frozenset[str]) -> Any:
    """The same, with every object as `Members`."""
    if isinstance(value, dict):
        members = Members({key: with_absent(each, expecting) for key, each in value.items()})
        members.expecting = expecting
        return members
    return [with_absent(each, expecting) for each in value] if isinstance(value, list) else value


def in_order(wanted: Any) -> Any:
    """Sorted, if it is there."""
    return wanted if isinstance(wanted, Absent) else sorted(wanted)


def plain(value: Any) -> Any:
    """Arrays and numpy scalars as lists and numbers."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Partial):
        return Partial({key: plain(each) for key, each in value.items()}).in_order(*value.order)
    if isinstance(value, Absent):
        return value
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value


@dataclass(frozen=True)
class _Tolerance:
    """How far apart numbers may be.

    Attributes:
        integers: Whether it holds between two integers as well, which are equal or not otherwise.
    """

    rel: float = 0.0
    absolute: float = 0.0
    exact: bool = False
    integers: bool = True


_DATA = _Tolerance(rel=1e-6, integers=False)


def mismatch(got: Any, expected: dict[str, Any]) -> str | None:
    """What is wrong with `got`, None if nothing."""
    got = plain(got)
    for bound, wrong in (("min", lambda x: x < expected["min"]), ("max", lambda x: x > expected["max"])):
        if bound in expected and (not _is_number(got) or math.isnan(got) or wrong(got)):
            return f"{got} breaks {bound} {expected[bound]}"
    if "value" not in expected:
        return None
    absolute = expected.get("abs_tol", 1e-12 if "rel_tol" in expected else 0.0)
    tolerance = _Tolerance(expected.get("rel_tol", 0.0), absolute, bool(expected.get("exact")))
    return _differs(got, expected["value"], tolerance)


def differ(what: str, got: Any, wanted: Any) -> list[str]:
    """What is wrong with a value of the data vectors: floats are right within a relative 1e-6, all else exactly."""
    wrong = _differs(plain(got), plain(wanted), _DATA)
    return [f"{what}: {wrong}"[:300]] if wrong else []


def _differs(got: Any, wanted: Any, tolerance: _Tolerance) -> str | None:
    if isinstance(wanted, Absent):
        return None
    if isinstance(wanted, dict):
        if not isinstance(got, dict) or (not isinstance(got, Partial) and got.keys() != wanted.keys()):
            return f"{got} is not {wanted}"
        pairs = [(got.get(key), each) for key, each in wanted.items()]
    elif isinstance(wanted, list):
        if not isinstance(got, list) or len(got) != len(wanted):
            return f"{got} is not {wanted}"
        pairs = list(zip(got, wanted, strict=True))
    else:
        return None if _same(got, wanted, tolerance) else f"{got!r} is not {wanted!r}"
    wrong = (_differs(left, right, tolerance) for left, right in pairs)
    return next((each for each in wrong if each), None)


def _same(got: Any, wanted: Any, tolerance: _Tolerance) -> bool:
    if isinstance(wanted, str) and wanted in _SPECIAL and _is_number(got):
        wanted = _SPECIAL[wanted]
    if isinstance(wanted, bool) or not _is_number(wanted) or not _is_number(got) or isinstance(got, bool):
        return type(got) is type(wanted) and bool(got == wanted)
    if math.isnan(wanted) or math.isinf(wanted):
        return math.isnan(got) if math.isnan(wanted) else got == wanted
    if tolerance.exact or (not tolerance.integers and isinstance(got, int) and isinstance(wanted, int)):
        return bool(got == wanted)
    if tolerance.rel == 0.0 and tolerance.absolute == 0.0:
        return bool(np.float32(got) == np.float32(wanted))
    return bool(abs(got - wanted) <= tolerance.rel * abs(wanted) + tolerance.absolute)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
