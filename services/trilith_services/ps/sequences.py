"""Sequences: which writes a PS has already done, so that a client may repeat one after a lost answer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

from trilith.errors import InvalidRequestError
from trilith.shard import Write

__all__ = ["Sequences"]

_Result = TypeVar("_Result")


class _Client:
    """The recent writes of one client: results by sequence, and events of those under way."""

    def __init__(self) -> None:
        self.results: OrderedDict[int, Any] = OrderedDict()
        self.running: dict[int, threading.Event] = {}
        self.forgotten = 0  # the highest sequence whose result is no longer kept


class Sequences:
    """Runs each (client, sequence) once; thread-safe.

    The last `window` results of each of the last `clients` clients are kept. A client that has more writes in flight
    than the window could see one refused, never one applied twice.
    """

    def __init__(self, *, window: int = 1024, clients: int = 4096) -> None:
        self._window = window
        self._limit = clients
        self._lock = threading.Lock()
        self._clients: OrderedDict[int, _Client] = OrderedDict()

    def once(self, write: Write, work: Callable[[], _Result]) -> tuple[_Result, bool]:
        """Do `work` unless this write was done before.

        A repetition that arrives while the first is under way waits for it. Work that raises was not done and may be
        repeated.

        Returns:
            The result, and whether it is that of an earlier call.
        """
        if write.client_id == 0:
            return work(), False
        while True:
            with self._lock:
                client = self._clients.setdefault(write.client_id, _Client())
                self._clients.move_to_end(write.client_id)
                if len(self._clients) > self._limit:
                    self._drop_idle_client()
                if write.sequence in client.results:
                    return client.results[write.sequence], True
                if write.sequence <= client.forgotten:
                    raise InvalidRequestError(
                        f"write {write.sequence} of client {write.client_id:#x} is older than the {self._window} "
                        "writes that are remembered; it may have been done before and is refused"
                    )
                running = client.running.get(write.sequence)
                if running is None:
                    mine = client.running[write.sequence] = threading.Event()
                    break
            running.wait()
        try:
            result = work()
            with self._lock:
                client.results[write.sequence] = result
                if len(client.results) > self._window:
                    client.forgotten = max(client.forgotten, client.results.popitem(last=False)[0])
            return result, False
        finally:
            with self._lock:
                del client.running[write.sequence]
            mine.set()

    def _drop_idle_client(self) -> None:
        for client_id, client in self._clients.items():
            if not client.running:
                del self._clients[client_id]
                return
