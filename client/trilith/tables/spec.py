"""TableSpec: one table as a cluster makes it, and the keywords it is made from."""

from __future__ import annotations

import hashlib
import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.tables.checks import MAX_COUNTED, check_table_config
from trilith.tables.compressors import CompressorLike, Fp32
from trilith.tables.config import CuckooHashTable, HashTableConfig, Segment, default_learning_rate
from trilith.tables.initializers import InitializerLike, RandomUniform
from trilith.tables.optimizers import Adagrad, OptimizerLike
from trilith.tables.schedules import LearningRate, check_rate, rates_at
from trilith_proto.hash_table_pb2 import EntryConfig
from trilith_proto.ps_pb2 import TableConfig

__all__ = ["FilterName", "TableSpec", "seed_of", "table_config"]

FilterName: TypeAlias = Literal["none", "sliding", "probabilistic", "probabilistic_equal"]

_FILTERS: dict[str, TableConfig.FilterKind.ValueType] = {
    "none": TableConfig.NO_FILTER,
    "sliding": TableConfig.SLIDING,
    "probabilistic": TableConfig.PROBABILISTIC,
    "probabilistic_equal": TableConfig.PROBABILISTIC_EQUAL,
}
_ENTRY_TYPES: dict[str, EntryConfig.EntryType.ValueType] = {
    "training": EntryConfig.TRAINING,
    "serving": EntryConfig.SERVING,
}


@dataclass(frozen=True, slots=True)
class TableSpec:
    """One table of a cluster, checked.

    Attributes:
        proto: What every PS is told; not to be changed.
        learning_rates: One per segment.
    """

    proto: TableConfig
    learning_rates: tuple[LearningRate, ...]

    def __post_init__(self) -> None:
        check_table_config(self.proto)
        if len(self.learning_rates) != self.segments:
            raise InvalidRequestError(
                f"table {self.name!r}: {len(self.learning_rates)} learning rates for {self.segments} segments; "
                "give one for each"
            )
        for each in self.learning_rates:
            check_rate(f"table {self.name!r}: learning_rate", each)

    @classmethod
    def from_proto(cls, proto: TableConfig) -> TableSpec:
        """The spec of a table that exists, with its segments' default rates."""
        segments = proto.hash_table.entry_config.segments
        copy = TableConfig()
        copy.CopyFrom(proto)
        return cls(
            copy,
            tuple(default_learning_rate(each.opt_config) if each.HasField("opt_config") else 0.0 for each in segments),
        )

    @classmethod
    def of_config(
        cls,
        name: str,
        config: HashTableConfig,
        *,
        seed: int | None = None,
        occurrence_threshold: int | None = None,
        slot_occurrence_thresholds: Mapping[int, int] | None = None,
        filter: FilterName | None = None,
        filter_capacity: int | None = None,
        filter_splits: int | None = None,
    ) -> TableSpec:
        """The spec of a table whose rows and rates `config` describes; keywords as for `table_config`."""
        proto = TableConfig(name=name, hash_table=config.table_config, seed=seed_of(name) if seed is None else seed)
        if not proto.hash_table.HasField("cuckoo"):
            proto.hash_table.cuckoo.SetInParent()
        _set_filter(
            f"table {name!r}",
            proto,
            occurrence_threshold,
            slot_occurrence_thresholds or {},
            filter,
            filter_capacity,
            filter_splits,
        )
        return cls(proto, tuple(config.learning_rate_fns))

    @property
    def name(self) -> str:
        """Unique in the cluster."""
        return self.proto.name

    @property
    def dim(self) -> int:
        """Floats per row, over all segments."""
        return sum(each.dim_size for each in self.proto.hash_table.entry_config.segments)

    @property
    def segments(self) -> int:
        """How many segments a row has."""
        return len(self.proto.hash_table.entry_config.segments)

    def rates_at(self, step: int) -> npt.NDArray[np.float32]:
        """float32[segments]: the rates at the model's `step`."""
        return rates_at(self.learning_rates, step)


def table_config(
    name: str,
    *,
    dim: int | None = None,
    segments: Sequence[Segment] | None = None,
    optimizer: OptimizerLike | None = None,
    initializer: InitializerLike | None = None,
    compressor: CompressorLike | None = None,
    learning_rate: LearningRate | Sequence[LearningRate] | None = None,
    seed: int | None = None,
    ttl_days: int | None = None,
    slot_ttl_days: Mapping[int, int] | None = None,
    evict_every_hours: int = 0,
    occurrence_threshold: int | None = None,
    slot_occurrence_thresholds: Mapping[int, int] | None = None,
    filter: FilterName | None = None,
    filter_capacity: int | None = None,
    filter_splits: int | None = None,
    initial_capacity: int = 1,
    entry_type: Literal["training", "serving"] = "training",
    skip_zero_embedding: bool = False,
) -> TableSpec:
    """Describe a table of one segment (`dim` and parts) or of several (`segments`).

    Args:
        name: Unique in the cluster.
        dim: Floats per row.
        segments: Instead of `dim`, `optimizer`, `initializer` and `compressor`.
        optimizer: Adagrad with a rate of 0.05 if None.
        initializer: Uniform over [-0.05, 0.05) if None.
        compressor: How serving rows are stored (Fp32 if None); in training FixedR8 and OneBit change what is read.
        learning_rate: A number or function for all segments, or one for each; None takes each segment's own.
        seed: Decides the values of new rows; None derives it from the name, the same in every process.
        ttl_days: Days without a write after which a row expires; None means 100 years.
        slot_ttl_days: The same for single slots (bits 48 to 62 of the id).
        evict_every_hours: Above 0, the PS deletes expired rows by itself that often.
        occurrence_threshold: An id gets its row at the occurrence after that many.
        slot_occurrence_thresholds: The same for single slots.
        filter: What counts occurrences; None is "sliding" if there is a threshold, else "none".
        filter_capacity: Ids the sliding filter can count; None takes the PS's default.
        filter_splits: Blocks of the sliding filter; None takes the PS's default.
        initial_capacity: A hint: rows to make room for at the start.
        entry_type: "serving" makes compressed rows without optimizer state.
        skip_zero_embedding: Serving rows only: assigning zeros deletes the row.

    Returns:
        The checked spec.
    """
    owner = f"table {name!r}"
    parts = _segments(owner, dim, segments, optimizer, initializer, compressor, serving=entry_type == "serving")
    proto = TableConfig(name=name, seed=seed_of(name) if seed is None else _whole(owner, "seed", seed, 2**64 - 1))
    table = proto.hash_table
    entry = table.entry_config
    entry.segments.extend(each.as_proto() for each in parts)
    entry.entry_type = _choice(owner, "entry_type", entry_type, _ENTRY_TYPES)
    CuckooHashTable(initial_capacity=initial_capacity, feature_evict_every_n_hours=evict_every_hours).mutate_table(
        table
    )
    if skip_zero_embedding:
        table.skip_zero_embedding = True
    if ttl_days is not None:
        table.slot_expire_time_config.default_expire_time = _whole(owner, "ttl_days", ttl_days, 2**32 - 1)
    for slot, days in sorted((slot_ttl_days or {}).items()):
        table.slot_expire_time_config.slot_expire_times.add(
            slot=_whole(owner, "slot_ttl_days: slot", slot, 2**32 - 1),
            expire_time=_whole(owner, "slot_ttl_days: days", days, 2**32 - 1),
        )
    _set_filter(
        owner, proto, occurrence_threshold, slot_occurrence_thresholds or {}, filter, filter_capacity, filter_splits
    )
    return TableSpec(proto, _learning_rates(owner, learning_rate, parts))


def seed_of(name: str) -> int:
    """A uint64 that depends on the table's name alone."""
    if not isinstance(name, str):
        raise InvalidRequestError(f"table name {name!r} is a {type(name).__name__}, it must be a str")
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _segments(
    owner: str,
    dim: int | None,
    segments: Sequence[Segment] | None,
    optimizer: OptimizerLike | None,
    initializer: InitializerLike | None,
    compressor: CompressorLike | None,
    *,
    serving: bool,
) -> list[Segment]:
    if (dim is None) == (segments is None):
        raise InvalidRequestError(f"{owner}: give either dim or segments, not {'neither' if dim is None else 'both'}")
    if segments is not None:
        if optimizer is not None or initializer is not None or compressor is not None:
            raise InvalidRequestError(
                f"{owner}: with segments, optimizer, initializer and compressor belong into each segment"
            )
        return list(segments)
    assert dim is not None
    if not serving:
        optimizer = optimizer or Adagrad(learning_rate=0.05)
        initializer = initializer or RandomUniform(-0.05, 0.05)
    elif compressor is None:
        compressor = Fp32()
    try:
        return [Segment(dim, initializer, optimizer, compressor)]
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{owner}, {error}") from None


def _learning_rates(
    owner: str, given: LearningRate | Sequence[LearningRate] | None, segments: Sequence[Segment]
) -> tuple[LearningRate, ...]:
    if given is None:
        return tuple(_own_rate(each) for each in segments)
    if any(each.learning_rate is not None for each in segments):
        raise InvalidRequestError(f"{owner}: learning_rate is given for the table and for a segment; give one of them")
    if isinstance(given, Sequence) and not isinstance(given, str):
        return tuple(given)
    rate: Any = given
    return (rate,) * len(segments)


def _own_rate(segment: Segment) -> LearningRate:
    if segment.learning_rate is not None:
        return segment.learning_rate
    return default_learning_rate(segment.as_proto().opt_config) if segment.optimizer is not None else 0.0


def _set_filter(
    owner: str,
    proto: TableConfig,
    threshold: int | None,
    by_slot: Mapping[int, int],
    filter: FilterName | None,
    capacity: int | None,
    splits: int | None,
) -> None:
    if capacity is not None:
        proto.filter_capacity = _whole(owner, "filter_capacity", capacity, 2**64 - 1)
    if splits is not None:
        proto.filter_splits = _whole(owner, "filter_splits", splits, 2**32 - 1)
    thresholds = proto.occurrence_thresholds
    if threshold is not None:
        thresholds.default_occurrence_threshold = _whole(owner, "occurrence_threshold", threshold, 2**32 - 1)
    for slot, each in sorted(by_slot.items()):
        thresholds.slot_occurrence_thresholds.add(
            slot=_whole(owner, "slot_occurrence_thresholds: slot", slot, 2**32 - 1),
            occurrence_threshold=_whole(owner, "slot_occurrence_thresholds", each, 2**32 - 1),
        )
    highest = max([threshold or 0, *by_slot.values()])
    proto.filter = _choice(owner, "filter", filter or ("sliding" if highest else "none"), _FILTERS)
    if proto.filter == TableConfig.SLIDING and highest > MAX_COUNTED:
        warnings.warn(
            f"{owner}: occurrence threshold {highest} is above {MAX_COUNTED}, where the sliding filter stops counting: "
            "no id will ever pass it",
            stacklevel=3,
        )


def _whole(owner: str, name: str, value: Any, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 0 <= int(value) <= most:
        raise InvalidRequestError(f"{owner}: {name}={value!r} is not a whole number in 0..{most}")
    return int(value)


def _choice(owner: str, name: str, value: str, known: Mapping[str, Any]) -> Any:
    if value not in known:
        raise InvalidRequestError(f"{owner}: {name}={value!r} is none of {', '.join(known)}")
    return known[value]
