"""A cluster kept in files `<base>/<role>/<index>` with the address as content; for tests and single machines."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from trilith.discovery.addresses import check_address
from trilith.discovery.watchers import Watchers
from trilith.errors import InvalidRequestError, UnavailableError

__all__ = ["HostFilesDirectory"]


_ROLE = re.compile(r"\w[-\w]*", re.ASCII)


class HostFilesDirectory:
    """Members as files, which appear whole; a thread looks for changes where somebody watches.

    Nothing notices that a member died: its file stays until it is deregistered or replaced.
    """

    def __init__(self, base: str | Path, *, poll_s: float = 0.2) -> None:
        """Keep members below `base`, made if it does not exist."""
        self._base = Path(base)
        self._poll_s = poll_s
        self._registered: dict[tuple[str, int], str] = {}
        self._watched: dict[str, Watchers[int, str]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        """Where."""
        return f"HostFilesDirectory({str(self._base)!r})"

    def register(self, role: str, index: int, address: str) -> None:
        """Write the member's file."""
        check_address(address)
        path = self._path(role, index)
        fresh = path.with_name(f".{index}.{os.getpid()}.{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(address)
            fresh.replace(path)
        except OSError as error:
            raise UnavailableError(f"cannot write {path}: {error}") from None
        with self._lock:
            self._registered[role, index] = address

    def deregister(self, role: str, index: int, address: str) -> None:
        """Delete the member's file if it names `address`."""
        with self._lock:
            if self._registered.get((role, index)) == address:
                del self._registered[role, index]
        path = self._path(role, index)
        if _read(path) == address:
            path.unlink(missing_ok=True)

    def query(self, role: str) -> Mapping[int, str]:
        """Read the files of a role."""
        found: dict[int, str] = {}
        try:
            names = os.listdir(self._base / role)
        except (FileNotFoundError, NotADirectoryError):
            return found
        for name in names:
            if name.isascii() and name.isdigit() and (address := _read(self._base / role / name)):
                found[int(name)] = address
        return dict(sorted(found.items()))

    def watch(self, role: str, changed: Callable[[Mapping[int, str]], None]) -> Callable[[], None]:
        """Look for changes several times a second."""
        with self._lock:
            watchers = self._watched.get(role)
            if watchers is None:
                watchers = self._watched[role] = Watchers(self.query(role))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="trilith-host-files", daemon=True)
                self._thread.start()
        return watchers.add(changed)

    def _run(self) -> None:
        while not self._closed.wait(self._poll_s):
            with self._lock:
                watched = list(self._watched.items())
            for role, watchers in watched:
                watchers.publish(self.query(role))

    def close(self) -> None:
        """Delete the files of members registered here, and stop watching."""
        with self._lock:
            registered = list(self._registered.items())
            thread, self._thread = self._thread, None
        self._closed.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        for (role, index), address in registered:
            self.deregister(role, index, address)

    def _path(self, role: str, index: int) -> Path:
        if not _ROLE.fullmatch(role) or index < 0:
            raise InvalidRequestError(f"{role!r} {index} is no member; a role is a word and an index 0 or more")
        return self._base / role / str(index)


def _read(path: Path) -> str:
    """The address in a member's file; empty if there is none."""
    try:
        return path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""
