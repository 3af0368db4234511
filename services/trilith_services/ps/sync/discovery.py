"""Where the serving replicas of a shard are: nodes of a serving model in ZooKeeper, or a role of another directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from trilith.discovery.urls import open_directory

if TYPE_CHECKING:
    from trilith.discovery import Directory
    from trilith.discovery.replicas import Replica, Replicas

__all__ = ["ServingReplicas", "open_replicas"]


class ServingReplicas(Protocol):
    """The replicas of one shard."""

    def announce(self, replica: int, address: str, *, available: bool) -> None:
        """Say that `replica` is at `address`: to be filled, and if `available` to be asked for rows."""

    def withdraw(self, replica: int, address: str) -> None:
        """Take that back."""

    def watch(self, changed: Callable[[Mapping[str, str]], None]) -> Callable[[], None]:
        """Call `changed` with the address by name of every replica, serving already or not, until told to stop."""

    def close(self) -> None:
        """Release connections."""


def open_replicas(url: str, name: str, shard: int, *, timeout_s: float = 30.0) -> ServingReplicas:
    """Open the list of the replicas of shard `shard` of the serving model `name`."""
    directory = open_directory(url, timeout_s=timeout_s)
    if url.startswith("zk://"):
        from trilith.discovery.replicas import Replicas
        from trilith.discovery.zk_directory import ZooKeeperDirectory

        assert isinstance(directory, ZooKeeperDirectory)
        return _InZooKeeper(directory, Replicas(directory.zookeeper, name), shard)
    return _InDirectory(directory, f"{name}-ps-{shard}")


class _InDirectory:
    """One role of a directory; it has no place for states, so a replica that is listed is taken to serve."""

    def __init__(self, directory: Directory, role: str) -> None:
        self._directory = directory
        self._role = role

    def announce(self, replica: int, address: str, *, available: bool) -> None:
        """See `ServingReplicas`."""
        self._directory.register(self._role, replica, address)

    def withdraw(self, replica: int, address: str) -> None:
        """See `ServingReplicas`."""
        self._directory.deregister(self._role, replica, address)

    def watch(self, changed: Callable[[Mapping[str, str]], None]) -> Callable[[], None]:
        """See `ServingReplicas`."""
        return self._directory.watch(
            self._role, lambda members: changed({str(number): address for number, address in members.items()})
        )

    def close(self) -> None:
        """See `ServingReplicas`."""
        self._directory.close()


class _InZooKeeper:
    """Nodes `service/<name>/ps:<shard>/<replica>`, in every data centre and cluster."""

    def __init__(self, directory: Directory, replicas: Replicas, shard: int) -> None:
        self._directory = directory
        self._replicas = replicas
        self._shard = shard

    def announce(self, replica: int, address: str, *, available: bool) -> None:
        """See `ServingReplicas`."""
        from trilith.discovery.replicas import ModelState, ReplicaMeta

        v6 = address.startswith("[")
        meta = ReplicaMeta(
            address=None if v6 else address,
            address_ipv6=address if v6 else None,
            stat=ModelState.AVAILABLE if available else ModelState.LOADING,
            model_name=f"ps_{self._shard}",
            server_type="ps",
            task=self._shard,
            replica=replica,
        )
        self._replicas.register(self._replicas.path("ps", self._shard, replica), meta)

    def withdraw(self, replica: int, address: str) -> None:
        """See `ServingReplicas`."""
        del address
        self._replicas.deregister(self._replicas.path("ps", self._shard, replica))

    def watch(self, changed: Callable[[Mapping[str, str]], None]) -> Callable[[], None]:
        """See `ServingReplicas`. A name is the replica's number, after its data centre and cluster where it has any."""
        from trilith.discovery.replicas import ModelState

        filled = (ModelState.LOADING, ModelState.AVAILABLE)
        last: dict[str, str] | None = None

        def on_replicas(found: list[Replica]) -> None:
            nonlocal last
            members = {}
            for each in found:
                mine = (each.path.server_type, each.path.index) == ("ps", self._shard)
                address = each.meta.reachable_at()
                if mine and each.meta.stat in filled and address is not None:
                    name = "/".join(filter(None, (each.path.location, str(each.path.replica))))
                    members[name] = address
            if members != last:
                last = members
                changed(members)

        return self._replicas.watch(on_replicas)

    def close(self) -> None:
        """See `ServingReplicas`."""
        self._directory.close()
