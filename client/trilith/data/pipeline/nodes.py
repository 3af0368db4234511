"""The steps of a dataset's description; each makes its stage when an iterator is made."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from trilith.data.blocks import Blocks
from trilith.data.choices import OnError
from trilith.data.formats.files import match_files, shard_files
from trilith.data.formats.readers import open_records
from trilith.data.formats.reading import BLOCK_BYTES, Losses, Position, RecordReader
from trilith.data.formats.streams import STDIN, read_once
from trilith.data.parse.absent import Absent, AbsentFeatures, SourceColumns
from trilith.data.parse.specs import Features, FeatureSpec
from trilith.data.pipeline.prefetch import Helpers, Overlapping, Prefetching
from trilith.data.pipeline.queue import AllowedFiles, FileDealer
from trilith.data.pipeline.shuffle import Shuffling
from trilith.data.pipeline.sources import ListedFiles, Memory, Reading, Streaming
from trilith.data.pipeline.stages import (
    Batching,
    Ending,
    Noticing,
    Picking,
    Repeating,
    Replayed,
    Skipping,
    Stage,
    Stepping,
    Striding,
    Taking,
)
from trilith.data.records import Kind, Records
from trilith.data.samples.chunk import SampleOp, apply_ops
from trilith.errors import InvalidRequestError

if TYPE_CHECKING:
    from trilith.data.parse.parsers import ParseSpec

__all__ = [
    "Apply",
    "Batch",
    "Context",
    "Convert",
    "Held",
    "Kept",
    "Node",
    "Ops",
    "Parse",
    "Prefetch",
    "Read",
    "Repeat",
    "Share",
    "Shuffle",
    "Span",
    "Stride",
    "Topics",
    "mapped",
    "open_nodes",
]

_LEAST_BLOCK = 1 << 18  # of files that are read in turns, so that many of them do not take much memory
_EPOCH_SEEDS = 0x9E3779B97F4A7C15  # far apart, so that no epoch repeats another seed's
_WORKER_SEEDS = 0xD1342543DE82EF95


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What an iterator hands down to its stages when they are made.

    Attributes:
        epoch: Which pass over the data.
        worker: This process's index among those that share an iterator's data, and how many there are.
        helpers: Threads for functions; None runs them where they are asked for.
        losses: Adds up what is skipped.
        on_error: Whether steps raise at damaged records or leave them out.
        columns: Of the files read, where they have any.
        counting: Held while `losses` are added to.
    """

    epoch: int = 0
    worker: tuple[int, int] = (0, 1)
    helpers: Helpers | None = None
    losses: Losses = field(default_factory=Losses)
    on_error: OnError = "raise"
    columns: SourceColumns = field(default_factory=SourceColumns)
    counting: Any = field(default_factory=threading.Lock)

    def lost(self, records: int) -> None:
        """Count records that a step left out as damaged."""
        with self.counting:
            self.losses.add(f"{records} damaged records were left out", 0)
            self.losses.records += records - 1


class Node:
    """One step of a pipeline's description: makes its stage behind the one before it."""

    strides: ClassVar[bool] = False
    """Of a source: whether ranks divide its records, as there are no files that they could."""

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """Make the stage.

        Args:
            upstream: Makes the stage in front of this one.
            context: Of this one.
        """
        raise NotImplementedError

    @property
    def mark(self) -> str:
        """What a saved position must agree with; empty if this step has no part in one."""
        return type(self).__name__

    @property
    def whole(self) -> bool:
        """Whether what becomes of a record depends on those before it, so that all have to go through one process."""
        return False

    def length(self, count: int) -> int | None:
        """How many elements it makes of so many, where that is known without making them; a source of none."""
        return None

    def functions(self) -> Iterator[tuple[Callable[..., Any], str]]:
        """The caller's functions that it holds, each with how to call the step."""
        yield from ()


# ---- sources ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Read(Node):
    """Records of files."""

    patterns: tuple[str, ...]
    options: Mapping[str, Any]
    cycle_length: int
    block_length: int
    exclude: Callable[[str], bool] | None
    on_error: OnError
    shares: tuple[tuple[int, int], ...] = ()
    deal: Callable[[int], FileDealer] | None = None
    shared: bool | None = None
    """Whether all processes that make a dealer of `deal` take from one queue; None if nobody has said."""

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`; ranks and workers divide files, and records where there are fewer files than them."""
        index, count = context.worker
        strides: list[tuple[int, int, bool]] = []
        if self.deal is not None and (self.shared or not (self.shares or count > 1)):
            dealer = self._dealer(context.epoch)
        else:
            names = self._names(context.epoch, count)
            for place, of in (*self.shares, (index, count)):
                if strides or len(names) < of:
                    strides.append((place, of, len(strides) < len(self.shares)))
                else:
                    names = shard_files(names, place, of)
            if strides:
                self._refuse_pipes(names)
            dealer = ListedFiles(names)

        block = max(BLOCK_BYTES // self.cycle_length, _LEAST_BLOCK)
        options = {"block_bytes": block, "blocks": Blocks(), **self.options}

        def opener(name: str, start: Position) -> RecordReader:
            reader = open_records(name, start=start, on_error=self.on_error, **options)
            context.columns.opened(reader.available)
            return reader

        def available() -> Iterator[Mapping[str, str] | None]:
            for name in match_files(self.patterns, exclude=self.exclude):
                with open_records(name, on_error="skip", **options) as reader:
                    found = reader.available
                yield found

        context.columns.expect(available())
        stage: Stage = Reading(
            dealer,
            opener,
            context.losses,
            cycle_length=self.cycle_length,
            block_length=self.block_length,
            skip=self.on_error == "skip",
        )
        if count == 1 and any(of > 1 for _, of in self.shares):
            stage = Noticing(stage, " of ".join(f"share {place} of {of}" for place, of in self.shares))
        for place, of, rank in strides:
            stage = Striding(stage, place, of, rank=rank) if of > 1 else stage
        return stage

    def _dealer(self, epoch: int) -> FileDealer:
        assert self.deal is not None
        dealer = self.deal(epoch)
        return dealer if self.exclude is None else AllowedFiles(dealer, self.exclude)

    def _names(self, epoch: int, workers: int) -> list[str]:
        """All files that ranks and workers divide."""
        if self.deal is not None:
            if self.shared is None:
                raise InvalidRequestError(
                    f"{workers} DataLoader workers each make a dealer of files: say deal(..., shared=True) if they all "
                    "take from one queue, shared=False if each deals out all files"
                )
            dealer = self._dealer(epoch)
            names = []
            while (name := dealer.take()) is not None:
                names.append(name)
            dealer.close()
            return names
        if self.patterns != ("",):
            return match_files(self.patterns, exclude=self.exclude)
        if multiprocessing.parent_process() is not None:
            raise InvalidRequestError(
                "standard input is the main process's: read it there, with num_workers=0, not in a child"
            )
        return list(self.patterns)

    @staticmethod
    def _refuse_pipes(names: list[str]) -> None:
        """Refuse to share what can be read once."""
        for name in names:
            if name != STDIN and read_once(name):
                raise InvalidRequestError(f"{name}: a pipe can be read by one process, not shared by several")

    def functions(self) -> Iterator[tuple[Callable[..., Any], str]]:
        """See `Node`."""
        if self.exclude is not None:
            yield self.exclude, "read(exclude=...)"
        if self.deal is not None:
            yield self.deal, "share" if self.shared else "deal"


@dataclass(frozen=True, slots=True)
class Topics(Node):
    """Records of Kafka topics."""

    topics: tuple[str, ...]
    options: Mapping[str, Any]

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`; several workers are members of one group, or divide the partitions of `start`."""
        from trilith.data.formats.kafka import KafkaReader

        context.columns.plain = True
        index, count = context.worker
        start: Position | None = self.options.get("start")
        if start is not None and start.partitions and count > 1:
            start = dataclasses.replace(start, partitions=start.partitions[index::count])
            if not start.partitions:
                return Memory(Records.of([], Kind.PLAINTEXT))

        def opener(at: Position | None) -> RecordReader:
            return KafkaReader(self.topics, **{**self.options, "start": at or start})

        return Streaming(opener, context.losses)


@dataclass(frozen=True, slots=True)
class Held(Node):
    """Records in memory."""

    records: Records

    strides = True

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`."""
        context.columns.plain = True
        stage = Memory(self.records)
        return Striding(stage, *context.worker) if context.worker[1] > 1 else stage

    def length(self, count: int) -> int:
        """See `Node`."""
        return len(self.records)


# ---- steps -----------------------------------------------------------------------------------------------------------


def open_nodes(nodes: tuple[Node, ...], context: Context) -> Stage:
    """Make the stages of a pipeline; the last one."""
    return nodes[-1].open(lambda changed: open_nodes(nodes[:-1], changed), context)


def mapped(upstream: Stage, function: Callable[[Any], Any], context: Context) -> Stage:
    """A stage that runs a function, on helping threads where there are any."""
    if context.helpers is None or context.helpers.count == 0:
        return Stepping(upstream, function)
    return Overlapping(upstream, function, context.helpers)


@dataclass(frozen=True, slots=True)
class Kept:
    """A filter by a function: the records where it is true."""

    keep: Callable[[Records], Any]

    def __call__(self, records: Records) -> Records:
        """The records that stay."""
        kept = self.keep(records)
        if isinstance(kept, Records):
            return kept
        mask = np.asarray(kept)
        if mask.dtype != np.bool_ or mask.shape != (len(records),):
            raise InvalidRequestError(
                f"a filter gave {mask.dtype}{list(mask.shape)}; bool[{len(records)}] is needed for as many records"
            )
        return records if mask.all() else records.take(mask)


@dataclass(frozen=True, slots=True)
class Apply(Node):
    """A function of each element."""

    function: Callable[[Any], Any]

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`."""
        return mapped(upstream(context), self.function, context)

    def functions(self) -> Iterator[tuple[Callable[..., Any], str]]:
        """See `Node`."""
        yield (self.function.keep, "filter") if isinstance(self.function, Kept) else (self.function, "apply or map")


@dataclass(frozen=True, slots=True)
class Ops(Node):
    """Sample ops in a row, which read their columns once."""

    ops: tuple[SampleOp, ...]

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`."""

        def apply(records: Records) -> Records:
            return apply_ops(self.ops, records, on_error=context.on_error, lost=context.lost)

        return mapped(upstream(context), apply, context)


@dataclass(frozen=True, slots=True)
class Convert(Node):
    """Records of another kind, without the features that are pruned (see `convert.convert`)."""

    kind: Kind
    pruning: int | None = None

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`."""

        def converted(records: Records) -> Records:
            from trilith.data.messages import Pruning, convert

            pruning = None if self.pruning is None else Pruning(self.pruning)
            return convert(records, self.kind, pruning=pruning, on_error=context.on_error, lost=context.lost)

        return mapped(upstream(context), converted, context)


@dataclass(frozen=True, slots=True)
class Parse(Node):
    """Arrays by name of batches; `given` parses them, if there is one."""

    features: Mapping[str, FeatureSpec]
    absent: Absent | None = None
    given: ParseSpec | None = None

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`."""
        from trilith.data.parse.parsers import ParseSpec

        spec = self.given or ParseSpec(self.features, on_error=context.on_error)
        watch = AbsentFeatures(spec, context.columns, self.absent)
        counting = threading.Lock()

        def parse(records: Records) -> Features:
            if records.kind is Kind.EXAMPLE_BATCH and context.on_error == "skip":
                with counting:  # one at a time: how many were left out shows in no other way
                    before = spec.skipped
                    batch, lost = spec.parse(records), spec.skipped - before
            else:
                batch = spec.parse(records)
                rows = len(next(iter(batch.values()), records))
                lost = 0 if records.kind is Kind.EXAMPLE_BATCH else len(records) - rows
            if lost:
                context.lost(lost)
            watch.look(records)
            return batch

        return Ending(mapped(upstream(context), parse, context), watch.end)

    def length(self, count: int) -> int:
        """See `Node`."""
        return count


@dataclass(frozen=True, slots=True)
class Shuffle(Node):
    """Records in a random order."""

    size: int
    seed: int

    @property
    def mark(self) -> str:
        """See `Node`."""
        return repr(self)

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`."""
        seed = self.seed + _EPOCH_SEEDS * context.epoch + _WORKER_SEEDS * context.worker[0]
        return Replayed(Shuffling(upstream(context), self.size, seed), every=max(self.size, 4096))

    def length(self, count: int) -> int:
        """See `Node`."""
        return count


@dataclass(frozen=True, slots=True)
class Stride(Node):
    """Every n-th record."""

    index: int
    count: int

    @property
    def mark(self) -> str:
        """See `Node`."""
        return repr(self)

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`."""
        return Striding(upstream(context), self.index, self.count, rank=True)

    @property
    def whole(self) -> bool:
        """See `Node`."""
        return True

    def __str__(self) -> str:
        return f"shard({self.index}, {self.count}, by='records')"

    def length(self, count: int) -> int:
        """See `Node`."""
        return len(range(self.index, count, self.count))


@dataclass(frozen=True, slots=True)
class Share(Node):
    """Every n-th record or batch: what is one worker's of a DataLoader."""

    index: int
    count: int
    records: bool

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`."""
        return (Striding if self.records else Picking)(upstream(context), self.index, self.count)


@dataclass(frozen=True, slots=True)
class Span(Node):
    """All but the first elements, or only the first."""

    skipped: int
    limit: int | None
    records: bool

    @property
    def mark(self) -> str:
        """See `Node`."""
        return repr(self)

    @property
    def whole(self) -> bool:
        """See `Node`."""
        return True

    def __str__(self) -> str:
        return f"skip({self.skipped})" if self.limit is None else f"take({self.limit})"

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`."""
        stage = upstream(context)
        if self.limit is None:
            return Skipping(stage, self.skipped, records=self.records)
        return Taking(stage, self.limit, records=self.records)

    def length(self, count: int) -> int:
        """See `Node`."""
        return max(0, count - self.skipped) if self.limit is None else min(count, self.limit)


@dataclass(frozen=True, slots=True)
class Repeat(Node):
    """All before it, again and again."""

    epochs: int | None

    @property
    def mark(self) -> str:
        """See `Node`."""
        return repr(self)

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`."""
        first = context.epoch

        def make(epoch: int) -> Stage:
            return upstream(dataclasses.replace(context, epoch=first + epoch))

        return Repeating(make, self.epochs)

    def length(self, count: int) -> int | None:
        """See `Node`."""
        return None if self.epochs is None else self.epochs * count


@dataclass(frozen=True, slots=True)
class Batch(Node):
    """Chunks into batches."""

    size: int
    drop_remainder: bool

    @property
    def mark(self) -> str:
        """See `Node`."""
        return repr(self)

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`."""
        return Batching(upstream(context), self.size, drop_remainder=self.drop_remainder)

    @property
    def whole(self) -> bool:
        """See `Node`: else the remainder of every worker would be dropped."""
        return self.drop_remainder

    def length(self, count: int) -> int:
        """See `Node`."""
        return count // self.size if self.drop_remainder else -(-count // self.size)


@dataclass(frozen=True, slots=True)
class Prefetch(Node):
    """What is before it, on threads of its own."""

    depth: int
    threads: int

    @property
    def mark(self) -> str:
        """See `Node`: with other threads or none, a position means the same."""
        return ""

    def open(self, upstream: Callable[[Context], Stage], context: Context) -> Stage:
        """See `Node`."""
        helpers = Helpers(self.threads - 1)
        return Prefetching(upstream(dataclasses.replace(context, helpers=helpers)), helpers, self.depth)

    def length(self, count: int) -> int:
        """See `Node`."""
        return count
