"""Batches of ids and rows: split by owner, cut to size, sent to every shard at once, and put back in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from trilith.arrays import as_ids, as_rows, refuse_non_finite
from trilith.cluster import Cluster, Writes
from trilith.errors import InvalidRequestError, ShardRestartedError, TrilithError
from trilith.ops import dedup
from trilith.shard import (
    ANY_WRITE,
    Float32Array,
    FloatArray,
    IdPart,
    Shard,
    UInt64Array,
    UpdateFrame,
    UpdateLayout,
    UpdatePart,
    Write,
)
from trilith.times import whole_seconds
from trilith_proto import ps_pb2

if TYPE_CHECKING:
    from trilith.tables.schedules import LearningRate

__all__ = ["Batches", "TableInfo", "UpdateVerb", "WriteOptions"]

_T = TypeVar("_T")

_REMEMBERED = 4
_REMEMBERED_IDS = 1 << 18
"""Splits kept per table, as many as batches are usually looked up ahead, and how large they may be."""

UpdateVerb = Literal["apply_gradients", "assign", "assign_add"]


@dataclass(frozen=True, slots=True)
class TableInfo:
    """What a client knows of a table.

    Attributes:
        config: As the shards have it.
        dim: Floats per row.
        rates: What is sent with gradients, one per segment; None: the shards take those of the config.
    """

    config: ps_pb2.TableConfig
    dim: int
    rates: tuple[LearningRate, ...] | None

    @property
    def learning_rates(self) -> tuple[LearningRate, ...]:
        """One per segment: what is sent, or what the shards take by themselves."""
        if self.rates is not None:
            return self.rates
        from trilith.tables.config import own_rate

        return tuple(own_rate(segment.opt_config) for segment in self.config.hash_table.entry_config.segments)


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """What goes with every write of one call.

    Attributes:
        step: The model's step.
        request_time: Unix seconds; None is now, by each shard's clock.
        allow_non_finite: Accept NaN and infinity.
        timeout_s: Seconds until DeadlineExceededError; None takes the client's own.
        advance: Gradients only: by how many steps of the model they take it on; shard 0 counts them with its part.
        rate_factors: Gradients only: by table what its rates are multiplied by.
    """

    step: int = 0
    request_time: int | None = None
    allow_non_finite: bool = False
    timeout_s: float | None = None
    advance: int = 0
    rate_factors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _TableUpdate:
    """One table's rows in an update."""

    name: str
    values: Float32Array
    split: dedup.Split
    counts: npt.NDArray[np.uint32] | None
    rates: Float32Array | None


class Batches:
    """The verbs that carry many ids, over one cluster. Thread-safe."""

    def __init__(
        self,
        cluster: Cluster,
        info: Callable[[str], TableInfo],
        *,
        float16: bool | None = None,
        observe: Callable[[int, float], None] | None = None,
    ) -> None:
        """Use `cluster`; `info` looks a table up or raises UnknownTableError.

        Args:
            cluster: The shards.
            info: By table name.
            float16: Whether rows travel as float16, where there is a wire; None: as the cluster was opened.
            observe: Called with a shard's index and the seconds it took over its part of a lookup, retries included.
        """
        self._cluster = cluster
        self._info = info
        self._float16 = cluster.float16 if float16 is None else float16 and cluster.remote
        self._observe = observe
        self._accepts = cluster.config.on_restart == "accept"
        self._recent: dict[str, deque[dedup.Split]] = {}
        dedup.warm_kernels()

    # ---- reading -----------------------------------------------------------------------------------------------------

    def lookup(self, ids: Mapping[str, Any], timeout_s: float | None) -> dict[str, Float32Array]:
        """See `Client.lookup`."""
        count = self._cluster.count
        dims, sizes, splits = [], [], []
        for name, wanted in ids.items():
            dims.append(self._info(name).dim)
            array = as_ids(name, wanted)
            sizes.append(array.size)
            splits.append(self._remembered(name, array))
        names = list(ids)

        def call(index: int, shard: Shard) -> list[FloatArray]:
            parts = [IdPart(name, split.owned(index)) for name, split in zip(names, splits, strict=True)]
            return self._lookup_on(index, shard, parts, dims)

        replies = self._cluster.fan_out(_shards_with_ids(splits, count), call, timeout_s=timeout_s)
        rows = {}
        for place, (name, dim, n, split) in enumerate(zip(names, dims, sizes, splits, strict=True)):
            blocks = [replies[s][place] if s in replies else _no_rows(dim) for s in range(count)]
            rows[name] = dedup.gather_rows(split, blocks, n, dim)
        return rows

    def _lookup_on(self, index: int, shard: Shard, parts: list[IdPart], dims: list[int]) -> list[FloatArray]:
        if self._observe is None:
            return self._rows_of(shard, parts, dims)
        started = time.perf_counter()
        try:
            return self._rows_of(shard, parts, dims)
        finally:
            self._observe(index, time.perf_counter() - started)

    def _rows_of(self, shard: Shard, parts: list[IdPart], dims: list[int]) -> list[FloatArray]:
        """One shard's rows, by as many calls as their size asks for."""
        float16 = self._float16
        width = 2 if float16 else 4
        limit = shard.batch_bytes
        if sum([part.ids.size * max(8, width * dim) for part, dim in zip(parts, dims, strict=True)]) <= limit:
            rows = shard.lookup(parts, float16=float16)
            if self._accepts:
                _check_widths(parts, rows, dims)
            return rows
        blocks: list[FloatArray] = []
        for part, dim in zip(parts, dims, strict=True):
            pieces = [
                shard.lookup([IdPart(part.table, ids)], float16=float16)[0]
                for ids in _pieces(part.ids, limit, max(8, width * dim))
            ]
            _check_widths([part] * len(pieces), pieces, [dim] * len(pieces))
            blocks.append(np.concatenate(pieces) if pieces else _no_rows(dim))
        return blocks

    def lookup_owned(
        self, ids: Sequence[Mapping[str, UInt64Array]], timeout_s: float | None
    ) -> list[dict[str, Float32Array]]:
        """Read rows of ids that are arranged by owner already, without looking for repeats.

        Args:
            ids: Per shard and table uint64[n].
            timeout_s: Seconds until DeadlineExceededError; None takes the client's own.

        Returns:
            Per shard and table float32[n, dim].
        """
        chosen = self._owners_of(ids, {index: dict(tables) for index, tables in enumerate(ids)})

        def call(index: int, shard: Shard) -> list[FloatArray]:
            parts = [IdPart(name, each) for name, each in ids[index].items()]
            return self._lookup_on(index, shard, parts, [self._info(name).dim for name in ids[index]])

        replies = self._cluster.fan_out(chosen, call, timeout_s=timeout_s)
        return [
            {
                name: np.ascontiguousarray(replies[index][place], np.float32)
                if index in replies
                else _no_rows(self._info(name).dim)
                for place, name in enumerate(tables)
            }
            for index, tables in enumerate(ids)
        ]

    def _owners_of(self, given: Sequence[Any], ids: Mapping[int, Mapping[str, UInt64Array]]) -> list[int]:
        """Shards that have something to do."""
        if len(given) != self._cluster.count:
            raise InvalidRequestError(f"{len(given)} parts of a batch for {self._cluster.count} shards")
        return [index for index, tables in ids.items() if any(each.size for each in tables.values())]

    def per_id(
        self,
        table: str,
        ids: Any,
        call: Callable[[Shard, IdPart, Write], _T],
        *,
        options: WriteOptions | None = None,
        timeout_s: float | None = None,
    ) -> tuple[dedup.Split, list[_T]]:
        """Call every shard with its ids of one table, repeats included, in pieces that fit a message.

        Args:
            table: Which table.
            ids: Integers [n].
            call: Takes a shard, its ids and, of a write, what names it.
            options: Of the write; None: the call changes nothing.
            timeout_s: Seconds until DeadlineExceededError; None takes the client's own.

        Returns:
            The split, and the results in its order.
        """
        self._info(table)
        cluster = self._cluster
        split = dedup.split_by_owner(as_ids(table, ids), cluster.count)

        writes = self._writes(options) if options is not None else None

        def run(index: int, shard: Shard) -> list[_T]:
            pieces = _pieces(split.owned(index), shard.batch_bytes, 8)
            results = []
            for number, piece in enumerate(pieces):
                write = writes.of(index, number) if writes else ANY_WRITE
                with _part_of_several(number):
                    results.append(call(shard, IdPart(table, piece), write))
            return results

        replies = cluster.fan_out(
            _shards_with_ids([split], cluster.count), run, timeout_s=timeout_s, writes=options is not None
        )
        return split, [result for results in replies.values() for result in results]

    # ---- writing -----------------------------------------------------------------------------------------------------

    def write(self, index: int, options: WriteOptions) -> Write:
        """Name the next write to a shard."""
        return self._cluster.write(
            index,
            global_step=options.step,
            advance=options.advance,
            request_time=0 if options.request_time is None else whole_seconds(options.request_time),
            allow_non_finite=options.allow_non_finite,
        )

    def _writes(self, options: WriteOptions) -> Writes:
        return Writes(lambda index: self.write(index, options))

    def update(self, verb: UpdateVerb, updates: Mapping[str, tuple[Any, Any]], options: WriteOptions) -> None:
        """See `Client.apply_gradients`, `assign` and `assign_add`."""
        cluster = self._cluster
        batch = [self._prepare(verb, name, ids, values, options) for name, (ids, values) in updates.items()]
        chosen = _shards_with_ids([rows.split for rows in batch], cluster.count)
        if options.advance and 0 not in chosen:
            chosen.insert(0, 0)  # none of its rows are concerned; it counts all the same
        frames = {index: self._frame(index, batch, options) for index in chosen}
        with _closing(frames):
            for place, rows in enumerate(batch):
                dim = rows.values.shape[1]
                blocks = [frames[s][place].values if s in frames else _no_rows(dim) for s in range(cluster.count)]
                finite = dedup.scatter_values(rows.split, rows.values, blocks, float16=self._float16)
                if not finite and not options.allow_non_finite:
                    refuse_non_finite(f"table {rows.name!r}", _WHAT[verb], rows.values, float16=self._float16)
            self._send_frames(verb, chosen, frames, options)

    def update_owned(
        self, verb: UpdateVerb, updates: Sequence[Mapping[str, tuple[Any, ...]]], options: WriteOptions
    ) -> None:
        """Write rows of ids that are arranged by owner already; repeats are applied one after another.

        Args:
            verb: Which write.
            updates: Per shard and table uint64[n], float32[n, dim] and, where ids stand for several, uint32[n].
            options: What goes with it.
        """
        names = {name for tables in updates for name in tables}
        rates = {name: self._rates(verb, self._info(name), options) for name in sorted(names)}
        frames: dict[int, UpdateFrame] = {}
        chosen = self._owners_of(
            updates, {index: {name: each[0] for name, each in tables.items()} for index, tables in enumerate(updates)}
        )
        with _closing(frames):
            for index in chosen:
                layouts = [
                    UpdateLayout(name, ids.size, self._info(name).dim, bool(counts), rates[name])
                    for name, (ids, _, *counts) in updates[index].items()
                ]
                frames[index] = frame = self._new_frame(index, layouts, options)
                for part, (ids, values, *counts) in zip(frame, updates[index].values(), strict=True):
                    part.ids[:] = ids
                    if part.counts is not None:
                        part.counts[:] = counts[0]
                    rows = as_rows(part.table, _WHAT[verb], values, ids.size, part.values.shape[1])
                    split = dedup.Split(part.ids, (0, ids.size), None)
                    finite = dedup.scatter_values(split, rows, [part.values], float16=self._float16)
                    if not finite and not options.allow_non_finite:
                        refuse_non_finite(f"table {part.table!r}", _WHAT[verb], rows, float16=self._float16)
            self._send_frames(verb, chosen, frames, options)

    def _rates(self, verb: UpdateVerb, info: TableInfo, options: WriteOptions) -> Float32Array | None:
        """The rates that travel with an update, evaluated once for all shards."""
        factor = options.rate_factors.get(info.config.name, 1.0)
        if verb != "apply_gradients" or (info.rates is None and factor == 1.0):
            return None
        from trilith.tables.schedules import rates_at

        return rates_at(info.learning_rates, options.step, factor)

    def _prepare(self, verb: UpdateVerb, name: str, ids: Any, values: Any, options: WriteOptions) -> _TableUpdate:
        info = self._info(name)
        array = as_ids(name, ids)
        rows = as_rows(name, _WHAT[verb], values, array.size, info.dim)
        if verb != "apply_gradients":
            return _TableUpdate(name, rows, dedup.split_by_owner(array, self._cluster.count), None, None)
        split = self._split(name, array)
        return _TableUpdate(name, rows, split, split.counts, self._rates(verb, info, options))

    def _remembered(self, name: str, array: UInt64Array) -> dedup.Split:
        """Split the ids of a lookup; a step will most likely follow with the same ones."""
        split = dedup.split_distinct(array, self._cluster.count)
        # Without positions the split may be the caller's own array, which may change.
        if split.positions is not None and array.size <= _REMEMBERED_IDS:
            self._recent.setdefault(name, deque(maxlen=_REMEMBERED)).append(split)
        return split

    def _split(self, name: str, array: UInt64Array) -> dedup.Split:
        """Split the ids of a step, as they were split for their lookup if that was not long ago."""
        for split in list(self._recent.get(name, ())):
            if split.of(array):
                return split
        return dedup.split_distinct(array, self._cluster.count)

    def _frame(self, index: int, batch: Sequence[_TableUpdate], options: WriteOptions) -> UpdateFrame:
        """Make room for a shard's part of an update: in the message itself, unless one message will not do."""
        layouts = []
        for rows in batch:
            n, dim = rows.split.owned(index).size, rows.values.shape[1]
            layouts.append(UpdateLayout(rows.name, n, dim, rows.counts is not None, rows.rates))
        frame = self._new_frame(index, layouts, options)
        for part, rows in zip(frame, batch, strict=True):
            part.ids[:] = rows.split.owned(index)
            if part.counts is not None and rows.counts is not None:
                part.counts[:] = rows.counts[rows.split.bounds[index] : rows.split.bounds[index + 1]]
        return frame

    def _new_frame(self, index: int, layouts: Sequence[UpdateLayout], options: WriteOptions) -> UpdateFrame:
        shard = self._cluster.shards[index]
        if sum(each.rows * _row_bytes(each.dim) for each in layouts) > shard.batch_bytes:
            return UpdateFrame.plain(layouts, ANY_WRITE)
        return shard.new_update(layouts, self.write(index, options), float16=self._float16)

    def _send_frames(
        self, verb: UpdateVerb, chosen: Sequence[int], frames: Mapping[int, UpdateFrame], options: WriteOptions
    ) -> None:
        writes = self._writes(options)
        self._cluster.fan_out(
            chosen,
            lambda index, shard: self._send(verb, index, shard, frames[index], writes),
            timeout_s=options.timeout_s,
            writes=True,
        )

    def _send(self, verb: UpdateVerb, index: int, shard: Shard, frame: UpdateFrame, writes: Writes) -> None:
        if frame.write.client_id:
            self._call(verb, shard, frame, frame.write)
            return
        # Too much for one message: several writes in order, each with a sequence of its own; the last one counts.
        limit = shard.batch_bytes
        pieces = []
        for part in frame:
            step = max(1, limit // _row_bytes(part.values.shape[1]))
            pieces += [(part, slice(start, start + step)) for start in range(0, part.ids.size, step)]
        for number, (part, piece) in enumerate(pieces):
            values = part.values[piece]
            if self._float16:
                with np.errstate(over="ignore"):  # refused before, or allowed
                    values = values.astype(np.float16)
            counts = None if part.counts is None else part.counts[piece]
            cut = UpdatePart(part.table, part.ids[piece], values, counts, part.learning_rates)
            write = writes.of(index, number)
            if write.advance and number + 1 < len(pieces):
                write = replace(write, advance=0)
            with _part_of_several(number):
                self._call(verb, shard, [cut], write)

    def _call(self, verb: UpdateVerb, shard: Shard, parts: Sequence[UpdatePart], write: Write) -> None:
        if verb == "apply_gradients":
            step = shard.apply_gradients(parts, write)
            if write.advance:
                self._cluster.hear_step(step)
        else:
            {"assign": shard.assign, "assign_add": shard.assign_add}[verb](parts, write)


@contextmanager
def _part_of_several(done: int) -> Iterator[None]:
    """One message of several, of which so many were done before: an error says so."""
    try:
        yield
    except TrilithError as error:
        error.partly_done = done > 0
        raise


@contextmanager
def _closing(frames: Mapping[int, UpdateFrame]) -> Iterator[None]:
    """Within it frames may be sent; afterwards nobody sends them, unless an error says that the write is unfinished.

    Then they stay open for as long as somebody keeps the error.
    """
    unfinished = False
    try:
        yield
    except TrilithError as error:
        unfinished = error.unfinished is not None
        raise
    finally:
        if not unfinished:
            for frame in frames.values():
                frame.write.ticket.close()


_WHAT: dict[UpdateVerb, str] = {"apply_gradients": "gradients", "assign": "values", "assign_add": "values"}


def _check_widths(parts: Sequence[IdPart], rows: Sequence[FloatArray], dims: Sequence[int]) -> None:
    """Refuse what a PS that restarted has under the name of another table."""
    for part, found, dim in zip(parts, rows, dims, strict=True):
        if found.shape[1] != dim:
            raise ShardRestartedError(
                f"table {part.table!r} had dim {dim} when this client met it, and has {found.shape[1]} since a PS"
                " restarted; connect anew"
            )


def _no_rows(dim: int) -> Float32Array:
    return np.empty((0, dim), np.float32)


def _shards_with_ids(splits: Sequence[dedup.Split], count: int) -> list[int]:
    """Shards that own any of the ids."""
    if count == 1:
        return [0] if any(split.ids.size for split in splits) else []
    return [s for s in range(count) if any(split.bounds[s + 1] > split.bounds[s] for split in splits)]


def _row_bytes(dim: int) -> int:
    """What an id of an update takes at most: itself, its multiplicity, its row."""
    return 12 + 4 * dim


def _pieces(ids: UInt64Array, limit: int, width: int) -> list[UInt64Array]:
    step = max(1, limit // width)
    return [ids[start : start + step] for start in range(0, ids.size, step)]
