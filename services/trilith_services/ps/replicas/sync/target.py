"""Target: one serving replica, the thread that keeps it fresh, and where it stands."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc

from trilith.errors import UnavailableError
from trilith.rpc.channels import open_channel
from trilith.runtime.backoff import Backoff
from trilith_proto import parameter_sync_pb2, ps_pb2
from trilith_services.ps.replicas.sync.encoded import EncodedChanges
from trilith_services.ps.replicas.sync.stream import Stream

if TYPE_CHECKING:
    from trilith_services.ps.engine.store import Store
    from trilith_services.ps.replicas.sync.changes import ChangeLog
    from trilith_services.ps.replicas.sync.options import SyncOptions

__all__ = ["PUSH_METHOD", "Target"]

log = logging.getLogger(__name__)

PUSH_METHOD = "/monolith.parameter_sync.ParameterSync/Push"
_UNKNOWN_STREAM = grpc.StatusCode.FAILED_PRECONDITION.value[0]
_LOG_EVERY_S = 10.0


class _UnknownStreamError(Exception):
    """The replica was restarted, or somebody else has begun to fill it."""


class Target:
    """One replica at one address: the thread that pushes to it, and one stream after another."""

    def __init__(
        self,
        name: str,
        address: str,
        store: Store,
        changes: ChangeLog,
        options: SyncOptions,
        encoded: EncodedChanges | None = None,
    ) -> None:
        self.name = name
        self.address = address
        self._store, self._log, self._options = store, changes, options
        self._encoded = encoded or EncodedChanges()
        self._channel = open_channel(address, max_message_bytes=2 * options.message_bytes + (64 << 20))
        self._push: Any = self._channel.unary_unary(PUSH_METHOD)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"sync-{name}", daemon=True)
        self._stream = self._new_stream(behind_since=time.time())
        self._logged_at = -_LOG_EVERY_S
        self._lock = threading.Lock()
        self._stats = ps_pb2.SyncTargetStats(name=name, address=address)

    def _new_stream(self, *, behind_since: float) -> Stream:
        return Stream(
            self._store,
            self._log,
            self._options,
            self._encoded,
            self._deliver,
            behind_since=behind_since or time.time(),
        )

    @property
    def cursor(self) -> int:
        """What comes before it in the log is of no use to this target any more."""
        return self._stream.standing.cursor

    def start(self) -> None:
        """Begin to push."""
        self._thread.start()

    def stop(self) -> None:
        """End; a push in flight is given up."""
        self._stopping.set()
        self._channel.close()
        self._log.wake()
        self._thread.join()

    def send_now(self) -> None:
        """Send everything that the replica lacks, also what is not due yet."""
        self._stream.dense.send_now()
        self._log.wake()

    @property
    def can_catch_up(self) -> bool:
        """Whether the replica lacks something, and takes it."""
        stats = self.stats()
        return not stats.error and (stats.lag_rows > 0 or self._stream.dense.behind)

    def stats(self) -> ps_pb2.SyncTargetStats:
        """Where the replica stands."""
        found = ps_pb2.SyncTargetStats()
        with self._lock:
            found.CopyFrom(self._stats)
        stream = self._stream
        standing = stream.standing
        waiting, since = self._log.waiting(standing.cursor)
        found.copying = standing.copying or not stream.begun
        found.lag_rows = waiting + standing.rows
        behind = [moment for moment in (standing.behind_since, since) if moment]
        if behind:
            found.lag_seconds = max(0.0, time.time() - min(behind))
        return found

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        backoff = Backoff(self._options.retry_first_s, self._options.retry_most_s)
        while not self._stopping.is_set():
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 - whatever went wrong, the replica must not be given up
                if self._stopping.is_set():
                    return
                self._failed(error)
                self._stopping.wait(backoff.next_s())
            else:
                backoff.reset()

    def _turn(self) -> None:
        """Wait until there is something to send, and send it."""
        if not self._stream.begun:
            self._begin()
        self._stream.wait()
        if not self._stopping.is_set():
            self._stream.send()

    def _begin(self) -> None:
        """Begin a stream; what was left of the one before is in the full copy."""
        self._stream = self._new_stream(behind_since=self._stream.standing.behind_since)
        with self._lock:
            self._stats.copies += 1
        self._stream.begin()
        log.info("sync: a full copy begins", extra={"target": self.name, "address": self.address})

    def _deliver(self, message: bytes, rows: int, erased: int) -> None:
        """Push a message once; raises unless the replica has taken it."""
        reply = parameter_sync_pb2.PushResponse.FromString(self._push(message, timeout=self._options.timeout_s))
        if reply.status_code == _UNKNOWN_STREAM:
            self._stream.begun = False
            raise _UnknownStreamError(reply.error_message)
        if reply.status_code:
            raise UnavailableError(f"status {reply.status_code}: {reply.error_message}")
        with self._lock:
            self._stats.pushes += 1
            self._stats.rows += rows
            self._stats.erased += erased
            self._stats.bytes += len(message)
            self._stats.error = ""

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
