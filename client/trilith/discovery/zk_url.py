"""ZkUrl: what a zk:// URL says; the one place where ZooKeeper credentials are known."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode

from trilith.discovery.addresses import check_address
from trilith.errors import InvalidRequestError

__all__ = ["AUTH_VARIABLE", "ZkUrl", "redact"]

AUTH_VARIABLE = "ZK_AUTH"
"""Environment variable with "user:password", where the URL has none."""

DEFAULT_PORT = 2181
DEFAULT_SESSION_S = 10.0

_FORM = "zk://[user:password@]host[:port],…/path[?tls=1&ca=…&cert=…&key=…&session_timeout=…&auth_file=…]"
_TLS_FILES = ("ca", "cert", "key")
_PARAMETERS = frozenset({"tls", "check_hostname", "session_timeout", "auth_file", *_TLS_FILES})
_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def redact(address: str) -> str:
    """The address as it may be shown: without user and password."""
    scheme, separator, rest = address.partition("://")
    if not separator or "@" not in rest:
        return address
    return f"{scheme}://***@{rest.rpartition('@')[2]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ZkUrl:
    """A ZooKeeper ensemble, the node below which a cluster lives, and how to talk to it.

    `str` and `repr` show no credentials.

    Attributes:
        hosts: host:port of the servers.
        root: Absolute path of the cluster's node.
        credentials: "user:password" of digest authentication, or None. With them, only their holder may read or write
            the cluster's nodes.
        session_timeout_s: How long the servers keep a session, and so a member, of whom they hear nothing.
        tls: Talk TLS.
        ca: File of the certificates that sign the servers'; empty: the system's.
        cert: File of this side's certificate.
        key: File of its key.
        check_hostname: A server's certificate must name the host it was reached by.
    """

    hosts: tuple[str, ...]
    root: str
    credentials: str | None = field(default=None, repr=False)
    session_timeout_s: float = DEFAULT_SESSION_S
    tls: bool = False
    ca: str = ""
    cert: str = ""
    key: str = ""
    check_hostname: bool = True

    def __post_init__(self) -> None:
        if not self.hosts:
            raise InvalidRequestError(f"a ZooKeeper URL without a server; write {_FORM}")
        for host in self.hosts:
            check_address(host)
        parts = self.root.split("/")
        if len(parts) < 2 or parts[0] or any(part in {"", ".", ".."} for part in parts[1:]):
            raise InvalidRequestError(
                f"{self.root!r} is no path for a cluster; write one below the top, such as zk://host:2181/trilith/demo"
            )
        if not self.session_timeout_s > 0:
            raise InvalidRequestError(f"session_timeout={self.session_timeout_s:g} is not above 0")
        if self.credentials is not None and not all(self.credentials.partition(":")[::2]):
            raise InvalidRequestError("the ZooKeeper credentials are not of the form user:password")
        if not self.tls and any(getattr(self, name) for name in _TLS_FILES):
            raise InvalidRequestError("ca, cert and key belong to tls=1")
        if bool(self.cert) != bool(self.key):
            raise InvalidRequestError("cert and key belong together: give both or none")

    @classmethod
    def parse(cls, url: str, environ: Mapping[str, str] | None = None) -> ZkUrl:
        """Read a zk:// URL.

        Credentials are taken from the URL (percent-encoded), else from the file that `auth_file` names, else from
        $ZK_AUTH. The URL ends up in process lists; the other two do not.

        Raises:
            InvalidRequestError: It is no such URL; the message shows no credentials.
        """
        environ = os.environ if environ is None else environ
        scheme, separator, rest = url.partition("://")
        if scheme != "zk" or not separator:
            raise InvalidRequestError(f"{redact(url)!r} is no ZooKeeper URL; write {_FORM}")
        before, _, query = rest.partition("?")
        authority, slash, path = before.partition("/")
        user, at, hosts = authority.rpartition("@")
        parameters = _parameters(query)
        try:
            return cls(
                hosts=tuple(_with_port(host.strip()) for host in hosts.split(",") if host.strip()),
                root=slash + path.rstrip("/"),
                credentials=_credentials(unquote(user) if at else None, parameters.get("auth_file"), environ),
                session_timeout_s=_seconds(parameters.get("session_timeout")),
                tls=_boolean("tls", parameters.get("tls", "0")),
                check_hostname=_boolean("check_hostname", parameters.get("check_hostname", "1")),
                **{name: parameters.get(name, "") for name in _TLS_FILES},
            )
        except InvalidRequestError as error:
            # A slash in a password that is not encoded shifts everything: what is wrong could be a part of it.
            shown = error if "@" not in path else f"is the password percent-encoded? Write {_FORM}"
            raise InvalidRequestError(f"{redact(url)!r}: {shown}") from None

    @property
    def public(self) -> ZkUrl:
        """The same without credentials."""
        return replace(self, credentials=None)

    def __str__(self) -> str:
        """The URL, without credentials."""
        parameters: dict[str, str] = {}
        if self.tls:
            parameters["tls"] = "1"
            parameters |= {name: value for name in _TLS_FILES if (value := getattr(self, name))}
            if not self.check_hostname:
                parameters["check_hostname"] = "0"
        if self.session_timeout_s != DEFAULT_SESSION_S:
            parameters["session_timeout"] = f"{self.session_timeout_s:g}"
        query = f"?{urlencode(parameters, quote_via=quote, safe='/')}" if parameters else ""
        return f"zk://{','.join(self.hosts)}{self.root}{query}"


def _with_port(host: str) -> str:
    has_port = ":" in host.rpartition("]")[2]
    return host if has_port else f"{host}:{DEFAULT_PORT}"


def _parameters(query: str) -> dict[str, str]:
    found = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(found) - _PARAMETERS)
    if unknown:
        raise InvalidRequestError(
            f"unknown parameter {unknown[0]!r} of a ZooKeeper URL; there are {sorted(_PARAMETERS)}"
        )
    return found


def _credentials(in_url: str | None, file: str | None, environ: Mapping[str, str]) -> str | None:
    if in_url is not None:
        return in_url
    if file:
        try:
            return Path(file).read_text().strip()
        except OSError as error:
            raise InvalidRequestError(f"cannot read the credentials in {file}: {error.strerror}") from None
    return environ.get(AUTH_VARIABLE) or None


def _seconds(text: str | None) -> float:
    try:
        return DEFAULT_SESSION_S if text is None else float(text)
    except ValueError:
        raise InvalidRequestError(f"session_timeout={text!r} is no number of seconds") from None


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise InvalidRequestError(f"{name}={text!r} is neither 1 nor 0")
    return _BOOLEANS[text.lower()]
