"""Syncer: looks once an interval which ids were touched, and holds the targets that are told."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from trilith.errors import InvalidRequestError
from trilith.shard import UInt64Array
from trilith_proto import ps_pb2
from trilith_services.ps.engine.touched import Touched
from trilith_services.ps.replicas.sync import wire
from trilith_services.ps.replicas.sync.changes import ChangeLog
from trilith_services.ps.replicas.sync.encoded import EncodedChanges
from trilith_services.ps.replicas.sync.options import SyncOptions
from trilith_services.ps.replicas.sync.target import Target

if TYPE_CHECKING:
    from trilith.discovery.serving import ServingTask
    from trilith_services.ps.engine.store import Store
    from trilith_services.ps.engine.table import Table

__all__ = ["Syncer"]

log = logging.getLogger(__name__)


class Syncer:
    """Keeps the serving replicas of one shard fresh; thread-safe.

    Targets come and go while training goes on. While there are none nothing is noted, and training pays nothing.
    """

    def __init__(self, store: Store, options: SyncOptions | None = None) -> None:
        self._store = store
        self._options = options or SyncOptions()
        self._log = ChangeLog(self._options.most_ids)
        self._encoded = encoded = EncodedChanges()
        store.budget.watch(lambda: encoded.nbytes)
        self._targets: dict[str, Target] = {}
        self._changing = threading.Lock()  # over the targets
        self._looking = threading.Lock()  # over what is noted
        self._noted: dict[str, Table] = {}
        self._looked = time.time()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sync", daemon=True)
        self._followed: set[str] = set()  # names that `follow` has added
        self._unwatch: list[Callable[[], None]] = []

    def stop(self, *, flush_s: float = 0.0) -> None:
        """Stop pushing, when every replica that can be reached has all there is, or after `flush_s` seconds."""
        if flush_s and not self._stopping.is_set():
            self._flush(flush_s)
        self._stopping.set()
        while self._unwatch:
            self._unwatch.pop()()
        if self._thread.is_alive():
            self._thread.join()
        with self._changing:
            targets = list(self._targets.values())
            self._targets.clear()
        self._log.end()
        for target in targets:
            target.stop()
        self._forget()

    def _flush(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with self._changing:
            targets = list(self._targets.values())
        if not targets:
            return
        self.look()
        for target in targets:
            target.send_now()
        while lagging := [target.name for target in targets if target.can_catch_up]:
            if time.monotonic() >= deadline:
                log.warning("sync: stopped before all changes were sent", extra={"targets": lagging})
                return
            time.sleep(0.02)

    def add(self, name: str, address: str) -> None:
        """Keep the replica at `address` fresh from now on; a target of that name at another address is replaced."""
        if not name or ":" not in address:
            raise InvalidRequestError(f"sync target {name!r} at {address!r}: it takes a name and host:port")
        with self._changing:
            if not self._thread.is_alive() and not self._stopping.is_set():
                wire.compile_kernels()
                self._thread.start()
            known = self._targets.get(name)
            if (known is not None and known.address == address) or self._stopping.is_set():
                return
            target = self._targets[name] = Target(name, address, self._store, self._log, self._options, self._encoded)
            self._encoded.wanted = len(self._targets) > 1
        if known is not None:
            known.stop()
        log.info("sync: a target is added", extra={"target": name, "address": address})
        self.look()
        target.start()

    def remove(self, name: str) -> None:
        """Forget a target; one that is not there is no error."""
        with self._changing:
            target = self._targets.pop(name, None)
            self._encoded.wanted = len(self._targets) > 1
        if target is not None:
            target.stop()
            log.info("sync: a target is gone", extra={"target": name, "address": target.address})

    def follow(self, replicas: ServingTask) -> None:
        """Keep whoever is listed fresh, as they come and go."""

        def changed(members: Mapping[str, str]) -> None:
            wanted = {f"replica-{name}": address for name, address in members.items()}
            with self._changing:
                gone = self._followed - wanted.keys()
                self._followed = set(wanted)
            for name in gone:
                self.remove(name)
            for name, address in wanted.items():
                self.add(name, address)

        self._unwatch.append(replicas.watch(changed, loading=True))

    def stats(self) -> list[ps_pb2.SyncTargetStats]:
        """Where every target stands, by name."""
        with self._changing:
            targets = sorted(self._targets.values(), key=lambda target: target.name)
        return [target.stats() for target in targets]

    def look(self) -> None:
        """Put what has been touched since the last look into the log."""
        with self._looking:
            now = time.time()
            since, self._looked = self._looked, now
            tables = dict(self._store.tables)
            ids: dict[str, UInt64Array] = {}
            whole: list[str] = []
            for name, table in tables.items():
                touched = table.touched
                if touched is None or self._noted.get(name) is not table:
                    # New, or restored: noted from here on, and everything in it is news.
                    table.touched = Touched(self._options.most_ids)
                    whole.append(name)
                    continue
                ids[name], everything = touched.take()
                if everything:
                    whole.append(name)
            self._noted = tables
            self._log.append(ids, whole, tables, since, now)

    def _forget(self) -> None:
        with self._looking:
            for table in self._noted.values():
                table.touched = None
            self._noted = {}

    def _forget_before(self, cursor: int) -> None:
        self._log.forget(cursor)
        self._encoded.forget(cursor - 1)  # the last one read may not have been sent to all

    def _run(self) -> None:
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                with self._changing:
                    targets = list(self._targets.values())
                if targets:
                    self.look()
                    self._forget_before(min(target.cursor for target in targets))
                elif self._noted:
                    self._forget()
                    self._forget_before(self._log.join()[0])
            except Exception:  # the replicas must not be given up
                log.exception("sync: looking for changes failed; it goes on at the next turn")
            self._stopping.wait(max(0.01, self._options.interval_s - (time.monotonic() - started)))
