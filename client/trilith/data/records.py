"""Chunks of serialized records: what flows through a pipeline before anything is parsed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from trilith.data.choices import Choice
from trilith.errors import InvalidRequestError
from trilith.ops.jit import kernel
from trilith.ops.memory import address_of, copy_line, load_u64

__all__ = ["PADDING", "Kind", "Records", "gather_payloads", "joined_sources", "measure_payloads"]

PADDING = 64
"""Bytes that can be read behind the last payload of a buffer: kernels load whole lines."""

_MEMORY = "(memory)"
# What np.int64 is inside a kernel, for the type checker: an int.
_int64 = cast("type[int]", np.int64)


class Kind(Choice):
    """What the payloads of records are."""

    INSTANCE = "instance"
    EXAMPLE = "example"
    EXAMPLE_BATCH = "examplebatch"
    PLAINTEXT = "plaintext"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Records:
    """Some serialized records. Immutable: whoever changes records makes new ones.

    Attributes:
        kind: What the payloads are.
        buffer: uint8[size]; at least `PADDING` bytes follow the last payload.
        offsets: int64[n], where each payload begins in `buffer`; in any order, and payloads may overlap.
        lengths: int64[n], bytes of each payload.
        source_keys: uint32[n], data source key of each record's header; 0 without one.
        numbers: int64[n], number of each record in its file, from 0.
        positions: int64[n], byte at which each record's frame begins in its file, uncompressed.
        sources: Names of files.
        source_index: int32[n], the file each record came from, as an index into `sources`.
    """

    kind: Kind
    buffer: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    source_keys: npt.NDArray[np.uint32]
    numbers: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    sources: tuple[str, ...]
    source_index: npt.NDArray[np.int32]

    @classmethod
    def of(
        cls,
        payloads: Sequence[bytes],
        kind: Kind | str,
        *,
        source_keys: npt.ArrayLike | None = None,
        source: str = _MEMORY,
    ) -> Records:
        """Records that hold copies of payloads.

        Args:
            payloads: One per record.
            kind: What they are.
            source_keys: uint32[n]; zeros by default.
            source: Name for messages.
        """
        n = len(payloads)
        lengths = np.fromiter(map(len, payloads), np.int64, n)
        ends = np.cumsum(lengths)
        return cls(
            kind=Kind(kind),
            buffer=np.frombuffer(b"".join((*payloads, bytes(PADDING))), np.uint8),
            offsets=ends - lengths,
            lengths=lengths,
            source_keys=np.zeros(n, np.uint32) if source_keys is None else np.asarray(source_keys, np.uint32),
            numbers=np.arange(n),
            positions=ends - lengths,
            sources=(source,),
            source_index=np.zeros(n, np.int32),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Records]) -> Records:
        """The records of all parts in order, in new memory.

        Args:
            parts: At least one, of one kind.
        """
        if not parts:
            raise InvalidRequestError("nothing to concatenate: give at least one Records")
        kinds = sorted({str(part.kind) for part in parts})
        if len(kinds) > 1:
            raise InvalidRequestError(f"records of one chunk are of one kind, not {kinds}")
        form = type(parts[0]) if len({type(part) for part in parts}) == 1 else Records
        return form._joined(parts)

    @classmethod
    def _joined(cls, parts: Sequence[Any]) -> Records:
        size = sum(int(part.lengths.sum()) for part in parts)
        buffer = _padded(size)
        offsets = np.empty(sum(map(len, parts)), np.int64)
        row = used = 0
        for part in parts:
            n = len(part)
            used = _gather(part, address_of(buffer), used, offsets[row : row + n])
            row += n
        sources, source_index = joined_sources(parts)
        return Records(
            kind=parts[0].kind,
            buffer=buffer,
            offsets=offsets,
            lengths=np.concatenate([part.lengths for part in parts]),
            source_keys=np.concatenate([part.source_keys for part in parts]),
            numbers=np.concatenate([part.numbers for part in parts]),
            positions=np.concatenate([part.positions for part in parts]),
            sources=sources,
            source_index=source_index,
        )

    def __len__(self) -> int:
        return self.numbers.size

    @property
    def payload_bytes(self) -> int:
        """Bytes of all payloads together."""
        return int(self.lengths.sum())

    def payload(self, index: int) -> bytes:
        """A copy of one payload."""
        start = int(self.offsets[index])
        return self.buffer[start : start + int(self.lengths[index])].tobytes()

    def payloads(self) -> list[bytes]:
        """Copies of all payloads."""
        data = self.buffer.data
        bounds = zip(self.offsets.tolist(), self.lengths.tolist(), strict=True)
        return [bytes(data[start : start + length]) for start, length in bounds]

    def take(self, rows: npt.ArrayLike | slice) -> Records:
        """The records at `rows`, sharing this chunk's buffer.

        Args:
            rows: Indices in the order wanted (repeats are fine), a bool[n] mask, or a slice.
        """
        chosen: Any = rows if isinstance(rows, slice) else np.asarray(rows)
        if not isinstance(chosen, slice) and not chosen.size:
            chosen = chosen.astype(bool) if chosen.dtype == np.bool_ else chosen.astype(np.int64)
        return Records(
            kind=self.kind,
            buffer=self.buffer,
            offsets=self.offsets[chosen],
            lengths=self.lengths[chosen],
            source_keys=self.source_keys[chosen],
            numbers=self.numbers[chosen],
            positions=self.positions[chosen],
            sources=self.sources,
            source_index=self.source_index[chosen],
        )

    def compact(self) -> Records:
        """The same records in a buffer of their own that holds nothing else."""
        return Records.concatenate([self])

    def replace(
        self,
        *,
        buffer: npt.NDArray[np.uint8],
        offsets: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        kind: Kind | None = None,
    ) -> Records:
        """Other payloads of the same records: everything but the payloads, and perhaps the kind, stays.

        Args:
            buffer: uint8[size] with `PADDING` bytes behind the last payload.
            offsets: int64[n].
            lengths: int64[n].
            kind: What the new payloads are, if something else.
        """
        return Records(
            kind=self.kind if kind is None else kind,
            buffer=buffer,
            offsets=offsets,
            lengths=lengths,
            source_keys=self.source_keys,
            numbers=self.numbers,
            positions=self.positions,
            sources=self.sources,
            source_index=self.source_index,
        )

    def renumbered(self, numbers: npt.NDArray[np.int64]) -> Records:
        """The same records with other `numbers`, int64[n]."""
        return dataclasses.replace(self, numbers=numbers)

    def where(self, index: int) -> str:
        """Where a record came from, for messages: "FILE: record 7, byte 812"."""
        name = self.sources[int(self.source_index[index])]
        return f"{name}: record {int(self.numbers[index])}, byte {int(self.positions[index])}"


def joined_sources(parts: Sequence[Records]) -> tuple[tuple[str, ...], npt.NDArray[np.int32]]:
    """The `sources` and `source_index` of the records of all parts in order."""
    sources = tuple(dict.fromkeys(name for part in parts for name in part.sources))
    place = {name: index for index, name in enumerate(sources)}
    index = [np.array([place[name] for name in part.sources], np.int32)[part.source_index] for part in parts]
    return sources, np.concatenate(index)


def _padded(size: int) -> npt.NDArray[np.uint8]:
    """uint8[size + PADDING] whose last bytes are zero."""
    buffer = np.empty(size + PADDING, np.uint8)
    buffer[size:] = 0
    return buffer


def _gather(part: Records, target: int, used: int, offsets: npt.NDArray[np.int64]) -> int:
    """Copy the payloads of `part` behind the `used` bytes at `target`; writes `offsets`, returns the bytes now used."""
    lengths = np.ascontiguousarray(part.lengths)
    starts = np.ascontiguousarray(part.offsets)
    np.cumsum(lengths, out=offsets)
    offsets += used - lengths
    total = used + int(lengths.sum())
    gather_payloads(address_of(part.buffer), address_of(starts), address_of(lengths), len(part), target + used)
    return total


@kernel("void(int64, int64, int64, int64, int64)")
def gather_payloads(buffer: int, offsets: int, lengths: int, n: int, out: int) -> None:
    """Copy payloads one behind another.

    Args:
        buffer: Address of the payloads' buffer, with 64 bytes to read behind each.
        offsets: Address of int64[n].
        lengths: Address of int64[n].
        n: Number of payloads.
        out: Address of uint8[sum of lengths + 64], written; the last 64 bytes may be overwritten with anything.
    """
    for i in range(n):
        start = buffer + _int64(load_u64(offsets, i))
        length = _int64(load_u64(lengths, i))
        for at in range(0, length, 64):
            copy_line(out + at, start + at)
        out += length


@kernel("int64(int64, int64, int64, int64)")
def measure_payloads(offsets: int, lengths: int, n: int, room: int) -> int:
    """Check that payloads lie within a buffer.

    Args:
        offsets: Address of int64[n].
        lengths: Address of int64[n].
        n: Number of payloads.
        room: Bytes that payloads may lie in.

    Returns:
        Bytes of all payloads together; -1 if one reaches outside.
    """
    total = 0
    for i in range(n):
        start, length = _int64(load_u64(offsets, i)), _int64(load_u64(lengths, i))
        if start < 0 or length < 0 or length > room - start:
            return -1
        total += length
    return total
