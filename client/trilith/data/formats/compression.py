"""Compressed streams of records: Hadoop's snappy blocks, zstd, gzip and zlib, in bounded memory in both directions."""

from __future__ import annotations

import struct
import zlib
from enum import StrEnum
from typing import IO, Any, Protocol

import cramjam

from trilith.data.formats.streams import STDIN, ByteStream, open_file, read_once, skip_by_reading
from trilith.errors import DataError, InvalidRequestError

__all__ = [
    "MARKS",
    "MAX_SNAPPY_CHUNK",
    "Compression",
    "Sink",
    "bare_name",
    "compressing",
    "compression_of",
    "decompressing",
    "effective_compression",
]

MAX_SNAPPY_CHUNK = 64 << 20
"""Bytes of the largest snappy chunk, compressed or not, that is believed."""

_PIECE = 1 << 16
_COMPRESSED = (".gz", ".gzip", ".zst", ".zstd", ".zz", ".zlib", ".snappy", ".bz2", ".xz")
_SNAPPY_BLOCK = 256 << 10


class Compression(StrEnum):
    """How a stream of records is compressed."""

    NONE = "none"
    SNAPPY = "snappy"
    """Hadoop's blocks: [u32 block length] { [u32 chunk length] [raw snappy] }, big-endian."""
    ZSTD = "zstd"
    ZLIB = "zlib"
    GZIP = "gzip"


_ENDINGS = {
    ".gz": Compression.GZIP,
    ".gzip": Compression.GZIP,
    ".zst": Compression.ZSTD,
    ".zstd": Compression.ZSTD,
    ".zz": Compression.ZLIB,
    ".zlib": Compression.ZLIB,
}
MARKS = {
    b"\x28\xb5\x2f\xfd": Compression.ZSTD,
    b"\x1f\x8b": Compression.GZIP,
    b"\x78\x01": Compression.ZLIB,
    b"\x78\x5e": Compression.ZLIB,
    b"\x78\x9c": Compression.ZLIB,
    b"\x78\xda": Compression.ZLIB,
}
"""What compressed files begin with."""
_UNREADABLE = (".bz2", ".xz", ".zip", ".lz4", ".7z")
_UNREADABLE_MARKS = {
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf": "7-Zip",
}

# The reference's names and codes; 0 and 1 both mean none, and only 0 leaves the choice open.
_CODES = {
    0: "UNKNOW",
    1: "NO",
    2: "SNAPPY",
    3: "ZSTD",
    4: "ZLIB",
    5: "GZIP",
}


def effective_compression(
    path: str, *, compression: Compression | str | int | None = None, use_snappy: bool | None = None
) -> Compression:
    """How a file is compressed, from what the caller says and how the file is called.

    Args:
        path: Only its ending counts: where `use_snappy` is None, `.snappy` makes it True.
        compression: A `Compression`, or a name (UNKNOW, NO, SNAPPY, …) or code (0 to 5) of the reference; None, 0 and
            UNKNOW leave the choice open.
        use_snappy: True allows nothing but snappy; False keeps the name from switching it on.

    Raises:
        InvalidRequestError: The name or code is unknown, or contradicts `use_snappy`.
    """
    given = _compression(compression)
    if use_snappy is None:
        use_snappy = path.endswith(".snappy")
    if use_snappy:
        if given not in (None, Compression.SNAPPY):
            raise InvalidRequestError(f"{path}: a file to be read as snappy cannot have compression={str(given)!r}")
        return Compression.SNAPPY
    return given or Compression.NONE


def bare_name(path: str) -> str:
    """A name in lower case without the ending of its compression."""
    name = path.partition("::")[0].lower() if "://" in path else path.lower()
    ending = next((each for each in _COMPRESSED if name.endswith(each)), "")
    return name.removesuffix(ending)


def compression_of(
    path: str,
    format: str,  # noqa: A002 - what a file's format is called
    *,
    compression: Compression | str | int | None = None,
    use_snappy: bool | None = None,
) -> Compression:
    """How a file that is to be read is compressed: as `effective_compression` says, if it says anything.

    Otherwise the ending of the name does, unless the file begins otherwise, as one does that a browser unpacked; and in
    formats whose files cannot begin like it, the mark of gzip or zstd.

    Raises:
        DataError: It is packed in a way that cannot be read.
        NoSuchFileError: It does not exist.
    """
    said = _compression(compression)
    if said is not None or use_snappy is not None or path == STDIN:
        return effective_compression(path, compression=compression, use_snappy=use_snappy)
    name = path.partition("::")[0].lower() if "://" in path else path.lower()
    if name.endswith(".snappy"):
        return Compression.SNAPPY
    named = next((each for ending, each in _ENDINGS.items() if name.endswith(ending)), None)
    marked = format in ("tfrecord", "csv")
    if named is None and not marked and not name.endswith(tuple(_UNREADABLE)):
        return Compression.NONE
    if read_once(path):
        return named or Compression.NONE
    with open_file(path) as file:
        head = file.read(6)
    if (marked or name.endswith(tuple(_UNREADABLE))) and (
        packed := next((each for mark, each in _UNREADABLE_MARKS.items() if head.startswith(mark)), None)
    ):
        raise DataError(f"{path}: record 0, byte 0: it is packed by {packed}, which is not read: unpack it first")
    for mark, each in MARKS.items():
        if head.startswith(mark) and (each is named or (marked and each is not Compression.ZLIB)):
            return each
    return Compression.NONE


def _compression(value: Compression | str | int | None) -> Compression | None:
    if value is None or isinstance(value, Compression):
        return value
    name = _CODES.get(value, str(value)) if isinstance(value, int) else value.upper()
    if name in ("UNKNOW", "UNKNOWN", ""):
        return None
    if name in ("NO", "NONE"):
        return Compression.NONE
    if name.lower() in set(Compression):
        return Compression(name.lower())
    raise InvalidRequestError(
        f"compression={value!r}: there are {[str(each) for each in Compression]} and codes 0 to 5"
    )


# ---- reading -------------------------------------------------------------------------------------------------------


def decompressing(raw: ByteStream, compression: Compression) -> ByteStream:
    """The uncompressed bytes of a stream; closing them closes `raw`."""
    match compression:
        case Compression.NONE:
            return raw
        case Compression.SNAPPY:
            return _SnappyStream(raw)
        case Compression.ZSTD:
            return _ZstdStream(raw)
        case _:
            return _DeflateStream(raw, compression)


class _Wrapped:
    """What the streams have in common: the stream they read from."""

    def __init__(self, raw: ByteStream) -> None:
        self._raw = raw

    def readinto(self, target: memoryview) -> int:
        raise NotImplementedError

    def skip(self, count: int) -> int:
        return skip_by_reading(self, count)

    def close(self) -> None:
        self._raw.close()

    @property
    def raw_bytes(self) -> int:
        return self._raw.raw_bytes

    @property
    def raw_size(self) -> int | None:
        return self._raw.raw_size

    def _read(self, size: int) -> bytes:
        """Exactly `size` raw bytes, fewer only at the end."""
        parts = []
        while size:
            part = bytearray(min(size, 1 << 20))
            got = self._raw.readinto(memoryview(part))
            if not got:
                break
            parts.append(bytes(part[:got]) if got < len(part) else bytes(part))
            size -= got
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _SnappyStream(_Wrapped):
    """Hadoop's snappy blocks; memory is bounded by one chunk, not by what a block claims to hold."""

    def __init__(self, raw: ByteStream) -> None:
        super().__init__(raw)
        self._block_left = 0
        self._ready = memoryview(b"")

    def readinto(self, target: memoryview) -> int:
        while not self._ready:
            self._ready = memoryview(self._next_chunk())
            if not self._ready and not self._block_left and self._ended:
                return 0
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    _ended = False

    def _next_chunk(self) -> bytes:
        """The next chunk, uncompressed; empty at the end, or where a chunk is."""
        if not self._block_left:
            head = self._read(4)
            if not head:
                self._ended = True
                return b""
            if len(head) < 4:
                raise self._cut("header of a block")
            (self._block_left,) = struct.unpack(">I", head)
            if not self._block_left:
                return b""
        head = self._read(4)
        if len(head) < 4:
            raise self._cut("header of a chunk")
        (size,) = struct.unpack(">I", head)
        if size > MAX_SNAPPY_CHUNK:
            raise self._damaged(f"a chunk claims {size} bytes; at most {MAX_SNAPPY_CHUNK} are allowed")
        chunk = self._read(size)
        if len(chunk) < size:
            raise self._cut(f"chunk of {size} bytes")
        try:
            length = cramjam.snappy.decompress_raw_len(chunk)
            if length > min(self._block_left, MAX_SNAPPY_CHUNK):
                raise self._damaged(f"a chunk holds {length} bytes where its block has {self._block_left} left")
            plain = bytes(cramjam.snappy.decompress_raw(chunk))
        except cramjam.DecompressionError as error:
            raise self._damaged(str(error)) from None
        self._block_left -= len(plain)
        return plain

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"the snappy stream is damaged before compressed byte {self.raw_bytes}: {reason}")

    def _cut(self, part: str) -> DataError:
        return DataError(f"the snappy stream ends at compressed byte {self.raw_bytes}, inside the {part}")


class _DeflateStream(_Wrapped):
    """zlib or gzip, any number of members one after another."""

    def __init__(self, raw: ByteStream, compression: Compression) -> None:
        super().__init__(raw)
        self._name = str(compression)
        self._bits = 31 if compression is Compression.GZIP else 15
        self._inflate: Any = None
        self._input = b""

    def readinto(self, target: memoryview) -> int:
        while True:
            if not self._input:
                self._input = self._read(_PIECE)
            ended = not self._input
            if self._inflate is None:
                if ended:
                    return 0
                if not self._input.strip(b"\0"):  # gzip files may end in zeros
                    self._input = b""
                    continue
                self._inflate = zlib.decompressobj(self._bits)
            try:
                plain = self._inflate.decompress(self._input, min(len(target), 1 << 20))
            except zlib.error as error:
                place = f"before compressed byte {self.raw_bytes}"
                raise DataError(f"the {self._name} stream is damaged {place}: {error}") from None
            self._input = self._inflate.unconsumed_tail
            if self._inflate.eof:
                self._input = self._inflate.unused_data
                self._inflate = None
            elif ended and not plain:
                raise DataError(f"the {self._name} stream ends too early, at compressed byte {self.raw_bytes}")
            if plain:
                target[: len(plain)] = plain
                return len(plain)


class _ZstdStream(_Wrapped):
    """zstd, any number of frames one after another."""

    def __init__(self, raw: ByteStream) -> None:
        import pyarrow as pa

        super().__init__(raw)
        self.closed = False
        self._stream = pa.CompressedInputStream(pa.PythonFile(self, mode="r"), "zstd")

    def readinto(self, target: memoryview) -> int:
        # Small pieces: what was unpacked in a call that fails is lost.
        try:
            return int(self._stream.readinto(target[:_PIECE]))
        except OSError as error:
            place = f"before compressed byte {self.raw_bytes}"
            raise DataError(f"the zstd stream is damaged or cut {place}: {error}") from None

    def read(self, size: int) -> bytes:
        """What the decompressor asks for."""
        return self._read(size)

    def close(self) -> None:
        self.closed = True
        super().close()


# ---- writing -------------------------------------------------------------------------------------------------------


class Sink(Protocol):
    """Where bytes are written to."""

    def write(self, data: Any) -> object:
        """Take some bytes."""

    def finish(self) -> None:
        """Write what is pending; the file stays open."""


def compressing(file: IO[bytes], compression: Compression) -> Sink:
    """A sink that compresses into `file`."""
    match compression:
        case Compression.NONE:
            return _PlainSink(file)
        case Compression.SNAPPY:
            return _SnappySink(file)
        case Compression.ZSTD:
            return _ZstdSink(file)
        case _:
            return _DeflateSink(file, compression)


class _PlainSink:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, data: Any) -> None:
        self._file.write(data)

    def finish(self) -> None:
        pass


class _SnappySink(_PlainSink):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._pending = bytearray()

    def write(self, data: Any) -> None:
        self._pending += data
        self._compress(len(self._pending) - len(self._pending) % _SNAPPY_BLOCK)

    def finish(self) -> None:
        self._compress(len(self._pending))

    def _compress(self, size: int) -> None:
        for start in range(0, size, _SNAPPY_BLOCK):
            plain = bytes(self._pending[start : min(start + _SNAPPY_BLOCK, size)])
            chunk = bytes(cramjam.snappy.compress_raw(plain))
            self._file.write(struct.pack(">II", len(plain), len(chunk)) + chunk)
        del self._pending[:size]


class _DeflateSink(_PlainSink):
    def __init__(self, file: IO[bytes], compression: Compression) -> None:
        super().__init__(file)
        self._deflate = zlib.compressobj(wbits=31 if compression is Compression.GZIP else 15)

    def write(self, data: Any) -> None:
        self._file.write(self._deflate.compress(data))

    def finish(self) -> None:
        self._file.write(self._deflate.flush())


class _ZstdSink(_PlainSink):
    def __init__(self, file: IO[bytes]) -> None:
        import pyarrow as pa

        super().__init__(file)
        # The compressor closes what it writes to, and this file is to stay open.
        self._stream = pa.CompressedOutputStream(pa.PythonFile(_Unclosed(file), mode="w"), "zstd")

    def write(self, data: Any) -> None:
        self._stream.write(data)

    def finish(self) -> None:
        self._stream.close()


class _Unclosed:
    """A file whose closing is somebody else's business."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self.write = file.write
        self.flush = file.flush

    def close(self) -> None:
        self.closed = True
