"""HttpServer: an application on uvicorn with uvloop, beside other things or in the foreground."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from trilith.discovery.addresses import join_address
from trilith.runtime.exposure import warn_if_exposed
from trilith_services.listening import bind_address

__all__ = ["HttpServer"]

log = logging.getLogger(__name__)

_START_S = 10.0


class HttpServer(uvicorn.Server):
    """Serves one application: on a thread between `start` and `stop`, or with `serve_until_told`."""

    def __init__(
        self,
        app: Any,
        listen: str,
        *,
        what: str = "HTTP",
        drain_s: float = 10.0,
        ending: Callable[[], None] = lambda: None,
    ) -> None:
        """Listen, and answer nobody yet.

        Args:
            app: An ASGI application.
            listen: host:port; port 0 takes a free one.
            what: Is served, for messages.
            drain_s: Seconds that requests on their way get at the end.
            ending: Told that it ends, before those are waited for; by whichever thread says so, or by a signal.

        Raises:
            InvalidRequestError: `listen` is not host:port.
            UnavailableError: The address is taken, or not this machine's.
        """
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(drain_s),
            )
        )
        self._what, self._drain_s, self._ending = what, drain_s, ending
        self._listening = bind_address(listen)
        self.host, self.port = self._listening.getsockname()[:2]
        self._thread = threading.Thread(target=self._answer, name="http", daemon=True)
        warn_if_exposed(what, self.host, self.port)

    @property
    def url(self) -> str:
        """Where it is reached from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{join_address(host, self.port)}"

    def _answer(self) -> None:
        self.run(sockets=[self._listening])

    def start(self) -> None:
        """Begin to answer, on a thread."""
        self._thread.start()
        until = time.monotonic() + _START_S
        while not self.started and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.005)

    def stop(self) -> None:
        """End `start` or `serve_until_told`, after the requests that are on their way; from any thread."""
        self._ending()
        self.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(self._drain_s + 1.0)
            self._listening.close()

    def serve_until_told(self) -> None:
        """Serve until a signal comes, or `stop` is called from another thread."""
        name = self._what.removeprefix("the ")
        log.info("%s: serving", name, extra={"url": self.url})
        self._answer()
        log.info("%s: stopped", name)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End on a signal."""
        self._ending()
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
