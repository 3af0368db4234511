"""ServingList: the serving processes that a directory lists, whatever their state."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trilith.discovery.addresses import ipv6_only
from trilith.discovery.urls import open_directory

if TYPE_CHECKING:
    from trilith.discovery import Directory
    from trilith.discovery.serving_nodes import ServingNode

__all__ = ["ServingList", "ServingProcess"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingProcess:
    """A serving process.

    Attributes:
        server_type: "ps" or "entry", or what else stands there.
        shard: Index of the shard or sub-model.
        name: As its training PS calls it, for replicas of shards.
        address: host:port; empty if it has announced none that others could reach.
        state: In words.
    """

    server_type: str
    shard: int
    name: str
    address: str
    state: str


class ServingList:
    """Follows nodes of a serving model in ZooKeeper, or roles such as `<model>-ps-<shard>` of another directory."""

    def __init__(self, url: str, model: str, *, timeout_s: float) -> None:
        """Open the directory at `url`."""
        self._model = model
        self._lock = threading.Lock()
        self._nodes: list[ServingProcess] = []
        self._directory: Directory = open_directory(url, timeout_s=timeout_s)
        self._watches = url.startswith("zk://")
        if self._watches:
            from trilith.discovery.serving_nodes import ServingNodes
            from trilith.discovery.zk_directory import ZooKeeperDirectory

            assert isinstance(self._directory, ZooKeeperDirectory)
            try:
                ServingNodes(self._directory.zookeeper, model).watch(self._changed)
            except BaseException:
                self._directory.close()
                raise

    def _changed(self, found: list[ServingNode]) -> None:
        from trilith.discovery.serving_nodes import ModelState

        ipv6 = ipv6_only()
        states: Mapping[int, str] = {state.value: state.name.lower() for state in ModelState}
        nodes = [
            ServingProcess(
                server_type=node.path.server_type,
                shard=node.path.index,
                name=f"replica-{node.path.replica}" if node.path.server_type == "ps" else f"{node.path.replica}",
                address=node.meta.reachable_at(ipv6=ipv6) or "",
                state=states.get(node.meta.stat, f"state {node.meta.stat}"),
            )
            for node in found
        ]
        with self._lock:
            self._nodes = nodes

    def read(self, shards: int) -> list[ServingProcess]:
        """Who is listed now, for a cluster of so many shards."""
        if self._watches:
            with self._lock:
                return list(self._nodes)
        replicas = [
            ServingProcess(server_type="ps", shard=shard, name=f"replica-{number}", address=address, state="listed")
            for shard in range(shards)
            for number, address in self._directory.query(f"{self._model}-ps-{shard}").items()
        ]
        return replicas + [
            ServingProcess(server_type="entry", shard=0, name=f"{number}", address=address, state="listed")
            for number, address in self._directory.query(f"{self._model}-entry-0").items()
        ]

    def close(self) -> None:
        """End the session."""
        self._directory.close()
