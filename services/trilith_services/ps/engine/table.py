"""Table: the rows of one embedding table on one shard, in stripes with a lock each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError, NonFiniteError
from trilith.ops.dedup import FIRST, scatter_values, split_distinct
from trilith.ops.jit import warm
from trilith.ops.memory import address_of
from trilith.shard import Float32Array, UInt64Array
from trilith.times import whole_seconds
from trilith_proto import ps_pb2
from trilith_services.ps.engine.budget import MemoryBudget, RowWrite, room_for
from trilith_services.ps.engine.filters import OccurrenceFilter
from trilith_services.ps.engine.kernels import index, sweep
from trilith_services.ps.engine.kernels.apply import make_apply
from trilith_services.ps.engine.kernels.index import STRIPES
from trilith_services.ps.engine.kernels.values import widen_halves
from trilith_services.ps.engine.kernels.warm_up import compile_common_kernels
from trilith_services.ps.engine.kernels.write import ADD, ASSIGN, IMPORT, RESET, write_rows
from trilith_services.ps.engine.rows import Rows, as_counts, checked_ids
from trilith_services.ps.engine.scratch import Batch, work_memory
from trilith_services.ps.engine.table_reads import TableReads
from trilith_services.ps.engine.touched import Touched

__all__ = ["Table"]

_EVICTED_PART = 16  # rows are moved together after a sweep that leaves at least one in so many free


class Table(TableReads):
    """One embedding table of one shard.

    Every 64-bit id has its own row. Each row changes atomically; a batch as a whole does not. Thread-safe: a call holds
    the locks of the stripes it is working on, so callers rarely wait for each other.
    """

    def __init__(
        self,
        config: ps_pb2.TableConfig,
        *,
        filter: OccurrenceFilter | None = None,
        budget: MemoryBudget | None = None,
        pool: Executor | None = None,
        rows: int = 0,
    ) -> None:
        """Make an empty table.

        Args:
            config: Checked here; InvalidRequestError says what is wrong.
            filter: Decides which new ids get a row; None lets all pass. May be shared by tables.
            budget: What the rows and indexes are charged to.
            pool: Where half of a large batch runs.
            rows: How many rows are about to come, if that is known: their index is made at once, not grown to.
        """
        super().__init__(config, pool, rows)
        self.filter = filter
        self.newest_update = 0
        self._budget = budget if budget is not None else MemoryBudget(0)
        self._time_lock = threading.Lock()
        self._compacting = threading.Lock()
        self._apply = make_apply(self.layout.structure) if self.layout.structure else None
        self._filter_bytes = 0 if filter is None else filter.memory_bytes
        self._charged = 0
        self._released = False
        self._pending = 0  # rows that writes under way may add
        self._charge()

    @property
    def charged_bytes(self) -> int:
        """Bytes of the table with its filter: what it is charged for."""
        return self.memory_bytes + self._filter_bytes

    def compile(self) -> None:
        """Compile or load every kernel that serving this table may run."""
        compile_common_kernels()
        if self._apply is not None:
            warm(self._apply)
        if self.filter is not None:
            self.filter.compile()

    # ---- who wants to know ---------------------------------------------------------------------------------------

    @property
    def touched(self) -> Touched | None:
        """The ids written to, erased or evicted since it was set; None: they are not kept."""
        return self._stripes.touched

    @touched.setter
    def touched(self, touched: Touched | None) -> None:
        before, self._stripes.touched = self._stripes.touched, touched
        for log, account in ((before, None), (touched, self._budget.add)):
            if log is not None:
                log.charge_to(account)

    # ---- writes ------------------------------------------------------------------------------------------------

    def apply_gradients(
        self,
        ids: npt.NDArray[Any],
        grads: npt.NDArray[Any],
        *,
        learning_rates: npt.ArrayLike | None = None,
        counts: npt.NDArray[np.uint32] | None = None,
        global_step: int = 0,
        request_time: int = 0,
        dedup: bool = False,
        has_room: bool = False,
    ) -> None:
        """Take optimizer steps; a missing row that passes the filter is created first.

        Args:
            ids: uint64[n] or int64[n].
            grads: float32 or float16 [n, dim].
            learning_rates: float32[segments]; the config's where left out.
            counts: uint32[n] occurrences each id stands for in the filter's count; one each where left out.
            global_step: For batch_softmax, one-bit readers and stochastic rounding.
            request_time: Unix seconds, the rows' new last update.
            dedup: Sum the gradients of equal ids into one step; otherwise repeats are steps of their own, in order.
            has_room: The caller holds `room_for` this write.
        """
        ids = checked_ids(ids)
        self.check_gradients(ids, grads, learning_rates, counts, global_step)
        assert self._apply is not None  # just checked
        grads, rates = self._as_values(ids, grads), self._as_rates(learning_rates)
        counts = as_counts(counts, len(ids))
        if dedup:
            ids, grads, counts = _sum_repeats(ids, grads, counts)
        time = whole_seconds(request_time)
        self.note_update(time)
        ids, grads = self._pass_filter(ids, grads, counts)
        if len(ids) == 0:
            return
        source, row_bytes = address_of(grads), 4 * self.dim
        apply, rate_address = self._apply, address_of(rates)

        def step(batch: Batch, offset: int, first: int, last: int, begin: int) -> int:
            return apply(  # type: ignore[no-any-return]
                self._at,
                first,
                last,
                begin,
                *batch,
                self._plan,
                self._segments,
                work_memory(self._work_bytes),
                source + offset * row_bytes,
                rate_address,
                global_step,
                time,
            )

        with self._room(ids, has_room):
            self.layout.grow_one_bit_scales(global_step)
            self._write(ids, step)

    def check_gradients(
        self,
        ids: UInt64Array,
        grads: npt.NDArray[Any],
        learning_rates: npt.ArrayLike | None,
        counts: npt.NDArray[Any] | None,
        global_step: int,
    ) -> None:
        """Raise what `apply_gradients` would raise for its arguments, memory apart."""
        if self._apply is None:
            raise InvalidRequestError(f"table {self.name!r} is a serving table: it has no optimizer")
        self.check_update(ids, grads)
        self._as_rates(learning_rates)
        as_counts(counts, len(ids))
        if global_step < 0 and any(kind == "batch_softmax" for kind, _, _ in self.layout.structure):
            raise InvalidRequestError(f"table {self.name!r}: global_step={global_step} is negative")

    def check_update(self, ids: UInt64Array, values: npt.NDArray[Any]) -> None:
        """Raise what a write of these would raise for its shapes or dtypes."""
        if not isinstance(values, np.ndarray):
            raise InvalidRequestError(f"table {self.name!r}: values are {type(values).__name__}, expected an array")
        if values.shape != (len(ids), self.dim) or values.dtype not in (np.float32, np.float16):
            raise InvalidRequestError(
                f"table {self.name!r}: values are {values.dtype}{list(values.shape)}, "
                f"expected float32 or float16 [{len(ids)}, {self.dim}]"
            )

    def assign(
        self, ids: npt.NDArray[Any], values: npt.NDArray[Any], *, request_time: int = 0, has_room: bool = False
    ) -> None:
        """Set raw weights, float32 or float16 [n, dim]; the last of repeated ids wins.

        With `skip_zero_embedding` a value whose squared norm is below the smallest normal float32 erases its id.
        """
        ids, values, time = checked_ids(ids), self._as_values(ids, values), whole_seconds(request_time)
        if self.config.hash_table.skip_zero_embedding and len(ids):
            last = len(ids) - 1 - np.unique(ids[::-1], return_index=True)[1]
            ids, values = ids[last], values[last]
            zero = np.einsum("nd,nd->n", values, values) < np.finfo(np.float32).tiny
            self.note_update(time)
            self.erase(ids[zero])
            ids, values = ids[~zero], values[~zero]
        self._write_values(ASSIGN, ids, values, time, has_room)

    def assign_add(
        self,
        ids: npt.NDArray[Any],
        values: npt.NDArray[Any],
        *,
        request_time: int = 0,
        filter_present: bool = False,
        has_room: bool = False,
    ) -> None:
        """Add float32 or float16 [n, dim] to raw weights, one id after another.

        `filter_present` also asks the filter about ids that have rows, as the reference system's multi-tables do.
        """
        ids, values, time = checked_ids(ids), self._as_values(ids, values), whole_seconds(request_time)
        self._write_values(ADD, ids, values, time, has_room, filter_present=filter_present)

    def reinitialize(self, ids: npt.NDArray[Any], *, request_time: int, has_room: bool = False) -> npt.NDArray[np.int8]:
        """Give ids fresh rows, without asking the filter.

        Returns:
            int8[n]: 1 where there was a row, 0 where it was created.
        """
        ids = checked_ids(ids)
        existed = np.zeros(len(ids), np.int8)
        self._write_rows(RESET, ids, whole_seconds(request_time), existed=existed, has_room=has_room)
        return existed

    def import_rows(self, found: Rows) -> None:
        """Write rows verbatim (weights, state, last update), replacing those of the same ids."""
        if len(found) == 0:
            return
        weights = np.ascontiguousarray(found.weights, np.float32)
        state = np.ascontiguousarray(found.state, np.float32)
        expected = (len(found), self.layout.state_floats)
        if weights.shape != (len(found), self.dim) or (not self.layout.serving and state.shape != expected):
            raise InvalidRequestError(
                f"table {self.name!r}: rows with {weights.shape[1:]} weights and {state.shape[1:]} state words "
                f"do not fit dim={self.dim} and {self.layout.state_floats} state words"
            )
        times = np.ascontiguousarray(found.last_update, np.uint32)
        if times.shape != (len(found),):
            raise InvalidRequestError(f"table {self.name!r}: {times.shape} times for {len(found)} rows")
        if self.layout.serving:
            times = np.zeros_like(times)  # as upstream: a serving row's time stays 0
        self._write_rows(IMPORT, checked_ids(found.ids), 0, values=weights, state=state, times=times)
        self.note_update(int(times.max()))

    def erase(self, ids: npt.NDArray[Any]) -> int:
        """Delete rows; returns how many there were."""
        ids = checked_ids(ids)
        if len(ids) == 0:
            return 0

        erased: list[int] = []

        def erase(batch: Batch, offset: int, first: int, last: int, begin: int) -> int:
            self._stripes.note_erased(ids[offset : offset + self._stripes.piece], first, last)
            erased.append(index.erase_rows(self._at, first, last, *batch[:2]))
            return -1

        self._write(ids, erase)
        return sum(erased)

    def evict(self, now: int) -> int:
        """Delete rows whose age at `now` (Unix seconds) has reached their slot's lifetime; returns how many."""
        evicted = self._evict(now, self._lifetimes)
        self.counters.evicted_rows += evicted
        return evicted

    def erase_before(self, time: int) -> int:
        """Delete rows whose last update lies before `time` (Unix seconds); returns how many."""
        return self._evict(time, np.ones(1, np.int64))

    def _evict(self, now: int, lifetimes: npt.NDArray[np.int64]) -> int:
        evicted = 0
        for s in range(STRIPES):
            gone: list[int] = []

            def look(begin: int, end: int, s: int = s) -> bool:
                found = sweep.any_expired(self._at, s, begin, end, now, address_of(lifetimes), len(lifetimes))
                return bool(found)

            def evict(begin: int, end: int, s: int = s, gone: list[int] = gone) -> None:
                ids = np.empty(end - begin, np.uint64)
                room = address_of(lifetimes), len(lifetimes), address_of(ids)
                gone.append(int(sweep.evict_rows(self._at, s, begin, end, now, *room)))
                ids = ids[: gone[-1]]
                self._stripes.note_erased(ids, s, s + 1)
                if (touched := self._stripes.touched) is not None:
                    touched.add(ids)

            self._stripes.sweep(s, look, evict)
            evicted += sum(gone)
        if evicted:
            self.compact(1 / _EVICTED_PART)
        return evicted

    def compact(self, least: float = 0.0) -> int:
        """Give the memory of freed rows back to the machine, while others read and write.

        Args:
            least: Share of a stripe's rows that must be free for it to be looked at.

        Returns:
            Bytes.
        """
        with self._compacting:
            given_back = self._stripes.compact(least)
        self._charge()
        return given_back

    def clear(self) -> int:
        """Drop every row and give the memory back; returns how many rows there were."""
        with self._stripes.writing():
            dropped = len(self)
            self._stripes.clear()
        self._stripes.unmap()
        self._charge()
        return dropped

    def note_update(self, time: int) -> None:
        """Raise the newest update to at least `time`, Unix seconds, as every write and a restored checkpoint do.

        A statistic, and no clock: callers chose these times.
        """
        with self._time_lock:
            self.newest_update = max(self.newest_update, time)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _as_values(self, ids: npt.NDArray[Any], values: npt.NDArray[Any]) -> Float32Array:
        self.check_update(ids, values)
        values = np.ascontiguousarray(values)
        if values.dtype == np.float32:
            return values
        wide = np.empty(values.shape, np.float32)
        widen_halves(address_of(values), address_of(wide), wide.size)
        return wide

    def _as_rates(self, learning_rates: npt.ArrayLike | None) -> Float32Array:
        if learning_rates is None:
            return self.layout.learning_rates
        rates = np.ascontiguousarray(learning_rates, np.float32)
        if rates.shape != (self.segments,):
            raise InvalidRequestError(
                f"table {self.name!r}: {rates.shape} learning rates for {self.segments} segments; one each is needed"
            )
        if not np.isfinite(rates).all():
            raise NonFiniteError(f"table {self.name!r}: learning rates {rates.tolist()} are not finite")
        if (rates < 0).any():
            raise InvalidRequestError(f"table {self.name!r}: learning rates {rates.tolist()} must not be negative")
        return rates

    def _pass_filter(
        self,
        ids: UInt64Array,
        values: Float32Array,
        counts: npt.NDArray[np.uint32] | None,
        *,
        filter_present: bool = False,
    ) -> tuple[UInt64Array, Float32Array]:
        """What the filter lets through of a write; all its decisions are taken before the first row changes."""
        self.counters.update_ids += len(ids)
        if self.filter is None or len(ids) == 0:
            return ids, values
        kept = ~self.filter.filtered(ids, counts, present=None if filter_present else self.contains(ids))
        passed = int(np.count_nonzero(kept))
        self.counters.filtered_ids += len(ids) - passed
        return (ids, values) if passed == len(ids) else (ids[kept], values[kept])

    def _write_values(
        self,
        mode: int,
        ids: UInt64Array,
        values: Float32Array,
        request_time: int,
        has_room: bool,
        *,
        filter_present: bool = False,
    ) -> None:
        self.note_update(request_time)
        ids, values = self._pass_filter(ids, values, None, filter_present=filter_present)
        self._write_rows(mode, ids, request_time, values=values, has_room=has_room)

    def _write_rows(
        self,
        mode: int,
        ids: UInt64Array,
        request_time: int,
        *,
        values: Float32Array | None = None,
        state: Float32Array | None = None,
        times: npt.NDArray[np.uint32] | None = None,
        existed: npt.NDArray[np.int8] | None = None,
        has_room: bool = False,
    ) -> None:
        if len(ids) == 0:
            return
        times_at, existed_at = _address(times), _address(existed)
        values_at, state_at, state_bytes = _address(values), _address(state), 4 * self.layout.state_floats

        def write(batch: Batch, offset: int, first: int, last: int, begin: int) -> int:
            return write_rows(
                self._at,
                first,
                last,
                begin,
                *batch,
                self._plan,
                self._segments,
                work_memory(self._work_bytes),
                mode,
                values_at + offset * 4 * self.dim,
                state_at + offset * state_bytes,
                times_at + offset * 4,
                request_time,
                existed_at + offset if existed_at else 0,
            )

        with self._room(ids, has_room):
            self._write(ids, write)

    def _write(self, ids: UInt64Array, work: Callable[[Batch, int, int, int, int], int]) -> None:
        """Run a kernel that may add rows, then settle the memory account."""
        try:
            self._stripes.write(ids, work)
        finally:
            self._charge()

    @contextmanager
    def _room(self, ids: UInt64Array, has_room: bool) -> Iterator[None]:
        """Within it a write of `ids` fits the budget: the caller holds the room for it, or it is reserved here."""
        if has_room or self._budget.limit == 0:
            yield
            return
        with room_for(self._budget, [RowWrite(self, ids, passed=True)]):
            yield

    def new_rows(self, write: RowWrite) -> int:
        """How many rows a write may add at most: distinct ids that have none and might pass the filter."""
        ids = write.ids
        missing = ~self.contains(ids)
        if self.filter is not None and not write.passed and missing.any():
            counts = None if write.counts is None else write.counts[missing]
            missing[missing] = self.filter.may_pass(ids[missing], counts)
        return len(np.unique(ids[missing]))

    def expect(self, rows: int, *, all_new: bool) -> int:
        """Count `rows` among those that writes under way may add, until `unexpect`.

        Args:
            rows: How many.
            all_new: Leave aside that freed rows can be used again.

        Returns:
            Bytes that they take at most, whatever the other writes come to add.
        """
        with self._time_lock:
            freed = 0 if all_new else max(0, self._stripes.freed_rows - self._pending)
            growth = self._stripes.growth_bytes(self._pending + rows)
            self._pending += rows
            return max(0, rows - freed) * self._stripes.row_bytes + growth

    def unexpect(self, rows: int) -> None:
        """Undo `expect`: the write has ended."""
        with self._time_lock:
            self._pending -= rows

    def _charge(self) -> None:
        """Tell the budget what the table uses now."""
        with self._time_lock:
            if self._released:  # a write that was under way then
                return
            now = self.charged_bytes
            self._budget.add(now - self._charged)
            self._charged = now

    def release(self) -> None:
        """Take the table off the budget, for good: what a write that is under way adds goes with the table."""
        with self._time_lock:
            self._budget.add(-self._charged)
            self._charged = 0
            self._released = True


def _sum_repeats(
    ids: UInt64Array, grads: Float32Array, counts: npt.NDArray[np.uint32] | None
) -> tuple[UInt64Array, Float32Array, npt.NDArray[np.uint32] | None]:
    """Each id once, its gradients added up in float32 in input order, and how many occurrences it stands for."""
    split = split_distinct(ids, 1)
    if split.positions is None:
        return ids, grads, counts
    sums = np.empty((len(split.ids), grads.shape[1]), np.float32)
    scatter_values(split, grads, [sums])
    if counts is None:
        return split.ids, sums, split.counts
    totals = np.zeros(len(split.ids), np.uint32)
    np.add.at(totals, split.positions & ~np.uint32(FIRST), counts)
    return split.ids, sums, totals


def _address(array: npt.NDArray[Any] | None) -> int:
    return 0 if array is None else address_of(array)
