"""Datasets under the names that the reference system has for them: thin layers over `trilith.data.read`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from trilith.compat.monolith.operators import cache_one, merged_window
from trilith.data.formats.files import match_input_patterns
from trilith.data.formats.framing import Framing
from trilith.data.pipeline.dataset import Dataset, read, read_kafka
from trilith.data.pipeline.queue import AllOf
from trilith.data.records import Kind
from trilith.data.samples.item_pool import ItemPool
from trilith.errors import InvalidRequestError

__all__ = [
    "CacheOneDataset",
    "DatasetFlags",
    "DistributedFilePBDataset",
    "FilePBDataset",
    "KafkaDataset",
    "PBDataset",
    "ParquetDataset",
    "TFRecordDataset",
    "create_instance_dataset",
    "create_item_pool",
    "distribute",
    "dynamic_sharding_dataset",
    "merged_window_dataset",
    "negative_gen",
]

PbType: TypeAlias = Kind | str
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFlags:
    """What the reference system takes from command-line flags.

    Attributes:
        data_type: Kind of records; instances if empty.
        lagrangex_header: See `Framing`.
        sort_id: See `Framing.has_sort_id`.
        kafka_dump: See `Framing`.
        kafka_dump_prefix: See `Framing`.
        kafka_topics: Commas between them; with group and servers, everything is read from Kafka.
        kafka_group_id: Consumer group.
        kafka_servers: host:port, with commas between them.
        dataset_input_patterns: Patterns that take the place of those given; see `expand_input_patterns`.
        dataset_input_use_parquet: Files are Parquet.
        dataset_input_use_tfrecord: Files are TFRecords.
        dataset_input_compression_type: Compression where none is given.
        dataset_input_use_snappy: Files are snappy.
        max_task_num_per_worker: Files read in turns; 4 if 0.
        enable_dynamic_sharding: Files come from a queue.
    """

    data_type: str = ""
    lagrangex_header: bool = False
    sort_id: bool = True
    kafka_dump: bool = False
    kafka_dump_prefix: bool = False
    kafka_topics: str = ""
    kafka_group_id: str = ""
    kafka_servers: str = ""
    dataset_input_patterns: str = ""
    dataset_input_use_parquet: bool = False
    dataset_input_use_tfrecord: bool = False
    dataset_input_compression_type: str = ""
    dataset_input_use_snappy: bool = False
    max_task_num_per_worker: int = 0
    enable_dynamic_sharding: bool = False


_NO_FLAGS = DatasetFlags()


def PBDataset(*args: Any, flags: DatasetFlags = _NO_FLAGS, **kwargs: Any) -> Dataset:  # noqa: N802 - its name there
    """The dataset that the arguments ask for, of one of the classes below.

    Args:
        *args: A file name, or patterns, or topics and a group.
        flags: What takes the place of command-line flags.
        **kwargs: Of the class; also topics_or_files, buffer_size_or_group_id and input_pb_type_or_servers.
    """
    kwargs = _without_aliases(kwargs)
    if flags.dataset_input_patterns:
        kwargs["patterns"] = match_input_patterns(flags.dataset_input_patterns)
        kwargs.pop("file_name", None)
        args = ()
    if flags.dataset_input_use_parquet and flags.dataset_input_use_tfrecord:
        raise InvalidRequestError("dataset_input_use_parquet and dataset_input_use_tfrecord cannot both be set")
    for name, wanted in (
        ("use_parquet", flags.dataset_input_use_parquet),
        ("use_tfrecord", flags.dataset_input_use_tfrecord),
    ):
        if wanted:
            kwargs[name] = True
    cls, args, kwargs = _concrete(args, kwargs, flags)
    return cls(*args, flags=flags, **kwargs)


def _without_aliases(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(kwargs)
    topics_or_files = found.pop("topics_or_files", None)
    if isinstance(topics_or_files, str):
        found["file_name"] = topics_or_files
    elif topics_or_files is not None:
        found["patterns"] = found["topics"] = list(topics_or_files)
    size_or_group = found.pop("buffer_size_or_group_id", None)
    if size_or_group is not None:
        found["buffer_size" if isinstance(size_or_group, int) else "group_id"] = size_or_group
    type_or_servers = found.pop("input_pb_type_or_servers", None)
    if type_or_servers is not None:
        is_kind = isinstance(type_or_servers, Kind) or type_or_servers in {str(kind) for kind in Kind}
        found["input_pb_type" if is_kind else "servers"] = type_or_servers
    return found


def _concrete(
    args: tuple[Any, ...], kwargs: dict[str, Any], flags: DatasetFlags
) -> tuple[Callable[..., Dataset], tuple[Any, ...], dict[str, Any]]:
    """The class, and what of the arguments it takes."""
    if flags.kafka_topics and flags.kafka_group_id and flags.kafka_servers:
        topics = flags.kafka_topics.split(",")
        rest = {"topics": topics, "group_id": flags.kafka_group_id, "servers": flags.kafka_servers}
        return KafkaDataset, (), _without(kwargs, "patterns", "file_name", "buffer_size") | rest
    all_three = all(kwargs.get(name) for name in ("topics", "group_id", "servers"))
    if args and isinstance(args[0], str):
        return _one_file(kwargs), args, _without(kwargs, "use_parquet", "use_tfrecord", "patterns", "topics")
    if args:
        if (len(args) > 1 and isinstance(args[1], str)) or kwargs.get("group_id") or kwargs.get("servers"):
            return KafkaDataset, args, _without(kwargs, "patterns", "topics")
        return DistributedFilePBDataset, args, _without(kwargs, "patterns", "topics")
    if kwargs.get("patterns") and not all_three:
        return DistributedFilePBDataset, (), _without(kwargs, "topics", "group_id", "servers")
    if all_three:
        return KafkaDataset, (), _without(kwargs, "patterns", "file_name", "buffer_size")
    if "file_name" in kwargs or not kwargs or kwargs.get("use_parquet") or kwargs.get("use_tfrecord"):
        return _one_file(kwargs), (), _without(kwargs, "use_parquet", "use_tfrecord", "patterns", "topics")
    raise InvalidRequestError(f"arguments {sorted(kwargs)} ask for neither files nor topics")


def _one_file(kwargs: Mapping[str, Any]) -> Callable[..., Dataset]:
    if kwargs.get("use_parquet"):
        return ParquetDataset
    return TFRecordDataset if kwargs.get("use_tfrecord") else FilePBDataset


def _without(kwargs: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in names}


def _read_options(options: Mapping[str, Any], flags: DatasetFlags) -> tuple[dict[str, Any], Kind | None]:
    """Options of `read` for the arguments that file datasets have, and the kind to convert records to."""
    known = {
        "input_pb_type", "output_pb_type", "lagrangex_header", "has_sort_id", "kafka_dump", "kafka_dump_prefix",
        "use_snappy", "compression_type", "buffer_size", "on_error", "feature_pruning_type",
        "disable_iterator_save_restore",
    }  # fmt: skip
    if unknown := options.keys() - known:
        raise InvalidRequestError(f"unknown arguments {sorted(unknown)}; there are {sorted(known)}")
    kind = Kind(str(options.get("input_pb_type") or flags.data_type or Kind.INSTANCE).lower())
    default = kind if kind in (Kind.INSTANCE, Kind.PLAINTEXT) else Kind.EXAMPLE
    output = Kind(str(options.get("output_pb_type") or default).lower())
    framing = Framing(
        lagrangex_header=options.get("lagrangex_header", flags.lagrangex_header),
        has_sort_id=options.get("has_sort_id", flags.sort_id),
        kafka_dump=options.get("kafka_dump", flags.kafka_dump),
        kafka_dump_prefix=options.get("kafka_dump_prefix", flags.kafka_dump_prefix),
    )
    compression = options.get("compression_type")
    if compression in (None, 0, "UNKNOW") and flags.dataset_input_compression_type:
        compression = flags.dataset_input_compression_type
    taken = {
        "kind": kind,
        "framing": framing,
        "compression": compression,
        "use_snappy": bool(options.get("use_snappy")) or flags.dataset_input_use_snappy or None,
        "on_error": options.get("on_error", "raise"),
    }
    same = output is kind and options.get("feature_pruning_type") is None
    return taken, None if same else output


def _converted(dataset: Dataset, kind: Kind | None, pruning: int | None = None) -> Dataset:
    return dataset if kind is None else dataset.convert(kind, pruning=pruning)


class FilePBDataset(Dataset):
    """One file, or standard input if its name is empty."""

    def __init__(
        self, file_name: str = "", buffer_size: int | None = None, *, flags: DatasetFlags = _NO_FLAGS, **options: Any
    ) -> None:
        """See `read` for what the options mean.

        Args:
            file_name: A path or URL.
            buffer_size: Has no effect: buffers grow with the records.
            flags: Defaults.
            **options: input_pb_type, output_pb_type, has_sort_id (true by default), kafka_dump, kafka_dump_prefix,
                lagrangex_header, use_snappy, compression_type, feature_pruning_type, on_error.
        """
        taken, kind = _read_options(options, flags)
        self.file_name = file_name
        super().__init__(_converted(read(file_name, **taken), kind, options.get("feature_pruning_type")).nodes)


class DistributedFilePBDataset(Dataset):
    """Many files: all, the share of a worker, or what a queue deals to it."""

    def __init__(
        self,
        patterns: str | Sequence[str] = (),
        *,
        flags: DatasetFlags = _NO_FLAGS,
        exclude_fn: Callable[[str], bool] | None = None,
        enable_dynamic_sharding: bool | None = None,
        shard_num: int = 1,
        shard_index: int = 0,
        use_parquet: bool = False,
        use_tfrecord: bool = False,
        **options: Any,
    ) -> None:
        """See `read`.

        Args:
            patterns: Paths or globs; none is standard input.
            flags: Defaults.
            exclude_fn: Says of a file name whether to leave it out.
            enable_dynamic_sharding: Files come from a queue, one after another; the workers divide them all the same.
                See `Dataset.share` for a queue that workers share.
            shard_num: Workers that the files are divided among.
            shard_index: This one's number.
            use_parquet: Files are Parquet.
            use_tfrecord: Files are TFRecords.
            **options: As for FilePBDataset.
        """
        given = [patterns] if isinstance(patterns, str) else sorted(patterns)
        self.patterns = given or [""]
        taken, kind = _read_options(_without(options, "file_name", "buffer_size"), flags)
        dynamic = flags.enable_dynamic_sharding if enable_dynamic_sharding is None else enable_dynamic_sharding
        if use_parquet or use_tfrecord:
            taken = {"kind": taken["kind"], "on_error": taken["on_error"]}
            taken["format"] = "parquet" if use_parquet else "tfrecord"
            if use_parquet and taken["kind"] is Kind.INSTANCE:
                taken["kind"], kind = Kind.EXAMPLE, None
        turns = 1 if dynamic else flags.max_task_num_per_worker or 4
        dataset = read(self.patterns, cycle_length=turns, exclude=exclude_fn, **taken)
        if dynamic:
            dataset = dynamic_sharding_dataset(self.patterns, dataset)
        if shard_num > 1 or shard_index:
            dataset = dataset.shard(shard_index, shard_num)
        super().__init__(_converted(dataset, kind, options.get("feature_pruning_type")).nodes)


class TFRecordDataset(Dataset):
    """Payloads of TFRecords."""

    def __init__(
        self,
        file_name: str | Sequence[str] = "",
        *,
        flags: DatasetFlags = _NO_FLAGS,
        compression_type: str | None = None,
        input_pb_type: PbType = Kind.PLAINTEXT,
        num_parallel_reads: int = 1,
        **ignored: Any,
    ) -> None:
        """See `read`.

        Args:
            file_name: One or several.
            flags: Has no effect.
            compression_type: None, "ZLIB" or "GZIP".
            input_pb_type: What the payloads are.
            num_parallel_reads: Files read in turns.
            **ignored: Arguments of other classes that are of no meaning here.
        """
        self.file_name = file_name
        turns = max(1, num_parallel_reads)
        nodes = read(
            file_name, kind=input_pb_type, format="tfrecord", compression=compression_type or "NO", cycle_length=turns
        ).nodes
        super().__init__(nodes)


class ParquetDataset(Dataset):
    """Rows of Parquet files as Examples or ExampleBatches."""

    def __init__(
        self,
        file_name: str | Sequence[str],
        *,
        flags: DatasetFlags = _NO_FLAGS,
        output_pb_type: PbType = Kind.EXAMPLE,
        batch_size: int = 512,
        drop_remainder: bool = True,
        select_columns: Sequence[str] | None = None,
        select_columns_type: Sequence[str] | None = None,
        **ignored: Any,
    ) -> None:
        """See `read`.

        Args:
            file_name: One or several.
            flags: Has no effect.
            output_pb_type: "example", "examplebatch" or "plaintext".
            batch_size: Rows of each ExampleBatch.
            drop_remainder: Whether a short last ExampleBatch is dropped.
            select_columns: Names; all if None.
            select_columns_type: Their types: int, fid_v1, fid_v2, float or bytes.
            **ignored: Arguments of other classes that are of no meaning here.
        """
        from trilith.data.scan.rows import Column

        self.file_name = file_name
        columns = None
        if select_columns is not None:
            types = select_columns_type or ()
            if len(types) != len(select_columns):
                raise InvalidRequestError(f"{len(select_columns)} columns have {len(types)} types; each needs one")
            columns = [Column(name, kind) for name, kind in zip(select_columns, types, strict=True)]
        nodes = read(
            file_name,
            kind=output_pb_type,
            format="parquet",
            columns=columns,
            batch_size=batch_size,
            drop_remainder=drop_remainder,
        ).nodes
        super().__init__(nodes)


class KafkaDataset(Dataset):
    """Records of Kafka topics."""

    def __init__(
        self,
        topics: str | Sequence[str],
        group_id: str = "",
        servers: str = "",
        *,
        flags: DatasetFlags = _NO_FLAGS,
        variant_type: PbType = Kind.INSTANCE,
        input_pb_type: PbType | None = None,
        output_pb_type: PbType | None = None,
        has_sort_id: bool = False,
        kafka_dump: bool = False,
        kafka_dump_prefix: bool = False,
        lagrangex_header: bool = False,
        **options: Any,
    ) -> None:
        """See `read_kafka`; nothing connects before iteration.

        Args:
            topics: One or several.
            group_id: Consumer group.
            servers: host:port, with commas between them.
            flags: Has no effect.
            variant_type: What the payloads are.
            input_pb_type: The same.
            output_pb_type: What to make of them; as FilePBDataset by default.
            has_sort_id: See `Framing`; false by default, unlike for files.
            kafka_dump: See `Framing`.
            kafka_dump_prefix: See `Framing`.
            lagrangex_header: See `Framing`.
            **options: Of `KafkaReader`.
        """
        kind = Kind(str(input_pb_type or variant_type).lower())
        default = kind if kind in (Kind.INSTANCE, Kind.PLAINTEXT) else Kind.EXAMPLE
        output = Kind(str(output_pb_type or default).lower())
        self.topics = [topics] if isinstance(topics, str) else list(topics)
        framing = Framing(
            lagrangex_header=lagrangex_header,
            has_sort_id=has_sort_id,
            kafka_dump=kafka_dump,
            kafka_dump_prefix=kafka_dump_prefix,
        )
        dataset = read_kafka(
            self.topics, group_id=group_id or None, servers=servers or None, kind=kind, framing=framing, **options
        )
        super().__init__(_converted(dataset, None if output is kind else output).nodes)


def create_instance_dataset(
    files_list: Sequence[str] | None = None,
    *,
    use_snappy: bool = False,
    expand_glob_path: bool = False,
    cycle_length: int = 4,
    block_length: int = 1,
    enable_sharding: bool = False,
    shard_index: int = 0,
    shard_num: int = 1,
    enable_dynamic_sharding: bool = False,
    has_sort_id: bool = True,
    kafka_dump: bool = False,
    kafka_dump_prefix: bool = False,
) -> Dataset:
    """Serialized Instances of files, several read in turns.

    Args:
        files_list: Names; None is standard input.
        use_snappy: Files are snappy.
        expand_glob_path: Names are globs.
        cycle_length: Files read at a time.
        block_length: Records of one file before it is the next one's turn.
        enable_sharding: The one name is a glob whose files are divided; they are snappy then.
        shard_index: This worker's number.
        shard_num: Workers.
        enable_dynamic_sharding: Names are globs whose files come from a queue.
        has_sort_id: See `Framing`.
        kafka_dump: See `Framing`.
        kafka_dump_prefix: See `Framing`.
    """
    framing = Framing(has_sort_id=has_sort_id, kafka_dump=kafka_dump, kafka_dump_prefix=kafka_dump_prefix)
    options: dict[str, Any] = {"kind": Kind.INSTANCE, "framing": framing, "use_snappy": use_snappy or None}
    if files_list is None:
        return read("", **options)
    names = list(files_list)
    if enable_dynamic_sharding:
        dealt = dynamic_sharding_dataset(names, read(names, **options))
        return dealt.shard(shard_index, shard_num) if enable_sharding else dealt
    turns: dict[str, Any] = {"cycle_length": cycle_length, "block_length": block_length}
    if enable_sharding:
        if len(names) != 1:
            raise InvalidRequestError(f"enable_sharding needs exactly one pattern, not {names}")
        options["use_snappy"] = True
        return read(names, **turns, **options).shard(shard_index, shard_num)
    if expand_glob_path:
        return read(names, **turns, **options)
    if len(names) == 1:
        return read(names[0], **options)
    return read(names, **turns, **options)


def dynamic_sharding_dataset(patterns: Sequence[str], dataset: Dataset) -> Dataset:
    """A dataset of files that takes them, pattern after pattern, from a queue of its iterator.

    Ranks that `shard` it and workers of a DataLoader divide the files; see `Dataset.share` for a queue on PS 0.

    Args:
        patterns: Globs; those that match nothing are passed over.
        dataset: What reads the files.
    """
    return dataset.deal(AllOf(tuple(patterns)), shared=False)


def create_item_pool(start_num: int, max_item_num_per_channel: int, shared_name: str = "") -> ItemPool:
    """An empty pool; whoever shares it passes the object on, so the name has no effect."""
    return ItemPool(start_num, max_item_num_per_channel)


def negative_gen(dataset: Dataset, **options: Any) -> Dataset:
    """`Dataset.negatives` with the default that the reference's method has: all rows are pooled."""
    return dataset.negatives(**{"cache_only_pos": False} | _without(options, "variant_type"))


class CacheOneDataset:
    """Elements of a dataset, each with whether it is the last one."""

    def __init__(self, elements: Any) -> None:
        """Wrap anything that can be iterated."""
        self._elements = elements

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        """A new pass."""
        return cache_one(self._elements)


def merged_window_dataset(batches: Any, size: int = 2, *, drop_remainder: bool = True) -> Iterator[Any]:
    """See `trilith.compat.monolith.operators.merged_window`."""
    return merged_window(batches, size, drop_remainder=drop_remainder)


def distribute(dataset: _T) -> _T:
    """The dataset itself, as in the reference's public build."""
    return dataset
