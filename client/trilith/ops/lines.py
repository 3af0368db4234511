"""Runs of floats at raw addresses: copied, added, narrowed to float16 and widened back, and checked for being finite.

A "line" is as many floats as one vector instruction moves. The checks compare absolute bit patterns with a limit, so
one comparison finds infinity, NaN and, for float16, what would become infinity.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from trilith.ops.jit import JIT_DISABLED, inlined
from trilith.ops.memory import by_lines

__all__ = ["FINITE_F16", "FINITE_F32", "add_floats", "copy_floats_checked", "narrow_floats", "widen_floats"]

FINITE_F32 = np.int32(0x7F800000)
"""First absolute bit pattern that is not finite."""
FINITE_F16 = np.int32(0x477FF000)
"""Bit pattern of 65520.0, the first float32 that rounds to an infinite float16."""

_F32, _F16, _I32 = ir.FloatType(), ir.HalfType(), ir.IntType(32)
_MAGNITUDE = 0x7FFFFFFF
_Checked: TypeAlias = Callable[[int, int, int, np.int32], int]


def _line(width: int, source: ir.Type, target: ir.Type, add: bool) -> Any:
    """Make `move(target, source, limit) -> int64`: a bit per value whose magnitude reaches `limit`, after moving it."""
    if JIT_DISABLED:
        from_type = np.float16 if source is _F16 else np.float32
        to_type = np.float16 if target is _F16 else np.float32
        from_bytes, to_bytes = width * np.dtype(from_type).itemsize, width * np.dtype(to_type).itemsize

        def twin(to: int, origin: int, limit: int) -> int:
            values = np.frombuffer(ctypes.string_at(int(origin), from_bytes), from_type).astype(np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                if add:
                    values = np.frombuffer(ctypes.string_at(int(to), to_bytes), np.float32) + values
                ctypes.memmove(int(to), values.astype(to_type).tobytes(), to_bytes)
            high = (values.view(np.int32) & _MAGNITUDE) >= limit
            return int(high.any())

        return twin

    @intrinsic
    def move(typingctx: Any, to: Any, origin: Any, limit: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            from_line, to_line = ir.VectorType(source, width), ir.VectorType(target, width)
            floats, words = ir.VectorType(_F32, width), ir.VectorType(_I32, width)
            pointer = builder.inttoptr(args[0], to_line.as_pointer())
            value = builder.load(builder.inttoptr(args[1], from_line.as_pointer()), align=1, typ=from_line)
            if source is _F16:
                value = builder.fpext(value, floats)
            if add:
                value = builder.fadd(builder.load(pointer, align=1, typ=to_line), value)
            result = builder.fptrunc(value, to_line) if target is _F16 else value
            builder.store(result, pointer, align=1)
            bits = builder.and_(builder.bitcast(value, words), ir.Constant(words, [_MAGNITUDE] * width))
            first = builder.insert_element(ir.Constant(words, ir.Undefined), args[2], _I32(0))
            limits = builder.shuffle_vector(first, ir.Constant(words, ir.Undefined), ir.Constant(words, [0] * width))
            high = builder.icmp_signed(">=", bits, limits)
            return (
                builder.zext(builder.bitcast(high, ir.IntType(width)), ir.IntType(64))
                if width > 1
                else builder.zext(builder.extract_element(high, _I32(0)), ir.IntType(64))
            )

        return types.int64(types.int64, types.int64, types.int32), generate

    return move


def _run(source: ir.Type, target: ir.Type, *, add: bool = False) -> Any:
    """Make `run(target, source, count, limit)`: nonzero if a value's magnitude reached `limit`."""
    to_bytes, from_bytes = (2 if each is _F16 else 4 for each in (target, source))
    return by_lines(lambda width: _line(width, source, target, add), to_bytes, from_bytes)


copy_floats_checked: _Checked = _run(_F32, _F32)
"""copy_floats_checked(target, source, count, limit): copy `count` float32; nonzero if a magnitude reached `limit`."""

add_floats: _Checked = _run(_F32, _F32, add=True)
"""add_floats(target, source, count, limit): add `count` float32 onto `target`; nonzero if a sum reached `limit`."""

narrow_floats: _Checked = _run(_F32, _F16)
"""narrow_floats(target, source, count, limit): write `count` float32 as float16, rounding to nearest; nonzero if a
magnitude reached `limit`."""

_widened = _run(_F16, _F32)


@inlined
def widen_floats(target: int, source: int, count: int) -> None:
    """Write `count` float16 as float32."""
    _widened(target, source, count, FINITE_F32)
