"""TableReads: what can be read of one table on one shard: rows by id, and all rows, range by range."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.memory import address_of
from trilith.shard import Float32Array, UInt64Array
from trilith_proto import hash_table_pb2, ps_pb2
from trilith_services.ps.engine.kernels import gather, index, sweep
from trilith_services.ps.engine.kernels.index import STRIPES
from trilith_services.ps.engine.kernels.read import export_rows, lookup_rows, lookup_rows_half, work_bytes
from trilith_services.ps.engine.row_layout import RowLayout, lifetimes
from trilith_services.ps.engine.rows import Rows, check_target, checked_ids
from trilith_services.ps.engine.scratch import work_memory
from trilith_services.ps.engine.stripes import RANGE, Stripes

__all__ = ["TableCounters", "TableReads"]

_GATHERED = 16384
_FLOAT32, _FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)
_MOST_AGAIN = 3  # times that a walk through a stripe begins anew, before it takes the stripe in one turn
_Copied = TypeVar("_Copied")


@dataclass(slots=True)
class TableCounters:
    """Running totals since the table was made."""

    lookup_ids: int = 0
    lookup_hits: int = 0
    update_ids: int = 0
    filtered_ids: int = 0
    evicted_rows: int = 0


class TableReads:
    """The rows of one table of one shard, to be read while others read and write.

    Thread-safe: readers and writers take turns, see `Stripes`.
    """

    def __init__(self, config: ps_pb2.TableConfig, pool: Executor | None, rows: int) -> None:
        self.config = config
        self.name = config.name
        self.layout = RowLayout(config)
        self.dim = self.layout.dim
        self.segments = len(self.layout.segments)
        self.counters = TableCounters()
        self._lifetimes = lifetimes(config.hash_table.slot_expire_time_config)
        self._stripes = Stripes(self.layout, max(config.hash_table.initial_capacity, rows), pool)
        self._at = self._stripes.address
        self._work_bytes = work_bytes(self.dim)
        self._plan = address_of(self.layout.plan)
        self._segments = address_of(self.layout.segment_table)

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
    def free_bytes(self) -> int:
        """Bytes of them that are freed rows': new rows take them, and `compact` gives them back."""
        return self._stripes.freed_rows * self._stripes.row_bytes

    def lookup(self, ids: npt.NDArray[Any], out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Read rows; zeros for an id without one. Never inserts and touches no times.

        Args:
            ids: uint64[n] or int64[n], repeats allowed.
            out: float32[n, dim] or float16[n, dim] to write to, C-contiguous, of any alignment.

        Returns:
            `out`, or a new float32[n, dim].
        """
        ids = checked_ids(ids)
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
        present: npt.NDArray[np.bool_] = self._row_addresses(checked_ids(ids))[0][:, 0] != 0
        return present

    def export_rows(self, ids: npt.NDArray[Any]) -> tuple[npt.NDArray[np.bool_], Rows]:
        """Copy rows out.

        Returns:
            bool[n] which ids have a row, and the rows of those, in the order of `ids`.
        """
        ids = checked_ids(ids)
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
        ids = checked_ids(ids)
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

    def expired(
        self, found: Rows, now: int, expiry: hash_table_pb2.SlotExpireTimeConfig | None = None
    ) -> npt.NDArray[np.bool_]:
        """bool[n]: which copied-out rows have expired at `now`, Unix seconds, by `expiry` or else the table's own."""
        marks = np.zeros(len(found), np.bool_)
        within = self._lifetimes if expiry is None else lifetimes(expiry)
        sweep.mark_expired(address_of(within), len(within), found.last_update, found.ids, now, marks)
        return marks

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
