"""Records one after another in a stream of bytes: behind the header that a framing describes, or as TFRecords."""

from __future__ import annotations

import numpy as np

from trilith.data.blocks import Blocks
from trilith.data.choices import OnError
from trilith.data.formats import framing_kernels as kernels
from trilith.data.formats.compression import compression_of, decompressing
from trilith.data.formats.framing import MAX_PAYLOAD, Framing, Scratch, explain, split_frames
from trilith.data.formats.reading import BLOCK_BYTES, Losses, Position, ReadOptions, RecordReader
from trilith.data.formats.streams import ByteStream, open_stream, stream_name
from trilith.data.records import PADDING, Kind, Records
from trilith.errors import DataError, InvalidRequestError
from trilith.ops.memory import address_of

__all__ = ["StreamReader", "open_reader"]


def open_reader(path: str, file_format: str, options: ReadOptions) -> StreamReader:
    """Open a file of records or TFRecords."""
    stored = compression_of(path, file_format, **options.some("compression", "use_snappy"))
    return StreamReader(
        decompressing(open_stream(path), stored),
        name=stream_name(path),
        framing=None if file_format == "tfrecord" else options.framing or Framing(),
        **options.some("kind", "block_bytes", "blocks", "start", "on_error"),
    )


class StreamReader(RecordReader):
    """Framed records of a stream.

    A buffer that nobody holds any more is filled again, so a consumer that lets go of chunks costs no new memory.

    Args:
        stream: Uncompressed bytes, at their beginning; closed with the reader.
        name: For messages.
        kind: What the payloads are.
        framing: What stands in front of payloads; None reads TFRecords.
        block_bytes: Bytes of a buffer.
        blocks: Where buffers come from.
        start: Where to begin.
        on_error: What to do about damage.
    """

    def __init__(
        self,
        stream: ByteStream,
        *,
        name: str,
        kind: Kind,
        framing: Framing | None,
        block_bytes: int = BLOCK_BYTES,
        blocks: Blocks | None = None,
        start: Position | None = None,
        on_error: OnError = "raise",
    ) -> None:
        if block_bytes < 1:
            stream.close()
            raise InvalidRequestError(f"block_bytes={block_bytes}: a buffer holds at least one byte")
        self.kind = kind
        self.losses = Losses()
        self._stream = stream
        self._name = name
        self._framing = framing
        self._block = block_bytes
        self._skip_damage = on_error == "skip"
        self._scratch = Scratch()
        self._blocks = blocks or Blocks()
        self._buffer = np.empty(0, np.uint8)
        self._begin = self._end = 0
        start = start or Position()
        self._records, self._offset = start.records, start.offset
        self._more = True
        self._damage: str | None = None
        if (passed := stream.skip(start.offset)) < start.offset:
            stream.close()
            raise InvalidRequestError(f"{name}: cannot start at byte {start.offset}: it has only {passed}")

    @property
    def position(self) -> Position:
        """Behind the last chunk given out."""
        return Position(self._records, self._offset)

    @property
    def progress(self) -> tuple[int, int | None]:
        """Stored bytes taken so far, and how many there are, where that is known."""
        return self._stream.raw_bytes, self._stream.raw_size

    def close(self) -> None:
        """Close the stream; what was given out stays valid."""
        self._more = False
        self._begin = self._end = 0
        self._stream.close()

    def __next__(self) -> Records:
        need = 1
        while True:
            if self._end - self._begin >= need or not self._more:
                self._split()
                if self._scratch.found:
                    return self._chunk()
                if self._scratch.status != kernels.WHOLE:
                    self._damaged()
                    continue
                need = max(self._scratch.need, self._end - self._begin + 1)
                if not self._more:
                    self._finish()
                    self._stream.close()
                    raise StopIteration
            self._fill(need)

    # ---- finding records -------------------------------------------------------------------------------------------

    def _split(self) -> None:
        if self._framing is not None:
            split_frames(self._buffer, self._begin, self._end, self._framing, self._scratch)
            return
        scratch = self._scratch
        offsets, lengths, result = scratch.addresses[1], scratch.addresses[2], scratch.addresses[5]
        kernels.walk_tfrecords(
            address_of(kernels.CRC_TABLES),
            address_of(self._buffer) + self._begin,
            self._end - self._begin,
            scratch.capacity,
            offsets,
            lengths,
            result,
        )
        scratch.found, scratch.used, scratch.status, _ = scratch.result.tolist()
        found = slice(0, scratch.found)
        scratch.lengths[found] -= scratch.offsets[found]
        np.subtract(scratch.offsets[found], kernels.TFRECORD_HEAD, out=scratch.starts[found])
        scratch.need = self._tfrecord_bytes(self._begin + scratch.used)
        if scratch.status == kernels.WHOLE and scratch.need - kernels.FRAME_BYTES > MAX_PAYLOAD:
            scratch.status = kernels.PAYLOAD_TOO_LONG

    def _tfrecord_bytes(self, at: int) -> int:
        """Bytes of the TFRecord at `at` of the buffer, as far as its length is there."""
        if self._end - at < kernels.FRAME_BYTES:  # only then was its checksum looked at
            return kernels.FRAME_BYTES
        return kernels.FRAME_BYTES + int.from_bytes(self._buffer[at : at + 8].tobytes(), "little")

    def _chunk(self) -> Records:
        scratch = self._scratch
        n = scratch.found
        framed = self._framing is not None and self._framing.lagrangex_header
        records = Records(
            kind=self.kind,
            buffer=self._buffer,
            offsets=scratch.offsets[:n] + self._begin,
            lengths=scratch.lengths[:n].copy(),
            source_keys=scratch.keys[:n].copy() if framed else np.zeros(n, np.uint32),
            numbers=np.arange(self._records, self._records + n),
            positions=scratch.starts[:n] + self._offset,
            sources=(self._name,),
            source_index=np.zeros(n, np.int32),
        )
        self._advance(n, scratch.used)
        return records

    def _advance(self, records: int, size: int) -> None:
        self._records += records
        self._begin += size
        self._offset += size

    # ---- damage ----------------------------------------------------------------------------------------------------

    def _hint(self) -> str:
        """What to say of a file of which not even the first record can be read."""
        if self._records:
            return ""
        what = "TFRecord" if self._framing is None else "format 'records' with this framing"
        return f" (read as {what}; `trilith data inspect` guesses how a file is stored)"

    def _where(self) -> str:
        return f"{self._name}: record {self._records}, byte {self._offset}"

    def _damaged(self) -> None:
        """Report the record at the beginning of the data; pass over it, or over all that is left."""
        scratch = self._scratch
        left = self._end - self._begin
        message = f"{self._where()}: {explain(scratch.status, left, scratch.need)}{self._hint()}"
        if not self._skip_damage:
            raise DataError(message)
        if scratch.status == kernels.BAD_PAYLOAD:
            self.losses.add(message, scratch.need)
            self._advance(1, scratch.need)
            return
        self.losses.add(f"{message}; the rest of the file is lost", left + self._drain())
        self._records += 1
        self._offset += left
        self._begin = self._end
        self._damage = None

    def _drain(self) -> int:
        """Pass over what is left of the stream behind the data at hand; how many bytes that was."""
        self._more = False
        try:
            drained = self._stream.skip(1 << 62)
        except (DataError, OSError):  # it is lost in any case
            drained = 0
        self._offset += drained
        return drained

    def _finish(self) -> None:
        """Report what is wrong with the end of the stream, if anything."""
        left = self._end - self._begin
        if self._damage is None and not left:
            return
        reason = self._damage or explain(kernels.WHOLE, left, self._scratch.need)
        message = f"{self._where()}: {reason}{self._hint()}"
        if not self._skip_damage:
            raise DataError(message)
        self.losses.add(message, left)
        self._advance(1, left)
        self._damage = None

    # ---- filling buffers -------------------------------------------------------------------------------------------

    def _fill(self, need: int) -> None:
        """Read more behind the data at hand, in a new buffer if this one has no room for a record of `need` bytes."""
        room = self._buffer.size - PADDING - self._end
        if room <= 0 or (self._begin and self._begin + need > self._buffer.size - PADDING):
            self._renew(need)
        view = self._buffer.data[self._end : self._buffer.size - PADDING]
        self._end += self._read(view)

    def _read(self, target: memoryview) -> int:
        try:
            got = self._stream.readinto(target)
        except DataError as error:
            self._damage, self._more = str(error), False
            return 0
        except OSError as error:  # not the file's fault, and no reason to skip anything
            raise DataError(f"{self._where()}: reading failed: {error}") from error
        self._more = got > 0
        return got

    def _renew(self, need: int) -> None:
        """Move the data at hand to the beginning of a buffer that nobody holds.

        A header may claim anything, so the buffer only doubles with the bytes that are really there.
        """
        kept = self._end - self._begin
        buffer = self._blocks.take(max(self._block, min(need, 2 * kept)) + PADDING)
        self._blocks.keep(buffer)
        buffer[:kept] = self._buffer[self._begin : self._end]
        self._buffer = buffer
        self._begin, self._end = 0, kept
