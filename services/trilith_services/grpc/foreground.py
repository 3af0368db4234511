"""Runs a server in the main thread: from its first signal handler to its exit status."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from trilith_services.grpc.serve import Server

__all__ = ["serve"]

log = logging.getLogger(__name__)


def serve(
    server: Server,
    listen: str,
    *,
    prepare: Callable[[], None],
    bound: Callable[[int], None] = lambda port: None,
    draining: Callable[[], None] = lambda: None,
    drained: Callable[[], None] = lambda: None,
) -> int:
    """Serve until SIGTERM or SIGINT; to be called in the main thread.

    Handlers are installed first, so that a signal during `prepare` ends the process properly too: what `prepare` was
    doing is left where it is. Health says NOT_SERVING until `prepare` has returned.

    Args:
        server: What to run.
        listen: host:port.
        prepare: Gets everything ready, on a thread of its own.
        bound: Told the port before `prepare` begins.
        draining: Called when the server is to stop, while it still takes calls; `prepare` may still be at work.
        drained: Called after the last call, for final work.

    Returns:
        0, the exit status.

    Raises:
        TrilithError: `prepare` failed, or the address is taken.
    """
    with _signals() as stopping:
        port = server.listen(listen)
        log.info("listening", extra={"listen": listen, "port": port})
        bound(port)
        failure: list[BaseException] = []
        ready = threading.Event()

        def run() -> None:
            try:
                prepare()
            except BaseException as error:  # noqa: BLE001 (raised again in the main thread)
                failure.append(error)
                stopping.set()
            ready.set()

        threading.Thread(target=run, name="prepare", daemon=True).start()
        while not ready.wait(0.02) and not stopping.is_set():
            pass
        if failure:
            server.stop(0.0)
            raise failure[0]
        if not ready.is_set():
            log.info("stopped while preparing")
            draining()
            server.stop(0.0)
            _exit_at_once(ready)
            return 0
        server.set_serving(True)
        log.info("serving", extra={"port": port})
        stopping.wait()
        log.info("draining")
        draining()
        server.set_serving(False)
        server.stop(server.limits.drain_s)
        drained()
        log.info("stopped")
        return 0


@contextmanager
def _signals() -> Iterator[threading.Event]:
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_at_once(ready: threading.Event) -> None:
    """End the process while `prepare` still runs: an interpreter that shuts down under a compiling thread may crash."""
    if ready.wait(0.5):
        return
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)
