"""Arithmetic on runs of float32 at raw addresses: scaled sums, squares, products, a vector instruction at a time."""

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

__all__ = ["add_plain", "add_scaled", "set_larger", "set_scaled", "set_zero"]

_F32 = ir.FloatType()
_ONE = np.float32(1.0)
_Plain: TypeAlias = Callable[[int, int, int], None]
_Scaled: TypeAlias = Callable[[int, int, int, np.float32], int]


def _read(address: int, width: int) -> Any:
    return np.frombuffer(ctypes.string_at(int(address), 4 * width), np.float32)


def _step(width: int, combine: Callable[[Any, Any, Any, Any], Any], twin: Callable[[Any, Any, Any], Any]) -> Any:
    """Make `step(target, source, factor) -> 0`: `width` floats become combine(target, source, factor)."""
    if JIT_DISABLED:

        def plain(target: int, source: int, factor: np.float32) -> int:
            with np.errstate(over="ignore", invalid="ignore"):
                result = twin(_read(target, width), _read(source, width), np.float32(factor))
            ctypes.memmove(int(target), np.asarray(result, np.float32).tobytes(), 4 * width)
            return 0

        return plain

    @intrinsic
    def step(typingctx: Any, target: Any, source: Any, factor: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            line = ir.VectorType(_F32, width)
            undefined = ir.Constant(line, ir.Undefined)
            first = builder.insert_element(undefined, args[2], ir.IntType(32)(0))
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
            factors = builder.shuffle_vector(first, undefined, zeros)
            pointer = builder.inttoptr(args[0], line.as_pointer())
            old = builder.load(pointer, align=1, typ=line)
            new = builder.load(builder.inttoptr(args[1], line.as_pointer()), align=1, typ=line)
            builder.store(combine(builder, old, new, factors), pointer, align=1)
            return ir.IntType(64)(0)

        return types.int64(types.int64, types.int64, types.float32), generate

    return step


def _scaled(combine: Callable[[Any, Any, Any, Any], Any], twin: Callable[[Any, Any, Any], Any]) -> Any:
    """Make `run(target, source, count, factor)`."""
    return by_lines(lambda width: _step(width, combine, twin))


def _plain(combine: Callable[[Any, Any, Any], Any], twin: Callable[[Any, Any], Any]) -> Any:
    """Make `run(target, source, count)`, which has no use for a factor."""
    scaled = _scaled(lambda b, old, new, _: combine(b, old, new), lambda old, new, _: twin(old, new))

    @inlined
    def run(target: int, source: int, count: int) -> None:
        scaled(target, source, count, _ONE)

    return run


add_plain: _Plain = _plain(lambda b, old, new: b.fadd(old, new), lambda old, new: old + new)
"""add_plain(target, source, count): add `count` floats onto `target`."""

add_scaled: _Scaled = _scaled(
    lambda b, old, new, factor: b.fadd(old, b.fmul(new, factor)), lambda old, new, factor: old + new * factor
)
"""add_scaled(target, source, count, factor): add `count` floats times `factor` onto `target`."""

set_scaled: _Scaled = _scaled(lambda b, _, new, factor: b.fmul(new, factor), lambda _, new, factor: new * factor)
"""set_scaled(target, source, count, factor): write `count` floats times `factor`."""

set_larger: _Plain = _plain(
    lambda b, old, new: b.select(b.fcmp_ordered(">", new, old), new, old),
    lambda old, new: np.where(new > old, new, old),
)
"""set_larger(target, source, count): write those of `count` floats that are larger than what is there."""

_zeroed = _plain(lambda _, old, __: ir.Constant(old.type, [0.0] * old.type.count), lambda old, _: np.zeros_like(old))


@inlined
def set_zero(target: int, count: int) -> None:
    """Write `count` zeros."""
    _zeroed(target, target, count)
