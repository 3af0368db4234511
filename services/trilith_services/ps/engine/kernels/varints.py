"""Varints of protobuf, written by kernels."""

from __future__ import annotations

import numpy as np

from trilith.ops.jit import inlined
from trilith.ops.memory import store_u8

__all__ = ["put_varint", "varint_size"]

_SEVEN = np.uint64(7)
_LOW = np.uint64(0x7F)
_MORE = np.uint64(0x80)


@inlined
def varint_size(value: np.uint64) -> int:
    """Bytes that `value` takes."""
    size = 1
    while value >= _MORE:
        value = value >> _SEVEN
        size += 1
    return size


@inlined
def put_varint(at: int, value: np.uint64) -> int:
    """Write `value` at address `at`; returns where it ends."""
    while value >= _MORE:
        store_u8(at, 0, np.uint8((value & _LOW) | _MORE))
        value = value >> _SEVEN
        at += 1
    store_u8(at, 0, np.uint8(value))
    return at + 1
