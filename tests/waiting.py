"""Waiting for what another thread or process does, without guessing how long that takes."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["eventually"]


def eventually(
    condition: Callable[[], object],
    *,
    timeout_s: float = 60.0,
    otherwise: Callable[[], object] = lambda: "it did not happen in time",
) -> float:
    """Wait until something is so; returns the seconds it took. If it never is, `otherwise` says what is instead."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, otherwise()
        time.sleep(0.01)
    return time.monotonic() - started
