"""Bags of ids in every form a caller may have them, made into one: a `Ragged` of uint64, and weights of the ids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trilith.arrays import id_array
from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Int64Array, Ragged, as_splits
from trilith.ops.strings import HashedIds, hash_strings, string_array

__all__ = [
    "IdsLike",
    "Lists",
    "as_bags",
    "as_floats",
    "as_ids",
    "is_arrow",
    "is_keyed",
    "is_pair",
    "plain",
    "read_bags",
    "read_keyed",
    "read_lists",
    "to_kjt",
]

UInt64Array: TypeAlias = npt.NDArray[np.uint64]
Float32Array: TypeAlias = npt.NDArray[np.float32]
IdsLike: TypeAlias = Any
"""A form of ids that `as_bags` takes."""
Lists: TypeAlias = tuple[Any, Int64Array, Any]
"""Values of any kind [m], row splits, weights [m] or None."""


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
        ids: A `Ragged`, as parsed batches hold them; [b], one id per bag; [b, k], a bag per row, cut to `lengths` where
            given; [n] with one of the others; lists of lists; two arrays or tensors [n] and [b], ids and offsets; a
            nested tensor; a mapping with "values" and "row_splits", "offsets" or "lengths"; a torchrec JaggedTensor; or
            an Arrow array of ids or lists of them. Ids are integers of 64 bits, or strings, which are hashed by
            `trilith.ops.strings.hash_strings`. A null is no id.
        offsets: [b], where each bag starts, as `torch.nn.EmbeddingBag` has it.
        row_splits: [b + 1], where each bag starts and the last one ends.
        lengths: [b], size of each bag.

    Raises:
        InvalidRequestError: It is nothing of that, or does not fit together.
    """
    said = {"offsets": offsets, "row_splits": row_splits, "lengths": lengths}
    given = {name: value for name, value in said.items() if value is not None}
    if len(given) > 1:
        raise InvalidRequestError(f"{' and '.join(given)} say the same thing; give one of them")
    own = is_pair(ids) or isinstance(ids, Ragged | Mapping) or _is_jagged(ids) or (_is_tensor(ids) and ids.is_nested)
    if given and own:
        raise InvalidRequestError(f"ids of this form carry their own splits; {next(iter(given))} cannot be given too")
    if given and lengths is None:
        ids = {"values": ids, **given}
    return read_bags("a batch", ids, lengths=lengths)[0]


def read_bags(
    who: str,
    given: Any,
    *,
    lengths: Any = None,
    weights: Any = None,
    samples: int | None = None,
    padding: int | None = None,
    seed: int = 0,
) -> tuple[Ragged[np.uint64], Float32Array | None, bool]:
    """Ids in any form of `as_bags`, weights of them or None, and whether they were text.

    Args:
        who: For messages.
        given: The ids.
        lengths: [b], how many each sample has, where ids are flat or padded.
        weights: One of each id, in any form of the same lists; None: those that come with the ids, if any do.
        samples: How many there are, if other columns say so: tells whether offsets have their end.
        padding: An id that fills padded rows up and is none; None: every id counts.
        seed: Of the hash of strings.
    """
    values, splits, of_ids = read_lists(who, given, lengths, samples)
    if weights is not None:
        of_ids, own, _ = read_lists(f"weights of {who}", weights, lengths, samples)
        if not np.array_equal(own, splits):
            raise InvalidRequestError(f"{who}: its weights are not as many as its ids in each sample")
    keep = _are_there(values)
    ids = _ids_of(who, values if keep is None else _taken(values, keep), seed)
    if padding is not None:
        real = ids != np.uint64(padding & 0xFFFFFFFFFFFFFFFF)
        if not real.all():
            if keep is None:
                keep = real
            else:
                keep = keep.copy()
                keep[keep] = real
            ids = ids[real]
    floats = None if of_ids is None else as_floats(f"weights of {who}", of_ids)
    if floats is not None and floats.ndim != 1:
        raise InvalidRequestError(f"weights of {who} have shape {floats.shape}; one of each id is needed")
    if keep is not None:
        kept = np.zeros(keep.size + 1, np.int64)
        np.cumsum(keep, out=kept[1:])
        splits = kept[splits]
        floats = None if floats is None else floats[keep]
    return Ragged(ids, splits), floats, bool(ids.size) and (isinstance(given, HashedIds) or _is_hashed(values))


def read_keyed(batch: Any) -> tuple[dict[str, Ragged[np.uint64]], dict[str, Float32Array]]:
    """The bags of a torchrec KeyedJaggedTensor, and weights of their ids where it has any, by key."""
    bags, weights = {}, {}
    for name, jagged in batch.to_dict().items():
        bags[name], of_ids, _ = read_bags(f"key {name!r}", jagged)
        if of_ids is not None:
            weights[name] = of_ids
    return bags, weights


def to_kjt(ids: Mapping[str, IdsLike], *, weights: Mapping[str, Any] | None = None) -> Any:
    """A torchrec KeyedJaggedTensor of bags by key: int64 ids by their bits, int64 lengths, float32 weights.

    Args:
        ids: By key, in any form of `as_bags`; one number of samples for all.
        weights: By key float32[n] of its ids; a key without has ones. None: ids have no weights.

    Raises:
        InvalidRequestError: torchrec is not installed, or keys differ in their number of samples.
    """
    try:
        from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
    except ImportError as error:
        raise InvalidRequestError(f"to_kjt makes a KeyedJaggedTensor of torchrec, which is not here: {error}") from None
    bags = {name: as_bags(each) for name, each in ids.items()}
    sizes = {name: len(each) for name, each in bags.items()}
    if len(set(sizes.values())) > 1:
        raise InvalidRequestError(f"keys differ in their number of samples: {sizes}")
    if strange := sorted((weights or {}).keys() - bags.keys()):
        raise InvalidRequestError(f"weights of {strange}, which are no keys; there are {sorted(bags)}")
    of_ids = None
    if weights is not None:
        parts = [as_floats(name, weights.get(name, np.ones(each.values.size))) for name, each in bags.items()]
        for (name, each), part in zip(bags.items(), parts, strict=True):
            if part.shape != each.values.shape:
                raise InvalidRequestError(f"key {name!r}: {each.values.size} ids have weights {list(part.shape)}")
        of_ids = torch.from_numpy(np.concatenate([np.empty(0, np.float32), *parts]))
    values = np.concatenate([np.empty(0, np.uint64), *(each.values for each in bags.values())])
    lengths = np.concatenate([np.empty(0, np.int64), *(each.lengths for each in bags.values())])
    return KeyedJaggedTensor.from_lengths_sync(
        keys=list(bags),
        values=torch.from_numpy(values.view(np.int64)),
        lengths=torch.from_numpy(lengths),
        weights=of_ids,
    )


# ---- lists of values -------------------------------------------------------------------------------------------------


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def is_keyed(value: Any) -> bool:
    """Whether it is torchrec's KeyedJaggedTensor, by its methods."""
    return all(hasattr(value, name) for name in ("keys", "values", "lengths", "to_dict")) and not isinstance(
        value, Mapping
    )


def _is_jagged(value: Any) -> bool:
    """Whether it is torchrec's JaggedTensor, by its methods."""
    return all(hasattr(value, name) for name in ("values", "lengths", "weights_or_none"))


def is_pair(value: Any) -> bool:
    """Whether it is values and offsets, as two arrays or tensors."""
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(each, Tensor | np.ndarray) for each in value)


def read_lists(who: str, given: Any, lengths: Any, rows: int | None) -> Lists:
    """Any form of lists as values and row splits."""
    if isinstance(given, Ragged):
        given.check()
        return given.values, given.row_splits, None
    if isinstance(given, Mapping):
        return _of_parts(who, given, rows)
    if _is_jagged(given):
        values, found = plain(given.values()), _splits_of_lengths(who, given.lengths(), len(given.values()))
        return values, found, plain(given.weights_or_none())
    if isinstance(given, Tensor) and given.is_nested:
        if given.layout != torch.jagged:
            parts = list(given.unbind())
            return read_lists(who, [plain(part) for part in parts], None, rows)
        jagged: Any = given
        return plain(jagged.values()), _splits(who, "offsets", jagged.offsets(), jagged.values().shape[0]), None
    if is_pair(given):
        return _of_parts(who, {"values": given[0], "offsets": given[1]}, rows)
    if is_arrow(given):
        return _of_arrow(who, given, lengths)
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        return _of_sequence(who, given, lengths)
    values = plain(given)
    if values.ndim == 2:
        return _of_padded(who, values, lengths)
    if values.ndim != 1:
        raise InvalidRequestError(f"{who} has shape {values.shape}; [b], one of each sample, or [b, k] is needed")
    if values.dtype == object and len(values) and isinstance(_first_that_is(values), list | tuple | np.ndarray):
        return _of_sequence(who, values.tolist(), lengths)
    return _flat(who, values, lengths)


def _flat(who: str, values: Any, lengths: Any) -> Lists:
    """[n], cut by lengths, or one of each sample."""
    if lengths is not None:
        return values, _splits_of_lengths(who, lengths, len(values)), None
    return values, np.arange(len(values) + 1, dtype=np.int64), None


def _of_parts(who: str, parts: Mapping[str, Any], rows: int | None) -> Lists:
    values = plain(parts["values"])
    values = string_array(values) if _is_text(values) else values
    if isinstance(values, np.ndarray) and values.ndim != 1:
        raise InvalidRequestError(f"{who} has values of shape {values.shape}, not [n]; padded ids go with lengths")
    size = len(values)
    weights = plain(parts["weights"]) if parts.get("weights") is not None else None
    if "row_splits" in parts:
        return values, _splits(who, "row_splits", parts["row_splits"], size), weights
    if "lengths" in parts:
        return values, _splits_of_lengths(who, parts["lengths"], size), weights
    if "offsets" not in parts:
        raise InvalidRequestError(f"{who} has values, and neither row_splits nor offsets nor lengths")
    offsets = _integers(who, "offsets", parts["offsets"])
    # [b + 1] runs to the end; [b] does not, unless the last sample is empty: then the other columns say which it is.
    whole = offsets.size > 0 and offsets[-1] == size and (rows == offsets.size - 1 if rows is not None else False)
    return values, _splits(who, "offsets", offsets if whole else np.append(offsets, size), size), weights


def _of_padded(who: str, values: npt.NDArray[Any], lengths: Any) -> Lists:
    count, width = values.shape
    if lengths is None:
        return values.reshape(-1), np.arange(count + 1, dtype=np.int64) * width, None
    sizes = _integers(who, "lengths", lengths)
    if sizes.size != count or (sizes < 0).any() or (sizes > width).any():
        raise InvalidRequestError(f"{who}: lengths must be {count} numbers in 0..{width}, for shape {values.shape}")
    return values[np.arange(width) < sizes[:, None]], _cumulated(sizes), None


def _of_sequence(who: str, given: Sequence[Any], lengths: Any) -> Lists:
    """A list of values, or of lists, arrays or tensors of values; None is an empty one."""
    first = next((each for each in given if each is not None), None)
    if (
        first is None
        or isinstance(first, str | bytes)
        or not (hasattr(first, "__len__") and np.ndim(plain(first)) == 1)
    ):
        if isinstance(first, Tensor | np.generic | np.ndarray):
            return _flat(who, np.asarray([plain(each) for each in given]), lengths)
        return _flat(who, list(given), lengths)
    pieces: list[Any] = [() if each is None else each for each in given]
    splits = _cumulated(np.fromiter((len(each) for each in pieces), np.int64, len(pieces)))
    if all(isinstance(each, Tensor | np.ndarray) for each in given):
        return (np.concatenate([plain(each) for each in given]) if given else np.empty(0, np.int64)), splits, None
    return [value for each in pieces for value in (each.tolist() if hasattr(each, "tolist") else each)], splits, None


def _of_arrow(who: str, given: Any, lengths: Any) -> Lists:
    import pyarrow as pa

    array = given.combine_chunks() if isinstance(given, pa.ChunkedArray) else given
    kind, is_ = array.type, pa.types
    if is_.is_map(kind):
        offsets = np.asarray(array.offsets, np.int64)  # a null map may still have entries behind it
        sizes = np.where(np.asarray(array.is_valid()), offsets[1:] - offsets[:-1], 0)
        entries = array.drop_null() if array.null_count else array
        bounds = np.asarray(entries.offsets, np.int64)
        first, size = int(bounds[0]), int(bounds[-1] - bounds[0])
        return entries.keys.slice(first, size), _cumulated(sizes), np.asarray(entries.items.slice(first, size))
    if (
        is_.is_list(kind)
        or is_.is_large_list(kind)
        or is_.is_fixed_size_list(kind)
        or is_.is_list_view(kind)
        or is_.is_large_list_view(kind)
    ):
        sizes = np.asarray(array.value_lengths().fill_null(0), np.int64)
        return array.flatten(), _cumulated(sizes), None
    return _flat(who, array, lengths)


def is_arrow(value: Any) -> bool:
    """Whether it is an array of Arrow's."""
    return type(value).__module__.partition(".")[0] == "pyarrow"


def _is_text(values: Any) -> bool:
    if isinstance(values, np.ndarray):
        return values.dtype.kind in "US" or (values.dtype == object and isinstance(_first_that_is(values), str | bytes))
    return isinstance(values, list) and isinstance(_first_that_is(values), str | bytes)


def _first_that_is(values: Any) -> Any:
    return next((each for each in values if each is not None), None)


def plain(values: Any) -> Any:
    """A tensor as an array; what Arrow or pandas hold as it is, or as an array."""
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    if values is None or isinstance(values, list) or is_arrow(values):
        return values
    if hasattr(values, "to_arrow"):  # polars
        return values.to_arrow()
    return np.asarray(values)


def _are_there(values: Any) -> npt.NDArray[np.bool_] | None:
    """Which values are not null; None: all."""
    if is_arrow(values):
        return None if not values.null_count else np.asarray(values.is_valid())
    if isinstance(values, list) or (isinstance(values, np.ndarray) and values.dtype == object):
        there = np.fromiter((each is not None for each in values), np.bool_, len(values))
        return None if there.all() else there
    return None


def _taken(values: Any, keep: npt.NDArray[np.bool_]) -> Any:
    if is_arrow(values):
        return values.drop_null()
    if isinstance(values, list):
        return [value for value, there in zip(values, keep, strict=True) if there]
    return values[keep]


def _ids_of(who: str, values: Any, seed: int) -> npt.NDArray[np.uint64]:
    """uint64 of integers, or of strings by their hash."""
    if _is_hashed(values):
        return _hashed(who, values, seed)
    if is_arrow(values):
        values = np.asarray(values.dictionary_decode() if hasattr(values, "dictionary_decode") else values)
    elif isinstance(values, np.ndarray) and values.dtype == object:
        values = values.tolist()
    return np.ascontiguousarray(id_array(who, values))


def _is_hashed(values: Any) -> bool:
    """Whether ids are made of them by a hash: of text, and of whatever Arrow has that is no integer."""
    if not is_arrow(values):
        return _is_text(values)
    import pyarrow as pa

    return not pa.types.is_integer(values.type.value_type if pa.types.is_dictionary(values.type) else values.type)


def _hashed(who: str, values: Any, seed: int) -> npt.NDArray[np.uint64]:
    try:
        return hash_strings(values, seed=seed)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{who}: ids are integers or strings; {error}") from None


def as_floats(who: str, values: Any) -> Float32Array:
    """float32 of numbers in any form, shape kept; a null is NaN."""
    if is_arrow(values):
        values = values.to_numpy(zero_copy_only=False)
    array = np.asarray(values)
    if array.dtype == object:
        try:
            array = np.array([math.nan if each is None else each for each in array.tolist()], np.float32)
        except (TypeError, ValueError):
            raise InvalidRequestError(f"{who} has values that are no numbers") from None
    if array.dtype.kind not in "fiub" and array.size:
        raise InvalidRequestError(f"{who} is of {array.dtype}, numbers are needed")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, np.float32)


def _integers(who: str, name: str, values: Any) -> Int64Array:
    array = plain(values)
    array = np.asarray(array)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidRequestError(f"{who}: {name} must be integers [n], not {array.dtype}{list(array.shape)}")
    return array.astype(np.int64)


def _cumulated(lengths: Int64Array) -> Int64Array:
    splits = np.zeros(lengths.size + 1, np.int64)
    np.cumsum(lengths, out=splits[1:])
    return splits


def _splits(who: str, name: str, values: Any, size: int) -> Int64Array:
    return as_splits(f"{who}: {name}", _integers(who, name, values), size)


def _splits_of_lengths(who: str, lengths: Any, size: int) -> Int64Array:
    sizes = _integers(who, "lengths", lengths)
    if (sizes < 0).any() or int(sizes.sum()) != size:
        raise InvalidRequestError(f"{who}: its lengths add up to {int(sizes.sum())}, there are {size} values")
    return _cumulated(sizes)
