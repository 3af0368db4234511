"""Members: the PS of a cluster and their replicas, reachable one by one, also while some of them are down."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np

from trilith.config import ClientConfig
from trilith.discovery import PS
from trilith.discovery.members import count_ps, resolve_ps
from trilith.discovery.record import RecordKeeper
from trilith.discovery.urls import open_directory
from trilith.errors import ClusterMismatchError, TrilithError, UnavailableError
from trilith.routing import OWNER_RULE, owners
from trilith.rpc.remote import RemoteShard
from trilith_proto import ps_pb2
from trilith_services.console.connections import Connections

__all__ = ["Members"]

_T = TypeVar("_T")
_K = TypeVar("_K")

_MAX_THREADS = 64


class Members:
    """Connections to a cluster, opened once its directory knows how many PS there are. Thread-safe.

    A spectator is not disturbed by restarts: whichever incarnation answers is asked.

    Attributes:
        count: How many PS there are.
        shards: The PS by index, whoever answers there.
        replicas: Serving replicas, each by its shard's index and its address.
    """

    def __init__(
        self, url: str, *, timeout_s: float, features: Mapping[str, str] | None = None, wait_s: float = 0.1
    ) -> None:
        """Open a cluster.

        Args:
            url: Of its directory.
            timeout_s: What calls get unless they say otherwise.
            features: Table by feature, where the directory has no record of them.
            wait_s: How long to wait for the directory to know how many PS there are.
        """
        self._features = dict(features or {})
        self._directory = open_directory(url, timeout_s=timeout_s)
        self._config = ClientConfig(timeout_s=timeout_s)
        try:
            self.count = count_ps(self._directory, timeout_s=wait_s)
        except BaseException:
            self._directory.close()
            raise
        self.shards = [
            RemoteShard(partial(resolve_ps, self._directory, index), self._config, index=index)
            for index in range(self.count)
        ]
        self.replicas: Connections[tuple[int, str], RemoteShard] = Connections(
            lambda key: RemoteShard(lambda: key[1], self._config, index=key[0]), RemoteShard.close
        )
        self._lock = threading.Lock()
        self._mismatches: dict[int, str] = {}
        self._pool = ThreadPoolExecutor(min(_MAX_THREADS, 8 + 4 * self.count), thread_name_prefix="trilith-console")

    def recount(self) -> int:
        """How many PS the directory knows of now; the cluster may have been made anew."""
        return count_ps(self._directory, timeout_s=0.1)

    def addresses(self) -> list[str]:
        """host:port by shard index; empty for a PS that is not there at the moment."""
        found = self._directory.query(PS)
        return [found.get(index, "") for index in range(self.count)]

    def features(self) -> Mapping[str, str]:
        """Table by feature, as far as it is known."""
        record = self._directory.read_record() if isinstance(self._directory, RecordKeeper) else None
        return self._features | dict(record.features if record is not None else {})

    def check_identity(self, index: int, answer: ps_pb2.DescribeResponse) -> str:
        """Take note of who answers at a shard's place; what is wrong about it, empty if nothing."""
        ours = f"{index} of {self.count}, owner rule {OWNER_RULE!r}"
        theirs = f"{answer.shard_index} of {answer.shard_count}, owner rule {answer.owner_rule!r}"
        wrong = "" if ours == theirs else f"is shard {ours} by its place, and shard {theirs} by its own account"
        with self._lock:
            self._mismatches[index] = wrong
        return wrong

    def owner(self, value: int) -> int:
        """Index of the PS that has the row of an id, unsigned."""
        return int(owners(np.array([value], np.uint64), self.count)[0])

    def shard(self, index: int) -> RemoteShard:
        """The PS of an index.

        Raises:
            ClusterMismatchError: Who answers there is another shard.
        """
        with self._lock:
            known = index in self._mismatches
        if not known:
            self.check_identity(index, self.shards[index].describe())
        with self._lock:
            wrong = self._mismatches[index]
        if wrong:
            raise ClusterMismatchError(f"{self.shards[index].address} {wrong}")
        return self.shards[index]

    def each(self, keys: Iterable[_K], call: Callable[[_K], _T]) -> dict[_K, _T | TrilithError]:
        """Call for every key, all at once; a TrilithError is a result like others."""

        def run(key: _K) -> _T | TrilithError:
            try:
                return call(key)
            except TrilithError as error:
                return error

        chosen = list(keys)
        return dict(zip(chosen, self._pool.map(run, chosen), strict=True))

    def describe(self) -> dict[int, ps_pb2.DescribeResponse | TrilithError]:
        """What every PS says about itself."""
        return self.each(range(self.count), lambda index: self.shard(index).describe())

    def describe_any(self) -> ps_pb2.DescribeResponse:
        """What the first PS that answers says about itself.

        Raises:
            TrilithError: None answers; what the first of them failed with.
        """
        answers = self.describe().values()
        found = next((answer for answer in answers if not isinstance(answer, TrilithError)), None)
        if found is not None:
            return found
        raise next(
            (answer for answer in answers if isinstance(answer, TrilithError)), UnavailableError("no PS answers")
        )

    def close(self) -> None:
        """Close every connection."""
        self.replicas.close()
        for shard in self.shards:
            shard.close()
        self._directory.close()
        self._pool.shutdown(wait=False)
