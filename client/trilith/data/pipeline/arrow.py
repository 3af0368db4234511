"""Datasets of what Arrow can read: tables, datasets, readers, and whatever else has batches of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from trilith.data.pipeline.dataset import Dataset
from trilith.data.pipeline.division import Merge
from trilith.data.pipeline.nodes import Context, Node
from trilith.data.pipeline.stages import Stage, State, Striding
from trilith.errors import InvalidRequestError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Arrow", "from_arrow", "of_arrow"]

_MOST_ROWS = 1 << 16
"""Of a chunk; larger tables are cut, which copies nothing."""

Strings: TypeAlias = Literal["hash", "bytes"]


def from_arrow(data: Any, *, columns: Sequence[str] | None = None, strings: Strings = "hash") -> Dataset:
    """A dataset of the rows of anything that has columns in Arrow's form; see docs/data.md.

    Batches hold Arrow's memory as it is, and an Estimator takes them without `parse`. With `parse`, columns are what
    those of a Parquet file are, and strings are ids.

    Args:
        data: A pyarrow Table, RecordBatch, RecordBatchReader, Dataset or Scanner; anything with `__arrow_c_stream__`
            (a polars or pandas DataFrame, a DuckDB relation); a dataset of Hugging Face; a dataset of Ray; an iterable
            of any of these; or a function that makes one, which each pass calls. What can be read once only, such as a
            reader or a generator, has one pass: give a function for more.
        columns: Which are read; None: all.
        strings: What parsers see strings as: "hash", ids by `trilith.data.hash_strings`; or "bytes".

    Raises:
        InvalidRequestError: It is nothing of that, or lacks a column.
    """
    if strings not in ("hash", "bytes"):
        raise InvalidRequestError(f"strings={strings!r} is neither 'hash' nor 'bytes'")
    if isinstance(data, Dataset):
        raise InvalidRequestError("from_arrow takes what Arrow reads; this is a Dataset already")
    return Dataset((Arrow(_Tables(data, None if columns is None else tuple(columns)), strings == "hash"),))


def of_arrow(dataset: Dataset) -> bool:
    """Whether the records of a dataset come from Arrow alone, so that its batches have Arrow's columns."""
    return _of_arrow(dataset.nodes)


def _of_arrow(nodes: tuple[Node, ...]) -> bool:
    source = nodes[0]
    return all(map(_of_arrow, source.pipelines)) if isinstance(source, Merge) else isinstance(source, Arrow)


class _Tables:
    """What `from_arrow` was given, as tables, pass after pass."""

    def __init__(self, data: Any, columns: tuple[str, ...] | None) -> None:
        self._data = data
        self._columns = columns
        self._spent = False
        if not (_is_columns(data) or isinstance(data, Iterable) or callable(data)):
            raise InvalidRequestError(
                f"a {type(data).__name__} is nothing that Arrow reads: give a table, a dataset, a reader, a DataFrame, "
                "an iterable of record batches, or a function that makes one of these"
            )

    @property
    def function(self) -> Callable[[], Any] | None:
        """The function that makes the data, if it is one."""
        return self._data if callable(self._data) and not _is_columns(self._data) else None

    @property
    def rows(self) -> int | None:
        """How many there are, where that is known without reading."""
        found = getattr(self._data, "num_rows", None)
        return found if isinstance(found, int) else None

    def open(self, skip: int) -> Iterator[pa.Table]:
        """The tables of a pass from row `skip` on, none of them empty or large."""
        make = self.function
        data = self._data if make is None else make()
        if make is None and _once(data):
            if self._spent:
                raise InvalidRequestError(
                    f"the data is a {type(data).__name__}, which ends after one pass; give from_arrow a function that "
                    "makes one"
                )
            self._spent = True
        for table in self._from(data, skip):
            for start in range(0, table.num_rows, _MOST_ROWS):
                yield table.slice(start, _MOST_ROWS)

    def _from(self, data: Any, skip: int) -> Iterator[pa.Table]:
        import pyarrow as pa

        if type(data).__module__.startswith("pyarrow._dataset") and hasattr(data, "get_fragments"):
            for fragment in data.get_fragments():
                rows = fragment.count_rows() if skip else 0
                if rows and rows <= skip:
                    skip -= rows
                    continue
                yield from self._left(_batches(fragment, self._columns, data.schema), skip)
                skip = 0
        elif isinstance(data, pa.Table):
            yield from self._left((data.slice(skip),), 0)
        else:
            yield from self._left(_batches(data, self._columns, None), skip)

    def _left(self, parts: Iterable[Any], skip: int) -> Iterator[pa.Table]:
        """Tables without their first `skip` rows, of the columns that are wanted, in plain types."""
        from trilith.data.formats.arrow_rows import plain_table

        for part in parts:
            table = _table(part)
            if skip >= table.num_rows:
                skip -= table.num_rows
                continue
            table, skip = table.slice(skip), 0
            if self._columns is not None:
                lacking = [name for name in self._columns if name not in table.column_names]
                if lacking:
                    raise InvalidRequestError(f"from_arrow: no column {lacking[0]!r}; there are {table.column_names}")
                table = table.select(list(self._columns))
            yield from _pieces(plain_table(table))


def _pieces(table: pa.Table) -> Iterator[pa.Table]:
    """The table in pieces that are each in one piece of memory."""
    import pyarrow as pa

    if all(column.num_chunks <= 1 for column in table.columns):
        yield table
    else:
        for batch in table.to_batches():
            yield pa.Table.from_batches([batch])


def _is_columns(data: Any) -> bool:
    """Whether it says itself that it is columns, or makes them."""
    names = ("__arrow_c_stream__", "__arrow_c_array__", "get_fragments", "to_reader", "to_arrow", "__dataframe__")
    return not isinstance(data, type) and (any(hasattr(data, name) for name in names) or _makes_batches(data))


def _makes_batches(data: Any) -> bool:
    """Whether it is a dataset of Hugging Face, or of Ray."""
    return (hasattr(data, "with_format") and hasattr(data, "iter")) or hasattr(data, "iter_batches")


def _once(data: Any) -> bool:
    """Whether it can be read once only."""
    import pyarrow as pa

    return isinstance(data, pa.RecordBatchReader | Iterator)


def _batches(data: Any, columns: tuple[str, ...] | None, schema: pa.Schema | None) -> Iterable[Any]:
    """Tables or batches of whatever it is, in order."""
    import pyarrow as pa

    wanted = None if columns is None else list(columns)
    if hasattr(data, "count_rows") and hasattr(data, "to_batches"):  # a fragment of a dataset, or a scanner
        if schema is None:
            return data.to_batches()  # type: ignore[no-any-return]
        if lacking := [name for name in wanted or () if name not in schema.names]:
            raise InvalidRequestError(f"from_arrow: no column {lacking[0]!r}; there are {schema.names}")
        return data.to_batches(schema=schema, columns=wanted)  # type: ignore[no-any-return]
    if isinstance(data, pa.RecordBatch | pa.Table):
        return (data,)
    if hasattr(data, "with_format") and hasattr(data, "iter"):
        return data.with_format("arrow").iter(batch_size=_MOST_ROWS)  # type: ignore[no-any-return]
    if hasattr(data, "iter_batches") and not hasattr(data, "__arrow_c_stream__"):
        return data.iter_batches(batch_format="pyarrow", batch_size=_MOST_ROWS)  # type: ignore[no-any-return]
    if hasattr(data, "__arrow_c_stream__"):
        return pa.RecordBatchReader.from_stream(data)  # type: ignore[no-any-return]
    if hasattr(data, "__arrow_c_array__"):
        return (pa.record_batch(data),)
    if hasattr(data, "to_arrow"):
        return _batches(data.to_arrow(), columns, schema)
    if hasattr(data, "__dataframe__"):
        return (pa.interchange.from_dataframe(data),)
    if isinstance(data, Iterable):
        return (batch for each in data for batch in _batches(_no_row(each), columns, schema))
    raise InvalidRequestError(f"the function given to from_arrow made a {type(data).__name__}, which Arrow cannot read")


def _no_row(part: Any) -> Any:
    """A part of an iterable, unless it is a single row or value."""
    if not _is_columns(part):
        raise InvalidRequestError(
            f"from_arrow was given an iterable of {type(part).__name__}; it takes record batches, tables and DataFrames"
        )
    return part


def _table(part: Any) -> pa.Table:
    import pyarrow as pa

    return part if isinstance(part, pa.Table) else pa.Table.from_batches([part])


@dataclass(frozen=True, slots=True)
class Arrow(Node):
    """Rows of Arrow's tables."""

    tables: _Tables
    hashed: bool

    strides = True

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`; several workers divide the rows."""
        stage: Stage = _Reading(self.tables, self.hashed, context)
        return Striding(stage, *context.worker) if context.worker[1] > 1 else stage

    def length(self, count: int) -> int | None:
        """See `Node`."""
        return self.tables.rows

    def functions(self) -> Iterator[tuple[Callable[..., Any], str]]:
        """See `Node`."""
        if self.tables.function is not None:
            yield self.tables.function, "from_arrow"


class _Reading:
    """Chunks of the rows of tables; its position is how many came."""

    def __init__(self, tables: _Tables, hashed: bool, context: Context) -> None:
        self._tables = tables
        self._hashed = hashed
        self._context = context
        self._at = 0
        self._open: Iterator[pa.Table] | None = None
        self._seen = False

    def __next__(self) -> Any:
        from trilith.data.formats.arrow_rows import ArrowRows
        from trilith.data.formats.column_types import unreadable

        if self._open is None:
            self._open = self._tables.open(self._at)
        table = next(self._open)
        if not self._seen:
            self._seen = True
            self._context.columns.opened({field.name: unreadable(field.name, field.type) for field in table.schema})
        start, self._at = self._at, self._at + table.num_rows
        return ArrowRows(table, np.arange(start, self._at), hashed=self._hashed)

    def state(self) -> State:
        """See `Stage`."""
        return {"at": self._at}

    def restore(self, state: State) -> None:
        """See `Stage`."""
        self._at = state["at"]

    def close(self) -> None:
        """See `Stage`."""
        opened, self._open = self._open, iter(())
        close = getattr(opened, "close", None)
        if close is not None:
            close()
