"""A PS's place in a directory: it agrees with the cluster's record, announces itself, and takes leave."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from trilith.discovery import PS
from trilith.discovery.record import ClusterRecord, RecordKeeper
from trilith.discovery.zk_url import redact
from trilith.errors import TrilithError
from trilith.routing import OWNER_RULE

if TYPE_CHECKING:
    from trilith.discovery import Directory
    from trilith_proto import ps_pb2
    from trilith_services.ps.engine.store import Store

__all__ = ["Membership", "ReplacingDirectory"]

log = logging.getLogger(__name__)


@runtime_checkable
class ReplacingDirectory(Protocol):
    """A directory that notices when another process takes a member's place."""

    replaced: Callable[[str, int], None]


class Membership:
    """Binds a store to a directory: no table appears in it that contradicts the cluster's record."""

    def __init__(
        self, url: str, store: Store, *, timeout_s: float = 60.0, replaced: Callable[[], None] = lambda: None
    ) -> None:
        """Remember where; `join` connects.

        Args:
            url: As `open_directory` takes it.
            store: The shard.
            timeout_s: How long to wait for the directory.
            replaced: Called when another process has registered as this shard; must not wait.
        """
        self._url = url
        self._store = store
        self._timeout_s = timeout_s
        self._replaced = replaced
        self._directory: Directory | None = None
        self._address = ""
        self._left = False
        self._lock = threading.Lock()  # of announcing and leaving: a signal may come in the middle of the start

    def join(self) -> None:
        """Open the directory and see whether this shard fits the cluster; nobody is told of it yet.

        Raises:
            ClusterMismatchError: The record says something else than this shard.
            UnavailableError: The directory cannot be reached.
        """
        from trilith.discovery.urls import open_directory

        log.info("joining", extra={"directory": redact(self._url)})
        self._directory = open_directory(self._url, timeout_s=self._timeout_s)
        self._store.admit_tables_by(self._admit)

    def announce(self, address: str) -> None:
        """Tell everybody where the shard serves; not once it has left."""
        with self._lock:
            if self._directory is None or self._left:
                return
            self._address = address
            if isinstance(self._directory, ReplacingDirectory):
                self._directory.replaced = self._on_replaced
            self._directory.register(PS, self._store.index, address)
            log.info("registered", extra={"directory": redact(self._url), "address": address})

    def _on_replaced(self, role: str, index: int) -> None:
        self._address = ""  # there is nothing left to withdraw
        self._replaced()

    def leave(self) -> None:
        """Take the announcement back for good; the directory may be out of reach."""
        with self._lock:
            self._left = True
            if self._directory is None or not self._address:
                return
            address, self._address = self._address, ""
            try:
                self._directory.deregister(PS, self._store.index, address)
            except TrilithError as error:
                log.warning("could not deregister: %s", error)

    def close(self) -> None:
        """Leave, and let the directory go."""
        directory, self._directory = self._directory, None
        if directory is not None:
            directory.close()

    def _admit(self, configs: Sequence[ps_pb2.TableConfig]) -> None:
        store = self._store
        if isinstance(self._directory, RecordKeeper):
            tables = {config.name: config for config in configs}
            ours = ClusterRecord(num_ps=store.count, owner_rule=OWNER_RULE, tables=tables)
            self._directory.agree(ours, f"PS {store.index}")
