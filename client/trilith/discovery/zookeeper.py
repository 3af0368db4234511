"""ZooKeeper: one session with an ensemble, the ephemeral nodes it keeps alive, and the trees of nodes it watches.

The only module that imports kazoo. Not more than a process needs: its recipes neither take over a node that an expired
session left behind nor notice that somebody took over ours.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kazoo.client import KazooClient
from kazoo.exceptions import (
    AuthFailedError,
    BadVersionError,
    ConnectionClosedError,
    ConnectionLoss,
    InvalidACLError,
    KazooException,
    NoAuthError,
    NodeExistsError,
    NoNodeError,
    NotEmptyError,
    OperationTimeoutError,
    SessionExpiredError,
    SessionMovedError,
)
from kazoo.protocol.states import KazooState
from kazoo.security import CREATOR_ALL_ACL, OPEN_ACL_UNSAFE

from trilith.discovery.watchers import Watchers
from trilith.discovery.zk_url import ZkUrl
from trilith.errors import ClosedError, InternalError, InvalidRequestError, TrilithError, UnavailableError

__all__ = ["MAX_NODE_BYTES", "ZooKeeper"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

MAX_NODE_BYTES = 1_000_000
"""What ZooKeeper takes as one node's body, a little less than its limit of 1 MiB for a whole request."""

_PASSING = (ConnectionLoss, SessionExpiredError, SessionMovedError, OperationTimeoutError, ConnectionClosedError)
_DENIED = (NoAuthError, AuthFailedError, InvalidACLError)
_PAUSE_S = 0.2


@dataclass(slots=True)
class _Held:
    """A node that this process keeps alive; `sessions` are those of its own that may have created it."""

    body: bytes
    sessions: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Tree:
    """What is known of the nodes below a path.

    Attributes:
        root: The path.
        depth: How deep nodes are looked at; 1 is the children only.
        accept: Says by path below the root whether a node is of interest.
        bodies: Body by path below the root, of the nodes seen.
        stale: Absolute paths to read again.
        loaded: Set once the tree was read.
        error: Why it cannot be read.
    """

    root: str
    depth: int
    accept: Callable[[str], bool]
    watchers: Watchers[str, bytes]
    bodies: dict[str, bytes] = field(default_factory=dict)
    stale: set[str] = field(default_factory=set)
    loaded: threading.Event = field(default_factory=threading.Event)
    error: TrilithError | None = None


class _KazooLog(logging.LoggerAdapter[logging.Logger]):
    """Kazoo's log without what it says of requests, credentials among them, and its last warning."""

    last = ""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if level < logging.INFO:
            return
        if level >= logging.WARNING:
            self.last = str(msg) % args if args else str(msg)
        # It warns at every attempt to connect; that the connection is lost, and is back, is said once by ZooKeeper.
        super().log(logging.DEBUG if level < logging.ERROR else level, msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, kwargs


class ZooKeeper:
    """One session; it is renewed when it is lost, with everything it held and watched. Thread-safe.

    A thread of its own puts things right after every change of the connection, after every event, and now and then
    without one. Watchers are called on that thread. While no server can be reached, the state last seen stays.
    """

    def __init__(
        self,
        url: ZkUrl,
        *,
        timeout_s: float = 30.0,
        refresh_s: float = 300.0,
        renewed: Callable[[], None] = lambda: None,
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
        # Out of touch for so long, the session is lost wherever the servers are. A client that begins anew is also let
        # in by servers whose data was wiped: they refuse one that has seen a later state than theirs.
        self._give_up_s = 2 * url.session_timeout_s
        # Whoever has credentials means to keep others out of the cluster's nodes; those above are shared.
        self._acl = CREATOR_ALL_ACL if url.credentials else OPEN_ACL_UNSAFE
        self._log = _KazooLog(log, {})
        self._client = KazooClient(
            hosts=",".join(url.hosts),
            timeout=url.session_timeout_s,
            auth_data=[("digest", url.credentials)] if url.credentials else None,
            # Kazoo would back off for up to an hour.
            connection_retry={"max_tries": -1, "delay": 0.1, "backoff": 2, "max_delay": 1.0},
            logger=self._log,
            use_ssl=url.tls,
            verify_certs=True,
            check_hostname=url.tls and url.check_hostname,
            ca=url.ca or None,
            certfile=url.cert or None,
            keyfile=url.key or None,
        )
        self._lock = threading.Lock()  # of what follows; never held during a request
        self._trees: list[_Tree] = []
        self._held: dict[str, _Held] = {}
        self._holding = threading.RLock()  # held while nodes of `_held` are created or deleted
        self._connected = threading.Event()
        self._interrupted = False
        self._wake = threading.Event()
        self._stopping = threading.Lock()  # held while the client is stopped
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="trilith-zookeeper", daemon=True)
        self._client.add_listener(self._on_state)
        self._client.start_async()
        if not self._connected.wait(timeout_s):
            why = f" ({self._log.last})" if self._log.last else ""
            self._stop_client()
            raise UnavailableError(f"no ZooKeeper at {','.join(url.hosts)} within {timeout_s:g} s{why}")
        self._thread.start()

    def __repr__(self) -> str:
        """Where to, without credentials."""
        return f"ZooKeeper({str(self.url)!r})"

    @property
    def session(self) -> int:
        """Id of the present session; 0 while there is none."""
        known = self._client.client_id
        return int(known[0]) if known else 0

    # ---- nodes ------------------------------------------------------------------------------------------------------

    def hold(self, path: str, body: bytes) -> None:
        """Create an ephemeral node and keep it, through lost sessions too, until it is released or taken over.

        A node that is there already, of whomever, is replaced in one step, so that no watcher sees the place empty.

        Raises:
            UnavailableError: No server could be reached in time.
        """
        with self._holding:
            known = self._held.get(path)
            held = self._held[path] = _Held(body, set(known.sessions) if known else set())
            try:
                self._retry(lambda: self._take(path, held, force=True))
            except BaseException:
                self._held.pop(path, None)
                raise

    def release(self, path: str, body: bytes | None = None) -> None:
        """Delete a node, unless it is another's: another session's if it was held here, of another body if not."""
        with self._holding:
            held = self._held.pop(path, None)

            def delete() -> None:
                try:
                    found, stat = self._get(path)
                    ours = stat.ephemeralOwner in held.sessions if held else (body is None or found == body)
                    if ours:
                        self._wait(self._client.delete_async(path, version=stat.version))
                except (NoNodeError, BadVersionError):
                    pass  # gone, or another's

            self._retry(delete)

    def read(self, path: str) -> bytes | None:
        """A node's body; None if there is no such node."""

        def get() -> bytes | None:
            try:
                return self._get(path)[0]
            except NoNodeError:
                return None

        return self._retry(get)

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
                    body, stat = self._get(path)
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
                        self._create(path, fresh)
                    else:
                        self._wait(self._client.set_async(path, fresh, version=stat.version))
                except (BadVersionError, NodeExistsError, NoNodeError):
                    continue
                return fresh

        return self._retry(attempt)

    def delete(self, path: str) -> None:
        """Delete a node and all below it; nothing there is no error."""

        def below(path: str) -> None:
            try:
                for name in self._wait(self._client.get_children_async(path)):
                    below(f"{path}/{name}")
                self._wait(self._client.delete_async(path))
            except NoNodeError:
                pass

        def attempt() -> None:
            while True:
                try:
                    return below(path)
                except NotEmptyError:
                    continue

        self._retry(attempt)

    def children(self, path: str) -> list[str]:
        """Names of the nodes below `path`, sorted; none if it does not exist."""

        def get() -> list[str]:
            try:
                return sorted(self._wait(self._client.get_children_async(path)))
            except NoNodeError:
                return []

        return self._retry(get)

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
        tree = _Tree(root=root, depth=depth, accept=accept, watchers=Watchers({}))
        tree.stale.add(root)
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

    def _forget(self, tree: _Tree) -> None:
        with self._lock:
            if tree in self._trees:
                self._trees.remove(tree)

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _on_state(self, state: str) -> None:
        if state == KazooState.CONNECTED:
            if self._interrupted:
                log.info("ZooKeeper is back")
            self._interrupted = False
            self._mark_all()
            self._connected.set()
        else:
            if not self._interrupted and not self._closed:
                why = f" ({self._log.last})" if self._log.last else ""
                log.warning("ZooKeeper connection %s; the state last seen stays%s", str(state).lower(), why)
            self._interrupted = True
            self._connected.clear()
        self._wake.set()

    def _on_event(self, event: Any) -> None:
        """Note what changed; a watch fires once and is set again by the next read."""
        if event.path is None:
            return  # the connection's own, told to _on_state
        with self._lock:
            for tree in self._trees:
                if event.path == tree.root or event.path.startswith(f"{tree.root}/"):
                    tree.stale.add(event.path)
        self._wake.set()

    def _mark_all(self) -> None:
        with self._lock:
            for tree in self._trees:
                tree.stale |= {tree.root, *(f"{tree.root}/{path}" for path in tree.bodies)}

    def _run(self) -> None:
        due = time.monotonic() + self._refresh_s
        pause, session = 0.0, self.session
        while not self._closed:
            self._wake.wait(min(pause, max(due - time.monotonic(), 0.0)))
            self._wake.clear()
            if self._closed:
                return
            if not self._connected.is_set():
                self._reconnect()
                pause = 0.0
                continue
            if time.monotonic() >= due:
                due = time.monotonic() + self._refresh_s
                self._mark_all()
            pause = self._refresh_s
            try:
                self._keep_held()
                self._read_stale()
                current = self.session or session
                if current != session:
                    self._renewed()
                    session = current
            except _PASSING:
                pause = _PAUSE_S
            except Exception:
                log.exception("ZooKeeper: trying again")
                pause = 10 * _PAUSE_S

    def _reconnect(self) -> None:
        """Wait for a connection; after a long time, begin anew."""
        if self._connected.wait(self._give_up_s) or self._closed:
            return
        log.warning("ZooKeeper is out of reach for %g s; beginning a new session", self._give_up_s)
        with self._stopping:
            if not self._closed:
                self._client.stop()
                self._client.start_async()

    def _keep_held(self) -> None:
        with self._holding:
            for path, held in list(self._held.items()):
                try:
                    kept = self._take(path, held, force=False)
                except _DENIED as error:
                    log.error("ZooKeeper refuses %s: %s", path, type(error).__name__)
                    continue
                if not kept:
                    log.warning("another process has taken over %s; leaving it", path)
                    del self._held[path]

    def _read_stale(self) -> None:
        with self._lock:
            trees = list(self._trees)
        for tree in trees:
            with self._lock:
                stale, tree.stale = tree.stale, set()
            if not stale:
                continue
            left = set(stale)
            try:
                for path in sorted(stale):
                    self._read_node(tree, path)
                    left.discard(path)
                tree.error = None
            except _DENIED:
                tree.error = self._denied(tree.root)
                log.error("%s", tree.error)
            except BaseException:
                with self._lock:
                    tree.stale |= left
                raise
            tree.watchers.publish(tree.bodies)
            tree.loaded.set()

    def _read_node(self, tree: _Tree, path: str) -> None:
        """Read a node and, within the depth, those below it that are new."""
        below = path[len(tree.root) + 1 :]
        if below and (not tree.accept(below) or below.count("/") >= tree.depth):
            return
        try:
            if below:
                body, _ = self._wait(self._client.get_async(path, watch=self._on_event))
                tree.bodies[below] = body
            if not below or below.count("/") + 1 < tree.depth:
                names = set(self._wait(self._client.get_children_async(path, watch=self._on_event)))
            else:
                return
        except NoNodeError:
            names = set()
            if below:
                tree.bodies.pop(below, None)
            elif self._wait(self._client.exists_async(path, watch=self._on_event)) is not None:
                self._read_node(tree, path)  # it has come meanwhile
                return
        prefix = f"{below}/" if below else ""
        known = {each[len(prefix) :].partition("/")[0] for each in tree.bodies if each.startswith(prefix)}
        for name in known - names:
            gone = prefix + name
            for each in [each for each in tree.bodies if each == gone or each.startswith(f"{gone}/")]:
                del tree.bodies[each]
        for name in sorted(names - known):
            self._read_node(tree, f"{path}/{name}")

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _take(self, path: str, held: _Held, *, force: bool) -> bool:
        """Make the node this session's; False if it belongs to another process and is not to be forced."""
        while True:
            session = self.session
            if not session:
                raise ConnectionLoss
            held.sessions.add(session)
            stat = self._wait(self._client.exists_async(path, watch=self._on_held))
            try:
                if stat is None:
                    self._create(path, held.body, ephemeral=True)
                elif stat.ephemeralOwner == session:
                    body, stat = self._get(path)
                    if body != held.body:
                        self._wait(self._client.set_async(path, held.body, version=stat.version))
                    return True
                elif force or stat.ephemeralOwner in held.sessions:
                    self._replace(path, held.body, stat.version)
                else:
                    return False
            except (NodeExistsError, NoNodeError, BadVersionError):
                pass  # it has changed meanwhile: look again

    def _on_held(self, event: Any) -> None:
        if event.path is not None:
            self._wake.set()

    def _replace(self, path: str, body: bytes, version: int) -> None:
        """Delete and create in one step."""
        transaction = self._client.transaction()
        transaction.delete(path, version=version)
        transaction.create(path, body, acl=self._acl, ephemeral=True)
        for result in self._wait(transaction.commit_async()):
            if isinstance(result, (NoNodeError, BadVersionError, NodeExistsError, *_DENIED)):
                raise result

    def _create(self, path: str, body: bytes, *, ephemeral: bool = False) -> None:
        """Create a node, and the persistent ones above it that are missing."""
        try:
            self._wait(self._client.create_async(path, body, acl=self._acl, ephemeral=ephemeral))
        except NoNodeError:
            self._make_parents(path)
            self._wait(self._client.create_async(path, body, acl=self._acl, ephemeral=ephemeral))

    def _make_parents(self, path: str) -> None:
        parts = path.split("/")
        for end in range(2, len(parts)):
            parent = "/".join(parts[:end])
            inside = parent == self.url.root or parent.startswith(f"{self.url.root}/")
            try:
                self._wait(self._client.create_async(parent, b"", acl=self._acl if inside else OPEN_ACL_UNSAFE))
            except NodeExistsError:
                pass
            except NoAuthError:
                # A parent of the root may be there, and be another's; one below it is ours to have.
                if inside or self._wait(self._client.exists_async(parent)) is None:
                    raise

    def _get(self, path: str) -> tuple[bytes, Any]:
        body, stat = self._wait(self._client.get_async(path))
        return body, stat

    def _wait(self, pending: Any) -> Any:
        try:
            return pending.get(timeout=self._timeout_s)
        except self._client.handler.timeout_exception:
            raise OperationTimeoutError from None

    def _retry(self, attempt: Callable[[], _T]) -> _T:
        """Call until it works or the time is over."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            if self._closed:
                raise ClosedError(f"{self!r} was closed")
            try:
                if self._connected.wait(max(deadline - time.monotonic(), 0.0)):
                    return attempt()
            except _PASSING:
                time.sleep(min(_PAUSE_S, max(deadline - time.monotonic(), 0.0)))
            except _DENIED:
                raise self._denied(self.url.root) from None
            except KazooException as error:
                if self._closed:
                    raise ClosedError(f"{self!r} was closed") from None
                raise InternalError(f"{self!r}: {type(error).__name__}: {error}") from None
            if time.monotonic() >= deadline:
                raise UnavailableError(
                    f"no answer from ZooKeeper at {','.join(self.url.hosts)} within {self._timeout_s:g} s"
                )

    def _denied(self, path: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"ZooKeeper at {','.join(self.url.hosts)} refuses access to {path}: are the credentials right?"
            " (user and password in the URL, or ZK_AUTH=user:password)"
        )

    # ---- the end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the session, and with it the nodes it held."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._wake.set()
        self._connected.set()  # nobody waits for it any longer
        self._stop_client()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _stop_client(self) -> None:
        self._closed = True
        self._client.remove_listener(self._on_state)
        with self._stopping:
            self._client.stop()
            self._client.close()
