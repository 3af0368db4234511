"""A cluster given as a list of addresses: nothing registers, nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from trilith.discovery import PS
from trilith.discovery.addresses import check_address
from trilith.errors import InvalidRequestError

__all__ = ["StaticDirectory"]


class StaticDirectory:
    """PS addresses in shard order."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """Take host:port addresses, shard 0 first."""
        if not addresses:
            raise InvalidRequestError("the list of PS is empty; write static://host:port,host:port")
        for address in addresses:
            check_address(address)
        if len(set(addresses)) < len(addresses):
            raise InvalidRequestError(f"the list of PS names an address twice: {','.join(addresses)}")
        self._ps = dict(enumerate(addresses))

    @classmethod
    def parse(cls, hosts: str) -> StaticDirectory:
        """Read "host:port,host:port"."""
        return cls([part.strip() for part in hosts.split(",") if part.strip()])

    def register(self, role: str, index: int, address: str) -> None:
        """Do nothing: a list is complete from the start."""

    def deregister(self, role: str, index: int, address: str) -> None:
        """Do nothing: a list does not shrink."""

    def query(self, role: str) -> Mapping[int, str]:
        """Return address by index."""
        return dict(self._ps) if role == PS else {}

    def watch(self, role: str, changed: Callable[[Mapping[int, str]], None]) -> Callable[[], None]:
        """Call `changed` once; nothing changes afterwards."""
        changed(self.query(role))
        return lambda: None

    def close(self) -> None:
        """Hold nothing, release nothing."""
