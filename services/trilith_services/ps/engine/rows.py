"""Batches of ids, and rows copied out of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.shard import Float32Array, UInt64Array

__all__ = ["Rows", "as_counts", "check_target", "checked_ids"]

_UINT64 = np.dtype(np.uint64)  # compared with a third of the work that the class takes


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows copied out of a table.

    Attributes:
        ids: uint64[n].
        weights: float32[n, dim], raw (decoded where the table stores them compressed).
        state: float32[n, state_floats], optimizer state; no columns for a serving table.
        last_update: uint32[n], Unix seconds.
    """

    ids: UInt64Array
    weights: Float32Array
    state: Float32Array
    last_update: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, selection: npt.NDArray[Any]) -> Rows:
        """The rows that an index or mask array selects."""
        return Rows(*(column[selection] for column in (self.ids, self.weights, self.state, self.last_update)))

    @staticmethod
    def concatenate(pieces: Sequence[Rows]) -> Rows:
        """All rows of at least one piece, in order."""
        return Rows(
            np.concatenate([piece.ids for piece in pieces]),
            np.concatenate([piece.weights for piece in pieces]),
            np.concatenate([piece.state for piece in pieces]),
            np.concatenate([piece.last_update for piece in pieces]),
        )


def checked_ids(ids: npt.NDArray[Any]) -> UInt64Array:
    """uint64[n] over 64-bit ids of either signedness, C-contiguous."""
    if not isinstance(ids, np.ndarray):
        raise InvalidRequestError(f"ids are {type(ids).__name__}, expected an array uint64[n] or int64[n]")
    if ids.dtype == _UINT64 and ids.ndim == 1 and ids.flags.c_contiguous:
        return ids
    if ids.dtype == np.int64:
        ids = ids.view(np.uint64)
    if ids.dtype != _UINT64 or ids.ndim != 1:
        raise InvalidRequestError(f"ids are {ids.dtype}{list(ids.shape)}, expected uint64[n] or int64[n]")
    return np.ascontiguousarray(ids)


def as_counts(counts: Any, n: int) -> npt.NDArray[np.uint32] | None:
    """uint32[n], C-contiguous, of integers of any width that fit; None stays None."""
    if counts is None:
        return None
    if not isinstance(counts, np.ndarray) or counts.dtype.kind not in "iu" or counts.shape != (n,):
        what = f"{counts.dtype}{list(counts.shape)}" if isinstance(counts, np.ndarray) else type(counts).__name__
        raise InvalidRequestError(f"counts are {what}, expected uint32[{n}]")
    if counts.dtype != np.uint32 and n and not 0 <= int(counts.min()) <= int(counts.max()) < 1 << 32:
        raise InvalidRequestError(f"counts from {counts.min()} to {counts.max()} are outside 0..{(1 << 32) - 1}")
    return np.ascontiguousarray(counts, np.uint32)


def check_target(name: str, array: npt.NDArray[Any], shape: tuple[int, ...], *kinds: npt.DTypeLike) -> None:
    """Refuse an array that a kernel could not write `shape` to: it writes element after element from the first on."""
    if not isinstance(array, np.ndarray):
        raise InvalidRequestError(f"{name} is {type(array).__name__}, expected an array")
    if array.shape != shape:
        raise InvalidRequestError(f"{name} is {array.shape}, expected {shape}")
    if array.dtype not in kinds:
        known = " or ".join(str(np.dtype(kind)) for kind in kinds)
        raise InvalidRequestError(f"{name} is {array.dtype}, expected {known}")
    if not array.flags.c_contiguous or not array.flags.writeable:
        kind = "read-only" if array.flags.c_contiguous else "no C-contiguous array"
        raise InvalidRequestError(f"{name} is {kind}: rows could not be written there")
