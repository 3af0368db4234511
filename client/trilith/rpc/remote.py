"""RemoteShard: a shard behind one gRPC channel. The only place where a gRPC status becomes a Trilith error."""

from __future__ import annotations

import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import grpc
import numpy as np
import numpy.typing as npt

from trilith.config import ClientConfig
from trilith.discovery.addresses import split_address
from trilith.errors import (
    BY_NAME,
    CheckpointError,
    ClosedError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    MemoryLimitError,
    OverloadedError,
    ShardRestartedError,
    TrilithError,
    UnavailableError,
)
from trilith.rpc import wire
from trilith.rpc.channels import open_channel
from trilith.rpc.streams import StreamedMethod
from trilith.runtime.forks import keep_for_ever, renew_in_children
from trilith.runtime.waiting import Wait
from trilith.shard import (
    ANY_WRITE,
    DensePart,
    Dequeued,
    EntryPage,
    Float32Array,
    FloatArray,
    IdPart,
    UpdatePart,
    Write,
)
from trilith_proto import ps_pb2

__all__ = ["ERROR_KEY", "INCARNATION_KEY", "SERVICE", "RemoteShard"]

_T = TypeVar("_T")

SERVICE = "trilith.ParameterServer"
ERROR_KEY = "trilith-error"
"""Trailing metadata: the class of the error."""
INCARNATION_KEY = "trilith-incarnation"
"""Trailing metadata of an error: the incarnation that raised it."""

_STREAMED = frozenset({"Lookup", "ApplyGradients", "PullVariables", "ApplyDenseGradients"})
_READS = frozenset({"Lookup", "Contains", "LookupEntries", "DumpEntries", "Stats", "PullVariables"})
"""What may go on with a PS that restarted; `GlobalStep` too, where it only reads."""
_LONG = frozenset({"Save", "Restore"})
# With these somebody waits for a PS to be there, or to be done, from the first attempt on.
_AWAITED = frozenset({"Describe", "CreateTables"})
_TELLS = frozenset({"Describe", "Restore"})
"""Methods whose answers may be of another incarnation than the known one."""
# How gRPC says so, before the reason of the operating system.
_UNREACHABLE = re.compile(
    r"^failed to connect to all addresses; last error: (.*?Failed to connect to remote host: (connect: )?)?"
)
_PROBE_S = 0.3
_RETRIED = (UnavailableError, OverloadedError)
# What one PS is to blame for; any other would have refused the rest as well.
_OF_ONE_PS = (CheckpointError, InternalError, MemoryLimitError, OverloadedError)
_BY_CODE: Mapping[grpc.StatusCode, type[TrilithError]] = {
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
}


class RemoteShard:
    """Implements `Shard` over gRPC; safe to use from several threads.

    A call is retried while the PS is unreachable or overloaded, with the same bytes, hence the same sequence, until its
    deadline; saves and restores, which may take long, until the PS has been away for as long as other calls may take. A
    reply of another incarnation than the known one is ShardRestartedError: what the caller knows about the shard may no
    longer hold.
    """

    def __init__(self, resolve: Callable[[], str], config: ClientConfig, *, index: int = 0) -> None:
        """Connect on first use.

        Args:
            resolve: Returns the shard's current host:port; asked again after every failure.
            config: Limits and retries.
            index: The shard's index, for messages.
        """
        self._resolve = resolve
        self._config = config
        self._accepts = config.on_restart == "accept"
        self._index = index
        self._lock = threading.Lock()
        self._closed = False
        self._known = 0
        self._address = ""
        self._channel: grpc.Channel | None = None
        self._methods: dict[str, Any] = {}
        self._random = random.Random()
        renew_in_children(self)

    def after_fork(self) -> None:
        """A child connects anew when it first calls."""
        keep_for_ever(self._channel, self._methods)
        self._lock = threading.Lock()
        self._channel, self._methods = None, {}
        self._random = random.Random()

    @property
    def address(self) -> str:
        """Where the shard was last found."""
        return self._address or self._resolve()

    @property
    def incarnation(self) -> int:
        """The incarnation this shard is known by; 0 before first contact."""
        return self._known

    def adopt(self, incarnation: int) -> None:
        """Take replies of `incarnation` as the shard's own from now on."""
        self._known = incarnation

    # ---- calls -------------------------------------------------------------------------------------------------------

    def _method(self, name: str) -> Any:
        method = self._methods.get(name)
        return method if method is not None else self._connect(name)

    def _connect(self, name: str) -> Any:
        with self._lock:
            if self._closed:
                raise ClosedError(f"the connection to shard {self._index} was closed")
            address = self._resolve()
            if self._channel is None or address != self._address:
                if self._channel is not None:
                    self._channel.close()
                self._methods = {}
                self._channel = open_channel(
                    address,
                    max_message_bytes=self._config.max_message_bytes,
                    keepalive_s=self._config.keepalive_s,
                )
                self._address = address
            # Bytes in, bytes out: `wire` reads and writes the hot messages, the rest converts around the call.
            path = f"/{SERVICE}/{name}"
            streamed = name in _STREAMED
            method: Any = (
                StreamedMethod(self._channel, path, f"{path}Stream") if streamed else self._channel.unary_unary(path)
            )
            self._methods[name] = method
            return method

    def _call(self, name: str, request: bytes, timeout_s: float | None) -> bytes:
        timeout = self._config.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout
        raised: TrilithError
        pause = self._config.retry_first_s
        attempts = 0
        away_since: float | None = None
        waiting = self._wait(timeout) if name in _AWAITED else None
        came = False
        try:
            while True:
                attempts += 1
                sent = time.monotonic()
                try:
                    reply: bytes = self._method(name)(request, timeout=max(deadline - time.monotonic(), 0.001))
                    came = True
                    return reply
                except UnavailableError as error:
                    raised = error  # discovery does not know the shard at the moment
                except grpc.RpcError as error:
                    raised = self._error(name, error, timeout, attempts)
                except ValueError:
                    # What grpc raises on a closed channel: ours was closed, or replaced because the shard moved.
                    if self._closed:
                        raise ClosedError(f"the connection to shard {self._index} was closed") from None
                    raised = UnavailableError(f"shard {self._index} has moved")
                if not isinstance(raised, _RETRIED):
                    came = True
                    raise raised
                if waiting is None:
                    waiting = self._wait(timeout)
                waiting.why = str(raised).removeprefix(f"shard {self._index} at {self._address}: ")
                now = time.monotonic()
                rest = deadline - now
                if name in _LONG and isinstance(raised, UnavailableError):
                    # A connection that broke after so long had been one until then.
                    if away_since is None or now - sent > max(self._config.timeout_s, 2 * self._config.keepalive_s):
                        away_since = now
                    rest = min(rest, away_since + self._config.timeout_s - now)
                # Full jitter: workers that lost the same PS do not come back in step.
                wait = pause * (0.5 + 0.5 * self._random.random())
                if wait >= rest:
                    raise raised
                time.sleep(wait)
                pause = min(2 * pause, self._config.retry_max_s)
                if isinstance(raised, UnavailableError):
                    self.follow()
        finally:
            if waiting is not None:
                waiting.end(came=came)

    def _wait(self, timeout_s: float) -> Wait:
        try:
            where = f" at {self.address}"
        except TrilithError:
            where = ""
        return Wait(f"shard {self._index}{where}", most=timeout_s).begin()

    def follow(self) -> None:
        """Look the address up again; if the shard has moved, calls in flight are sent anew to where it is now."""
        try:
            address = self._resolve()
        except TrilithError:
            return  # discovery may be catching up
        with self._lock:
            if self._channel is None or address == self._address:
                return
            channel, self._channel, self._methods = self._channel, None, {}
        channel.close()

    def _error(self, name: str, error: grpc.RpcError, timeout: float, attempts: int) -> TrilithError:
        """Turn what gRPC raised into the error that the PS raised, or that describes what happened on the way."""
        code, details = error.code(), error.details() or ""
        metadata: dict[str, Any] = dict(cast(Iterable[tuple[str, Any]], error.trailing_metadata() or ()))
        incarnation = int(metadata.get(INCARNATION_KEY, 0))
        raised = BY_NAME.get(str(metadata.get(ERROR_KEY, "")))
        if raised is not None:
            strange = incarnation not in (0, self._known) and name != "Restore"
            strange = strange and not (self._accepts and name in _READS)
            if self._known and strange and raised not in _RETRIED:
                return self._restarted(incarnation)
            told = raised(details)
            if isinstance(told, _OF_ONE_PS):
                told.add_note(f"raised by shard {self._index} at {self._address}")
            return told
        where = f"shard {self._index} at {self._address}: {name}"
        if code is grpc.StatusCode.CANCELLED and self._closed:
            return ClosedError(f"{where}: the client was closed during the call")
        if code is grpc.StatusCode.CANCELLED:
            return UnavailableError(f"{where}: {details}")
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceededError(f"{where}: no answer within {timeout:.3g} s{self._why_away()}")
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
            return InvalidRequestError(f"{where}: {details}; send smaller batches or raise the limit on both sides")
        if code is grpc.StatusCode.UNAVAILABLE:
            reason, unreachable = _UNREACHABLE.subn("no connection: ", details)
            if unreachable and "refused" not in reason:
                # gRPC may notice a refusal after its own patience has ended, and calls that a timeout.
                reason = f"no connection: {_why_unreachable(self._address) or 'it was away'}"
            return UnavailableError(f"{where}: {reason} (attempt {attempts})")
        return _BY_CODE.get(code, InternalError)(f"{where}: {code.name}: {details}")

    def _why_away(self) -> str:
        why = _why_unreachable(self._address)
        return f" (no connection: {why})" if why else ""

    def _restarted(self, incarnation: int) -> ShardRestartedError:
        return ShardRestartedError(
            f"shard {self._index} at {self._address} restarted: this client knew incarnation {self._known:#x},"
            f" now it is {incarnation:#x}; writes it had acknowledged may be lost."
            " Client.rejoin() accepts its present state"
        )

    def _check(self, incarnation: int, *, reading: bool = False) -> None:
        if incarnation != self._known and self._known and not (reading and self._accepts):
            raise self._restarted(incarnation)

    def _ask(self, name: str, request: Any, kind: type[_T], timeout_s: float | None, write: Write = ANY_WRITE) -> _T:
        """Call a method whose messages are small; of a write, identity and incarnation are put into the request."""
        if write is not ANY_WRITE:
            request.incarnation = write.incarnation
            if (identity := wire.write_id(write)) is not None:
                request.write.CopyFrom(identity)
        reply: Any = kind.FromString(self._call(name, request.SerializeToString(), timeout_s))  # type: ignore[attr-defined]
        if name not in _TELLS:
            reads = name in _READS or (name == "GlobalStep" and write.client_id == 0)
            self._check(reply.incarnation, reading=reads)
        return reply  # type: ignore[no-any-return]

    # ---- Shard -------------------------------------------------------------------------------------------------------

    def describe(self, *, timeout_s: float | None = None) -> ps_pb2.DescribeResponse:
        """See `Shard`; a change of incarnation is told, not raised."""
        return self._ask("Describe", ps_pb2.DescribeRequest(), ps_pb2.DescribeResponse, timeout_s)

    def create_tables(
        self, configs: Sequence[ps_pb2.TableConfig], write: Write = ANY_WRITE, *, timeout_s: float | None = None
    ) -> None:
        """See `Shard`."""
        request = ps_pb2.CreateTablesRequest(tables=configs)
        self._ask("CreateTables", request, ps_pb2.CreateTablesResponse, timeout_s, write)

    def lookup(
        self, parts: Sequence[IdPart], *, float16: bool = False, timeout_s: float | None = None
    ) -> list[FloatArray]:
        """See `Shard`; the rows are views of the reply."""
        reply = self._call("Lookup", wire.pack_lookup_request(parts, float16=float16), timeout_s)
        incarnation, rows = wire.unpack_lookup_response(reply)
        self._check(incarnation, reading=True)
        return rows

    def new_update(self, layouts: Sequence[wire.UpdateLayout], write: Write, *, float16: bool) -> wire.UpdateFrame:
        """Make parts that lie in the message which `apply_gradients` and the like will send."""
        return wire.new_update_request(layouts, write, float16=float16)

    def _update(self, name: str, parts: Sequence[UpdatePart], write: Write, timeout_s: float | None) -> None:
        reply = self._call(name, wire.pack_update_request(parts, write), timeout_s)
        self._check(ps_pb2.UpdateResponse.FromString(reply).incarnation)

    def apply_gradients(self, parts: Sequence[UpdatePart], write: Write, *, timeout_s: float | None = None) -> None:
        """See `Shard`."""
        self._update("ApplyGradients", parts, write, timeout_s)

    def assign(self, parts: Sequence[UpdatePart], write: Write, *, timeout_s: float | None = None) -> None:
        """See `Shard`."""
        self._update("Assign", parts, write, timeout_s)

    def assign_add(self, parts: Sequence[UpdatePart], write: Write, *, timeout_s: float | None = None) -> None:
        """See `Shard`."""
        self._update("AssignAdd", parts, write, timeout_s)

    def _statuses(self, name: str, part: IdPart, write: Write, timeout_s: float | None) -> npt.NDArray[np.int8]:
        incarnation, statuses = wire.unpack_statuses(self._call(name, wire.pack_ids(part, write), timeout_s))
        self._check(incarnation, reading=name in _READS)
        return statuses

    def reinitialize(self, part: IdPart, write: Write, *, timeout_s: float | None = None) -> npt.NDArray[np.int8]:
        """See `Shard`."""
        return self._statuses("Reinitialize", part, write, timeout_s)

    def contains(self, part: IdPart, *, timeout_s: float | None = None) -> npt.NDArray[np.bool_]:
        """See `Shard`."""
        return self._statuses("Contains", part, ANY_WRITE, timeout_s).view(np.bool_)

    def lookup_entries(self, part: IdPart, *, timeout_s: float | None = None) -> list[bytes]:
        """See `Shard`."""
        data = self._call("LookupEntries", wire.pack_ids(part, ANY_WRITE), timeout_s)
        reply = ps_pb2.EntriesResponse.FromString(data)
        self._check(reply.incarnation, reading=True)
        return list(reply.entries)

    def dump_entries(
        self, table: str, *, part: int, parts: int, limit: int, offset: int = 0, timeout_s: float | None = None
    ) -> EntryPage:
        """See `Shard`."""
        request = ps_pb2.DumpEntriesRequest(table=table, part=part, parts=parts, limit=limit, offset=offset)
        reply = self._ask("DumpEntries", request, ps_pb2.DumpEntriesResponse, timeout_s)
        return EntryPage(list(reply.entries), reply.offset)

    def erase(self, part: IdPart, write: Write, *, timeout_s: float | None = None) -> int:
        """See `Shard`."""
        reply = ps_pb2.CountsResponse.FromString(self._call("Erase", wire.pack_ids(part, write), timeout_s))
        self._check(reply.incarnation)
        return sum(reply.rows.values())

    def evict(
        self, tables: Sequence[str], write: Write, *, now: int = 0, timeout_s: float | None = None
    ) -> Mapping[str, int]:
        """See `Shard`."""
        request = ps_pb2.EvictRequest(tables=tables, now=now)
        return dict(self._ask("Evict", request, ps_pb2.CountsResponse, timeout_s, write).rows)

    def clear(self, tables: Sequence[str], write: Write, *, timeout_s: float | None = None) -> Mapping[str, int]:
        """See `Shard`."""
        request = ps_pb2.ClearRequest(tables=tables)
        return dict(self._ask("Clear", request, ps_pb2.CountsResponse, timeout_s, write).rows)

    def stats(self, *, timeout_s: float | None = None) -> ps_pb2.StatsResponse:
        """See `Shard`."""
        return self._ask("Stats", ps_pb2.StatsRequest(), ps_pb2.StatsResponse, timeout_s)

    def create_variables(
        self,
        specs: Sequence[ps_pb2.VariableSpec],
        initial: Sequence[Float32Array],
        write: Write = ANY_WRITE,
        *,
        timeout_s: float | None = None,
    ) -> list[bool]:
        """See `Shard`."""
        data = self._call("CreateVariables", wire.pack_create_variables(specs, initial, write), timeout_s)
        reply = ps_pb2.CreateVariablesResponse.FromString(data)
        self._check(reply.incarnation)
        return list(reply.created)

    def pull_variables(
        self, refs: Sequence[tuple[str, int]], *, timeout_s: float | None = None
    ) -> tuple[list[Float32Array], int]:
        """See `Shard`; the values are views of the reply."""
        request = ps_pb2.PullVariablesRequest()
        for name, partition in refs:
            request.partitions.add(name=name, partition=partition)
        data = self._call("PullVariables", request.SerializeToString(), timeout_s)
        incarnation, values, step = wire.unpack_pulled(data)
        self._check(incarnation, reading=True)
        return values, step

    def _dense(
        self, name: str, parts: Sequence[DensePart], write: Write, learning_rate: float, timeout_s: float | None
    ) -> None:
        reply = self._call(name, wire.pack_dense_update(parts, write, learning_rate), timeout_s)
        self._check(ps_pb2.UpdateResponse.FromString(reply).incarnation)

    def apply_dense_gradients(
        self,
        parts: Sequence[DensePart],
        write: Write,
        *,
        learning_rate: float = 0.0,
        timeout_s: float | None = None,
    ) -> None:
        """See `Shard`."""
        self._dense("ApplyDenseGradients", parts, write, learning_rate, timeout_s)

    def assign_variables(self, parts: Sequence[DensePart], write: Write, *, timeout_s: float | None = None) -> None:
        """See `Shard`."""
        self._dense("AssignVariables", parts, write, 0.0, timeout_s)

    def global_step(
        self,
        *,
        advance: int | None = None,
        set_to: int | None = None,
        write: Write = ANY_WRITE,
        timeout_s: float | None = None,
    ) -> int:
        """See `Shard`."""
        request = ps_pb2.GlobalStepRequest()
        if advance is not None:
            request.advance = advance
        elif set_to is not None:
            request.set = set_to
        return self._ask("GlobalStep", request, ps_pb2.GlobalStepResponse, timeout_s, write).global_step

    def create_queue(
        self,
        name: str,
        elements: Sequence[str] = (),
        write: Write = ANY_WRITE,
        *,
        capacity: int = 0,
        timeout_s: float | None = None,
    ) -> bool:
        """See `Shard`."""
        request = ps_pb2.CreateQueueRequest(name=name, elements=elements, capacity=capacity)
        return self._ask("CreateQueue", request, ps_pb2.CreateQueueResponse, timeout_s, write).created

    def enqueue(self, queue: str, elements: Sequence[str], write: Write, *, timeout_s: float | None = None) -> None:
        """See `Shard`."""
        request = ps_pb2.EnqueueRequest(queue=queue, elements=elements)
        self._ask("Enqueue", request, ps_pb2.EnqueueResponse, timeout_s, write)

    def dequeue(
        self,
        queues: Sequence[str],
        worker: str,
        write: Write,
        *,
        lease_s: float,
        claim: str = "",
        timeout_s: float | None = None,
    ) -> Dequeued:
        """See `Shard`."""
        request = ps_pb2.DequeueRequest(queues=queues, worker=worker, lease_s=lease_s, claim=claim)
        reply = self._ask("Dequeue", request, ps_pb2.DequeueResponse, timeout_s, write)
        return Dequeued(reply.queue, reply.element, reply.lease, reply.exhausted)

    def acknowledge(
        self,
        worker: str,
        lease: int,
        write: Write,
        *,
        queue: str = "",
        elements: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> bool:
        """See `Shard`."""
        request = ps_pb2.AcknowledgeRequest(worker=worker, lease=lease, queue=queue, elements=elements)
        return self._ask("Acknowledge", request, ps_pb2.AcknowledgeResponse, timeout_s, write).held

    def hold_leases(
        self, worker: str, lease_s: float, write: Write = ANY_WRITE, *, timeout_s: float | None = None
    ) -> int:
        """See `Shard`."""
        request = ps_pb2.HoldLeasesRequest(worker=worker, lease_s=lease_s)
        return self._ask("HoldLeases", request, ps_pb2.HoldLeasesResponse, timeout_s, write).leases

    def save(self, path: str, write: Write = ANY_WRITE, *, timeout_s: float | None = None) -> ps_pb2.SaveResponse:
        """See `Shard`."""
        return self._ask("Save", ps_pb2.SaveRequest(path=path), ps_pb2.SaveResponse, timeout_s, write)

    def restore(self, path: str, write: Write = ANY_WRITE, *, timeout_s: float | None = None) -> ps_pb2.RestoreResponse:
        """See `Shard`; the caller adopts the incarnation that the answer names."""
        return self._ask("Restore", ps_pb2.RestoreRequest(path=path), ps_pb2.RestoreResponse, timeout_s, write)

    def close(self) -> None:
        """Close the channel; calls in flight end with ClosedError."""
        with self._lock:
            self._closed = True
            if self._channel is not None:
                self._channel.close()
                self._channel = None
            self._methods = {}


def _why_unreachable(address: str) -> str:
    """Why nobody can connect to it now; empty if one can."""
    try:
        with socket.create_connection(split_address(address), timeout=_PROBE_S):
            return ""
    except (OSError, InvalidRequestError) as error:
        return "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)
