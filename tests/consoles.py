"""Consoles inside the test process, and how tests talk to them."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trilith_services.console.app import make_server
from trilith_services.console.watcher import Watcher, WatchOptions

INTERVAL_S = 0.1


class Console:
    """A running console."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(
        self, path: str, method: str = "GET", body: Any = None, kind: str = "application/json", **headers: str
    ) -> tuple[int, Any]:
        """Status and decoded answer; a body of bytes travels as it is, headers have _ for -."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path,
            data,
            {"Content-Type": kind} | {name.replace("_", "-"): value for name, value in headers.items()},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def get(self, path: str) -> Any:
        """The answer, which must be a good one."""
        status, answer = self.ask(path)
        assert status == 200, answer
        return answer

    def debug(self, route: str, body: Any) -> Any:
        """What a debugging route says, read out of its message."""
        status, answer = self.ask(f"/debugging/{route}", "POST", body)
        assert (status, answer["status"]) == (200, "success"), answer
        return json.loads(answer["msg"])

    def until(self, condition: Callable[[Any], Any], timeout_s: float = 60.0) -> Any:
        """Wait for a look of which something is true; returns the look."""
        deadline = time.monotonic() + timeout_s
        while not condition(look := self.get("/api/cluster")["look"]):
            assert time.monotonic() < deadline, look
            time.sleep(0.02)
        return look


@contextmanager
def open_console(
    cluster: str, *, writable: bool = False, hosts: Sequence[str] = (), **options: Any
) -> Iterator[Console]:
    """A console on a free port."""
    watcher = Watcher(cluster, WatchOptions(**{"interval_s": INTERVAL_S, "timeout_s": 2.0} | options))
    server = make_server(watcher, "127.0.0.1:0", writable=writable, hosts=hosts)
    thread = threading.Thread(target=server.serve_until_told)
    thread.start()
    try:
        yield Console(server.url)
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()
