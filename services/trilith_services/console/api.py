"""The JSON API: what the page shows, for scripts as well."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Body, Path, Query
from starlette.responses import StreamingResponse

from trilith.discovery.zk_url import redact
from trilith.entry_dumps import parse_id
from trilith.errors import ReadOnlyError
from trilith_services.console.reader import Reader
from trilith_services.console.schema import (
    Counted,
    Distribution,
    Look,
    Overview,
    Row,
    TableConfig,
    Variable,
    VariableState,
    Weights,
)
from trilith_services.console.watcher import Watcher
from trilith_services.console.writer import Writer
from trilith_services.http.failures import FAILURES

__all__ = ["routes"]

TableName = Annotated[str, Path(description="Table name.", min_length=1)]
RowId = Annotated[
    str,
    Path(
        alias="id",
        description="Decimal, signed or unsigned, or 0x….",
        pattern=r"^(-?[0-9]{1,20}|0x[0-9a-fA-F]{1,16})$",
        examples=["42"],
    ),
]


def routes(watcher: Watcher, reader: Callable[[], Reader], *, writable: bool) -> APIRouter:
    """The API over what `watcher` finds and `reader` reads; writes are refused unless `writable`."""
    router = APIRouter(prefix="/api", responses=FAILURES)
    _add_cluster(router, watcher, writable)
    _add_tables(router, watcher, reader)
    _add_variables(router, reader)
    _add_writes(router, watcher, writable)
    return router


def _add_cluster(router: APIRouter, watcher: Watcher, writable: bool) -> None:
    @router.get("/cluster", tags=["cluster"])
    def cluster() -> Overview:
        """Shards, replicas, tables and totals as last seen, and totals of earlier looks."""
        return Overview(
            cluster=redact(watcher.url),
            writable=writable,
            interval_s=watcher.options.interval_s,
            look=watcher.look,
            history=watcher.history,
        )

    @router.get(
        "/events",
        tags=["cluster"],
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}, "description": "Server-sent events named `look`."}},
    )
    async def events() -> StreamingResponse:
        """Every new look, as a server-sent event, the last one first."""
        return StreamingResponse(_events(watcher), media_type="text/event-stream")


def _add_tables(router: APIRouter, watcher: Watcher, reader: Callable[[], Reader]) -> None:
    @router.get("/tables", tags=["tables"])
    def tables() -> list[TableConfig]:
        """Configs of all tables."""
        return reader().tables()

    @router.get("/tables/{table:path}/distribution", tags=["tables"])
    def distribution(
        table: TableName,
        sample: Annotated[int, Query(description="Rows to look at, at most.", ge=1, le=50_000)] = 4000,
    ) -> Distribution:
        """How norms and ages are spread over a fair sample of rows."""
        return reader().distribution(table, sample)

    @router.get("/tables/{table:path}/rows/{id}", tags=["tables"])
    def row(
        table: TableName,
        row_id: RowId,
        replicas: Annotated[bool, Query(description="Look it up at serving replicas as well.")] = True,
    ) -> Row:
        """One id: its owner, row, optimizer state and age; `found` is false if it has no row."""
        return reader().row(table, row_id, watcher.look.replicas if replicas else ())

    # Names may have slashes, so the shortest path comes last.
    @router.get("/tables/{table:path}", tags=["tables"])
    def table(table: TableName) -> TableConfig:
        """Config of one table."""
        return reader().table(table)


def _add_variables(router: APIRouter, reader: Callable[[], Reader]) -> None:
    @router.get("/variables", tags=["variables"])
    def variables() -> list[Variable]:
        """Every dense variable."""
        return reader().variables()

    @router.get("/variables/{name:path}", tags=["variables"])
    def variable(name: Annotated[str, Path(description="Variable name.", min_length=1)]) -> VariableState:
        """One dense variable's values: the first of them, and what they come to."""
        return reader().variable(name)


def _add_writes(router: APIRouter, watcher: Watcher, writable: bool) -> None:
    # PUT and DELETE only: a browser never sends those for another site's page without asking here first. To a page that
    # has made its own name stand for this address it is no other site: `Guard` knows such a one by that name.
    def writer() -> Writer:
        if not writable:
            raise ReadOnlyError("this console only reads; `trilith console --allow-writes` starts one that writes")
        return Writer(watcher.members)

    @router.put("/tables/{table:path}/rows/{id}", tags=["writes"])
    def assign(table: TableName, row_id: RowId, weights: Annotated[Weights, Body()]) -> Row:
        """Set a row's weights, as its owner's `assign` does; answers with the row as it is then."""
        wanted = writer()
        wanted.assign(table, parse_id(row_id), np.array(weights.weights, np.float32))
        return Reader(watcher.members).row(table, row_id)

    @router.delete("/tables/{table:path}/rows/{id}", tags=["writes"])
    def erase(table: TableName, row_id: RowId) -> Counted:
        """Delete a row."""
        return Counted(rows=writer().erase(table, parse_id(row_id)))

    @router.delete("/tables/{table:path}/expired", tags=["writes"])
    def evict(table: TableName) -> Counted:
        """Delete the rows of a table that have expired by now."""
        return Counted(rows=writer().evict(table))


async def _events(watcher: Watcher) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    newest: asyncio.Queue[Look | None] = asyncio.Queue(1)
    newest.put_nowait(watcher.look)

    def put(look: Look | None) -> None:
        """Whoever reads slowly misses looks; nobody misses the end."""
        if newest.full() and newest.get_nowait() is None:
            look = None
        newest.put_nowait(look)

    def listener(look: Look | None) -> None:
        try:
            loop.call_soon_threadsafe(put, look)
        except RuntimeError:
            pass  # the loop has ended, and with it whoever listened

    stop = watcher.listen(listener)
    try:
        while (look := await newest.get()) is not None:
            yield f"event: look\ndata: {look.model_dump_json()}\n\n"
    finally:
        stop()
