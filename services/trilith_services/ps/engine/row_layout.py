"""RowLayout: where a table's rows have their weights, optimizer state and initial values, by its config."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.memory import address_of
from trilith.shard import Float32Array
from trilith.tables import check_table_config
from trilith.tables.initial import initial_weights
from trilith_proto import hash_table_pb2, ps_pb2
from trilith_services.ps.engine.kernels import codecs, write
from trilith_services.ps.engine.kernels import plan as columns
from trilith_services.ps.engine.kernels.apply import Structure
from trilith_services.ps.engine.kernels.optimizers import KINDS

__all__ = ["OptimizerLayout", "RowLayout", "SegmentLayout", "lifetimes", "serving_config"]

_NEVER_DAYS = 36500
_SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class OptimizerLayout:
    """One optimizer over `dim` weights.

    Attributes:
        kind: Name of the config's oneof field.
        slots: (name, number of float32 words) of the state, in storage order.
        initial_state: float32[words of state].
        parameters: float32[...], what the step kernel reads.
        learning_rate: The config's own rate; 0 where the kind has none.
        stochastic: Whether weights are rounded to float16 after a step.
    """

    kind: str
    slots: tuple[tuple[str, int], ...]
    initial_state: Float32Array
    parameters: Float32Array
    learning_rate: float
    stochastic: bool

    @classmethod
    def of(cls, config: hash_table_pb2.OptimizerConfig, dim: int) -> OptimizerLayout:
        """Read a validated optimizer config."""
        name = config.WhichOneof("type") or ""
        kind, chosen = KINDS.get(name), getattr(config, name, None)
        if kind is None:
            raise InvalidRequestError(f"optimizer {name!r} cannot be built from a config; known are {sorted(KINDS)}")
        initial = [
            np.full(slot.words or dim, getattr(chosen, slot.initial) if slot.initial else 0.0, np.float32)
            for slot in kind.state
        ]
        return cls(
            kind=name,
            slots=tuple((slot.name, len(values)) for slot, values in zip(kind.state, initial, strict=True)),
            initial_state=np.concatenate([np.zeros(0, np.float32), *initial]),
            # Never empty, so that it has an address.
            parameters=np.array([*(float(getattr(chosen, field)) for field in kind.parameters), 0.0], np.float32),
            learning_rate=float(getattr(chosen, "learning_rate", 0.0)),
            stochastic=config.stochastic_rounding_float16,
        )


@dataclass(frozen=True)
class SegmentLayout:
    """One segment of a row.

    Attributes:
        dim: Weights.
        weight_offset: First weight, in floats from the row's first.
        state_offset: First word of its state, in floats from the state's first.
        optimizer: What steps it; None in a serving table.
        codec: One of `codecs`: how a serving row stores it, or how training reads see it (RAW for fp32 and fp16 there).
        codec_parameters: float32[2], see `codecs`; in a training table one_bit's scale changes with the step.
        stored_offset: First byte of a serving row's compressed weights.
    """

    dim: int
    weight_offset: int
    state_offset: int
    optimizer: OptimizerLayout | None
    codec: int
    codec_parameters: Float32Array
    stored_offset: int

    @property
    def slots(self) -> tuple[tuple[str, int], ...]:
        """(name, floats) of the optimizer's state."""
        return self.optimizer.slots if self.optimizer else ()

    @property
    def kind(self) -> str:
        """Optimizer kind, "" in a serving table."""
        return self.optimizer.kind if self.optimizer else ""


_CODECS = {"fp32": codecs.RAW, "fp16": codecs.HALF, "fixed_r8": codecs.FIXED_R8, "one_bit": codecs.ONE_BIT}
_CODEC_BYTES = {codecs.RAW: 4, codecs.HALF: 2, codecs.FIXED_R8: 1, codecs.ONE_BIT: 1}


class RowLayout:
    """Sizes, offsets, initial values and kernel arguments of one table's rows; immutable but for the one-bit scales.

    A training row is float32 weights[dim] and, elsewhere, float32 words of optimizer state; a serving row is its
    segments' compressed bytes. They are padded, to `row_bytes` and `state_bytes`, so that they cross as few cache lines
    as their sizes allow.
    """

    def __init__(self, config: ps_pb2.TableConfig) -> None:
        check_table_config(config)
        entry = config.hash_table.entry_config
        self.serving = entry.entry_type == hash_table_pb2.EntryConfig.SERVING
        self.segments: tuple[SegmentLayout, ...] = tuple(self._segments(entry))
        self.dim = sum(segment.dim for segment in self.segments)
        self.state_floats = 0 if self.serving else sum(words for s in self.segments for _, words in s.slots)
        last = self.segments[-1]
        self.stored_bytes = last.stored_offset + last.dim * _CODEC_BYTES[last.codec]
        self.words = -(-self.stored_bytes // 4) if self.serving else self.dim
        self.row_bytes = _padded(4 * self.words)
        self.state_bytes = _padded(4 * self.state_floats) if self.state_floats else 0
        self.structure: Structure = tuple(
            (s.optimizer.kind, s.optimizer.stochastic, s.codec == codecs.ONE_BIT) for s in self.segments if s.optimizer
        )
        self.learning_rates: Float32Array = np.array(
            [s.optimizer.learning_rate if s.optimizer else 0.0 for s in self.segments], np.float32
        )
        low, spans, limits = initial_weights(entry)
        self._image = np.zeros(self.words + self.state_floats, np.float32)
        if not self.serving:
            states = [s.optimizer.initial_state for s in self.segments if s.optimizer]
            self._image[:] = np.concatenate([low, *states])
        self._random = np.concatenate([spans, limits])
        self._one_bit = [
            (segment, (config.step_size, config.init_scale, config.max_scale))
            for segment, config in zip(self.segments, (s.comp_config.one_bit for s in entry.segments), strict=True)
            if segment.codec == codecs.ONE_BIT
        ]
        self.plan, self.segment_table = self._kernel_arguments(bool(spans.any()), config.seed)
        if self.serving:
            # A row that is only added to starts from what its codec makes of zero.
            zeros = np.zeros(self.dim, np.float32)
            write.encode_row(
                address_of(self.plan), address_of(self.segment_table), address_of(self._image), address_of(zeros)
            )

    def _segments(self, entry: hash_table_pb2.EntryConfig) -> list[SegmentLayout]:
        found: list[SegmentLayout] = []
        weight = state = stored = 0
        for segment in entry.segments:
            compressor = segment.comp_config.WhichOneof("type") or "fp32"
            codec = _CODECS[compressor]
            parameters = np.zeros(2, np.float32)
            if codec == codecs.FIXED_R8:
                parameters[0] = segment.comp_config.fixed_r8.r
            elif codec == codecs.ONE_BIT:
                parameters[:] = segment.comp_config.one_bit.amplitude, segment.comp_config.one_bit.init_scale
            elif not self.serving:
                codec = codecs.RAW
            optimizer = None if self.serving else OptimizerLayout.of(segment.opt_config, segment.dim_size)
            found.append(SegmentLayout(segment.dim_size, weight, state, optimizer, codec, parameters, stored))
            weight += segment.dim_size
            state += sum(words for _, words in optimizer.slots) if optimizer else 0
            stored += segment.dim_size * _CODEC_BYTES[codec]
        return found

    def _kernel_arguments(self, random: bool, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        plan = np.zeros(columns.PLAN_COLUMNS, np.int64)
        plan[columns.WORDS] = self.words
        plan[columns.DIM] = self.dim
        plan[columns.STATE] = self.state_floats
        plan[columns.IMAGE] = address_of(self._image)
        plan[columns.RANDOM] = address_of(self._random) if random and not self.serving else 0
        plan[columns.SEED] = np.array(seed, np.uint64).astype(np.int64)
        plan[columns.CODED] = any(segment.codec != codecs.RAW for segment in self.segments)
        plan[columns.SERVING] = self.serving
        plan[columns.SEGMENTS] = len(self.segments)
        table = np.zeros((len(self.segments), columns.SEGMENT_COLUMNS), np.int64)
        for k, segment in enumerate(self.segments):
            table[k, columns.SEG_DIM] = segment.dim
            table[k, columns.SEG_WEIGHT] = segment.weight_offset
            table[k, columns.SEG_STATE] = 4 * segment.state_offset
            table[k, columns.SEG_PARAMS] = address_of(segment.optimizer.parameters) if segment.optimizer else 0
            table[k, columns.SEG_CODEC] = segment.codec
            table[k, columns.SEG_STORED] = segment.stored_offset
            table[k, columns.SEG_CODEC_PARAMS] = address_of(segment.codec_parameters)
        return plan, table

    def grow_one_bit_scales(self, global_step: int) -> None:
        """Let one-bit scales grow: every `step_size` steps, before the gradients of that step use them.

        Kernels read a scale anew with every row, so steps under way on other threads take the new one in their middle.
        """
        for segment, (step_size, first, highest) in self._one_bit:
            if global_step % step_size == 0:
                segment.codec_parameters[1] = min(first * (1.0 + 0.005 * global_step) ** 0.5, highest)


def _padded(size: int) -> int:
    """Room for `size` bytes: a power of two up to a cache line, whole lines where that costs at most a quarter more."""
    if size <= 64:
        return max(8, 1 << (size - 1).bit_length())
    lines = -(-size // 64) * 64
    return lines if 4 * (lines - size) <= size else -(-size // 16) * 16


def serving_config(training: ps_pb2.TableConfig) -> ps_pb2.TableConfig:
    """How a replica keeps the rows of a training table: compressed as its segments say, float32 where they do not.

    Who gets a row and when it goes is decided in training.
    """
    config = ps_pb2.TableConfig(name=training.name, seed=training.seed)
    table = config.hash_table
    table.CopyFrom(training.hash_table)
    table.enable_feature_eviction = False
    table.slot_expire_time_config.Clear()
    table.slot_expire_time_config.default_expire_time = _NEVER_DAYS
    table.entry_config.entry_type = hash_table_pb2.EntryConfig.SERVING
    for segment in table.entry_config.segments:
        if not segment.HasField("comp_config"):
            segment.comp_config.fp32.SetInParent()
    return config


def lifetimes(expiry: hash_table_pb2.SlotExpireTimeConfig) -> npt.NDArray[np.int64]:
    """Seconds without update that rows live: int64[1] for all slots, or int64[32768] by slot."""
    default = expiry.default_expire_time * _SECONDS_PER_DAY
    if not expiry.slot_expire_times:
        return np.array([default], np.int64)
    seconds = np.full(1 << 15, default, np.int64)
    for given in expiry.slot_expire_times:
        seconds[given.slot] = given.expire_time * _SECONDS_PER_DAY
    return seconds
