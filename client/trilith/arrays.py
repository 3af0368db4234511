"""What callers pass as ids and rows, checked once and made into the arrays that kernels take."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from trilith.errors import InvalidRequestError, NonFiniteError
from trilith.shard import Float32Array, FloatArray, UInt64Array

_A = TypeVar("_A", bound=np.ndarray[Any, Any])

__all__ = ["as_ids", "as_rows", "as_values", "refuse_non_finite"]

MAX_IDS = (1 << 31) - 1
"""Ids in one call and table: positions in a batch are 31 bits."""


def as_ids(table: str, ids: Any) -> UInt64Array:
    """Make uint64[n] of one-dimensional integers of any kind; negative ones keep their 64-bit pattern.

    Args:
        table: For messages.
        ids: An array-like: NumPy array, CPU tensor, sequence of int.
    """
    array = ids if type(ids) is np.ndarray else _array(table, "ids", ids)
    if array.ndim != 1:
        raise InvalidRequestError(f"table {table!r}: ids have shape {array.shape}, they must be one-dimensional")
    if array.dtype != np.uint64:
        if array.dtype == np.int64:
            array = array.view(np.uint64) if array.flags.c_contiguous else array.astype(np.uint64)
        elif array.dtype.kind in "iu":
            array = array.astype(np.int64).view(np.uint64)
        elif array.size == 0 and not isinstance(ids, np.ndarray):
            return np.empty(0, np.uint64)  # an empty list has no type of its own
        else:
            raise InvalidRequestError(f"table {table!r}: ids are {array.dtype}, they must be integers")
    if array.size > MAX_IDS:
        raise InvalidRequestError(f"table {table!r}: {array.size} ids in one call are above {MAX_IDS}")
    return _plain(array)


def as_rows(table: str, what: str, rows: Any, count: int, dim: int) -> Float32Array:
    """Make float32[count, dim], C-contiguous, of floating-point rows."""
    array = rows if type(rows) is np.ndarray else _array(table, what, rows)
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
    array = values if type(values) is np.ndarray else _array(name, what, values)
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
        if hasattr(values, "detach"):  # a tensor that takes part in autograd
            values = values.detach()
        return np.asarray(values)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InvalidRequestError(f"{name!r}: {what} are not an array: {error}") from None
