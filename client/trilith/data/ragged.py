"""Ragged arrays: lists of different lengths as one flat array and where each row of it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.jit import kernel
from trilith.ops.memory import address_of, load_u32, load_u64, store_u32
from trilith.runtime.extras import need

if TYPE_CHECKING:
    import torch

__all__ = ["ParseSteps", "Ragged", "contract", "expand", "pad_rows"]

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

    @property
    def value_rowids(self) -> npt.NDArray[np.int64]:
        """int64[m]: the row of each element."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def check(self) -> None:
        """Refuse splits that do not cut the values into rows; made by hand they may, and making one does not look."""
        splits = self.row_splits
        if splits.ndim != 1 or splits.size == 0 or splits[0] != 0 or splits[-1] != len(self.values):
            raise InvalidRequestError(
                f"row_splits must run from 0 to the number of values, {len(self.values)}; got {splits!r}"
            )
        if (splits[1:] < splits[:-1]).any():
            raise InvalidRequestError(f"row_splits must not fall; got {splits!r}")

    def take(self, rows: npt.ArrayLike) -> Ragged[_Scalar]:
        """Some rows, by index or bool mask, copied."""
        chosen = np.asarray(rows)
        chosen = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen.astype(np.int64)
        lengths = self.lengths[chosen]
        ends = np.cumsum(lengths)
        count = int(ends[-1]) if ends.size else 0
        at = np.arange(count) + np.repeat(self.row_splits[chosen] - ends + lengths, lengths)
        return Ragged.of_lengths(self.values[at], lengths)

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
        values, row_splits = self._tensors()
        return values, row_splits[:-1]

    def torch_nested(self) -> torch.Tensor:
        """A jagged nested tensor [rows, *] that shares this memory."""
        values, row_splits = self._tensors()
        import torch

        return torch.nested.nested_tensor_from_jagged(values, row_splits)

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        need("torch", extra="torch")
        import torch

        values = self.values.view(np.int64) if self.values.dtype == np.uint64 else self.values
        return torch.from_numpy(values), torch.from_numpy(self.row_splits)


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


# ---- ragged tensors taken apart, for code that knows plain arrays only ---------------------------------------------


def expand(features: Mapping[str, Any], *, nrows: bool = True, value_rowids: bool = False) -> dict[str, Any]:
    """Take every ragged array of a batch apart.

    Args:
        features: Arrays by name; those that are no `Ragged` stay as they are.
        nrows: Add the number of rows.
        value_rowids: Add the row of each element.

    Returns:
        Per ragged array {"values", "row_splits", "nrows", "value_rowids"}.
    """
    out: dict[str, Any] = {}
    for name, value in features.items():
        if isinstance(value, Ragged):
            parts: dict[str, Any] = {"values": value.values, "row_splits": value.row_splits}
            if nrows:
                parts["nrows"] = np.int64(len(value))
            if value_rowids:
                parts["value_rowids"] = value.value_rowids
            out[name] = parts
        else:
            out[name] = value
    return out


def contract(features: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `expand`; parts that disagree with each other are refused."""
    out: dict[str, Any] = {}
    for name, value in features.items():
        if not (isinstance(value, Mapping) and {"values", "row_splits"} <= set(value)):
            out[name] = value
            continue
        ragged: Ragged[Any] = Ragged(value["values"], value["row_splits"])
        if "nrows" in value and int(value["nrows"]) != len(ragged):
            raise InvalidRequestError(
                f"{name!r}: nrows is {int(value['nrows'])}, but row_splits has {len(ragged) + 1} elements"
            )
        if "value_rowids" in value and not np.array_equal(value["value_rowids"], ragged.value_rowids):
            raise InvalidRequestError(f"{name!r}: value_rowids and row_splits speak of different rows")
        out[name] = ragged
    return out


class ParseSteps:
    """Functions to apply to a parsed batch, first come first served; each runs once.

    The object belongs to whoever parses: it is no global.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[dict[str, Any]], dict[str, Any]]] = []

    def add(self, step: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Queue a function from features to features."""
        self._steps.append(step)

    def apply(self, features: dict[str, Any]) -> dict[str, Any]:
        """Take the queued functions off and apply them in order."""
        while self._steps:
            features = self._steps.pop(0)(features)
        return features
