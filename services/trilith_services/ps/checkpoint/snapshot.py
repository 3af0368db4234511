"""Writing one PS's part of a checkpoint and reading it back, into any number of PS.

A checkpoint directory and its manifests are described in `trilith.checkpoint`, the row files in `row_files`. Rows are
written stripe by stripe while training goes on, so a checkpoint is fuzzy: every row in it is whole, and is as it was at
some moment between the start and the end of the save.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from trilith import checkpoint
from trilith.checkpoint import FileRecord, Manifest, Part
from trilith.errors import CheckpointError, InvalidRequestError, TableExistsError
from trilith.folder import Folder
from trilith.tables.differences import field_differences, same_table, tell
from trilith.times import MAX_AHEAD_S, MAX_TIME
from trilith_proto import ps_pb2
from trilith_services.ps.checkpoint import queue_files, row_files, variable_files
from trilith_services.ps.checkpoint.filter_files import load_filter, write_filter
from trilith_services.ps.engine.filters import SlidingFilter, make_filter
from trilith_services.ps.engine.rows import Rows
from trilith_services.ps.engine.table import Table

if TYPE_CHECKING:
    from trilith_services.ps.engine.queues import QueueState
    from trilith_services.ps.engine.store import Store
    from trilith_services.ps.engine.variables import VariableState

__all__ = ["parts_for", "restore_shard", "save_shard", "verify"]

log = logging.getLogger(__name__)

_LEAST_ROW = 12  # bytes of an id and a time

# Checksums of several files at once: google_crc32c lets go of the interpreter lock.
CHECK_THREADS = 2


def save_shard(store: Store, path: str, *, clock: Callable[[], float] = time.time) -> ps_pb2.SaveResponse:
    """Write this shard's files and its part manifest into the directory `path`.

    The checkpoint is complete when somebody who knows that all shards have done so writes its manifest
    (`trilith.checkpoint.write_manifest`). Saving twice into one directory is fine: file names are fresh every time.
    What is written when a save fails goes again: the next one needs the room.
    """
    started = time.perf_counter()
    folder = Folder(path)
    identity = store.describe()
    index, count = identity.shard_index, identity.shard_count
    # Taken before the first row, so everything up to this step is in the files.
    step, began = identity.global_step, clock()
    saving = checkpoint.saving_name(index, count, store.life)
    files: list[FileRecord] = []
    try:
        folder.write(saving, b"")
        files.extend(_write_files(store, folder, index, count))  # as they are written
        response = ps_pb2.SaveResponse(
            incarnation=identity.incarnation,
            global_step=step,
            files=[
                ps_pb2.ShardFile(name=file.name, bytes=file.bytes, crc32c=file.crc32c, table=file.table, rows=file.rows)
                for file in files
            ],
        )
        part = checkpoint.part_of(index, count, response, finished_unix_s=clock(), began_unix_s=began, life=store.life)
        checkpoint.write_part(folder, part)
    except BaseException:
        with suppress(Exception):
            for file in files:
                folder.remove(file.name)
        raise
    finally:
        with suppress(Exception):
            folder.remove(saving)
    log.info(
        "checkpoint part written",
        extra={
            "path": folder.url,
            "step": step,
            "rows": sum(file.rows for file in files if file.kind == "rows"),
            "megabytes": round(sum(file.bytes for file in files) / 1e6, 1),
            "seconds": round(time.perf_counter() - started, 3),
        },
    )
    return response


def _write_files(store: Store, folder: Folder, index: int, count: int) -> Iterator[FileRecord]:
    token = secrets.token_hex(4)

    def name(kind: str, table: str = "", suffix: str = "arrow") -> str:
        return checkpoint.file_name(kind, table, index, count, token, suffix)

    for table_name, table in sorted(store.tables.items()):
        yield row_files.write_table(folder, name("rows", table_name), table)
        if isinstance(table.filter, SlidingFilter):  # the others remember nothing
            yield write_filter(folder, name("filter", table_name), table_name, table.filter)
    yield variable_files.write(folder, name("variables"), store.variables.export())
    queues = store.queues.export()
    if queues:
        yield queue_files.write(folder, name("queues", suffix="json"), queues)


def restore_shard(
    store: Store, path: str, sources: ps_pb2.VariableSources | None = None, step: int | None = None
) -> ps_pb2.RestoreResponse:
    """Replace this shard's content by what the complete checkpoint at `path` holds for it.

    Every id is routed by the owner rule, so the checkpoint may come from another number of PS. All files are checked
    and the new content is loaded beside the old before anything changes. Tables that the checkpoint does not know stay
    if they are empty; variables and queues that it does not know go, which is logged. With `sources` the variables that
    are here stay, but for those that it names. `step` stands for the checkpoint's.

    Raises:
        CheckpointError: The checkpoint is incomplete or damaged, or lacks what `sources` takes from it; nothing was
            changed.
        TableExistsError: A table exists with another config; nothing was changed.
        InvalidRequestError: A table that the checkpoint does not know has rows; nothing was changed.
    """
    manifest = checkpoint.read_manifest(path)  # first: a directory that is no checkpoint stays as it is
    with checkpoint.hold(path):
        return _restore(store, path, manifest, sources, step)


def _restore(
    store: Store, path: str, manifest: Manifest, sources: ps_pb2.VariableSources | None, step: int | None
) -> ps_pb2.RestoreResponse:
    started, folder = time.perf_counter(), Folder(path)
    identity = store.describe()
    index, count = identity.shard_index, identity.shard_count
    step = manifest.global_step if step is None else step
    parts = parts_for(manifest, index, count)
    _check_all(folder, _needed(manifest, parts, count, every_variable=sources is not None))
    if sources is None:
        variables = variable_files.read_for(folder, manifest, index, count)
    else:
        variables = variable_files.read_into(store.variables.export(), folder, manifest, sources, index, count)
    queues = queue_files.read_for(folder, manifest, index)
    configs = _table_configs(store, folder, parts)
    checkpoint.check_nothing_lost(folder.url, {name: len(table) for name, table in store.tables.items()}, configs)
    tables: dict[str, Table] = {}
    try:
        expected = _expected_rows(parts, index, count)
        for name, config in configs.items():
            tables[name] = _new_table(store, config, folder, expected.get(name, 0))
        for part in parts:
            for file in part.files:
                if file.kind == "rows":
                    _load_rows(tables[file.table], folder, file, part, index, count, int(store.clock()))
        _load_filters(tables, folder, parts)
        _tell_dropped(store, folder, variables, queues)
        store.replace_content(tables, variables, queues, step, path)
    except BaseException:
        for table in tables.values():
            table.release()
        raise
    rows = {name: len(table) for name, table in sorted(tables.items())}
    log.info(
        "restored",
        extra={
            "path": folder.url,
            "from_ps": manifest.shard_count,
            "step": step,
            "rows": sum(rows.values()),
            "seconds": round(time.perf_counter() - started, 3),
        },
    )
    return ps_pb2.RestoreResponse(incarnation=store.incarnation, global_step=step, rows=rows)


def _tell_dropped(
    store: Store, folder: Folder, variables: Sequence[VariableState], queues: Sequence[QueueState]
) -> None:
    """Say which variables and queues the checkpoint does not hold: they go."""
    held = {state.spec.name for state in variables}, {state.name for state in queues}
    gone = (
        sorted({partition.spec.name for partition in store.variables} - held[0]),
        sorted({state.name for state in store.queues.export()} - held[1]),
    )
    if any(gone):
        log.warning(
            "the checkpoint does not hold these, and they are gone",
            extra={"path": folder.url, "variables": gone[0], "queues": gone[1]},
        )


def _expected_rows(parts: Sequence[Part], index: int, count: int) -> dict[str, int]:
    """About how many rows of each table are for shard `index` of `count`, by what the manifest says of these parts.

    Never more than their files can hold, whatever the manifest says.
    """
    rows: dict[str, int] = {}
    for part in parts:
        share = math.gcd(part.shard_count, count) / count
        for file in part.files:
            if file.kind == "rows":
                rows[file.table] = rows.get(file.table, 0) + int(min(file.rows, file.bytes // _LEAST_ROW) * share)
    return rows


def _new_table(store: Store, config: ps_pb2.TableConfig, folder: Folder, rows: int) -> Table:
    try:
        return store.new_table(config, rows=rows)
    except (InvalidRequestError, MemoryError, OverflowError) as error:
        raise CheckpointError(
            f"{folder.url}: table {config.name!r} has a config that this PS cannot have: {error}"
        ) from None


def parts_for(manifest: Manifest, index: int, count: int) -> list[Part]:
    """The parts that can hold ids which shard `index` of `count` owns; its own one if the count is the same.

    An id of part p is p modulo the old count, and the shard's are `index` modulo the new one: both can only be true if
    p and `index` agree modulo the counts' greatest common divisor.
    """
    step = math.gcd(manifest.shard_count, count)
    return [part for part in manifest.parts if part.shard_index % step == index % step]


def _needed(manifest: Manifest, parts: list[Part], count: int, *, every_variable: bool) -> list[FileRecord]:
    """Files of these parts, and all dense variables if the number of PS changes or `every_variable`."""
    reshard = every_variable or manifest.shard_count != count
    return [
        file
        for part in manifest.parts
        for file in part.files
        if part in parts or (reshard and file.kind == "variables")
    ]


def verify(path: str) -> Iterator[tuple[FileRecord, str]]:
    """Check every file of a checkpoint, one after another: size, checksum, format, row counts and owners.

    Yields:
        Each file with what is wrong with it, "" if nothing is.

    Raises:
        CheckpointError: The manifest itself is missing or damaged.
    """
    folder = Folder(path)
    manifest = checkpoint.read_manifest(path)
    for part in manifest.parts:
        for file in part.files:
            try:
                row_files.check_file(folder, file)
                if file.kind == "rows":
                    _check_rows(folder, file, part)
                elif file.kind == "variables":
                    variable_files.read(folder, file.name)
                elif file.kind == "queues":
                    queue_files.read(folder, file.name)
                elif file.kind == "filter":
                    with row_files.open_rows(folder, _rows_of(part, file).name) as rows_file:
                        occurrences = make_filter(rows_file.config)
                    if isinstance(occurrences, SlidingFilter):
                        load_filter(folder, file.name, occurrences)
            except CheckpointError as error:
                yield file, str(error)
            else:
                yield file, ""


def _rows_of(part: Part, file: FileRecord) -> FileRecord:
    for rows in part.files:
        if rows.kind == "rows" and rows.table == file.table:
            return rows
    raise CheckpointError(f"{file.name}: PS {part.shard_index} has no rows of table {file.table!r}")


def _check_rows(folder: Folder, file: FileRecord, part: Part) -> None:
    found = 0
    with row_files.open_rows(folder, file.name) as rows_file:
        for rows in rows_file.batches():
            found += len(rows)
            _check_owner(folder, file, part, rows)
    if found != file.rows:
        raise CheckpointError(f"{folder.path(file.name)}: {found} rows; the manifest says {file.rows}")


def _check_owner(folder: Folder, file: FileRecord, part: Part, rows: Rows) -> None:
    stray = rows.ids[rows.ids % np.uint64(part.shard_count) != part.shard_index]
    if stray.size:
        raise CheckpointError(
            f"{folder.path(file.name)}: id {stray[0]} belongs to PS {int(stray[0]) % part.shard_count}, "
            f"not to PS {part.shard_index} of {part.shard_count}"
        )


def _check_all(folder: Folder, files: list[FileRecord]) -> None:
    with ThreadPoolExecutor(CHECK_THREADS, "checkpoint-check") as pool:
        for _ in pool.map(lambda file: row_files.check_file(folder, file), files):
            pass


def _table_configs(store: Store, folder: Folder, parts: list[Part]) -> dict[str, ps_pb2.TableConfig]:
    configs: dict[str, ps_pb2.TableConfig] = {}
    for file in (file for part in parts for file in part.files if file.kind == "rows"):
        with row_files.open_rows(folder, file.name) as rows_file:
            config = rows_file.config
        if config.name != file.table:
            raise CheckpointError(
                f"{folder.path(file.name)}: rows of table {config.name!r}; the manifest says {file.table!r}"
            )
        if configs.setdefault(file.table, config) != config:
            raise CheckpointError(
                f"{folder.path(file.name)}: table {file.table!r} has another config than on the other PS"
            )
        here = store.tables.get(file.table)
        if here is not None and not same_table(here.config, config):
            raise TableExistsError(
                f"table {file.table!r} exists with another config than in {folder.url}:"
                f" {tell(field_differences(here.config, config), 'here', 'in the checkpoint')}."
                " Restore before tables are made, or into a cluster without this one"
            )
    return configs


def _load_rows(table: Table, folder: Folder, file: FileRecord, part: Part, index: int, count: int, now: int) -> None:
    """Load the rows that this shard owns.

    A time more than a day ahead both of `now`, this shard's clock, and of the part's end comes from a clock that was
    wrong, and such a row would outlive all others: it becomes the later of the two. Where this clock is behind, as
    before a machine has heard of the time, rows keep theirs: they would all be gone when it is put right.
    """
    ahead = 0
    newest = min(max(now, int(min(part.finished_unix_s, MAX_TIME))), MAX_TIME)
    with row_files.open_rows(folder, file.name) as rows_file:
        if (rows_file.dim, rows_file.state_floats) != (table.dim, table.layout.state_floats):
            raise CheckpointError(
                f"{folder.path(file.name)}: rows of {rows_file.dim} + {rows_file.state_floats} floats; "
                f"its config says {table.dim} + {table.layout.state_floats}"
            )
        for rows in rows_file.batches():
            _check_owner(folder, file, part, rows)
            if part.shard_count != count:
                rows = rows.take(rows.ids % np.uint64(count) == index)
            late = rows.last_update > newest + MAX_AHEAD_S
            if late.any():
                ahead += int(np.count_nonzero(late))
                rows = replace(rows, last_update=np.where(late, np.uint32(newest), rows.last_update))
            table.import_rows(rows)
        latest = rows_file.newest_update
        table.note_update(newest if latest > newest + MAX_AHEAD_S else latest)
    if ahead:
        log.warning(
            "rows with a time ahead of this PS's clock and of the checkpoint; they count as updated with it",
            extra={"path": folder.path(file.name), "rows": ahead},
        )


def _load_filters(tables: Mapping[str, Table], folder: Folder, parts: list[Part]) -> None:
    """Take over the counts of ids that wait for a row.

    A filter keeps hashes, not ids, so it cannot be split by owner. But where all of a shard's ids come from one part
    (the same number of PS, or a multiple of it) that part's filter knows them all.
    """
    for file in (file for file in parts[0].files if file.kind == "filter"):
        _rows_of(parts[0], file)
        occurrences = tables[file.table].filter
        if not isinstance(occurrences, SlidingFilter):
            continue
        if len(parts) == 1:
            load_filter(folder, file.name, occurrences)
        else:
            log.warning(
                "another number of PS: ids below their occurrence threshold are counted anew",
                extra={"table": file.table},
            )
