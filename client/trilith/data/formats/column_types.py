"""What columns become: types by name, which stored types each is made of, and the values of Arrow arrays."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from trilith.data.records import PADDING
from trilith.data.scan.rows import Column, ColumnType
from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Ragged, singles
from trilith.ops.strings import hash_strings

__all__ = ["Values", "check_column", "column_of", "hashes_of", "numbers_of", "text_of", "texts_of", "unreadable"]

Values: TypeAlias = npt.NDArray[Any]
"""uint64 ids, int64, float32, or byte strings as objects."""


_DAY_S = 86400
_INT64_MAX = (1 << 63) - 1
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def column_of(name: str, stored: pa.DataType) -> Column | None:
    """A column by the type it is stored as; None for one that has no values (type null).

    Raises:
        InvalidRequestError: Nothing can be made of that type.
    """
    leaf = _leaf(stored)
    if pa.types.is_null(leaf):
        return None
    if pa.types.is_integer(leaf) or pa.types.is_boolean(leaf) or _is_time(leaf) or _is_whole_decimal(leaf):
        return Column(name, ColumnType.INT)
    if pa.types.is_floating(leaf) or pa.types.is_decimal(leaf):
        return Column(name, ColumnType.FLOAT)
    if _is_bytes(leaf):
        return Column(name, ColumnType.BYTES)
    raise InvalidRequestError(unreadable(name, stored))


def unreadable(name: str, stored: pa.DataType) -> str:
    """Why a column cannot be read at all; empty if it can."""
    leaf = _leaf(stored)
    checks = (pa.types.is_null, pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating, pa.types.is_decimal)
    if any(check(leaf) for check in checks) or _is_time(leaf) or _is_bytes(leaf):
        return ""
    return f"column {name!r} is stored as {stored}: only integers, floats, times and bytes can be read"


def check_column(column: Column, stored: pa.DataType) -> None:
    """Refuse what a stored type cannot become. Whether floats are whole numbers shows in their values."""
    leaf = _leaf(stored)
    whole = pa.types.is_integer(leaf) or pa.types.is_boolean(leaf) or _is_whole_decimal(leaf)
    match column.type:
        case ColumnType.FID_V1 | ColumnType.FID_V2:
            fits = whole or pa.types.is_floating(leaf)
        case ColumnType.INT:
            fits = whole or pa.types.is_floating(leaf) or _is_time(leaf)
        case ColumnType.FLOAT:
            fits = whole or pa.types.is_floating(leaf) or pa.types.is_decimal(leaf)
        case _:
            fits = _is_bytes(leaf)
    if not fits and not pa.types.is_null(leaf):
        raise InvalidRequestError(f"column {column.name!r} is stored as {stored}: it cannot be read as {column.type}")


def _is(leaf: pa.DataType, *names: str) -> bool:
    """Whether a type is one of those that `pyarrow.types` knows; older versions know fewer."""
    return any(check(leaf) for name in names if (check := getattr(pa.types, f"is_{name}", None)) is not None)


def _is_bytes(leaf: pa.DataType) -> bool:
    return _is(
        leaf, "string", "binary", "large_string", "large_binary", "fixed_size_binary", "string_view", "binary_view"
    )


def _is_time(leaf: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(leaf) or pa.types.is_date(leaf))


def _is_whole_decimal(leaf: pa.DataType) -> bool:
    return bool(pa.types.is_decimal(leaf) and leaf.scale <= 0)


def _is_list(stored: pa.DataType) -> bool:
    return _is(stored, "list", "large_list", "fixed_size_list", "list_view", "large_list_view")


def _leaf(stored: pa.DataType) -> pa.DataType:
    while True:
        if _is_list(stored) or pa.types.is_dictionary(stored) or _is(stored, "run_end_encoded"):
            stored = stored.value_type
        elif pa.types.is_struct(stored) and stored.num_fields == 1:
            stored = stored.field(0).type
        elif isinstance(stored, pa.BaseExtensionType):
            stored = stored.storage_type
        else:
            return stored


def numbers_of(array: pa.Array, column_type: ColumnType | str) -> tuple[Ragged[Any], dict[int, str]]:
    """A column's numbers; a null is no value, nor is a NaN where integers are wanted, and lists of lists are one list.

    Returns:
        The values, with anything in place of those that do not fit; and by row which those are.
    """
    leaves, splits = _flattened(array)
    stored = leaves.type
    if pa.types.is_floating(stored) and column_type != ColumnType.FLOAT:
        there = ~np.isnan(np.asarray(leaves.to_numpy(zero_copy_only=False), np.float64))
        if not there.all():
            leaves = leaves.filter(pa.array(there))
            splits = np.concatenate([[0], np.cumsum(there)])[splits]
    make = {ColumnType.FLOAT: _floats, ColumnType.INT: _integers}.get(ColumnType(column_type), _ids)
    values, odd, wanted = make(leaves)
    bad: dict[int, str] = {}
    if odd.any():
        places = np.flatnonzero(odd)
        rows = np.searchsorted(splits, places, "right") - 1
        for place, row in zip(places.tolist(), rows.tolist(), strict=True):
            bad.setdefault(row, f"{leaves[place].as_py()} is {wanted}")
    return Ragged(values, splits), bad


_Made: TypeAlias = tuple[Values, npt.NDArray[np.bool_], str]
"""Values; which of them do not fit; what those are."""


def _floats(leaves: pa.Array) -> _Made:
    stored = leaves.type
    if pa.types.is_null(stored):
        return np.empty(0, np.float32), np.empty(0, np.bool_), ""
    if pa.types.is_decimal(stored):
        leaves = leaves.cast(pa.float64())
    given = leaves.to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        values = given.astype(np.float32, copy=False)
    odd = np.isinf(values) & np.isfinite(given) if given.dtype == np.float64 else np.zeros(len(values), np.bool_)
    return values, odd, f"beyond float32, whose largest is {_FLOAT32_MAX}"


def _integers(leaves: pa.Array) -> _Made:
    stored = leaves.type
    if _is_time(stored):
        if pa.types.is_date32(stored):
            days = leaves.cast(pa.int32()).to_numpy(zero_copy_only=False).astype(np.int64)
            return days * _DAY_S, np.zeros(len(days), np.bool_), ""
        unit = "ms" if pa.types.is_date64(stored) else stored.unit
        ticks = leaves.cast(pa.int64()).to_numpy(zero_copy_only=False)
        seconds = ticks // {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}[unit]
        return seconds, np.zeros(len(seconds), np.bool_), ""
    if pa.types.is_uint64(stored):
        given = leaves.to_numpy(zero_copy_only=False)
        return given.view(np.int64), given > _INT64_MAX, "no int64; read the column as fid_v2"
    return _whole(leaves, -(1 << 63), _INT64_MAX, "no int64")


def _ids(leaves: pa.Array) -> _Made:
    if pa.types.is_uint64(leaves.type):
        given = leaves.to_numpy(zero_copy_only=False)
        return given, np.zeros(len(given), np.bool_), ""
    values, odd, wanted = _whole(leaves, -(1 << 63), (1 << 64) - 1, "no id of 64 bits")
    return values.view(np.uint64), odd, wanted


def _whole(leaves: pa.Array, lowest: int, highest: int, wanted: str) -> _Made:
    """int64 values, larger ones by their bits."""
    stored = leaves.type
    if pa.types.is_null(stored):
        return np.empty(0, np.int64), np.empty(0, np.bool_), wanted
    if pa.types.is_decimal(stored):
        given = [int(each) for each in leaves.to_pylist()]
        odd = np.fromiter((not lowest <= each <= highest for each in given), np.bool_, len(given))
        bits = np.fromiter((each & (1 << 64) - 1 for each in given), np.uint64, len(given))
        return bits.view(np.int64), odd, wanted
    numbers = leaves.to_numpy(zero_copy_only=False)
    if pa.types.is_floating(stored):
        exact = {np.dtype(np.float16): 1 << 11, np.dtype(np.float32): 1 << 24}.get(numbers.dtype, 1 << 53)
        odd = ~(np.abs(numbers) <= exact) | (np.trunc(numbers) != numbers)
        return np.where(odd, 0, numbers).astype(np.int64), odd, f"no whole number that a {stored} holds exactly"
    return numbers.astype(np.int64, copy=False), np.zeros(len(numbers), np.bool_), wanted


def texts_of(array: pa.Array) -> tuple[npt.NDArray[np.uint8], Ragged[Any]]:
    """A column's byte strings, as a text and spans int64[m, 2] of (offset in it, length); a null is no value."""
    leaves, splits = _flattened(array)
    text, spans = text_of(leaves)
    return text, Ragged(spans, splits)


def hashes_of(array: pa.Array) -> Ragged[np.uint64]:
    """A column's byte strings as ids, by `trilith.ops.strings.hash_strings`; a null is no value."""
    leaves, splits = _flattened(array)
    return Ragged(hash_strings(leaves), splits)


def text_of(strings: pa.Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Byte strings, none of them null, as a text with `PADDING` behind it, and spans of it."""
    if pa.types.is_null(strings.type):
        return np.zeros(PADDING, np.uint8), np.empty((0, 2), np.int64)
    if pa.types.is_fixed_size_binary(strings.type):
        strings = strings.cast(pa.binary())
    strings = strings.cast(pa.large_binary())
    _, offsets, data = strings.buffers()
    ends = np.frombuffer(offsets, np.int64)[strings.offset : strings.offset + len(strings) + 1]
    first = int(ends[0]) if ends.size else 0
    size = int(ends[-1]) - first if ends.size else 0
    text = np.zeros(size + PADDING, np.uint8)
    if size:
        text[:size] = np.frombuffer(data, np.uint8)[first : first + size]
    return text, np.stack([ends[:-1] - first, np.diff(ends)], axis=1)


def _flattened(array: pa.Array) -> tuple[pa.Array, npt.NDArray[np.int64]]:
    stored = array.type
    if isinstance(stored, pa.BaseExtensionType):
        return _flattened(array.storage)
    if pa.types.is_dictionary(stored):
        return _flattened(array.dictionary_decode())
    if _is(stored, "run_end_encoded"):
        return _flattened(pc.run_end_decode(array))
    if pa.types.is_struct(stored):
        return _flattened(array.flatten()[0])
    if _is_list(stored):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        values, inner = _flattened(array.flatten())
        return values, inner[_splits(lengths)]
    if not array.null_count:
        return array, singles(len(array))
    present = array.is_valid().to_numpy(zero_copy_only=False)
    return array.drop_null(), _splits(present)


def _splits(lengths: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    splits = np.zeros(lengths.size + 1, np.int64)
    np.cumsum(lengths, out=splits[1:])
    return splits
