"""Four slots of an index compared with an id at once: a cache line, and no branch that the processor has to guess."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from trilith.ops.jit import JIT_DISABLED
from trilith.ops.memory import load_u64

__all__ = ["SLOTS_PER_LINE", "probe_line"]

SLOTS_PER_LINE = 4
"""Slots of 16 bytes in a cache line."""

if JIT_DISABLED:

    def probe_line(line: int, key: int) -> int:
        """Which slot holds `key`, else the first empty one, else -1; a slot is an id and a word, 0 if it is empty.

        Args:
            line: Address of four slots, a multiple of 64.
            key: The id.
        """
        words = [load_u64(line, 2 * slot + 1) for slot in range(SLOTS_PER_LINE)]
        for slot, word in enumerate(words):
            if word != 0 and load_u64(line, 2 * slot) == key:
                return slot
        return next((slot for slot, word in enumerate(words) if word == 0), -1)

else:

    @intrinsic
    def probe_line(typingctx: Any, line: Any, key: Any) -> Any:
        """Which slot holds `key`, else the first empty one, else -1; a slot is an id and a word, 0 if it is empty."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
            lanes = ir.VectorType(i64, 2 * SLOTS_PER_LINE)
            pick_first = ir.Constant(ir.VectorType(i32, 2 * SLOTS_PER_LINE), [0] * (2 * SLOTS_PER_LINE))
            held = builder.load(builder.inttoptr(args[0], lanes.as_pointer()), align=64, typ=lanes)
            alone = builder.insert_element(ir.Constant(lanes, ir.Undefined), args[1], i32(0))
            wanted = builder.shuffle_vector(alone, ir.Constant(lanes, ir.Undefined), pick_first)
            # Bits 0, 2, 4, 6: the slots with this id; with an empty word the id means nothing.
            same = builder.bitcast(builder.icmp_unsigned("==", held, wanted), i8)
            zero = builder.bitcast(builder.icmp_unsigned("==", held, ir.Constant(lanes, [0] * 8)), i8)
            empty = builder.lshr(builder.and_(zero, i8(0xAA)), i8(1))
            hit = builder.and_(builder.and_(same, i8(0x55)), builder.not_(empty))
            # A hit goes before an empty slot: its bit is lower.
            both = builder.or_(builder.zext(hit, i64), builder.shl(builder.zext(empty, i64), i64(8)))
            slot = builder.lshr(builder.and_(builder.cttz(both, ir.Constant(ir.IntType(1), 0)), i64(7)), i64(1))
            return builder.select(builder.icmp_unsigned("==", both, i64(0)), i64(-1), slot)

        return types.int64(types.int64, types.uint64), generate
