"""How commands reach the PS of a cluster one by one, also when some of them are down."""

from __future__ import annotations

from typing import Annotated

import typer

from trilith.discovery import PS
from trilith.discovery.static import StaticDirectory
from trilith.errors import InvalidRequestError

__all__ = ["Address", "endpoints"]

Address = Annotated[
    str,
    typer.Argument(
        metavar="CLUSTER", help="static://host:port,host:port,… with shard 0 first; what `trilith up` prints."
    ),
]


def endpoints(address: str) -> list[str]:
    """host:port of every PS, by shard index."""
    scheme, separator, rest = address.partition("://")
    if not separator or scheme != "static":
        raise InvalidRequestError(f"{address!r} is no address of running PS; write static://host:port,host:port")
    found = StaticDirectory.parse(rest).query(PS)
    return [found[index] for index in sorted(found)]
