"""Target: one serving replica, the thread that keeps it fresh, and where it stands."""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from trilith.errors import InvalidRequestError, UnavailableError
from trilith.rpc.channels import open_channel
from trilith.shard import UInt64Array
from trilith_proto import parameter_sync_pb2, ps_pb2
from trilith_services.ps.replicas.sync import wire
from trilith_services.ps.replicas.sync.copying import TableCopy
from trilith_services.ps.replicas.sync.dense import DenseFeed
from trilith_services.ps.replicas.sync.encoded import EncodedChanges

if TYPE_CHECKING:
    from trilith_services.ps.engine.store import Store
    from trilith_services.ps.engine.table import Table
    from trilith_services.ps.replicas.sync.changes import ChangeLog

__all__ = ["PUSH_METHOD", "SyncOptions", "Target"]

log = logging.getLogger(__name__)

PUSH_METHOD = "/monolith.parameter_sync.ParameterSync/Push"
SIGNATURE = "hashtable_assign"
_UNKNOWN_STREAM = grpc.StatusCode.FAILED_PRECONDITION.value[0]
_LOG_EVERY_S = 10.0
_NO_IDS = np.empty(0, np.uint64)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncOptions:
    """How replicas are kept fresh.

    Attributes:
        interval_s: Seconds from one look at what has changed to the next.
        dense_every_s: Seconds that a dense variable which changes all the time is not sent again.
        message_bytes: What a push is split at.
        timeout_s: Deadline of one push.
        heartbeat_s: Seconds after which a replica that lacks nothing is told so.
        noted_bytes: Memory for the ids that were touched in a table since the last look, and for those that wait for
            replicas that lag, 8 bytes each; where there are more, the table is copied whole, again and again if it
            must be.
        model_name: Put before "ps_<i>" in the pushes' model name.
        retry_first_s: Pause after a failed push; doubles, with jitter.
        retry_most_s: Longest pause.
    """

    interval_s: float = 1.0
    dense_every_s: float = 5.0
    message_bytes: int = 4 << 20
    timeout_s: float = 10.0
    heartbeat_s: float = 1.0
    noted_bytes: int = 64 << 20
    model_name: str = ""
    retry_first_s: float = 0.1
    retry_most_s: float = 2.0

    def __post_init__(self) -> None:
        if self.interval_s < 0.1:
            raise InvalidRequestError(f"interval_s={self.interval_s} is below 0.1")
        for name in ("dense_every_s", "timeout_s", "heartbeat_s", "retry_first_s", "retry_most_s"):
            if not getattr(self, name) > 0:
                raise InvalidRequestError(f"{name}={getattr(self, name)} is not above 0")
        if not 1 << 12 <= self.message_bytes <= 128 << 20:
            raise InvalidRequestError(f"message_bytes={self.message_bytes} is outside 4096..{128 << 20}")
        if self.noted_bytes < 8192:
            raise InvalidRequestError(f"noted_bytes={self.noted_bytes} is below 8192")

    @property
    def most_ids(self) -> int:
        """What fits into `noted_bytes`."""
        return self.noted_bytes // 8


@dataclass(slots=True)
class _Piece:
    """Ids of one table that are to be sent: of a copy, or of the log, with their place in a batch of it."""

    name: str
    ids: UInt64Array
    copy: TableCopy | None = None
    copy_ends: bool = False
    batch: int = -1
    start: int = 0

    def split(self, count: int) -> tuple[_Piece, _Piece]:
        """The first `count` ids, and the others."""
        return (
            _Piece(self.name, self.ids[:count], batch=self.batch, start=self.start),
            _Piece(self.name, self.ids[count:], batch=self.batch, start=self.start + count),
        )


class _UnknownStreamError(Exception):
    """The replica was restarted, or somebody else has begun to fill it."""


class Target:
    """One replica at one address.

    Everything it lacks is either in the change log behind its cursor, in `_changes`, or in a table that is being
    copied. A piece leaves `_changes` when the replica has acknowledged it, and rows are read when they are sent, so
    whatever fails is sent again as it then is.
    """

    def __init__(
        self,
        name: str,
        address: str,
        store: Store,
        changes: ChangeLog,
        options: SyncOptions,
        encoded: EncodedChanges | None = None,
    ) -> None:
        self._encoded = encoded or EncodedChanges()
        self.name = name
        self.address = address
        self._store = store
        self._log = changes
        self._options = options
        self._model = f"{options.model_name}:ps_{store.index}" if options.model_name else f"ps_{store.index}"
        self._channel = open_channel(address, max_message_bytes=2 * options.message_bytes + (64 << 20))
        self._push: Any = self._channel.unary_unary(PUSH_METHOD)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"sync-{name}", daemon=True)
        self._stream = 0
        self._begun = False
        self._sequence = 0
        self._cursor, _ = changes.join()
        self._changes: deque[_Piece] = deque()
        self._copies: deque[TableCopy] = deque()
        self._dense = DenseFeed(store.variables, options.dense_every_s)
        self._inventory = parameter_sync_pb2.Inventory()
        self._sent_inventory: parameter_sync_pb2.Inventory | None = None
        self._behind_since = time.time()  # what is being sent has waited since then; 0: nothing is
        self._until = 0.0
        self._pushed_at = 0.0
        self._logged_at = -_LOG_EVERY_S
        self._lock = threading.Lock()
        self._stats = ps_pb2.SyncTargetStats(name=name, address=address)

    @property
    def cursor(self) -> int:
        """What comes before it in the log is of no use to this target any more."""
        return self._cursor

    def start(self) -> None:
        """Begin to push."""
        self._thread.start()

    def stop(self) -> None:
        """End; a push in flight is given up."""
        self._stopping.set()
        self._channel.close()
        self._log.wake()
        self._thread.join()

    def hurry(self) -> None:
        """Send everything now."""
        self._dense.hurry()
        self._log.wake()

    @property
    def can_catch_up(self) -> bool:
        """Whether the replica lacks something, and takes it."""
        stats = self.stats()
        return not stats.error and (stats.lag_rows > 0 or self._dense.behind)

    def stats(self) -> ps_pb2.SyncTargetStats:
        """Where the replica stands."""
        found = ps_pb2.SyncTargetStats()
        with self._lock:
            found.CopyFrom(self._stats)
        waiting, since = self._log.waiting(self._cursor)
        found.copying = not self._begun or bool(self._copies)
        behind = [each for each in (self._behind_since, since) if each]
        if behind:
            found.lag_seconds = max(0.0, time.time() - min(behind))
        # Copies of the queues: the thread changes them meanwhile.
        found.lag_rows = (
            waiting
            + sum(len(piece.ids) for piece in self._changes.copy())
            + sum(copy.rows_to_come for copy in self._copies.copy())
        )
        return found

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = self._options.retry_first_s
        while not self._stopping.is_set():
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 - whatever went wrong, the replica must not be given up
                if self._stopping.is_set():
                    return
                self._failed(error)
                # Full jitter: targets that lost the same host do not come back in step.
                self._stopping.wait(pause * (0.5 + 0.5 * random.random()))
                pause = min(2 * pause, self._options.retry_most_s)
            else:
                pause = self._options.retry_first_s

    def _turn(self) -> None:
        """Wait until there is something to send, and send it."""
        if not self._begun:
            self._begin()
        if not self._changes and not self._copies:
            rest = self._pushed_at + self._options.heartbeat_s - time.monotonic()
            self._log.wait(self._cursor, max(0.0, min(rest, self._options.heartbeat_s)))
            if self._stopping.is_set():
                return
        self._read_log()
        self._inventory = self._current_inventory()
        # A copy's ids are listed after the replica has been told that it begins: what is written to it from then on
        # counts as part of the copy, so that a row which is only in the changes outlives the end of the copy.
        begin = [_Piece(copy.name, _NO_IDS, copy) for copy in self._copies if not copy.begun]
        if begin:
            self._send(begin)
        while self._changes:
            self._send(self._next_changes())
            # Copies get their share, however much changes: the changes that wait longer for it become fewer thereby.
            if self._changes and (copies := self._next_copies()):
                self._send(copies)
        for piece, more in self._dense.due(self._options.message_bytes):
            self._request(variables=[piece], as_of=0.0 if more else self._as_of())
        if copies := self._next_copies():
            self._send(copies)
        # With nothing to send this tells the replica how fresh it is, and finds out whether it still is who it was.
        if self._inventory != self._sent_inventory or time.monotonic() - self._pushed_at >= self._options.heartbeat_s:
            self._request(as_of=self._as_of())

    def _begin(self) -> None:
        """Begin a stream: every table will be copied, and every variable sent."""
        self._stream = secrets.randbits(64) | 1
        self._behind_since = self._behind_since or time.time()
        self._changes.clear()
        self._copies.clear()
        self._dense.forget()
        self._inventory, self._sent_inventory = self._current_inventory(), None
        self._cursor, tables = self._log.join()
        for name in sorted(tables):
            self._copy(name)
        with self._lock:
            self._stats.copies += 1
        self._request(begins=True)
        self._begun = True
        log.info("sync: a full copy begins", extra={"target": self.name, "address": self.address})

    def _copy(self, name: str, *, before: float = 0.0) -> None:
        for copy in self._copies:
            if copy.name == name:
                copy.again = copy.again or copy.begun
                return
        table = self._store.tables.get(name)
        if table is not None:
            self._copies.append(TableCopy(name, table, before=before))

    def _read_log(self) -> None:
        changes = self._log.read(self._cursor)
        if changes.ids or changes.whole:
            self._behind_since = self._behind_since or changes.since
        for name, ids in changes.ids.items():
            self._changes.append(_Piece(name, ids, batch=changes.batch))
        for name in sorted(changes.whole):
            self._copy(name)
        self._cursor = changes.cursor
        self._until = changes.until
        if not self._changes and not self._copies:
            self._behind_since = 0.0

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _next_changes(self) -> list[_Piece]:
        """What of the changes fits a message."""
        room = self._options.message_bytes
        pieces = []
        while self._changes and room > 0:
            piece = self._changes[0]
            fits = max(1, room // self._row_bytes(piece.name))
            if fits < len(piece.ids):
                # The rest takes the piece's place, so that an end in the middle of a message is no special case.
                piece, self._changes[0] = piece.split(fits)
                self._changes.appendleft(piece)
            pieces.append(piece)
            room -= len(piece.ids) * self._row_bytes(piece.name)
            self._changes.popleft()
        # Until they have arrived they stand where they stood.
        self._changes.extendleft(reversed(pieces))
        return pieces

    def _next_copies(self) -> list[_Piece]:
        """What of the copies fits a message."""
        room = self._options.message_bytes
        pieces = []
        for copy in list(self._copies):
            if room <= 0 or not copy.begun:
                break
            ids, ends = copy.peek(max(1, room // self._row_bytes(copy.name)))
            pieces.append(_Piece(copy.name, ids, copy, ends))
            room -= len(ids) * self._row_bytes(copy.name)
            if not ends:
                break
        return pieces

    def _row_bytes(self, name: str) -> int:
        table = self._store.tables.get(name)
        return wire.id_bytes() + 4 * (table.dim if table is not None else 0)

    def _send(self, pieces: list[_Piece]) -> None:
        """Push rows as they are now; those that have arrived are done with."""
        deltas, tables = [], []
        for piece in pieces:
            table = self._store.tables.get(piece.name)
            if table is None:
                continue  # restored away; the inventory says so
            begins = piece.copy is not None and not piece.copy.begun
            if piece.copy is not None and begins:
                piece.copy.since = time.time()
            config = table.config if begins else None
            weights = np.empty((0, table.dim), np.float32)
            deltas.append(
                wire.Delta(
                    piece.name,
                    table.dim,
                    piece.ids,
                    weights,
                    config=config,
                    copy_begins=begins,
                    copy_ends=piece.copy_ends,
                )
            )
            tables.append(table)
        as_of = self._as_of(pieces)
        shared = [(piece.batch, piece.start) for piece in pieces if piece.name in self._store.tables]
        self._request(deltas, tables, shared=shared if len(shared) == len(deltas) else (), as_of=as_of)
        for piece in pieces:
            if piece.copy is None:
                self._changes.popleft()
            elif piece.copy_ends:
                self._copies.popleft()
                if piece.copy.again:
                    self._copy(piece.name, before=piece.copy.since)
            else:
                piece.copy.arrived(len(piece.ids))
        if not self._changes and not self._copies:
            self._behind_since = 0.0
        elif as_of:
            self._behind_since = max(self._behind_since, as_of)

    def _as_of(self, pieces: Sequence[_Piece] = ()) -> float:
        """Up to when the replica is fresh once these pieces have arrived; 0: that cannot be said.

        A table that is copied again is as fresh as the copy before left it, so a replica of a table that changes all
        over all the time is filled, and stays about as fresh as a copy is long.
        """
        if sum(piece.copy is None for piece in pieces) < len(self._changes):
            return 0.0
        times = [self._until]
        ending = [piece.copy for piece in pieces if piece.copy_ends]
        for copy in self._copies:
            if copy not in ending:
                times.append(copy.before)
            elif copy.again:
                times.append(copy.since)
        return min(times)

    def _request(
        self,
        deltas: Sequence[wire.Delta] = (),
        tables: Sequence[Table] = (),
        *,
        shared: Sequence[tuple[int, int]] = (),
        variables: list[parameter_sync_pb2.DeltaVariable] | None = None,
        begins: bool = False,
        as_of: float = 0.0,
    ) -> None:
        """Push once; raises unless the replica has taken it."""
        self._sequence += 1
        header = parameter_sync_pb2.PushRequest(
            model_name=self._model,
            signature_name=SIGNATURE,
            timeout_in_ms=int(1000 * self._options.timeout_s),
            stream=self._stream,
            sequence=self._sequence,
            shard_index=self._store.index,
            shard_count=self._store.count,
            delta_variables=variables or [],
            global_step=self._store.global_step(),
        )
        if begins:
            header.stream_begins = True
        inventory = self._inventory
        if inventory != self._sent_inventory:
            header.inventory.CopyFrom(inventory)
        header.rows_to_come = sum(copy.rows_to_come for copy in self._copies)
        if as_of:
            header.as_of = as_of
        if self._encoded.wanted and shared and all(batch >= 0 for batch, _ in shared):
            bodies = [
                self._encoded.get(batch, start, delta, table)
                for (batch, start), delta, table in zip(shared, deltas, tables, strict=True)
            ]
            message = b"".join([header.SerializeToString(), *(body.message for body in bodies)])
            rows, erased = sum(body.rows for body in bodies), sum(body.erased for body in bodies)
        else:
            message, sent = wire.pack_rows(header, deltas, tables)
            rows, erased = sum(len(delta.ids) for delta in sent), sum(len(delta.erased) for delta in sent)
        reply = parameter_sync_pb2.PushResponse.FromString(self._push(message, timeout=self._options.timeout_s))
        if reply.status_code == _UNKNOWN_STREAM:
            self._begun = False
            raise _UnknownStreamError(reply.error_message)
        if reply.status_code:
            raise UnavailableError(f"status {reply.status_code}: {reply.error_message}")
        self._sent_inventory = inventory
        self._pushed_at = time.monotonic()
        with self._lock:
            self._stats.pushes += 1
            self._stats.rows += rows
            self._stats.erased += erased
            self._stats.bytes += len(message)
            self._stats.error = ""

    def _current_inventory(self) -> parameter_sync_pb2.Inventory:
        """What there is to be had, in an order of its own."""
        found = parameter_sync_pb2.Inventory(tables=sorted(self._log.tables & set(self._store.tables)))
        for spec in sorted((each.spec for each in self._store.variables), key=lambda each: (each.name, each.partition)):
            found.variables.add(name=spec.name, partition=spec.partition, size=spec.size)
        return found

    def _failed(self, error: Exception) -> None:
        if isinstance(error, grpc.RpcError):
            what = f"{error.code().name}: {error.details()}"
        else:
            what = f"{type(error).__name__}: {error}"
        with self._lock:
            self._stats.failures += 1
            self._stats.error = what[:500]
        if time.monotonic() - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = time.monotonic()
            expected = isinstance(error, grpc.RpcError | UnavailableError | _UnknownStreamError)
            log.warning(
                "sync: a push failed; it is sent again",
                extra={"target": self.name, "address": self.address, "error": what},
                exc_info=None if expected else error,
            )
