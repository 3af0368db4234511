"""Queues of strings, and file names dealt out to workers from one."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from trilith.data.formats.files import expand_glob
from trilith.data.pipeline.workers import torch_worker
from trilith.errors import InvalidRequestError, QueueFullError, TrilithError
from trilith.runtime.forks import renew_in_children

if TYPE_CHECKING:
    from trilith.client import Client

__all__ = ["AllOf", "AllowedFiles", "FileDealer", "LocalFiles", "OneQueue", "SharedFiles", "StrQueue"]

log = logging.getLogger(__name__)

CAPACITY = 100_000
_POLL_S = 0.2


class StrQueue:
    """First in, first out, in this process; its content can be saved. Thread-safe; queues may share one lock."""

    def __init__(
        self,
        initial_elements: Iterable[str] | None = None,
        critical_section: threading.RLock | None = None,
        auto_enqueue_fn: Callable[[], tuple[Sequence[str], bool]] | None = None,
        capacity: int = CAPACITY,
    ) -> None:
        """Make a queue.

        Args:
            initial_elements: What it holds at first.
            critical_section: Lock to use, reentrant; queues that fill each other share one.
            auto_enqueue_fn: Called while the queue is empty when something is asked of it; returns elements, and
                whether there will be no more of them (the elements of that last answer are not taken).
            capacity: Most elements it may hold.
        """
        if capacity < 1:
            raise InvalidRequestError(f"capacity={capacity} is below 1")
        self._lock = critical_section or threading.RLock()
        self._refill = auto_enqueue_fn
        self._capacity = capacity
        self._elements: deque[str] = deque()
        self.enqueue_many(initial_elements or ())

    def __len__(self) -> int:
        return len(self._elements)

    def enqueue_many(self, elements: Iterable[str]) -> None:
        """Append elements, all or, with QueueFullError, none."""
        if isinstance(elements, str):
            raise InvalidRequestError(f"elements={elements!r} is one string; a sequence of them is needed")
        more = list(elements)
        with self._lock:
            if len(self._elements) + len(more) > self._capacity:
                raise QueueFullError(
                    f"the queue holds {len(self._elements)} elements; {len(more)} more would exceed its capacity of "
                    f"{self._capacity}"
                )
            self._elements.extend(more)

    def dequeue(self) -> tuple[str, bool]:
        """Take the first element: (element, False), or ("", True) if there is none."""
        with self._lock:
            while not self._elements:
                if self._refill is None:
                    return "", True
                elements, out_of_range = self._refill()
                if out_of_range:
                    return "", True
                self.enqueue_many(elements)
            return self._elements.popleft(), False

    def state_dict(self) -> dict[str, Any]:
        """What it holds."""
        with self._lock:
            return {"elements": list(self._elements)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold what `state_dict` gave instead."""
        with self._lock:
            self._elements = deque(state["elements"])


class FileDealer(Protocol):
    """Deals out file names one by one."""

    def take(self, claim: str = "") -> str | None:
        """The next file, None if there are no more.

        With `claim`, that file if this worker may go on with it, else None.
        """

    def finish(self, name: str) -> None:
        """Say that a file was read to its end."""

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""

    def close(self) -> None:
        """Stop: files that were taken and not finished are others' to read."""


class LocalFiles:
    """Deals from two queues in this process: a queue of patterns, and one of the files they matched."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """Begin with `patterns`."""
        lock = threading.RLock()
        self._patterns = StrQueue(patterns, lock)
        self._files = StrQueue((), lock, self._expand_next)

    def _expand_next(self) -> tuple[list[str], bool]:
        pattern, out_of_range = self._patterns.dequeue()
        return ([], True) if out_of_range else (expand_glob(pattern), False)

    def take(self, claim: str = "") -> str | None:
        """See `FileDealer`; a claimed file was taken from the very queue that is restored, so it is granted."""
        if claim:
            return claim
        name, exhausted = self._files.dequeue()
        return None if exhausted else name

    def finish(self, name: str) -> None:
        """See `FileDealer`."""

    def state_dict(self) -> dict[str, Any]:
        """See `FileDealer`."""
        return {"patterns": self._patterns.state_dict(), "files": self._files.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `FileDealer`."""
        self._patterns.load_state_dict(state["patterns"])
        self._files.load_state_dict(state["files"])

    def close(self) -> None:
        """See `FileDealer`; several iterators may deal from the same queues, so they stay as they are."""


@dataclass(frozen=True, slots=True)
class AllOf:
    """Makes, for any epoch, a dealer of all files that patterns match."""

    patterns: tuple[str, ...]

    def __call__(self, epoch: int) -> LocalFiles:
        """A dealer of all of them."""
        return LocalFiles(self.patterns)


@dataclass(frozen=True, slots=True)
class OneQueue:
    """Makes, for an epoch, a dealer of the files of one queue on PS 0; see `SharedFiles`.

    Attributes:
        client: An open `trilith.Client`, or the address of its cluster.
        name: Of the queue.
        patterns: Paths or globs.
        worker: Name of this worker; random if empty.
        lease_s: Seconds until a silent worker's file is handed out again.
        process: Where this was made.
    """

    client: Client | str
    name: str
    patterns: tuple[str, ...]
    worker: str
    lease_s: float
    process: int = field(default_factory=os.getpid)

    def __call__(self, epoch: int) -> SharedFiles:
        """A dealer for this process; each worker of a DataLoader has a name of its own."""
        index, count = torch_worker()
        worker = f"{self.worker}/{index}" if self.worker and count > 1 else self.worker
        if isinstance(self.client, str):
            from trilith.connect import connect

            client, owned = connect(self.client), True
        else:
            client, owned = self.client, False
        if not client.addresses and os.getpid() != self.process:
            client.close()
            raise InvalidRequestError(
                "share: a cluster in this process (local://) has a queue in each process that is forked or spawned, "
                "which would each deal out all files; share through a PS"
            )
        name = f"{self.name}/{epoch}"
        return SharedFiles(client, name, self.patterns, worker=worker, lease_s=self.lease_s, owned=owned)

    def __reduce__(self) -> tuple[Any, ...]:
        if not isinstance(self.client, str):
            raise TypeError("an open client; give share the cluster's address instead")
        return OneQueue, (self.client, self.name, self.patterns, self.worker, self.lease_s, self.process)


class AllowedFiles:
    """What another dealer deals, without the files that are left out."""

    def __init__(self, dealer: FileDealer, exclude: Callable[[str], bool]) -> None:
        """Leave out the files of `dealer` of which `exclude` is true."""
        self._dealer = dealer
        self._exclude = exclude

    def take(self, claim: str = "") -> str | None:
        """See `FileDealer`."""
        while (name := self._dealer.take(claim)) is not None and self._exclude(name):
            self._dealer.finish(name)
            if claim:
                return None
        return name

    def finish(self, name: str) -> None:
        """See `FileDealer`."""
        self._dealer.finish(name)

    def state_dict(self) -> dict[str, Any]:
        """See `FileDealer`."""
        return self._dealer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `FileDealer`."""
        self._dealer.load_state_dict(state)

    def close(self) -> None:
        """See `FileDealer`."""
        self._dealer.close()


class SharedFiles:
    """Deals from queues on PS 0 that all workers of a job share, so that every file goes to one of them.

    A file is leased while it is read. If this worker dies, its lease lapses and another worker reads the file from its
    beginning; a worker that finds nothing waits as long as another one still has a file. A thread holds the leases
    until `close`, which gives unfinished files back. The queues are part of the cluster's checkpoints.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        patterns: Sequence[str],
        *,
        worker: str = "",
        lease_s: float = 60.0,
        pause: Callable[[float], None] = time.sleep,
        owned: bool = False,
    ) -> None:
        """Join the workers that share `name`; the first one's patterns count.

        Args:
            client: An open `trilith.Client`.
            name: Of this pass over the data: another pass needs another name.
            patterns: Paths or globs, which must mean the same to every worker.
            worker: A name that no other worker has and that this one keeps when it is started again; random if empty,
                then a restarted worker waits for its old lease to lapse.
            lease_s: Seconds until a silent worker's file is handed out again.
            pause: Waits so many seconds before asking again.
            owned: Whether `close` closes the client.
        """
        if not lease_s > 0:
            raise InvalidRequestError(f"lease_s={lease_s} is not above 0")
        self._client = client
        self._worker = worker or f"worker-{secrets.token_hex(8)}"
        self._lease_s = lease_s
        self._pause = pause
        self._owned = owned
        self._patterns, self._files = f"{name}/patterns", f"{name}/files"
        self._leases: dict[str, int] = {}
        self._name = name
        self._given = False
        self._closed = threading.Event()
        self._keeper: threading.Thread | None = None
        weakref.finalize(self, self._closed.set)
        renew_in_children(self)
        client.queues.create(self._files)
        client.queues.create(self._patterns, patterns)

    def after_fork(self) -> None:
        """A child is another worker, with no file yet: those that were taken are the parent's to read."""
        self._worker = f"{self._worker}-{secrets.token_hex(4)}"
        self._leases = {}
        self._closed = threading.Event()
        self._keeper = None

    def take(self, claim: str = "") -> str | None:
        """See `FileDealer`."""
        if self._closed.is_set():
            raise InvalidRequestError("this dealer of files was closed")
        self._keep_leases()
        queues = self._client.queues
        while True:
            given = queues.dequeue([self._files, self._patterns], self._worker, lease_s=self._lease_s, claim=claim)
            if given.queue == self._files:
                self._leases[given.element] = given.lease
                self._given = True
                return given.element
            if given:
                queues.acknowledge(self._worker, given.lease, queue=self._files, elements=expand_glob(given.element))
            elif claim or given.exhausted or self._closed.is_set():
                if not (claim or self._given or self._closed.is_set()):
                    self._given = True  # told once
                    log.warning(
                        "queue %r had no file for this worker: others, or an earlier run, took all; an epoch that is "
                        "to be read again, and other files, need a queue of another name",
                        self._name,
                    )
                return None
            else:
                self._pause(min(_POLL_S, self._lease_s))

    def finish(self, name: str) -> None:
        """See `FileDealer`."""
        lease = self._leases.pop(name, 0)
        if lease and not self._client.queues.acknowledge(self._worker, lease):
            log.warning("the lease of a file had lapsed; another worker may have read it too", extra={"file": name})

    def state_dict(self) -> dict[str, Any]:
        """See `FileDealer`; the queues themselves are the cluster's."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `FileDealer`."""
        self._given = True  # before

    def close(self) -> None:
        """See `FileDealer`."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._keeper is not None:
            self._keeper.join()
        if self._leases:
            self._leases.clear()
            try:
                self._client.queues.release_leases(self._worker)
            except TrilithError as error:
                log.warning("unfinished files come back when their leases lapse: %s", error)
        if self._owned:
            self._client.close()

    def _keep_leases(self) -> None:
        if self._keeper is None:
            self._keeper = threading.Thread(
                target=_hold,
                args=(weakref.ref(self), self._closed, self._lease_s / 3),
                name="trilith-file-leases",
                daemon=True,
            )
            self._keeper.start()

    def hold(self) -> None:
        """Prolong the leases once."""
        if self._leases:
            try:
                self._client.queues.hold_leases(self._worker, self._lease_s)
            except TrilithError as error:
                log.warning("leases of files could not be prolonged: %s", error)


def _hold(dealer: weakref.ref[SharedFiles], closed: threading.Event, every_s: float) -> None:
    """Keep a dealer's leases until it is closed or gone; holds no reference to it meanwhile."""
    while not closed.wait(every_s):
        alive = dealer()
        if alive is None:
            return
        alive.hold()
        del alive
