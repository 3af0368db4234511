"""ZooKeeper: the ephemeral nodes that a process keeps alive in an ensemble, and the trees of nodes it follows.

Kazoo's recipes neither take over a node that an expired session left behind nor notice that somebody took over ours.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trilith.discovery.zk_client import CHANGED, DENIED, PASSING, NoNodeError, NotEmptyError, ZkClient
from trilith.discovery.zk_tree import Tree
from trilith.discovery.zk_url import ZkUrl
from trilith.errors import InvalidRequestError, UnavailableError

__all__ = ["MAX_NODE_BYTES", "ZooKeeper"]

log = logging.getLogger(__name__)

MAX_NODE_BYTES = 1_000_000
"""What ZooKeeper takes as one node's body, a little less than its limit of 1 MiB for a whole request."""

_PAUSE_S = 0.2
_LEAVE_S = 3.0


@dataclass(slots=True)
class _Held:
    """A node that this process keeps alive; `sessions` are those of its own that may have created it."""

    body: bytes
    lost: Callable[[], None]
    sessions: set[int] = field(default_factory=set)


def _nothing() -> None:
    """What to do where nothing is to be done."""


class ZooKeeper:
    """One session; it is renewed when it is lost, with everything it held and followed. Thread-safe.

    A thread of its own puts things right after every change of the connection, after every event, and now and then
    without one. Watchers are called on that thread. While no server can be reached, the state last seen stays.
    """

    def __init__(
        self,
        url: ZkUrl,
        *,
        timeout_s: float = 30.0,
        refresh_s: float = 300.0,
        renewed: Callable[[], None] = _nothing,
    ) -> None:
        """Connect.

        Args:
            url: Where to, and below which node.
            timeout_s: How long to wait for a server, here and in calls.
            refresh_s: Everything is looked at again this often, whether or not an event came.
            renewed: Called when a new session has taken the place of a lost one, and what it held is back.

        Raises:
            UnavailableError: No server could be reached.
        """
        self.url = url.public
        self._timeout_s = timeout_s
        self._refresh_s = refresh_s
        self._renewed = renewed
        self._lock = threading.Lock()  # of _trees
        self._trees: list[Tree] = []
        self._holding = threading.RLock()  # held while nodes of the process's own are created or deleted
        self._held: dict[str, _Held] = {}
        self._leaving: dict[str, tuple[_Held | None, bytes | None]] = {}
        self._wake = threading.Event()
        self._client = ZkClient(url, timeout_s=timeout_s, changed=self._on_connection)
        self._thread = threading.Thread(target=self._run, name="trilith-zookeeper", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        """Where to, without credentials."""
        return f"ZooKeeper({str(self.url)!r})"

    @property
    def session(self) -> int:
        """Id of the present session; 0 while there is none."""
        return self._client.session

    # ---- nodes of the process's own ---------------------------------------------------------------------------------

    def hold(self, path: str, body: bytes, *, lost: Callable[[], None] = _nothing) -> None:
        """Create an ephemeral node and keep it, through lost sessions too, until it is released or taken over.

        A node that is there already, of whomever, is replaced in one step, so that no watcher sees the place empty.

        Args:
            path: The node.
            body: Its content.
            lost: Called, on this object's thread, when another process has taken the node over.

        Raises:
            UnavailableError: No server could be reached in time.
        """
        self._hold(path, body, lost, force=True)

    def claim(self, path: str, body: bytes, *, lost: Callable[[], None] = _nothing) -> bool:
        """Like `hold`, unless the node is there already, of whomever: then nothing happens, and it is False."""
        return self._hold(path, body, lost, force=False)

    def hold_next(self, prefix: str, body: bytes) -> str:
        """Hold a node whose path is `prefix` and a number of ten digits, one that no node there has had; its path."""
        asked: list[int] = []

        def create() -> str:
            session = self._client.need_session()
            if session in asked and (made := self._made(prefix, session)):
                return made
            asked.append(session)
            return self._client.create(prefix, body, ephemeral=True, sequence=True)

        with self._holding:
            path = self._client.retry(create)
            self.hold(path, body)
        return path

    def _made(self, prefix: str, session: int) -> str | None:
        """The node that was created although the answer was lost."""
        parent, _, begin = prefix.rpartition("/")
        for name in self.children(parent):
            path = f"{parent}/{name}"
            if name.startswith(begin) and path not in self._held:
                stat = self._client.exists(path)
                if stat is not None and stat.ephemeralOwner == session:
                    return path
        return None

    def _hold(self, path: str, body: bytes, lost: Callable[[], None], *, force: bool) -> bool:
        with self._holding:
            self._leaving.pop(path, None)
            known = self._held.get(path)
            held = self._held[path] = _Held(body, lost, set(known.sessions) if known else set())
            kept = False
            try:
                kept = self._client.retry(lambda: self._take(path, held, force=force))
            finally:
                if not kept:
                    del self._held[path]
            return kept

    def release(self, path: str, body: bytes | None = None) -> None:
        """Delete a node, unless it is another's: another session's if it was held here, of another body if not.

        Raises:
            UnavailableError: No server could be reached within a few seconds, so that a process which ends is not kept;
                it is done when one can.
        """
        with self._holding:
            self._leaving[path] = (self._held.pop(path, None), body)
            self._client.retry(lambda: self._leave(path), timeout_s=min(self._timeout_s, _LEAVE_S))

    def _take(self, path: str, held: _Held, *, force: bool) -> bool:
        """Make the node this session's; False if it belongs to another process and is not to be forced."""
        client = self._client
        while True:
            session = client.need_session()
            held.sessions.add(session)
            stat = client.exists(path, self._on_held)
            try:
                if stat is None:
                    client.create(path, held.body, ephemeral=True)
                elif stat.ephemeralOwner == session:
                    body, stat = client.get(path)
                    if body != held.body:
                        client.set(path, held.body, stat.version)
                    return True
                elif force or stat.ephemeralOwner in held.sessions:
                    client.replace(path, held.body, stat.version)
                else:
                    return False
            except CHANGED:
                pass  # look again

    def _leave(self, path: str) -> None:
        """Delete a node that was released."""
        held, body = self._leaving[path]
        try:
            found, stat = self._client.get(path)
            if stat.ephemeralOwner in held.sessions if held else body in (None, found):
                self._client.delete(path, stat.version)
        except CHANGED:
            pass  # gone, or another's
        del self._leaving[path]

    # ---- persistent nodes -------------------------------------------------------------------------------------------

    def read(self, path: str) -> bytes | None:
        """A node's body; None if there is no such node."""

        def get() -> bytes | None:
            try:
                return self._client.get(path)[0]
            except NoNodeError:
                return None

        return self._client.retry(get)

    def update(self, path: str, change: Callable[[bytes | None], bytes | None]) -> bytes | None:
        """Change a persistent node by comparing and setting.

        Args:
            path: The node; it is created, and its parents, if it does not exist.
            change: From the body (None if there is no node) to the new body, or None to leave it. Called again if
                somebody else was faster.

        Returns:
            The body as it is now.
        """

        def attempt() -> bytes | None:
            while True:
                try:
                    body, stat = self._client.get(path)
                except NoNodeError:
                    body, stat = None, None
                fresh = change(body)
                if fresh is None:
                    return body
                if len(fresh) > MAX_NODE_BYTES:
                    raise InvalidRequestError(
                        f"{path} would hold {len(fresh)} bytes; ZooKeeper takes {MAX_NODE_BYTES} in one node"
                    )
                try:
                    if stat is None:
                        self._client.create(path, fresh)
                    else:
                        self._client.set(path, fresh, stat.version)
                except CHANGED:
                    continue
                return fresh

        return self._client.retry(attempt)

    def delete(self, path: str) -> None:
        """Delete a node and all below it; nothing there is no error."""

        def below(path: str) -> None:
            try:
                for name in self._client.names(path):
                    below(f"{path}/{name}")
                self._client.delete(path)
            except NoNodeError:
                pass

        def attempt() -> None:
            while True:
                try:
                    return below(path)
                except NotEmptyError:
                    continue

        self._client.retry(attempt)

    def children(self, path: str) -> list[str]:
        """Names of the nodes below `path`, sorted; none if it does not exist."""

        def get() -> list[str]:
            try:
                return sorted(self._client.names(path))
            except NoNodeError:
                return []

        return self._client.retry(get)

    # ---- trees ------------------------------------------------------------------------------------------------------

    def watch_tree(
        self,
        root: str,
        changed: Callable[[Mapping[str, bytes]], None],
        *,
        depth: int = 1,
        accept: Callable[[str], bool] = lambda path: True,
    ) -> Callable[[], None]:
        """Follow the nodes below `root`, which may come to be later.

        Args:
            root: Absolute path.
            changed: Gets the body by path below the root, first now, then after every change, until the returned
                function is called.
            depth: How many levels below the root are followed.
            accept: Whether a node, by its path below the root, and what is below it, is followed.

        Raises:
            UnavailableError: It could not be read in time.
        """
        tree = Tree(root, depth=depth, accept=accept, on_event=self._on_event)
        with self._lock:
            self._trees.append(tree)
        self._wake.set()
        if not tree.loaded.wait(self._timeout_s) or tree.error:
            self._forget(tree)
            raise tree.error or UnavailableError(f"{self!r}: {root} could not be read within {self._timeout_s:g} s")
        stop = tree.watchers.add(changed)

        def forget() -> None:
            stop()
            self._forget(tree)

        return forget

    def _forget(self, tree: Tree) -> None:
        with self._lock:
            if tree in self._trees:
                self._trees.remove(tree)

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _on_connection(self) -> None:
        # Watches were lost with it.
        self._mark()
        self._wake.set()

    def _on_event(self, event: Any) -> None:
        if event.path is not None:  # otherwise the connection's own, which _on_connection is told of
            self._mark(event.path)
            self._wake.set()

    def _on_held(self, event: Any) -> None:
        if event.path is not None:
            self._wake.set()

    def _mark(self, path: str | None = None) -> None:
        with self._lock:
            for tree in self._trees:
                tree.mark(path)

    def _run(self) -> None:
        client = self._client
        due = time.monotonic() + self._refresh_s
        pause, session = 0.0, client.session
        while not client.closed:
            self._wake.wait(min(pause, max(due - time.monotonic(), 0.0)))
            self._wake.clear()
            if not client.connected.is_set():
                client.reconnect()
                pause = 0.0
                continue
            if client.closed:
                return
            if time.monotonic() >= due:
                due = time.monotonic() + self._refresh_s
                self._mark()
            pause = self._refresh_s
            try:
                self._keep_held()
                with self._lock:
                    trees = list(self._trees)
                for tree in trees:
                    tree.read(client)
                current = client.session or session
                if current != session:
                    self._renewed()
                    session = current
            except PASSING:
                pause = _PAUSE_S
            except Exception:
                log.exception("ZooKeeper: trying again")
                pause = 10 * _PAUSE_S

    def _keep_held(self) -> None:
        lost: list[Callable[[], None]] = []
        with self._holding:
            for path in list(self._leaving):
                self._leave(path)
            for path, held in list(self._held.items()):
                try:
                    kept = self._take(path, held, force=False)
                except DENIED as error:
                    log.error("ZooKeeper refuses %s: %s", path, type(error).__name__)
                    continue
                if not kept:
                    log.warning("another process has taken over %s; leaving it", path)
                    del self._held[path]
                    lost.append(held.lost)
        for call in lost:
            call()

    def close(self) -> None:
        """End the session, and with it the nodes it held."""
        if self._client.closed:
            return
        self._client.close()
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
