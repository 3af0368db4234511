"""Cutting a kernel's work into parts for several threads; kernels release the GIL."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from trilith.errors import InvalidRequestError
from trilith.runtime.machine import cores

__all__ = ["in_parts", "thread_count"]


def thread_count(threads: int | None, bytes_moved: int) -> int:
    """How many threads a job deserves.

    Args:
        threads: What the caller asked for; None lets the size decide.
        bytes_moved: Roughly what the job reads and writes.

    Returns:
        At least 1. By size: one per core from 4 MB on. Handing a part to a sleeping thread costs about 50 µs, in which
        a core moves half a megabyte.
    """
    if threads is None:
        return 1 if bytes_moved < 4 << 20 else cores()
    if threads < 1:
        raise InvalidRequestError(f"threads={threads} is below 1")
    return threads


def in_parts(work: Callable[[int, int], None], count: int, threads: int) -> None:
    """Run `work(start, stop)` over 0..count in even parts at the same time, one of them in the caller's thread.

    Raises:
        Exception: The first that a part raised, after all have ended.
    """
    threads = max(1, min(threads, count))
    if threads == 1:
        work(0, count)
        return
    bounds = [count * part // threads for part in range(threads + 1)]
    pool = _pool()
    futures = [pool.submit(work, bounds[part], bounds[part + 1]) for part in range(1, threads)]
    failure: Exception | None = None
    try:
        work(bounds[0], bounds[1])
    except Exception as error:  # noqa: BLE001 - raised below, when no part uses the arrays any more
        failure = error
    for future in futures:
        error_of_part = future.exception()
        if failure is None and isinstance(error_of_part, Exception):
            failure = error_of_part
    if failure is not None:
        raise failure


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(4, 2 * cores()), thread_name_prefix="trilith-ops")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
