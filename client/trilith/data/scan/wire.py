"""The wire format of protobuf for kernels: varints, tags, lengths, skipping, runs of values.

Positions are int64 addresses, payloads uint64; every reader is told where the data ends and looks no further. A reader
returns the position behind what it read, or one of the negative codes below. It refuses what the protobuf library
refuses: field number 0, wire types 6 and 7, tags above 32 bits, lengths of 2^31 and more or beyond the end, varints of
more than ten bytes, groups that do not match or nest a hundred deep.

At least 64 bytes behind the data can be read (`records.PADDING`), so wide loads need no check.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from trilith.ops.jit import JIT_DISABLED, part
from trilith.ops.memory import copy_line, load_u8, load_u64, prefetch, store_u64

__all__ = [
    "AHEAD",
    "BAD_GROUP",
    "BAD_LENGTH",
    "BAD_PACKED",
    "BAD_TAG",
    "BAD_UTF8",
    "BAD_VARINT",
    "BOOL",
    "BYTES",
    "CODES",
    "DOUBLE_TO_FLOAT",
    "FIXED32",
    "FIXED64",
    "MAX_DEPTH",
    "TRUNCATED",
    "UNSIGNED32",
    "V1_TO_V2",
    "VARINT",
    "VARINT32",
    "ZIGZAG",
    "append_fids",
    "append_run",
    "append_span",
    "byte_at",
    "check_utf8",
    "check_varints",
    "convert_fids",
    "convert_line",
    "copy_bytes",
    "decoded",
    "find_name",
    "find_next_name",
    "i64_at",
    "inside_tag",
    "long_length",
    "long_tag",
    "long_varint",
    "low_bytes",
    "name_hash",
    "narrow_double",
    "put_i64",
    "read_length",
    "read_tag",
    "run_of_slot",
    "same_bytes",
    "skip_field",
    "skip_group",
    "skip_value",
    "v1_to_v2",
    "varint",
    "wire_type",
]

if TYPE_CHECKING:
    _int64: Any
    _uint64: Any
else:
    _int64 = np.int64
    _uint64 = np.uint64

TRUNCATED = -1
BAD_TAG = -2
BAD_LENGTH = -3
BAD_GROUP = -4
BAD_PACKED = -5
BAD_UTF8 = -6
BAD_VARINT = -7

CODES = {
    TRUNCATED: "the data ends inside a field",
    BAD_TAG: "a tag that no message can have (field number 0, wire type 6 or 7, or more than 32 bits)",
    BAD_LENGTH: "a length that reaches beyond the end of its message",
    BAD_GROUP: "a group that does not end, ends without a beginning, or nests too deep",
    BAD_PACKED: "a packed list whose length is no multiple of its elements' size",
    BAD_UTF8: "a string that is not UTF-8",
    BAD_VARINT: "a number of more than ten bytes",
}
"""What each code means."""

# How a value is written and what a column keeps of it; 1 to 8 are `line_ids.Wire`.
FIXED64, FIXED32, VARINT, VARINT32, BOOL, BYTES, ZIGZAG, UNSIGNED32 = 1, 2, 3, 4, 5, 6, 7, 8
V1_TO_V2 = 9
"""A fixed64 that holds a v1 fid; the column gets v2."""
DOUBLE_TO_FLOAT = 10
"""A double; the column gets a float."""

AHEAD = 1024
"""How far ahead to fetch what will be read, in bytes: the memory answers later than the scanner asks."""
MAX_DEPTH = 100
"""How deep messages and groups may nest, as in the protobuf library."""
_MAX_LENGTH = 2**31 - 1
_LOW48 = _uint64(2**48 - 1)
_HIGH_BITS = _uint64(0x8080808080808080)
_7F = _uint64(0x7F)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@part()
def byte_at(p: int) -> int:
    """The byte at an address."""
    return _int64(load_u8(p, 0))  # type: ignore[no-any-return]


@part()
def i64_at(base: int, index: int) -> int:
    """Element of an int64 array."""
    return _int64(load_u64(base, index))  # type: ignore[no-any-return]


@part()
def put_i64(base: int, index: int, value: int) -> None:
    """Set an element of an int64 array."""
    store_u64(base, index, _uint64(_int64(value)))


@part(inline=False)
def long_varint(p: int, end: int) -> tuple[np.uint64, int]:
    """Read a varint of any length.

    Args:
        p: Where it begins.
        end: Where the data ends.

    Returns:
        The value modulo 2^64, and the position behind it or a code.
    """
    value = _uint64(0)
    shift = _uint64(0)
    for i in range(10):
        if p + i >= end:
            return _uint64(0), TRUNCATED
        byte = _uint64(load_u8(p, i))
        value |= (byte & _7F) << shift
        if byte <= _7F:
            return value, p + i + 1
        shift += _uint64(7)
    return _uint64(0), BAD_VARINT


@part()
def varint(p: int, end: int) -> tuple[np.uint64, int]:
    """A varint, and the position behind it or a code."""
    if p < end and byte_at(p) < 128:
        return _uint64(load_u8(p, 0)), p + 1
    return long_varint(p, end)


@part(inline=False)
def long_tag(p: int, end: int) -> tuple[int, int]:
    """Read a tag of any length.

    Args:
        p: Where it begins.
        end: Where the data ends.

    Returns:
        The tag, and the position behind it or a code.
    """
    value, after = long_varint(p, end)
    if after < 0:
        return 0, after if after == TRUNCATED and end - p < 5 else BAD_TAG
    if after - p > 5 or value > _uint64(0xFFFFFFFF):
        return 0, BAD_TAG
    tag = _int64(value)
    if tag < 8 or tag & 7 > 5:
        return 0, BAD_TAG
    return tag, after


@part()
def read_tag(p: int, end: int) -> tuple[int, int]:
    """A tag (number << 3 | wire type), and the position behind it or a code."""
    if p < end:
        first = byte_at(p)
        if 8 <= first < 128 and first & 7 <= 5:
            return first, p + 1
        if first >= 128 and p + 1 < end and first & 7 <= 5:
            second = byte_at(p + 1)
            if 0 < second < 128:
                return first & 127 | second << 7, p + 2
    return long_tag(p, end)


@part(inline=False)
def long_length(p: int, end: int) -> tuple[int, int]:
    """Read the length of what follows, in an encoding of any length.

    Args:
        p: Where it begins.
        end: Where the data ends.

    Returns:
        The length, and the position behind its encoding or a code; the length never reaches beyond the end.
    """
    value, after = long_varint(p, end)
    if after < 0:
        return 0, after if after == TRUNCATED and end - p < 5 else BAD_LENGTH
    if after - p > 5 or value > _uint64(_MAX_LENGTH) or _int64(value) > end - after:
        return 0, BAD_LENGTH
    return _int64(value), after


@part()
def read_length(p: int, end: int) -> tuple[int, int]:
    """The length of what follows, and the position behind its encoding or a code."""
    if p < end:
        first = byte_at(p)
        if first < 128 and first <= end - p - 1:
            return first, p + 1
        if p + 1 < end and first >= 128:
            second = byte_at(p + 1)
            size = first & 127 | second << 7
            if second < 128 and size <= end - p - 2:
                return size, p + 2
    return long_length(p, end)


# ---- skipping and checking -------------------------------------------------------------------------------------------


@part()
def skip_value(kind: int, p: int, end: int) -> int:
    """Go past a value of wire type 0, 1, 2 or 5; the position behind it, or a code."""
    if kind == 2:
        size, p = read_length(p, end)
        return p + size if p >= 0 else p
    if kind == 0:
        _, p = varint(p, end)
        return p
    size = 8 if kind == 1 else 4
    return p + size if end - p >= size else TRUNCATED


@part(inline=False)
def inside_tag(p: int, end: int) -> tuple[int, int]:
    """A tag inside a group that is skipped; field number 0 passes there, as it does with the protobuf library."""
    value, after = long_varint(p, end)
    if after < 0:
        return 0, after
    tag = _int64(value & _uint64(0xFFFFFFFF))
    if after - p > 5 or value > _uint64(0xFFFFFFFF) or tag & 7 > 5:
        return 0, BAD_TAG
    return tag, after


@part(inline=False)
def skip_group(tag: int, p: int, end: int, depth: int) -> int:
    """Go past a group and all it holds.

    Args:
        tag: Tag of its beginning.
        p: Where its content begins.
        end: Where the enclosing message ends.
        depth: How many messages enclose the group.

    Returns:
        The position behind it, or a code.
    """
    numbers = np.empty(MAX_DEPTH, np.int64)
    opened = 0
    while True:
        kind = tag & 7
        if kind == 3:
            if depth + opened >= MAX_DEPTH:
                return BAD_GROUP
            numbers[opened] = tag >> 3
            opened += 1
        elif kind == 4:
            opened -= 1
            if numbers[opened] != tag >> 3:
                return BAD_GROUP
            if opened == 0:
                return p
        else:
            p = skip_value(kind, p, end)
            if p < 0:
                return p
        tag, p = inside_tag(p, end)
        if p < 0:
            return p


@part()
def skip_field(tag: int, p: int, end: int, depth: int) -> int:
    """Go past the value of a field that nothing is known about.

    Args:
        tag: Its tag.
        p: Where the value begins.
        end: Where the message ends.
        depth: How many messages enclose the message.

    Returns:
        The position behind it, or a code.
    """
    kind = tag & 7
    if kind == 3:
        return skip_group(tag, p, end, depth)
    if kind == 4:
        return BAD_GROUP
    return skip_value(kind, p, end)


@part(inline=False)
def check_varints(p: int, end: int) -> int:
    """Check a packed list of varints.

    Args:
        p: Where it begins.
        end: Where it ends.

    Returns:
        `end`, or a code.
    """
    while p < end:
        if byte_at(p) < 128:
            p += 1
        else:
            _, p = long_varint(p, end)
            if p < 0:
                return p
    return p


@part(inline=False)
def _check_utf8(p: int, end: int) -> int:
    """Check a string that is not plain ASCII.

    Args:
        p: Where it begins.
        end: Where it ends.

    Returns:
        `end`, or a code.
    """
    while p < end:
        first = byte_at(p)
        if first < 0x80:
            p += 1
            continue
        low, high = 0x80, 0xBF
        if 0xC2 <= first <= 0xDF:
            more = 1
        elif 0xE0 <= first <= 0xEF:
            more = 2
            if first == 0xE0:
                low = 0xA0
            elif first == 0xED:
                high = 0x9F  # no surrogates
        elif 0xF0 <= first <= 0xF4:
            more = 3
            if first == 0xF0:
                low = 0x90
            elif first == 0xF4:
                high = 0x8F
        else:
            return BAD_UTF8
        if end - p <= more:
            return BAD_UTF8
        second = byte_at(p + 1)
        if second < low or second > high:
            return BAD_UTF8
        for i in range(2, more + 1):
            if byte_at(p + i) & 0xC0 != 0x80:
                return BAD_UTF8
        p += more + 1
    return p


@part()
def low_bytes(word: np.uint64, count: int) -> np.uint64:
    """The first 1 to 8 bytes of a word, the others zero."""
    return word & (_uint64(0xFFFFFFFFFFFFFFFF) >> _uint64(64 - 8 * count))  # type: ignore[no-any-return]


@part()
def check_utf8(p: int, end: int) -> int:
    """Check a string; `end` or a code."""
    high = _uint64(0)
    q = p
    while q + 8 <= end:
        high |= load_u64(q, 0)
        q += 8
    if q < end:
        high |= low_bytes(load_u64(q, 0), end - q)
    if high & _HIGH_BITS == _uint64(0):
        return end
    return _check_utf8(p, end)


# ---- runs of values --------------------------------------------------------------------------------------------------


@part()
def copy_bytes(target: int, source: int, count: int) -> None:
    """Copy bytes in lines of 64; up to 63 bytes behind the target may be overwritten."""
    for at in range(0, count, 64):
        copy_line(target + at, source + at)


@part()
def v1_to_v2(fid: np.uint64) -> np.uint64:
    """The v2 form of a v1 fid; the highest six bits of its signature are lost."""
    return ((fid >> _uint64(54)) << _uint64(48)) | (fid & _LOW48)  # type: ignore[no-any-return]


if JIT_DISABLED:

    def convert_line(target: int, source: int) -> None:
        """Turn eight v1 fids into v2."""
        for i in range(8):
            store_u64(target, i, v1_to_v2(load_u64(source, i)))

    def run_of_slot(fids: int) -> int:
        """How many of the eight v1 fids at an address have the slot of the first, without a gap."""
        slots = [load_u64(fids, i) >> _uint64(54) for i in range(8)]
        return next((i for i in range(8) if slots[i] != slots[0]), 8)

    def narrow_double(target: int, source: int) -> None:
        """Write the double at `source` as a float."""
        import ctypes

        with np.errstate(over="ignore"):
            value = np.frombuffer(ctypes.string_at(int(source), 8), np.float64).astype(np.float32)
        ctypes.memmove(int(target), value.tobytes(), 4)

else:

    @intrinsic
    def convert_line(typingctx: Any, target: Any, source: Any) -> Any:
        """Turn eight v1 fids into v2; one vector, since LLVM cannot know that source and target are apart."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            line = ir.VectorType(ir.IntType(64), 8)
            to, origin = (builder.inttoptr(arg, line.as_pointer()) for arg in args)
            fids = builder.load(origin, align=1, typ=line)
            slots = builder.shl(builder.lshr(fids, ir.Constant(line, [54] * 8)), ir.Constant(line, [48] * 8))
            signatures = builder.and_(fids, ir.Constant(line, [2**48 - 1] * 8))
            builder.store(builder.or_(slots, signatures), to, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    @intrinsic
    def run_of_slot(typingctx: Any, fids: Any) -> Any:
        """How many of the eight v1 fids at an address have the slot of the first, without a gap.

        Without a branch per fid: where a run ends cannot be predicted, and that costs more than all the rest.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            line = ir.VectorType(ir.IntType(64), 8)
            loaded = builder.load(builder.inttoptr(args[0], line.as_pointer()), align=1, typ=line)
            slots = builder.lshr(loaded, ir.Constant(line, [54] * 8))
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), 8), [0] * 8)
            first = builder.shuffle_vector(slots, ir.Constant(line, ir.Undefined), lanes)
            other = builder.bitcast(builder.icmp_unsigned("!=", slots, first), ir.IntType(8))
            return builder.zext(builder.cttz(other, ir.Constant(ir.IntType(1), 0)), ir.IntType(64))

        return types.int64(types.int64), generate

    @intrinsic
    def narrow_double(typingctx: Any, target: Any, source: Any) -> Any:
        """Write the double at `source` as a float."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            double, single = ir.DoubleType(), ir.FloatType()
            value = builder.load(builder.inttoptr(args[1], double.as_pointer()), align=1, typ=double)
            builder.store(builder.fptrunc(value, single), builder.inttoptr(args[0], single.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate


@part()
def convert_fids(target: int, source: int, count: int) -> None:
    """Turn v1 fids into v2; up to 56 bytes behind the target may be overwritten."""
    for at in range(0, 8 * count, 64):
        convert_line(target + at, source + at)


@part()
def decoded(value: np.uint64, element: int) -> np.uint64:
    """What a column keeps of a varint: 64 bits, signed ones extended."""
    if element == VARINT32:
        return _uint64(_int64(value << _uint64(32)) >> 32)  # type: ignore[no-any-return]
    if element == BOOL:
        return _uint64(value != _uint64(0))  # type: ignore[no-any-return]
    if element == ZIGZAG:
        return (value >> _uint64(1)) ^ (_uint64(0) - (value & _uint64(1)))  # type: ignore[no-any-return]
    if element == UNSIGNED32:
        return value & _uint64(0xFFFFFFFF)  # type: ignore[no-any-return]
    return value


@part()
def wire_type(element: int) -> int:
    """The wire type of a single value."""
    if element in (FIXED64, V1_TO_V2, DOUBLE_TO_FLOAT):
        return 1
    if element == FIXED32:
        return 5
    if element == BYTES:
        return 2
    return 0


@part(inline=False)
def append_run(element: int, column: int, p: int, end: int, cursors: int, capacities: int, regions: int) -> int:
    """Append values that lie one behind another, packed or a single one, to a column.

    Past its capacity a column is only counted.

    Args:
        element: How the values are written, other than BYTES.
        column: Number of the column.
        p: Where the values begin.
        end: Where they end.
        cursors: Address of int64[columns], values so far; written.
        capacities: Address of int64[columns].
        regions: Address of int64[columns], address of each column's values.

    Returns:
        `end`, or a code.
    """
    cursor = i64_at(cursors, column)
    capacity = i64_at(capacities, column)
    region = i64_at(regions, column)
    wire = wire_type(element)
    if wire == 0:
        while p < end:
            value, p = varint(p, end)
            if p < 0:
                return p
            if cursor < capacity:
                store_u64(region, cursor, decoded(value, element))
            cursor += 1
        put_i64(cursors, column, cursor)
        return end
    width = 4 if wire == 5 else 8
    count = (end - p) // width
    if count * width != end - p:
        return BAD_PACKED
    if count <= capacity - cursor:
        if element == V1_TO_V2:
            convert_fids(region + 8 * cursor, p, count)
        elif element == DOUBLE_TO_FLOAT:
            for i in range(count):
                narrow_double(region + 4 * (cursor + i), p + 8 * i)
        else:
            copy_bytes(region + width * cursor, p, count * width)
    put_i64(cursors, column, cursor + count)
    return end


@part()
def append_fids(element: int, column: int, p: int, size: int, cursors: int, capacities: int, regions: int) -> None:
    """Append a packed run of fids of whole length to a column, as they are or (V1_TO_V2) converted."""
    cursor = i64_at(cursors, column)
    count = size >> 3
    if count <= i64_at(capacities, column) - cursor:
        target = i64_at(regions, column) + 8 * cursor
        if element == V1_TO_V2:
            convert_fids(target, p, count)
        else:
            copy_bytes(target, p, size)
        # Where the next row's fids will go, and what comes some features later: both leave the cache between two uses.
        prefetch(target + size + 64)
        prefetch(target + size + 128)
    prefetch(p + size + AHEAD)
    prefetch(p + size + AHEAD + 64)
    put_i64(cursors, column, cursor + count)


@part()
def append_span(column: int, start: int, size: int, cursors: int, capacities: int, regions: int) -> None:
    """Append where a byte string lies: its offset and length, two int64."""
    cursor = i64_at(cursors, column)
    if cursor < i64_at(capacities, column):
        region = i64_at(regions, column)
        put_i64(region, 2 * cursor, start)
        put_i64(region, 2 * cursor + 1, size)
    put_i64(cursors, column, cursor + 1)


@part()
def name_hash(p: int, size: int) -> np.uint64:
    """Hash of a name; `schema.name_hash` is the same in Python."""
    value = _uint64(size) * _uint64(0x9E3779B97F4A7C15)
    at = 0
    while at + 8 <= size:
        value = (value ^ load_u64(p + at, 0)) * _uint64(0xBF58476D1CE4E5B9)
        value ^= value >> _uint64(29)
        at += 8
    if at < size:
        value = (value ^ low_bytes(load_u64(p + at, 0), size - at)) * _uint64(0xBF58476D1CE4E5B9)
        value ^= value >> _uint64(29)
    return value  # type: ignore[no-any-return]


@part()
def same_bytes(p: int, q: int, size: int) -> bool:
    """Whether two strings of one length are equal."""
    at = 0
    while at + 8 <= size:
        if load_u64(p + at, 0) != load_u64(q + at, 0):
            return False
        at += 8
    return at == size or low_bytes(load_u64(p + at, 0) ^ load_u64(q + at, 0), size - at) == _uint64(0)


@part()
def find_next_name(previous: int, p: int, size: int, table: int, mask: int, texts: int, followers: int) -> int:
    """Look a name up where the names before it are known: records of one producer have their features in one order.

    Args:
        previous: Number of the wanted name before it, -1 for none.
        p: Where it begins.
        size: Its length.
        table: As for `find_name`.
        mask: As for `find_name`.
        texts: Address of int64[names, 2]: address and length of each name.
        followers: Address of int64[names + 1], written: the name that came behind each.

    Returns:
        The name's number, or -1.
    """
    guess = i64_at(followers, previous + 1)
    if i64_at(texts, 2 * guess + 1) == size and same_bytes(p, i64_at(texts, 2 * guess), size):
        return guess
    number = find_name(p, size, table, mask)
    if number >= 0:
        put_i64(followers, previous + 1, number)
    return number


@part(inline=False)
def find_name(p: int, size: int, table: int, mask: int) -> int:
    """Look a name up.

    Args:
        p: Where it begins.
        size: Its length.
        table: Address of int64[mask + 1, 3]: address of the name's bytes, its length, its number plus one or 0.
        mask: Entries minus one, a power of two minus one.

    Returns:
        The name's number, or -1.
    """
    bucket = _int64(name_hash(p, size) & _uint64(mask))
    while True:
        number = i64_at(table, 3 * bucket + 2)
        if number == 0:
            return -1
        if i64_at(table, 3 * bucket + 1) == size and same_bytes(p, i64_at(table, 3 * bucket), size):
            return number - 1
        bucket = (bucket + 1) & mask
