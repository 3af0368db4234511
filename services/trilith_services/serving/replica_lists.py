"""Where the serving replicas of each shard are listed: given addresses, ZooKeeper, or another directory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from trilith.discovery.addresses import check_address
from trilith.discovery.urls import open_directory
from trilith.errors import InvalidRequestError

if TYPE_CHECKING:
    from trilith.discovery import Directory
    from trilith.discovery.replicas import Replica, Replicas

__all__ = ["GivenReplicas", "ReplicaList", "open_replica_list"]


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
    urls = [each for each in given if "://" in each]
    if not urls:
        return GivenReplicas.parse(given)
    if len(given) > 1:
        raise InvalidRequestError("replicas are named by one URL, or each by SHARD=host:port, not by both")
    directory = open_directory(urls[0], timeout_s=timeout_s)
    if urls[0].startswith("zk://"):
        from trilith.discovery.replicas import Replicas
        from trilith.discovery.zk_directory import ZooKeeperDirectory

        assert isinstance(directory, ZooKeeperDirectory)
        return _InZooKeeper(directory, Replicas(directory.zookeeper, name))
    return _InDirectory(directory, name)


class GivenReplicas:
    """Replicas that stay where they are."""

    def __init__(self, addresses: Mapping[int, Sequence[str]]) -> None:
        """Take addresses by shard."""
        self._addresses = {shard: tuple(map(check_address, each)) for shard, each in addresses.items()}

    @classmethod
    def parse(cls, given: Iterable[str]) -> GivenReplicas:
        """Read SHARD=host:port, any number per shard."""
        found: dict[int, list[str]] = {}
        for each in given:
            shard, equals, address = each.partition("=")
            if not equals or not shard.isdecimal():
                raise InvalidRequestError(f"replica {each!r} is neither SHARD=host:port nor the URL of a directory")
            found.setdefault(int(shard), []).append(address)
        return cls(found)

    def watch(self, shard: int, changed: Callable[[Iterable[str]], None]) -> Callable[[], None]:
        """See `ReplicaList`."""
        changed(self._addresses.get(shard, ()))
        return lambda: None

    def close(self) -> None:
        """See `ReplicaList`."""


class _InDirectory:
    """A role per shard, as `trilith serving ps` registers there."""

    def __init__(self, directory: Directory, name: str) -> None:
        self._directory = directory
        self._name = name

    def watch(self, shard: int, changed: Callable[[Iterable[str]], None]) -> Callable[[], None]:
        """See `ReplicaList`."""
        return self._directory.watch(f"{self._name}-ps-{shard}", lambda members: changed(members.values()))

    def close(self) -> None:
        """See `ReplicaList`."""
        self._directory.close()


class _InZooKeeper:
    """Nodes `service/<name>/ps:<shard>/<replica>` whose state is AVAILABLE."""

    def __init__(self, directory: Directory, replicas: Replicas) -> None:
        self._directory = directory
        self._replicas = replicas

    def watch(self, shard: int, changed: Callable[[Iterable[str]], None]) -> Callable[[], None]:
        """See `ReplicaList`."""
        from trilith.discovery.replicas import ModelState

        last: list[str] | None = None

        def on_replicas(found: list[Replica]) -> None:
            nonlocal last
            addresses = [
                address
                for each in found
                if (each.path.server_type, each.path.index) == ("ps", shard)
                and each.meta.stat == ModelState.AVAILABLE
                and (address := each.meta.reachable_at()) is not None
            ]
            if addresses != last:
                last = addresses
                changed(addresses)

        return self._replicas.watch(on_replicas)

    def close(self) -> None:
        """See `ReplicaList`."""
        self._directory.close()
