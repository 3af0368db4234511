"""Where the members of a cluster are: one Directory protocol, one module per backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

__all__ = ["PS", "Directory"]

PS = "ps"
"""Role of the parameter servers."""


class Directory(Protocol):
    """A list of a cluster's members by role and index, which may change while the cluster runs."""

    def register(self, role: str, index: int, address: str) -> None:
        """Announce that `address` now serves as member `index` of `role`."""

    def deregister(self, role: str, index: int, address: str) -> None:
        """Take the announcement back, unless another address has taken the place over."""

    def query(self, role: str) -> Mapping[int, str]:
        """Return address by index."""

    def watch(self, role: str, changed: Callable[[Mapping[int, str]], None]) -> Callable[[], None]:
        """Call `changed` with every new state, the current one first, until the returned function is called."""

    def close(self) -> None:
        """Release connections."""
