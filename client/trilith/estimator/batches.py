"""Batches: what a loader gives, in any of its forms, made into ids, weights, dense values and labels by name."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from trilith.arrays import id_array
from trilith.data.parse.specs import INVALID_LABEL
from trilith.errors import InvalidRequestError
from trilith.nn.bags import as_floats, is_arrow, is_keyed, is_pair, plain, read_bags, read_lists
from trilith.ops.ragged import Int64Array, Ragged

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
        cut: Whether of longer lists the first `dim` are taken; else they are refused.
    """

    dim: int = 1
    columns: tuple[str, ...] = ()
    fill: float | None = None
    cut: bool = False


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
            label is out of range; the message names feature and column. Or there are no samples.
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
    for name, want in sorted(wanted.ids.items(), key=lambda each: is_pair(columns.get(each[1].column or each[0]))):
        ids[name], of_ids, text = _ids(name, want, column, rows)
        if text:
            texts.add(name)
        if of_ids is not None:
            weights[name] = of_ids
    for name in wanted.labels if labels else ():
        if name not in found_labels:
            found_labels[name], masks[name] = torch.zeros(rows.count), torch.zeros(rows.count, dtype=torch.bool)
    if not rows.count:
        raise InvalidRequestError("a batch has no samples; leave such batches out")
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

    @cached_property
    def singles(self) -> Int64Array:
        """Row splits of columns with one value of each sample, once the number of samples is known."""
        return np.arange(self.count + 1, dtype=np.int64)


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
    if is_keyed(batch):
        return {name: batch[name] for name in batch.keys()}  # noqa: SIM118 - it is no mapping
    if hasattr(batch, "columns") and hasattr(batch, "__dataframe__"):
        return {str(name): batch[name] for name in batch.columns}
    if isinstance(batch, list | tuple):
        raise InvalidRequestError(
            f"a batch is a {type(batch).__name__} of {len(batch)}, whose columns have no names; let the loader's "
            "collate_fn return a mapping"
        )
    raise InvalidRequestError(f"a batch is a {type(batch).__name__}, not a mapping from names to columns")


def _is_leaf(value: Any) -> bool:
    if isinstance(value, np.ndarray | Tensor):  # most are
        return True
    if isinstance(value, Mapping):
        return "values" in value  # ragged, taken apart
    if isinstance(value, Ragged):
        return True
    return not (
        (dataclasses.is_dataclass(value) and not isinstance(value, type))
        or (isinstance(value, tuple) and hasattr(value, "_fields"))
        or is_keyed(value)
    )


# ---- ids -----------------------------------------------------------------------------------------------------------


def _ids(
    name: str, want: IdColumn, column: _Column, rows: _Rows
) -> tuple[Ragged[np.uint64], Float32Array | None, bool]:
    """Ids, weights of them or None, and whether they were text."""
    where = want.column or name
    who = f"feature {name!r}" + (f" (column {where!r})" if where != name else "")
    given = column(who, where)
    plain = not (want.lengths or want.weights) and want.padding is None
    if plain and type(given) is np.ndarray and given.ndim == 1 and given.dtype.kind in "iu":
        rows.see(who, given.size)  # the most usual form, of which a batch may have dozens
        return Ragged(np.ascontiguousarray(id_array(who, given)), rows.singles), None, False
    lengths = column(who, want.lengths) if want.lengths else None
    weights = column(who, want.weights) if want.weights else None
    found = read_bags(
        who, given, lengths=lengths, weights=weights, samples=rows.known, padding=want.padding, seed=want.seed
    )
    rows.see(who, len(found[0]))
    return found


# ---- dense values and labels ---------------------------------------------------------------------------------------


def _dense(name: str, want: DenseColumn, column: _Column, rows: _Rows) -> Tensor:
    parts = []
    for where in want.columns or (name,):
        who = f"feature {name!r}" + (f" (column {where!r})" if where != name else "")
        width = want.dim if len(want.columns) <= 1 else None
        part = _matrix(who, column(who, where), width, math.nan if want.fill is None else want.fill, cut=want.cut)
        rows.see(who, part.shape[0])
        if want.fill is None:
            if not bool(torch.isfinite(part).all()):
                row = int((~torch.isfinite(part)).any(1).nonzero()[0])
                raise InvalidRequestError(
                    f"{who}: sample {row} of the batch has {part[row].tolist()[:8]}; give a fill for what is missing"
                )
        else:
            part = torch.nan_to_num(part, nan=want.fill, posinf=math.inf, neginf=-math.inf)
            if width is not None:
                part = functional.pad(part, (0, max(width - part.shape[1], 0)), value=want.fill)
        if want.cut and width is not None:
            part = part[:, :width]
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


def _matrix(who: str, given: Any, width: int | None, fill: float, *, cut: bool = False) -> Tensor:
    """float32[b, k] of numbers; lists must have `width` each, or be all as long; what is missing is `fill`.

    Longer ones are refused unless `cut`; arrays are left as wide as they are.
    """
    if isinstance(given, Tensor) and not given.is_nested:
        if given.dim() not in (1, 2):
            raise InvalidRequestError(f"{who} has shape {tuple(given.shape)}; [b] or [b, k] is needed")
        return (given[:, None] if given.dim() == 1 else given).detach().float()
    if not is_arrow(given) and not isinstance(given, Ragged | Mapping | Tensor):
        array = None
        try:
            array = np.asarray(given if not isinstance(given, Sequence) else [plain(each) for each in given])
        except ValueError:
            pass  # lists of different lengths
        if array is not None and array.dtype.kind in "fiub" and array.ndim in (1, 2):
            return _tensor(who, array[:, None] if array.ndim == 1 else array)
    values, splits, _ = read_lists(who, given, None, None)
    floats = as_floats(who, values)
    if floats.ndim == 2:
        return _tensor(who, floats)
    sizes = np.diff(splits)
    wide = int(sizes.max(initial=1)) if width is None or cut else width
    if (sizes > wide).any():
        row = int(np.flatnonzero(sizes > wide)[0])
        raise InvalidRequestError(
            f"{who}: sample {row} of the batch has {sizes[row]} values, at most {wide} are wanted"
        )
    out = np.full((sizes.size, wide), fill, np.float32)
    out[np.arange(wide) < sizes[:, None]] = floats
    return _tensor(who, out)


def _tensor(who: str, array: npt.NDArray[Any]) -> Tensor:
    floats = as_floats(who, array)
    # torch warns of arrays that may not be written, as those of Arrow.
    return torch.from_numpy(floats if floats.flags.writeable else floats.copy())
