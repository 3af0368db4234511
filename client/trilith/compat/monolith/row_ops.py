"""The reference system's reductions of rows to one per bag: sums, means, norms, and their gradients, in NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Int64Array, as_floats, as_integers, as_splits, value_rowids

__all__ = [
    "fused_reduce_and_split",
    "fused_reduce_and_split_gradient",
    "fused_reduce_sum_and_split",
    "fused_reduce_sum_and_split_gradient",
    "fused_sorted_segment_sum",
    "fused_sorted_segment_sum_gradient",
    "reduce_mean",
    "reduce_mean_gradient",
    "reduce_norm",
    "reduce_norm_gradient",
    "reduce_sum",
    "reduce_sum_gradient",
    "sum_rows_at",
]

Float32Array = npt.NDArray[np.float32]


def reduce_sum(id_indices: npt.ArrayLike, id_values: npt.ArrayLike, rows: int) -> Float32Array:
    """Sum the rows of every bag.

    Args:
        id_indices: int64[n] or [n, 1], the bag of each row, in any order.
        id_values: float32[n, d].
        rows: Number of bags.

    Returns:
        float32[rows, d]; zeros for an empty bag.
    """
    return sum_rows_at(*_bags(id_indices, id_values), rows)


def reduce_sum_gradient(id_indices: npt.ArrayLike, grads: npt.ArrayLike) -> Float32Array:
    """float32[n, d]: the gradient of each row, which is its bag's."""
    return _spread(id_indices, as_floats("grads", grads, shape=(-1, -1)))


def reduce_mean(id_indices: npt.ArrayLike, id_values: npt.ArrayLike, rows: int) -> Float32Array:
    """Average the rows of every bag; arguments as for `reduce_sum`. NaN for an empty bag."""
    places, values = _bags(id_indices, id_values)
    sums = sum_rows_at(places, values, rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        sums *= np.float32(1) / np.bincount(places, minlength=rows).astype(np.float32)[:, None]
    return sums


def reduce_mean_gradient(id_indices: npt.ArrayLike, grads: npt.ArrayLike) -> Float32Array:
    """float32[n, d]: the gradient of each row, its bag's by the number of the bag's rows."""
    upstream = as_floats("grads", grads, shape=(-1, -1))
    places = _places(id_indices, None)
    counts = np.bincount(places, minlength=upstream.shape[0])
    if counts.size > upstream.shape[0]:
        raise InvalidRequestError(f"row {counts.size - 1} is outside 0..{upstream.shape[0] - 1}")
    return _spread(places, upstream / np.maximum(counts, 1).astype(np.float32)[:, None])


def reduce_norm(id_indices: npt.ArrayLike, id_values: npt.ArrayLike, rows: int) -> Float32Array:
    """Take the L2 norm of every bag, column by column; arguments as for `reduce_sum`.

    The reference system calls it sqrtn, which everywhere else is the sum divided by the root of the bag's size.
    """
    places, values = _bags(id_indices, id_values)
    squares = sum_rows_at(places, values * values, rows)
    return np.sqrt(squares, out=squares)


def reduce_norm_gradient(id_indices: npt.ArrayLike, id_values: npt.ArrayLike, grads: npt.ArrayLike) -> Float32Array:
    """float32[n, d]: the gradient of each row, its bag's times the row's share; 0 where the bag's norm is 0."""
    places, values = _bags(id_indices, id_values)
    upstream = as_floats("grads", grads, shape=(-1, values.shape[1]))
    norms = reduce_norm(places, values, upstream.shape[0])
    factors = np.divide(upstream, norms, out=np.zeros_like(norms), where=norms != 0)
    return values * factors[places]


def fused_reduce_sum_and_split(
    id_indices: npt.ArrayLike, id_values: npt.ArrayLike, rows: int, split_dims: Sequence[int]
) -> list[Float32Array]:
    """`reduce_sum`, cut into columns of the widths `split_dims`."""
    values = as_floats("id_values", id_values, shape=(-1, sum(split_dims)))
    return _columns(reduce_sum(id_indices, values, rows), split_dims)


def fused_reduce_sum_and_split_gradient(id_indices: npt.ArrayLike, grads: Sequence[npt.ArrayLike]) -> Float32Array:
    """float32[n, d]: per row the gradients of its bag's pieces side by side."""
    pieces = [as_floats(f"grads[{i}]", grad, shape=(-1, -1)) for i, grad in enumerate(grads)]
    return reduce_sum_gradient(id_indices, _joined(pieces))


def fused_sorted_segment_sum(
    indices: Sequence[npt.ArrayLike], values: Sequence[npt.ArrayLike], shapes: Sequence[Sequence[int]]
) -> list[Float32Array]:
    """Sum rows by segment, several items at once.

    Args:
        indices: Per item int[n], ascending.
        values: Per item float32[n, ...].
        shapes: Per item the shape of its result.

    Returns:
        Per item float32[shapes[i]], zeros where a segment has no rows.
    """
    if not len(indices) == len(values) == len(shapes):
        raise InvalidRequestError(f"{len(indices)} indices, {len(values)} values and {len(shapes)} shapes are no items")
    results = []
    for i, (index, value, shape) in enumerate(zip(indices, values, shapes, strict=True)):
        places, rows = as_integers(f"indices[{i}]", index), as_floats(f"values[{i}]", value)
        wanted = tuple(int(each) for each in shape)
        if places.ndim < 1 or rows.ndim < 1 or not wanted:
            raise InvalidRequestError(f"item {i}: indices, values and shape must have at least one dimension")
        if places.ndim != 1:
            raise InvalidRequestError(f"indices[{i}] have shape {places.shape}, (n,) is needed")
        width = int(np.prod(wanted[1:]))
        if (places.size == 0) != (rows.size == 0) and width:
            raise InvalidRequestError(f"item {i}: of indices and values only one is empty")
        if places.size and rows.shape != (places.size, *wanted[1:]):
            raise InvalidRequestError(f"values[{i}] have shape {rows.shape}, {(places.size, *wanted[1:])} is needed")
        if (places[1:] < places[:-1]).any():
            raise InvalidRequestError(f"indices[{i}] do not ascend: {places[:32].tolist()}")
        results.append(sum_rows_at(places, rows.reshape(places.size, width), wanted[0]).reshape(wanted))
    return results


def fused_sorted_segment_sum_gradient(
    indices: Sequence[npt.ArrayLike], grads: Sequence[npt.ArrayLike]
) -> list[Float32Array]:
    """Per item float32[n, ...]: the gradient of each row, which is its segment's."""
    if len(indices) != len(grads):
        raise InvalidRequestError(f"{len(grads)} gradients for {len(indices)} items")
    results = []
    for i, (index, grad) in enumerate(zip(indices, grads, strict=True)):
        upstream, places = as_floats(f"grads[{i}]", grad), as_integers(f"indices[{i}]", index, shape=(-1,))
        _check_rows(places, upstream.shape[0])
        results.append(np.take(upstream, places, axis=0))
    return results


def fused_reduce_and_split(
    row_splits: Sequence[npt.ArrayLike], embeddings: Sequence[npt.ArrayLike], slice_dims: Sequence[Sequence[int]]
) -> list[Float32Array]:
    """Sum the rows of several tables' bags and cut the sums into columns.

    Args:
        row_splits: Per table int[B + 1].
        embeddings: Per table float32[n_t, d_t].
        slice_dims: Per table the widths of the pieces, d_t together.

    Returns:
        float32[B, width] piece by piece, table by table.
    """
    if not len(row_splits) == len(embeddings) == len(slice_dims):
        raise InvalidRequestError(
            f"{len(row_splits)} row splits, {len(embeddings)} embeddings and {len(slice_dims)} slice dims are no tables"
        )
    results: list[Float32Array] = []
    batch = None
    for t, (splits, rows, dims) in enumerate(zip(row_splits, embeddings, slice_dims, strict=True)):
        values = as_floats(f"embeddings[{t}]", rows, shape=(-1, sum(dims)))
        checked = as_splits(f"row_splits[{t}]", splits, values.shape[0])
        if batch is not None and checked.size != batch:
            raise InvalidRequestError(f"row_splits[{t}] have {checked.size - 1} rows, those before have {batch - 1}")
        batch = checked.size
        results += fused_reduce_sum_and_split(value_rowids(checked), values, checked.size - 1, dims)
    return results


def fused_reduce_and_split_gradient(
    row_splits: Sequence[npt.ArrayLike], grads: Sequence[npt.ArrayLike], slice_dims: Sequence[Sequence[int]]
) -> list[Float32Array]:
    """Per table float32[n_t, d_t], from the gradients of all pieces in the order of `fused_reduce_and_split`."""
    if len(row_splits) != len(slice_dims) or len(grads) != sum(map(len, slice_dims)):
        raise InvalidRequestError(f"{len(grads)} gradients and {len(row_splits)} row splits do not fit {slice_dims}")
    results, start = [], 0
    for splits, dims in zip(row_splits, slice_dims, strict=True):
        results.append(fused_reduce_sum_and_split_gradient(value_rowids(splits), grads[start : start + len(dims)]))
        start += len(dims)
    return results


def _check_rows(places: Int64Array, rows: int) -> None:
    """Raise for a place outside 0..rows - 1."""
    outside = (places < 0) | (places >= rows)
    if outside.any():
        raise InvalidRequestError(f"row {places[outside.argmax()]} is outside 0..{rows - 1}")


def sum_rows_at(rows: npt.ArrayLike, values: npt.ArrayLike, count: int) -> Float32Array:
    """Zeros, float32[count, d], onto whose row rows[i] the row values[i] is added.

    Args:
        rows: int64 of any shape, in 0..count - 1.
        values: float32[*rows.shape, d].
        count: Number of rows of the result.
    """
    places, grads = as_integers("rows", rows).reshape(-1), as_floats("values", values)
    _check_rows(places, count)
    out = np.zeros((count, grads.shape[-1]), np.float32)
    np.add.at(out, places, grads.reshape(places.size, grads.shape[-1]))
    return out


def _bags(id_indices: npt.ArrayLike, id_values: npt.ArrayLike) -> tuple[Int64Array, Float32Array]:
    values = as_floats("id_values", id_values, shape=(-1, -1))
    return _places(id_indices, values.shape[0]), values


def _places(id_indices: npt.ArrayLike, n: int | None) -> Int64Array:
    places = as_integers("id_indices", id_indices)
    if places.ndim == 2 and places.shape[1] >= 1:
        places = np.ascontiguousarray(places[:, 0])
    if places.ndim != 1 or (n is not None and places.size != n):
        raise InvalidRequestError(f"id_indices have shape {places.shape}, one for each of {n} rows is needed")
    if places.size and places.min() < 0:
        raise InvalidRequestError(f"row {places.min()} is negative")
    return places


def _spread(id_indices: npt.ArrayLike, upstream: Float32Array) -> Float32Array:
    places = _places(id_indices, None)
    _check_rows(places, upstream.shape[0])
    return np.take(upstream, places, axis=0)


def _columns(values: Float32Array, widths: Sequence[int]) -> list[Float32Array]:
    pieces = np.split(values, np.cumsum(widths)[:-1], axis=1)
    return [np.ascontiguousarray(piece) for piece in pieces]


def _joined(pieces: Sequence[Float32Array]) -> Float32Array:
    try:
        return np.concatenate(pieces, axis=1)
    except ValueError as error:
        raise InvalidRequestError(f"the gradients of the pieces do not fit together: {error}") from None
