"""RemoteShard: a shard behind one gRPC channel, where alone a gRPC status becomes a Trilith error."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, Self, TypeVar, cast

import grpc

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
from trilith.runtime.backoff import Backoff
from trilith.runtime.forks import keep_for_ever, renew_in_children
from trilith.runtime.waiting import Wait
from trilith.shard import ANY_WRITE, UpdateFrame, UpdateLayout, Write
from trilith.verbs import SERVICE, Verb, Verbs

__all__ = ["ERROR_KEY", "INCARNATION_KEY", "RemoteShard"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

ERROR_KEY = "trilith-error"
"""Trailing metadata: the class of the error."""
INCARNATION_KEY = "trilith-incarnation"
"""Trailing metadata of an error: the incarnation that raised it."""

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


class RemoteShard(Verbs):
    """Implements `Shard` over gRPC; safe to use from several threads. Arrays it returns are views of the reply.

    `describe` and `restore` tell a change of incarnation rather than raise it; the caller adopts what they name.
    """

    remote = True

    def __init__(self, resolve: Callable[[], str], config: ClientConfig, *, index: int = 0) -> None:
        """Connect on first use.

        Args:
            resolve: Returns the shard's current host:port; asked again after every failure.
            config: Limits and retries.
            index: The shard's index, for messages.
        """
        self._connection = _Connection(resolve, config, index=index)
        self._deadline: float | None = None

    def until(self, deadline: float) -> Self:
        """See `Shard`; it has the same connection."""
        shard = object.__new__(type(self))
        shard._connection, shard._deadline = self._connection, deadline
        return shard

    def call(self, verb: Verb[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Pack, send, wait, unpack; refuse what another incarnation has answered."""
        write: Any = kwargs.get("write", ANY_WRITE)
        reading = verb.reads and not write.client_id
        reply = self._connection.call(verb, verb.pack(*args, **kwargs), self._deadline, reading=reading)
        incarnation, result = verb.result(reply)
        self._connection.check(verb, incarnation, reading=reading)
        return result  # type: ignore[no-any-return]

    @property
    def incarnation(self) -> int:
        """The incarnation this shard is known by; 0 before first contact."""
        return self._connection.known

    @property
    def address(self) -> str:
        """Where the shard was last found."""
        return self._connection.address

    @property
    def batch_bytes(self) -> int:
        """See `Shard`."""
        return self._connection.config.batch_bytes

    def adopt(self, incarnation: int) -> None:
        """See `Shard`; 0 takes answers of any."""
        self._connection.known = incarnation

    def new_update(self, layouts: Sequence[UpdateLayout], write: Write, *, float16: bool) -> UpdateFrame:
        """Make parts that lie in the message which `apply_gradients` and the like will send."""
        return wire.new_update_request(layouts, write, float16=float16)

    def follow(self) -> None:
        """Look the address up again; if the shard has moved, calls in flight are sent anew to where it is now."""
        self._connection.follow()

    def close(self) -> None:
        """Close the channel; calls in flight end with ClosedError."""
        self._connection.close()


class _Connection:
    """One PS, as its calls are made; safe to use from several threads.

    A call is sent again while the PS is unreachable or overloaded, with the same bytes, hence the same sequence, until
    its deadline; saves and restores, which may take long, until the PS has been away for as long as other calls may
    take. An answer of another incarnation than the known one is ShardRestartedError: what the caller knows about the
    shard may no longer hold.
    """

    def __init__(self, resolve: Callable[[], str], config: ClientConfig, *, index: int = 0) -> None:
        self.config = config
        self.known = 0  # the incarnation that answers are to come from; 0: any
        self._resolve = resolve
        self._accepts = config.on_restart == "accept"
        self._index = index
        self._lock = threading.Lock()
        self._closed = False
        self._address = ""
        self._channel: grpc.Channel | None = None
        self._methods: dict[str, Any] = {}
        renew_in_children(self)

    def after_fork(self) -> None:
        """A child connects anew when it first calls."""
        keep_for_ever(self._channel, self._methods)
        self._lock = threading.Lock()
        self._channel, self._methods = None, {}

    @property
    def address(self) -> str:
        """Where the shard was last found."""
        return self._address or self._resolve()

    # ---- calls -------------------------------------------------------------------------------------------------------

    def _connect(self, verb: Verb[..., Any]) -> Any:
        with self._lock:
            if self._closed:
                raise ClosedError(f"the connection to shard {self._index} was closed")
            address = self._resolve()
            if self._channel is None or address != self._address:
                if self._channel is not None:
                    self._channel.close()
                self._methods = {}
                self._channel = open_channel(
                    address, max_message_bytes=self.config.max_message_bytes, keepalive_s=self.config.keepalive_s
                )
                self._address = address
            path = f"/{SERVICE}/{verb.name}"
            method: Any = (
                StreamedMethod(self._channel, path, f"{path}Stream")
                if verb.streamed
                else self._channel.unary_unary(path)
            )
            self._methods[verb.name] = method
            return method

    def call(self, verb: Verb[..., Any], request: bytes, deadline: float | None, *, reading: bool) -> bytes:
        """Send `request`, return the reply.

        Args:
            verb: What is called.
            request: Encoded.
            deadline: Seconds of `time.monotonic`; None: the config's `timeout_s` from now.
            reading: Nothing is to be changed, so that an error of another incarnation may be taken as it is.
        """
        timeout = self.config.timeout_s if deadline is None else max(deadline - time.monotonic(), 0.001)
        deadline = time.monotonic() + timeout
        raised: TrilithError
        backoff: Backoff | None = None
        attempts = 0
        away_since: float | None = None
        waiting = self._wait(timeout) if verb.awaited else None
        came = False
        try:
            while True:
                attempts += 1
                sent = time.monotonic()
                try:
                    method = self._methods.get(verb.name) or self._connect(verb)
                    reply: bytes = method(request, timeout=max(deadline - time.monotonic(), 0.001))
                    came = True
                    return reply
                except UnavailableError as error:
                    raised = error  # discovery does not know the shard at the moment
                except grpc.RpcError as error:
                    raised = self._error(verb, error, timeout, attempts, reading)
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
                if verb.patient and isinstance(raised, UnavailableError):
                    # A connection that broke after so long had been one until then.
                    if away_since is None or now - sent > max(self.config.timeout_s, 2 * self.config.keepalive_s):
                        away_since = now
                    rest = min(rest, away_since + self.config.timeout_s - now)
                backoff = backoff or Backoff(self.config.retry_first_s, self.config.retry_max_s)
                pause_s = backoff.next_s()
                if pause_s >= rest:
                    raise raised
                time.sleep(pause_s)
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
        return Wait(f"shard {self._index}{where}", most=round(timeout_s, 2)).begin()

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

    def _error(
        self, verb: Verb[..., Any], error: grpc.RpcError, timeout: float, attempts: int, reading: bool
    ) -> TrilithError:
        """Turn what gRPC raised into the error that the PS raised, or that describes what happened on the way."""
        code, details = error.code(), error.details() or ""
        metadata: dict[str, Any] = dict(cast(Iterable[tuple[str, Any]], error.trailing_metadata() or ()))
        incarnation = int(metadata.get(INCARNATION_KEY, 0))
        raised = BY_NAME.get(str(metadata.get(ERROR_KEY, "")))
        if raised is not None:
            if incarnation and raised not in _RETRIED and not self._fits(verb, incarnation, reading):
                return self._restarted(incarnation)
            theirs = raised(details)
            if isinstance(theirs, _OF_ONE_PS):
                theirs.add_note(f"raised by shard {self._index} at {self._address}")
            return theirs
        where = f"shard {self._index} at {self._address}: {verb.name}"
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

    def check(self, verb: Verb[..., Any], incarnation: int, *, reading: bool) -> None:
        """Raise ShardRestartedError if an answer came from another incarnation than it may."""
        if not self._fits(verb, incarnation, reading):
            raise self._restarted(incarnation)

    def _fits(self, verb: Verb[..., Any], incarnation: int, reading: bool) -> bool:
        known = self.known
        return not known or incarnation == known or verb.any_incarnation or (reading and self._accepts)

    def _restarted(self, incarnation: int) -> ShardRestartedError:
        return ShardRestartedError(
            f"shard {self._index} at {self._address} restarted: this client knew incarnation {self.known:#x},"
            f" now it is {incarnation:#x}; writes it had acknowledged may be lost."
            " Client.rejoin() accepts its present state"
        )

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
