"""Who reaches a server, by the host that it listens on, and what is said where that is more than this machine."""

from __future__ import annotations

import ipaddress
import logging
import socket

__all__ = ["is_loopback", "warn_if_exposed"]

log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone; a name is, if all that it stands for is."""
    bare = host.strip("[]").partition("%")[0]
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        pass
    if not bare:
        return False
    try:
        found = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(place[4][0]).partition("%")[0]).is_loopback for place in found)


def warn_if_exposed(what: str, host: str, port: int) -> None:
    """Say loudly that others than this machine reach a server: nothing of ours encrypts, or asks who calls."""
    if not is_loopback(host):
        log.warning(
            "%s listens on %s:%d, beyond this machine, in plain text and without a login: whoever reaches that address "
            "may do everything it offers; for trusted networks only",
            what,
            host or "every interface",
            port,
        )
