"""Combined vectors cut into the slices that a model asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.features.combiners import Combiner, combine

__all__ = ["create_embedding_slices", "dummy_lookup_shape"]


def create_embedding_slices(
    embeddings: Mapping[str, npt.ArrayLike],
    row_splits: Mapping[str, npt.ArrayLike],
    combiners: Mapping[str, Combiner],
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
        combined = combine(combiners[feature], row_splits[feature], embedding)
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
