"""Table: the rows of one embedding table on one shard, in stripes with a lock each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError, MemoryLimitError, NonFiniteError
from trilith.ops.dedup import FIRST, scatter_values, split_distinct
from trilith.ops.jit import warm
from trilith.ops.memory import address_of
from trilith.shard import Float32Array, UInt64Array
from trilith.times import whole_seconds
from trilith_proto import ps_pb2
from trilith_services.ps.engine.budget import MemoryBudget
from trilith_services.ps.engine.filters import OccurrenceFilter
from trilith_services.ps.engine.kernels import codecs, gather, index, sweep
from trilith_services.ps.engine.kernels.apply import make_apply
from trilith_services.ps.engine.kernels.index import STRIPES
from trilith_services.ps.engine.kernels.read import export_rows, lookup_rows, lookup_rows_half, work_bytes
from trilith_services.ps.engine.kernels.values import all_finite, widen_halves
from trilith_services.ps.engine.kernels.write import ADD, ASSIGN, IMPORT, RESET, write_rows
from trilith_services.ps.engine.row_layout import RowLayout
from trilith_services.ps.engine.rows import Rows, as_counts, as_ids, check_target
from trilith_services.ps.engine.stripes import RANGE, Batch, Stripes, work_memory
from trilith_services.ps.engine.touched import Touched

__all__ = ["RowWrite", "Table", "TableCounters", "compile_common_kernels", "room_for"]

_SECONDS_PER_DAY = 86400
_GATHERED = 16384
_FLOAT32, _FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)
_MOST_AGAIN = 3  # times that a walk through a stripe begins anew, before it takes the stripe in one turn
_EVICTED_PART = 16  # rows are moved together after a sweep that leaves at least one in so many free
_Copied = TypeVar("_Copied")


@dataclass(slots=True)
class TableCounters:
    """Running totals since the table was made."""

    lookup_ids: int = 0
    lookup_hits: int = 0
    update_ids: int = 0
    filtered_ids: int = 0
    evicted_rows: int = 0


class Table:
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
        self.config = config
        self.name = config.name
        self.layout = RowLayout(config)
        self.dim = self.layout.dim
        self.segments = len(self.layout.segments)
        self.filter = filter
        self.max_update_time = 0
        self.counters = TableCounters()
        self._budget = budget if budget is not None else MemoryBudget(0)
        self._lifetimes = _lifetimes(config)
        self._time_lock = threading.Lock()
        self._compacting = threading.Lock()
        self._stripes = Stripes(self.layout, max(config.hash_table.initial_capacity, rows), pool)
        self._at = self._stripes.address
        self._work_bytes = work_bytes(self.dim)
        self._plan = address_of(self.layout.plan)
        self._segments = address_of(self.layout.segment_table)
        self._apply = make_apply(self.layout.structure) if self.layout.structure else None
        self._filter_bytes = 0 if filter is None else filter.memory_bytes
        self._charged = 0
        self._released = False
        self._pending = 0  # rows that writes under way may add
        self._charge()

    def __len__(self) -> int:
        return len(self._stripes)

    @property
    def stripes(self) -> int:
        """How many stripes the table has."""
        return STRIPES

    @property
    def memory_bytes(self) -> int:
        """Bytes of rows and indexes in use; those of freed rows count until `compact` gives them back."""
        return self._stripes.memory_bytes

    @property
    def charged_bytes(self) -> int:
        """Bytes of the table with its filter: what it is charged for."""
        return self.memory_bytes + self._filter_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes of them that are freed rows': new rows take them, and `compact` gives them back."""
        return self._stripes.freed_rows * self._stripes.row_bytes

    def compile(self) -> None:
        """Compile or load every kernel that serving this table may run."""
        compile_common_kernels()
        if self._apply is not None:
            warm(self._apply)
        if self.filter is not None:
            self.filter.compile()

    # ---- reads -------------------------------------------------------------------------------------------------

    def lookup(self, ids: npt.NDArray[Any], out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Read rows; zeros for an id without one. Never inserts and touches no times.

        Args:
            ids: uint64[n] or int64[n], repeats allowed.
            out: float32[n, dim] or float16[n, dim] to write to, C-contiguous, of any alignment.

        Returns:
            `out`, or a new float32[n, dim].
        """
        ids = as_ids(ids)
        if out is None:
            out = np.empty((len(ids), self.dim), np.float32)
        else:
            check_target(f"table {self.name!r}: out", out, (len(ids), self.dim), _FLOAT32, _FLOAT16)
        if len(ids) == 0:
            return out
        kernel = lookup_rows if out.dtype == np.float32 else lookup_rows_half
        target, row_bytes = address_of(out), self.dim * out.itemsize
        work = self._work_bytes

        def read(address: int, count: int, offset: int) -> int:
            to = target + offset * row_bytes
            return kernel(self._at, address, count, self._plan, self._segments, work_memory(work), to)

        hits = self._stripes.read(ids, read)
        self.counters.lookup_ids += len(ids)
        self.counters.lookup_hits += hits
        return out

    def contains(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """bool[n]: whether each id has a row."""
        present: npt.NDArray[np.bool_] = self._row_addresses(as_ids(ids))[0][:, 0] != 0
        return present

    def export_rows(self, ids: npt.NDArray[Any]) -> tuple[npt.NDArray[np.bool_], Rows]:
        """Copy rows out.

        Returns:
            bool[n] which ids have a row, and the rows of those, in the order of `ids`.
        """
        ids = as_ids(ids)
        with self._stripes.reading:
            addresses, times = self._row_addresses(ids, inside=True)
            present = addresses[:, 0] != 0
            return present, self._copy_rows(ids[present], addresses[present], times[present])

    def export_stripe(self, s: int) -> Rows:
        """Copy all rows of stripe `s`; see `export_pieces`."""
        return Rows.concatenate([self._no_rows(), *self.export_pieces(s)])

    def export_pieces(self, s: int, rows: int = RANGE) -> Iterator[Rows]:
        """Copy all rows of stripe `s`, about `rows` at a time, while others read and write.

        Every row that is there from the beginning to the end comes once, none twice, each as it is at one moment. A
        row that is erased and made again meanwhile may be left out.
        """
        waiting, count = [self._no_rows()], 0
        for piece, kept in self._walk(s, self._copy_rows):
            waiting.append(piece if kept is None else piece.take(kept))
            count += len(waiting[-1])
            if count >= rows:
                yield Rows.concatenate(waiting)
                waiting, count = [self._no_rows()], 0
        if count:
            yield Rows.concatenate(waiting)

    def stripe_ids(self, s: int) -> UInt64Array:
        """uint64[n]: the ids of stripe `s`; see `export_pieces`."""
        pieces = [ids if kept is None else ids[kept] for ids, kept in self._walk(s, lambda ids, rows, times: ids)]
        return np.concatenate([np.empty(0, np.uint64), *pieces])

    def _walk(
        self, s: int, copy: Callable[[UInt64Array, npt.NDArray[np.int64], npt.NDArray[np.uint32]], _Copied]
    ) -> Iterator[tuple[_Copied, npt.NDArray[np.bool_] | None]]:
        """Go through stripe `s` by ranges of places.

        Args:
            s: Which stripe.
            copy: Takes ids, addresses and times of some rows while others may read, not write.

        Yields:
            What it returned, and bool[n] which of those rows belong to the walk; None: all.
        """
        stripes, taken = self._stripes, list[UInt64Array]()
        generation, place, again = -1, 0, 0
        before = np.empty(0, np.uint64)  # rows that came before the places changed their meaning
        with stripes.scanning(s) as scan:
            while True:
                with stripes.reading:
                    if generation != stripes.generation(s):
                        generation, place, again = stripes.generation(s), 0, again + 1
                        before = np.sort(np.concatenate([np.empty(0, np.uint64), *taken]))
                    slots, places = int(stripes.columns[s, index.SLOTS]), int(stripes.places[s])
                    # The stash comes whole: its entries change their places. So does all, after some rebuilds.
                    end = places if place + RANGE >= slots or again > _MOST_AGAIN else place + RANGE
                    ids, addresses, times, _ = self._scan(s, place, end, end - place)
                    piece = copy(ids, addresses, times)
                    erased = list(scan.erased)
                place = end
                kept = None
                if len(before):
                    kept = before[np.minimum(np.searchsorted(before, ids), len(before) - 1)] != ids
                if erased:
                    left = ~np.isin(ids, np.concatenate(erased))
                    kept = left if kept is None else kept & left
                if kept is not None:
                    ids = ids[kept]
                taken.append(ids)
                yield piece, kept
                if place >= places:
                    return

    def gather(
        self, ids: npt.NDArray[Any], weights: Float32Array | None = None
    ) -> tuple[UInt64Array, Float32Array, UInt64Array]:
        """Read raw weights.

        Args:
            ids: uint64[n] or int64[n].
            weights: float32[n, dim] to write to, C-contiguous, of any alignment.

        Returns:
            uint64[m] ids that have a row, in the order of `ids`, their float32[m, dim], and uint64[n - m] the others.
        """
        ids = as_ids(ids)
        found, missing = np.empty(len(ids), np.uint64), np.empty(len(ids), np.uint64)
        if weights is None:
            weights = np.empty((len(ids), self.dim), np.float32)
        else:
            check_target(f"table {self.name!r}: weights", weights, (len(ids), self.dim), _FLOAT32)
        present = 0
        for start in range(0, len(ids), _GATHERED):  # in pieces, so that writers get their turn
            count = min(_GATHERED, len(ids) - start)
            with self._stripes.reading:
                present += gather.gather_rows(
                    self._at,
                    address_of(ids) + 8 * start,
                    count,
                    self._plan,
                    self._segments,
                    work_memory(self._work_bytes),
                    address_of(found) + 8 * present,
                    address_of(weights) + 4 * self.dim * present,
                    address_of(missing) + 8 * (start - present),
                )
        return found[:present], weights[:present], missing[: len(ids) - present]

    def scan(self, part: int, parts: int, limit: int, offset: int = 0) -> tuple[Rows, int]:
        """Page through one of `parts` contiguous ranges of the storage.

        Args:
            part: Which range, from 0.
            parts: Into how many the storage is cut.
            limit: Rows per page; fewer mean that the part is finished.
            offset: 0 at first, then what the last call gave. A table that grows between pages may repeat or miss rows.

        Returns:
            Up to `limit` rows, and the offset to go on from (never 0).
        """
        if not 0 <= part < parts:
            raise InvalidRequestError(f"part={part} is outside 0..{parts - 1}")
        if limit < 1:
            raise InvalidRequestError(f"limit={limit} is below 1")
        bounds = np.concatenate([[0], np.cumsum(self._stripes.places)])
        end = int(bounds[-1]) * (part + 1) // parts
        at = offset - 1 if offset else int(bounds[-1]) * part // parts
        pieces: list[Rows] = []
        room = limit
        while at < end and room > 0:
            s = int(np.searchsorted(bounds, at, "right")) - 1
            with self._stripes.reading:
                stop = min(end, int(bounds[s + 1]), at + RANGE) - int(bounds[s])
                piece, place = self._scan_stripe(s, at - int(bounds[s]), stop, room)
            pieces.append(piece)
            room -= len(piece)
            at = int(bounds[s]) + place
        return Rows.concatenate(pieces) if pieces else self._no_rows(), at + 1

    def expired(self, found: Rows, now: int) -> npt.NDArray[np.bool_]:
        """bool[n]: which copied-out rows have expired at `now`, Unix seconds."""
        marks = np.zeros(len(found), np.bool_)
        sweep.mark_expired(address_of(self._lifetimes), len(self._lifetimes), found.last_update, found.ids, now, marks)
        return marks

    # ---- who wants to know ---------------------------------------------------------------------------------------

    @property
    def touched(self) -> Touched | None:
        """The ids written to, erased or evicted since it was set; None: they are not kept."""
        return self._stripes.touched

    @touched.setter
    def touched(self, touched: Touched | None) -> None:
        before, self._stripes.touched = self._stripes.touched, touched
        for each, account in ((before, None), (touched, self._budget.add)):
            if each is not None:
                each.charge_to(account)

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
        ids = as_ids(ids)
        self.check_gradients(ids, grads, learning_rates, counts, global_step)
        assert self._apply is not None  # just checked
        grads, rates = self._as_values(ids, grads), self._as_rates(learning_rates)
        counts = as_counts(counts, len(ids))
        if dedup:
            ids, grads, counts = _sum_repeats(ids, grads, counts)
        time = whole_seconds(request_time)
        self.raise_max_update_time(time)
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
            self._refresh_scales(global_step)
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
        ids, values, time = as_ids(ids), self._as_values(ids, values), whole_seconds(request_time)
        if self.config.hash_table.skip_zero_embedding and len(ids):
            last = len(ids) - 1 - np.unique(ids[::-1], return_index=True)[1]
            ids, values = ids[last], values[last]
            zero = np.einsum("nd,nd->n", values, values) < np.finfo(np.float32).tiny
            self.raise_max_update_time(time)
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
        ids, values, time = as_ids(ids), self._as_values(ids, values), whole_seconds(request_time)
        self._write_values(ADD, ids, values, time, has_room, filter_present=filter_present)

    def reinitialize(self, ids: npt.NDArray[Any], *, request_time: int, has_room: bool = False) -> npt.NDArray[np.int8]:
        """Give ids fresh rows, without asking the filter.

        Returns:
            int8[n]: 1 where there was a row, 0 where it was created.
        """
        ids = as_ids(ids)
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
        self._write_rows(IMPORT, as_ids(found.ids), 0, values=weights, state=state, times=times)
        self.raise_max_update_time(int(times.max()))

    def erase(self, ids: npt.NDArray[Any]) -> int:
        """Delete rows; returns how many there were."""
        ids = as_ids(ids)
        if len(ids) == 0:
            return 0

        erased: list[int] = []

        def erase(batch: Batch, offset: int, first: int, last: int, begin: int) -> int:
            self._stripes.note_erased(ids[offset : offset + RANGE * 4], first, last)
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

    def raise_max_update_time(self, time: int) -> None:
        """Raise the newest update to at least `time`, Unix seconds, as every write and a restored checkpoint do.

        A statistic, and no clock: callers chose these times.
        """
        with self._time_lock:
            self.max_update_time = max(self.max_update_time, time)

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

    def _refresh_scales(self, global_step: int) -> None:
        """Let one-bit scales grow: every `step_size` steps, before the gradients of that step use them."""
        for segment, config in zip(self.layout.segments, self.config.hash_table.entry_config.segments, strict=True):
            if segment.codec == codecs.ONE_BIT and global_step % config.comp_config.one_bit.step_size == 0:
                one_bit = config.comp_config.one_bit
                grown = one_bit.init_scale * (1.0 + 0.005 * global_step) ** 0.5
                segment.codec_parameters[1] = min(grown, one_bit.max_scale)

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
        self.raise_max_update_time(request_time)
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

    def _row_addresses(
        self, ids: UInt64Array, *, inside: bool = False
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """int64[n, 2] addresses of rows' weights and states, 0 where there is none, and uint32[n] last updates.

        `inside`: the caller is reading already, and may go on to read the rows themselves.
        """
        addresses, times = np.zeros((len(ids), 2), np.int64), np.zeros(len(ids), np.uint32)
        rows_at, times_at = address_of(addresses), address_of(times)

        def find(address: int, count: int, offset: int) -> int:
            work = work_memory(self._work_bytes)
            return index.find_rows(self._at, address, count, work, rows_at + 16 * offset, times_at + 4 * offset)

        if inside:
            find(address_of(ids), len(ids), 0)
        elif len(ids):
            self._stripes.read(ids, find)
        return addresses, times

    def _scan_stripe(self, s: int, begin: int, end: int, limit: int) -> tuple[Rows, int]:
        """Rows of the places from `begin` on, at most `limit`, and the place to go on from; the lock is held."""
        ids, addresses, times, place = self._scan(s, begin, end, limit)
        return self._copy_rows(ids, addresses, times), place

    def _scan(
        self, s: int, begin: int, end: int, limit: int
    ) -> tuple[UInt64Array, npt.NDArray[np.int64], npt.NDArray[np.uint32], int]:
        """Ids, addresses and last updates of those rows, and the place to go on from; the lock is held."""
        room = max(1, min(limit, int(self._stripes.columns[s, index.SIZE])))
        ids, rows, times = np.empty(room, np.uint64), np.empty((room, 2), np.int64), np.empty(room, np.uint32)
        packed = int(sweep.scan_index(self._at, s, begin, end, room, ids, rows, times))
        place, count = packed >> 32, packed & 0xFFFFFFFF
        return ids[:count], rows[:count], times[:count], place

    def _copy_rows(self, ids: UInt64Array, addresses: npt.NDArray[np.int64], times: npt.NDArray[np.uint32]) -> Rows:
        weights = np.empty((len(ids), self.dim), np.float32)
        state = np.empty((len(ids), self.layout.state_floats), np.float32)
        export_rows(self._plan, self._segments, address_of(addresses), len(ids), address_of(weights), address_of(state))
        return Rows(ids, weights, state, times)

    def _no_rows(self) -> Rows:
        return self._copy_rows(np.empty(0, np.uint64), np.empty((0, 2), np.int64), np.empty(0, np.uint32))


@dataclass(frozen=True, slots=True)
class RowWrite:
    """One table's part of a write that may add rows.

    Attributes:
        table: The table.
        ids: uint64[n].
        counts: uint32[n] occurrences each id stands for, or None for one each.
        passed: Whether the table's filter has let all ids through, or is not asked.
    """

    table: Table
    ids: UInt64Array
    counts: npt.NDArray[np.uint32] | None = None
    passed: bool = False


@contextmanager
def room_for(budget: MemoryBudget, writes: Sequence[RowWrite]) -> Iterator[None]:
    """Hold the room that writes of rows need together, before the first row changes.

    Raises:
        MemoryLimitError: They do not fit, whatever other writes under way come to need.
    """
    if budget.limit == 0:
        yield
        return
    rows: dict[Table, int] = {}  # several parts may be of one table
    for each in writes:
        rows[each.table] = rows.get(each.table, 0) + len(each.ids)
    with _expected(rows, all_new=True) as size:
        if budget.reserve(size):
            try:
                yield
            finally:
                budget.release(size)
            return
    # Look more closely: most ids may have rows.
    rows = dict.fromkeys(rows, 0)
    for each in writes:
        rows[each.table] += each.table.new_rows(each)
    rows = {table: count for table, count in rows.items() if count}
    for again in (False, True):
        with _expected(rows, all_new=False) as size:
            if not rows or budget.reserve(size, wait=True):
                try:
                    yield
                finally:
                    budget.release(size)
                return
        if again or not budget.make_room(size):
            break
    names = ", ".join(repr(table.name) for table in rows)
    raise MemoryLimitError(
        f"table {names}: {sum(rows.values())} new rows need {size} bytes, but {budget.used} of the "
        f"{budget.limit} bytes of this PS are in use; nothing was written"
    )


@contextmanager
def _expected(rows: dict[Table, int], *, all_new: bool) -> Iterator[int]:
    """Within it so many rows by table are among those that writes under way may add; gives the bytes they take."""
    taken: list[tuple[Table, int]] = []
    try:
        size = 0
        for table, count in rows.items():
            size += table.expect(count, all_new=all_new)
            taken.append((table, count))
        yield size
    finally:
        for table, count in taken:
            table.unexpect(count)


def compile_common_kernels() -> None:
    """Compile or load the kernels that all tables share, whatever their optimizers."""
    warm(
        index.group_by_stripe,
        index.find_rows,
        index.erase_rows,
        sweep.copy_places,
        sweep.match_index,
        sweep.sort_freed,
        sweep.drop_freed,
        sweep.move_rows,
        sweep.any_expired,
        sweep.evict_rows,
        sweep.scan_index,
        sweep.mark_expired,
        gather.gather_rows,
        lookup_rows,
        lookup_rows_half,
        write_rows,
        export_rows,
        widen_halves,
        all_finite,
    )


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


def _lifetimes(config: ps_pb2.TableConfig) -> npt.NDArray[np.int64]:
    """Seconds without update that rows live: int64[1] for all slots, or int64[32768] by slot."""
    expiry = config.hash_table.slot_expire_time_config
    default = expiry.default_expire_time * _SECONDS_PER_DAY
    if not expiry.slot_expire_times:
        return np.array([default], np.int64)
    lifetimes = np.full(1 << 15, default, np.int64)
    for each in expiry.slot_expire_times:
        lifetimes[each.slot] = each.expire_time * _SECONDS_PER_DAY
    return lifetimes
