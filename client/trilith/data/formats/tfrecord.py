"""TFRecord files: framed records with masked CRC-32C, plain or inside a stream of snappy blocks.

Records are written and walked in batches by kernels; nothing here looks at a single record.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO

import cramjam
import numpy as np
import numpy.typing as npt

from trilith.data.formats import framing_kernels as kernels
from trilith.errors import DataError, TrilithError
from trilith.ops.memory import address_of

__all__ = ["RecordBatch", "RecordWriter", "concatenate", "frame_records", "read_records"]

SNAPPY_BLOCK = 256 * 1024
"""Uncompressed bytes of a block: what TensorFlow's reader accepts at most."""
_READ = 8 << 20
_MIN_LIMIT = 4096

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RecordBatch:
    """Some successive records of one file.

    Attributes:
        buffer: uint8[size], framed records; the payloads stand between the bounds below.
        starts: int64[n], where each payload begins in `buffer`.
        ends: int64[n], where it ends.
        first: Number of the first record in its file.
    """

    buffer: Bytes
    starts: Offsets
    ends: Offsets
    first: int

    def __len__(self) -> int:
        return self.starts.size

    def __getitem__(self, rows: slice) -> RecordBatch:
        first = self.first + rows.indices(len(self))[0]
        return RecordBatch(self.buffer, self.starts[rows], self.ends[rows], first)

    def payloads(self) -> list[bytes]:
        """Copies of the payloads."""
        data = self.buffer.data
        return [bytes(data[start:end]) for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True)]


def concatenate(records: Iterable[bytes]) -> tuple[Bytes, Offsets]:
    """Records one after another: uint8[total], and int64[n + 1] offsets."""
    kept = list(records)
    offsets = np.zeros(len(kept) + 1, np.int64)
    np.cumsum([len(record) for record in kept], out=offsets[1:])
    return np.frombuffer(b"".join(kept), np.uint8), offsets


def frame_records(buffer: Bytes, offsets: Offsets) -> Bytes:
    """Frame records.

    Args:
        buffer: uint8[size], C-contiguous.
        offsets: int64[n + 1]; record i is buffer[offsets[i]:offsets[i + 1]].

    Returns:
        uint8[offsets[n] - offsets[0] + 16 * n].
    """
    n = offsets.size - 1
    framed = np.empty(int(offsets[-1] - offsets[0]) + kernels.FRAME_BYTES * n, np.uint8)
    kernels.frame_tfrecords(
        address_of(kernels.CRC_TABLES), address_of(buffer), address_of(offsets), n, address_of(framed)
    )
    return framed


class RecordWriter:
    """Writes records to an open binary file; `close` ends the stream but leaves the file open."""

    def __init__(self, file: IO[bytes], *, snappy: bool = False) -> None:
        self._file = file
        self._snappy = snappy
        self._pending = bytearray()

    def write(self, buffer: Bytes, offsets: Offsets) -> None:
        """Write the records buffer[offsets[i]:offsets[i + 1]]."""
        framed = frame_records(buffer, offsets)
        if not self._snappy:
            self._file.write(framed.data)
            return
        self._pending += framed.data
        whole = len(self._pending) - len(self._pending) % SNAPPY_BLOCK
        self._compress(whole)

    def write_all(self, records: Iterable[bytes]) -> None:
        """Write a few records."""
        self.write(*concatenate(records))

    def close(self) -> None:
        """Write what is still pending."""
        self._compress(len(self._pending))

    def _compress(self, size: int) -> None:
        with memoryview(self._pending) as pending:
            for start in range(0, size, SNAPPY_BLOCK):
                block = bytes(cramjam.snappy.compress_raw(pending[start : min(start + SNAPPY_BLOCK, size)]))
                self._file.write(struct.pack(">I", len(block)) + block)
        del self._pending[:size]


def read_records(
    file: IO[bytes],
    *,
    name: str,
    snappy: bool = False,
    chunk: int = _READ,
    error: type[TrilithError] = DataError,
) -> Iterator[RecordBatch]:
    """Read a file's records in batches of about `chunk` bytes.

    Args:
        file: Open binary file.
        name: Of the file, for messages.
        snappy: Whether the records are inside a snappy stream.
        chunk: Bytes to read at a time.
        error: What to raise; a checkpoint's files raise CheckpointError.

    Raises:
        DataError: Or `error`: a checksum is wrong or the file ends inside a record; the message names the record.
    """
    rest = b""
    seen = 0
    for piece in _snappy_pieces(file, name, chunk, error) if snappy else iter(lambda: file.read(chunk), b""):
        data = rest + piece if rest else piece
        buffer = np.frombuffer(data, np.uint8)
        at = 0
        while True:
            batch, used = _walk(buffer[at:], name, seen, error)
            if not len(batch):
                break
            seen += len(batch)
            at += used
            yield batch
        rest = data[at:]
    if rest:
        raise error(f"{name}: ends inside record {seen}: {len(rest)} bytes are left")


def _walk(buffer: Bytes, name: str, first: int, error: type[TrilithError]) -> tuple[RecordBatch, int]:
    """The whole records at the start of `buffer` and how many bytes they take."""
    limit = max(_MIN_LIMIT, buffer.size // 64)
    starts, ends, result = np.empty(limit, np.int64), np.empty(limit, np.int64), np.empty(3, np.int64)
    kernels.walk_tfrecords(
        address_of(kernels.CRC_TABLES),
        address_of(buffer),
        buffer.size,
        limit,
        address_of(starts),
        address_of(ends),
        address_of(result),
    )
    found, used, status = result.tolist()
    if status != kernels.WHOLE and not found:
        part = "length" if status == kernels.BAD_LENGTH else "payload"
        raise error(f"{name}: record {first} is damaged: the checksum of its {part} does not match")
    return RecordBatch(buffer, starts[:found], ends[:found], first), used


def _snappy_pieces(file: IO[bytes], name: str, chunk: int, error: type[TrilithError]) -> Iterator[bytes]:
    """The uncompressed stream, some blocks at a time."""
    rest = b""
    while data := file.read(chunk):
        data = rest + data
        at = 0
        blocks = []
        while len(data) - at >= 4:
            (size,) = struct.unpack_from(">I", data, at)
            if size > 2 * SNAPPY_BLOCK:
                raise error(f"{name}: a snappy block claims {size} bytes; this is not such a stream")
            if len(data) - at - 4 < size:
                break
            blocks.append(_uncompress(data[at + 4 : at + 4 + size], name, error))
            at += 4 + size
        rest = data[at:]
        if blocks:
            yield b"".join(blocks)
    if rest:
        raise error(f"{name}: ends inside a snappy block: {len(rest)} bytes are left")


def _uncompress(block: bytes, name: str, error: type[TrilithError]) -> bytes:
    try:
        # The claimed size is checked first: a damaged one would ask for gigabytes.
        if cramjam.snappy.decompress_raw_len(block) > SNAPPY_BLOCK:
            raise error(f"{name}: a snappy block holds more than {SNAPPY_BLOCK} bytes")
        return bytes(cramjam.snappy.decompress_raw(block))
    except cramjam.DecompressionError as damage:
        raise error(f"{name}: a snappy block is damaged: {damage}") from None
