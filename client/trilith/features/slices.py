"""Combined vectors cut into the slices that a model asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.combiners import CombinerLike, combiner_of
from trilith.ops.pool import pool_rows
from trilith.ops.ragged import as_floats, as_integers, as_splits

__all__ = ["create_embedding_slices", "dummy_lookup_shape", "row_mask"]


def create_embedding_slices(
    embeddings: Mapping[str, npt.ArrayLike],
    row_splits: Mapping[str, npt.ArrayLike],
    combiners: Mapping[str, CombinerLike],
    slice_dims: Mapping[str, Sequence[int]],
) -> dict[str, npt.NDArray[np.float32]]:
    """Combine every feature's vectors and cut the results.

    Args:
        embeddings: By feature float32[n, d].
        row_splits: By feature int[rows + 1].
        combiners: By feature.
        slice_dims: By feature the widths of the slices the model asked for, d together.

    Returns:
        By "feature:start_end" float32[rows, width], or [rows, n, width] for FirstN.
    """
    slices = {}
    for feature, embedding in embeddings.items():
        rows = as_floats(f"embeddings of {feature!r}", embedding, shape=(-1, -1))
        splits = as_splits(f"row_splits of {feature!r}", row_splits[feature], rows.shape[0])
        combined = pool_rows(rows, splits, combiner_of(combiners[feature]))
        dims = list(slice_dims[feature])
        if sum(dims) != combined.shape[-1] or min(dims, default=0) < 1:
            raise InvalidRequestError(f"feature {feature!r}: slices {dims} do not cut {combined.shape[-1]} columns")
        start = 0
        for width in dims:
            slices[f"{feature}:{start}_{start + width}"] = combined[..., start : start + width]
            start += width
    return slices


def dummy_lookup_shape(batch_size: int, start: int, end: int, seq_length: int = 0) -> tuple[int, ...]:
    """The shape of a slice's lookup before there are tables: [batch, width], or [batch, n, width] for FirstN(n)."""
    if batch_size < 0 or seq_length < 0 or not 0 <= start < end:
        raise InvalidRequestError(f"slice {start}..{end} of batch {batch_size}, sequence {seq_length}, has no shape")
    return (batch_size, seq_length, end - start) if seq_length else (batch_size, end - start)


def row_mask(seq_length: int, row_lengths: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """int32[rows, seq_length]: 1 where a row has a value."""
    if seq_length < 1:
        raise InvalidRequestError(f"seq_length={seq_length} is below 1")
    lengths = as_integers("row_lengths", row_lengths, shape=(-1,))
    return (np.arange(seq_length) < lengths[:, None]).astype(np.int32)
