"""Entries: connections to the processes that score requests, to ask them how they are."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from trilith.errors import UnavailableError
from trilith.serving.prediction import Predictor
from trilith_proto import serving_pb2

__all__ = ["Entries"]


class Entries:
    """A connection to every entry that is asked. Thread-safe."""

    def __init__(self) -> None:
        """Begin without any."""
        self._lock = threading.Lock()
        self._connections: dict[str, Predictor] = {}

    def status(self, address: str, *, timeout_s: float) -> serving_pb2.ModelStatusResponse:
        """What the entry at host:port says of itself.

        Raises:
            TrilithError: It does not answer in time, or there is no such address.
        """
        if not address:
            raise UnavailableError("it has announced no address")
        with self._lock:
            found = self._connections.get(address)
            if found is None:
                found = self._connections[address] = Predictor([address])
        return found.status(timeout_s=timeout_s)

    def keep(self, addresses: Iterable[str]) -> None:
        """Close connections to entries that are not at these addresses."""
        wanted = set(addresses)
        with self._lock:
            gone = [self._connections.pop(address) for address in self._connections.keys() - wanted]
        for each in gone:
            each.close()

    def close(self) -> None:
        """Close every connection."""
        self.keep([])
