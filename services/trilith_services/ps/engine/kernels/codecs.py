"""Compressed weights: how serving rows are stored, and what training reads and gradients make of a compressor.

Codec parameters are float32 blocks: fixed_r8 (r); one_bit (amplitude, init_scale), where training tables keep the
current scale in place of init_scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trilith.ops.jit import inlined
from trilith.ops.memory import load_f16, load_f32, load_i8, store_f16, store_f32, store_i8

RAW = 0  # float32 as it is
HALF = 1
FIXED_R8 = 2
ONE_BIT = 3

_ZERO = np.float32(0)
_ONE = np.float32(1)
_HALF = np.float32(0.5)
_128 = np.float32(128)


@inlined
def quantize_r8(x: Any, r: Any) -> Any:
    """int8 code of x over [-r, r * 127 / 128]: round half away from zero, NaN to 0, clamped."""
    if np.isnan(x):
        return np.int8(0)
    step = r / _128
    shifted = (x + step * _HALF if x >= _ZERO else x - step * _HALF) / step
    return np.int8(max(np.float32(-128), min(np.float32(127), np.trunc(shifted))))


@inlined
def encode_weights(codec: Any, p: Any, target: Any, source: Any, dim: Any) -> Any:
    """Store float32[dim] from address `source` in `codec` at `target`; `p` is the address of the parameters."""
    if codec == RAW:
        for d in range(dim):
            store_f32(target, d, load_f32(source, d))
    elif codec == HALF:
        for d in range(dim):
            store_f16(target, d, load_f32(source, d))
    elif codec == FIXED_R8:
        r = load_f32(p, 0)
        for d in range(dim):
            store_i8(target, d, quantize_r8(load_f32(source, d), r))
    else:
        amplitude, scale = load_f32(p, 0), load_f32(p, 1)
        for d in range(dim):
            sign = amplitude * np.tanh(scale * load_f32(source, d)) > _ZERO
            store_i8(target, d, np.int8(1) if sign else np.int8(-1))


@inlined
def decode_weights(codec: Any, p: Any, target: Any, source: Any, dim: Any) -> Any:
    """Inverse of `encode_weights`: float32[dim] at `target` from the stored form at `source`."""
    if codec == RAW:
        for d in range(dim):
            store_f32(target, d, load_f32(source, d))
    elif codec == HALF:
        for d in range(dim):
            store_f32(target, d, load_f16(source, d))
    elif codec == FIXED_R8:
        step = load_f32(p, 0) / _128
        for d in range(dim):
            store_f32(target, d, np.float32(load_i8(source, d)) * step)
    else:
        amplitude = load_f32(p, 0)
        for d in range(dim):
            store_f32(target, d, amplitude if load_i8(source, d) > 0 else -amplitude)


@inlined
def read_weights(codec: Any, p: Any, target: Any, source: Any, dim: Any) -> Any:
    """What a training lookup sees of float32[dim] at `source`: fake quantisation, or amplitude * tanh(scale * w)."""
    if codec == FIXED_R8:
        r = load_f32(p, 0)
        for d in range(dim):
            store_f32(target, d, np.float32(quantize_r8(load_f32(source, d), r)) * (r / _128))
    elif codec == ONE_BIT:
        amplitude, scale = load_f32(p, 0), load_f32(p, 1)
        for d in range(dim):
            store_f32(target, d, amplitude * np.tanh(scale * load_f32(source, d)))
    else:
        for d in range(dim):
            store_f32(target, d, load_f32(source, d))


@inlined
def one_bit_gradient(p: Any, target: Any, weights: Any, gradient: Any, dim: Any) -> Any:
    """Gradient through amplitude * tanh(scale * w), float32[dim] at `target`.

    1 - tanh^2 is taken in float64: near saturation float32 would lose half its digits.
    """
    amplitude, scale = np.float64(load_f32(p, 0)), np.float64(load_f32(p, 1))
    for d in range(dim):
        y = np.float64(np.float32(np.tanh(np.float32(scale) * load_f32(weights, d))))
        store_f32(target, d, np.float32(np.float64(load_f32(gradient, d)) * amplitude * scale * (1.0 - y * y)))
