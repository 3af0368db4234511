"""Whether somebody accepts connections at an address."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from trilith.discovery.addresses import split_address
from trilith.errors import TrilithError

__all__ = ["dead_nodes", "is_listening"]

_PAUSE_S = 0.1


def is_listening(address: str, *, timeout_s: float = 1.0) -> bool:
    """Whether host:port accepts a connection, tried until the time is over."""
    host, port = split_address(address)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.001)):
                return True
        except OSError:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(_PAUSE_S, left))


def dead_nodes(addresses: Iterable[str], *, timeout_s: float = 1.0, threads: int = 10) -> list[str]:
    """Those of the addresses at which nobody accepts a connection within the time, asked at once."""
    asked = list(addresses)

    def alive(address: str) -> bool:
        try:
            return is_listening(address, timeout_s=timeout_s)
        except TrilithError:
            return False  # not even an address

    with ThreadPoolExecutor(max(min(threads, len(asked)), 1), thread_name_prefix="trilith-ping") as pool:
        return [address for address, is_alive in zip(asked, pool.map(alive, asked), strict=True) if not is_alive]
