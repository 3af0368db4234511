"""Store: the verbs of a shard over what it holds in memory; `LocalShard` adds those over files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import psutil

from trilith.errors import (
    InvalidRequestError,
    NonFiniteError,
    TableExistsError,
)
from trilith.ops.memory import address_of
from trilith.routing import OWNER_RULE
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
from trilith.steps import MAX_STEPS_AHEAD, as_step
from trilith.tables.differences import explain, same_table
from trilith_proto import ps_pb2
from trilith_services.ps.engine.budget import RowWrite, room_for
from trilith_services.ps.engine.content import Content
from trilith_services.ps.engine.entry_codec import entry_list
from trilith_services.ps.engine.kernels.values import all_finite
from trilith_services.ps.engine.rows import checked_ids
from trilith_services.ps.engine.table import Table

__all__ = ["Store"]

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")

# One page of a dump, whatever was asked for; rows are encoded a few at a time, so that it is not passed by much.
_PAGE_ROWS, _PAGE_BYTES, _PAGE_STEP = 100_000, 8 << 20, 256


class Store(Content, InProcess):
    """Implements the verbs of `trilith.shard.Shard` that need no files; see there for them.

    Guarantees: a write with an identity (client_id, origin, sequence) is done once, see `Sequences`; a request that
    names another incarnation changes nothing; all that can be wrong with any part of a request, and the memory that all
    parts need together, is looked at before the first row changes. Thread-safe throughout.

    Repeats of an id in one part are applied one after another, in order: gradients as steps of their own (unless the
    write asks for `dedup`), weights so that the last stays, increments all. `trilith.Client` is another matter: it adds
    gradients of equal ids up, and sends one step for each id.
    """

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
            unix_time=self.clock(),
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

    def apply_gradients(self, parts: Sequence[UpdatePart], write: Write) -> int:
        """See `Shard.apply_gradients`."""

        def check() -> None:
            self._check_step(write)
            for part in parts:
                table, ids = self.table(part.table), checked_ids(part.ids)
                table.check_gradients(ids, part.values, part.learning_rates, part.counts, write.global_step)

        def work(request_time: int) -> int | None:
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
            return self._count(write)

        return self._write_rows(parts, write, check, work) or 0

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
                self.clock.at(write.request_time)
                if part.table in self._tables:
                    row_write = RowWrite(self.table(part.table), checked_ids(part.ids), passed=True)
                    held.enter_context(room_for(self.budget, [row_write]))

            def work() -> npt.NDArray[np.int8]:
                table = self._tables.get(part.table)
                if table is None:
                    return np.full(len(part.ids), -1, np.int8)
                return table.reinitialize(part.ids, request_time=self.clock.at(write.request_time), has_room=True)

            return self._once(write, work, check)

    def contains(self, part: IdPart) -> npt.NDArray[np.bool_]:
        """See `Shard.contains`."""
        return self.table(part.table).contains(part.ids)

    def lookup_entries(self, part: IdPart) -> list[bytes]:
        """See `Shard.lookup_entries`."""
        table = self.table(part.table)
        present, found = table.export_rows(part.ids)
        encoded = iter(entry_list(table.layout, found, with_id=False))
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
            more = entry_list(source.layout, found, with_id=True)
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
            self.clock.at(now, "now")
            chosen[:] = [self.table(name) for name in tables or sorted(self._tables)]

        def work() -> Mapping[str, int]:
            at = self.clock.at(now, "now")
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

    def apply_dense_gradients(self, parts: Sequence[DensePart], write: Write, *, learning_rate: float = 0.0) -> int:
        """See `Shard.apply_dense_gradients`."""

        def check() -> None:
            self._check_step(write)
            self.variables.check_gradients(parts, learning_rate)
            self._check_finite([(part.name, part.values) for part in parts], write)

        def work() -> int | None:
            self.variables.apply_gradients(parts, learning_rate=learning_rate, global_step=write.global_step)
            return self._count(write)

        return self._once(write, work, check) or 0

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

    def shutdown(self) -> None:
        """See `Shard.shutdown`: rows in a process of somebody else's."""
        raise InvalidRequestError("the rows are in this process, which is no PS to shut down; close() lets go of them")

    # ---- inside --------------------------------------------------------------------------------------------------

    def _once(self, write: Write, work: Callable[[], _Result], check: Callable[[], object] | None = None) -> _Result:
        """Do a write that has not been done, while nothing replaces what it changes; see `Sequences.once`."""
        with self._changing:
            self._check_incarnation(write.incarnation)
            return self._sequences.once(write, work, check=check)[0]

    def _write_rows(
        self, parts: Sequence[UpdatePart], write: Write, check: Callable[[], None], work: Callable[[int], _Result]
    ) -> _Result:
        """Do `work`, which takes the rows' new time, after all that can be wrong with any part has been looked at."""
        with ExitStack() as held:
            request_time = 0

            def begin() -> None:
                nonlocal request_time
                request_time = self.clock.at(write.request_time)
                check()
                self._check_finite([(part.table, part.values) for part in parts], write)
                if self.budget.limit:
                    writes = [RowWrite(self.table(part.table), checked_ids(part.ids), part.counts) for part in parts]
                    held.enter_context(room_for(self.budget, writes))

            return self._once(write, lambda: work(request_time), begin)

    def _check_values(self, parts: Sequence[UpdatePart]) -> None:
        for part in parts:
            self.table(part.table).check_update(checked_ids(part.ids), part.values)

    def _check_step(self, write: Write) -> None:
        """Refuse the step of a write if no step is that large, or if it is a mistake beyond doubt."""
        step = as_step(write.global_step)
        if step > self._step + MAX_STEPS_AHEAD:
            raise InvalidRequestError(
                f"global_step={step} is more than {MAX_STEPS_AHEAD} ahead of the step counter, which is at "
                f"{self._step}; global_step(set_to=...) sets that further"
            )
        as_step(max(step, self._step) + as_step(write.advance, "advance"), f"global_step {self._step} + advance")

    def _check_finite(self, named: Sequence[tuple[str, npt.NDArray[Any]]], write: Write) -> None:
        if write.allow_non_finite:
            return
        for name, values in named:
            values = np.ascontiguousarray(values)
            if not all_finite(address_of(values), values.size, values.itemsize):
                raise NonFiniteError(f"{name!r}: NaN or infinity among {values.size} values; nothing was changed")
