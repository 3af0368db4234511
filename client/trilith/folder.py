"""Folder: one directory on any filesystem that fsspec knows, whose files appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any

from trilith.errors import CheckpointError, InvalidRequestError

__all__ = ["Folder", "absolute"]

# Here a file appears whole when it is closed, and a rename would be a copy.
_WHOLE_ON_CLOSE = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss"})

# What file systems call a file's size and when it was changed.
_STAMPS = ("size", "mtime", "created", "LastModified", "last_modified", "updated", "ETag", "etag")


@dataclass(slots=True)
class Folder:
    """One directory on any filesystem that fsspec knows; files appear in it whole or not at all."""

    url: str
    _fs: Any = field(init=False, repr=False)
    _root: str = field(init=False, repr=False)
    _protocol: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        import fsspec

        self.url = absolute(self.url)
        if "\0" in self.url:
            raise InvalidRequestError(f"{self.url!r} is no directory or URL: no name has a zero byte")
        try:
            # A path on disk is no chain of URLs, even with "::" in a name.
            chained = "://" not in self.url and "::" in self.url
            self._fs, self._root = (fsspec.filesystem("file"), self.url) if chained else fsspec.core.url_to_fs(self.url)
        except OSError as error:  # some connect at once
            raise CheckpointError(f"{self.url} cannot be opened: {error}") from error
        except Exception as error:  # noqa: BLE001 (no such protocol, no package for it, something that it wants to know)
            raise InvalidRequestError(f"{self.url!r} is no directory or URL that fsspec can open: {error}") from None
        protocol = self._fs.protocol
        self._protocol = protocol if isinstance(protocol, str) else protocol[0]

    def path(self, name: str) -> str:
        """How a person would write the file's path."""
        return f"{self.url.rstrip('/')}/{name}"

    @property
    def local(self) -> bool:
        """Whether the files can be memory-mapped."""
        return self._protocol in {"file", "local"}

    def local_path(self, name: str) -> str:
        """Where the file is on this machine; only if `local`."""
        return os.path.join(self._root, name)

    def names(self) -> list[str]:
        """What the directory holds, sorted; nothing if it does not exist."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in found)

    def stamps(self) -> dict[str, tuple[str, ...]]:
        """Size and time of change by path of every file in the directory and below; equal as long as none changes."""
        self._fs.invalidate_cache()
        found = self._fs.find(self._root, detail=True)
        return {str(path): tuple(str(about.get(key)) for key in _STAMPS) for path, about in found.items()}

    def child(self, name: str) -> Folder:
        """The directory `name` below this one."""
        return Folder(self.path(name))

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(f"{self._root}/{name}"))

    def size(self, name: str) -> int | None:
        """Bytes of the file, None if it does not exist."""
        self._fs.invalidate_cache()
        try:
            return int(self._fs.size(f"{self._root}/{name}"))
        except FileNotFoundError:
            return None

    def open(self, name: str) -> IO[bytes]:
        """Open the file for reading."""
        handle: IO[bytes] = self._fs.open(f"{self._root}/{name}", "rb")
        return handle

    def read(self, name: str, *, most: int = 0) -> bytes:
        """Read the whole file.

        Raises:
            CheckpointError: It has more than `most` bytes; 0 is no limit.
        """
        with self.open(name) as handle:
            content = handle.read(most + 1 if most else -1)
        if most and len(content) > most:
            raise CheckpointError(f"{self.path(name)}: more than {most} bytes, which no file of its kind has")
        return content

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """Write the file: under a temporary name, synced, then renamed; gone if the body raises.

        Raises:
            CheckpointError: The file system does not let it be written.
        """
        final = f"{self._root}/{name}"
        whole = self._protocol in _WHOLE_ON_CLOSE
        temporary = final if whole else f"{final}.tmp-{secrets.token_hex(4)}"
        try:
            self._fs.makedirs(self._root, exist_ok=True)
            handle = self._fs.open(temporary, "wb")
            try:
                yield handle
                if self.local:
                    handle.flush()
                    os.fsync(handle.fileno())
            except BaseException:
                _discard(handle)
                raise
            handle.close()
            if self.local:
                os.replace(temporary, final)
                self._sync_directory()
            elif not whole:
                self._fs.mv(temporary, final)
        except BaseException as error:
            if not whole:  # there it would be the file that this one was to replace
                with suppress(Exception):
                    self._fs.rm(temporary)
            if isinstance(error, OSError):
                raise CheckpointError(f"{self.path(name)} cannot be written: {error}") from error
            raise

    def write(self, name: str, content: bytes) -> None:
        """Write the whole file, or nothing."""
        with self.create(name) as handle:
            handle.write(content)

    def check_writable(self) -> None:
        """Make the directory and a file in it, which is removed again.

        Raises:
            CheckpointError: That does not work.
        """
        name = f"writable-{secrets.token_hex(4)}"
        try:
            self.write(name, b"")
        except CheckpointError as error:  # which names a file that nobody has asked for
            raise CheckpointError(f"{self.url}: no files can be written there: {error.__cause__}") from error.__cause__
        self.remove(name)

    def remove(self, name: str) -> None:
        """Delete the file if it is there."""
        with suppress(FileNotFoundError):
            self._fs.rm(f"{self._root}/{name}")

    def remove_all(self) -> None:
        """Delete the directory and what is in it."""
        with suppress(FileNotFoundError):
            self._fs.rm(self._root, recursive=True)

    def _sync_directory(self) -> None:
        """Make the rename itself durable."""
        descriptor = os.open(self._root, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _discard(handle: Any) -> None:
    """Close a file whose content shall not be kept: closing one of an object store would upload what is there."""
    from fsspec.spec import AbstractBufferedFile

    with suppress(Exception):
        if isinstance(handle, AbstractBufferedFile):
            handle.closed = True
            handle.discard()  # what has been uploaded in pieces
        else:
            handle.close()


def absolute(path: str | os.PathLike[str]) -> str:
    """A path that means the same in every process: local ones become absolute, URLs stay."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(os.path.expanduser(text))
