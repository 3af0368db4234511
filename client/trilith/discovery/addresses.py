"""host:port, with IPv6 hosts in brackets; by which others reach this machine, and whether somebody listens at one."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

from trilith.errors import InvalidRequestError

__all__ = ["advertised", "check_address", "ipv6_only", "is_listening", "join_address", "own_host", "split_address"]

_OWN_ADDRESSES = ("MY_HOST_IP", "MY_POD_IP", "MY_HOST_IPV6")
_EVERY_INTERFACE = frozenset({"", "0.0.0.0", "::", "*"})
_PAUSE_S = 0.1


def split_address(address: str) -> tuple[str, int]:
    """Host, without brackets, and port.

    Raises:
        InvalidRequestError: It is not host:port.
    """
    host, colon, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if (
        not colon
        or not bare
        or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536)
        or (":" in bare and bare == host)
        or any(mark.isspace() or mark in "/@,[]" for mark in bare)
    ):
        raise InvalidRequestError(f"{address!r} is not host:port (an IPv6 host stands in brackets: [::1]:7000)")
    return bare, int(port)


def check_address(address: str) -> str:
    """The address itself, if it is host:port."""
    split_address(address)
    return address


def join_address(host: str, port: int) -> str:
    """host:port, the host in brackets if it is IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def own_host(environ: Mapping[str, str] | None = None) -> str:
    """By which host others reach this one.

    The first item of CLOUDNATIVE_INET_ADDR (a comma list), else YARN_INET_ADDR, MY_HOST_IP, MY_POD_IP or
    MY_HOST_IPV6, else the address that packets to other machines leave from, else 127.0.0.1.
    """
    environ = os.environ if environ is None else environ
    for name in ("CLOUDNATIVE_INET_ADDR", "YARN_INET_ADDR", *_OWN_ADDRESSES):
        first = environ.get(name, "").split(",")[0].strip()
        if first:
            return first.strip("[]")
    return _leaves_from(socket.AF_INET) or _leaves_from(socket.AF_INET6) or "127.0.0.1"


def ipv6_only(environ: Mapping[str, str] | None = None) -> bool:
    """Whether this machine has IPv6 addresses alone.

    MY_HOST_IP, MY_POD_IP and MY_HOST_IPV6 say so, if any of them is set; else the ways to other machines.
    """
    environ = os.environ if environ is None else environ
    given = [value for name in _OWN_ADDRESSES if (value := environ.get(name, ""))]
    if given:
        return all(":" in value for value in given)
    return not _leaves_from(socket.AF_INET) and bool(_leaves_from(socket.AF_INET6))


def _leaves_from(family: socket.AddressFamily) -> str:
    """The address that packets to other machines leave from; empty if there is no way to them."""
    elsewhere = "192.0.2.1" if family == socket.AF_INET else "2001:db8::1"
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))  # only looks a route up: nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def advertised(listen: str, port: int, wanted: str = "") -> str:
    """What a server announces.

    Args:
        listen: host:port it was told to listen on.
        port: The port it is bound to.
        wanted: host:port it was told to announce, port 0 for `port`, or a host alone; empty: the host of `listen`, or
            `own_host` if it listens on every interface.
    """
    if wanted:
        host, colon, given = wanted.rpartition(":")
        if not colon or wanted.endswith("]"):
            return check_address(join_address(wanted.strip("[]"), port))
        return check_address(f"{host}:{port}" if given == "0" else wanted)
    host = listen.rpartition(":")[0].strip("[]")
    return check_address(join_address(own_host() if host in _EVERY_INTERFACE else host, port))


def is_listening(address: str, *, timeout_s: float = 1.0) -> bool:
    """Whether host:port accepts a connection, tried until the time is over."""
    host, port = split_address(address)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.001)):
                return True
        except OSError:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(_PAUSE_S, left))
