"""Combiners: how the vectors of a row become one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.layout_config import PoolingType
from trilith.ops.ragged import as_floats, as_integers, as_splits, value_rowids

__all__ = ["Combiner", "FirstN", "ReduceMean", "ReduceSum", "combine", "combiner_of", "row_mask"]


@dataclass(frozen=True, slots=True)
class ReduceSum:
    """The sum of a row's vectors."""

    @property
    def pooling_type(self) -> PoolingType:
        """The same in fused layouts."""
        return PoolingType.SUM

    @property
    def max_seq_length(self) -> int:
        """Vectors kept of a row; 0 where they become one."""
        return 0


@dataclass(frozen=True, slots=True)
class ReduceMean:
    """The mean of a row's vectors; zeros for a row without any."""

    @property
    def pooling_type(self) -> PoolingType:
        """The same in fused layouts."""
        return PoolingType.MEAN

    @property
    def max_seq_length(self) -> int:
        """Vectors kept of a row; 0 where they become one."""
        return 0


@dataclass(frozen=True, slots=True)
class FirstN:
    """A row's first `max_seq_length` vectors side by side, zeros after the last; longer rows are cut."""

    max_seq_length: int

    def __post_init__(self) -> None:
        if self.max_seq_length < 1:
            raise InvalidRequestError(f"FirstN({self.max_seq_length}): n must be at least 1")

    @property
    def pooling_type(self) -> PoolingType:
        """The same in fused layouts."""
        return PoolingType.FIRSTN


Combiner: TypeAlias = ReduceSum | ReduceMean | FirstN

_FIRST = re.compile(r"FirstN\((\d+)\)")


def combiner_of(text: str) -> Combiner:
    """The combiner with this text: "ReduceSum", "ReduceMean" or "FirstN(n)"."""
    name = text.removesuffix("()")
    if name in ("ReduceSum", "ReduceMean"):
        return ReduceSum() if name == "ReduceSum" else ReduceMean()
    first = _FIRST.fullmatch(text)
    if first is None:
        raise InvalidRequestError(f"combiner {text!r} is none of ReduceSum, ReduceMean, FirstN(n)")
    return FirstN(int(first[1]))


def combine(combiner: Combiner, row_splits: npt.ArrayLike, embedding: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Make one of the vectors of every row.

    Args:
        combiner: How.
        row_splits: int[rows + 1] of the vectors.
        embedding: float32[n, d].

    Returns:
        float32[rows, d], or [rows, n, d] for FirstN.
    """
    from trilith.ops.reduce import reduce_sum

    vectors = as_floats("embedding", embedding, shape=(-1, -1))
    splits = as_splits("row_splits", row_splits, vectors.shape[0])
    places, rows = value_rowids(splits), splits.size - 1
    if isinstance(combiner, FirstN):
        within = np.arange(places.size) - splits[places]
        kept = within < combiner.max_seq_length
        out = np.zeros((rows, combiner.max_seq_length, vectors.shape[1]), np.float32)
        out[places[kept], within[kept]] = vectors[kept]
        return out
    sums = reduce_sum(places, vectors, rows)
    if isinstance(combiner, ReduceMean):
        sums /= np.maximum(np.diff(splits), 1).astype(np.float32)[:, None]
    return sums


def row_mask(seq_length: int, row_lengths: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """int32[rows, seq_length]: 1 where a row has a value."""
    if seq_length < 1:
        raise InvalidRequestError(f"seq_length={seq_length} is below 1")
    lengths = as_integers("row_lengths", row_lengths, shape=(-1,))
    return (np.arange(seq_length) < lengths[:, None]).astype(np.int32)
