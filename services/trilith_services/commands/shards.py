"""How commands reach the PS of a cluster one by one, also when some of them are down."""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer

from trilith.discovery import PS
from trilith.discovery.members import count_ps, resolve_ps
from trilith.discovery.urls import CLUSTER_FORMS, open_directory

if TYPE_CHECKING:
    from trilith.config import ClientConfig
    from trilith.rpc.remote import RemoteShard

__all__ = ["Address", "Members"]

Address = Annotated[
    str,
    typer.Argument(
        metavar="CLUSTER",
        help=f"{CLUSTER_FORMS}; what `trilith up` prints.",
    ),
]


class Members:
    """The PS of a cluster, wherever the directory says that they are by now."""

    def __init__(self, address: str, *, timeout_s: float = 10.0) -> None:
        """Open the directory at `address`, and wait until it knows how many PS there are."""
        self._directory = open_directory(address, timeout_s=timeout_s)
        try:
            self.count = count_ps(self._directory, timeout_s=timeout_s)
        except BaseException:
            self._directory.close()
            raise

    def addresses(self) -> list[str]:
        """host:port by shard index; empty for a PS that is not there at the moment."""
        found = self._directory.query(PS)
        return [found.get(index, "") for index in range(self.count)]

    def shards(self, config: ClientConfig) -> list[RemoteShard]:
        """A connection to each, by shard index."""
        from trilith.rpc.remote import RemoteShard

        return [
            RemoteShard(partial(resolve_ps, self._directory, index), config, index=index) for index in range(self.count)
        ]

    def __enter__(self) -> Self:
        """Return the members themselves."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the directory."""
        self._directory.close()
