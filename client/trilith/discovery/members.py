"""How a client finds the PS of a cluster in a directory: how many there are, and where each is now."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from trilith.discovery import PS, Directory
from trilith.discovery.record import ClusterRecord, RecordKeeper
from trilith.errors import ClusterMismatchError, UnavailableError
from trilith.routing import OWNER_RULE
from trilith.runtime.forks import keep_for_ever, renew_in_children
from trilith.runtime.waiting import Wait

__all__ = ["Members", "count_ps", "resolve_ps", "wait_for_ps"]

_POLL_S = 0.1


class Members:
    """The directory of a client, and who follows its PS; a forked child opens one of its own when it first asks."""

    def __init__(self, open_directory: Callable[[], Directory]) -> None:
        """Open the directory."""
        self._open = open_directory
        self._lock = threading.Lock()
        self._changed: Callable[[Mapping[int, str]], None] | None = None
        self._directory: Directory | None = open_directory()
        renew_in_children(self)

    def after_fork(self) -> None:
        """The session, and the thread that follows it, are the parent's."""
        keep_for_ever(self._directory)
        self._lock = threading.Lock()
        self._directory = None

    @property
    def directory(self) -> Directory:
        """The directory of this process."""
        found = self._directory
        return found if found is not None else self._open_again()

    def _open_again(self) -> Directory:
        with self._lock:
            if self._directory is not None:
                return self._directory
            directory = self._directory = self._open()
        if self._changed is not None:
            threading.Thread(
                target=directory.watch, args=(PS, self._changed), name="trilith-follow", daemon=True
            ).start()
        return directory

    def follow(self, changed: Callable[[Mapping[int, str]], None]) -> None:
        """Call `changed` with the PS as they are now, and whenever they change."""
        self._changed = changed
        self.directory.watch(PS, changed)

    def resolve(self, index: int) -> str:
        """Where a PS is at the moment; see `resolve_ps`."""
        return resolve_ps(self.directory, index)

    def close(self) -> None:
        """Close the directory, if this process has one."""
        if self._directory is not None:
            self._directory.close()


def resolve_ps(directory: Directory, index: int) -> str:
    """Where a PS is at the moment.

    Raises:
        UnavailableError: The directory does not know it at the moment.
    """
    found = directory.query(PS).get(index)
    if found is None:
        raise UnavailableError(f"no PS {index} in the directory at the moment")
    return found


def count_ps(directory: Directory, *, num_ps: int | None = None, timeout_s: float = 30.0) -> int:
    """How many PS the cluster has: what its record says, which is waited for, else `num_ps`, else how many are listed.

    Raises:
        ClusterMismatchError: The record says something else than `num_ps`, or follows another owner rule.
        UnavailableError: There is no record in time: no PS has ever registered there.
    """
    if isinstance(directory, RecordKeeper):
        deadline = time.monotonic() + timeout_s
        with Wait(f"a PS to register in {directory!r}", most=timeout_s):
            while (record := directory.read_record()) is None:
                if time.monotonic() >= deadline:
                    raise UnavailableError(f"{directory!r} has no record of a cluster: no PS has registered there")
                time.sleep(_POLL_S)
        record.check(ClusterRecord(num_ps=num_ps or record.num_ps, owner_rule=OWNER_RULE), "this client")
        return record.num_ps
    listed = sorted(directory.query(PS))
    if num_ps is not None:
        if listed and listed[-1] >= num_ps:
            raise ClusterMismatchError(f"the directory lists PS {listed}; this client expects {num_ps}")
        return num_ps
    if listed != list(range(len(listed))) or not listed:
        raise ClusterMismatchError(f"the directory lists PS {listed}, which is not 0 up to their number")
    return len(listed)


def wait_for_ps(directory: Directory, count: int, *, timeout_s: float) -> None:
    """Wait until every PS is listed.

    Raises:
        UnavailableError: Some are not in time.
    """
    complete = threading.Event()
    known: dict[int, str] = {}

    def changed(members: Mapping[int, str]) -> None:
        nonlocal known
        known = dict(members)
        if all(index in members for index in range(count)):
            complete.set()

    stop = directory.watch(PS, changed)
    try:
        if complete.is_set():
            return
        missing = [index for index in range(count) if index not in known]
        with Wait(f"PS {missing} of {count} to register in {directory!r}", most=timeout_s):
            if not complete.wait(timeout_s):
                missing = [index for index in range(count) if index not in known]
                raise UnavailableError(f"PS {missing} of {count} are not in the directory within {timeout_s:.3g} s")
    finally:
        stop()
