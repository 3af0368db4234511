"""Bags of ids in every form a caller may have them, made into one: a `Ragged` of uint64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trilith.arrays import id_array
from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Int64Array, Ragged

__all__ = ["IdsLike", "as_bags", "as_ids"]

UInt64Array: TypeAlias = npt.NDArray[np.uint64]
IdsLike: TypeAlias = (
    Ragged[Any]
    | Tensor
    | npt.NDArray[Any]
    | Sequence[int]
    | Sequence[Sequence[int]]
    | tuple[Tensor | npt.NDArray[Any], Tensor | npt.NDArray[Any]]
)


def as_ids(ids: Any) -> UInt64Array:
    """Make uint64 of integers of any kind, shape kept and C-contiguous; negative ones keep their 64-bit pattern."""
    try:
        array = id_array("a batch", ids)
    except InvalidRequestError as error:
        if isinstance(ids, Sequence) and any(isinstance(each, Sequence) for each in ids):
            raise InvalidRequestError(
                f"{error}; lists of different lengths are a Ragged: trilith.data.Ragged.of(lists)"
            ) from None
        raise
    return np.ascontiguousarray(array).reshape(array.shape)


def as_bags(
    ids: IdsLike,
    offsets: Tensor | npt.NDArray[Any] | None = None,
    *,
    row_splits: Tensor | npt.NDArray[Any] | None = None,
    lengths: Tensor | npt.NDArray[Any] | None = None,
) -> Ragged[np.uint64]:
    """Make bags of any of the accepted forms; without a copy where the form is one array of 64-bit integers.

    Args:
        ids: A `Ragged`, as parsed batches hold them; or a jagged nested tensor; or [b, k], a bag per row, cut to
            `lengths` where given; or [n] with one of the others; or [n] alone, one id per bag; or two arrays or tensors
            [n] and [b], ids and offsets.
        offsets: [b], where each bag starts, as `torch.nn.EmbeddingBag` has it.
        row_splits: [b + 1], where each bag starts and the last one ends.
        lengths: [b], size of each bag.
    """
    if isinstance(ids, tuple) and len(ids) == 2 and all(isinstance(each, (Tensor, np.ndarray)) for each in ids):
        if offsets is not None:
            raise InvalidRequestError("ids in a pair carry their own offsets; offsets cannot be given too")
        ids, offsets = ids  # type: ignore[assignment] # a pair of arrays, as was just seen
    given = [
        name
        for name, value in (("offsets", offsets), ("row_splits", row_splits), ("lengths", lengths))
        if value is not None
    ]
    if len(given) > 1:
        raise InvalidRequestError(f"{' and '.join(given)} say the same thing; give one of them")
    nested = isinstance(ids, Tensor) and ids.is_nested
    if isinstance(ids, Ragged) or nested:
        if given:
            raise InvalidRequestError(f"ragged ids carry their own splits; {given[0]} cannot be given too")
        if isinstance(ids, Ragged):
            bags = Ragged(as_ids(ids.values), ids.row_splits)
        else:
            parts: Any = ids
            bags = Ragged(as_ids(parts.values()), _integers("offsets", parts.offsets()))
        bags.check()
        return bags
    flat = as_ids(ids)
    if flat.ndim == 2:
        return _padded(flat, given, lengths)
    if flat.ndim != 1:
        raise InvalidRequestError(f"ids have shape {flat.shape}; [n] or [b, k] is needed")
    if lengths is not None:
        sizes = _integers("lengths", lengths)
    elif row_splits is not None:
        bags = Ragged(flat, _integers("row_splits", row_splits))
        bags.check()
        return bags
    elif offsets is not None:
        starts = _integers("offsets", offsets)
        if starts.size and starts[0] != 0:
            raise InvalidRequestError(f"offsets start at {starts[0]}, not at 0")
        sizes = np.diff(starts, append=flat.size) if starts.size else starts
    else:
        return Ragged(flat, np.arange(flat.size + 1))
    if (sizes < 0).any() or int(sizes.sum()) != flat.size:
        raise InvalidRequestError(f"{given[0]} do not cut {flat.size} ids into bags")
    return Ragged.of_lengths(flat, sizes)


def _padded(table: UInt64Array, given: list[str], lengths: Tensor | npt.NDArray[Any] | None) -> Ragged[np.uint64]:
    if given and given != ["lengths"]:
        raise InvalidRequestError(f"padded ids of shape {table.shape} go with lengths, not with {given[0]}")
    bags, width = table.shape
    if lengths is None:
        return Ragged(table.reshape(-1), np.arange(bags + 1) * width)
    sizes = _integers("lengths", lengths)
    if sizes.size != bags or (sizes < 0).any() or (sizes > width).any():
        raise InvalidRequestError(f"lengths must be {bags} numbers in 0..{width} for padded ids of shape {table.shape}")
    return Ragged.of_lengths(table[np.arange(width) < sizes[:, None]], sizes)


def _integers(name: str, values: Tensor | npt.NDArray[Any]) -> Int64Array:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidRequestError(f"{name} must be one-dimensional integers, not {array.dtype}{list(array.shape)}")
    return array.astype(np.int64, copy=False)
