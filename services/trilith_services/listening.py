"""Where servers listen, and what is said where fewer reach them than was meant."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable

from trilith.discovery import PS
from trilith.discovery.addresses import advertised
from trilith.discovery.urls import open_directory
from trilith.discovery.zk_url import ZkUrl, redact
from trilith.errors import InvalidRequestError, UnavailableError
from trilith.runtime.exposure import is_loopback

__all__ = ["LOOPBACK", "bind", "bind_address", "reached_by_others"]

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
"""Where servers listen unless they are told otherwise: no other machine reaches it."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, port 0 for a free one; an empty host is every interface.

    Raises:
        UnavailableError: The address is taken, or not this machine's.
    """
    bare = host.strip("[]")
    try:
        found = socket.getaddrinfo(bare or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(found[0][4][:2], family=found[0][0], backlog=128)
    except OSError as error:
        raise UnavailableError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


def bind_address(listen: str) -> socket.socket:
    """A listening socket on host:port, port 0 for a free one; an empty host is every interface.

    Raises:
        InvalidRequestError: `listen` is not host:port.
        UnavailableError: The address is taken, or not this machine's.
    """
    host, colon, port = listen.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not (port.isascii() and port.isdigit() and int(port) < 65536) or (":" in bare and bare == host):
        raise InvalidRequestError(f"{listen!r} is not host:port (an IPv6 host stands in brackets: [::1]:8080)")
    return bind(host, int(port))


def reached_by_others(listen: str, advertise: str, directory: str | None) -> Callable[[int], None]:
    """What a server does once it knows its port: it warns where others are told of an address that they do not reach.

    Args:
        listen: host:port it was told to listen on.
        advertise: What it was told to announce; empty: nothing.
        directory: URL of the directory it is announced in; None: none.
    """

    def bound(port: int) -> None:
        if directory is None or not is_loopback(listen.rpartition(":")[0]):
            return
        at = advertised(listen, port, advertise)
        if is_loopback(at.rpartition(":")[0]) and all(map(is_loopback, _hosts_of(directory))):
            return
        log.warning(
            "announced in %s as %s, but listens on %s, which no other machine reaches: "
            "give --listen 0.0.0.0:%d, or an address of this machine that the others reach",
            redact(directory),
            at,
            listen,
            port,
        )

    return bound


def _hosts_of(directory: str) -> Iterable[str]:
    """The machines that a directory's URL, or its list, names; none for a folder of files."""
    scheme = directory.partition("://")[0]
    if scheme == "hosts":
        return ()
    addresses = ZkUrl.parse(directory).hosts if scheme == "zk" else open_directory(directory).query(PS).values()
    return [address.rpartition(":")[0] for address in addresses]
