"""Where the processes that serve a model are: nodes of a serving model in ZooKeeper, or roles of another directory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from trilith.discovery.addresses import ipv6_only
from trilith.discovery.urls import open_directory
from trilith.discovery.watchers import Watchers
from trilith.errors import InvalidRequestError

if TYPE_CHECKING:
    from trilith.discovery import Directory
    from trilith.discovery.containers import Containers
    from trilith.discovery.serving_nodes import ServingNode, ServingNodes

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
        self._replicas: ServingNodes | None = None
        self._processes: _Processes | None = None
        if url.startswith("zk://"):
            from trilith.discovery.containers import Containers
            from trilith.discovery.serving_nodes import ServingNodes
            from trilith.discovery.zk_directory import ZooKeeperDirectory

            assert isinstance(self._directory, ZooKeeperDirectory)
            try:
                self._replicas = ServingNodes(self._directory.zookeeper, name)
                self._processes = _Processes(self._replicas, Containers(self._directory.zookeeper, name))
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
            assert self._processes is not None
            return _InZooKeeper(self._directory, self._replicas, self._processes, server_type, index)
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


class _Processes:
    """Who does which task of a model: read once while anybody watches any of them, and told to all who do.

    A name is the replica's number, after its data centre and cluster where it has any, or a container's. Where there is
    an address of either family, it is IPv4's, except on machines that have IPv6 alone.
    """

    def __init__(self, replicas: ServingNodes, containers: Containers) -> None:
        self._replicas, self._containers = replicas, containers
        self._ipv6 = ipv6_only()
        self._starting = threading.Lock()  # not held by those who deliver
        self._stops: list[Callable[[], None]] = []
        self._users = 0
        self._merging = threading.Lock()
        self._nodes: dict[tuple[str, str], dict[str, str]] | None = None
        self._bound: dict[tuple[str, str], Mapping[str, str]] | None = None
        self._watchers: Watchers[tuple[str, str], Mapping[str, str]] = Watchers({})

    def watch(self, changed: Callable[[Mapping[tuple[str, str], Mapping[str, str]]], None]) -> Callable[[], None]:
        """Tell of everybody, now and after every change, until told to stop.

        Args:
            changed: Gets the address by name of all who are in one list. There are ("available", "type:index") and
                ("loading", "type:index") of those that registered, and ("container", sub-model).
        """
        with self._starting:
            if not self._users:
                self._start()
            self._users += 1
        stop_watching = self._watchers.add(changed)
        stopped = False

        def stop() -> None:
            nonlocal stopped
            stop_watching()
            with self._starting:
                self._users -= not stopped
                stopped = True
                if not self._users:
                    self._end()

        return stop

    def _start(self) -> None:
        try:
            self._stops.append(self._containers.watch(self._on_containers))
            self._stops.append(self._replicas.watch(self._on_replicas))
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        while self._stops:
            self._stops.pop()()
        self._nodes = self._bound = None

    def _on_replicas(self, found: list[ServingNode]) -> None:
        from trilith.discovery.serving_nodes import ModelState

        states: Mapping[int, str] = {ModelState.AVAILABLE: "available", ModelState.LOADING: "loading"}
        nodes: dict[tuple[str, str], dict[str, str]] = {}
        for each in found:
            address, state = each.meta.reachable_at(ipv6=self._ipv6), states.get(each.meta.stat)
            if address is not None and state is not None:
                name = "/".join(filter(None, (each.path.location, str(each.path.replica))))
                nodes.setdefault((state, each.path.task), {})[name] = address
        with self._merging:
            self._nodes = nodes
            self._publish()

    def _on_containers(self, found: Mapping[str, Mapping[str, str]]) -> None:
        with self._merging:
            self._bound = {("container", sub_model): members for sub_model, members in found.items()}
            self._publish()

    def _publish(self) -> None:
        if self._nodes is not None and self._bound is not None:
            self._watchers.publish({**self._nodes, **self._bound})


class _InZooKeeper:
    """Nodes `service/<name>/<type>:<index>/<replica>`, in every data centre and cluster, and containers of agents."""

    def __init__(
        self, directory: Directory, replicas: ServingNodes, processes: _Processes, server_type: str, index: int
    ) -> None:
        self._directory = directory
        self._replicas = replicas
        self._processes = processes
        self._type, self._index = server_type, index
        self._sub_model = f"ps_{index}" if server_type == "ps" else server_type

    def announce(self, replica: int | None, address: str, *, available: bool) -> int:
        """See `ServingTask`."""
        from trilith.discovery.serving_nodes import ModelState, ServingMeta

        v6 = address.startswith("[")
        meta = ServingMeta(
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
        """See `ServingTask`."""
        task = f"{self._type}:{self._index}"
        wanted = [("available", task), *([("loading", task)] if loading else []), ("container", self._sub_model)]
        last: dict[str, str] | None = None

        def told(lists: Mapping[tuple[str, str], Mapping[str, str]]) -> None:
            nonlocal last
            members: dict[str, str] = {}
            for each in wanted:
                before = set(members.values())  # who is in several lists counts once
                members |= {name: at for name, at in lists.get(each, {}).items() if at not in before}
            if members != last:
                last = members
                changed(dict(members))

        return self._processes.watch(told)

    def close(self) -> None:
        """See `ServingTask`."""
        self._directory.close()
