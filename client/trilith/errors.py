"""Every error Trilith raises; embedded and remote callers see the same classes.

Where Python has a class for the same thing, an error is one of those too, so that what catches them catches it.

TrilithError
├── InvalidRequestError (also ValueError)    the call itself is wrong
│   └── NonFiniteError                       NaN or infinity where a gradient or weight was due
├── UnknownTableError (also KeyError)        no such table
├── UnknownVariableError (also KeyError)     no such dense variable
├── UnknownQueueError (also KeyError)        no such string queue
├── QueueFullError (also queue.Full)         a string queue would hold more than its capacity
├── TableExistsError                         the name is taken by another config
│   └── TableMismatchError                   another config than the cluster's record has
├── ClusterMismatchError                     shards disagree with the caller about who they are
│   └── TableMismatchError                   the same: it is both
├── ShardRestartedError                      a PS came back without what this caller had written
├── MemoryLimitError (also MemoryError)      the PS refuses new rows
├── ReadOnlyError                            a write was sent to a serving replica
├── OverloadedError                          the PS's queue is full; worth retrying
├── UnavailableError (also ConnectionError)  the PS cannot be reached; worth retrying
├── DeadlineExceededError (also TimeoutError)  the answer did not come in time
│   └── InDoubtError                         a repeated write may have been done; it was not done now
├── CheckpointError                          a checkpoint is missing, incomplete or damaged
├── DataError                                a record or file of records is damaged or not what it was read as
├── MissingExtraError (also ImportError)     a package is not installed that an extra brings
├── ClosedError                              the client or PS was closed
└── InternalError (also RuntimeError)        a fault of Trilith's own
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

__all__ = [
    "BY_NAME",
    "CheckpointError",
    "ClosedError",
    "ClusterMismatchError",
    "DataError",
    "DeadlineExceededError",
    "InDoubtError",
    "InternalError",
    "InvalidRequestError",
    "MemoryLimitError",
    "MissingExtraError",
    "NonFiniteError",
    "OverloadedError",
    "QueueFullError",
    "ReadOnlyError",
    "ShardRestartedError",
    "TableExistsError",
    "TableMismatchError",
    "TrilithError",
    "UnavailableError",
    "Unfinished",
    "UnknownQueueError",
    "UnknownTableError",
    "UnknownVariableError",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """A write that some shards may have done and others not; `Client.retry` sends it again, with the same identity.

    Attributes:
        done: Shards that have acknowledged it.
        refused: Shards that have not done it: they refused it, or it was never sent to them.
        unknown: Shards of which nobody knows, as no answer came, and those that have done a part of it.
        again: Sends it once more to those that have not acknowledged it, within so many seconds (None: the client's).
    """

    done: tuple[int, ...]
    refused: tuple[int, ...]
    unknown: tuple[int, ...]
    again: Callable[[float | None], object] = field(repr=False)

    def __str__(self) -> str:
        said = (("done by", self.done), ("not done by", self.refused), ("not known of", self.unknown))
        parts = [f"{what} shard{'s' * (len(of) > 1)} {', '.join(map(str, of))}" for what, of in said if of]
        return f"the write was {'; '.join(parts)}. Client.retry(error) sends it again, to be done once"


class TrilithError(Exception):
    """Base of all errors; `status` is the name of the gRPC status that carries it.

    `unfinished` says, of a write that failed on some shards, which have done it.
    """

    status: ClassVar[str] = "INTERNAL"
    unfinished: Unfinished | None = None
    partly_done = False
    """Whether the shard has done earlier messages of the same write."""

    def __str__(self) -> str:
        # KeyError's own __str__ would quote the message.
        return Exception.__str__(self)


class InvalidRequestError(TrilithError, ValueError):
    """The call itself is wrong: a shape, a dtype, a range, a config."""

    status = "INVALID_ARGUMENT"


class NonFiniteError(InvalidRequestError):
    """NaN or infinity where a gradient or weight was due; nothing was sent or changed."""


class UnknownTableError(TrilithError, KeyError):
    """The table is not part of this cluster."""

    status = "NOT_FOUND"


class UnknownVariableError(TrilithError, KeyError):
    """The dense variable is not part of this cluster."""

    status = "NOT_FOUND"


class UnknownQueueError(TrilithError, KeyError):
    """The string queue is not part of this cluster."""

    status = "NOT_FOUND"


class QueueFullError(TrilithError, queue.Full):
    """The elements would exceed the queue's capacity; none was enqueued."""

    status = "RESOURCE_EXHAUSTED"


class TableExistsError(TrilithError):
    """The name is taken by a table or variable with another config."""

    status = "ALREADY_EXISTS"


class ClusterMismatchError(TrilithError):
    """Shards disagree with the caller about order, count or owner rule."""

    status = "FAILED_PRECONDITION"


class TableMismatchError(TableExistsError, ClusterMismatchError):
    """The cluster's record has the table with another config; nothing was created."""


class ShardRestartedError(TrilithError):
    """A PS came back in a new incarnation, so it may lack writes this caller had made."""

    status = "ABORTED"


class MemoryLimitError(TrilithError, MemoryError):
    """The PS is at its memory limit and refuses new rows; rows it holds go on being served."""

    status = "RESOURCE_EXHAUSTED"


class ReadOnlyError(TrilithError):
    """A write was sent to a serving replica, whose rows change on the training PS only."""

    status = "FAILED_PRECONDITION"


class OverloadedError(TrilithError):
    """The PS has as many requests waiting as it accepts; worth retrying."""

    status = "RESOURCE_EXHAUSTED"


class UnavailableError(TrilithError, ConnectionError):
    """The PS cannot be reached; worth retrying."""

    status = "UNAVAILABLE"


class DeadlineExceededError(TrilithError, TimeoutError):
    """The answer did not come before the deadline; `sent` is False if the time was over before anything was sent."""

    status = "DEADLINE_EXCEEDED"
    sent = True


class InDoubtError(DeadlineExceededError):
    """The PS no longer knows whether a write was done before, or what it gave; it did nothing now."""


class CheckpointError(TrilithError):
    """A checkpoint or dump is missing, incomplete, damaged or of another model."""

    status = "DATA_LOSS"


class DataError(TrilithError):
    """A record, or a file of records, is damaged or not what it was read as; names file, record and byte."""

    status = "DATA_LOSS"


class MissingExtraError(TrilithError, ImportError):
    """A package that is not installed is needed, which an extra of Trilith brings; the message names it."""

    status = "FAILED_PRECONDITION"


class ClosedError(TrilithError):
    """The client or PS was closed before the call."""

    status = "FAILED_PRECONDITION"


class InternalError(TrilithError, RuntimeError):
    """A fault of Trilith's own; the log of the process that raised it has the traceback."""


def _tree(cls: type[TrilithError]) -> dict[str, type[TrilithError]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found.update(_tree(child))
    return found


BY_NAME: dict[str, type[TrilithError]] = _tree(TrilithError)
"""Class by name: what crosses the wire is the name."""
