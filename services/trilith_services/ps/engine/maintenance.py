"""Maintenance: what a PS does by itself between requests, which is to evict expired rows."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from trilith_services.ps.engine.budget import MemoryBudget
from trilith_services.ps.engine.table import Table

__all__ = ["Maintenance"]

_LOG = logging.getLogger(__name__)
_SECONDS_PER_HOUR = 3600.0
_LITTLE = 0.01  # share of the memory in use that a sweep has to free to be worth another one soon
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 10.0, 3600.0
_COMPACT_FREE, _COMPACT_BYTES = 0.25, 16 << 20  # share of a table and bytes that are closed up without need


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
        self._next_sweep = 0.0  # when memory runs short; later and later while that helps little
        self._pause_s = _FIRST_PAUSE_S
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
            if table.free_bytes > max(_COMPACT_BYTES, _COMPACT_FREE * table.memory_bytes):
                table.compact()
        if not self._budget.above_soft_limit:
            self._next_sweep, self._pause_s = 0.0, _FIRST_PAUSE_S
        elif now >= self._next_sweep:
            self._sweep(now)

    def _sweep(self, now: float) -> None:
        """Evict from all tables because memory runs short; say so when that begins."""
        before = self._budget.used - self._budget.free()
        evicted = sum(table.evict(int(now)) for table in list(self._tables.values()))
        freed = before - (self._budget.used - self._budget.free())
        _LOG.log(
            logging.WARNING if self._next_sweep == 0.0 else logging.INFO,
            "memory: %d of %d bytes in use, above the soft limit %d; evicted %d expired rows%s",
            self._budget.used,
            self._budget.limit,
            self._budget.soft_limit,
            evicted,
            f"; looks again in {self._pause_s:.0f} s" if freed < _LITTLE * before else "",
        )
        self._next_sweep = now + self._pause_s
        self._pause_s = min(_LONGEST_PAUSE_S, 2 * self._pause_s) if freed < _LITTLE * before else _FIRST_PAUSE_S

    def _run(self) -> None:
        while not self._stopped.wait(self._wake_every_s):
            try:
                self.tick()
            except Exception:  # noqa: BLE001 - logged with its traceback; a PS must go on evicting
                _LOG.exception("maintenance failed; it goes on at the next turn")
