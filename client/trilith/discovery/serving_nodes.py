"""Processes that serve a model in ZooKeeper: `<root>/service/<model>/[<idc>:<cluster>/]<type>:<index>/<replica>`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import ClassVar

from trilith.discovery.bodies import NodeBody
from trilith.discovery.zookeeper import ZooKeeper
from trilith.errors import InvalidRequestError

__all__ = ["ModelState", "ServingMeta", "ServingNode", "ServingNodes", "ServingPath"]

log = logging.getLogger(__name__)

_NAME = r"[-_0-9A-Za-z]+"
_PATH = re.compile(
    rf"/(?P<bzid>{_NAME})/service/(?P<base_name>{_NAME})"
    rf"(/(?P<idc>{_NAME}):(?P<cluster>{_NAME}))?"
    r"/(?P<server_type>\w+):(?P<index>\d+)"
    r"(/(?P<replica>\d+))?",
    re.ASCII,
)
_ENTRY_DIGITS = 11


class ModelState(IntEnum):
    """What a server says of the model it has."""

    UNKNOWN = 0
    START = 10
    LOADING = 20
    AVAILABLE = 30
    UNLOADING = 40
    END = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingMeta(NodeBody):
    """The body of the node of a process that serves.

    Attributes:
        address: IPv4 host:port; one that begins 0.0.0.0 counts as missing.
        address_ipv6: The same for IPv6, [::] counts as missing.
        stat: A ModelState.
        model_name: Name of the model it serves.
        server_type: "ps", "entry" or "dense".
        task: Index of the sub-model.
        replica: Number of the replica.
        archon_address: A second address; kept for those who read it.
        archon_address_ipv6: The same for IPv6.
    """

    describes: ClassVar[str] = "replica"
    address: str | None = None
    address_ipv6: str | None = None
    stat: int = ModelState.UNKNOWN
    model_name: str | None = None
    server_type: str | None = None
    task: int = -1
    replica: int = -1
    archon_address: str | None = None
    archon_address_ipv6: str | None = None

    def reachable_at(self, *, ipv6: bool = False) -> str | None:
        """The address of the family that is asked for, else of the other."""
        v4 = None if self.address and self.address.startswith("0.0.0.0") else self.address or None
        v6 = None if self.address_ipv6 and self.address_ipv6.startswith("[::]") else self.address_ipv6 or None
        return (v6 or v4) if ipv6 else (v4 or v6)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPath:
    """The path of the node of a process that serves, or of the one above it if `replica` is None.

    Attributes:
        bzid: Serving namespace; here the path of the zk:// URL stands for it.
        base_name: Serving model.
        server_type: "ps", "entry" or "dense".
        index: Index of the sub-model.
        replica: Number of the replica.
        idc: Data centre, where paths name it.
        cluster: Cluster within it.
    """

    bzid: str
    base_name: str
    server_type: str
    index: int
    replica: int | None = None
    idc: str | None = None
    cluster: str | None = None

    @classmethod
    def parse(cls, path: str) -> ServingPath | None:
        """Read a path; None if it is not of this form."""
        found = _PATH.fullmatch(path)
        if found is None:
            return None
        return cls(
            bzid=found["bzid"],
            base_name=found["base_name"],
            server_type=found["server_type"],
            index=int(found["index"]),
            replica=None if found["replica"] is None else int(found["replica"]),
            idc=found["idc"],
            cluster=found["cluster"],
        )

    @property
    def task(self) -> str:
        """Type and index."""
        return f"{self.server_type}:{self.index}"

    @property
    def location(self) -> str | None:
        """Data centre and cluster, where paths name them."""
        return None if self.idc is None else f"{self.idc}:{self.cluster}"

    def below(self, service: str) -> str:
        """The absolute path, `service` being the node that holds all models."""
        parts = [service, self.base_name, self.location, self.task]
        if self.replica is not None:
            parts.append(str(self.replica).zfill(_ENTRY_DIGITS if self.server_type == "entry" else 0))
        return "/".join(part for part in parts if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingNode:
    """A process that is registered."""

    path: ServingPath
    meta: ServingMeta


class ServingNodes:
    """The processes that serve one model, in the data centres and clusters it runs in."""

    def __init__(self, zookeeper: ZooKeeper, base_name: str) -> None:
        """Use a session; its URL's path is the namespace.

        Args:
            zookeeper: The session, such as `ZooKeeperDirectory.zookeeper`.
            base_name: Serving model.
        """
        if not re.fullmatch(_NAME, base_name):
            raise InvalidRequestError(f"{base_name!r} is no name of a serving model; letters, digits, - and _ are")
        self._zookeeper = zookeeper
        self._service = f"{zookeeper.url.root}/service"
        self.base_name = base_name

    def path(
        self, server_type: str, index: int, replica: int, *, idc: str | None = None, cluster: str | None = None
    ) -> ServingPath:
        """Where a process of this model belongs."""
        made = ServingPath(
            bzid="-",
            base_name=self.base_name,
            server_type=server_type,
            index=index,
            replica=replica,
            idc=idc,
            cluster=cluster,
        )
        if (idc is None) is not (cluster is None) or ServingPath.parse(made.below("/-/service")) != made:
            raise InvalidRequestError(f"no replica can be at {made.below(self._service)}")
        return made

    def register(self, path: ServingPath, meta: ServingMeta) -> None:
        """Announce a process, or its new state; its node is kept until it is deregistered or the session closed."""
        self._zookeeper.hold(path.below(self._service), meta.to_json())

    def announce(self, server_type: str, index: int, replica: int | None, meta: ServingMeta) -> int:
        """Register a process of no data centre; returns its number, one that nobody has had if `replica` is None."""
        if replica is None:
            beside = self.path(server_type, index, 0).below(self._service).rpartition("/")[0]
            # Eleven digits: a zero, and ZooKeeper's ten.
            name = self._zookeeper.hold_next(f"{beside}/0", meta.to_json()).rpartition("/")[2]
            replica = int(name)
        self.register(self.path(server_type, index, replica), replace(meta, replica=replica))
        return replica

    def deregister(self, path: ServingPath) -> None:
        """Take the announcement back."""
        self._zookeeper.release(path.below(self._service))

    @staticmethod
    def models(zookeeper: ZooKeeper) -> list[str]:
        """Serving models that have, or had, processes."""
        return zookeeper.children(f"{zookeeper.url.root}/service")

    def read(self) -> list[ServingNode]:
        """All of them, whatever their state."""
        found: list[ServingNode] = []
        self.watch(found.extend)()
        return found

    def watch(self, changed: Callable[[list[ServingNode]], None]) -> Callable[[], None]:
        """Call `changed` with all of them, whatever their state, now and after every change, until told to stop."""

        def on_nodes(nodes: Mapping[str, bytes]) -> None:
            changed([found for below in sorted(nodes) if (found := self._node(below, nodes[below]))])

        return self._zookeeper.watch_tree(f"{self._service}/{self.base_name}", on_nodes, depth=3)

    def _node(self, below: str, body: bytes) -> ServingNode | None:
        path = ServingPath.parse(f"/-/service/{self.base_name}/{below}")
        if path is None or path.replica is None:
            return None
        try:
            return ServingNode(path=path, meta=ServingMeta.from_json(body))
        except InvalidRequestError as error:
            log.warning("%s/%s/%s: %s", self._service, self.base_name, below, error)
            return None
