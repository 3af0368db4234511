"""What reads a file: chunks of records in order, a position after each, and what was lost on the way."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from trilith.data.blocks import Blocks
from trilith.data.choices import OnError
from trilith.data.formats.compression import Compression
from trilith.data.formats.framing import Framing
from trilith.data.records import Kind, Records
from trilith.data.scan.rows import Column
from trilith.errors import InvalidRequestError

__all__ = [
    "BLOCK_BYTES",
    "Losses",
    "Position",
    "ReadOptions",
    "RecordReader",
    "UnfitColumnsError",
    "position_of",
]

BLOCK_BYTES = 2 << 20
"""Bytes of a chunk's buffer, if no record is longer: as much as stays in the processor's cache."""

_LOG = logging.getLogger(__name__)
_KEPT_MESSAGES = 10


class UnfitColumnsError(InvalidRequestError):
    """A file does not have a column that is to be read, or not as what is wanted."""


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two records of a file, or of a topic's partitions.

    Attributes:
        records: Records in front of it, those skipped as damaged included.
        offset: Uncompressed bytes in front of it; 0 in formats that have no bytes to count (Parquet, CSV, Kafka).
        partitions: Kafka: the next offset of each (topic, partition).
    """

    records: int = 0
    offset: int = 0
    partitions: tuple[tuple[str, int, int], ...] = ()


@dataclass(slots=True)
class Losses:
    """What a reader with on_error="skip" passed over.

    Attributes:
        records: Damaged records; where the rest of a file is lost, that counts as one, as nobody can know the number.
        bytes: Uncompressed bytes not given out, as far as they could be read.
        messages: The first few reasons, each with file, record and byte.
    """

    records: int = 0
    bytes: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, message: str, size: int) -> None:
        """Count one loss."""
        self.records += 1
        self.bytes += size
        if len(self.messages) < _KEPT_MESSAGES:
            self.messages.append(message)
            more = "; more of this file are counted only" if len(self.messages) == _KEPT_MESSAGES else ""
            _LOG.warning("skipped: %s%s", message, more)


class RecordReader(Protocol):
    """An iterator of chunks; a context manager that closes its file."""

    kind: Kind
    losses: Losses
    available: Mapping[str, str] | None = None
    """Columns that the file has, each with why it cannot be read, if so; None where a format has no columns."""

    def __iter__(self) -> Iterator[Records]:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @abstractmethod
    def __next__(self) -> Records: ...

    @property
    @abstractmethod
    def position(self) -> Position:
        """Behind the last chunk given out."""

    @property
    @abstractmethod
    def progress(self) -> tuple[int, int | None]:
        """Bytes of the file (rows, for Parquet) taken so far, and how many there are, where that is known."""

    @abstractmethod
    def close(self) -> None:
        """Close the file; harmless when repeated."""


def position_of(records: Records, index: int) -> Position:
    """Where a reader starts so that record `index` of a chunk of a file comes first."""
    return Position(int(records.numbers[index]), int(records.positions[index]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How to read a file, as `readers.open_records` takes it; a format looks at what concerns it."""

    kind: Kind
    framing: Framing | None
    compression: Compression | str | int | None
    use_snappy: bool | None
    columns: Sequence[Column] | None
    delimiter: str | None
    header: Sequence[str] | None
    list_separator: str | None
    encoding: str | None
    batch_size: int
    drop_remainder: bool
    block_bytes: int
    blocks: Blocks | None
    start: Position
    on_error: OnError

    def some(self, *names: str) -> dict[str, Any]:
        """Some of them by name."""
        return {name: getattr(self, name) for name in names}
