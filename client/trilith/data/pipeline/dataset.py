"""Dataset: a pipeline from files to batches, built by chaining, iterated any number of times."""

from __future__ import annotations

import dataclasses
import os
import weakref
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from trilith.data.choices import OnError, check_on_error
from trilith.data.formats.compression import effective_compression
from trilith.data.formats.readers import FileFormat, open_records
from trilith.data.formats.reading import Losses
from trilith.data.formats.text import check_encoding
from trilith.data.parse.absent import Absent, check_absent
from trilith.data.parse.specs import check_specs
from trilith.data.pipeline.division import Merge, divides_itself, open_divided
from trilith.data.pipeline.nodes import (
    Apply,
    Batch,
    Context,
    Convert,
    Held,
    Kept,
    Node,
    Ops,
    Parse,
    Prefetch,
    Read,
    Repeat,
    Shuffle,
    Span,
    Stride,
    Topics,
)
from trilith.data.pipeline.positions import pack_state, unpack_state
from trilith.data.pipeline.queue import FileDealer, OneQueue
from trilith.data.pipeline.sources import Memory
from trilith.data.pipeline.stages import Stage
from trilith.data.pipeline.workers import check_travels, torch_worker
from trilith.data.records import Kind, Records
from trilith.data.samples.chunk import SampleOp
from trilith.errors import InvalidRequestError
from trilith.runtime.extras import need

if TYPE_CHECKING:
    from trilith.client import Client
    from trilith.data.pipeline.torch_dataset import TorchDataset

__all__ = ["Dataset", "DatasetIterator", "from_records", "read", "read_kafka"]


class Dataset:
    """A description of a pipeline, which every method returns another of; it remembers which epoch comes next.

    Records flow in chunks through filters and sample ops, which see a whole chunk at once. A parser is attached with
    `parse` and runs once per batch, after shuffling and batching. Iterating gives the payload of each record (bytes)
    before `batch`; behind it, `Records`, or what the parser makes of them.
    """

    def __init__(self, nodes: tuple[Node, ...], *, deferred: tuple[Node, ...] = (), batched: bool = False):
        """Use `read`, `from_records` or another source."""
        self._nodes = nodes
        self._deferred = deferred
        self._batched = batched
        self._epoch = 0

    def __getstate__(self) -> dict[str, Any]:
        """Itself, or a clear refusal where a function in it cannot be sent to another process."""
        _check_travels((*self._nodes, *self._deferred))
        return self.__dict__.copy()

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The steps, from the source on."""
        return self._nodes

    def _then(self, node: Node) -> Dataset:
        return Dataset((*self._nodes, node), deferred=self._deferred, batched=self._batched)

    def _records_only(self, what: str) -> None:
        if self._batched:
            raise InvalidRequestError(f"{what} works on records: put it before batch")

    # ---- what happens to records -------------------------------------------------------------------------------------

    def filter(self, keep: Any) -> Dataset:
        """Keep some of the records.

        Args:
            keep: A sample op or transform of `trilith.data`, or a function of a chunk of `Records` that returns a
                bool[n] of those to keep.
        """
        self._records_only("filter")
        if isinstance(keep, SampleOp):
            return self.apply(keep)
        if hasattr(keep, "as_proto"):
            return self.transform(keep)
        return self._then(Apply(Kept(keep)))

    def apply(self, function: Any) -> Dataset:
        """Change, drop or repeat records.

        Args:
            function: A sample op, a transform, or a function from a chunk of `Records` to another one that depends on
                the chunk alone.
        """
        self._records_only("apply")
        if not callable(function):
            raise InvalidRequestError(f"{function!r} is neither a sample op nor a function of Records")
        last = self._nodes[-1]
        if isinstance(function, SampleOp):
            if isinstance(last, Ops):  # columns are read once for a chain of ops
                nodes = (*self._nodes[:-1], Ops((*last.ops, function)))
                return Dataset(nodes, deferred=self._deferred)
            return self._then(Ops((function,)))
        return self._then(Apply(function))

    def transform(self, transform: Any) -> Dataset:
        """Run a transform (`trilith.data.samples.transforms`); records it rejects are dropped."""
        from trilith.data.samples.transforms import Transform, ops_of

        if not isinstance(transform, Transform):
            raise InvalidRequestError(f"{transform!r} is no transform of trilith.data.samples.transforms")
        dataset = self
        for op in ops_of(transform.as_proto()):
            dataset = dataset.apply(op)
        return dataset

    def reweight(self, action_priority: str, reweight: str) -> Dataset:
        """Repeat records by the weights of their actions; see `trilith.data.samples.reweight`."""
        from trilith.data.samples.reweight import InstanceReweight

        return self.apply(InstanceReweight(action_priority, reweight))

    def negatives(self, config: Any = None, *, seed: int = 0, pool: Any = None, **options: Any) -> Dataset:
        """Add sampled negatives in front of each positive; see `trilith.data.samples.negatives.NegativeConfig`.

        Args:
            config: What to generate; or its attributes by keyword.
            seed: Decides what is drawn.
            pool: An `ItemPool` to use and to fill; one of its own for each iterator if None.
            **options: Of the config.
        """
        from trilith.data.pipeline.negatives import NegativesNode
        from trilith.data.samples.negatives import NegativeConfig

        self._records_only("negatives")
        return self._then(NegativesNode(config or NegativeConfig(**options), seed, pool))

    def convert(self, kind: Kind | str, *, pruning: int | None = None) -> Dataset:
        """Make every record one of another kind; an ExampleBatch becomes as many as it has rows.

        Args:
            kind: Of the records made.
            pruning: Features to leave out, a `convert.Pruning`: none (0), named (1) or raw ones (2). If None, raw ones
                of records whose kind changes.
        """
        self._records_only("convert")
        if pruning not in (None, 0, 1, 2):
            raise InvalidRequestError(f"pruning is {pruning!r}; it can be 0 (none), 1 (named) or 2 (raw features)")
        return self._then(Convert(Kind(kind), pruning))

    def shuffle(self, buffer_size: int, *, seed: int = 0) -> Dataset:
        """Give records in a random order.

        Args:
            buffer_size: Records among which each next one is drawn.
            seed: Decides the order, with the epoch.
        """
        self._records_only("shuffle")
        _at_least("buffer_size", buffer_size, 1)
        return self._then(Shuffle(buffer_size, seed))

    # ---- shares and spans --------------------------------------------------------------------------------------------

    def shard(self, index: int, count: int, *, by: Literal["files", "records"] | None = None) -> Dataset:
        """Take the share of one of several ranks: every `count`-th file, or record, from the `index`-th on.

        By files, where nothing is said and the source has any; rows of Arrow and records in memory by records.

        Where there are fewer files than ranks, these divide the records, and each reads all files. Shares by files hold
        different numbers of records; shares by records differ by one at most, if no filter follows. Ranks that wait for
        each other at every step, as an all-reduce does, need as many batches each: `take` as many as the smallest has.
        """
        _at_least("count", count, 1)
        if not 0 <= index < count:
            raise InvalidRequestError(f"shard {index} of {count}: the index must be in 0..{count - 1}")
        by = by or ("records" if self._nodes[0].strides else "files")
        if by == "records":
            self._records_only("shard by records")
            _refuse_shared(self._nodes, f"shard({index}, {count}, by='records')")
            return self._then(Stride(index, count))
        source = self._nodes[0]
        if not isinstance(source, Read) or by != "files":
            raise InvalidRequestError(f"shard by={by!r}: 'records', or 'files' where files are read")
        if count > 1:
            _refuse_shared(self._nodes, f"shard({index}, {count})")
            if source.patterns == ("",):
                raise InvalidRequestError("standard input is one file of one process: shard it by='records'")
        return self._with_source(dataclasses.replace(source, shares=(*source.shares, (index, count))))

    def share(self, client: Client | str, name: str, *, worker: str = "", lease_s: float = 60.0) -> Dataset:
        """Take files from a queue on PS 0, so that each goes to one of the workers that share it.

        A worker that dies loses its lease, and its file is read by another one. Workers of a DataLoader are workers of
        the queue.

        Args:
            client: An open `trilith.Client`, or an address, to which whoever iterates connects: an open client cannot
                be sent to a spawned process.
            name: Of the queue; all workers that share it read the same patterns.
            worker: A name of its own that this worker keeps when it is started again; random if empty.
            lease_s: Seconds until the file of a silent worker is handed out again.
        """
        source = self._nodes[0]
        if not isinstance(source, Read):
            raise InvalidRequestError("share works where files are read")
        return self._dealt(OneQueue(client, name, source.patterns, worker, lease_s), shared=True, what="share")

    def deal(self, dealer: Callable[[int], FileDealer], *, shared: bool | None = None) -> Dataset:
        """Take files from what `dealer` makes for an epoch, in place of the files named.

        Args:
            dealer: Makes a dealer of files.
            shared: Whether all processes that make one take from the same queue (True), or each deals out all files
                (False): these are then divided among ranks that `shard` and among the workers of a DataLoader. Both
                refuse a dealer of which nobody has said.
        """
        return self._dealt(dealer, shared=shared, what="deal")

    def _dealt(self, dealer: Callable[[int], FileDealer], *, shared: bool | None, what: str) -> Dataset:
        source = self._nodes[0]
        if not isinstance(source, Read):
            raise InvalidRequestError(f"{what} works where files are read")
        if source.deal is not None:
            raise InvalidRequestError(f"{what}: the files of this dataset are dealt out already")
        if source.patterns == ("",):
            raise InvalidRequestError(f"{what}: standard input is no file that can be dealt out")
        dataset = self._with_source(dataclasses.replace(source, deal=dealer, shared=shared))
        for index, count in source.shares:
            if count > 1:
                _refuse_shared(dataset._nodes, f"shard({index}, {count})")
        for node in self._nodes:
            if isinstance(node, Stride):
                _refuse_shared(dataset._nodes, str(node))
        return dataset

    def _with_source(self, source: Node) -> Dataset:
        return Dataset((source, *self._nodes[1:]), deferred=self._deferred, batched=self._batched)

    def take(self, count: int) -> Dataset:
        """The first `count` records, or behind `batch` batches."""
        _at_least("count", count, 0)
        return self._then(Span(0, count, not self._batched))

    def skip(self, count: int) -> Dataset:
        """What comes behind the first `count` records, or behind `batch` batches."""
        _at_least("count", count, 0)
        return self._then(Span(count, None, not self._batched))

    def repeat(self, epochs: int | None = None) -> Dataset:
        """All of it several times, without end if `epochs` is None; each time shuffled anew."""
        if epochs is not None:
            _at_least("epochs", epochs, 0)
        return self._then(Repeat(epochs))

    def split(
        self, names: Sequence[str], *, max_queue_size: int = 1024, unknown: Literal["raise", "drop"] = "raise"
    ) -> dict[str, Dataset]:
        """The records of each data source, by the key of their header, as datasets by name; they share one reader.

        Args:
            names: Of the data sources.
            max_queue_size: Records that may wait for a flow while another one is read; that one then waits, too.
            unknown: "raise" at a record of another source, or "drop" it.
        """
        from trilith.data.pipeline.flows import Flow, FlowSplitter

        self._records_only("split")
        splitter = FlowSplitter(self._nodes, names, max_queue_size=max_queue_size, unknown=unknown)
        on_error = _on_error(self._nodes)
        return {
            name: Dataset((Flow(splitter, flow, on_error),), deferred=self._deferred) for flow, name in enumerate(names)
        }

    def merge(self, *others: Dataset, block_length: int = 1) -> Dataset:
        """The records of this and other datasets in turns, `block_length` of each, until all have ended."""
        for each in (self, *others):
            each._records_only("merge")
        return Dataset((Merge(tuple(each._nodes for each in (self, *others)), block_length),), deferred=self._deferred)

    # ---- batches -----------------------------------------------------------------------------------------------------

    def parse(self, spec: Any, *, absent: Absent | None = None) -> Dataset:
        """Make arrays of records, once per batch.

        Args:
            spec: Feature specs by name (`Sparse`, `Dense`, `Label`, ... of `trilith.data`), a `ParseSpec`, or any
                function of `Records`.
            absent: What to do about a feature that no record has: "raise", "warn" in the log, or "allow". None raises
                InvalidRequestError for a name that is no column of any file read, when the first batch is parsed; in
                records without columns, where a feature may be rare, it warns when 10,000 records, or all, had it not.
        """
        from trilith.data.parse.parsers import ParseSpec

        check_absent(absent)
        if isinstance(spec, Mapping):
            check_specs(spec)
            return self._on_batches(Parse(dict(spec), absent))
        if isinstance(spec, ParseSpec):
            return self._on_batches(Parse(spec.features, absent, spec))
        function = getattr(spec, "parse", spec)
        if not callable(function):
            raise InvalidRequestError(f"{spec!r} is neither feature specs nor a function of Records")
        return self.map(function)

    def map(self, function: Callable[[Any], Any]) -> Dataset:
        """Run a function on every batch, or on what the parser made of it. It must depend on its argument alone."""
        return self._on_batches(Apply(function))

    def _on_batches(self, node: Node) -> Dataset:
        if self._batched:
            return self._then(node)
        return Dataset(self._nodes, deferred=(*self._deferred, node))

    def batch(self, size: int, *, drop_remainder: bool = False) -> Dataset:
        """Make batches of `size` records; the last may be smaller, or is dropped."""
        self._records_only("batch")
        _at_least("size", size, 1)
        nodes = (*self._nodes, Batch(size, drop_remainder), *self._deferred)
        return Dataset(nodes, batched=True)

    def prefetch(self, depth: int = 2, *, threads: int = 1) -> Dataset:
        """Make elements ahead, on threads of their own.

        Args:
            depth: Elements (batches, or chunks of records) that may wait for the consumer; bounds the memory used.
            threads: How many; functions before it run on all of them, results stay in order.
        """
        _at_least("depth", depth, 1)
        _at_least("threads", threads, 1)
        return self._then(Prefetch(depth, threads))

    def stage(self, node: Node) -> Dataset:
        """Add a step of one's own."""
        return self._then(node)

    # ---- iterating ---------------------------------------------------------------------------------------------------

    def __iter__(self) -> DatasetIterator:
        """A new iterator, of the next epoch: 0, 1, 2, ... of this very dataset; each has an order of its own."""
        epoch, self._epoch = self._epoch, self._epoch + 1
        return self.iterate(epoch=epoch)

    def set_epoch(self, epoch: int) -> None:
        """Let the next `iter` of this dataset be of this epoch, and those behind it of the ones that follow."""
        _at_least("epoch", epoch, 0)
        self._epoch = epoch

    def __len__(self) -> int:
        """Elements of an epoch: records, or batches behind `batch`.

        Raises:
            TypeError: That shows when they are read only: there are files, a topic, a filter, ...
        """
        count, batched = self._nodes[0].length(0), False
        for node in self._nodes[1:]:
            batched = batched or isinstance(node, Batch)
            if not (batched and isinstance(node, Apply)):  # one of one, behind batch
                count = None if count is None else node.length(count)
        if count is None:
            raise TypeError("how many elements this dataset has shows when it is read only")
        return count

    def __bool__(self) -> bool:
        """True, however many elements there are."""
        return True

    def iterate(self, *, epoch: int = 0, state: Mapping[str, Any] | None = None) -> DatasetIterator:
        """A new iterator.

        Args:
            epoch: Decides, with the seeds, the order and what is drawn.
            state: Where to go on: what `DatasetIterator.state_dict` of an iterator of this dataset gave. The epoch is
                that of the state, and the next `iter` gives the one behind it.
        """
        ready = self if self._batched or not self._deferred else self.batch(1)
        iterator = DatasetIterator(ready._nodes, epoch, payloads=not ready._batched)
        if state is not None:
            iterator.load_state_dict(state)
            self._epoch = iterator.epoch + 1
        return iterator

    def chunks(self, *, epoch: int = 0) -> DatasetIterator:
        """A new iterator whose elements are chunks of `Records`, as they flow."""
        self._records_only("chunks")
        return DatasetIterator(self._nodes, epoch, payloads=False)

    def torch(self, *, epoch: int = 0) -> TorchDataset:
        """An `IterableDataset` for a torch DataLoader (with `batch_size=None`); its workers share the data.

        Together they give what one process gives. They take every n-th file, or record if there are fewer files than
        workers. Where the dataset has a step that depends on all records before it (`take`, `skip`, `shard` by records,
        a dropped remainder), each worker reads up to there alike and goes on with every n-th record or batch. Each has
        a pool of negatives of its own. Every pass is the next epoch.

        Args:
            epoch: That of the first pass.
        """
        need("torch", extra="torch")
        from trilith.data.pipeline.torch_dataset import TorchDataset

        return TorchDataset(self, epoch)


class DatasetIterator:
    """One pass over a dataset. A context manager; abandoning it also ends its threads."""

    def __init__(self, nodes: tuple[Node, ...], epoch: int, *, payloads: bool) -> None:
        """Use `Dataset.iterate`."""
        self._mark = zlib.crc32("|".join(node.mark for node in nodes if node.mark).encode())
        self._epoch = epoch
        self._payloads = payloads
        self._process = os.getpid()
        self._worker = torch_worker()
        self._losses = Losses()
        self._nodes = nodes
        self._stage = self._open()
        self._begun = False
        self._follows: Callable[[], Callable[[], dict[str, Any]]] | None = None
        self._chunk: Records | None = None
        self._at = 0

    def _open(self) -> Stage:
        context = Context(epoch=self._epoch, worker=self._worker, losses=self._losses, on_error=_on_error(self._nodes))
        stage = open_divided(self._nodes, context)
        weakref.finalize(self, _close, stage, self._process)
        return stage

    @property
    def epoch(self) -> int:
        """Which epoch it is a pass of."""
        return self._epoch

    @property
    def losses(self) -> Losses:
        """What was skipped as damaged so far."""
        return self._losses

    def __iter__(self) -> Self:
        """Itself."""
        return self

    def __next__(self) -> Any:
        """The next payload, batch, or whatever the last function makes."""
        if not self._payloads:
            return self._pull()
        while self._chunk is None or self._at == len(self._chunk):
            self._chunk, self._at = self._pull(), 0
        self._at += 1
        return self._chunk.payload(self._at - 1)

    def _pull(self) -> Any:
        self._begun = True
        if os.getpid() != self._process:
            raise InvalidRequestError(
                "this iterator was made before the process was forked, and its files and threads are the parent's: "
                "iterate the dataset in the child"
            )
        return next(self._stage)

    def state_dict(self) -> dict[str, Any]:
        """Where it is behind the last element given out: None, numbers, strings, bytes, lists and dicts.

        It holds what shuffle buffers and the like hold. `trilith.data.to_json` makes a line of text of it. While
        something fetches ahead of a loop (`trilith.pipelining.Prefetcher`), the last element given out is the loop's.
        """
        return (self.position() if self._follows is None else self._follows())()

    def position(self) -> Callable[[], dict[str, Any]]:
        """Where it is now, as a function that makes the `state_dict`: knowing the place is cheap, packing it is not."""
        rest = None
        if self._chunk is not None and self._at < len(self._chunk):
            rest = self._chunk.take(slice(self._at, None))
        stage = self._stage.state()

        def state() -> dict[str, Any]:
            found = {
                "version": 1,
                "pipeline": self._mark,
                "epoch": self._epoch,
                "rest": pack_state(rest),
                "stage": pack_state(stage),
            }
            return found if self._worker[1] == 1 else {**found, "worker": list(self._worker)}

        return state

    def follow(self, position: Callable[[], Callable[[], dict[str, Any]]]) -> None:
        """Have `state_dict` say where `position` says a loop is, whatever has been taken ahead of it."""
        self._follows = position

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go where another iterator of the same dataset was."""
        if self._begun:
            raise InvalidRequestError("this iterator has begun; load the position into a new one")
        if state.get("version") != 1:
            raise InvalidRequestError(f"a position of version {state.get('version')!r}; this program reads version 1")
        if state["pipeline"] != self._mark:
            raise InvalidRequestError("the position is of an iterator of another pipeline")
        saved, now = tuple(state.get("worker", (0, 1))), self._worker
        if saved != now:
            raise InvalidRequestError(
                f"the position is of DataLoader worker {saved[0]} of {saved[1]}; this is {now[0]} of {now[1]}"
            )
        if state["epoch"] != self._epoch:
            self._stage.close()
            self._epoch = state["epoch"]
            self._stage = self._open()
        self._chunk, self._at = unpack_state(state["rest"]), 0
        self._stage.restore(unpack_state(state["stage"]))

    def __getstate__(self) -> None:
        raise TypeError("an iterator cannot be pickled; send its dataset, or its state_dict()")

    def close(self) -> None:
        """Let go of files and threads; there will be no more elements."""
        self._begun = True
        self._chunk = None
        _close(self._stage, self._process)
        self._stage = Memory(Records.of([], Kind.PLAINTEXT))

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


# ---- sources ---------------------------------------------------------------------------------------------------------


def read(
    files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    cycle_length: int = 1,
    block_length: int = 1,
    exclude: Callable[[str], bool] | None = None,
    on_error: OnError = "raise",
    **options: Any,
) -> Dataset:
    """A dataset of the records of files, in the order of their sorted names.

    Args:
        files: A path or glob, or several, on disk or at any URL that fsspec knows; the empty string is standard input.
        cycle_length: Files read at a time, in turns.
        block_length: Records of one file before it is the next one's turn.
        exclude: Says of a file name whether to leave it out.
        on_error: "raise" at damaged records, or "skip" them, in sample ops and parsers of feature specs, too; they are
            counted in `DatasetIterator.losses`.
        **options: What the files are, as for `open_records`: kind, format, framing, compression, columns, ...
    """
    _at_least("cycle_length", cycle_length, 1)
    _at_least("block_length", block_length, 1)
    _check_options(options, open_records, but={"start", "on_error", "blocks"})
    check_on_error(on_error)
    FileFormat(options.get("format") or FileFormat.RECORDS)
    effective_compression("", compression=options.get("compression"), use_snappy=options.get("use_snappy"))
    check_encoding(options.get("encoding"))
    patterns = (os.fspath(files),) if isinstance(files, str | os.PathLike) else tuple(os.fspath(each) for each in files)
    return Dataset(
        (
            Read(
                patterns=patterns,
                options=options,
                cycle_length=cycle_length,
                block_length=block_length,
                exclude=exclude,
                on_error=on_error,
            ),
        )
    )


def read_kafka(topics: str | Sequence[str], **options: Any) -> Dataset:
    """A dataset of the records of Kafka topics; connects when it is iterated.

    Args:
        topics: One or several.
        **options: Of `trilith.data.formats.kafka.KafkaReader`: group_id, servers, kind, framing, stream_timeout, ...
    """
    need("confluent_kafka", extra="data")
    from trilith.data.formats.kafka import KafkaReader

    _check_options(options, KafkaReader.__init__)
    check_on_error(options.get("on_error", "raise"))
    return Dataset((Topics((topics,) if isinstance(topics, str) else tuple(topics), options),))


def from_records(records: Records | Sequence[bytes], kind: Kind | str = Kind.INSTANCE) -> Dataset:
    """A dataset of records in memory: `Records`, or payloads of the given kind."""
    return Dataset((Held(records if isinstance(records, Records) else Records.of(records, kind)),))


def _check_options(options: Mapping[str, Any], of: Callable[..., Any], but: Collection[str] = ()) -> None:
    """Refuse options that `of`, which is called when the dataset is iterated, does not take, and what is no kind."""
    known = (of.__kwdefaults__ or {}).keys() - set(but)
    if unknown := options.keys() - known:
        raise InvalidRequestError(f"unknown options {sorted(unknown)}; there are {sorted(known)}")
    Kind(options.get("kind") or Kind.INSTANCE)


def _on_error(nodes: tuple[Node, ...]) -> OnError:
    """What steps do about damage: as their source does, or all of them."""
    source = nodes[0]
    if isinstance(source, Merge):
        return "skip" if all(_on_error(each) == "skip" for each in source.pipelines) else "raise"
    found: OnError = (
        source.options.get("on_error", "raise") if isinstance(source, Topics) else getattr(source, "on_error", "raise")
    )
    return found


def _close(stage: Stage, process: int) -> None:
    """Close a stage where it was made; in a forked process its threads are gone, and its files and leases another's."""
    if os.getpid() == process:
        stage.close()


def _refuse_shared(nodes: tuple[Node, ...], step: str) -> None:
    """Refuse a share of files that are shared in another way, or perhaps."""
    source = nodes[0]
    if isinstance(source, Merge):
        for each in source.pipelines:
            _refuse_shared(each, step)
    if not isinstance(source, Read) or not divides_itself(nodes):
        return
    if source.shared:
        raise InvalidRequestError(f"{step} and share exclude each other: a queue deals each file to one worker already")
    raise InvalidRequestError(
        f"{step} and deal: say deal(..., shared=False) if each process deals out all files; shared=True excludes shares"
    )


def _check_travels(nodes: tuple[Node, ...]) -> None:
    """Refuse functions that cannot be pickled, by the step that holds them."""
    for node in nodes:
        for function, step in node.functions():
            check_travels(function, step)
        if isinstance(node, Merge):
            for pipeline in node.pipelines:
                _check_travels(pipeline)


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidRequestError(f"{name}={value!r} is no whole number")
    if value < least:
        raise InvalidRequestError(f"{name}={value} is below {least}")
