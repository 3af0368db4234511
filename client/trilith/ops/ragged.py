"""Ragged arrays of the ops: values and row splits, checked; row ids; the splits of batches glued together."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError

__all__ = [
    "Int64Array",
    "RaggedArray",
    "as_floats",
    "as_integers",
    "as_splits",
    "normalize_merged_split",
    "value_rowids",
]

Int64Array: TypeAlias = npt.NDArray[np.int64]


class RaggedArray(NamedTuple):
    """Rows of different lengths.

    Attributes:
        values: [n], row after row.
        row_splits: int64[rows + 1]; row r is values[row_splits[r]:row_splits[r + 1]].
    """

    values: npt.NDArray[Any]
    row_splits: Int64Array


def as_integers(name: str, values: npt.ArrayLike, *, shape: tuple[int, ...] | None = None) -> Int64Array:
    """Make int64, C-contiguous, of integers of any kind; uint64 keeps its bits.

    Args:
        name: For messages.
        values: An array-like; an empty one of any type is fine.
        shape: What the shape must be, -1 standing for any length; None takes any shape.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        if array.size:
            raise InvalidRequestError(f"{name} are {array.dtype}, they must be integers")
        array = array.astype(np.int64)
    if shape is not None and (
        array.ndim != len(shape) or any(want not in (-1, got) for want, got in zip(shape, array.shape, strict=True))
    ):
        raise InvalidRequestError(f"{name} have shape {array.shape}, {_wanted(shape)} is needed")
    if array.dtype == np.uint64:
        array = np.ascontiguousarray(array).view(np.int64)
    return np.require(array, np.int64, ("C", "A"))


def as_floats(name: str, values: npt.ArrayLike, *, shape: tuple[int, ...] | None = None) -> npt.NDArray[np.float32]:
    """Make float32, C-contiguous; arguments as for `as_integers`. No values at all take any shape without a -1."""
    array = np.asarray(values)
    if array.dtype != np.float32:
        if array.dtype.kind not in "fiu":
            raise InvalidRequestError(f"{name} are {array.dtype}, they must be numbers")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    if shape is not None:
        fits = array.ndim == len(shape) and all(want in (-1, got) for want, got in zip(shape, array.shape, strict=True))
        if not fits and array.size == 0 and 0 in (empty := tuple(0 if each == -1 else each for each in shape)):
            array, fits = np.empty(empty, np.float32), True
        if not fits:
            raise InvalidRequestError(f"{name} have shape {array.shape}, {_wanted(shape)} is needed")
    return np.require(array, np.float32, ("C", "A"))


def as_splits(name: str, row_splits: npt.ArrayLike, values: int) -> Int64Array:
    """Make int64[rows + 1] that runs from 0 to `values` without falling."""
    splits = as_integers(name, row_splits, shape=(-1,))
    if splits.size == 0 or splits[0] != 0 or splits[-1] != values or (splits[1:] < splits[:-1]).any():
        shown = splits.tolist() if splits.size <= 16 else f"{splits[:8].tolist()}...{splits[-8:].tolist()}"
        raise InvalidRequestError(f"{name} {shown} do not rise from 0 to {values}, the number of values")
    return splits


def value_rowids(row_splits: npt.ArrayLike) -> Int64Array:
    """int64[values]: the row of every value."""
    splits = as_integers("row_splits", row_splits, shape=(-1,))
    splits = as_splits("row_splits", splits, int(splits[-1]) if splits.size else 0)
    return np.repeat(np.arange(splits.size - 1), np.diff(splits))


def normalize_merged_split(row_split: npt.ArrayLike, row_split_size: npt.ArrayLike) -> Int64Array:
    """Make the row splits of several batches, glued together, those of one batch.

    Args:
        row_split: int64[l], whole row splits one after another.
        row_split_size: int[m], the length of each; they add up to l.

    Returns:
        int64[l + 1 - m].
    """
    glued = as_integers("row_split", row_split, shape=(-1,))
    sizes = as_integers("row_split_size", row_split_size, shape=(-1,))
    if sizes.size == 0 or (sizes < 1).any() or sizes.sum() != glued.size:
        raise InvalidRequestError(f"row_split_size {sizes.tolist()} does not cut {glued.size} splits into whole ones")
    ends = np.cumsum(sizes)
    totals = glued[ends - 1]
    for start, end, total in zip(ends - sizes, ends, totals, strict=True):
        as_splits("row_split", glued[start:end], int(total))
    shifted = glued + np.repeat(np.cumsum(totals) - totals, sizes)
    keep = np.ones(glued.size, np.bool_)
    keep[ends[:-1]] = False
    return shifted[keep]


def _wanted(shape: tuple[int, ...]) -> str:
    return f"({', '.join('n' if each == -1 else str(each) for each in shape)}{',' if len(shape) == 1 else ''})"
