"""Where the processes that serve a model are: nodes of a serving model in ZooKeeper, or roles of another directory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from trilith.discovery.addresses import ipv6_only
from trilith.discovery.urls import open_directory
from trilith.errors import InvalidRequestError

if TYPE_CHECKING:
    from trilith.discovery import Directory
    from trilith.discovery.containers import Containers
    from trilith.discovery.replicas import Replica, Replicas

__all__ = ["ServingDirectory", "ServingTask"]


class ServingTask(Protocol):
    """The processes that do one task of a serving model: the replicas of a shard, or the entries."""

    def announce(self, replica: int | None, address: str, *, available: bool) -> int:
        """Say that `replica` is at `address`: there, and if `available` to be asked.

        Args:
            replica: Its number; None for one that nobody has.
            address: host:port.
            available: Whether it can be asked already.

        Returns:
            The number, for later announcements.
        """

    def withdraw(self, replica: int, address: str) -> None:
        """Take that back."""

    def watch(self, changed: Callable[[Mapping[str, str]], None], *, loading: bool = False) -> Callable[[], None]:
        """Call `changed` with the address by name of every process that can be asked, until told to stop.

        Args:
            changed: Is told now, and of every change.
            loading: Those that cannot be asked yet are told of too.
        """

    def close(self) -> None:
        """Release connections."""


class ServingDirectory:
    """The processes that serve one model, as a directory lists them."""

    def __init__(self, url: str, name: str, *, timeout_s: float = 30.0) -> None:
        """Open the directory at `url`.

        Args:
            url: See `trilith.discovery.urls`.
            name: Serving model.
            timeout_s: How long to wait for ZooKeeper.
        """
        self._directory: Directory = open_directory(url, timeout_s=timeout_s)
        self._name = name
        self._replicas: Replicas | None = None
        self._containers: Containers | None = None
        if url.startswith("zk://"):
            from trilith.discovery.containers import Containers
            from trilith.discovery.replicas import Replicas
            from trilith.discovery.zk_directory import ZooKeeperDirectory

            assert isinstance(self._directory, ZooKeeperDirectory)
            try:
                self._replicas = Replicas(self._directory.zookeeper, name)
                self._containers = Containers(self._directory.zookeeper, name)
            except BaseException:
                self._directory.close()
                raise

    def replicas(self, shard: int) -> ServingTask:
        """The replicas of a shard."""
        return self._task("ps", shard)

    def entries(self) -> ServingTask:
        """The entries."""
        return self._task("entry", 0)

    def _task(self, server_type: str, index: int) -> ServingTask:
        if self._replicas is not None:
            assert self._containers is not None
            return _InZooKeeper(self._directory, self._replicas, self._containers, server_type, index)
        return _InDirectory(self._directory, f"{self._name}-{server_type}-{index}")

    def close(self) -> None:
        """Release connections."""
        self._directory.close()


class _InDirectory:
    """One role of a directory; it has no place for states, so a process that is listed is taken to serve."""

    def __init__(self, directory: Directory, role: str) -> None:
        self._directory = directory
        self._role = role

    def announce(self, replica: int | None, address: str, *, available: bool) -> int:
        """See `ServingTask`; the caller has to give numbers."""
        if replica is None:
            raise InvalidRequestError(f"{self._role}: which replica is it? Only ZooKeeper gives numbers")
        self._directory.register(self._role, replica, address)
        return replica

    def withdraw(self, replica: int, address: str) -> None:
        """See `ServingTask`."""
        self._directory.deregister(self._role, replica, address)

    def watch(self, changed: Callable[[Mapping[str, str]], None], *, loading: bool = False) -> Callable[[], None]:
        """See `ServingTask`."""
        return self._directory.watch(
            self._role, lambda members: changed({str(number): address for number, address in members.items()})
        )

    def close(self) -> None:
        """See `ServingTask`."""
        self._directory.close()


class _InZooKeeper:
    """Nodes `service/<name>/<type>:<index>/<replica>`, in every data centre and cluster, and containers of agents."""

    def __init__(
        self, directory: Directory, replicas: Replicas, containers: Containers, server_type: str, index: int
    ) -> None:
        self._directory = directory
        self._replicas = replicas
        self._containers = containers
        self._type, self._index = server_type, index
        self._sub_model = f"ps_{index}" if server_type == "ps" else server_type

    def announce(self, replica: int | None, address: str, *, available: bool) -> int:
        """See `ServingTask`."""
        from trilith.discovery.replicas import ModelState, ReplicaMeta

        v6 = address.startswith("[")
        meta = ReplicaMeta(
            address=None if v6 else address,
            address_ipv6=address if v6 else None,
            stat=ModelState.AVAILABLE if available else ModelState.LOADING,
            model_name=self._sub_model,
            server_type=self._type,
            task=self._index,
        )
        return self._replicas.announce(self._type, self._index, replica, meta)

    def withdraw(self, replica: int, address: str) -> None:
        """See `ServingTask`."""
        del address
        self._replicas.deregister(self._replicas.path(self._type, self._index, replica))

    def watch(self, changed: Callable[[Mapping[str, str]], None], *, loading: bool = False) -> Callable[[], None]:
        """See `ServingTask`.

        A name is the replica's number, after its data centre and cluster where it has any, or a container's. Where
        there is an address of either family, it is IPv4's, except on machines that have IPv6 alone.
        """
        from trilith.discovery.replicas import ModelState

        wanted = {ModelState.AVAILABLE, ModelState.LOADING} if loading else {ModelState.AVAILABLE}
        ipv6 = ipv6_only()
        told = _Together(changed, 2)

        def on_replicas(found: list[Replica]) -> None:
            members = {}
            for each in found:
                mine = (each.path.server_type, each.path.index) == (self._type, self._index)
                address = each.meta.reachable_at(ipv6=ipv6)
                if mine and each.meta.stat in wanted and address is not None:
                    name = "/".join(filter(None, (each.path.location, str(each.path.replica))))
                    members[name] = address
            told(0, members)

        stop_containers = self._containers.watch(self._sub_model, lambda members: told(1, members))
        try:
            stop_replicas = self._replicas.watch(on_replicas)
        except BaseException:
            stop_containers()
            raise

        def stop() -> None:
            stop_replicas()
            stop_containers()

        return stop

    def close(self) -> None:
        """See `ServingTask`."""
        self._directory.close()


class _Together:
    """Tells of several lists as one, once all are known, and when it is another; who is in several counts once."""

    def __init__(self, changed: Callable[[Mapping[str, str]], None], lists: int) -> None:
        self._changed = changed
        self._lists: list[Mapping[str, str] | None] = [None] * lists
        self._last: dict[str, str] | None = None
        self._lock = threading.Lock()

    def __call__(self, which: int, members: Mapping[str, str]) -> None:
        with self._lock:
            self._lists[which] = members
            merged: dict[str, str] = {}
            for each in self._lists:
                if each is None:
                    return
                before = set(merged.values())
                merged |= {name: address for name, address in each.items() if address not in before}
            if merged != self._last:
                self._last = merged
                self._changed(dict(merged))
