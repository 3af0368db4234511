"""Who may ask a console: by which names, from which pages, with what and how much in the body.

A page that somebody visits can make a browser ask any address it reaches, 127.0.0.1 too. What such a page may then read
or change is decided by names: one that makes its own name stand for this machine's address (DNS rebinding) is told by
the Host header, one that posts from elsewhere by Origin and by what the body is said to be.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, MutableMapping
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from trilith.errors import InvalidRequestError
from trilith.runtime.exposure import is_loopback
from trilith_services.http.failures import failure

__all__ = ["Guard"]

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_MOST_BYTES = 16 << 20
_LOCAL_NAMES = frozenset({"localhost", "ip6-localhost"})

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]


class Guard:
    """Stands before an application."""

    def __init__(self, app: _App, *, hosts: Collection[str] = ()) -> None:
        """Let requests through that are addressed to this machine's loopback names, or to one of `hosts`.

        Args:
            app: What is guarded.
            hosts: Further names or addresses it may be asked by, without ports. The address that a connection came in
                by needs not be among them: pages can choose names, but not what an address stands for.
        """
        self._app = app
        self._hosts = frozenset(host.strip("[]").lower() for host in hosts)

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """See ASGI."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        status, why = refusal
        await failure(status, InvalidRequestError.__name__, why)(scope, receive, send)

    def _refusal(self, scope: _Message) -> tuple[HTTPStatus, str] | None:
        headers = Headers(scope=scope)
        given = headers.getlist("host")
        # HTTP/1.0 has no Host, and no browser speaks it: health checks do.
        if given and (len(given) > 1 or not self._is_ours(_host_of(f"//{given[0]}"), scope)):
            why = f"this console is not asked as {given[-1]!r}; start it with --allowed-host for a name it has"
            return HTTPStatus.FORBIDDEN, why
        if scope["type"] == "websocket" or scope["method"] not in _READS:
            origin = headers.get("origin")
            if origin is not None and (not given or urlsplit(origin).netloc.lower() != given[0].lower()):
                return HTTPStatus.FORBIDDEN, f"a page of {origin!r} may not change or post anything here"
            if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
                return HTTPStatus.FORBIDDEN, "a page of another site may not change or post anything here"
        return self._refused_body(scope, headers)

    def _refused_body(self, scope: _Message, headers: Headers) -> tuple[HTTPStatus, str] | None:
        if scope["type"] == "websocket" or scope["method"] in _READS:
            return None
        length, kind = headers.get("content-length"), headers.get("content-type", "")
        if length is None and "transfer-encoding" in headers:
            return HTTPStatus.LENGTH_REQUIRED, "the body's length is not given; it must be, as Content-Length"
        size = int(length) if length and length.isascii() and length.isdigit() else 0
        if size > _MOST_BYTES:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body of {size} bytes; {_MOST_BYTES} are the most"
        # Any other kind could come from a form of any page, without the browser asking here first.
        if (size or scope["method"] == "POST") and kind.partition(";")[0].strip().lower() != "application/json":
            why = f"the request's content type is {kind!r}, expected 'application/json'"
            return HTTPStatus.UNSUPPORTED_MEDIA_TYPE, why
        return None

    def _is_ours(self, host: str | None, scope: _Message) -> bool:
        if not host:
            return False
        if host in self._hosts or host in _LOCAL_NAMES or host.endswith(".localhost"):
            return True
        at = scope.get("server")
        if at is not None and host == str(at[0]).lower().partition("%")[0]:
            return True
        # By its digits only: looking a name up would ask the very server that may lie.
        return (":" in host or host.replace(".", "").isdigit()) and is_loopback(host)


def _host_of(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        _ = parts.port  # checks it
    except ValueError:
        return None
    whole = parts.username is None and not (parts.path or parts.query or parts.fragment)
    return parts.hostname.rstrip(".") if whole and parts.hostname else None
