"""Store: one shard of every table, variable and queue in memory; `LocalShard` adds the files."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import psutil

from trilith.checkpoint import check_nothing_lost
from trilith.errors import (
    CheckpointError,
    ClosedError,
    InvalidRequestError,
    MemoryLimitError,
    NonFiniteError,
    ShardRestartedError,
    TableExistsError,
    UnknownTableError,
)
from trilith.ops.memory import address_of
from trilith.routing import OWNER_RULE
from trilith.runtime.machine import cores
from trilith.shard import (
    ANY_WRITE,
    DensePart,
    Dequeued,
    EntryPage,
    Float32Array,
    FloatArray,
    IdPart,
    InProcess,
    UpdatePart,
    Write,
)
from trilith.steps import MAX_STEP, MAX_STEPS_AHEAD, as_step
from trilith.tables.checks import check_table_config
from trilith.tables.differences import explain, same_table
from trilith.times import check_ahead, whole_seconds
from trilith_proto import ps_pb2
from trilith_services.ps.engine import entry_codec as entries
from trilith_services.ps.engine import filters
from trilith_services.ps.engine.budget import MemoryBudget, RowWrite, room_for
from trilith_services.ps.engine.group_lock import group_lock
from trilith_services.ps.engine.kernels.values import all_finite
from trilith_services.ps.engine.kernels.warm_up import compile_common_kernels
from trilith_services.ps.engine.maintenance import Maintenance
from trilith_services.ps.engine.queues import Queues, QueueState
from trilith_services.ps.engine.rows import as_ids
from trilith_services.ps.engine.sequences import Sequences
from trilith_services.ps.engine.table import Table
from trilith_services.ps.engine.variables import Variables, VariableState

__all__ = ["Store"]

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")

# One page of a dump, whatever was asked for; rows are encoded a few at a time, so that it is not passed by much.
_PAGE_ROWS, _PAGE_BYTES, _PAGE_STEP = 100_000, 8 << 20, 256


class Store(InProcess):
    """Implements the verbs of `trilith.shard.Shard` that need no files; see there for them.

    Guarantees: a write with an identity (client_id, origin, sequence) is done once, see `Sequences`; a request that
    names another incarnation changes nothing; all that can be wrong with any part of a request, and the memory that all
    parts need together, is looked at before the first row changes. Thread-safe throughout.

    Repeats of an id in one part are applied one after another, in order: gradients as steps of their own (unless the
    write asks for `dedup`), weights so that the last stays, increments all. `trilith.Client` is another matter: it adds
    gradients of equal ids up, and sends one step for each id.
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
        """Make an empty store.

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
        """Names this process in what it writes; a restore does not change it."""
        self.budget = MemoryBudget(memory_limit_bytes)
        self.variables = Variables(self.budget)
        self.queues = Queues(self.budget)
        self._restored_from = ""
        self._restored_step = 0
        self._clock = clock
        self._admit: Callable[[Sequence[ps_pb2.TableConfig]], None] = lambda configs: None
        self._tables: dict[str, Table] = {}
        self._creating = threading.Lock()
        self._sequences = Sequences(clock=clock)
        self.budget.watch(lambda: self._sequences.memory_bytes)
        self._changing, self._replacing = group_lock()
        self._step = 0
        self._step_lock = threading.Lock()
        threads = threads or cores()
        self._pool = ThreadPoolExecutor(threads - 1, "ps-stripes") if threads > 1 else None
        self._started = time.monotonic()
        self._closed = False
        self.budget.reclaim, self.budget.free = self._reclaim, self._free
        self._maintenance = Maintenance(self._tables, self.budget, clock=clock)
        self._maintenance.start()

    @property
    def tables(self) -> Mapping[str, Table]:
        """The tables by name; read-only."""
        return MappingProxyType(self._tables)

    @property
    def clock(self) -> Callable[[], float]:
        """Unix seconds by this shard's clock, by which rows expire."""
        return self._clock

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

    def describe(self) -> ps_pb2.DescribeResponse:
        """See `Shard.describe`."""
        return ps_pb2.DescribeResponse(
            shard_index=self.index,
            shard_count=self.count,
            owner_rule=OWNER_RULE,
            incarnation=self.incarnation,
            durability="none",
            tables=[table.config for table in list(self._tables.values())],
            variables=[partition.spec for partition in self.variables],
            global_step=self._step,
            restored_from=self._restored_from,
            restored_step=self._restored_step,
            unix_time=self._clock(),
        )

    # ---- tables ------------------------------------------------------------------------------------------------

    def create_tables(self, configs: Sequence[ps_pb2.TableConfig], write: Write = ANY_WRITE) -> None:
        """See `Shard.create_tables`. Kernels are compiled before the tables appear; other tables answer meanwhile."""
        self._check_incarnation(write.incarnation)
        self._sequences.once(write, lambda: self._create_tables(configs, write))

    def _create_tables(self, configs: Sequence[ps_pb2.TableConfig], write: Write) -> None:
        with self._creating:
            self._check_incarnation(write.incarnation)  # a restore may have come first
            made: dict[str, Table] = {}
            try:
                for config in configs:
                    # Not `or`: an empty table is false.
                    known = self._tables.get(config.name, made.get(config.name))
                    if known is None:
                        made[config.name] = self.new_table(config)
                    elif not same_table(known.config, config):
                        raise TableExistsError(
                            f"table {config.name!r} exists with another config:"
                            f" {explain(config.name, known.config, config)}"
                        )
                if made:
                    self._admit([table.config for table in made.values()])
            except BaseException:
                for table in made.values():
                    table.release()
                raise
            self._tables.update(made)
        for name, table in made.items():
            size = table.layout.row_bytes + table.layout.state_bytes
            _LOG.info("table %s created: dim %d, %d bytes per row", name, table.dim, size)

    def lookup(self, parts: Sequence[IdPart], *, float16: bool = False) -> list[FloatArray]:
        """See `Shard.lookup`."""
        dtype = np.float16 if float16 else np.float32
        outs: list[FloatArray] = [np.empty((len(part.ids), self.table(part.table).dim), dtype) for part in parts]
        self.lookup_into(parts, outs)
        return outs

    def dims(self, parts: Sequence[IdPart]) -> list[int]:
        """Floats per row of each part's table."""
        return [self.table(part.table).dim for part in parts]

    def lookup_into(self, parts: Sequence[IdPart], outs: Sequence[FloatArray]) -> None:
        """Look up into arrays float32 or float16 [n, dim] of any alignment, such as views on a reply being built."""
        for part, out in zip(parts, outs, strict=True):
            self.table(part.table).lookup(part.ids, out)

    def apply_gradients(self, parts: Sequence[UpdatePart], write: Write) -> None:
        """See `Shard.apply_gradients`."""

        def check() -> None:
            self._check_step(write)
            for part in parts:
                table, ids = self.table(part.table), as_ids(part.ids)
                table.check_gradients(ids, part.values, part.learning_rates, part.counts, write.global_step)

        def work(request_time: int) -> None:
            for part in parts:
                self.table(part.table).apply_gradients(
                    part.ids,
                    part.values,
                    learning_rates=part.learning_rates,
                    counts=part.counts,
                    global_step=write.global_step,
                    request_time=request_time,
                    dedup=write.dedup,
                    has_room=True,
                )
            self._raise_step(write.global_step)

        self._write_rows(parts, write, check, work)

    def assign(self, parts: Sequence[UpdatePart], write: Write) -> None:
        """See `Shard.assign`."""

        def work(request_time: int) -> None:
            for part in parts:
                self.table(part.table).assign(part.ids, part.values, request_time=request_time, has_room=True)

        self._write_rows(parts, write, lambda: self._check_values(parts), work)

    def assign_add(self, parts: Sequence[UpdatePart], write: Write) -> None:
        """See `Shard.assign_add`."""

        def work(request_time: int) -> None:
            for part in parts:
                self.table(part.table).assign_add(part.ids, part.values, request_time=request_time, has_room=True)

        self._write_rows(parts, write, lambda: self._check_values(parts), work)

    def reinitialize(self, part: IdPart, write: Write) -> npt.NDArray[np.int8]:
        """See `Shard.reinitialize`."""
        with ExitStack() as held:

            def check() -> None:
                self._time(write.request_time)
                if part.table in self._tables:
                    row_write = RowWrite(self.table(part.table), as_ids(part.ids), passed=True)
                    held.enter_context(room_for(self.budget, [row_write]))

            def work() -> npt.NDArray[np.int8]:
                table = self._tables.get(part.table)
                if table is None:
                    return np.full(len(part.ids), -1, np.int8)
                return table.reinitialize(part.ids, request_time=self._time(write.request_time), has_room=True)

            return self._once(write, work, check)

    def contains(self, part: IdPart) -> npt.NDArray[np.bool_]:
        """See `Shard.contains`."""
        return self.table(part.table).contains(part.ids)

    def lookup_entries(self, part: IdPart) -> list[bytes]:
        """See `Shard.lookup_entries`."""
        table = self.table(part.table)
        present, found = table.export_rows(part.ids)
        encoded = iter(entries.entry_list(table.layout, found, with_id=False))
        return [next(encoded) if there else b"" for there in present.tolist()]

    def dump_entries(self, table: str, *, part: int, parts: int, limit: int, offset: int = 0) -> EntryPage:
        """See `Shard.dump_entries`."""
        source = self.table(table)
        dumped: list[bytes] = []
        size = 0
        most = min(limit, _PAGE_ROWS)
        while True:
            asked = min(most - len(dumped), _PAGE_STEP) if limit > 0 else limit
            found, offset = source.scan(part, parts, asked, offset)
            more = entries.entry_list(source.layout, found, with_id=True)
            dumped += more
            size += sum(map(len, more))
            if len(found) < asked:
                return EntryPage(dumped)
            if len(dumped) >= most or size >= _PAGE_BYTES:
                return EntryPage(dumped, offset)

    def erase(self, part: IdPart, write: Write) -> int:
        """See `Shard.erase`."""
        return self._once(write, lambda: self.table(part.table).erase(part.ids), lambda: self.table(part.table))

    def evict(self, tables: Sequence[str], write: Write, *, now: int = 0) -> Mapping[str, int]:
        """See `Shard.evict`."""
        chosen: list[Table] = []

        def check() -> None:
            self._time(now, "now")
            chosen[:] = [self.table(name) for name in tables or sorted(self._tables)]

        def work() -> Mapping[str, int]:
            at = self._time(now, "now")
            return {table.name: table.evict(at) for table in chosen}

        return self._once(write, work, check)

    def clear(self, tables: Sequence[str], write: Write) -> Mapping[str, int]:
        """See `Shard.clear`."""
        chosen: list[Table] = []

        def check() -> None:
            chosen[:] = [self.table(name) for name in tables]

        return self._once(write, lambda: {table.name: table.clear() for table in chosen}, check)

    def stats(self) -> ps_pb2.StatsResponse:
        """See `Shard.stats`."""
        return ps_pb2.StatsResponse(
            incarnation=self.incarnation,
            tables=[
                ps_pb2.TableStats(
                    table=table.name,
                    rows=len(table),
                    bytes=table.charged_bytes,
                    lookup_ids=table.counters.lookup_ids,
                    lookup_hits=table.counters.lookup_hits,
                    update_ids=table.counters.update_ids,
                    filtered_ids=table.counters.filtered_ids,
                    evicted_rows=table.counters.evicted_rows,
                    max_update_time=table.newest_update,
                )
                for table in list(self._tables.values())
            ],
            memory_bytes=self.budget.used,
            memory_limit_bytes=self.budget.limit,
            resident_bytes=psutil.Process().memory_info().rss,
            uptime_seconds=time.monotonic() - self._started,
            global_step=self._step,
        )

    # ---- dense variables and the step counter --------------------------------------------------------------------

    def create_variables(
        self, specs: Sequence[ps_pb2.VariableSpec], initial: Sequence[Float32Array], write: Write = ANY_WRITE
    ) -> list[bool]:
        """See `Shard.create_variables`."""
        self._check_incarnation(write.incarnation)
        self._check_finite([(spec.name, values) for spec, values in zip(specs, initial, strict=False)], write)
        made = self.variables.make(specs, initial)  # compiles, which others need not wait for
        return self._once(write, lambda: self.variables.add(made))

    def pull_variables(self, refs: Sequence[tuple[str, int]]) -> tuple[list[Float32Array], int]:
        """See `Shard.pull_variables`."""
        return self.variables.pull(refs) if refs else [], self._step

    def apply_dense_gradients(self, parts: Sequence[DensePart], write: Write, *, learning_rate: float = 0.0) -> None:
        """See `Shard.apply_dense_gradients`."""

        def check() -> None:
            self._check_step(write)
            self.variables.check_gradients(parts, learning_rate)
            self._check_finite([(part.name, part.values) for part in parts], write)

        def work() -> None:
            self.variables.apply_gradients(parts, learning_rate=learning_rate, global_step=write.global_step)
            self._raise_step(write.global_step)

        self._once(write, work, check)

    def assign_variables(self, parts: Sequence[DensePart], write: Write) -> None:
        """See `Shard.assign_variables`."""

        def check() -> None:
            self.variables.check_values(parts)
            self._check_finite([(part.name, part.values) for part in parts], write)

        self._once(write, lambda: self.variables.assign(parts), check)

    def global_step(self, *, advance: int | None = None, set_to: int | None = None, write: Write = ANY_WRITE) -> int:
        """See `Shard.global_step`."""
        if advance is None and set_to is None:
            return self._step

        def work() -> int:
            with self._step_lock:
                if set_to is not None:
                    self._step = as_step(set_to, "set_to")
                else:
                    self._step = as_step(
                        self._step + as_step(advance, "advance"), f"global_step {self._step} + advance"
                    )
                return self._step

        return self._once(write, work)

    # ---- queues --------------------------------------------------------------------------------------------------

    def create_queue(
        self, name: str, elements: Sequence[str] = (), write: Write = ANY_WRITE, *, capacity: int = 0
    ) -> bool:
        """See `Shard.create_queue`."""
        return self._once(write, lambda: self.queues.create(name, elements, capacity))

    def enqueue(self, queue: str, elements: Sequence[str], write: Write) -> None:
        """See `Shard.enqueue`."""
        self._once(write, lambda: self.queues.enqueue(queue, elements))

    def dequeue(self, queues: Sequence[str], worker: str, write: Write, *, lease_s: float, claim: str = "") -> Dequeued:
        """See `Shard.dequeue`."""
        return self._once(write, lambda: self.queues.dequeue(queues, worker, lease_s, claim))

    def acknowledge(
        self, worker: str, lease: int, write: Write, *, queue: str = "", elements: Sequence[str] = ()
    ) -> bool:
        """See `Shard.acknowledge`."""
        return self._once(write, lambda: self.queues.acknowledge(worker, lease, queue, elements))

    def hold_leases(self, worker: str, lease_s: float, write: Write = ANY_WRITE) -> int:
        """See `Shard.hold_leases`."""
        return self._once(write, lambda: self.queues.hold(worker, lease_s))

    # ---- what checkpoints and replicas are made of -----------------------------------------------------------------

    def compile(self) -> None:
        """Compile or load what no table's config has a say in; a table's own kernels follow when it is created."""
        compile_common_kernels()
        entries.compile_kernels()

    def new_table(self, config: ps_pb2.TableConfig, *, rows: int = 0) -> Table:
        """A compiled table that shares this store's budget and threads but is not in it yet; for `snapshot`.

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

    # ---- inside --------------------------------------------------------------------------------------------------

    def _once(self, write: Write, work: Callable[[], _Result], check: Callable[[], object] | None = None) -> _Result:
        """Do a write that has not been done, while nothing replaces what it changes; see `Sequences.once`."""
        with self._changing:
            self._check_incarnation(write.incarnation)
            return self._sequences.once(write, work, check=check)[0]

    def _write_rows(
        self, parts: Sequence[UpdatePart], write: Write, check: Callable[[], None], work: Callable[[int], None]
    ) -> None:
        """Do `work`, which takes the rows' new time, after all that can be wrong with any part has been looked at."""
        with ExitStack() as held:
            request_time = 0

            def begin() -> None:
                nonlocal request_time
                request_time = self._time(write.request_time)
                check()
                self._check_finite([(part.table, part.values) for part in parts], write)
                if self.budget.limit:
                    writes = [RowWrite(self.table(part.table), as_ids(part.ids), part.counts) for part in parts]
                    held.enter_context(room_for(self.budget, writes))

            self._once(write, lambda: work(request_time), begin)

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

    def _time(self, given: int, what: str = "request_time") -> int:
        """The Unix seconds that a caller gave, or the shard's own if it gave 0; never far ahead of the shard's own."""
        now = self._clock()
        if given == 0 and type(given) is int:
            return int(now)
        seconds = whole_seconds(given, what)
        check_ahead(seconds, now, what)
        return seconds

    def _check_values(self, parts: Sequence[UpdatePart]) -> None:
        for part in parts:
            self.table(part.table).check_update(as_ids(part.ids), part.values)

    def _check_step(self, write: Write) -> None:
        """Refuse the step of a write if no step is that large, or if it is a mistake beyond doubt."""
        step = as_step(write.global_step)
        if step > self._step + MAX_STEPS_AHEAD:
            raise InvalidRequestError(
                f"global_step={step} is more than {MAX_STEPS_AHEAD} ahead of the step counter, which is at "
                f"{self._step}; global_step(set_to=...) sets that further"
            )

    def _check_finite(self, named: Sequence[tuple[str, npt.NDArray[Any]]], write: Write) -> None:
        if write.allow_non_finite:
            return
        for name, values in named:
            values = np.ascontiguousarray(values)
            if not all_finite(address_of(values), values.size, values.itemsize):
                raise NonFiniteError(f"{name!r}: NaN or infinity among {values.size} values; nothing was changed")

    def _raise_step(self, step: int) -> None:
        with self._step_lock:
            self._step = max(self._step, step)
