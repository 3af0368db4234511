"""Where the serving replicas of each shard are listed: given addresses, ZooKeeper, or another directory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from trilith.discovery.addresses import check_address
from trilith.discovery.serving import ServingDirectory
from trilith.errors import InvalidRequestError

__all__ = ["GivenReplicas", "ListedReplicas", "ReplicaList", "open_replica_list"]


class ReplicaList(Protocol):
    """The replicas of every shard, which may come and go."""

    def watch(self, shard: int, changed: Callable[[Iterable[str]], None]) -> Callable[[], None]:
        """Call `changed` with the addresses of a shard's replicas that serve, now and later, until told to stop."""

    def close(self) -> None:
        """Release connections."""


def open_replica_list(given: Sequence[str], name: str, *, timeout_s: float = 30.0) -> ReplicaList:
    """Open the list that a command line names.

    Args:
        given: One URL of a directory, or any number of SHARD=host:port.
        name: Serving model under which a directory lists its replicas.
        timeout_s: How long to wait for ZooKeeper.
    """
    urls = [url for url in given if "://" in url]
    if not urls:
        return GivenReplicas.parse(given)
    if len(given) > 1:
        raise InvalidRequestError("replicas are named by one URL, or each by SHARD=host:port, not by both")
    return ListedReplicas(ServingDirectory(urls[0], name, timeout_s=timeout_s))


class GivenReplicas:
    """Replicas that stay where they are."""

    def __init__(self, addresses: Mapping[int, Sequence[str]]) -> None:
        """Take addresses by shard."""
        self._addresses = {shard: tuple(map(check_address, listed)) for shard, listed in addresses.items()}

    @classmethod
    def parse(cls, given: Iterable[str]) -> GivenReplicas:
        """Read SHARD=host:port, any number per shard."""
        found: dict[int, list[str]] = {}
        for replica in given:
            shard, equals, address = replica.partition("=")
            if not equals or not shard.isdecimal():
                raise InvalidRequestError(f"replica {replica!r} is neither SHARD=host:port nor the URL of a directory")
            found.setdefault(int(shard), []).append(address)
        return cls(found)

    def watch(self, shard: int, changed: Callable[[Iterable[str]], None]) -> Callable[[], None]:
        """See `ReplicaList`."""
        changed(self._addresses.get(shard, ()))
        return lambda: None

    def close(self) -> None:
        """See `ReplicaList`."""


class ListedReplicas:
    """Replicas that a directory lists as serving."""

    def __init__(self, directory: ServingDirectory) -> None:
        """Follow `directory`, and close it in the end."""
        self._directory = directory

    def watch(self, shard: int, changed: Callable[[Iterable[str]], None]) -> Callable[[], None]:
        """See `ReplicaList`."""
        return self._directory.replicas(shard).watch(lambda members: changed(members.values()))

    def close(self) -> None:
        """See `ReplicaList`."""
        self._directory.close()
