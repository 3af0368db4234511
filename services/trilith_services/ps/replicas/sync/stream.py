"""Stream: one life of what a replica is sent, from its first full copy until it has to begin anew."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trilith.shard import UInt64Array
from trilith_proto import parameter_sync_pb2
from trilith_services.ps.replicas.sync import wire
from trilith_services.ps.replicas.sync.copying import TableCopy
from trilith_services.ps.replicas.sync.dense import DenseFeed

if TYPE_CHECKING:
    from trilith_services.ps.engine.store import Store
    from trilith_services.ps.engine.table import Table
    from trilith_services.ps.replicas.sync.changes import ChangeLog
    from trilith_services.ps.replicas.sync.encoded import EncodedChanges
    from trilith_services.ps.replicas.sync.options import SyncOptions

__all__ = ["Standing", "Stream"]

_NO_IDS = np.empty(0, np.uint64)


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


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a stream has come; each is a whole, so that any thread may look at the latest.

    Attributes:
        cursor: What comes before it in the change log is of no use to the stream any more.
        copying: Whether whole tables are still to be sent.
        rows: That are to be sent, about; what comes after `cursor` is not among them.
        behind_since: Unix seconds since when the first of them has waited; 0: nothing waits.
    """

    cursor: int
    copying: bool
    rows: int
    behind_since: float


class Stream:
    """What one replica lacks, and how it is sent. Used by one thread; `standing` and `dense` by any.

    Everything it lacks is either in the change log behind its cursor, in `_changes`, or in a table that is being
    copied. A piece leaves `_changes` when the replica has acknowledged it, and rows are read when they are sent, so
    whatever fails is sent again as it then is.

    Attributes:
        begun: Whether the replica knows of it.
        standing: How far it has come.
        dense: What of the variables is to be sent.
    """

    def __init__(
        self,
        store: Store,
        log: ChangeLog,
        options: SyncOptions,
        encoded: EncodedChanges,
        push: Callable[[bytes, int, int], None],
        *,
        behind_since: float,
    ) -> None:
        """Send nothing yet; the log is kept from here on.

        Args:
            store: Whose rows are sent.
            log: What has changed in it.
            options: How.
            encoded: Rows as they travel, shared with other streams.
            push: Delivers a PushRequest with so many rows and deletions; raises unless the replica has taken it.
            behind_since: Unix seconds since when the replica has lacked something.
        """
        self._store, self._log, self._options, self._encoded, self._push = store, log, options, encoded, push
        self._model = f"{options.model_name}:ps_{store.index}" if options.model_name else f"ps_{store.index}"
        self._id = secrets.randbits(64) | 1
        self._sequence = 0
        self._changes: deque[_Piece] = deque()
        self._copies: deque[TableCopy] = deque()
        self._inventory = parameter_sync_pb2.Inventory()
        self._sent_inventory: parameter_sync_pb2.Inventory | None = None
        self._behind_since = behind_since
        self._until = 0.0  # every change acknowledged before this time has been read from the log
        self._pushed_at = 0.0
        self._cursor, _ = log.join()
        self.begun = False
        self.dense = DenseFeed(store.variables, options.dense_every_s)
        self._stand()

    def _stand(self) -> None:
        """Let others see how far it has come."""
        if self.begun and not self._changes and not self._copies:
            self._behind_since = 0.0
        rows = sum(len(piece.ids) for piece in self._changes) + sum(copy.rows_to_come for copy in self._copies)
        self.standing = Standing(self._cursor, bool(self._copies), rows, self._behind_since)

    # ---- phases ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Tell the replica that every table will be copied, and every variable sent."""
        self._inventory = self._current_inventory()
        self._cursor, tables = self._log.join()
        for name in sorted(tables):
            self._copy(name)
        self._stand()
        self._request(begins=True)
        self.begun = True
        self._stand()

    def wait(self) -> None:
        """Return when there may be something to send, or it is time for a heartbeat."""
        if not self._changes and not self._copies:
            rest = self._pushed_at + self._options.heartbeat_s - time.monotonic()
            self._log.wait(self._cursor, max(0.0, min(rest, self._options.heartbeat_s)))

    def send(self) -> None:
        """Send what there is to be sent: all changes, and as much of the copies as is their share."""
        self._read_log()
        self._inventory = self._current_inventory()
        self._announce_copies()
        self._send_changes()
        self._send_dense()
        self._send_copies()
        self._send_heartbeat()

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
        self._stand()

    def _announce_copies(self) -> None:
        """Say which tables are about to be copied, before their ids are listed.

        What is written to them from then on counts as part of the copy, so that a row which is only in the changes
        outlives the end of the copy.
        """
        begin = [_Piece(copy.name, _NO_IDS, copy) for copy in self._copies if not copy.begun]
        if begin:
            self._send(begin)

    def _send_changes(self) -> None:
        while self._changes:
            self._send(self._next_changes())
            # Copies get their share, however much changes: the changes that wait longer for it become fewer thereby.
            if self._changes:
                self._send_copies()

    def _send_dense(self) -> None:
        for piece, more in self.dense.due(self._options.message_bytes):
            self._request(variables=[piece], as_of=0.0 if more else self._as_of())

    def _send_copies(self) -> None:
        if copies := self._next_copies():
            self._send(copies)

    def _send_heartbeat(self) -> None:
        """With nothing to send tell the replica how fresh it is, and find out whether it still is who it was."""
        if self._inventory != self._sent_inventory or time.monotonic() - self._pushed_at >= self._options.heartbeat_s:
            self._request(as_of=self._as_of())

    def _copy(self, name: str, *, before: float = 0.0) -> None:
        for copy in self._copies:
            if copy.name == name:
                copy.again = copy.again or copy.begun
                return
        table = self._store.tables.get(name)
        if table is not None:
            self._copies.append(TableCopy(name, table, before=before))

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
        if as_of:
            self._behind_since = max(self._behind_since, as_of)
        self._stand()

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
            signature_name=wire.SIGNATURE,
            timeout_in_ms=int(1000 * self._options.timeout_s),
            stream=self._id,
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
        self._push(message, rows, erased)
        self._sent_inventory = inventory
        self._pushed_at = time.monotonic()

    def _current_inventory(self) -> parameter_sync_pb2.Inventory:
        """What there is to be had, in an order of its own."""
        found = parameter_sync_pb2.Inventory(tables=sorted(self._log.tables & set(self._store.tables)))
        specs = [partition.spec for partition in self._store.variables]
        for spec in sorted(specs, key=lambda spec: (spec.name, spec.partition)):
            found.variables.add(name=spec.name, partition=spec.partition, size=spec.size)
        return found
