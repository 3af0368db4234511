"""What callers pass as ids and rows, checked once and made into the arrays that kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from trilith.errors import InvalidRequestError, NonFiniteError
from trilith.shard import Float32Array, FloatArray, UInt64Array

_A = TypeVar("_A", bound=np.ndarray[Any, Any])

__all__ = ["as_ids", "as_rows", "as_values", "id_array", "refuse_non_finite"]

MAX_IDS = (1 << 31) - 1
"""Ids in one call and table: positions in a batch are 31 bits."""


def as_ids(table: str, ids: Any) -> UInt64Array:
    """Make uint64[n] of one-dimensional integers of any kind; negative ones keep their 64-bit pattern.

    Args:
        table: For messages.
        ids: As for `id_array`.
    """
    array = ids if type(ids) is np.ndarray and ids.dtype == np.uint64 else id_array(f"table {table!r}", ids)
    if array.ndim != 1:
        raise InvalidRequestError(f"table {table!r}: ids have shape {array.shape}, they must be one-dimensional")
    if array.size > MAX_IDS:
        raise InvalidRequestError(f"table {table!r}: {array.size} ids in one call are above {MAX_IDS}")
    return _plain(array)


def id_array(owner: str, ids: Any, what: str = "ids") -> UInt64Array:
    """Make uint64 of integers of any kind, shape kept; negative ones keep their 64-bit pattern.

    Args:
        owner: For messages: what the integers are for.
        ids: NumPy array, tensor, or sequence of integers, each in -2^63..2^64-1; Python's integers keep all 64 bits.
        what: For messages: what they are.
    """
    array = ids if type(ids) is np.ndarray else _array(owner, what, ids)
    kind = array.dtype.kind
    if array.dtype == np.uint64:
        return array
    if kind == "i" or kind == "u":
        wide = array if array.dtype == np.int64 else array.astype(np.int64)
        return wide.view(np.uint64) if wide.flags.c_contiguous else wide.astype(np.uint64)
    if array.size == 0 and not isinstance(ids, np.ndarray):
        return np.empty(array.shape, np.uint64)  # an empty list has no type of its own
    # NumPy takes Python's integers for floats where some are above 2^63 and others are not.
    if kind == "O" or (kind == "f" and isinstance(ids, Sequence)):
        return _from_python(owner, what, ids, array)
    hint = "; integers that became floats are lost beyond 2^53: read them as integers" if kind == "f" else ""
    raise InvalidRequestError(f"{owner}: {what} are {array.dtype}, they must be integers{hint}")


def _from_python(owner: str, what: str, ids: Any, array: np.ndarray[Any, Any]) -> UInt64Array:
    """uint64 of Python's integers, in a list or an array of objects of the same shape as `array`."""
    values = np.asarray(ids, object)
    out = np.empty(array.shape, np.uint64)
    if values.shape != array.shape:
        raise InvalidRequestError(f"{owner}: {what} are {array.dtype}, they must be integers")
    for place, (value, index) in enumerate(zip(values.ravel().tolist(), np.ndindex(values.shape), strict=True)):
        if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
            whose = "float64" if array.dtype.kind == "f" else f"such as {value!r} ({type(value).__name__})"
            raise InvalidRequestError(f"{owner}: {what} are {whose}, they must be integers")
        number = value.__index__()
        if not -(1 << 63) <= number < 1 << 64:
            raise InvalidRequestError(
                f"{owner}: {what}[{place}] is {number}, {what} must be integers of 64 bits: -2^63..2^64-1"
            )
        out[index] = number & 0xFFFFFFFFFFFFFFFF
    return out


def as_rows(table: str, what: str, rows: Any, count: int, dim: int) -> Float32Array:
    """Make float32[count, dim], C-contiguous, of floating-point rows."""
    array = rows if type(rows) is np.ndarray else _array(f"table {table!r}", what, rows)
    if array.shape != (count, dim):
        # Nothing to say about the width of no rows.
        if count == 0 and array.size == 0:
            return np.empty((0, dim), np.float32)
        raise InvalidRequestError(
            f"table {table!r}: {what} have shape {array.shape}, {count} ids of dim {dim} need ({count}, {dim})"
        )
    if array.dtype != np.float32:
        if array.dtype.kind != "f":
            raise InvalidRequestError(f"table {table!r}: {what} are {array.dtype}, they must be floating-point")
        with np.errstate(over="ignore"):  # what becomes infinite is refused as such
            array = array.astype(np.float32)
    return _plain(array)


def as_values(name: str, what: str, values: Any) -> Float32Array:
    """Make float32, C-contiguous, of any shape, of a dense variable's values."""
    array = values if type(values) is np.ndarray else _array(f"variable {name!r}", what, values)
    if array.dtype.kind != "f":
        raise InvalidRequestError(f"variable {name!r}: {what} are {array.dtype}, they must be floating-point")
    with np.errstate(over="ignore"):
        return np.require(array, np.float32, ("C", "A"))


def refuse_non_finite(where: str, what: str, rows: FloatArray, *, float16: bool) -> None:
    """Raise NonFiniteError that names the first value which cannot be sent; the caller knows that there is one."""
    bad = ~np.isfinite(rows)
    if not bad.any() and float16:
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(rows.astype(np.float16))
    if bad.any():
        place = np.unravel_index(int(bad.argmax()), rows.shape)
        value = f"{what}[{', '.join(map(str, place))}] is {rows[place]}"
        over = "" if not np.isfinite(rows[place]) else ", which float16 on the wire cannot hold"
    else:
        value, over = f"the sum of {what} of a repeated id", " is not finite"
    raise NonFiniteError(f"{where}: {value}{over}; allow_non_finite=True sends it all the same")


def _plain(array: _A) -> _A:
    """The array itself, or a copy that is C-contiguous and aligned."""
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else np.require(array, requirements=("C", "A"))


def _array(name: str, what: str, values: Any) -> np.ndarray[Any, Any]:
    try:
        if hasattr(values, "detach"):  # a tensor that takes part in autograd, or is on a device
            values = values.detach().cpu()
        return np.asarray(values)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidRequestError(f"{name}: {what} are not an array: {error}") from None
