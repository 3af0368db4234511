"""Bytes from anywhere: local files, whatever fsspec reaches, standard input."""

from __future__ import annotations

import os
import stat
import sys
import weakref
from typing import IO, Any, Protocol

from trilith.errors import InvalidRequestError

__all__ = [
    "STDIN",
    "ByteStream",
    "FileStream",
    "NoSuchFileError",
    "open_file",
    "open_stream",
    "read_once",
    "skip_by_reading",
    "stream_name",
]

STDIN = ""
"""The file name that means standard input."""


class NoSuchFileError(InvalidRequestError):
    """A file that is to be read does not exist, or no longer."""


class ByteStream(Protocol):
    """Bytes that are read from the front to the back."""

    def readinto(self, target: memoryview) -> int:
        """Fill `target` from its beginning, perhaps in part; 0 only at the end.

        Raises:
            DataError: The stream is damaged here; what came before it has been given out.
        """

    def skip(self, count: int) -> int:
        """Pass over up to `count` bytes; how many there were."""

    def close(self) -> None:
        """Let go of the file."""

    @property
    def raw_bytes(self) -> int:
        """Bytes taken from the file so far, as they are stored."""

    @property
    def raw_size(self) -> int | None:
        """Bytes of the file as they are stored, where that is known."""


def stream_name(path: str) -> str:
    """How messages call a file."""
    return "(standard input)" if path == STDIN else path


def read_once(path: str) -> bool:
    """Whether what has been read of a path is gone, as of a pipe: it cannot be looked into, nor shared."""
    try:
        return path == STDIN or ("://" not in path and not stat.S_ISREG(os.stat(path).st_mode))
    except OSError:  # whoever opens it will say so
        return False


def open_file(path: str, mode: str = "rb") -> IO[bytes]:
    """Open a file, by path or any URL that fsspec knows, for "rb" or "wb".

    Raises:
        InvalidRequestError: It does not exist or cannot be opened.
    """
    try:
        if "://" not in path:
            place = path if os.path.exists(path) else os.path.expanduser(path)
            return open(place, mode, buffering=0) if mode == "rb" else open(place, mode)
        import fsspec

        fs, place = fsspec.core.url_to_fs(path)
        if mode == "rb" and fs.protocol in ("file", ("file", "local")):
            return open(place, "rb", buffering=0)
        opened: IO[bytes] = fs.open(place, mode)
        weakref.finalize(opened, _nothing, fs)  # a file system closes with it what its files read from
    except FileNotFoundError:
        raise NoSuchFileError(f"{path}: no such file") from None
    except (OSError, ValueError, ImportError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidRequestError(f"{path}: cannot be opened: {reason}") from None
    else:
        return opened


def _nothing(kept: object) -> None:
    """What is bound to it lives as long."""


def open_stream(path: str) -> FileStream:
    """The bytes of a file as they are stored; the empty path is standard input."""
    if path == STDIN:
        return FileStream(sys.stdin.buffer, seekable=False, owned=False)
    return FileStream(open_file(path))


class FileStream:
    """The bytes of an open file.

    Args:
        file: Open for reading.
        seekable: Whether bytes can be passed over without reading them.
        owned: Whether `close` closes the file.
    """

    def __init__(self, file: IO[bytes], *, seekable: bool = True, owned: bool = True) -> None:
        self._file = file
        self._owned = owned
        self._taken = 0
        # A pipe gives what is there; filling a whole block would hold records back.
        self._read: Any = getattr(file, "readinto1", None) or getattr(file, "readinto", None) or self._copy_read
        self._seekable = seekable and file.seekable()
        self._size = self._measure() if self._seekable else None

    def readinto(self, target: memoryview) -> int:
        """Fill `target` from its beginning, perhaps in part; 0 only at the end."""
        got = self._read(target) or 0
        self._taken += got
        return int(got)

    def skip(self, count: int) -> int:
        """Pass over up to `count` bytes; how many there were."""
        if self._seekable and self._size is not None:
            count = max(0, min(count, self._size - self._taken))
            self._file.seek(count, os.SEEK_CUR)
            self._taken += count
            return count
        return skip_by_reading(self, count)

    def close(self) -> None:
        """Close the file, if it is this stream's own."""
        if self._owned:
            self._file.close()

    @property
    def raw_bytes(self) -> int:
        """Bytes taken from the file so far."""
        return self._taken

    @property
    def raw_size(self) -> int | None:
        """Bytes of the file, where that is known."""
        return self._size

    def _copy_read(self, target: memoryview) -> int:
        data = self._file.read(len(target))
        target[: len(data)] = data
        return len(data)

    def _measure(self) -> int:
        here = self._file.tell()
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(here)
        return int(size)


def skip_by_reading(stream: ByteStream, count: int) -> int:
    """Pass over up to `count` bytes of a stream that cannot seek; how many there were."""
    scratch = memoryview(bytearray(min(count, 1 << 18)))
    left = count
    while left:
        got = stream.readinto(scratch[: min(left, len(scratch))])
        if not got:
            break
        left -= got
    return count - left
