"""Containers that serve sub-models, as agents list them in ZooKeeper: who runs where, and which sub-models each has."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from trilith.discovery.addresses import check_address
from trilith.discovery.bodies import NodeBody
from trilith.discovery.zookeeper import ZooKeeper
from trilith.errors import InvalidRequestError

__all__ = ["ContainerServiceInfo", "Containers"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerServiceInfo(NodeBody):
    """The body of a container's node.

    Attributes:
        grpc: host:port of its models over gRPC.
        http: The same over HTTP.
        archon: A second address; kept for those who read it.
        agent: host:port of its agent.
        idc: Data centre.
        debug_info: Text for people.
    """

    describes: ClassVar[str] = "container"
    grpc: str | None = None
    http: str | None = None
    archon: str | None = None
    agent: str | None = None
    idc: str | None = None
    debug_info: str | None = None


class Containers:
    """The containers that have sub-models of one model.

    A container is `<root>/container_service/<cluster>:<id>`; that it has a sub-model says the node
    `<root>/binding/<model>/<sub-model>:<cluster>:<id>`.
    """

    def __init__(self, zookeeper: ZooKeeper, model: str) -> None:
        """Use a session; its URL's path is the namespace."""
        self._zookeeper = zookeeper
        self._model = model

    def watch(self, changed: Callable[[Mapping[str, Mapping[str, str]]], None]) -> Callable[[], None]:
        """Call `changed` until told to stop: by sub-model, the gRPC address by name of every container that has it."""
        lock = threading.Lock()
        bound: Mapping[str, bytes] = {}
        infos: Mapping[str, bytes] | None = None

        def tell() -> None:
            if infos is None:
                return
            found: dict[str, dict[str, str]] = {}
            for binding in sorted(bound):
                sub_model, _, name = binding.partition(":")
                address = _address(name, infos.get(name)) if name else None
                if address is not None:
                    found.setdefault(sub_model, {})[name] = address
            changed(found)

        def on_bindings(nodes: Mapping[str, bytes]) -> None:
            nonlocal bound
            with lock:
                bound = nodes
                tell()

        def on_containers(nodes: Mapping[str, bytes]) -> None:
            nonlocal infos
            with lock:
                infos = nodes
                tell()

        root = self._zookeeper.url.root
        stop_bindings = self._zookeeper.watch_tree(f"{root}/binding/{self._model}", on_bindings)
        try:
            stop_containers = self._zookeeper.watch_tree(f"{root}/container_service", on_containers)
        except BaseException:
            stop_bindings()
            raise

        def stop() -> None:
            stop_bindings()
            stop_containers()

        return stop


def _address(name: str, body: bytes | None) -> str | None:
    """Where a container answers; None, with a word in the log, if it does not say."""
    if body is None:
        return None  # its own node comes and goes apart from its bindings
    try:
        found = ContainerServiceInfo.from_json(body).grpc
        return None if found is None else check_address(found)
    except InvalidRequestError as error:
        log.warning("container %s: %s", name, error)
        return None
