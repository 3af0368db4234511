"""Compressors: how a serving row is stored; fixed-point and one-bit ones also change what training reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from trilith.tables.parts import Part
from trilith_proto.hash_table_pb2 import FloatCompressorConfig

__all__ = ["Compressor", "CompressorLike", "FixedR8", "Fp16", "Fp32", "OneBit"]


class Compressor(Part[FloatCompressorConfig]):
    """Base of the compressors."""

    __slots__ = ()
    config = FloatCompressorConfig


CompressorLike: TypeAlias = Compressor | FloatCompressorConfig


@dataclass(frozen=True, slots=True)
class Fp32(Compressor):
    """Weights as they are."""

    kind = "fp32"


@dataclass(frozen=True, slots=True)
class Fp16(Compressor):
    """IEEE half precision."""

    kind = "fp16"


@dataclass(frozen=True, slots=True)
class FixedR8(Compressor):
    """One int8 per weight over [-fixed_range, fixed_range * 127 / 128]."""

    kind = "fixed_r8"
    renamed: ClassVar[dict[str, str]] = {"fixed_range": "r"}
    fixed_range: float = 1.0


@dataclass(frozen=True, slots=True)
class OneBit(Compressor):
    """A sign per weight.

    Attributes:
        step_size: Steps between two refreshes of the scale that training reads with.
        amplitude: The magnitude that a sign stands for.
    """

    kind = "one_bit"
    step_size: int = 200
    amplitude: float = 0.05
