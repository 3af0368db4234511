"""Arithmetic on runs of float32 at raw addresses: scaled sums, squares, products, a vector instruction at a time.

LLVM cannot vectorise these loops by itself: it must assume that pointers made of integers alias.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from trilith.ops.jit import JIT_DISABLED, inlined

__all__ = ["add_plain", "add_scaled", "add_squares", "set_product", "set_scaled", "set_zero"]

_F32 = ir.FloatType()


def _read(address: int, width: int) -> Any:
    return np.frombuffer(ctypes.string_at(int(address), 4 * width), np.float32)


def _step(width: int, combine: Callable[[Any, Any, Any, Any], Any], twin: Callable[[Any, Any, Any], Any]) -> Any:
    """Make `step(target, source, factor)`: `width` floats of `target` become combine(target, source, factor)."""
    if JIT_DISABLED:

        def plain(target: int, source: int, factor: np.float32) -> None:
            with np.errstate(over="ignore", invalid="ignore"):
                result = twin(_read(target, width), _read(source, width), np.float32(factor))
            ctypes.memmove(int(target), np.asarray(result, np.float32).tobytes(), 4 * width)

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
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32), generate

    return step


def _steps(combine: Callable[[Any, Any, Any, Any], Any], twin: Callable[[Any, Any, Any], Any]) -> tuple[Any, Any, Any]:
    return _step(16, combine, twin), _step(4, combine, twin), _step(1, combine, twin)


_plain16, _plain4, _plain1 = _steps(lambda b, old, new, _: b.fadd(old, new), lambda old, new, _: old + new)
_scaled16, _scaled4, _scaled1 = _steps(
    lambda b, old, new, factor: b.fadd(old, b.fmul(new, factor)), lambda old, new, factor: old + new * factor
)
_set16, _set4, _set1 = _steps(lambda b, _, new, factor: b.fmul(new, factor), lambda _, new, factor: new * factor)
_square16, _square4, _square1 = _steps(
    lambda b, old, new, _: b.fadd(old, b.fmul(new, new)), lambda old, new, _: old + new * new
)
_times16, _times4, _times1 = _steps(lambda b, old, new, _: b.fmul(old, new), lambda old, new, _: old * new)
_ONE = np.float32(1.0)


@inlined
def add_plain(target: int, source: int, count: int) -> None:
    """Add `count` floats onto `target`."""
    i = 0
    while i + 16 <= count:
        _plain16(target + 4 * i, source + 4 * i, _ONE)
        i += 16
    while i + 4 <= count:
        _plain4(target + 4 * i, source + 4 * i, _ONE)
        i += 4
    while i < count:
        _plain1(target + 4 * i, source + 4 * i, _ONE)
        i += 1


@inlined
def add_scaled(target: int, source: int, count: int, factor: np.float32) -> None:
    """Add `count` floats times `factor` onto `target`."""
    i = 0
    while i + 16 <= count:
        _scaled16(target + 4 * i, source + 4 * i, factor)
        i += 16
    while i + 4 <= count:
        _scaled4(target + 4 * i, source + 4 * i, factor)
        i += 4
    while i < count:
        _scaled1(target + 4 * i, source + 4 * i, factor)
        i += 1


@inlined
def set_scaled(target: int, source: int, count: int, factor: np.float32) -> None:
    """Write `count` floats times `factor`."""
    i = 0
    while i + 16 <= count:
        _set16(target + 4 * i, source + 4 * i, factor)
        i += 16
    while i + 4 <= count:
        _set4(target + 4 * i, source + 4 * i, factor)
        i += 4
    while i < count:
        _set1(target + 4 * i, source + 4 * i, factor)
        i += 1


@inlined
def add_squares(target: int, source: int, count: int) -> None:
    """Add the squares of `count` floats onto `target`."""
    i = 0
    while i + 16 <= count:
        _square16(target + 4 * i, source + 4 * i, _ONE)
        i += 16
    while i + 4 <= count:
        _square4(target + 4 * i, source + 4 * i, _ONE)
        i += 4
    while i < count:
        _square1(target + 4 * i, source + 4 * i, _ONE)
        i += 1


@inlined
def set_product(target: int, source: int, count: int) -> None:
    """Multiply `count` floats of `target` by those of `source`."""
    i = 0
    while i + 16 <= count:
        _times16(target + 4 * i, source + 4 * i, _ONE)
        i += 16
    while i + 4 <= count:
        _times4(target + 4 * i, source + 4 * i, _ONE)
        i += 4
    while i < count:
        _times1(target + 4 * i, source + 4 * i, _ONE)
        i += 1


if JIT_DISABLED:

    def set_zero(target: int, count: int) -> None:
        """Write `count` zeros."""
        ctypes.memset(int(target), 0, 4 * int(count))

else:

    def _zero(width: int) -> Any:
        @intrinsic
        def zero(typingctx: Any, target: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                line = ir.VectorType(_F32, width)
                pointer = builder.inttoptr(args[0], line.as_pointer())
                builder.store(ir.Constant(line, [0.0] * width), pointer, align=1)
                return context.get_dummy_value()

            return types.void(types.int64), generate

        return zero

    _zero16, _zero1 = _zero(16), _zero(1)

    @inlined
    def set_zero(target: int, count: int) -> None:
        """Write `count` zeros."""
        i = 0
        while i + 16 <= count:
            _zero16(target + 4 * i)
            i += 16
        while i < count:
            _zero1(target + 4 * i)
            i += 1
