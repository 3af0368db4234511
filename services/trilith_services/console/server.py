"""Runs the console on uvicorn with uvloop until SIGTERM."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from trilith.discovery.addresses import join_address
from trilith.errors import InvalidRequestError
from trilith_services.console.app import make_app
from trilith_services.console.watcher import Watcher
from trilith_services.grpc import listening

__all__ = ["ConsoleServer", "bind"]

log = logging.getLogger(__name__)

_DRAIN_S = 3


def bind(listen: str) -> socket.socket:
    """A listening socket on host:port, port 0 for a free one; an empty host is every interface.

    Raises:
        InvalidRequestError: `listen` is not host:port.
        UnavailableError: The address is taken, or not this machine's.
    """
    host, colon, port = listen.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not (port.isascii() and port.isdigit() and int(port) < 65536) or (":" in bare and bare == host):
        raise InvalidRequestError(f"{listen!r} is not host:port (an IPv6 host stands in brackets: [::1]:8080)")
    return listening.bind(host, int(port))


class ConsoleServer(uvicorn.Server):
    """A server of one console; `run` returns after a signal, or after `stop` from another thread."""

    def __init__(
        self, watcher: Watcher, listening: socket.socket, *, writable: bool = False, hosts: Collection[str] = ()
    ) -> None:
        """Serve on a socket that is bound already; see `make_app`."""
        super().__init__(
            uvicorn.Config(
                make_app(watcher, writable=writable, hosts=hosts),
                loop="uvloop",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_DRAIN_S,
            )
        )
        self._watcher = watcher
        self._listening = listening

    @property
    def url(self) -> str:
        """Where it is reached from this machine."""
        host, port = self._listening.getsockname()[:2]
        return f"http://{join_address({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host), port)}"

    def serve_until_told(self) -> None:
        """Serve."""
        listening.warn_if_exposed("the console", *self._listening.getsockname()[:2])
        log.info("console: serving", extra={"url": self.url})
        self.run(sockets=[self._listening])
        log.info("console: stopped")

    def stop(self) -> None:
        """End `serve_until_told`, from any thread."""
        self._watcher.dismiss()  # open streams of events would otherwise hold the shutdown up
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End on a signal."""
        self._watcher.dismiss()
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Listen to signals while serving; unlike uvicorn's own, a clean end is not undone by raising them again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
