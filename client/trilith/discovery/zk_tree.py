"""Tree: the nodes below a path of ZooKeeper as they were last read, and which of them to read again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from trilith.discovery.watchers import Watchers
from trilith.discovery.zk_client import DENIED, NoNodeError, ZkClient
from trilith.errors import TrilithError

__all__ = ["Tree"]

log = logging.getLogger(__name__)


class Tree:
    """Bodies by path below a root, down to a depth. One thread calls `read`; any may call `mark`.

    A node's watch fires once and is set again by the next read, so nothing is missed between two reads; of several
    changes in between, the last is seen.
    """

    def __init__(
        self, root: str, *, depth: int, accept: Callable[[str], bool], on_event: Callable[[Any], None]
    ) -> None:
        """Begin with everything to be read.

        Args:
            root: Absolute path.
            depth: How many levels below it are read.
            accept: Whether a node, by its path below the root, and what is below it, is of interest.
            on_event: What watches call.
        """
        self.root = root
        self.watchers: Watchers[str, bytes] = Watchers({})
        self.loaded = threading.Event()
        self.error: TrilithError | None = None
        self._depth = depth
        self._accept = accept
        self._on_event = on_event
        self._lock = threading.Lock()
        self._bodies: dict[str, bytes] = {}
        self._stale = {root}

    def mark(self, path: str | None = None) -> None:
        """Have a node read again, if it is of this tree; None: all of them."""
        with self._lock:
            if path is None:
                self._stale |= {self.root, *(f"{self.root}/{below}" for below in self._bodies)}
            elif path == self.root or path.startswith(f"{self.root}/"):
                self._stale.add(path)

    def read(self, client: ZkClient) -> None:
        """Read what is marked, and tell the watchers."""
        with self._lock:
            stale, self._stale = sorted(self._stale), set()
        if not stale:
            return
        bodies = dict(self._bodies)
        try:
            for path in stale:
                self._read_node(client, bodies, path)
            self.error = None
        except DENIED:
            self.error = client.denied(self.root)
            log.error("%s", self.error)
        except BaseException:
            with self._lock:
                self._stale |= set(stale)
            raise
        with self._lock:
            self._bodies = bodies
        self.watchers.publish(bodies)
        self.loaded.set()

    def _read_node(self, client: ZkClient, bodies: dict[str, bytes], path: str) -> None:
        """Read a node and, within the depth, those below it that are new."""
        below = path[len(self.root) + 1 :]
        level = below.count("/") + 1 if below else 0
        if level and (not self._accept(below) or level > self._depth):
            return
        names: set[str] = set()
        try:
            if level:
                bodies[below], _ = client.get(path, self._on_event)
            if level < self._depth:
                names = set(client.names(path, self._on_event))
        except NoNodeError:
            if level:
                bodies.pop(below, None)
            elif client.exists(path, self._on_event) is not None:
                self._read_node(client, bodies, path)  # it has come meanwhile
                return
        prefix = f"{below}/" if below else ""
        known = {each[len(prefix) :].partition("/")[0] for each in bodies if each.startswith(prefix)}
        for name in known - names:
            gone = prefix + name
            for each in [each for each in bodies if each == gone or each.startswith(f"{gone}/")]:
                del bodies[each]
        for name in sorted(names - known):
            self._read_node(client, bodies, f"{path}/{name}")
