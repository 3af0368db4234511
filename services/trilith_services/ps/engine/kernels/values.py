"""Kernels over the numbers of a request: conversion, and the search for NaN and infinity."""

from __future__ import annotations

import numpy as np

from trilith.ops.jit import kernel
from trilith.ops.memory import load_f16, load_u32, store_f32


@kernel("void(int64, int64, int64)")
def widen_halves(source: int, target: int, count: int) -> None:
    """Convert float16 to float32.

    Args:
        source: Address of float16[count].
        target: Address of float32[count], written.
        count: How many.
    """
    for i in range(count):
        store_f32(target, i, load_f16(source, i))


@kernel("boolean(int64, int64, int64)")
def all_finite(source: int, count: int, width: int) -> bool:
    """Whether no value is NaN or infinite.

    Args:
        source: Address of float32[count], or float16[count].
        count: How many.
        width: Bytes per value, 4 or 2.
    """
    # An exponent of all ones marks both; an integer maximum vectorises where a float comparison with early exit does
    # not.
    largest = np.uint32(0)
    if width == 4:
        for i in range(count):
            largest = max(largest, load_u32(source, i) & np.uint32(0x7F800000))
        return bool(largest < np.uint32(0x7F800000))
    for i in range(count // 2):
        pair = load_u32(source, i)
        largest = max(largest, (pair & np.uint32(0x7C00)) << np.uint32(16), pair & np.uint32(0x7C000000))
    odd = count % 2 == 1 and not np.isfinite(load_f16(source, count - 1))
    return bool(largest < np.uint32(0x7C000000)) and not odd
