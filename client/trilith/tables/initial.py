"""The weights that a row begins with: a pure function of its table's config and its id, the same on every PS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from trilith.errors import InvalidRequestError
from trilith.shard import Float32Array, UInt64Array
from trilith_proto import hash_table_pb2, ps_pb2

__all__ = ["InitialRows", "Missing", "check_missing", "initial_weights"]

Missing: TypeAlias = Literal["zeros", "initial"]
"""What a lookup gives for an id that has no row: zeros, or what the row would begin with."""

# As in trilith.ops.hashing, for arrays.
_C1, _C2, _GOLDEN = (np.uint64(c) for c in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15))
_UNIT = np.float32(2.0**-24)
# Read as they were written: others change what is read of a training row.
_PLAIN = (None, "fp32", "fp16")


def check_missing(missing: str) -> bool:
    """Whether rows that are missing shall be their initial values; refuses what is no choice."""
    if missing == "zeros":
        return False
    if missing != "initial":
        raise InvalidRequestError(f"missing={missing!r} is neither 'zeros' nor 'initial'")
    return True


@dataclass(frozen=True, slots=True)
class InitialRows:
    """What rows of one table begin with.

    Attributes:
        seed: The table's.
        lows: float32[dim], lowest values.
        spans: float32[dim], widths of uniform ranges, 0 for constants.
        limits: float32[dim], largest values.
    """

    seed: int
    lows: Float32Array
    spans: Float32Array
    limits: Float32Array

    @classmethod
    def of(cls, config: ps_pb2.TableConfig) -> InitialRows:
        """Those of a table.

        Raises:
            InvalidRequestError: Its compressor changes what is read, which its rows' initial weights do not tell.
        """
        entry = config.hash_table.entry_config
        for segment in entry.segments:
            kind = segment.comp_config.WhichOneof("type")
            if kind not in _PLAIN and entry.entry_type != hash_table_pb2.EntryConfig.SERVING:
                raise InvalidRequestError(
                    f"table {config.name!r}: missing='initial' is not known of rows that are read through {kind}"
                )
        return cls(config.seed, *initial_weights(entry))

    @property
    def zeros(self) -> bool:
        """Whether all rows begin with zeros."""
        return not self.lows.any() and not self.spans.any()

    def rows(self, ids: UInt64Array, *, float16: bool = False) -> Float32Array:
        """float32[n, dim]: what a row of each id, uint64[n], begins with; as it travels in `float16`."""
        rows = np.repeat(self.lows[None], ids.size, axis=0)
        columns = np.flatnonzero(self.spans)
        if columns.size and ids.size:
            streams = _mix(np.uint64(self.seed) ^ _mix(ids))
            draws = _mix(streams[:, None] + (columns.astype(np.uint64) + np.uint64(1)) * _GOLDEN) >> np.uint64(40)
            values = rows[:, columns] + self.spans[columns] * (draws.astype(np.float32) * _UNIT)
            rows[:, columns] = np.minimum(values, self.limits[columns])
        return rows.astype(np.float16).astype(np.float32) if float16 else rows


def initial_weights(entry: hash_table_pb2.EntryConfig) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Per weight: lowest value, width of the uniform range, largest value."""
    low: list[float] = []
    high: list[float] = []
    for segment in entry.segments:
        chosen = segment.init_config.WhichOneof("type")
        a = b = 0.0
        if chosen == "ones":
            a = b = 1.0
        elif chosen == "constants":
            a = b = segment.init_config.constants.constant
        elif chosen == "random_uniform":
            a, b = segment.init_config.random_uniform.minval, segment.init_config.random_uniform.maxval
        low += [a] * segment.dim_size
        high += [b] * segment.dim_size
    lows, highs = np.array(low, np.float32), np.array(high, np.float32)
    # [minval, maxval): rounding must not reach maxval.
    limits = np.where(highs > lows, np.nextafter(highs, lows), highs).astype(np.float32)
    return lows, (highs - lows).astype(np.float32), limits


def _mix(values: UInt64Array) -> UInt64Array:
    values = (values ^ (values >> np.uint64(30))) * _C1
    values = (values ^ (values >> np.uint64(27))) * _C2
    return values ^ (values >> np.uint64(31))
