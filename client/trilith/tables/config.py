"""Rows and tables as messages: segments, their default rates, and the string that says whether two configs are one."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.tables.compressors import CompressorLike
from trilith.tables.initializers import InitializerLike
from trilith.tables.optimizers import OptimizerLike
from trilith.tables.parts import part_proto
from trilith.tables.ranges import MAX_DIM
from trilith.tables.schedules import LearningRate, PolynomialDecay, check_rate, rate_at, rate_text
from trilith_proto.hash_table_pb2 import (
    EmbeddingHashTableConfig,
    EntryConfig,
    FloatCompressorConfig,
    InitializerConfig,
    OptimizerConfig,
)

__all__ = [
    "CuckooHashTable",
    "HashTableConfig",
    "Segment",
    "default_learning_rate",
    "fuse_adjacent",
    "own_rate",
]


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring weights of one row that share initializer, optimizer and compressor.

    Each part may be a wrapper or a ready message.

    Attributes:
        dim: Floats.
        initializer: Needed for training rows.
        optimizer: Needed for training rows.
        compressor: Needed for serving rows; in training it only changes what is read.
        learning_rate: None takes the optimizer's, see `default_learning_rate`.
    """

    dim: int
    initializer: InitializerLike | None = None
    optimizer: OptimizerLike | None = None
    compressor: CompressorLike | None = None
    learning_rate: LearningRate | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dim, numbers.Integral) or not 1 <= self.dim <= MAX_DIM:
            raise InvalidRequestError(f"segment: dim={self.dim!r} is outside 1..{MAX_DIM}")
        if self.learning_rate is not None:
            check_rate("segment: learning_rate", self.learning_rate)
        self.as_proto()

    def as_proto(self) -> EntryConfig.Segment:
        """The message, a fresh one each time."""
        proto = EntryConfig.Segment(dim_size=int(self.dim))
        if self.initializer is not None:
            proto.init_config.CopyFrom(part_proto(self.initializer, InitializerConfig))
        if self.optimizer is not None:
            proto.opt_config.CopyFrom(part_proto(self.optimizer, OptimizerConfig))
        if self.compressor is not None:
            proto.comp_config.CopyFrom(part_proto(self.compressor, FloatCompressorConfig))
        return proto


@dataclass(frozen=True, slots=True, kw_only=True)
class CuckooHashTable:
    """The one kind of table there is.

    Attributes:
        initial_capacity: A hint: rows to make room for at the start.
        feature_evict_every_n_hours: Above 0, the PS evicts expired rows by itself that often.
    """

    initial_capacity: int = 1
    feature_evict_every_n_hours: int = 0

    def __post_init__(self) -> None:
        for name, value, most in (
            ("initial_capacity", self.initial_capacity, 2**34),
            ("feature_evict_every_n_hours", self.feature_evict_every_n_hours, 2**31 - 1),
        ):
            if not isinstance(value, numbers.Integral) or not 0 <= value <= most:
                raise InvalidRequestError(f"CuckooHashTable: {name}={value!r} is outside 0..{most}")

    def mutate_table(self, config: EmbeddingHashTableConfig) -> None:
        """Write this choice into `config`."""
        config.initial_capacity = int(self.initial_capacity)
        config.cuckoo.SetInParent()
        if self.feature_evict_every_n_hours > 0:
            config.enable_feature_eviction = True
            config.feature_evict_every_n_hours = int(self.feature_evict_every_n_hours)


class HashTableConfig:
    """A table's rows with the rate of each segment, as far as two features may share them.

    Two of them are equal when their strings are: the same config bytes, and rates of equal value, or schedules of equal
    class and attributes. `extra_restore_names` takes no part.

    Args:
        table_config: Kept as it is, not copied.
        learning_rate_fns: One rate per segment.
        extra_restore_names: Earlier names to look for in a checkpoint; copied.
    """

    def __init__(
        self,
        table_config: EmbeddingHashTableConfig,
        learning_rate_fns: Iterable[LearningRate],
        extra_restore_names: Iterable[str] | None = None,
    ) -> None:
        self.table_config = table_config
        self.learning_rate_fns = list(learning_rate_fns)
        self.extra_restore_names = list(extra_restore_names or ())
        self.learning_rate_tensor: npt.NDArray[np.float32] | None = None
        for each in self.learning_rate_fns:
            check_rate("learning rate", each)

    def call_learning_rate_fns(self, step: int = 0) -> npt.NDArray[np.float32]:
        """float32[segments]: every rate at the model's `step`."""
        return np.array(self.call_learning_rate_fns_fewer_ops(step), np.float32)

    def call_learning_rate_fns_fewer_ops(self, step: int = 0) -> list[float]:
        """The same as a plain list."""
        if not self.learning_rate_fns:
            raise InvalidRequestError("the config has no learning rates; it needs one per segment")
        return [rate_at(each, step) for each in self.learning_rate_fns]

    def __str__(self) -> str:
        rates = ", ".join(rate_text(each) for each in self.learning_rate_fns)
        return f"table_config={self.table_config.SerializeToString(deterministic=True)!r}, learning_rates=[{rates}]"

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other) if isinstance(other, HashTableConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(str(self))


def default_learning_rate(optimizer: OptimizerConfig) -> float | PolynomialDecay:
    """The rate of a segment that is given none: its optimizer's, reached in `warmup_steps` steps if it has any.

    A moving average has no rate, and ignores this one.
    """
    kind = optimizer.WhichOneof("type")
    chosen = getattr(optimizer, kind) if kind else None
    if kind == "moving_average":
        return 0.0
    if chosen is None or "learning_rate" not in chosen.DESCRIPTOR.fields_by_name:
        raise InvalidRequestError(f"optimizer {kind} has no learning rate of its own; give the table one")
    warmup_steps = getattr(chosen, "warmup_steps", 0)
    if warmup_steps > 0:
        return PolynomialDecay(0.0, warmup_steps, end_learning_rate=chosen.learning_rate)
    return float(chosen.learning_rate)


def own_rate(optimizer: OptimizerConfig) -> float:
    """The rate that a PS takes where none is sent: the optimizer's own, without a warm-up; 0 where it has none."""
    kind = optimizer.WhichOneof("type")
    return float(getattr(getattr(optimizer, kind), "learning_rate", 0.0)) if kind else 0.0


def fuse_adjacent(
    segments: Sequence[EntryConfig.Segment], learning_rates: Sequence[LearningRate]
) -> tuple[list[EntryConfig.Segment], list[LearningRate]]:
    """Make one segment of neighbours that differ in width alone.

    It matters for state that is kept once per segment: Adam's powers, GroupAdagrad's accumulator.

    Args:
        segments: Not changed.
        learning_rates: One per segment.

    Returns:
        The fused segments, and one rate for each.
    """
    if len(segments) != len(learning_rates):
        raise InvalidRequestError(
            f"{len(learning_rates)} learning rates for {len(segments)} segments; give one for each"
        )
    fused: list[EntryConfig.Segment] = []
    rates: list[LearningRate] = []
    last = None
    for segment, rate in zip(segments, learning_rates, strict=True):
        identity = (_without_dims(segment).SerializeToString(deterministic=True), rate_text(rate))
        if identity == last:
            fused[-1].dim_size += segment.dim_size
        else:
            fused.append(_copy(segment))
            rates.append(rate)
        last = identity
    return fused, rates


def _copy(segment: EntryConfig.Segment) -> EntryConfig.Segment:
    copy = EntryConfig.Segment()
    copy.CopyFrom(segment)
    return copy


def _without_dims(segment: EntryConfig.Segment) -> EntryConfig.Segment:
    bare = _copy(segment)
    bare.ClearField("dim_size")
    for part in (bare.init_config, bare.opt_config, bare.comp_config):
        kind = part.WhichOneof("type")
        if kind:
            getattr(part, kind).ClearField("dim_size")
    return bare
