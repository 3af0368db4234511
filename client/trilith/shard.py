"""Shard: the seam between the client and whatever holds rows, in this process or behind gRPC."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from trilith_proto import ps_pb2

__all__ = [
    "ANY_WRITE",
    "DensePart",
    "Dequeued",
    "EntryPage",
    "Float32Array",
    "FloatArray",
    "IdPart",
    "InProcess",
    "ServedShard",
    "Shard",
    "Ticket",
    "UInt64Array",
    "UpdateFrame",
    "UpdateLayout",
    "UpdatePart",
    "VariablePiece",
    "Write",
]

UInt64Array: TypeAlias = npt.NDArray[np.uint64]
Float32Array: TypeAlias = npt.NDArray[np.float32]
FloatArray: TypeAlias = npt.NDArray[Any]  # float32, or float16 as it came over the wire


class IdPart(NamedTuple):
    """One table's ids in a lookup.

    Attributes:
        table: Table name.
        ids: uint64[n], C-contiguous (may be unaligned), repeats allowed.
    """

    table: str
    ids: UInt64Array


@dataclass(frozen=True, slots=True)
class UpdatePart:
    """One table's rows in a write.

    Attributes:
        table: Table name.
        ids: uint64[n]; repeats are applied one after another, in order.
        values: float32 or float16 [n, dim], C-contiguous: gradients, new weights or increments.
        counts: uint32[n] occurrences each id stands for, or None for one each. Gradients only.
        learning_rates: float32[segments], or None for the rates of the config. Gradients only.
    """

    table: str
    ids: UInt64Array
    values: FloatArray
    counts: npt.NDArray[np.uint32] | None = None
    learning_rates: Float32Array | None = None


@dataclass(frozen=True, slots=True)
class DensePart:
    """One partition of a dense variable.

    Attributes:
        name: Variable name.
        partition: Its index, from 0.
        values: float32[size].
    """

    name: str
    partition: int
    values: Float32Array


class VariablePiece(NamedTuple):
    """Floats of a dense variable of a checkpoint, counted row after row.

    Attributes:
        name: Of the variable there.
        start: The first.
        size: How many; 0: all from there on.
    """

    name: str
    start: int = 0
    size: int = 0


class Ticket:
    """What a write holds as long as it may still be sent."""

    __slots__ = ()

    def close(self) -> None:
        """Say that nobody will send the write any more."""


NO_TICKET = Ticket()


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """What travels with every write.

    Attributes:
        client_id: Random per client object and shard; 0 means the write has no identity and is never deduplicated.
        sequence: Counts up by one per write of that client, from 1.
        lowest_open: The lowest sequence that the client may still send; 0 if it does not say.
        client_started: When the client took its id, Unix microseconds by the shard's clock; 0 if it does not say.
        origin: The shard that the write was first sent to.
        incarnation: The shard's incarnation that the caller knows; 0 accepts any.
        global_step: The model's step, for optimizers and readers that use it.
        advance: Gradients only: steps by which the shard's counter goes up when they are applied.
        request_time: Unix seconds, at most a day ahead of the shard's clock; becomes the rows' last update. 0 is now.
        allow_non_finite: Accept NaN and infinity.
        dedup: Gradients only: sum the gradients of equal ids into one step each.
        ticket: Says that the write may still be sent, or sent again, for as long as it is not closed.
    """

    client_id: int = 0
    sequence: int = 0
    lowest_open: int = 0
    client_started: int = 0
    origin: int = 0
    incarnation: int = 0
    global_step: int = 0
    advance: int = 0
    request_time: int = 0
    allow_non_finite: bool = False
    dedup: bool = False
    ticket: Ticket = field(default=NO_TICKET, repr=False, compare=False)


ANY_WRITE = Write()


@dataclass(frozen=True, slots=True)
class UpdateLayout:
    """What one table's part of an update will hold.

    Attributes:
        table: Table name.
        rows: Number of ids.
        dim: Floats per row.
        counts: Whether multiplicities travel.
        learning_rates: float32[segments], or None for the rates of the config.
    """

    table: str
    rows: int
    dim: int
    counts: bool = False
    learning_rates: Float32Array | None = None


class UpdateFrame(list[UpdatePart]):
    """Parts of an update, which may lie in the message that will carry them.

    Attributes:
        write: What was encoded with them.
        message: The encoded UpdateRequest, or None where the parts are ordinary arrays.
    """

    def __init__(self, parts: Sequence[UpdatePart], write: Write, message: bytes | None = None) -> None:
        super().__init__(parts)
        self.write = write
        self.message = message

    @classmethod
    def plain(cls, layouts: Sequence[UpdateLayout], write: Write) -> UpdateFrame:
        """Make parts whose arrays are ordinary ones, still to be written."""
        return cls(
            [
                UpdatePart(
                    layout.table,
                    np.empty(layout.rows, np.uint64),
                    np.empty((layout.rows, layout.dim), np.float32),
                    np.empty(layout.rows, np.uint32) if layout.counts else None,
                    layout.learning_rates,
                )
                for layout in layouts
            ],
            write,
        )


@dataclass(frozen=True, slots=True)
class EntryPage:
    """One page of a table's dump: serialized EntryDumps with ids, and the offset of the next page; 0: there is none."""

    entries: list[bytes]
    offset: int = field(default=0)


@dataclass(frozen=True, slots=True)
class Dequeued:
    """What asking queues for an element gave.

    Attributes:
        queue: Which queue gave it; empty if none did.
        element: The element.
        lease: To acknowledge it by; 0 if it was consumed at once.
        exhausted: Nothing waits and nothing is leased: there will be no more. If nothing was given and this is false,
            another worker holds elements that may come back.
    """

    queue: str = ""
    element: str = ""
    lease: int = 0
    exhausted: bool = False

    def __bool__(self) -> bool:
        """Whether an element was given."""
        return self.queue != ""


class Shard(Protocol):
    """One shard of every table: the ids that one PS owns.

    A call is one unit of routing: it is refused as a whole, before anything has changed, or done as a whole, though
    readers may see a part of it first. A repeated write is not done again. Every method raises the classes
    of `trilith.errors`; how long it may take is said before it is called, see `until`.

    The methods from `describe` to `restore` are the verbs, which `trilith.verbs` makes into RPCs; `InProcess` has the
    rest for a shard in this process.
    """

    @property
    def incarnation(self) -> int:
        """Names the shard's content: another after a restart or a restore."""

    @property
    def address(self) -> str:
        """host:port where it was last found; empty in this process."""

    @property
    def remote(self) -> bool:
        """Whether there is a network on the way."""

    @property
    def batch_bytes(self) -> int:
        """Bytes of arrays that one call should carry at most."""

    def until(self, deadline: float) -> Self:
        """The shard, whose calls raise DeadlineExceededError at `deadline`, seconds of `time.monotonic`.

        In this process nothing can be late, and calls end when they are done.
        """

    def adopt(self, incarnation: int) -> None:
        """Take answers of `incarnation` as the shard's own from now on; any other is ShardRestartedError."""

    def new_update(self, layouts: Sequence[UpdateLayout], write: Write, *, float16: bool) -> UpdateFrame:
        """Make parts of a write, whose arrays the caller fills; where there is a message, they lie in it."""

    def describe(self) -> ps_pb2.DescribeResponse:
        """Say which shard this is and what it holds."""

    def create_tables(self, configs: Sequence[ps_pb2.TableConfig], write: Write = ANY_WRITE) -> None:
        """Create tables; repeating is fine, another config under a known name is TableExistsError."""

    def lookup(self, parts: Sequence[IdPart], *, float16: bool = False) -> list[FloatArray]:
        """Return per part float32[n, dim] rows (float16 if asked), zeros where an id has no row. Never inserts."""

    def apply_gradients(self, parts: Sequence[UpdatePart], write: Write) -> int:
        """Take one optimizer step per id occurrence, in order; creates missing rows that pass the filter.

        Returns the step counter where the write advances it, else 0.
        """

    def assign(self, parts: Sequence[UpdatePart], write: Write) -> None:
        """Set weights."""

    def assign_add(self, parts: Sequence[UpdatePart], write: Write) -> None:
        """Add to weights."""

    def reinitialize(self, part: IdPart, write: Write) -> npt.NDArray[np.int8]:
        """Reset rows; int8[n]: 1 existed, 0 was created, -1 unknown table."""

    def contains(self, part: IdPart) -> npt.NDArray[np.bool_]:
        """bool[n]: whether each id has a row."""

    def lookup_entries(self, part: IdPart) -> list[bytes]:
        """Per id a serialized EntryDump without id, b"" where there is no row."""

    def dump_entries(self, table: str, *, part: int, parts: int, limit: int, offset: int = 0) -> EntryPage:
        """Page through `part` of `parts` of the table's rows, up to `limit` at a time, until a page's offset is 0.

        A page is bounded (some megabytes), so it may have fewer entries than `limit` before the part is done.
        """

    def erase(self, part: IdPart, write: Write) -> int:
        """Delete rows; returns how many there were."""

    def evict(self, tables: Sequence[str], write: Write, *, now: int = 0) -> Mapping[str, int]:
        """Delete expired rows of `tables` (all if empty), judged at `now` (0: the shard's clock)."""

    def clear(self, tables: Sequence[str], write: Write) -> Mapping[str, int]:
        """Drop every row of `tables`; returns rows removed by table."""

    def stats(self) -> ps_pb2.StatsResponse:
        """Counters and sizes."""

    def create_variables(
        self, specs: Sequence[ps_pb2.VariableSpec], initial: Sequence[Float32Array], write: Write = ANY_WRITE
    ) -> list[bool]:
        """Create partitions with initial float32[size] values; existing ones keep theirs. True: created now."""

    def pull_variables(self, refs: Sequence[tuple[str, int]]) -> tuple[list[Float32Array], int]:
        """Current values of (name, partition)s, and the global step."""

    def apply_dense_gradients(self, parts: Sequence[DensePart], write: Write, *, learning_rate: float = 0.0) -> int:
        """One step of each partition's own optimizer; `learning_rate` 0 takes the optimizer's own.

        Returns the step counter where the write advances it, else 0.
        """

    def assign_variables(self, parts: Sequence[DensePart], write: Write) -> None:
        """Set partitions' values."""

    def global_step(self, *, advance: int | None = None, set_to: int | None = None, write: Write = ANY_WRITE) -> int:
        """Read the step counter, after advancing or setting it; steps are 0..`trilith.steps.MAX_STEP`."""

    def create_queue(
        self, name: str, elements: Sequence[str] = (), write: Write = ANY_WRITE, *, capacity: int = 0
    ) -> bool:
        """Create a string queue of at most `capacity` elements (0: 100,000); False if it exists, which then stays."""

    def enqueue(self, queue: str, elements: Sequence[str], write: Write) -> None:
        """Append elements, all or, with QueueFullError, none."""

    def dequeue(self, queues: Sequence[str], worker: str, write: Write, *, lease_s: float, claim: str = "") -> Dequeued:
        """Lease the next element of the first queue that has one, or the element `claim` if it is free.

        It is handed out again after `lease_s` seconds unless acknowledged or held; 0 consumes it at once.
        """

    def acknowledge(
        self, worker: str, lease: int, write: Write, *, queue: str = "", elements: Sequence[str] = ()
    ) -> bool:
        """Say that a leased element is done and append `elements` to `queue`, at once; False if the lease was lost."""

    def hold_leases(self, worker: str, lease_s: float, write: Write = ANY_WRITE) -> int:
        """Prolong a worker's leases, or give them back if `lease_s` is 0; returns how many there are."""

    def save(self, path: str, write: Write = ANY_WRITE) -> ps_pb2.SaveResponse:
        """Write this shard's files of a checkpoint; the caller writes the manifest."""

    def restore(
        self,
        path: str,
        write: Write = ANY_WRITE,
        variables: ps_pb2.VariableSources | None = None,
        global_step: int | None = None,
    ) -> ps_pb2.RestoreResponse:
        """Replace this shard's content by its part of a complete checkpoint; its incarnation is another then.

        `variables`: which dense ones change, and to what; None: the checkpoint's take the place of all.
        `global_step`: the step from then on; None: the checkpoint's.
        """

    def shutdown(self) -> None:
        """End the PS, as SIGTERM does; refused by all but those that were started as one run's own."""

    def close(self) -> None:
        """Release what the shard holds; further calls raise ClosedError."""


class InProcess:
    """What `Shard` asks beyond the verbs, as a shard in this process answers it."""

    address = ""
    remote = False
    batch_bytes = sys.maxsize  # nothing is too large

    def until(self, deadline: float) -> Self:
        """See `Shard`."""
        return self

    def adopt(self, incarnation: int) -> None:
        """Nothing to note: it knows its own."""

    def new_update(self, layouts: Sequence[UpdateLayout], write: Write, *, float16: bool) -> UpdateFrame:
        """Ordinary arrays; float16 saves bytes on a wire, and here there is none."""
        return UpdateFrame.plain(layouts, write)


class ServedShard(Shard, Protocol):
    """A shard that a PS serves: it looks up into the reply itself."""

    def dims(self, parts: Sequence[IdPart]) -> list[int]:
        """Floats per row of each part's table."""

    def lookup_into(self, parts: Sequence[IdPart], outs: Sequence[FloatArray]) -> None:
        """Look up into arrays float32 or float16 [n, dim] of any alignment, such as views on a reply being built."""
