"""MetricsServer: /metrics and /healthz of a process that answers nothing else over HTTP; needs no extra."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from trilith.runtime.exposure import warn_if_exposed
from trilith_services.listening import bind

__all__ = ["MetricsServer"]

log = logging.getLogger(__name__)


class MetricsServer:
    """Answers GET /metrics, and GET /healthz with 200 if `ready` and else 503, on a thread until `stop`."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int, *, ready: Callable[[], bool]) -> None:
        """Begin; `port` 0 takes any free one.

        Raises:
            UnavailableError: The address is taken, or not this machine's.
        """
        scrape = make_wsgi_app(registry)

        def answer(environ: dict[str, Any], start_response: Any) -> Any:
            if environ["PATH_INFO"] != "/healthz":
                return scrape(environ, start_response)
            status, body = ("200 OK", b"ok\n") if ready() else ("503 Service Unavailable", b"not serving\n")
            start_response(status, [("Content-Type", "text/plain")])
            return [body]

        self._server = server = ThreadingWSGIServer((host, port), _Silent, bind_and_activate=False)
        server.socket.close()  # one of IPv4
        server.socket = bind(host, port)
        self.port: int = server.socket.getsockname()[1]
        server.server_name, server.server_port = host, self.port
        server.setup_environ()
        server.set_app(answer)
        warn_if_exposed("metrics", host, self.port)
        self._thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        self._thread.start()
        log.info("metrics", extra={"port": self.port})

    def stop(self) -> None:
        """End."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Silent(WSGIRequestHandler):
    """Scrapes and health checks are no news."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name it overrides)
        """Say nothing."""
