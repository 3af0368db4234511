"""Balancer: connections to the entries of a model, and which of them the next request goes to."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from trilith.errors import ClosedError
from trilith.rpc.channels import open_channel
from trilith.rpc.streams import StreamedMethod
from trilith_proto import serving_pb2

__all__ = ["Balancer", "Connection"]

log = logging.getLogger(__name__)

_SERVICE = "/trilith.Prediction"
_PROBE_EVERY_S = 0.5
_PROBE_S = 1.0


@dataclass(slots=True, eq=False)
class Connection:
    """One entry.

    Attributes:
        address: host:port.
        channel: To it.
        predict: Calls Predict with serialized messages.
        status: Calls ModelStatus with serialized messages.
        in_flight: Requests that it has not answered.
        suspect: Whether it failed last; it is left alone while others are well.
        probe_after: When it may be asked again how it is, by the monotonic clock.
        wanted: Whether it is still listed.
    """

    address: str
    channel: grpc.Channel
    predict: StreamedMethod
    status: Any
    in_flight: int = 0
    suspect: bool = False
    probe_after: float = 0.0
    wanted: bool = True


class Balancer:
    """Gives each request the entry with the fewest on their way. Thread-safe.

    One that failed is left alone, and asked how it is each half second while there are requests, until it says that it
    has a model and rows; no request waits for that.
    """

    def __init__(self, *, max_message_bytes: int) -> None:
        """Know no entry yet."""
        self._max_message_bytes = max_message_bytes
        self._lock = threading.Lock()
        self._connections: dict[str, Connection] = {}
        self._closed = False

    @property
    def addresses(self) -> list[str]:
        """Who is known."""
        with self._lock:
            return list(self._connections)

    def set_addresses(self, addresses: Iterable[str]) -> None:
        """Send requests to these from now on; what is on its way to others is answered."""
        wanted = dict.fromkeys(addresses)
        with self._lock:
            if self._closed:
                return
            gone = [self._connections.pop(each) for each in list(self._connections) if each not in wanted]
            for address in wanted:
                if address not in self._connections:
                    self._connections[address] = self._connect(address)
            for each in gone:
                each.wanted = False
            idle = [each for each in gone if not each.in_flight]
        for each in idle:
            each.channel.close()

    def _connect(self, address: str) -> Connection:
        channel = open_channel(address, max_message_bytes=self._max_message_bytes)
        predict = StreamedMethod(channel, f"{_SERVICE}/Predict", f"{_SERVICE}/PredictStream")
        return Connection(address, channel, predict, channel.unary_unary(f"{_SERVICE}/ModelStatus"))

    def take(self, tried: Collection[Connection]) -> tuple[Connection | None, bool]:
        """The entry to ask, to be given back, and whether there are others as good.

        Args:
            tried: Those that failed this request already.

        Raises:
            ClosedError: The balancer was closed.
        """
        now = time.monotonic()
        due: list[Connection] = []
        with self._lock:
            if self._closed:
                raise ClosedError("the connection to the entries was closed")
            left = [each for each in self._connections.values() if each not in tried]
            well = [each for each in left if not each.suspect]
            for each in self._connections.values():
                if each.suspect and each.probe_after <= now:
                    each.probe_after = now + _PROBE_EVERY_S + _PROBE_S
                    due.append(each)
            chosen = min(well or left, key=lambda each: (each.in_flight, random.random()), default=None)
            if chosen is not None:
                chosen.in_flight += 1
        for each in due:
            self._probe(each)
        return chosen, len(well or left) > 1

    def give_back(self, connection: Connection, failure: Exception | None, *, telling: bool = True) -> None:
        """Say that the request ended, and how: with None it is well; if not `telling`, it is as it was."""
        with self._lock:
            connection.in_flight -= 1
            new = telling and failure is not None and not connection.suspect and not self._closed
            if telling:
                connection.suspect = failure is not None
            if new:
                connection.probe_after = time.monotonic() + _PROBE_EVERY_S
            ended = not connection.wanted and not connection.in_flight
        if new:
            log.warning("entry left alone: %s", failure, extra={"address": connection.address})
        if ended:
            connection.channel.close()

    def _probe(self, connection: Connection) -> None:
        try:
            answer = connection.status.future(b"", timeout=_PROBE_S)
        except ValueError:
            return  # it was closed meanwhile
        answer.add_done_callback(partial(self._probed, connection))

    def _probed(self, connection: Connection, answer: Any) -> None:
        well = False
        if answer.code() is grpc.StatusCode.OK:
            status = serving_pb2.ModelStatusResponse.FromString(answer.result())
            shards = {each.shard for each in status.replicas}
            well = bool(status.model) and shards == {each.shard for each in status.replicas if each.healthy}
        with self._lock:
            connection.probe_after = time.monotonic() + _PROBE_EVERY_S
            back = well and connection.suspect
            if well:
                connection.suspect = False
        if back:
            log.info("entry is well", extra={"address": connection.address})

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            self._closed = True
            connections = list(self._connections.values())
            self._connections.clear()
        for each in connections:
            each.channel.close()
