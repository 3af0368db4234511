"""The application: API, debugging routes and page put together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, MutableMapping
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.datastructures import MutableHeaders

from trilith_services.console import api, debugging
from trilith_services.console.guard import Guard
from trilith_services.console.reader import Reader
from trilith_services.console.watcher import Watcher
from trilith_services.http.failures import answer_failures
from trilith_services.http.server import HttpServer

__all__ = ["make_app", "make_server"]

_TYPES = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}
_PAGES = {"/": "index.html", "/docs": "docs.html"}
_HEADERS = {
    # Nothing but what the console itself serves is ever loaded, and nobody may frame it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

_DRAIN_S = 3.0

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


def make_app(watcher: Watcher, *, writable: bool = False, hosts: Collection[str] = ()) -> FastAPI:
    """The console over what `watcher` sees, which is started and closed with the application.

    Args:
        watcher: Not yet started.
        writable: Whether rows may be changed.
        hosts: By which names it may be asked, besides those of loopback and the address it is reached by.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watcher.start()
        yield
        watcher.close()

    app = FastAPI(
        title="Trilith console",
        description="A parameter-server cluster, looked into. Errors are JSON: the class, as in `trilith.errors`, and "
        "a message.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # those of FastAPI load their scripts from elsewhere
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    app.add_middleware(Guard, hosts=hosts)
    app.add_middleware(_Headers)  # the outermost: around refusals too
    answer_failures(app, "/docs")

    def reader() -> Reader:
        return Reader(watcher.members)

    app.include_router(debugging.routes(reader))
    app.include_router(api.routes(watcher, reader, writable=writable))
    _add_pages(app)
    return app


def make_server(watcher: Watcher, listen: str, *, writable: bool = False, hosts: Collection[str] = ()) -> HttpServer:
    """A server of one console at host:port; see `make_app`."""
    # Open streams of events would hold the end up: the watcher ends them first.
    app = make_app(watcher, writable=writable, hosts=hosts)
    return HttpServer(app, listen, what="the console", drain_s=_DRAIN_S, ending=watcher.dismiss)


def _add_pages(app: FastAPI) -> None:
    @app.get("/healthz", tags=["console"])
    def health() -> dict[str, str]:
        """That the console itself answers, whatever the cluster does."""
        return {"status": "serving"}

    def page(name: str) -> Callable[[], Response]:
        content = (resources.files(__package__) / "page" / name).read_bytes()
        kind = _TYPES[name.rpartition(".")[2]]
        return lambda: Response(content, media_type=kind)

    folder = resources.files(__package__) / "page"
    names = {f"/page/{file.name}": file.name for file in folder.iterdir() if file.name.rpartition(".")[2] in _TYPES}
    for path, name in (names | _PAGES).items():
        app.add_api_route(path, page(name), methods=["GET"], include_in_schema=False, response_class=Response)


class _Headers:
    """Puts the same headers on every answer."""

    def __init__(self, app: Callable[[_Message, _Receive, _Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        async def send_with_headers(message: _Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
