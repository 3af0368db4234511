"""Ranks of a job that are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Rank", "Ranks", "on_every_rank"]


class Ranks:
    """Where so many ranks meet, and leave each other arrays."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=300)
        self.mail: list[list[Any]] = [[None] * size for _ in range(size)]


class Rank:
    """One of them, as a `Collective`."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.rank, self.size, self._ranks = rank, ranks.size, ranks

    def all_to_all(self, values: Any, sent: Any, received: Any) -> Any:
        for to, chunk in enumerate(np.split(values, np.cumsum(sent)[:-1])):
            self._ranks.mail[to][self.rank] = chunk
        self._ranks.barrier.wait()
        got = list(self._ranks.mail[self.rank])
        self._ranks.barrier.wait()
        assert [chunk.size for chunk in got] == received.tolist()
        return np.concatenate(got)

    def close(self) -> None:
        pass


def on_every_rank(meetings: list[Ranks], work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` gave on each; when one fails, nobody waits for it, and its error is raised."""
    size = meetings[0].size
    found: list[Any] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank)
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)
            for ranks in meetings:
                ranks.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        broken = threading.BrokenBarrierError
        raise next((error for error in failures if not isinstance(error, broken)), failures[0])
    return found
