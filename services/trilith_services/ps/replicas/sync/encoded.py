"""EncodedChanges: rows of the change log's batches as they travel, encoded once for all targets."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trilith_proto import parameter_sync_pb2
from trilith_services.ps.replicas.sync import wire

if TYPE_CHECKING:
    from trilith_services.ps.engine.table import Table

__all__ = ["EncodedChanges", "EncodedDelta"]

_MOST = 16  # targets that are further apart encode for themselves


@dataclass(frozen=True, slots=True)
class EncodedDelta:
    """One delta of a PushRequest.

    Attributes:
        table: Whose rows it has; one that was restored has its name only.
        message: The bytes of a PushRequest that holds it and nothing else.
        rows: Ids with a row.
        erased: Ids without.
    """

    table: Table
    message: bytes
    rows: int
    erased: int


class EncodedChanges:
    """The last pieces that some target sent; thread-safe.

    A piece is the ids of one table between two places of one batch. Its rows may be read at any time after the batch
    was closed: whatever changes later is in a later batch, which every target has still to send.

    Attributes:
        wanted: Whether there are targets enough for it to be worth a copy of the message.
        nbytes: Of all pieces that are kept.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.nbytes = 0
        self._lock = threading.Lock()
        self._pieces: OrderedDict[tuple[int, int, int, int], Future[EncodedDelta]] = OrderedDict()

    def get(self, batch: int, start: int, delta: wire.Delta, table: Table) -> EncodedDelta:
        """A delta, without weights yet, with the rows of `table`; who asks first encodes it."""
        key = id(table), batch, start, len(delta.ids)  # the table lives as long as its piece does
        with self._lock:
            found = self._pieces.get(key)
            mine = found is None
            if found is None:
                found = self._pieces[key] = Future()
                while len(self._pieces) > _MOST:
                    self._drop(next(iter(self._pieces)))
        if mine:
            try:
                message, (sent,) = wire.pack_rows(parameter_sync_pb2.PushRequest(), [delta], [table])
                with self._lock:
                    found.set_result(EncodedDelta(table, message, len(sent.ids), len(sent.erased)))
                    if self._pieces.get(key) is found:
                        self.nbytes += len(message)
            except BaseException as error:
                with self._lock:
                    if self._pieces.get(key) is found:
                        del self._pieces[key]
                found.set_exception(error)
                raise
        return found.result()

    def forget(self, batch: int) -> None:
        """Drop pieces of earlier batches, which nobody will send."""
        with self._lock:
            for key in [key for key in self._pieces if key[1] < batch]:
                self._drop(key)

    def _drop(self, key: tuple[int, int, int, int]) -> None:
        piece = self._pieces.pop(key)
        if piece.done():
            self.nbytes -= len(piece.result().message)
