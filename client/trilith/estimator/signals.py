"""SIGTERM and SIGINT, which end training after its step and not at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["stop_signals"]


@contextmanager
def stop_signals(told: Callable[[str], None]) -> Iterator[None]:
    """Have `told` called with the name of the first of them that comes; a second one is not waited for.

    Only the main thread hears of signals; in any other this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: Any) -> None:
        del frame
        signal.signal(number, before[signal.Signals(number)])
        told(signal.Signals(number).name)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
