"""Slots, columns and slices, and the tables that follow from them.

A slot is one table's worth of vectors. A model adds slices to it, each with parts and a rate of its own; columns read
the slot for one feature each, so several features may share vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from trilith.errors import InvalidRequestError
from trilith.ops.combiners import Combiner, CombinerLike, combiner_of
from trilith.tables.compressors import CompressorLike, Fp16, Fp32
from trilith.tables.config import HashTableConfig, Segment, default_learning_rate, fuse_adjacent
from trilith.tables.initializers import InitializerLike, RandomUniform, Zeros
from trilith.tables.merged import merge_configs
from trilith.tables.optimizers import Adagrad, Ftrl, OptimizerLike
from trilith.tables.schedules import LearningRate
from trilith.tables.spec import TableSpec, seed_of, table_config
from trilith_proto.hash_table_pb2 import EntryConfig

__all__ = [
    "FeatureColumn",
    "FeatureRegistry",
    "FeatureSlice",
    "FeatureSlot",
    "FeatureSlotConfig",
    "SlotSegment",
    "merge_slices",
]

_NEVER_DAYS = 36_500
_MERGED = "slots that share tables"  # stands for the name that gives other tables their seed


class _Sliced(Protocol):
    """A tensor or an array."""

    def __getitem__(self, key: Any, /) -> Any: ...


_Vectors = TypeVar("_Vectors", bound=_Sliced)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSegment:
    """One slice as a model asked for it.

    Attributes:
        dim: Floats.
        initializer: Of new rows.
        optimizer: Of its weights.
        compressor: Acts in serving only.
        learning_rate: None takes the optimizer's, reached linearly where it has `warmup_steps`.
    """

    dim: int
    initializer: InitializerLike
    optimizer: OptimizerLike
    compressor: CompressorLike
    learning_rate: LearningRate | None = None

    def as_proto(self) -> EntryConfig.Segment:
        """The message, a fresh one each time."""
        return Segment(self.dim, self.initializer, self.optimizer, self.compressor).as_proto()


def merge_slices(segments: Sequence[SlotSegment]) -> tuple[list[EntryConfig.Segment], list[LearningRate]]:
    """Make one segment of neighbouring slices that differ in width alone; the segments and a rate for each."""
    protos = [each.as_proto() for each in segments]
    rates = [
        default_learning_rate(proto.opt_config) if each.learning_rate is None else each.learning_rate
        for each, proto in zip(segments, protos, strict=True)
    ]
    return fuse_adjacent(protos, rates)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSlotConfig:
    """A slot and what its slices have unless they say otherwise.

    Attributes:
        name: Of the table; None makes it `slot_id`.
        slot_id: Whose ids the threshold and expiry concern.
        has_bias: Whether columns begin with a bias, a slice of one float.
        bias_initializer: Of the bias.
        bias_optimizer: Of the bias.
        bias_compressor: Of the bias.
        bias_learning_rate: Of the bias; None takes the vectors'.
        default_vec_initializer: Of the other slices.
        default_vec_optimizer: Of the other slices.
        default_vec_compressor: Of the other slices.
        default_vec_learning_rate: Of the other slices; None takes their optimizer's.
        occurrence_threshold: An id gets its row at the occurrence after that many.
        expire_time: Days without a write after which a row expires.
        seed: Decides the values of new rows; None derives it from the table's name, where slots share tables from none.
    """

    name: str | None = None
    slot_id: int | None = None
    has_bias: bool = False
    bias_initializer: InitializerLike = field(default_factory=Zeros)
    bias_optimizer: OptimizerLike = field(default_factory=lambda: Ftrl(initial_accumulator_value=1e-6, beta=1.0))
    bias_compressor: CompressorLike = field(default_factory=Fp32)
    bias_learning_rate: LearningRate | None = None
    default_vec_initializer: InitializerLike = field(default_factory=lambda: RandomUniform(-0.05, 0.05))
    default_vec_optimizer: OptimizerLike = field(default_factory=lambda: Adagrad(initial_accumulator_value=1.0))
    default_vec_compressor: CompressorLike = field(default_factory=Fp16)
    default_vec_learning_rate: LearningRate | None = None
    occurrence_threshold: int = 0
    expire_time: int = _NEVER_DAYS
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.name is None and self.slot_id is None:
            raise InvalidRequestError("a slot needs a name or a slot_id")

    @property
    def table(self) -> str:
        """Name of the slot's table."""
        return str(self.slot_id) if self.name is None else self.name


@dataclass(frozen=True, slots=True)
class FeatureSlice:
    """Columns start..end of a slot's vectors."""

    slot: FeatureSlot
    start: int
    end: int

    def __len__(self) -> int:
        """Floats."""
        return self.end - self.start


class FeatureSlot:
    """A table's vectors in the making: slices follow one another."""

    def __init__(self, config: FeatureSlotConfig) -> None:
        self.config = config
        self.segments: list[SlotSegment] = []
        self.slices: list[FeatureSlice] = []
        self.bias: FeatureSlice | None = None
        if config.has_bias:
            rate = config.bias_learning_rate
            self.bias = self._append(
                SlotSegment(
                    dim=1,
                    initializer=config.bias_initializer,
                    optimizer=config.bias_optimizer,
                    compressor=config.bias_compressor,
                    learning_rate=config.default_vec_learning_rate if rate is None else rate,
                )
            )

    @property
    def name(self) -> str:
        """Of the table."""
        return self.config.table

    @property
    def dim(self) -> int:
        """Floats of a vector so far."""
        return self.slices[-1].end if self.slices else 0

    @property
    def unmerged_slice_dims(self) -> list[int]:
        """Widths of the slices as they were asked for."""
        return [each.dim for each in self.segments]

    def add_feature_slice(
        self,
        dim: int,
        *,
        initializer: InitializerLike | None = None,
        optimizer: OptimizerLike | None = None,
        compressor: CompressorLike | None = None,
        learning_rate: LearningRate | None = None,
    ) -> FeatureSlice:
        """Append a slice; what is not given is the slot's default for vectors."""
        config = self.config
        rate = config.default_vec_learning_rate if learning_rate is None else learning_rate
        return self._append(
            SlotSegment(
                dim=dim,
                initializer=initializer or config.default_vec_initializer,
                optimizer=optimizer or config.default_vec_optimizer,
                compressor=compressor or config.default_vec_compressor,
                learning_rate=rate,
            )
        )

    def table_spec(self) -> TableSpec:
        """The slot's table; its neighbouring slices that differ in width alone are one segment."""
        parts, rates = self.merged_segments()
        config, slot_id = self.config, self.config.slot_id
        whole: dict[str, int] = {}
        by_slot: dict[str, dict[int, int]] = {}
        if slot_id is not None:
            by_slot["slot_ttl_days"] = {slot_id: config.expire_time}
        else:
            whole["ttl_days"] = config.expire_time
        if config.occurrence_threshold > 0:
            if slot_id is not None:
                by_slot["slot_occurrence_thresholds"] = {slot_id: config.occurrence_threshold}
            else:
                whole["occurrence_threshold"] = config.occurrence_threshold
        options: dict[str, Any] = {**whole, **by_slot}
        return table_config(self.name, segments=parts, learning_rate=rates, seed=config.seed, **options)

    def merged_segments(self) -> tuple[list[Segment], list[LearningRate]]:
        """What the slot's rows are made of, and a rate for each segment."""
        if not self.segments:
            raise InvalidRequestError(f"slot {self.name!r} has no slices; a table needs at least one")
        protos, rates = merge_slices(self.segments)
        return [Segment(each.dim_size, each.init_config, each.opt_config, each.comp_config) for each in protos], rates

    def _append(self, segment: SlotSegment) -> FeatureSlice:
        segment.as_proto()  # refuses what no table could have
        start = self.dim
        self.segments.append(segment)
        self.slices.append(FeatureSlice(self, start, start + segment.dim))
        return self.slices[-1]


@dataclass(frozen=True, slots=True)
class FeatureColumn:
    """One feature's view of a slot: which slices of its vectors a model computes with.

    Whatever looked the vectors up gives them by feature, tensors or arrays: [b, dim], or [b, n, dim] of the first n.
    """

    slot: FeatureSlot
    feature_name: str
    combiner: Combiner

    def embedding_lookup(self, vectors: Mapping[str, _Vectors], slice_: FeatureSlice) -> _Vectors:
        """A slice of the feature's vectors.

        Args:
            vectors: A batch's, by feature.
            slice_: One of the column's slot.
        """
        if slice_.slot is not self.slot:
            raise InvalidRequestError(
                f"feature {self.feature_name!r} reads slot {self.slot.name!r}, the slice is one of {slice_.slot.name!r}"
            )
        part: _Vectors = vectors[self.feature_name][..., slice_.start : slice_.end]
        return part

    def get_bias(self, vectors: Mapping[str, _Vectors]) -> _Vectors:
        """The bias slice of the feature's vectors."""
        if self.slot.bias is None:
            raise InvalidRequestError(
                f"slot {self.slot.name!r} has no bias; FeatureSlotConfig(has_bias=True) makes one"
            )
        return self.embedding_lookup(vectors, self.slot.bias)

    def get_all_embedding_slices(self, vectors: Mapping[str, _Vectors]) -> list[_Vectors]:
        """All slices of the feature's vectors, in order."""
        return [self.embedding_lookup(vectors, each) for each in self.slot.slices]


class FeatureRegistry:
    """Collects the slots and columns of a model.

    Attributes:
        slots: By table name.
        columns: By feature name.
    """

    def __init__(self) -> None:
        self.slots: dict[str, FeatureSlot] = {}
        self.columns: dict[str, FeatureColumn] = {}

    def create_feature_slot(self, config: FeatureSlotConfig) -> FeatureSlot:
        """Make a slot; a repeated name is InvalidRequestError."""
        if config.table in self.slots:
            raise InvalidRequestError(f"slot {config.table!r} exists; names are unique in a model")
        slot = self.slots[config.table] = FeatureSlot(config)
        return slot

    def create_feature_column(
        self, slot: FeatureSlot, feature_name: str, combiner: CombinerLike = "sum"
    ) -> FeatureColumn:
        """Let a feature read a slot; one feature reads one slot."""
        if self.slots.get(slot.name) is not slot:
            raise InvalidRequestError(f"slot {slot.name!r} was not made here")
        known = self.columns.get(feature_name)
        if known is not None and known.slot is not slot:
            raise InvalidRequestError(f"feature {feature_name!r} reads slot {known.slot.name!r} already")
        column = FeatureColumn(slot, feature_name, combiner_of(combiner))
        self.columns[feature_name] = column
        return column

    def table_specs(self) -> list[TableSpec]:
        """The tables of all slots."""
        return [slot.table_spec() for slot in self.slots.values()]

    def merged_table_specs(self) -> tuple[list[TableSpec], dict[str, str]]:
        """One table for all slots of equal rows: the tables, and the name of each slot's.

        Every table knows the thresholds and expiry of all slots, which need slot ids: a slot's ids carry its number.
        Slots share a table only with those of the same seed, and which others there are never changes the values of new
        rows: all tables of slots without a seed have the same one.
        """
        named = [name for name, slot in self.slots.items() if slot.config.slot_id is None]
        if named:
            raise InvalidRequestError(f"slots {named} have no slot_id; tables that slots share need them")
        configs = {}
        for name, slot in self.slots.items():
            parts, rates = slot.merged_segments()
            days = self.slot_expire_times()
            spec = table_config(name, segments=parts, learning_rate=rates, slot_ttl_days=days)
            configs[name] = HashTableConfig(spec.proto.hash_table, rates)
        thresholds = {slot: each for slot, each in self.slot_occurrence_thresholds().items() if each}
        specs: list[TableSpec] = []
        table_of: dict[str, str] = {}
        for seed in dict.fromkeys(slot.config.seed for slot in self.slots.values()):
            alike = {name: each for name, each in configs.items() if self.slots[name].config.seed == seed}
            merged, merged_into = merge_configs(alike)
            table_of |= merged_into
            seeded = seed_of(_MERGED) if seed is None else seed
            specs += [
                TableSpec.of_config(name, config, seed=seeded, slot_occurrence_thresholds=thresholds)
                for name, config in merged.items()
            ]
        return sorted(specs, key=lambda spec: spec.name), table_of

    def slot_occurrence_thresholds(self) -> dict[int, int]:
        """By slot id, where one is given."""
        configs = (slot.config for slot in self.slots.values())
        return {each.slot_id: each.occurrence_threshold for each in configs if each.slot_id is not None}

    def slot_expire_times(self) -> dict[int, int]:
        """Days by slot id, where one is given."""
        configs = (slot.config for slot in self.slots.values())
        return {each.slot_id: each.expire_time for each in configs if each.slot_id is not None}

    def features_of(self, table: str) -> list[str]:
        """Names of the features that read a table, sorted."""
        return sorted(name for name, column in self.columns.items() if column.slot.name == table)
