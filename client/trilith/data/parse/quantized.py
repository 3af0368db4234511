"""Float vectors squeezed into bytes (UE_QTZ): 8-bit steps between two half floats, or half floats for short vectors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trilith.errors import DataError, InvalidRequestError

__all__ = [
    "PREFIX",
    "dequantize",
    "dequantize_rows",
    "quantize",
]

PREFIX = b"UE_QTZ"
"""What a squeezed vector begins with."""

_HALF_BYTES = 8  # payloads up to this size are half floats
_HALF_MAX = np.float32(65504)


def dequantize(data: bytes) -> npt.NDArray[np.float32]:
    """float32[n]: the vector in `data`, which begins with `PREFIX`."""
    payload = data[len(PREFIX) :]
    if not data.startswith(PREFIX) or (len(payload) <= _HALF_BYTES and len(payload) % 2):
        raise DataError(f"{len(data)} bytes that begin with {data[:8]!r} are no UE_QTZ vector")
    if len(payload) <= _HALF_BYTES:
        return _halves(np.frombuffer(payload, "<f2"))
    low, high = _clamped(np.frombuffer(payload[:4], "<f2"))
    steps = np.frombuffer(payload, np.uint8, offset=4).astype(np.float32)
    vector: npt.NDArray[np.float32] = low + steps * ((high - low) / np.float32(255))
    return vector


def dequantize_rows(payloads: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """float32[rows, dim] out of uint8[rows, bytes], vectors of one size without their prefix."""
    if payloads.shape[1] <= _HALF_BYTES:
        return _halves(np.ascontiguousarray(payloads).view("<f2"))
    bounds = _clamped(np.ascontiguousarray(payloads[:, :4]).view("<f2"))
    low, high = bounds[:, :1], bounds[:, 1:]
    return low + payloads[:, 4:].astype(np.float32) * ((high - low) / np.float32(255))


def quantize(values: npt.ArrayLike) -> bytes:
    """Squeeze a vector of floats [n]; up to four elements become half floats, more one byte each.

    Raises:
        InvalidRequestError: It is empty, of more dimensions, or not finite.
    """
    vector = np.asarray(values, np.float32)
    if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
        raise InvalidRequestError(f"a vector of at least one finite float can be quantized, not {values!r}")
    with np.errstate(over="ignore"):
        if vector.size <= _HALF_BYTES // 2:
            return PREFIX + vector.astype("<f2").tobytes()
        low, high = vector.min(), vector.max()
        step = (high - low) / np.float32(255)
        steps = np.trunc(np.float32(0.5) + (vector - low) / step) if step > 0 else np.zeros_like(vector)
        return (
            PREFIX + np.array([low, high]).astype("<f2").tobytes() + np.minimum(steps, 255).astype(np.uint8).tobytes()
        )


def _clamped(halves: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    return np.clip(halves.astype(np.float32), -_HALF_MAX, _HALF_MAX)


def _halves(halves: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """Half floats moved away from zero by half a unit in the last place; zero stays."""
    values = halves.astype(np.float32)
    bits = halves.view(np.uint16)
    bias = np.ldexp(np.float32(1), ((bits >> 10) & 31).astype(np.int32) - 26)
    return np.where(bits & 0x7FFF == 0, values, values + np.where(bits >> 15 == 1, -bias, bias)).astype(np.float32)
