"""The reference system's ops that arrange ids, in plain NumPy: split, reorder, distinct ids, splits glued together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.dedup import FIRST
from trilith.ops.ragged import Int64Array, Ragged, as_floats, as_integers, as_splits
from trilith.ops.unique import distinct_in_rows

__all__ = [
    "normalize_merged_split",
    "ragged_split_by_indices",
    "reorder_by_indices",
    "split_by_indices",
    "split_by_indices_gradient",
    "unique_first_occurrence",
]


def split_by_indices(
    indices: npt.ArrayLike, tensor: npt.NDArray[Any] | Sequence[Any], num_splits: int
) -> list[npt.NDArray[Any]]:
    """Cut rows into splits.

    Args:
        indices: int[n], the split of each row.
        tensor: float32 or int64 [n, ...].
        num_splits: How many splits there are.

    Returns:
        Per split its rows in order, views of one array.
    """
    rows = _rows(tensor)
    order, bounds = _order(indices, rows.shape[0], num_splits)
    return np.split(rows[order], bounds)


def split_by_indices_gradient(
    indices: npt.ArrayLike, grads: Sequence[npt.ArrayLike], num_splits: int
) -> npt.NDArray[np.float32]:
    """Bring the gradients of the splits back into the order of the rows.

    Args:
        indices: int[n], as given to `split_by_indices`.
        grads: Per split float32[rows of it, ...]; a split without rows may have any shape without values.
        num_splits: How many splits there are.

    Returns:
        float32[n, ...].
    """
    if len(grads) != num_splits:
        raise InvalidRequestError(f"{len(grads)} gradients for {num_splits} splits")
    wanted = as_integers("indices", indices, shape=(-1,))
    order, bounds = _order(wanted, wanted.size, num_splits)
    arrays = [as_floats(f"grads[{s}]", grad) for s, grad in enumerate(grads)]
    tails = {array.shape[1:] for array in arrays if array.size}
    tails = tails or {array.shape[1:] for array in arrays if array.ndim > 1} or {()}
    if len(tails) > 1:
        raise InvalidRequestError(f"the gradients' rows differ in shape: {sorted(tails)}")
    tail = tails.pop()
    for s, (array, rows) in enumerate(zip(arrays, np.diff(bounds, prepend=0, append=wanted.size), strict=True)):
        if (array.shape[0] if array.size else 0) != rows and int(np.prod(tail)):
            raise InvalidRequestError(f"grads[{s}] has {len(array)} rows, split {s} has {rows}")
    out = np.empty((wanted.size, *tail), np.float32)
    out[order] = np.concatenate([np.empty((0, *tail), np.float32), *(array for array in arrays if array.size)])
    return out


def ragged_split_by_indices(
    indices: npt.ArrayLike, values: npt.NDArray[Any] | Sequence[Any], row_splits: npt.ArrayLike, num_splits: int
) -> tuple[list[Ragged[Any]], list[Ragged[np.int64]]]:
    """Cut a ragged array value by value; every split has all its rows.

    Args:
        indices: int[n], the split of each value.
        values: float32 or int64 [n].
        row_splits: int64[rows + 1] of the values.
        num_splits: How many splits there are.

    Returns:
        Per split its values, and their positions among all values.
    """
    flat = _rows(values)
    if flat.ndim != 1:
        raise InvalidRequestError(f"values have shape {flat.shape}, they must be one-dimensional")
    splits = as_splits("row_splits", row_splits, flat.size)
    order, bounds = _order(indices, flat.size, num_splits)
    positions = [Ragged(each, np.searchsorted(each, splits)) for each in np.split(order, bounds)]
    return [Ragged(flat[each.values], each.row_splits) for each in positions], positions


def reorder_by_indices(
    rows: npt.ArrayLike, shard_ids: npt.ArrayLike, num_of_shards: int
) -> tuple[Int64Array, npt.NDArray[np.int32]]:
    """Arrange rows by shard, one for each key.

    Args:
        rows: int64[n], keys, or int64[n, w], rows that begin with their key.
        shard_ids: int32[n]; of equal keys the first row and its shard count.
        num_of_shards: How many shards there are.

    Returns:
        The rows shard after shard, within a shard the last first occurrence first; int32[num_of_shards] rows of each.
    """
    if num_of_shards < 1:
        raise InvalidRequestError(f"num_of_shards={num_of_shards} is below 1")
    given = as_integers("rows", rows)
    if given.ndim not in (1, 2) or (given.ndim == 2 and given.shape[1] == 0):
        raise InvalidRequestError(f"rows have shape {given.shape}; (n,) or (n, w) is needed")
    shards = as_integers("shard_ids", shard_ids, shape=(given.shape[0],))
    _refuse_outside("shard_ids", shards, num_of_shards)
    # Backwards, so that a stable sort by shard leaves the last first occurrence first.
    first = np.sort(np.unique(given if given.ndim == 1 else given[:, 0], return_index=True)[1])[::-1]
    owners = shards[first]
    return given[first[np.argsort(owners, kind="stable")]], np.bincount(owners, minlength=num_of_shards).astype(
        np.int32
    )


def unique_first_occurrence(fids: npt.ArrayLike) -> tuple[npt.NDArray[Any], Int64Array]:
    """Distinct ids in order of first occurrence, and per input id its number among them.

    Args:
        fids: int64 or uint64[n]; the distinct ones are of the same type.
    """
    given = np.asarray(fids)
    flat = as_integers("fids", given, shape=(-1,))
    found = distinct_in_rows(flat, np.array([0, flat.size], np.int64))
    values = found.values.view(np.uint64) if given.dtype == np.uint64 else found.values
    return values, (found.numbers & np.uint32(FIRST - 1)).astype(np.int64)


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
    lengths = [np.diff(as_splits("row_split", each, int(each[-1]))) for each in np.split(glued, np.cumsum(sizes)[:-1])]
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths), dtype=np.int64)])


def _rows(tensor: Any) -> npt.NDArray[Any]:
    array = np.asarray(tensor)
    if array.ndim == 0:
        raise InvalidRequestError("a scalar has no rows to split")
    if array.dtype.kind == "f":
        return as_floats("tensor", array)
    if array.dtype.kind not in "iu":
        raise InvalidRequestError(f"rows are {array.dtype}, they must be numbers")
    return array


def _order(indices: npt.ArrayLike, n: int, num_splits: int) -> tuple[Int64Array, Int64Array]:
    """Where the rows of the splits come from, split after split, and where the second split and all after it begin."""
    if num_splits < 1:
        raise InvalidRequestError(f"num_splits={num_splits} is below 1")
    wanted = as_integers("indices", indices, shape=(n,))
    _refuse_outside("indices", wanted, num_splits)
    return np.argsort(wanted, kind="stable"), np.cumsum(np.bincount(wanted, minlength=num_splits))[:-1]


def _refuse_outside(what: str, indices: Int64Array, count: int) -> None:
    outside = (indices < 0) | (indices >= count)
    if outside.any():
        bad = int(outside.argmax())
        raise InvalidRequestError(f"{what}[{bad}]={indices[bad]} is outside 0..{count - 1}")
