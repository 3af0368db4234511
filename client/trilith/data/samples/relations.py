"""What a relation such as "between 3 and 5" or "any of 1, 2" says about columns of values."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from trilith.data.formats.streams import open_file
from trilith.data.samples.kernels import count_matches, match_affixes, rank_strings
from trilith.errors import DataError, InvalidRequestError
from trilith.ops.memory import address_of
from trilith.ops.ragged import Ragged
from trilith_proto import example_pb2

__all__ = [
    "OPERATORS",
    "SINGLE",
    "Bits",
    "Domain",
    "Relation",
    "Strings",
    "check_operator",
    "count_distinct",
    "load_operands",
    "relate",
]

BoolArray = npt.NDArray[np.bool_]

_MASK64 = 2**64 - 1

SINGLE = ("gt", "ge", "eq", "lt", "le", "neq")
_MEMBERSHIP = ("in", "not-in")
_AFFIXES = ("startswith", "endswith")
_SETS = ("any", "all", "diff")
OPERATORS = (*SINGLE, "between", *_MEMBERSHIP, *_AFFIXES, *_SETS)


class Domain(StrEnum):
    """The type in which values are compared."""

    INT64 = "int64"
    UINT64 = "uint64"
    FLOAT = "float"
    DOUBLE = "double"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True, eq=False)
class Strings:
    """Byte strings somewhere in a buffer.

    Attributes:
        data: uint8[size], the buffer.
        starts: int64[n], where each string begins.
        sizes: int64[n], bytes of each.
    """

    data: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)


_FLOATS = (Domain.FLOAT, Domain.DOUBLE)


@dataclass(frozen=True, kw_only=True)
class Relation:
    """An operator with its operands.

    Attributes:
        operator: One of `OPERATORS`.
        domain: Of the values and operands. Operands of DOUBLE are float32 numbers, as on the wire.
        operands: Integers, floats or bytes.
    """

    operator: str
    domain: Domain
    operands: tuple[Any, ...]

    @classmethod
    def typed(
        cls,
        field: str,
        operator: str,
        operand: Any,
        domain: Domain,
        *,
        repeated: bool = False,
        float_lists: bool = False,
    ) -> Relation:
        """Check an operand as a user gives it against the type of the field.

        Args:
            field: Name of the field, for messages.
            operator: One of `OPERATORS`.
            operand: A number, a string, or a sequence of them.
            domain: Of the field.
            repeated: Whether the field holds a list; then the operator is any, all or diff.
            float_lists: Whether in and not-in take lists of floats, instead of one.
        """
        check_operator(field, operator, domain, repeated=repeated)
        given = _listed(operand)
        lists = operator == "between" or (operator in _MEMBERSHIP and domain not in _FLOATS)
        single = operator in SINGLE or (operator in _MEMBERSHIP and domain in _FLOATS and not float_lists)
        if given is None:
            text = domain is Domain.BYTES and operator in _MEMBERSHIP
            if lists and not text:
                raise InvalidRequestError(f"operand of {field!r} {operator} is {operand!r}; give a list")
            given = [operand]
        elif single and len(given) != 1:
            raise InvalidRequestError(f"operand of {field!r} {operator} is {operand!r}; give one value")
        elif single and domain is not Domain.BYTES:
            raise InvalidRequestError(f"operand of {field!r} {operator} is {operand!r}; give a number, not a list")
        if operator == "between" and len(given) != 2:
            raise InvalidRequestError(f"operand of {field!r} between is {operand!r}; give [lowest, end]")
        return cls(operator=operator, domain=domain, operands=tuple(_typed(field, each, domain) for each in given))

    # ---- truth -------------------------------------------------------------------------------------------------------

    def of_numbers(self, values: npt.NDArray[Any]) -> BoolArray:
        """bool[n]: which of n numbers satisfy a relation that is not about sets.

        Args:
            values: [n], int64, uint64, float32 or float64 as the domain says.
        """
        found: BoolArray
        if self.operator in _MEMBERSHIP:
            found = self._members(values.astype(np.float32) if self.domain is Domain.DOUBLE else values)
            return found if self.operator == "in" else ~found
        operands = self._numbers
        if self.operator == "between":
            found = (values >= operands[0]) & (values < operands[1])
            return found
        compare = {
            "gt": np.greater,
            "ge": np.greater_equal,
            "eq": np.equal,
            "lt": np.less,
            "le": np.less_equal,
            "neq": np.not_equal,
        }[self.operator]
        found = compare(values, operands[0])
        return found

    def of_strings(self, strings: Strings) -> BoolArray:
        """bool[n]: which of n strings satisfy a relation that is not about sets, compared bytewise."""
        rows = len(strings.starts)
        packed, bounds = self._strings
        starts, sizes = _addressable(strings.starts, np.int64), _addressable(strings.sizes, np.int64)
        equal = np.empty(rows, np.uint8)
        given = (address_of(strings.data), address_of(starts), address_of(sizes), rows)
        wanted = (address_of(packed), address_of(bounds), len(bounds) - 1)
        if self.operator in _AFFIXES:
            match_affixes(*given, *wanted, int(self.operator == "endswith"), address_of(equal))
            return equal.view(np.bool_)
        below = np.empty(rows, np.int64)
        rank_strings(*given, *wanted, address_of(below), address_of(equal))
        same = equal.view(np.bool_)
        found: BoolArray
        match self.operator:
            case "eq" | "in":
                found = same
            case "neq" | "not-in":
                found = ~same
            case "gt":
                found = below > 0
            case "ge":
                found = (below > 0) | same
            case "lt":
                found = (below == 0) & ~same
            case "le":
                found = below == 0
            case _:  # between; where the second operand is not above the first, nothing is
                low, high = self.operands
                found = ((below == 1) & ~same) | ((below == 0) & same) if low < high else np.zeros(rows, np.bool_)
        return found

    def of_sets(self, rows: Ragged[Any]) -> BoolArray:
        """bool[n]: which of n rows of integers satisfy any, all or diff, as true sets.

        Args:
            rows: int64 or uint64 rows.
        """
        wanted = self._set
        counts = count_distinct(wanted, Bits(rows))
        found: BoolArray
        if self.operator == "any":
            found = counts > 0
        else:
            found = counts == (wanted.size if self.operator == "all" else 0)
        return found

    def _members(self, values: npt.NDArray[Any]) -> BoolArray:
        ordered = self._ordered
        if not ordered.size:
            return np.zeros(values.shape, np.bool_)
        place = np.minimum(np.searchsorted(ordered, values), ordered.size - 1)
        found: BoolArray = ordered[place] == values
        return found

    @cached_property
    def _numbers(self) -> npt.NDArray[Any]:
        if self.domain is Domain.UINT64:
            return np.array([each & _MASK64 for each in self.operands], np.uint64)
        kind = {Domain.INT64: "int64", Domain.FLOAT: "float32"}.get(self.domain, "float64")
        with np.errstate(over="ignore"):
            return np.array([np.float32(each) if self.domain in _FLOATS else each for each in self.operands], kind)

    @cached_property
    def _ordered(self) -> npt.NDArray[Any]:
        numbers_ = self._numbers
        return np.unique(numbers_.astype(np.float32) if self.domain is Domain.DOUBLE else numbers_)

    @cached_property
    def _set(self) -> npt.NDArray[np.uint64]:
        return np.unique(np.array([each & _MASK64 for each in self.operands], np.uint64))

    @cached_property
    def _strings(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        ordered = sorted(set(self.operands))
        bounds = np.zeros(len(ordered) + 1, np.int64)
        np.cumsum([len(each) for each in ordered], out=bounds[1:])
        return np.frombuffer(b"".join(ordered) + bytes(1), np.uint8), bounds


@dataclass(frozen=True, slots=True, eq=False)
class Bits:
    """Some bits of every value of ragged rows.

    Attributes:
        rows: n rows of uint64 or int64.
        shift: Lowest of the bits.
        mask: Which of them, after shifting.
    """

    rows: Ragged[Any]
    shift: int = 0
    mask: int = _MASK64


def count_distinct(wanted: npt.NDArray[np.uint64], *columns: Bits) -> npt.NDArray[np.int64]:
    """int64[n]: how many distinct ids of `wanted` each of n rows holds in all columns together.

    Args:
        wanted: uint64[m], ascending and unique.
        *columns: At least one; all of n rows.
    """
    n = len(columns[0].rows)
    plan = np.empty((len(columns), 4), np.uint64)
    kept = []
    for place, column in enumerate(columns):
        values = column.rows.values
        values = _addressable(values, np.uint64 if values.dtype == np.uint64 else np.int64)
        splits = _addressable(column.rows.row_splits, np.int64)
        kept += [values, splits]
        plan[place] = address_of(values), address_of(splits), column.shift, column.mask
    seen, counts = np.zeros(wanted.size, np.int64), np.empty(n, np.int64)
    count_matches(
        address_of(plan), len(columns), n, address_of(wanted), wanted.size, address_of(seen), address_of(counts)
    )
    return counts


def _addressable(values: npt.NDArray[Any], kind: type[np.generic]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(values, kind)


def check_operator(field: str, operator: str, domain: Domain, *, repeated: bool) -> None:
    """Refuse an operator that says nothing about values of a field's type."""
    if operator not in OPERATORS:
        raise InvalidRequestError(f"op of {field!r} is {operator!r}; it can be {', '.join(OPERATORS)}")
    if repeated:
        allowed: tuple[str, ...] = _SETS
    else:
        allowed = (*SINGLE, "between", *_MEMBERSHIP, *(_AFFIXES if domain is Domain.BYTES else ()))
    if operator not in allowed:
        what = f"a list of {domain}" if repeated else f"a single {domain}"
        raise InvalidRequestError(f"op of {field!r} is {operator!r}; for {what} it can be {', '.join(allowed)}")


def _listed(operand: Any) -> list[Any] | None:
    """The elements of a list, tuple, set or array; None for a single value."""
    if isinstance(operand, np.ndarray):
        return list(operand.ravel()) if operand.ndim else None
    if isinstance(operand, (str, bytes)) or not isinstance(operand, Iterable):
        return None
    return list(operand)


def _typed(field: str, value: Any, domain: Domain) -> Any:
    if isinstance(value, (bool, np.bool_)):
        pass
    elif domain is Domain.BYTES:
        if isinstance(value, (str, bytes)):
            return value.encode() if isinstance(value, str) else bytes(value)
    elif domain in _FLOATS:
        if isinstance(value, numbers.Real):
            return float(value)
    elif isinstance(value, numbers.Integral) or (isinstance(value, numbers.Real) and float(value).is_integer()):
        whole = int(value)  # type: ignore[call-overload]  # both kinds of numbers can become an int
        if -(2**63) <= whole < 2 ** (64 if domain is Domain.UINT64 else 63):
            return whole
    kind = {Domain.BYTES: "a string", Domain.FLOAT: "a number", Domain.DOUBLE: "a number"}.get(domain, str(domain))
    raise InvalidRequestError(f"operand of {field!r} has {value!r}; it must be {kind}")


# ---- operands in files -----------------------------------------------------------------------------------------------


def load_operands(path: str, field: str, domain: Domain) -> tuple[Any, ...]:
    """The operands in a file that holds a serialized FilterValues.

    Args:
        path: Of the file, anywhere a reader can open.
        field: Name of the field they are for, for messages.
        domain: Of the field; the list in the file must be of that type.
    """
    with open_file(path) as file:
        content = file.read()
    try:
        found = example_pb2.FilterValues.FromString(content)
    except DecodeError:
        raise DataError(f"operand_filepath of {field!r}: {path} holds no FilterValues") from None
    wanted = {Domain.BYTES: "bytes_list", Domain.FLOAT: "float_list", Domain.DOUBLE: "float_list"}
    kind = wanted.get(domain, "int64_list")
    if found.WhichOneof("type") != kind:
        held = found.WhichOneof("type") or "nothing"
        raise InvalidRequestError(f"operand_filepath of {field!r}: {path} holds {held}; a {domain} field needs {kind}")
    return tuple(getattr(found, kind).value)


def relate(operator: str, value: float | str | bytes, operands: Sequence[Any]) -> bool:
    """Whether one value satisfies a relation: integers as int64, other numbers as float, strings bytewise."""
    domain = Domain.INT64 if isinstance(value, int) else Domain.FLOAT
    if isinstance(value, (str, bytes)):
        domain = Domain.BYTES
    check_operator("value", operator, domain, repeated=False)
    used = operands[:1] if operator in SINGLE else operands
    relation = Relation(operator=operator, domain=domain, operands=tuple(_typed("value", e, domain) for e in used))
    if isinstance(value, (str, bytes)):
        raw = np.frombuffer(value.encode() if isinstance(value, str) else value, np.uint8)
        return bool(relation.of_strings(Strings(raw, np.array([0]), np.array([raw.size])))[0])
    kind = np.int64 if domain is Domain.INT64 else np.float32
    return bool(relation.of_numbers(np.array([value], kind))[0])
