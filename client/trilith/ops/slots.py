"""Eight slots of an index compared at once: a cache line, and no branch that the processor has to guess."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from trilith.ops.jit import JIT_DISABLED
from trilith.ops.memory import load_u64

__all__ = ["SLOTS_PER_LINE", "probe_line"]

SLOTS_PER_LINE = 8
"""Slots of 8 bytes in a cache line."""

if JIT_DISABLED:

    def probe_line(line: int, tag: int, limit: int) -> int:
        """Which slot holds `tag` plus a number in 1..limit - 1, else the first that holds 0, else -1.

        Args:
            line: Address of eight slots, a multiple of 64.
            tag: A multiple of `limit`.
            limit: A power of two.
        """
        slots = [int(load_u64(line, slot)) for slot in range(SLOTS_PER_LINE)]
        for slot, word in enumerate(slots):
            if 0 < word ^ int(tag) < int(limit):
                return slot
        return next((slot for slot, word in enumerate(slots) if word == 0), -1)

else:

    @intrinsic
    def probe_line(typingctx: Any, line: Any, tag: Any, limit: Any) -> Any:
        """Which slot holds `tag` plus a number in 1..limit - 1, else the first that holds 0, else -1."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            i1, i8, i32, i64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
            lanes = ir.VectorType(i64, SLOTS_PER_LINE)
            pick_first = ir.Constant(ir.VectorType(i32, SLOTS_PER_LINE), [0] * SLOTS_PER_LINE)

            def spread(value: Any) -> Any:
                alone = builder.insert_element(ir.Constant(lanes, ir.Undefined), value, i32(0))
                return builder.shuffle_vector(alone, ir.Constant(lanes, ir.Undefined), pick_first)

            held = builder.load(builder.inttoptr(args[0], lanes.as_pointer()), align=64, typ=lanes)
            one = ir.Constant(lanes, [1] * SLOTS_PER_LINE)
            # Where the tag is the same, exclusive or leaves the number; less one, 0 is out of range as well.
            number = builder.sub(builder.xor(held, spread(args[1])), one)
            hit = builder.bitcast(builder.icmp_unsigned("<", number, spread(builder.sub(args[2], i64(1)))), i8)
            empty = builder.bitcast(builder.icmp_unsigned("==", held, ir.Constant(lanes, [0] * SLOTS_PER_LINE)), i8)
            # A hit goes before an empty slot: its bit is lower.
            both = builder.or_(builder.zext(hit, i64), builder.shl(builder.zext(empty, i64), i64(8)))
            slot = builder.and_(builder.cttz(both, ir.Constant(i1, 0)), i64(7))
            return builder.select(builder.icmp_unsigned("==", both, i64(0)), i64(-1), slot)

        return types.int64(types.int64, types.uint64, types.int64), generate
