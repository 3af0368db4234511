"""Maintenance: what a PS does by itself between requests, which is to evict expired rows."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from trilith_services.ps.budget import MemoryBudget
from trilith_services.ps.table import Table

__all__ = ["Maintenance"]

_LOG = logging.getLogger(__name__)
_SECONDS_PER_HOUR = 3600.0


class Maintenance:
    """A thread that evicts: tables that ask for it every so many hours, and all tables when memory runs short."""

    def __init__(
        self,
        tables: Mapping[str, Table],
        budget: MemoryBudget,
        *,
        clock: Callable[[], float],
        wake_every_s: float = 10.0,
    ) -> None:
        self._tables = tables
        self._budget = budget
        self._clock = clock
        self._wake_every_s = wake_every_s
        self._last_eviction: dict[str, float] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ps-maintenance", daemon=True)

    def start(self) -> None:
        """Begin to look after the tables."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a table being evicted is finished first."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def tick(self) -> None:
        """One look at every table; the first look at a table only notes the time."""
        now = self._clock()
        for name, table in list(self._tables.items()):
            config = table.config.hash_table
            last = self._last_eviction.setdefault(name, now)
            due = now - last >= config.feature_evict_every_n_hours * _SECONDS_PER_HOUR
            if config.enable_feature_eviction and due:
                self._last_eviction[name] = now
                _LOG.info("table %s: evicted %d expired rows", name, table.evict(int(now)))
        if self._budget.above_soft_limit:
            evicted = sum(table.evict(int(now)) for table in list(self._tables.values()))
            _LOG.warning(
                "memory: %d of %d bytes in use, above the soft limit %d; evicted %d expired rows",
                self._budget.used,
                self._budget.limit,
                self._budget.soft_limit,
                evicted,
            )

    def _run(self) -> None:
        while not self._stopped.wait(self._wake_every_s):
            try:
                self.tick()
            except Exception:  # noqa: BLE001 - logged with its traceback; a PS must go on evicting
                _LOG.exception("maintenance failed; it goes on at the next turn")
