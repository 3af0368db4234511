"""The Arrow IPC files of a checkpoint: one table's rows on one PS, one record batch per (chunk of a) stripe.

Columns: `id` uint64, `weights` fixed_size_list<float32>[dim], `state` fixed_size_list<float32>[optimizer state floats],
`last_update` uint32 (Unix seconds). The schema's metadata carry the table's config and the layout of `state`, so a file
explains itself to anyone with pyarrow.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trilith.checkpoint import FileRecord
from trilith.errors import CheckpointError
from trilith.folder import Folder
from trilith_proto import ps_pb2
from trilith_services.ps.checkpoint.damage import as_damage, checked_batches, refuse_compressed, whole_number
from trilith_services.ps.engine.rows import Rows
from trilith_services.ps.engine.table import Table

__all__ = ["RowFile", "check_file", "open_arrow", "open_rows", "write_arrow", "write_table"]

FORMAT = "trilith-rows"
VERSION = 1
# Rows per record batch: big enough for sequential reads, small enough that a reader needs little memory.
CHUNK_ROWS = 65_536
# Read at once while a checksum is verified.
BLOCK_BYTES = 4 << 20


class _Checksummed(io.RawIOBase):
    """A file that counts and checksums what is written to it."""

    def __init__(self, sink: IO[bytes]) -> None:
        self._sink = sink
        self.size = 0
        self.crc32c = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        self.crc32c = int(google_crc32c.extend(self.crc32c, data))
        self._sink.write(data)
        self.size += len(data)
        return len(data)


@dataclass(frozen=True, slots=True)
class RowFile:
    """An opened row file.

    Attributes:
        config: The table's config.
        layout: Its segments' layout, as `RowLayout` describes itself: kinds, widths, offsets, slots.
        dim: Floats per row.
        state_floats: Floats of optimizer state per row.
        newest_update: The table's newest update, Unix seconds, as callers dated it; that row may be gone by now.
    """

    config: ps_pb2.TableConfig
    layout: list[dict[str, Any]]
    dim: int
    state_floats: int
    newest_update: int
    _reader: Any
    _where: str

    @property
    def schema(self) -> Any:
        """The Arrow schema."""
        return self._reader.schema

    def batches(self) -> Iterator[Rows]:
        """The rows, batch after batch; arrays may be read-only views of the file."""
        for batch in checked_batches(self._reader, self._where):
            with as_damage(self._where):
                rows = Rows(
                    ids=batch.column(0).to_numpy(),
                    weights=_matrix(batch.column(1), self.dim),
                    state=_matrix(batch.column(2), self.state_floats),
                    last_update=batch.column(3).to_numpy(),
                )
            yield rows


def write_table(folder: Folder, name: str, table: Table) -> FileRecord:
    """Write all of a table's rows, stripe by stripe while others go on using it; expired ones go by eviction alone.

    Every row is as it was at one moment; the file as a whole is not. See `Table.export_pieces`.
    """
    layout = table.layout
    metadata = {
        "trilith.format": FORMAT,
        "trilith.version": str(VERSION),
        "trilith.table": table.name,
        "trilith.table_config": base64.b64encode(table.config.SerializeToString(deterministic=True)).decode(),
        "trilith.max_update_time": str(table.newest_update),
        "trilith.layout": json.dumps(_describe_layout(layout)),
    }
    schema = pa.schema(
        [
            pa.field("id", pa.uint64(), nullable=False),
            pa.field("weights", pa.list_(pa.float32(), table.dim), nullable=False),
            pa.field("state", pa.list_(pa.float32(), layout.state_floats), nullable=False),
            pa.field("last_update", pa.uint32(), nullable=False),
        ],
        metadata=metadata,
    )
    return write_arrow(folder, name, schema, _batches(table, schema), kind="rows", table=table.name)


def _batches(table: Table, schema: Any) -> Iterator[Any]:
    for stripe in range(table.stripes):
        for rows in table.export_pieces(stripe, CHUNK_ROWS):
            yield pa.record_batch(
                [
                    pa.array(rows.ids),
                    _lists(rows.weights, schema.field(1).type),
                    _lists(rows.state, schema.field(2).type),
                    pa.array(rows.last_update),
                ],
                schema=schema,
            )


def _lists(matrix: npt.NDArray[np.float32], kind: Any) -> Any:
    # from_buffers, because FixedSizeListArray.from_arrays refuses lists of no elements.
    values = pa.array(np.ascontiguousarray(matrix).reshape(-1))
    return pa.FixedSizeListArray.from_buffers(kind, matrix.shape[0], [None], children=[values])


def _matrix(column: Any, width: int) -> npt.NDArray[np.float32]:
    if width == 0:
        return np.empty((len(column), 0), np.float32)
    flat: npt.NDArray[np.float32] = column.flatten().to_numpy()
    return flat.reshape(len(column), width)


def write_arrow(
    folder: Folder, name: str, schema: Any, batches: Iterable[Any], *, kind: str, table: str = ""
) -> FileRecord:
    """Write record batches into one file and say how large it is and what its checksum is."""
    count = 0
    with folder.create(name) as handle:
        sink = _Checksummed(handle)
        with pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                count += batch.num_rows
    return FileRecord(name=name, kind=kind, bytes=sink.size, crc32c=sink.crc32c, table=table, rows=count)


def check_file(folder: Folder, file: FileRecord) -> None:
    """Read the whole file and compare size and checksum.

    Raises:
        CheckpointError: Naming the file and what is wrong with it.
    """
    where = folder.path(file.name)
    size, crc = 0, 0
    try:
        with folder.open(file.name) as handle:
            while block := handle.read(BLOCK_BYTES):
                crc = int(google_crc32c.extend(crc, block))
                size += len(block)
    except FileNotFoundError:
        raise CheckpointError(f"{where}: missing; the manifest says {file.bytes} bytes") from None
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read: {error}") from None
    if size != file.bytes:
        raise CheckpointError(f"{where}: damaged: {size} bytes; the manifest says {file.bytes}")
    if crc != file.crc32c:
        raise CheckpointError(f"{where}: damaged: CRC-32C is {crc:08x}; the manifest says {file.crc32c:08x}")


@contextmanager
def open_arrow(folder: Folder, name: str) -> Iterator[Any]:
    """Open an Arrow IPC file; local ones are memory-mapped."""
    where = folder.path(name)
    try:
        source = pa.memory_map(folder.local_path(name)) if folder.local else pa.PythonFile(folder.open(name), "r")
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read: {error}") from None
    with source:
        with as_damage(where):
            refuse_compressed(source, where)
            reader = pa.ipc.open_file(source)
        yield reader


@contextmanager
def open_rows(folder: Folder, name: str) -> Iterator[RowFile]:
    """Open a row file and read what its schema says.

    Raises:
        CheckpointError: It is no row file, or one of a newer version.
    """
    where = folder.path(name)
    with open_arrow(folder, name) as reader:
        with as_damage(where):
            opened = _row_file(reader, where)
        yield opened


def _row_file(reader: Any, where: str) -> RowFile:
    schema = reader.schema
    metadata = _metadata(schema)
    if metadata.get("trilith.format") != FORMAT:
        raise CheckpointError(f"{where}: not a file of format {FORMAT!r}")
    if metadata.get("trilith.version") != str(VERSION):
        raise CheckpointError(
            f"{where}: version {metadata.get('trilith.version')}; this program reads version {VERSION}"
        )
    columns = {field.name: field.type for field in schema}
    lists = [kind for name, kind in columns.items() if name in ("weights", "state")]
    if (
        schema.names != ["id", "weights", "state", "last_update"]
        or any(not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.float32() for kind in lists)
        or (columns["id"], columns["last_update"]) != (pa.uint64(), pa.uint32())
    ):
        raise CheckpointError(f"{where}: its columns are {schema.names}, not those of a row file")
    newest = int(metadata.get("trilith.max_update_time", "0"))
    return RowFile(
        config=ps_pb2.TableConfig.FromString(base64.b64decode(metadata["trilith.table_config"])),
        layout=_checked_layout(
            json.loads(metadata["trilith.layout"]), columns["weights"].list_size, columns["state"].list_size
        ),
        dim=columns["weights"].list_size,
        state_floats=columns["state"].list_size,
        newest_update=whole_number(newest, 2**32 - 1, "trilith.max_update_time"),
        _reader=reader,
        _where=where,
    )


def _checked_layout(layout: list[dict[str, Any]], dim: int, state_floats: int) -> list[dict[str, Any]]:
    """A layout whose segments lie behind one another in rows of these sizes; ValueError if they do not."""
    weights = state = 0
    for segment in layout:
        if not isinstance(segment["optimizer"], str):
            raise TypeError(f"optimizer {segment['optimizer']!r}")
        if (segment["weight_offset"], segment["state_offset"]) != (weights, state):
            raise ValueError(
                f"a segment at {segment['weight_offset']}, {segment['state_offset']}: not {weights}, {state}"
            )
        weights += whole_number(segment["dim"], dim, "dim")
        for name, floats in segment["slots"]:
            if not isinstance(name, str):
                raise TypeError(f"slot {name!r}")
            state += whole_number(floats, state_floats, name)
    if (weights, state) != (dim, state_floats):
        raise ValueError(f"segments of {weights} + {state} floats in rows of {dim} + {state_floats}")
    return layout


def _metadata(schema: Any) -> Mapping[str, str]:
    return {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}


def _describe_layout(layout: Any) -> list[dict[str, Any]]:
    return [
        {
            "dim": segment.dim,
            "optimizer": segment.kind,
            "weight_offset": segment.weight_offset,
            "state_offset": segment.state_offset,
            "slots": [[name, floats] for name, floats in segment.slots],
        }
        for segment in layout.segments
    ]
