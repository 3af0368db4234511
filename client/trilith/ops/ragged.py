"""Ragged arrays, lists of different lengths as one flat array and where each row of it begins; and checks of arrays."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.jit import kernel
from trilith.ops.memory import address_of, load_u32, load_u64, store_u32
from trilith.runtime.extras import need

if TYPE_CHECKING:
    import torch

__all__ = ["Int64Array", "Ragged", "as_floats", "as_integers", "as_splits", "pad_rows", "singles", "value_rowids"]

Int64Array: TypeAlias = npt.NDArray[np.int64]

_MOST_SINGLES = 1 << 16
_Scalar = TypeVar("_Scalar", bound=np.generic)
# What np.int64 is inside a kernel, for the type checker: an int.
_int64 = cast("type[int]", np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Ragged(Generic[_Scalar]):
    """Lists of different lengths.

    Attributes:
        values: [m], the elements of all rows, row after row.
        row_splits: int64[rows + 1]; row i is values[row_splits[i]:row_splits[i + 1]].
    """

    values: npt.NDArray[_Scalar]
    row_splits: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: Iterable[Sequence[Any]], dtype: npt.DTypeLike = np.int64) -> Ragged[Any]:
        """From a list of rows; `dtype` is that of the elements."""
        lists = list(rows)
        values = np.empty(sum(map(len, lists)), dtype)
        values[:] = [value for row in lists for value in row]
        return cls.of_lengths(values, np.fromiter(map(len, lists), np.int64, len(lists)))

    @classmethod
    def of_lengths(cls, values: npt.NDArray[_Scalar], lengths: npt.NDArray[np.int64]) -> Ragged[_Scalar]:
        """From the elements, of any dtype [sum of lengths], and the length of each row, int64[rows]."""
        row_splits = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=row_splits[1:])
        return cls(values, row_splits)

    @classmethod
    def of_singles(cls, values: npt.ArrayLike) -> Ragged[np.uint64]:
        """One id per row: integers [rows]."""
        flat = np.ascontiguousarray(values, dtype=np.uint64).reshape(-1)
        return Ragged(flat, np.arange(flat.size + 1, dtype=np.int64))

    def __len__(self) -> int:
        return self.row_splits.size - 1

    def __getitem__(self, row: int) -> npt.NDArray[_Scalar]:
        """One row, a view; negative numbers count from the end."""
        at = range(len(self))[row]
        return self.values[self.row_splits[at] : self.row_splits[at + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64[rows]: elements of each row."""
        return np.diff(self.row_splits)

    def uniform(self, n: int) -> bool:
        """Whether every row has n elements."""
        splits = self.row_splits
        if n == 1 and splits.base is _ramp():
            return True
        return bool(splits[0] == 0 and splits[-1] == n * len(self) and (splits[1:] - splits[:-1] == n).all())

    @property
    def value_rowids(self) -> npt.NDArray[np.int64]:
        """int64[m]: the row of each element."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def check(self) -> None:
        """Refuse splits that do not cut the values into rows; made by hand they may, and making one does not look."""
        as_splits("row_splits", self.row_splits, len(self.values))

    def take(self, rows: npt.ArrayLike) -> Ragged[_Scalar]:
        """Some rows, by index or bool mask, copied."""
        chosen = np.asarray(rows)
        chosen = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen.astype(np.int64)
        lengths = self.lengths[chosen]
        ends = np.cumsum(lengths)
        count = int(ends[-1]) if ends.size else 0
        at = np.arange(count) + np.repeat(self.row_splits[chosen] - ends + lengths, lengths)
        return Ragged.of_lengths(self.values[at], lengths)

    def first(self, n: int) -> Ragged[_Scalar]:
        """The same rows cut to at most n elements each; itself where none is longer."""
        lengths = self.lengths
        if lengths.max(initial=0) <= n:
            return self
        place = np.arange(self.values.size) - np.repeat(self.row_splits[:-1], lengths)
        return Ragged.of_lengths(self.values[place < n], np.minimum(lengths, n))

    def last(self, n: int) -> Ragged[_Scalar]:
        """The same rows, each cut to its last n elements."""
        lengths = self.lengths
        if lengths.size == 0 or int(lengths.max()) <= n:
            return self
        left = np.repeat(self.row_splits[1:], lengths) - np.arange(len(self.values))
        return Ragged.of_lengths(self.values[left <= n], np.minimum(lengths, n))

    def tolist(self) -> list[list[Any]]:
        """A list of lists."""
        values = self.values.tolist()
        bounds = self.row_splits.tolist()
        return [values[start:stop] for start, stop in pairwise(bounds)]

    def dense(self, dim: int, fill: Any = 0, *, exact: bool = False) -> npt.NDArray[_Scalar]:
        """dtype[rows, dim]: the first elements of each row, short rows filled up.

        Args:
            dim: Elements per row.
            fill: What stands where there is no element.
            exact: Take a row that has not exactly `dim` elements as empty.
        """
        rows, dtype = len(self), self.values.dtype
        if self.values.size == rows * dim and self.uniform(dim):
            return self.values.reshape(rows, dim).copy()
        out = np.empty((rows, dim), dtype)
        out[...] = fill
        if dtype.kind in "fiu" and dtype.itemsize in (4, 8):
            values, splits = np.ascontiguousarray(self.values), np.ascontiguousarray(self.row_splits, np.int64)
            addresses = address_of(values), address_of(splits), address_of(out)
            if not pad_rows(*addresses, values.size, rows, dim, dtype.itemsize // 4, int(exact)):
                raise InvalidRequestError(f"row_splits point outside {values.size} values")
            return out
        lengths = np.where(self.lengths == dim, dim, 0) if exact else self.lengths
        there = np.arange(dim) < lengths[:, None]
        out[there] = self.values[(self.row_splits[:-1, None] + np.arange(dim))[there]]
        return out

    def torch_offsets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values, and int64[rows] where rows start, as `torch.nn.EmbeddingBag` takes them; both share this memory."""
        values, row_splits = self.tensors()
        return values, row_splits[:-1]

    def torch_nested(self) -> torch.Tensor:
        """A jagged nested tensor [rows, *] that shares this memory."""
        values, row_splits = self.tensors()
        import torch

        return torch.nested.nested_tensor_from_jagged(values, row_splits)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and row splits, which share this memory; uint64 by their bits, as int64."""
        need("torch", extra="torch")
        import torch

        values = self.values.view(np.int64) if self.values.dtype == np.uint64 else self.values
        return torch.from_numpy(values), torch.from_numpy(self.row_splits)


@functools.cache
def _ramp() -> Int64Array:
    ramp = np.arange(_MOST_SINGLES + 1)
    ramp.flags.writeable = False
    return ramp


def singles(rows: int) -> Int64Array:
    """int64[rows + 1], read-only: the row splits of `rows` rows with one element each."""
    return _ramp()[: rows + 1] if rows <= _MOST_SINGLES else np.arange(rows + 1)


@kernel("boolean(int64, int64, int64, int64, int64, int64, int64, int64)")
def pad_rows(values: int, splits: int, out: int, size: int, rows: int, dim: int, words: int, exact: int) -> bool:
    """Copy the first elements of each row of a ragged array to a matrix.

    Args:
        values: Address of the elements.
        splits: Address of int64[rows + 1].
        out: Address of [rows, dim], written where there is an element.
        size: Number of elements.
        rows: Number of rows.
        dim: Elements of a row of the matrix.
        words: Elements are 4 * words bytes long.
        exact: Whether rows of other lengths than `dim` are left alone.

    Returns:
        Whether the splits lie within the elements, which is checked before they are read.
    """
    for row in range(rows):
        start, stop = _int64(load_u64(splits, row)), _int64(load_u64(splits, row + 1))
        if start < 0 or stop < start or stop > size:
            return False
        count = stop - start
        if exact and count != dim:
            continue
        for i in range(min(count, dim) * words):
            store_u32(out, row * dim * words + i, load_u32(values, start * words + i))
    return True


# ---- checks ----------------------------------------------------------------------------------------------------------


def as_integers(name: str, values: npt.ArrayLike, *, shape: tuple[int, ...] | None = None) -> Int64Array:
    """Make int64, C-contiguous, of integers of any kind; uint64 keeps its bits.

    Args:
        name: For messages.
        values: An array-like; an empty one of any type is fine.
        shape: What the shape must be, -1 standing for any length; None takes any shape.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        if array.size:
            raise InvalidRequestError(f"{name} are {array.dtype}, they must be integers")
        array = array.astype(np.int64)
    if shape is not None and (
        array.ndim != len(shape) or any(want not in (-1, got) for want, got in zip(shape, array.shape, strict=True))
    ):
        raise InvalidRequestError(f"{name} have shape {array.shape}, {_wanted(shape)} is needed")
    if array.dtype == np.uint64:
        array = np.ascontiguousarray(array).view(np.int64)
    return np.require(array, np.int64, ("C", "A"))


def as_floats(name: str, values: npt.ArrayLike, *, shape: tuple[int, ...] | None = None) -> npt.NDArray[np.float32]:
    """Make float32, C-contiguous; arguments as for `as_integers`. No values at all take any shape without a -1."""
    array = np.asarray(values)
    if array.dtype != np.float32:
        if array.dtype.kind not in "fiu":
            raise InvalidRequestError(f"{name} are {array.dtype}, they must be numbers")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    if shape is not None:
        fits = array.ndim == len(shape) and all(want in (-1, got) for want, got in zip(shape, array.shape, strict=True))
        if not fits and array.size == 0 and 0 in (empty := tuple(0 if each == -1 else each for each in shape)):
            array, fits = np.empty(empty, np.float32), True
        if not fits:
            raise InvalidRequestError(f"{name} have shape {array.shape}, {_wanted(shape)} is needed")
    return np.require(array, np.float32, ("C", "A"))


def as_splits(name: str, row_splits: npt.ArrayLike, values: int) -> Int64Array:
    """Make int64[rows + 1] that runs from 0 to `values` without falling."""
    splits = as_integers(name, row_splits, shape=(-1,))
    if splits.size == 0 or splits[0] != 0 or splits[-1] != values or (splits[1:] < splits[:-1]).any():
        shown = splits.tolist() if splits.size <= 16 else f"{splits[:8].tolist()}...{splits[-8:].tolist()}"
        raise InvalidRequestError(f"{name} {shown} do not rise from 0 to {values}, the number of values")
    return splits


def value_rowids(row_splits: npt.ArrayLike) -> Int64Array:
    """int64[values]: the row of every value."""
    splits = as_integers("row_splits", row_splits, shape=(-1,))
    splits = as_splits("row_splits", splits, int(splits[-1]) if splits.size else 0)
    return np.repeat(np.arange(splits.size - 1), np.diff(splits))


def _wanted(shape: tuple[int, ...]) -> str:
    return f"({', '.join('n' if each == -1 else str(each) for each in shape)}{',' if len(shape) == 1 else ''})"
