"""ZkClient: one kazoo client, its requests with deadlines, its connection; the only module that imports kazoo."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
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
    WriterNotClosedException,
)
from kazoo.protocol.states import KazooState
from kazoo.security import CREATOR_ALL_ACL, OPEN_ACL_UNSAFE

from trilith.discovery.zk_url import ZkUrl
from trilith.errors import ClosedError, InternalError, InvalidRequestError, UnavailableError
from trilith.runtime.waiting import Wait

__all__ = [
    "CHANGED",
    "DENIED",
    "PASSING",
    "BadVersionError",
    "NoNodeError",
    "NodeExistsError",
    "NotEmptyError",
    "ZkClient",
]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

PASSING = (ConnectionLoss, SessionExpiredError, SessionMovedError, OperationTimeoutError, ConnectionClosedError)
"""What goes by when a server can be reached again."""
DENIED = (NoAuthError, AuthFailedError, InvalidACLError)
"""What different credentials would help against."""
CHANGED = (BadVersionError, NodeExistsError, NoNodeError)
"""The node is not as it was when it was looked at."""

_PAUSE_S = 0.2


class _KazooLog(logging.LoggerAdapter[logging.Logger]):
    """Kazoo's log without what it says of requests, credentials among them, and its last warning."""

    last = ""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if level < logging.INFO:
            return
        if level >= logging.WARNING:
            self.last = str(msg) % args if args else str(msg)
        # It warns at every attempt to connect; that the connection is lost, and is back, is said once by ZkClient.
        super().log(logging.DEBUG if level < logging.ERROR else level, msg, *args, **kwargs)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, kwargs


class ZkClient:
    """A connection that is made again for as long as it takes, and a session that is renewed when it is lost.

    Requests raise kazoo's errors, unless they are made through `retry`. Thread-safe.
    """

    def __init__(self, url: ZkUrl, *, timeout_s: float, changed: Callable[[], None]) -> None:
        """Connect.

        Args:
            url: Where to, and below which node the cluster's own nodes are.
            timeout_s: How long to wait for a server, here and in requests.
            changed: Called when the connection has come or gone; must not wait.

        Raises:
            UnavailableError: No server could be reached.
        """
        self.url = url.public
        self.timeout_s = timeout_s
        self.connected = threading.Event()
        self.closed = False
        self._changed = changed
        self._interrupted = False
        self._stopping = threading.Lock()
        # Whoever has credentials means to keep others out of the cluster's nodes; those above are shared.
        self._acl = CREATOR_ALL_ACL if url.credentials else OPEN_ACL_UNSAFE
        self._log = _KazooLog(log, {})
        self.kazoo = KazooClient(
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
        self.kazoo.add_listener(self._on_state)
        self.kazoo.start_async()
        waiting = self._wait_for_servers(timeout_s)
        connected = self.connected.wait(timeout_s)
        waiting.end(came=connected)
        if not connected:
            why = f" ({self._log.last})" if self._log.last else ""
            self.close()
            raise UnavailableError(f"no ZooKeeper at {self.hosts} within {timeout_s:g} s{why}")

    @property
    def hosts(self) -> str:
        """The servers, for messages."""
        return ",".join(self.url.hosts)

    @property
    def session(self) -> int:
        """Id of the present session; 0 while there is none."""
        known = self.kazoo.client_id
        return int(known[0]) if known else 0

    # ---- the connection ---------------------------------------------------------------------------------------------

    def _on_state(self, state: str) -> None:
        if state == KazooState.CONNECTED:
            if self._interrupted:
                log.info("ZooKeeper is back")
            self._interrupted = False
            self.connected.set()
        else:
            if not self._interrupted and not self.closed:
                why = f" ({self._log.last})" if self._log.last else ""
                log.warning("ZooKeeper connection %s; the state last seen stays%s", str(state).lower(), why)
            self._interrupted = True
            self.connected.clear()
        self._changed()

    def reconnect(self) -> None:
        """Wait for a connection; begin anew if there is none for twice the session's timeout.

        By then the session is lost wherever the servers are. A client that begins anew is also let in by servers whose
        data was wiped: they refuse one that has seen a later state than theirs.
        """
        patience_s = 2 * self.url.session_timeout_s
        if self.connected.wait(patience_s) or self.closed:
            return
        log.warning("ZooKeeper is out of reach for %g s; beginning a new session", patience_s)
        with self._stopping, suppress(WriterNotClosedException):  # it hangs: next time, then
            if not self.closed:
                self.kazoo.stop()
                self.kazoo.start_async()

    def close(self) -> None:
        """End the session, and with it its ephemeral nodes."""
        self.closed = True
        self.kazoo.remove_listener(self._on_state)
        self.connected.set()  # nobody needs to wait any longer
        with self._stopping, suppress(WriterNotClosedException):  # its thread, a daemon, hangs at a server that does
            self.kazoo.stop()
            self.kazoo.close()

    # ---- requests ---------------------------------------------------------------------------------------------------

    def get(self, path: str, watch: Callable[[Any], None] | None = None) -> tuple[bytes, Any]:
        """Body and stat of a node."""
        body, stat = self._wait(self.kazoo.get_async(path, watch=watch))
        return body, stat

    def exists(self, path: str, watch: Callable[[Any], None] | None = None) -> Any:
        """Stat of a node; None if there is none."""
        return self._wait(self.kazoo.exists_async(path, watch=watch))

    def names(self, path: str, watch: Callable[[Any], None] | None = None) -> list[str]:
        """Names of the nodes below one."""
        return list(self._wait(self.kazoo.get_children_async(path, watch=watch)))

    def set(self, path: str, body: bytes, version: int) -> None:
        """Change a node, if it is of that version."""
        self._wait(self.kazoo.set_async(path, body, version=version))

    def delete(self, path: str, version: int = -1) -> None:
        """Delete a node, if it is of that version."""
        self._wait(self.kazoo.delete_async(path, version=version))

    def create(self, path: str, body: bytes, *, ephemeral: bool = False, sequence: bool = False) -> str:
        """Create a node, and the persistent ones above it that are missing; returns its path.

        With `sequence` that is `path` and ten digits, a number that no node beside it has had.
        """
        how: dict[str, Any] = {"acl": self._acl, "ephemeral": ephemeral, "sequence": sequence}
        try:
            return str(self._wait(self.kazoo.create_async(path, body, **how)))
        except NoNodeError:
            self._make_parents(path)
            return str(self._wait(self.kazoo.create_async(path, body, **how)))

    def replace(self, path: str, body: bytes, version: int) -> None:
        """Delete a node of that version and create it as this session's ephemeral one, in one step."""
        transaction = self.kazoo.transaction()
        transaction.delete(path, version=version)
        transaction.create(path, body, acl=self._acl, ephemeral=True)
        for result in self._wait(transaction.commit_async()):
            if isinstance(result, (*CHANGED, *DENIED)):
                raise result

    def _make_parents(self, path: str) -> None:
        parts = path.split("/")
        for end in range(2, len(parts)):
            parent = "/".join(parts[:end])
            inside = parent == self.url.root or parent.startswith(f"{self.url.root}/")
            try:
                self._wait(self.kazoo.create_async(parent, b"", acl=self._acl if inside else OPEN_ACL_UNSAFE))
            except NodeExistsError:
                pass
            except NoAuthError:
                # A parent of the root may be there, and be another's; one below it is ours to have.
                if inside or self.exists(parent) is None:
                    raise

    def _wait_for_servers(self, timeout_s: float) -> Wait:
        waiting = Wait(f"ZooKeeper at {self.hosts}", most=timeout_s)
        waiting.why = lambda: self._log.last
        return waiting.begin()

    def _wait(self, pending: Any) -> Any:
        try:
            return pending.get(timeout=self.timeout_s)
        except self.kazoo.handler.timeout_exception:
            raise OperationTimeoutError from None

    def need_session(self) -> int:
        """Id of the present session.

        Raises:
            ConnectionLoss: There is none at the moment.
        """
        session = self.session
        if not session:
            raise ConnectionLoss
        return session

    def retry(self, attempt: Callable[[], _T], *, timeout_s: float | None = None) -> _T:
        """Call `attempt` until it works.

        Raises:
            UnavailableError: It did not within the time.
            InvalidRequestError: The servers refuse the credentials.
            ClosedError: The client was closed.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        waiting: Wait | None = None
        came = False
        try:
            while True:
                if self.closed:
                    raise ClosedError(f"the connection to ZooKeeper at {self.hosts} was closed")
                try:
                    if waiting is None and not self.connected.is_set():
                        waiting = self._wait_for_servers(timeout_s)
                    if self.connected.wait(max(deadline - time.monotonic(), 0.0)):
                        done = attempt()
                        came = True
                        return done
                except PASSING:
                    time.sleep(min(_PAUSE_S, max(deadline - time.monotonic(), 0.0)))
                except DENIED:
                    raise self.denied(self.url.root) from None
                except KazooException as error:
                    raise InternalError(f"ZooKeeper at {self.hosts}: {type(error).__name__}: {error}") from None
                if time.monotonic() >= deadline:
                    raise UnavailableError(f"no answer from ZooKeeper at {self.hosts} within {timeout_s:g} s")
        finally:
            if waiting is not None:
                waiting.end(came=came)

    def denied(self, path: str) -> InvalidRequestError:
        """What to raise when the servers refuse access to a node."""
        return InvalidRequestError(
            f"ZooKeeper at {self.hosts} refuses access to {path}: are the credentials right?"
            " (user and password in the URL, or ZK_AUTH=user:password)"
        )
