"""Where the members of a cluster are: one Directory protocol, one module per backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

__all__ = ["PS", "WORKER", "Directory"]

PS = "ps"
"""Role of the parameter servers."""
WORKER = "worker"
"""Role of the training processes; the chief is worker 0."""


class Directory(Protocol):
    """A list of a cluster's members by role and index, which may change while the cluster runs.

    Thread-safe. A member is announced as "host:port", an IPv6 host in brackets. Backends whose list is given once
    (static, TF_CONFIG) take announcements for granted: registering there does nothing.
    """

    def register(self, role: str, index: int, address: str) -> None:
        """Announce that `address` now serves as member `index` of `role`; whoever was announced before is replaced.

        Raises:
            InvalidRequestError: The address is not host:port, or the backend knows that it cannot be this member's.
            UnavailableError: The directory cannot be reached.
        """

    def deregister(self, role: str, index: int, address: str) -> None:
        """Take the announcement back, unless another address has taken the place over; nothing there is no error."""

    def query(self, role: str) -> Mapping[int, str]:
        """Return address by index, as far as known; empty for a role without members."""

    def watch(self, role: str, changed: Callable[[Mapping[int, str]], None]) -> Callable[[], None]:
        """Call `changed` with every new state, the current one first, until the returned function is called.

        Calls come one at a time, from a thread of the directory's. What `changed` raises is logged.
        """

    def close(self) -> None:
        """Withdraw what was registered through this object, where the backend can, and release connections."""
