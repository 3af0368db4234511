"""Files of saved rows (EntryDump records), for one table and for several in one set of files.

This is the reference system's format, for import and export. One table: `<base>-00000-of-00002`, TFRecord files of
EntryDumps. Several: the same names, but inside a snappy stream and table after table, and beside them
`<base>.meta-00000-of-00002`, which say how many of the records belong to which table. Expired rows are not saved.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import DecodeError

from trilith.data.formats.tfrecord import RecordBatch, RecordWriter, read_records
from trilith.errors import CheckpointError
from trilith_proto import hash_table_pb2
from trilith_services.ps.engine.entry_codec import EntryCodec
from trilith_services.ps.reference.norms import almost_equal, norm_square
from trilith_services.ps.reference.shard_files import (
    create_file,
    find_shard_files,
    open_file,
    read_payloads,
    remove_other_sets,
    shard_file_name,
)

if TYPE_CHECKING:
    from trilith_services.ps.engine.row_layout import RowLayout
    from trilith_services.ps.engine.rows import Rows
    from trilith_services.ps.engine.table import Table

__all__ = ["feature_stat", "import_rows", "read_rows", "restore_table", "restore_tables", "save_table", "save_tables"]

_log = logging.getLogger(__name__)

_ROWS_PER_SHARD = 1_000_000
_MAX_SHARDS = 4

_T = TypeVar("_T")


def save_table(table: Table, base: str, *, parallel: int = -1) -> int:
    """Write a training table's rows, as they are stripe by stripe while other calls go on.

    Args:
        table: The table.
        base: What the files' names begin with.
        parallel: Number of files; -1 makes one per million rows, 4 at most.

    Returns:
        How many rows were written.
    """
    total = _shards(len(table), parallel)
    now = _judged_at(table)
    codec = EntryCodec.of(table.layout)
    dropped: list[int] = []

    def write(index: int) -> int:
        written = 0
        with create_file(shard_file_name(base, index, total)) as file:
            writer = RecordWriter(file)
            for rows in _stripes(table, index, total):
                kept = rows.take(~table.expired(rows, now))
                writer.write(*codec.encode(kept))
                written += len(kept)
                dropped.append(len(rows) - len(kept))
            writer.close()
        return written

    written = sum(_in_parallel(write, total))
    remove_other_sets(base, total)
    _log_dropped(table.name, base, sum(dropped))
    return written


def restore_table(table: Table, base: str) -> int:
    """Replace a table's rows by saved ones; returns how many there are.

    The set of files is checked before anything changes. Records are checked as they are read, so a damaged one leaves
    the table with a part of the rows. Whatever number of files was written, all are read.
    """
    files = find_shard_files(base)
    table.clear()

    def read(index: int) -> int:
        return sum(import_rows(table, rows) for rows in read_rows(table.layout, files[index]))

    return sum(_in_parallel(read, len(files)))


def read_rows(layout: RowLayout, name: str) -> Iterator[Rows]:
    """Read one file of one table in batches; CheckpointError names the record that is damaged or of another layout."""
    codec = EntryCodec.of(layout)
    with open_file(name) as file:
        for batch in read_records(file, name=name, error=CheckpointError):
            yield codec.decode(batch, name=name)


def save_tables(
    tables: Mapping[str, Table],
    base: str,
    *,
    parallel: int = -1,
    expire: hash_table_pb2.SlotExpireTimeConfig | None = None,
) -> dict[str, int]:
    """Write the rows of several training tables into one set of files.

    Args:
        tables: By name; in this order they stand in the files.
        base: What the files' names begin with.
        parallel: Number of data files; -1 makes one per million rows of all tables, 4 at most.
        expire: When rows expire, for all tables; None leaves it to each table's own config.

    Returns:
        Rows written by table.
    """
    total = _shards(sum(len(table) for table in tables.values()), parallel)
    plans = {name: (table, _judged_at(table), EntryCodec.of(table.layout)) for name, table in tables.items()}
    dropped: dict[str, list[int]] = {name: [] for name in tables}

    def write(index: int) -> dict[str, int]:
        counts = dict.fromkeys(tables, 0)
        with create_file(shard_file_name(base, index, total)) as file:
            writer = RecordWriter(file, snappy=True)
            for name, (table, now, codec) in plans.items():
                for rows in _stripes(table, index, total):
                    kept = rows.take(~table.expired(rows, now, expire))
                    writer.write(*codec.encode(kept))
                    counts[name] += len(kept)
                    dropped[name].append(len(rows) - len(kept))
            writer.close()
        with create_file(shard_file_name(f"{base}.meta", index, total)) as file:
            meta = RecordWriter(file)
            meta.write_all(
                hash_table_pb2.MultiHashTableMetadata(table_name=name, num_entries=count).SerializeToString()
                for name, count in counts.items()
            )
            meta.close()
        return counts

    written = _in_parallel(write, total)
    remove_other_sets(base, total)
    remove_other_sets(f"{base}.meta", total)
    for name, numbers in dropped.items():
        _log_dropped(name, base, sum(numbers))
    return {name: sum(counts[name] for counts in written) for name in tables}


def restore_tables(tables: Mapping[str, Table], base: str) -> dict[str, int]:
    """Read saved rows into the tables of the same names.

    Rows that are not in the files stay as they are, so do tables that are not; records of unknown tables are skipped.

    Returns:
        Rows read by table, of those tables that the files know.
    """
    files = find_shard_files(base)
    metas = find_shard_files(f"{base}.meta")
    if len(files) != len(metas):
        raise CheckpointError(f"{base}: {len(files)} data files and {len(metas)} metadata files")
    codecs = {name: EntryCodec.of(table.layout) for name, table in tables.items()}

    def read(index: int) -> dict[str, int]:
        counts: dict[str, int] = {}
        name = files[index]
        with open_file(name) as file:
            batches = _Cut(read_records(file, name=name, snappy=True, error=CheckpointError), name)
            for meta in _read_meta(metas[index]):
                for batch in batches.take(meta.num_entries):
                    if meta.table_name in tables:
                        rows = codecs[meta.table_name].decode(batch, name=f"{name}: table {meta.table_name!r}")
                        import_rows(tables[meta.table_name], rows)
                if meta.table_name in tables:
                    counts[meta.table_name] = counts.get(meta.table_name, 0) + meta.num_entries
            batches.finish()
        return counts

    read_counts = _in_parallel(read, len(files))
    known = {name for counts in read_counts for name in counts}
    for name in sorted(tables.keys() - known):
        _log.warning("table %r is not in %s and stays as it is", name, base)
    return {name: sum(counts.get(name, 0) for counts in read_counts) for name in tables if name in known}


def feature_stat(base: str) -> dict[str, int]:
    """Saved rows by table, from the metadata alone, in the order of the files."""
    counts: dict[str, int] = {}
    for name in find_shard_files(f"{base}.meta"):
        for meta in _read_meta(name):
            counts[meta.table_name] = counts.get(meta.table_name, 0) + meta.num_entries
    return counts


class _Cut:
    """Cuts a file's batches into runs of given lengths."""

    def __init__(self, batches: Iterator[RecordBatch], name: str) -> None:
        self._batches = batches
        self._name = name
        self._rest: RecordBatch | None = None

    def take(self, records: int) -> Iterator[RecordBatch]:
        """The next `records` records."""
        while records:
            batch = self._rest or next(self._batches, None)
            if batch is None:
                raise CheckpointError(f"{self._name}: ends {records} records before its metadata says")
            yield batch[:records]
            self._rest = batch[records:] if len(batch) > records else None
            records -= min(records, len(batch))

    def finish(self) -> None:
        """Check that nothing is left."""
        if self._rest is not None or next(self._batches, None) is not None:
            raise CheckpointError(f"{self._name}: holds more records than its metadata says")


def _read_meta(name: str) -> list[hash_table_pb2.MultiHashTableMetadata]:
    try:
        return [hash_table_pb2.MultiHashTableMetadata.FromString(payload) for payload in read_payloads(name)]
    except DecodeError:
        raise CheckpointError(f"{name}: a record is no MultiHashTableMetadata") from None


def import_rows(table: Table, rows: Rows) -> int:
    """Write rows into the table as its kind of row takes them."""
    if table.config.hash_table.skip_zero_embedding:
        rows = rows.take(~almost_equal(norm_square(rows.weights), 0.0))
    table.import_rows(rows)
    return len(rows)


def _shards(rows: int, parallel: int) -> int:
    return parallel if parallel > 0 else min(max(rows // _ROWS_PER_SHARD, 1), _MAX_SHARDS)


def _stripes(table: Table, index: int, total: int) -> Iterator[Rows]:
    """Copies of the stripes that belong into file `index` of `total`."""
    for stripe in range(table.stripes * index // total, table.stripes * (index + 1) // total):
        yield table.export_stripe(stripe)


def _judged_at(table: Table) -> int:
    """The time that expiry is judged at: the reference's, which is the newest update, unless that is yet to come."""
    return min(table.newest_update, int(time.time()))


def _log_dropped(name: str, base: str, rows: int) -> None:
    if rows:
        _log.info("table %r: %d expired rows are not in %s", name, rows, base)


def _in_parallel(work: Callable[[int], _T], count: int) -> list[_T]:
    """Do `work` for 0 to count - 1, each in a thread."""
    if count == 1:
        return [work(0)]
    with ThreadPoolExecutor(min(count, 8), thread_name_prefix="entry-files") as pool:
        return list(pool.map(work, range(count)))
