"""A cluster in ZooKeeper: members as ephemeral nodes `<root>/<role>.<index>`, and its record in `<root>/cluster`."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping

from trilith.discovery.addresses import check_address
from trilith.discovery.record import ClusterRecord
from trilith.discovery.watchers import Watchers
from trilith.discovery.zk_url import ZkUrl
from trilith.discovery.zookeeper import ZooKeeper
from trilith.errors import InvalidRequestError

__all__ = ["ZooKeeperDirectory"]

log = logging.getLogger(__name__)

_MEMBER = re.compile(r"(?P<role>\w[-\w]*)\.(?P<index>\d+)", re.ASCII)
_RECORD = "cluster"


class ZooKeeperDirectory:
    """Members as ephemeral nodes whose body is the address.

    A member's node lives as long as its session, is created again when the session was lost, and belongs to whoever
    registered last: a process that restarts before its old session expired replaces the node that this left behind.
    `query` answers from what the watches last told and never goes to a server.
    """

    def __init__(self, url: ZkUrl | str, *, timeout_s: float = 30.0) -> None:
        """Connect, and read who is there.

        Args:
            url: Where to, and below which node.
            timeout_s: How long to wait for a server, here and in calls.

        Raises:
            UnavailableError: No server could be reached.
            InvalidRequestError: The servers refuse the credentials, or want some.
        """
        url = ZkUrl.parse(url) if isinstance(url, str) else url
        self.root = url.root
        self.replaced: Callable[[str, int], None] = lambda role, index: None
        """Told of role and index when another process has taken a registered member's place; must not wait."""
        self._agreed: tuple[ClusterRecord, str] | None = None
        self.zookeeper = ZooKeeper(url, timeout_s=timeout_s, renewed=self._restore_record)
        self._lock = threading.Lock()
        self._roles: dict[str, Watchers[int, str]] = {}
        self._members: dict[str, dict[int, str]] = {}
        try:
            self.zookeeper.watch_tree(
                self.root, self._on_members, accept=lambda name: _MEMBER.fullmatch(name) is not None
            )
        except BaseException:
            self.zookeeper.close()
            raise

    def __repr__(self) -> str:
        """Where to, without credentials."""
        return f"ZooKeeperDirectory({str(self.zookeeper.url)!r})"

    def register(self, role: str, index: int, address: str) -> None:
        """Create the member's node, replacing one that is there, and keep it."""
        check_address(address)
        self.zookeeper.hold(self._path(role, index), address.encode(), lost=lambda: self.replaced(role, index))

    def deregister(self, role: str, index: int, address: str) -> None:
        """Delete the member's node, unless another process has taken the place."""
        self.zookeeper.release(self._path(role, index), address.encode())

    def claim(self, role: str, index: int) -> bool:
        """Take a place that is to be filled, so that no two do so at once; False if another process has it.

        The claim lasts until `unclaim`, or until the session ends. It says nothing of who is registered.
        """
        return self.zookeeper.claim(self._claim_path(role, index), b"")

    def unclaim(self, role: str, index: int) -> None:
        """Give a claim back."""
        self.zookeeper.release(self._claim_path(role, index))

    def _claim_path(self, role: str, index: int) -> str:
        return f"{self.root}/claims/{role}.{index}"

    def query(self, role: str) -> Mapping[int, str]:
        """Return what the watches last told."""
        with self._lock:
            return dict(self._members.get(role, {}))

    def watch(self, role: str, changed: Callable[[Mapping[int, str]], None]) -> Callable[[], None]:
        """Follow the nodes of a role."""
        with self._lock:
            watchers = self._roles.get(role)
            if watchers is None:
                watchers = self._roles[role] = Watchers(self._members.get(role, {}))
        return watchers.add(changed)

    def _on_members(self, nodes: Mapping[str, bytes]) -> None:
        members: dict[str, dict[int, str]] = {}
        for name, body in nodes.items():
            found = _MEMBER.fullmatch(name)
            try:
                address = check_address(body.decode())
            except (UnicodeDecodeError, InvalidRequestError):
                log.warning("%s/%s holds no address: %r", self.root, name, body[:100])
                continue
            if found is not None:
                members.setdefault(found["role"], {})[int(found["index"])] = address
        members = {role: dict(sorted(each.items())) for role, each in members.items()}
        with self._lock:
            self._members = members
            watched = list(self._roles.items())
        for role, watchers in watched:
            watchers.publish(members.get(role, {}))

    def _path(self, role: str, index: int) -> str:
        name = f"{role}.{index}"
        if not _MEMBER.fullmatch(name):
            raise InvalidRequestError(f"{role!r} {index} is no member; a role is a word and an index 0 or more")
        return f"{self.root}/{name}"

    # ---- the record -------------------------------------------------------------------------------------------------

    def read_record(self) -> ClusterRecord | None:
        """See `RecordKeeper`."""
        body = self.zookeeper.read(f"{self.root}/{_RECORD}")
        return ClusterRecord.from_json(body) if body else None

    def agree(self, ours: ClusterRecord, who: str) -> ClusterRecord:
        """See `RecordKeeper`."""

        def change(body: bytes | None) -> bytes | None:
            if not body:
                return ours.to_json()
            recorded = ClusterRecord.from_json(body)
            recorded.check(ours, who)
            merged = recorded.merged(ours)
            return None if merged == recorded else merged.to_json()

        body = self.zookeeper.update(f"{self.root}/{_RECORD}", change)
        with self._lock:
            known = self._agreed[0] if self._agreed else ours
            self._agreed = (known.merged(ours), who)
        return ClusterRecord.from_json(body) if body else ours

    def _restore_record(self) -> None:
        """Write what was agreed on once more: with the session, the servers may have lost their data."""
        with self._lock:
            agreed = self._agreed
        if agreed is not None and self.zookeeper.read(f"{self.root}/{_RECORD}") is None:
            self.agree(*agreed)

    def forget(self) -> None:
        """Delete the record: the next PS writes another."""
        with self._lock:
            self._agreed = None
        self.zookeeper.delete(f"{self.root}/{_RECORD}")

    def close(self) -> None:
        """End the session, and with it the nodes of members registered here."""
        self.zookeeper.close()
