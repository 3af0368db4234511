"""Cells of a CSV column as values: all at once where they are sound, one by one around those that are not."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from trilith.data.formats.column_types import Values, text_of
from trilith.data.formats.text import is_odd, restored
from trilith.data.scan.rows import ColumnType
from trilith.ops.ragged import Ragged, singles

__all__ = ["Cells", "guess_type"]

_WHOLE = re.compile(rb"[+-]?[0-9]+(\.0*)?\Z")
_NUMBER = re.compile(rb"[+-]?([0-9]+\.?[0-9]*([eE][+-]?[0-9]+)?|\.[0-9]+([eE][+-]?[0-9]+)?|inf|infinity|nan)\Z", re.I)
_BOOLS = {b"true": 1, b"false": 0}
_FEW = 256
_PROBED = 16
_LOOKED_AT = 1000
_SHOWN = 40
_INT64_MAX, _UINT64_MAX, _INT64_MIN = (1 << 63) - 1, (1 << 64) - 1, -(1 << 63)
_STORED = {ColumnType.INT: pa.int64(), ColumnType.FLOAT: pa.float32()}
_DTYPES = {ColumnType.INT: np.int64, ColumnType.FLOAT: np.float32}
_WANTED = {
    ColumnType.INT: "no integer of 64 bits",
    ColumnType.FLOAT: "no number within float32",
    ColumnType.FID_V1: "no id of 64 bits",
    ColumnType.FID_V2: "no id of 64 bits",
}


class Cells:
    """The cells of some rows of a column.

    Args:
        cells: Binary; null is no value.
        separator: What stands between the values of a cell, if it may have several.
        odd: Whether some cells may hold bytes that are no text (see `trilith.data.formats.text.restored`).
    """

    def __init__(self, cells: pa.Array, separator: str | None, *, odd: bool = False) -> None:
        self._rows = len(cells)
        self._odd = odd
        if separator is not None:
            pieces = pc.split_pattern(cells, separator.encode())
            lengths = pc.fill_null(pc.list_value_length(pieces), 0).to_numpy(zero_copy_only=False)
            rows = np.repeat(np.arange(self._rows), lengths)
            flat = pieces.flatten()
            there = pc.greater(pc.binary_length(flat), 0)
            self.flat = flat.filter(there)
            self._of = rows[there.to_numpy(zero_copy_only=False)]
        elif cells.null_count:
            self._of = np.flatnonzero(cells.is_valid().to_numpy(zero_copy_only=False))
            self.flat = cells.drop_null()
        else:
            self._of = np.arange(self._rows)
            self.flat = cells
        self._single = separator is None and not cells.null_count
        self._whole: dict[ColumnType, Values | None] = {}

    def __len__(self) -> int:
        return len(self.flat)

    def texts(self) -> tuple[npt.NDArray[np.uint8], Ragged[Any]]:
        """All values as byte strings: a text, and spans int64[m, 2] of it."""
        flat = self.flat
        if self._odd:
            flat = pa.array([restored(text) for text in flat.to_pylist()], pa.large_binary())
        text, spans = text_of(flat)
        return text, self._ragged(spans, self._of)

    def whole(self, kind: ColumnType) -> Values | None:
        """All values as numbers of a type; None if one of them may be none."""
        if kind not in self._whole:
            self._whole[kind] = _cast(self.flat, kind)
        return self._whole[kind]

    def numbers(self) -> tuple[pa.Array, npt.NDArray[np.int64]]:
        """What may be numbers, and int64[m] rows: quotes with nothing inside are no number."""
        full = pc.greater(pc.binary_length(self.flat), 0)
        if pc.all(full).as_py() in (True, None):
            return self.flat, self._of
        return self.flat.filter(full), self._of[full.to_numpy(zero_copy_only=False)]

    def read(self, kind: ColumnType) -> tuple[Ragged[Any], dict[int, str]]:
        """Numbers of a type, with anything in place of those that are none; and by row which those are."""
        if (numbers := self.whole(kind)) is not None:
            return self._ragged(numbers, self._of), {}
        texts, rows = self.numbers()
        numbers, odd = _read(texts, kind)
        bad: dict[int, str] = {}
        for place in odd:
            bad.setdefault(int(rows[place]), f"{_shown(texts[place].as_py())} is {_WANTED[kind]}")
        return self._ragged(numbers, rows), bad

    def odd_texts(self, encoding: str) -> dict[int, str]:
        """Rows that hold what is no text in the encoding that they should have."""
        return {
            int(self._of[place]): f"{_shown(text)} is no {encoding}"
            for place, text in enumerate(self.flat.to_pylist())
            if is_odd(text)
        }

    def _ragged(self, values: Values, rows: npt.NDArray[np.int64]) -> Ragged[Any]:
        if self._single and len(rows) == self._rows:
            return Ragged(values, singles(self._rows))
        return Ragged.of_lengths(values, np.bincount(rows, minlength=self._rows).astype(np.int64))


def guess_type(cells: Cells, before: ColumnType | None) -> ColumnType | None:
    """What a column is, given what it was in front of these cells; None as long as it has no values."""
    if before in (ColumnType.FLOAT, ColumnType.BYTES):
        return before
    if len(cells) and cells.whole(ColumnType.INT) is not None:
        return ColumnType.INT
    texts, _ = cells.numbers()
    if not len(texts):
        return ColumnType.BYTES if before is None and len(cells) else before
    if not _read(texts, ColumnType.FID_V2, enough=1)[1]:
        pointed = pc.any(pc.match_substring(texts, b".")).as_py()  # 7.0
        return ColumnType.FLOAT if pointed else ColumnType.INT
    if before is None:
        if not _read(texts, ColumnType.FLOAT, enough=1)[1]:
            return ColumnType.FLOAT
        # Numbers with a bad cell here and there, or text: what most of the first ones are.
        texts = texts.slice(0, _LOOKED_AT)
    no_ids, no_floats = _read(texts, ColumnType.FID_V2)[1], _read(texts, ColumnType.FLOAT)[1]
    if before is None and 2 * min(len(no_ids), len(no_floats)) >= len(texts):
        return ColumnType.BYTES
    return ColumnType.FLOAT if len(no_floats) < len(no_ids) else ColumnType.INT


def _read(texts: pa.Array, kind: ColumnType, *, enough: int | None = None) -> tuple[Values, list[int]]:
    """Numbers, with anything in place of what is none; and which those are, or the first of them that are enough."""
    dtype = _DTYPES.get(kind, np.uint64)
    out = np.zeros(len(texts), dtype)
    odd: list[int] = []
    waiting = [(0, len(texts))]
    while waiting and (enough is None or len(odd) < enough):
        start, stop = waiting.pop()
        part = texts.slice(start, stop - start)
        whole = _cast(part, kind)
        if whole is not None:
            out[start:stop] = whole
        elif stop - start > _FEW:
            middle = (start + stop) // 2
            waiting += [(middle, stop), (start, middle)]  # the first half comes next
        else:
            for place, text in enumerate(part.to_pylist(), start):
                number = _number(text.strip(), kind)
                if number is None:
                    odd.append(place)
                else:
                    out[place] = number
    return out, odd


def _cast(texts: pa.Array, kind: ColumnType) -> Values | None:
    """All at once; None if there is one that may be none."""
    if len(texts) > _FEW and _cast(texts.slice(0, _PROBED), kind) is None:
        return None  # a cast makes a message for every value that is none, and gives the first of them
    try:
        strings = texts.view(pa.string())  # bytes that are no text are no number either
        if kind in _STORED:
            numbers: Values = strings.cast(_STORED[kind]).to_numpy(zero_copy_only=False)
            return None if kind is ColumnType.FLOAT and np.isinf(numbers).any() else numbers
        try:
            ids: Values = strings.cast(pa.uint64()).to_numpy(zero_copy_only=False)
        except pa.ArrowException:
            ids = strings.cast(pa.int64()).to_numpy(zero_copy_only=False).view(np.uint64)
        return ids
    except pa.ArrowException:
        return None


def _number(text: bytes, kind: ColumnType) -> Any:
    """One value; None if it is none."""
    if (known := _BOOLS.get(text.lower())) is not None:
        return known
    if kind is ColumnType.FLOAT:
        if not _NUMBER.match(text):
            return None
        with np.errstate(over="ignore"):
            value = np.float32(float(text))
        return None if np.isinf(value) and b"inf" not in text.lower() else value
    if not _WHOLE.match(text):
        return None
    whole = int(text.partition(b".")[0])
    if kind is ColumnType.INT:
        return whole if _INT64_MIN <= whole <= _INT64_MAX else None
    return whole & _UINT64_MAX if _INT64_MIN <= whole <= _UINT64_MAX else None


def _shown(text: bytes) -> str:
    shown = restored(text).decode(errors="backslashreplace")
    return repr(shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…")
