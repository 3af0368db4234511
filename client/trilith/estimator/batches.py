"""Batches: what a loader gives, in any of its forms, made into ids, weights, dense values and labels by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trilith.arrays import id_array
from trilith.data.parse.specs import INVALID_LABEL
from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Int64Array, Ragged, as_splits
from trilith.ops.strings import hash_strings, string_array

__all__ = ["Batch", "DenseColumn", "IdColumn", "LabelColumn", "Wanted", "arrange", "columns_of"]

Float32Array: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class IdColumn:
    """Ids of a feature: any number of each sample.

    Attributes:
        column: Where they are in a batch; empty: under the feature's own name.
        weights: Column with a weight of each id, of the same form; empty: those that come with the ids, if any do.
        lengths: Column with how many ids each sample has, of ids that are flat or padded.
        padding: An id that fills padded rows up and is none; None: every id counts.
        seed: Of the hash of strings; see `trilith.ops.strings.hash_strings`.
    """

    column: str = ""
    weights: str = ""
    lengths: str = ""
    padding: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseColumn:
    """Numbers of a feature: `dim` of each sample.

    Attributes:
        dim: How many.
        columns: Columns they are in, side by side; empty: the one of the feature's own name.
        fill: What stands for a value that is missing (null, NaN, or a list that is too short); None: that is refused.
    """

    dim: int = 1
    columns: tuple[str, ...] = ()
    fill: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelColumn:
    """A label: one number of each sample, which may be missing.

    Attributes:
        column: Where it is; empty: under the label's own name.
        index: Which of several numbers, in a column of lists or with two dimensions; None: there is one.
        low: Smallest that it may be.
        high: Largest that it may be.
        optional: A batch may lack the column; then all labels are missing.
    """

    column: str = ""
    index: int | None = None
    low: float = -math.inf
    high: float = math.inf
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a task wants of a batch, by its own names.

    Attributes:
        ids: Features with ids.
        dense: Features with numbers.
        labels: Labels.
    """

    ids: Mapping[str, IdColumn] = field(default_factory=dict)
    dense: Mapping[str, DenseColumn] = field(default_factory=dict)
    labels: Mapping[str, LabelColumn] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch in the one form that the rest works with.

    Attributes:
        rows: Samples.
        ids: uint64 ids of each sample, by feature.
        weights: float32[m], a weight of each id, of the features that have any.
        dense: float32[rows, dim] by feature, on the device where they were.
        labels: float32[rows] by label; what is missing is 0.
        masks: bool[rows] by label: which are there.
        rest: The columns that nothing was made of, as they came.
        texts: The features of `ids` whose ids came as text.
    """

    rows: int
    ids: Mapping[str, Ragged[np.uint64]]
    weights: Mapping[str, Float32Array]
    dense: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    rest: Mapping[str, Any]
    texts: frozenset[str] = frozenset()


def arrange(batch: Any, wanted: Wanted, *, labels: bool = True) -> Batch:
    """Take what a task wants out of a batch.

    A batch is anything that `columns_of` takes. Ids come as a `Ragged`; a feature of a torchrec KeyedJaggedTensor; a
    JaggedTensor; a nested tensor; [b], one of each sample; [b, k], padded; [n] with `lengths`; a pair of arrays or
    tensors, values and offsets; a mapping with "values" and "row_splits", "offsets" or "lengths", and perhaps
    "weights"; lists of lists; or an Arrow array of numbers, strings, lists of those, or maps from ids to weights. They
    are integers of 64 bits, or strings, which are hashed. A null is no id. Offsets are [b], as torch.nn.EmbeddingBag
    has them; or [b + 1] with their end, if other columns say that there are b samples.

    Args:
        batch: What a loader gave.
        wanted: By the task's names.
        labels: False: labels are not looked for, as in prediction.

    Raises:
        InvalidRequestError: A column is missing, is not of its form, has another number of samples than others, or a
            label is out of range; the message names feature and column.
    """
    columns = columns_of(batch)
    taken: set[str] = set()

    def column(what: str, name: str) -> Any:
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=1)
            hint = f"; do you mean {near[0]!r}?" if near else ""
            raise InvalidRequestError(f"{what}: a batch has no {name!r}, but {', '.join(map(repr, columns))}{hint}")
        taken.add(name)
        return columns[name]

    rows = _Rows()
    dense = {name: _dense(name, want, column, rows) for name, want in wanted.dense.items()}
    found_labels, masks = {}, {}
    for name, label in wanted.labels.items() if labels else ():
        if label.optional and (label.column or name) not in columns:
            continue
        found_labels[name], masks[name] = _label(name, label, column, rows)
    ids: dict[str, Ragged[np.uint64]] = {}
    weights: dict[str, Float32Array] = {}
    texts: set[str] = set()
    # Forms that say by themselves how many samples there are go first; offsets may need to know.
    for name, want in sorted(wanted.ids.items(), key=lambda each: _is_pair(columns.get(each[1].column or each[0]))):
        ids[name], of_ids, text = _ids(name, want, column, rows)
        if text:
            texts.add(name)
        if of_ids is not None:
            weights[name] = of_ids
    for name in wanted.labels if labels else ():
        if name not in found_labels:
            found_labels[name], masks[name] = torch.zeros(rows.count), torch.zeros(rows.count, dtype=torch.bool)
    return Batch(
        rows=rows.count,
        ids={name: ids[name] for name in wanted.ids},
        weights=weights,
        dense=dense,
        labels=found_labels,
        masks=masks,
        rest={name: value for name, value in columns.items() if name not in taken},
        texts=frozenset(texts),
    )


class _Rows:
    """How many samples the columns of a batch have: all as many."""

    def __init__(self) -> None:
        self._count: int | None = None
        self._who = ""

    @property
    def count(self) -> int:
        return self._count or 0

    @property
    def known(self) -> int | None:
        return self._count

    def see(self, who: str, count: int) -> None:
        if self._count is None:
            self._count, self._who = count, who
        elif self._count != count:
            raise InvalidRequestError(f"{who} has {count} samples, {self._who} has {self._count}")


_Column: TypeAlias = Callable[[str, str], Any]


# ---- columns by name -----------------------------------------------------------------------------------------------


def columns_of(batch: Any) -> dict[str, Any]:
    """The columns of a batch by name.

    Args:
        batch: A mapping; a dataclass or named tuple; an Arrow RecordBatch or Table; a pandas or polars DataFrame; or a
            torchrec KeyedJaggedTensor. A dataclass, named tuple or KeyedJaggedTensor among the columns gives its own.

    Raises:
        InvalidRequestError: It is nothing of that, or two columns have one name.
    """
    columns: dict[str, Any] = {}
    for name, value in _fields(batch).items():
        inner = {name: value} if _is_leaf(value) else columns_of(value)
        for each in inner:
            if each in columns:
                raise InvalidRequestError(f"two columns of a batch are called {each!r}")
        columns |= inner
    return columns


def _fields(batch: Any) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        return {str(name): value for name, value in batch.items()}
    if hasattr(batch, "column_names") and hasattr(batch, "column"):  # Arrow's RecordBatch, Table, and rows of them
        return {name: batch.column(name) for name in batch.column_names}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {each.name: getattr(batch, each.name) for each in dataclasses.fields(batch)}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return dict(zip(batch._fields, batch, strict=True))
    if _is_keyed_jagged(batch):
        return {name: batch[name] for name in batch.keys()}  # noqa: SIM118 - it is no mapping
    if hasattr(batch, "columns") and hasattr(batch, "__dataframe__"):
        return {str(name): batch[name] for name in batch.columns}
    if isinstance(batch, list | tuple):
        raise InvalidRequestError(
            f"a batch is a {type(batch).__name__} of {len(batch)}, whose columns have no names; let the loader's "
            "collate_fn return a mapping"
        )
    raise InvalidRequestError(f"a batch is a {type(batch).__name__}, not a mapping from names to columns")


def _is_keyed_jagged(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("keys", "values", "lengths", "to_dict")) and not isinstance(
        value, Mapping
    )


def _is_jagged(value: Any) -> bool:
    """Whether it is torchrec's JaggedTensor, by its methods."""
    return all(hasattr(value, name) for name in ("values", "lengths", "weights_or_none"))


def _is_leaf(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "values" in value  # ragged, taken apart
    if isinstance(value, Ragged):
        return True
    return not (
        (dataclasses.is_dataclass(value) and not isinstance(value, type))
        or (isinstance(value, tuple) and hasattr(value, "_fields"))
        or _is_keyed_jagged(value)
    )


# ---- ids -----------------------------------------------------------------------------------------------------------

_Splits: TypeAlias = Int64Array
_Lists: TypeAlias = tuple[Any, _Splits, Any]
"""Values of any kind [m], row splits, weights [m] or None."""


def _ids(
    name: str, want: IdColumn, column: _Column, rows: _Rows
) -> tuple[Ragged[np.uint64], Float32Array | None, bool]:
    """Ids, weights of them or None, and whether they were text."""
    where = want.column or name
    who = f"feature {name!r}" + (f" (column {where!r})" if where != name else "")
    given = column(who, where)
    lengths = column(who, want.lengths) if want.lengths else None
    values, splits, weights = _lists(who, given, lengths, rows.known)
    if want.weights:
        weights, own, _ = _lists(f"weights of {who}", column(who, want.weights), lengths, rows.known)
        if not np.array_equal(own, splits):
            raise InvalidRequestError(
                f"{who}: its weights in {want.weights!r} are not as many as its ids in each sample"
            )
    rows.see(who, splits.size - 1)
    keep = _are_there(values)
    ids = _as_ids(who, values if keep is None else _taken(values, keep), want.seed)
    if want.padding is not None:
        real = ids != np.uint64(want.padding & 0xFFFFFFFFFFFFFFFF)
        if not real.all():
            if keep is None:
                keep = real
            else:
                keep = keep.copy()
                keep[keep] = real
            ids = ids[real]
    of_ids = None if weights is None else _as_floats(f"weights of {who}", weights)
    if of_ids is not None and of_ids.ndim != 1:
        raise InvalidRequestError(f"weights of {who} have shape {of_ids.shape}; one of each id is needed")
    if keep is not None:
        kept = np.zeros(keep.size + 1, np.int64)
        np.cumsum(keep, out=kept[1:])
        splits = kept[splits]
        of_ids = None if of_ids is None else of_ids[keep]
    return Ragged(ids, splits), of_ids, bool(ids.size) and _is_hashed(values)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(each, Tensor | np.ndarray) for each in value)


def _lists(who: str, given: Any, lengths: Any, rows: int | None) -> _Lists:
    """Any form of lists as values and row splits."""
    if isinstance(given, Ragged):
        given.check()
        return given.values, given.row_splits, None
    if isinstance(given, Mapping):
        return _of_parts(who, given, rows)
    if _is_jagged(given):
        values, found = _plain(given.values()), _splits_of_lengths(who, given.lengths(), len(given.values()))
        return values, found, _plain(given.weights_or_none())
    if isinstance(given, Tensor) and given.is_nested:
        if given.layout != torch.jagged:
            parts = list(given.unbind())
            return _lists(who, [_plain(part) for part in parts], None, rows)
        jagged: Any = given
        return _plain(jagged.values()), _splits(who, "offsets", jagged.offsets(), jagged.values().shape[0]), None
    if _is_pair(given):
        return _of_parts(who, {"values": given[0], "offsets": given[1]}, rows)
    if _is_arrow(given):
        return _of_arrow(who, given, lengths)
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        return _of_sequence(who, given, lengths)
    values = _plain(given)
    if values.ndim == 2:
        return _of_padded(who, values, lengths)
    if values.ndim != 1:
        raise InvalidRequestError(f"{who} has shape {values.shape}; [b], one of each sample, or [b, k] is needed")
    if values.dtype == object and len(values) and isinstance(_first_that_is(values), list | tuple | np.ndarray):
        return _of_sequence(who, values.tolist(), lengths)
    return _flat(who, values, lengths)


def _flat(who: str, values: Any, lengths: Any) -> _Lists:
    """[n], cut by lengths, or one of each sample."""
    if lengths is not None:
        return values, _splits_of_lengths(who, lengths, len(values)), None
    return values, np.arange(len(values) + 1, dtype=np.int64), None


def _of_parts(who: str, parts: Mapping[str, Any], rows: int | None) -> _Lists:
    values = _plain(parts["values"])
    values = string_array(values) if _is_text(values) else values
    size = len(values)
    weights = _plain(parts["weights"]) if parts.get("weights") is not None else None
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


def _of_padded(who: str, values: npt.NDArray[Any], lengths: Any) -> _Lists:
    count, width = values.shape
    if lengths is None:
        return values.reshape(-1), np.arange(count + 1, dtype=np.int64) * width, None
    sizes = _integers(who, "lengths", lengths)
    if sizes.size != count or (sizes < 0).any() or (sizes > width).any():
        raise InvalidRequestError(f"{who}: lengths must be {count} numbers in 0..{width}, for shape {values.shape}")
    return values[np.arange(width) < sizes[:, None]], _cumulated(sizes), None


def _of_sequence(who: str, given: Sequence[Any], lengths: Any) -> _Lists:
    """A list of values, or of lists, arrays or tensors of values; None is an empty one."""
    first = next((each for each in given if each is not None), None)
    if (
        first is None
        or isinstance(first, str | bytes)
        or not (hasattr(first, "__len__") and np.ndim(_plain(first)) == 1)
    ):
        if isinstance(first, Tensor | np.generic | np.ndarray):
            return _flat(who, np.asarray([_plain(each) for each in given]), lengths)
        return _flat(who, list(given), lengths)
    pieces: list[Any] = [() if each is None else each for each in given]
    splits = _cumulated(np.fromiter((len(each) for each in pieces), np.int64, len(pieces)))
    if all(isinstance(each, Tensor | np.ndarray) for each in given):
        return (np.concatenate([_plain(each) for each in given]) if given else np.empty(0, np.int64)), splits, None
    return [value for each in pieces for value in (each.tolist() if hasattr(each, "tolist") else each)], splits, None


def _of_arrow(who: str, given: Any, lengths: Any) -> _Lists:
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


# ---- dense values and labels ---------------------------------------------------------------------------------------


def _dense(name: str, want: DenseColumn, column: _Column, rows: _Rows) -> Tensor:
    parts = []
    for where in want.columns or (name,):
        who = f"feature {name!r}" + (f" (column {where!r})" if where != name else "")
        width = want.dim if len(want.columns) <= 1 else None
        part = _matrix(who, column(who, where), width, math.nan if want.fill is None else want.fill)
        rows.see(who, part.shape[0])
        if want.fill is None:
            if not bool(torch.isfinite(part).all()):
                row = int((~torch.isfinite(part)).any(1).nonzero()[0])
                raise InvalidRequestError(
                    f"{who}: sample {row} of the batch has {part[row].tolist()[:8]}; give a fill for what is missing"
                )
        else:
            part = torch.nan_to_num(part, nan=want.fill, posinf=math.inf, neginf=-math.inf)
        parts.append(part)
    found = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if found.shape[1] != want.dim:
        raise InvalidRequestError(f"feature {name!r}: {found.shape[1]} values of each sample, dim={want.dim} is wanted")
    return found


def _label(name: str, want: LabelColumn, column: _Column, rows: _Rows) -> tuple[Tensor, Tensor]:
    where = want.column or name
    who = f"label {name!r}" + (f" (column {where!r})" if where != name else "")
    values = _matrix(who, column(who, where), None, math.nan)
    rows.see(who, values.shape[0])
    if want.index is None and values.shape[1] != 1:
        raise InvalidRequestError(f"{who} has {values.shape[1]} numbers of each sample; say which with index")
    index = want.index or 0
    if not 0 <= index < values.shape[1]:
        raise InvalidRequestError(f"{who}: index={index} is outside 0..{values.shape[1] - 1}")
    chosen = values[:, index]
    mask = ~(torch.isnan(chosen) | (chosen == float(INVALID_LABEL)))
    chosen = torch.where(mask, chosen, torch.zeros_like(chosen))
    wrong = mask & ((chosen < want.low) | (chosen > want.high))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise InvalidRequestError(
            f"{who}: sample {row} of the batch has {chosen[row].item():g}, outside {want.low:g}..{want.high:g}"
        )
    return chosen, mask


def _matrix(who: str, given: Any, width: int | None, fill: float) -> Tensor:
    """float32[b, k] of numbers; lists must have `width` each, or be all as long; what is missing is `fill`."""
    if isinstance(given, Tensor) and not given.is_nested:
        if given.dim() not in (1, 2):
            raise InvalidRequestError(f"{who} has shape {tuple(given.shape)}; [b] or [b, k] is needed")
        return (given[:, None] if given.dim() == 1 else given).detach().float()
    if not _is_arrow(given) and not isinstance(given, Ragged | Mapping | Tensor):
        array = None
        try:
            array = np.asarray(given if not isinstance(given, Sequence) else [_plain(each) for each in given])
        except ValueError:
            pass  # lists of different lengths
        if array is not None and array.dtype.kind in "fiub" and array.ndim in (1, 2):
            return _tensor(who, array.reshape(len(array), -1))
    values, splits, _ = _lists(who, given, None, None)
    floats = _as_floats(who, values)
    if floats.ndim == 2:
        return _tensor(who, floats)
    sizes = np.diff(splits)
    wide = width if width is not None else int(sizes.max(initial=1))
    if (sizes > wide).any():
        row = int(np.flatnonzero(sizes > wide)[0])
        raise InvalidRequestError(
            f"{who}: sample {row} of the batch has {sizes[row]} values, at most {wide} are wanted"
        )
    out = np.full((sizes.size, wide), fill, np.float32)
    out[np.arange(wide) < sizes[:, None]] = floats
    return _tensor(who, out)


def _tensor(who: str, array: npt.NDArray[Any]) -> Tensor:
    floats = _as_floats(who, array)
    # torch warns of arrays that may not be written, as those of Arrow.
    return torch.from_numpy(floats if floats.flags.writeable else floats.copy())


# ---- arrays --------------------------------------------------------------------------------------------------------


def _is_arrow(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "pyarrow"


def _is_text(values: Any) -> bool:
    if isinstance(values, np.ndarray):
        return values.dtype.kind in "US" or (values.dtype == object and isinstance(_first_that_is(values), str | bytes))
    return isinstance(values, list) and isinstance(_first_that_is(values), str | bytes)


def _first_that_is(values: Any) -> Any:
    return next((each for each in values if each is not None), None)


def _plain(values: Any) -> Any:
    """A tensor as an array; what Arrow or pandas hold as it is, or as an array."""
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    if values is None or isinstance(values, list) or _is_arrow(values):
        return values
    if hasattr(values, "to_arrow"):  # polars
        return values.to_arrow()
    return np.asarray(values)


def _are_there(values: Any) -> npt.NDArray[np.bool_] | None:
    """Which values are not null; None: all."""
    if _is_arrow(values):
        return None if not values.null_count else np.asarray(values.is_valid())
    if isinstance(values, list) or (isinstance(values, np.ndarray) and values.dtype == object):
        there = np.fromiter((each is not None for each in values), np.bool_, len(values))
        return None if there.all() else there
    return None


def _taken(values: Any, keep: npt.NDArray[np.bool_]) -> Any:
    if _is_arrow(values):
        return values.drop_null()
    if isinstance(values, list):
        return [value for value, there in zip(values, keep, strict=True) if there]
    return values[keep]


def _as_ids(who: str, values: Any, seed: int) -> npt.NDArray[np.uint64]:
    """uint64 of integers, or of strings by their hash."""
    if _is_hashed(values):
        return _hashed(who, values, seed)
    if _is_arrow(values):
        values = np.asarray(values.dictionary_decode() if hasattr(values, "dictionary_decode") else values)
    elif isinstance(values, np.ndarray) and values.dtype == object:
        values = values.tolist()
    return np.ascontiguousarray(id_array(who, values))


def _is_hashed(values: Any) -> bool:
    """Whether ids are made of them by a hash: of text, and of whatever Arrow has that is no integer."""
    if not _is_arrow(values):
        return _is_text(values)
    import pyarrow as pa

    return not pa.types.is_integer(values.type.value_type if pa.types.is_dictionary(values.type) else values.type)


def _hashed(who: str, values: Any, seed: int) -> npt.NDArray[np.uint64]:
    try:
        return hash_strings(values, seed=seed)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{who}: ids are integers or strings; {error}") from None


def _as_floats(who: str, values: Any) -> Float32Array:
    if _is_arrow(values):
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
    array = _plain(values)
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
