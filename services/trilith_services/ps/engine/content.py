"""Content: what one shard holds in memory (tables, variables, queues, step), and how it is put there and replaced."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import psutil

from trilith.checkpoint import check_nothing_lost
from trilith.errors import (
    CheckpointError,
    ClosedError,
    InvalidRequestError,
    MemoryLimitError,
    ShardRestartedError,
    UnknownTableError,
)
from trilith.runtime.machine import cores
from trilith.shard import Write
from trilith.steps import MAX_STEP
from trilith.tables.checks import check_table_config
from trilith_proto import ps_pb2
from trilith_services.ps.engine import entry_codec, filters
from trilith_services.ps.engine.budget import MemoryBudget
from trilith_services.ps.engine.clock import Clock
from trilith_services.ps.engine.group_lock import group_lock
from trilith_services.ps.engine.kernels.warm_up import compile_common_kernels
from trilith_services.ps.engine.maintenance import Maintenance
from trilith_services.ps.engine.queues import LeasedQueues, QueueState
from trilith_services.ps.engine.sequences import Sequences
from trilith_services.ps.engine.table import Table
from trilith_services.ps.engine.variables import Partitions, VariableState

__all__ = ["Content"]


class Content:
    """What one shard holds, and what it does by itself with it. Thread-safe.

    Attributes:
        index: Which shard this is, from 0.
        count: Of how many.
        incarnation: Names the content; another one after a restore.
        life: Names this process in what it writes; a restore does not change it.
        clock: The one clock that rows expire by.
        budget: What everything is charged to.
        variables: Partitions of dense variables.
        queues: Queues that workers share.
    """

    def __init__(
        self,
        *,
        index: int = 0,
        count: int = 1,
        incarnation: int | None = None,
        memory_limit_bytes: int = 0,
        threads: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Hold nothing yet.

        Args:
            index: Which shard this is, from 0.
            count: Of how many.
            incarnation: Identity of the shard's content until a restore; random if left out.
            memory_limit_bytes: What rows, indexes, filters, variables, queues and notes of writes may use together; 0
                means no limit.
            threads: How many threads one large batch may use; the cores that this process may use if left out.
            clock: Unix seconds; the one clock that rows expire by.
        """
        if not 0 <= index < count:
            raise InvalidRequestError(f"shard index {index} is outside 0..{count - 1}")
        if memory_limit_bytes < 0:
            raise InvalidRequestError(f"memory_limit_bytes={memory_limit_bytes} is negative; 0 means no limit")
        self.index = index
        self.count = count
        self.incarnation = incarnation if incarnation is not None else secrets.randbits(63) | 1
        self.life = secrets.token_hex(4)
        self.budget = MemoryBudget(memory_limit_bytes)
        self.variables = Partitions(self.budget)
        self.queues = LeasedQueues(self.budget)
        self._restored_from = ""
        self._restored_step = 0
        self.clock = Clock(clock)
        self._admit: Callable[[Sequence[ps_pb2.TableConfig]], None] = lambda configs: None
        self._tables: dict[str, Table] = {}
        self._creating = threading.Lock()
        self._sequences = Sequences(clock=self.clock)
        self.budget.watch(lambda: self._sequences.memory_bytes)
        self._changing, self._replacing = group_lock()
        self._step = 0
        self._step_lock = threading.Lock()
        threads = threads or cores()
        self._pool = ThreadPoolExecutor(threads - 1, "ps-stripes") if threads > 1 else None
        self._started = time.monotonic()
        self._closed = False
        self.budget.reclaim, self.budget.free = self._reclaim, self._free
        self._maintenance = Maintenance(self._tables, self.budget, clock=self.clock)
        self._maintenance.start()

    @property
    def tables(self) -> Mapping[str, Table]:
        """The tables by name; read-only."""
        return MappingProxyType(self._tables)

    @property
    def restored_from(self) -> str:
        """The checkpoint that the content began with; empty if it began with nothing."""
        return self._restored_from

    def admit_tables_by(self, admit: Callable[[Sequence[ps_pb2.TableConfig]], None]) -> None:
        """Tell `admit` of the tables there are, and from now on of others before they appear, created or restored.

        What it raises, the caller gets, and none appears.
        """
        with self._creating:
            admit([table.config for table in self._tables.values()])
            self._admit = admit

    def table(self, name: str) -> Table:
        """The table of that name, or UnknownTableError."""
        if self._closed:
            raise ClosedError(f"shard {self.index} was closed")
        try:
            return self._tables[name]
        except KeyError:
            raise UnknownTableError(f"no table {name!r}; this cluster has {sorted(self._tables)}") from None

    def compile(self) -> None:
        """Compile or load what no table's config has a say in; a table's own kernels follow when it is created."""
        compile_common_kernels()
        entry_codec.compile_kernels()

    def new_table(self, config: ps_pb2.TableConfig, *, rows: int = 0) -> Table:
        """A compiled table that shares this shard's budget and threads but is not in it yet; for `snapshot`.

        `rows` says how many rows are about to come, if that is known.
        """
        check_table_config(config)  # before there is a filter of any size
        try:
            filter = filters.make_filter(config)
        except MemoryError as error:
            raise MemoryLimitError(
                f"table {config.name!r}: this machine cannot hold a filter of {config.filter_capacity} ids: {error}"
            ) from None

        def make() -> Table:
            return Table(config, filter=filter, budget=self.budget, pool=self._pool, rows=rows)

        table = make()
        if self.budget.limit and self.budget.used > self.budget.limit:
            table.release()
            if not self.budget.make_room(table.charged_bytes):
                beside = table.charged_bytes - table.memory_bytes
                raise MemoryLimitError(
                    f"table {config.name!r} needs {table.memory_bytes} bytes for its index and {beside} for its filter "
                    f"of {config.filter_capacity or filters.DEFAULT_CAPACITY if beside else 0} ids, but "
                    f"{self.budget.used} of the {self.budget.limit} bytes of this PS are in use; initial_capacity and "
                    "filter_capacity make them smaller"
                )
            table = make()
        if table.memory_bytes > psutil.virtual_memory().total:
            table.release()
            raise MemoryLimitError(
                f"table {config.name!r} needs {table.memory_bytes} bytes for its index, more than the machine has; "
                "initial_capacity makes it smaller"
            )
        try:
            self.compile()
            table.compile()
        except BaseException:
            table.release()
            raise
        return table

    def put_table(self, table: Table) -> None:
        """Serve a table that `new_table` made, in the place of one of its name; for `replica`."""
        with self._creating:
            old = self._tables.get(table.name)
            self._tables[table.name] = table
        if old is not None:
            old.release()

    def drop_table(self, name: str) -> None:
        """Forget a table; one that is not there is no error. For `replica`."""
        with self._creating:
            old = self._tables.pop(name, None)
        if old is not None:
            old.release()

    def replace_content(
        self,
        tables: Mapping[str, Table],
        variables: Sequence[VariableState],
        queues: Sequence[QueueState],
        step: int,
        source: str,
    ) -> None:
        """Put what the checkpoint `source` holds in the place of everything that is there, at once; for `snapshot`.

        The incarnation is another then, and no write from before is done: to clients it is as if the PS had restarted.
        Empty tables that are not in `tables` stay, as somebody has just made them.

        Raises:
            CheckpointError: There cannot be such a step.
            InvalidRequestError: A table that is not in `tables` has rows, which would be lost; nothing was changed.
        """
        if not 0 <= step <= MAX_STEP:
            raise CheckpointError(f"the checkpoint's step is {step}; steps are 0..{MAX_STEP}")
        partitions = self.variables.remake(variables)
        with self._creating:
            self._admit([table.config for table in tables.values()])
            with self._replacing:
                # Looked at again, where nobody writes: reading the checkpoint took a while.
                check_nothing_lost(source, {name: len(table) for name, table in self._tables.items()}, tables)
                tables = {**self._tables, **tables}
                self.incarnation = secrets.randbits(63) | 1
                self._sequences.clear()
                self.variables.replace(partitions)
                self.queues.replace(queues)
                old = [table for name, table in self._tables.items() if tables[name] is not table]
                self._tables.clear()
                self._tables.update(tables)
                self._step = self._restored_step = step
                self._restored_from = source
        for table in old:
            table.release()

    def close(self) -> None:
        """Stop the background work; further calls on tables raise ClosedError."""
        if self._closed:
            return
        self._closed = True
        self._maintenance.stop()
        if self._pool is not None:
            self._pool.shutdown()

    def _reclaim(self) -> None:
        """Give the memory of freed rows back, of whatever table, so that any may grow."""
        for table in list(self._tables.values()):
            table.compact()

    def _free(self) -> int:
        return sum(table.free_bytes for table in list(self._tables.values()))

    def _check_incarnation(self, incarnation: int) -> None:
        if self._closed:
            raise ClosedError(f"shard {self.index} was closed")
        if incarnation and incarnation != self.incarnation:
            raise ShardRestartedError(
                f"shard {self.index} is incarnation {self.incarnation:#x}, the caller knew {incarnation:#x}: it "
                "restarted or was restored"
                + (f" from {self._restored_from} at step {self._restored_step}" if self._restored_from else " empty")
                + " and may lack earlier writes; nothing was done"
            )

    def _count(self, write: Write) -> int | None:
        """Raise the step counter to a write's step and by what it advances it, and say where that is if it does."""
        with self._step_lock:
            self._step = min(max(self._step, write.global_step) + write.advance, MAX_STEP)
            return self._step if write.advance else None
