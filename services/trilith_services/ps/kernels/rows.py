"""Kernels that read and write rows: lookup, apply, assign and their kin.

Lookups walk a batch in its own order, writes one grouped by stripe, both in groups of a few dozen ids and three passes:
request the index lines; probe, and request the rows' lines; then do the work. Kernels that may add rows return the
position in the batch where the index has to grow first, or -1 when done; the caller grows that stripe and calls again
with `begin` at that position.

A table's constants travel as `plan` (int64, columns below) and `segments` (int64[k, columns below]). Everything is
passed by address: an array handed to an inlined helper leaves atomic reference counting in the loop (measured: 190
instead of 20 ns per id).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from trilith.ops.hashing import mix64, uniform01
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import (
    copy_floats,
    copy_half_line,
    copy_line,
    load_f16,
    load_f32,
    load_u32,
    load_u64,
    prefetch,
    store_f16,
    store_f32,
    store_i8,
    store_u64,
)
from trilith.ops.slots import probe_line
from trilith_services.ps.kernels.codecs import decode_weights, encode_weights, one_bit_gradient, read_weights
from trilith_services.ps.kernels.index import (
    ARENA,
    COLUMNS,
    GROUP,
    INDEX,
    LIMIT,
    MASK,
    READ_GROUP,
    SIZE,
    claim_row,
    find_slot,
    get,
    home_of,
    pack_slot,
    prefetch_slot,
    put,
    row_number,
    stripe_of,
)
from trilith_services.ps.kernels.optimizers import STEPS, round_to_half

# plan
STRIDE = 0  # bytes from row to row
WORDS = 1  # 4-byte words in use per row
DIM = 2  # weights per row
STATE = 3  # float32 words of optimizer state per row; they follow the weights
IMAGE = 4  # address of a fresh row
RANDOM = 5  # address of float32[2, dim] spans and upper bounds of uniform columns, 0 if there are none
SEED = 6  # mixed table seed, bit-cast
CODED = 7  # whether lookup goes through codecs
SERVING = 8  # whether rows are stored compressed
SEGMENTS = 9  # how many segments
READ_WORDS = 10  # 4-byte words at the start of a row that a lookup reads
PLAN_COLUMNS = 11

# segments
SEG_DIM = 0
SEG_WEIGHT = 1  # first weight
SEG_STATE = 2  # byte offset of the state in the row
SEG_PARAMS = 3  # address of the optimizer's parameters
SEG_CODEC = 4
SEG_STORED = 5  # byte offset of the compressed weights in a serving row
SEG_CODEC_PARAMS = 6
SEGMENT_COLUMNS = 7

# modes of write_rows
ASSIGN = 0
ADD = 1
IMPORT = 2
RESET = 3

_BATCH = "int64, int64, int64, int64"  # starts, hashes, grouped, positions


def work_bytes(dim: int) -> int:
    """Scratch memory that the kernels below need: `probe_group` has int64[3, READ_GROUP], then float32[dim]."""
    return 24 * READ_GROUP + 4 * dim


@inlined
def id_stream(seed: Any, key: Any) -> Any:
    """The random stream of one row: a pure function of table seed and id."""
    return mix64(np.uint64(seed) ^ mix64(key))


@inlined
def init_row(plan: int, row: Any, key: Any) -> Any:
    """Give a new row its initial weights and state."""
    copy_floats(row, get(plan, IMAGE), get(plan, WORDS))
    random = get(plan, RANDOM)
    if random != 0:
        dim = get(plan, DIM)
        stream = id_stream(get(plan, SEED), key)
        for d in range(dim):
            value = load_f32(row, d) + load_f32(random, d) * uniform01(stream, np.uint64(d))
            store_f32(row, d, min(value, load_f32(random, dim + d)))


@inlined
def prefetch_row(row: Any, size: Any) -> Any:
    """Request the lines of `size` bytes at `row`, up to eight; the hardware follows a longer stream by itself."""
    prefetch(row)
    offset = np.int64(64)
    while offset < size and offset < 512:
        prefetch(row + offset)
        offset += 64


@inlined
def zero_floats(target: Any, count: Any) -> Any:
    """Write `count` float32 zeros."""
    for d in range(count):
        store_f32(target, d, np.float32(0))


@inlined
def copy_rows(target: Any, rows: Any, count: Any, dim: Any) -> Any:
    """Copy the weights of rows at int64[count] addresses, zeros for address 0; returns how many rows there were."""
    found = 0
    for t in range(count):
        found += get(rows, t) != 0
    if found == count and dim == 8:
        for t in range(count):
            copy_half_line(target + 32 * t, get(rows, t))
    elif found == count and dim == 16:
        for t in range(count):
            copy_line(target + 64 * t, get(rows, t))
    else:
        for t in range(count):
            if get(rows, t) != 0:
                copy_floats(target + 4 * dim * t, get(rows, t), dim)
            else:
                zero_floats(target + 4 * dim * t, dim)
    return found


@inlined
def read_row(plan: int, segments: int, row: Any, target: Any) -> Any:
    """Write what a lookup sees of a row, float32[dim], to address `target`."""
    if get(plan, CODED) == 0:
        copy_floats(target, row, get(plan, DIM))
        return
    for k in range(get(plan, SEGMENTS)):
        offset = 4 * get(segments, k * SEGMENT_COLUMNS + SEG_WEIGHT)
        if get(plan, SERVING) != 0:
            decode_weights(
                get(segments, k * SEGMENT_COLUMNS + SEG_CODEC),
                get(segments, k * SEGMENT_COLUMNS + SEG_CODEC_PARAMS),
                target + offset,
                row + get(segments, k * SEGMENT_COLUMNS + SEG_STORED),
                get(segments, k * SEGMENT_COLUMNS + SEG_DIM),
            )
        else:
            read_weights(
                get(segments, k * SEGMENT_COLUMNS + SEG_CODEC),
                get(segments, k * SEGMENT_COLUMNS + SEG_CODEC_PARAMS),
                target + offset,
                row + offset,
                get(segments, k * SEGMENT_COLUMNS + SEG_DIM),
            )


@inlined
def store_row(plan: int, segments: int, row: Any, source: Any) -> Any:
    """Store raw weights float32[dim] from address `source` into a row."""
    if get(plan, SERVING) == 0:
        copy_floats(row, source, get(plan, DIM))
        return
    for k in range(get(plan, SEGMENTS)):
        encode_weights(
            get(segments, k * SEGMENT_COLUMNS + SEG_CODEC),
            get(segments, k * SEGMENT_COLUMNS + SEG_CODEC_PARAMS),
            row + get(segments, k * SEGMENT_COLUMNS + SEG_STORED),
            source + 4 * get(segments, k * SEGMENT_COLUMNS + SEG_WEIGHT),
            get(segments, k * SEGMENT_COLUMNS + SEG_DIM),
        )


@inlined
def _request_row(stripes: Any, s: Any, word: Any, stride: Any, size: Any) -> Any:
    """Address of the row that a slot's word names, with `size` bytes of it requested; 0 for an empty slot."""
    number = row_number(word)
    if number == 0:
        return np.int64(0)
    row = get(stripes, s * COLUMNS + ARENA) + (number - 1) * stride
    prefetch_row(row, size)
    return row


@inlined
def probe_group(stripes: Any, bits: Any, ids: Any, count: Any, stride: Any, size: Any, rows: Any) -> Any:
    """Find the rows of ids[:count] and request `size` bytes of each: rows[t] is an address, 0 if there is none.

    The batch is walked in its own order: grouping it by stripe would scatter the writes to the output, which costs more
    than the stripes' locality wins (measured). An id that its line has no room for (one of fourteen in a full index)
    waits until the others are found: the line after it is on its way meanwhile.
    """
    lines = rows + 8 * READ_GROUP
    spilled = rows + 16 * READ_GROUP
    for t in range(count):
        value = mix64(load_u64(ids, t))
        s = stripe_of(value, bits)
        line = get(stripes, s * COLUMNS + INDEX) + 16 * home_of(value, get(stripes, s * COLUMNS + MASK))
        prefetch(line)
        put(lines, t, line)
        put(rows, t, s)
    waiting = 0
    for t in range(count):
        line = get(lines, t)
        slot = probe_line(line, load_u64(ids, t))
        if slot >= 0:
            put(rows, t, _request_row(stripes, get(rows, t), load_u64(line, 2 * slot + 1), stride, size))
        else:
            prefetch(line + 64)
            put(spilled, waiting, t)
            waiting += 1
    for w in range(waiting):
        t = get(spilled, w)
        s = get(rows, t)
        key = load_u64(ids, t)
        index = get(stripes, s * COLUMNS + INDEX)
        slot = find_slot(index, get(stripes, s * COLUMNS + MASK), key, mix64(key))
        put(rows, t, _request_row(stripes, s, load_u64(index, 2 * slot + 1), stride, size))


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def lookup_rows(stripes: int, bits: int, ids: int, n: int, plan: int, segments: int, work: int, out: int) -> int:
    """Read rows; zeros for an id without one.

    Args:
        stripes: Address of int64[S, COLUMNS].
        bits: log2 of S.
        ids: Address of uint64[n].
        n: Number of ids.
        plan: Address of int64[PLAN_COLUMNS].
        segments: Address of int64[k, SEGMENT_COLUMNS].
        work: Address of scratch memory, see `work_bytes`.
        out: Address of float32[n, dim], written.

    Returns:
        How many ids had a row.
    """
    dim = get(plan, DIM)
    stride = get(plan, STRIDE)
    coded = get(plan, CODED) != 0
    size = 4 * get(plan, READ_WORDS)
    hits = 0
    for first in range(0, n, READ_GROUP):
        count = min(READ_GROUP, n - first)
        probe_group(stripes, bits, ids + 8 * first, count, stride, size, work)
        target = out + 4 * dim * first
        # Loops of their own, so that the plain ones have all registers and no branch for each row.
        if coded:
            for t in range(count):
                row = get(work, t)
                if row != 0:
                    hits += 1
                    read_row(plan, segments, row, target + 4 * dim * t)
                else:
                    zero_floats(target + 4 * dim * t, dim)
        else:
            hits += copy_rows(target, work, count, dim)
    return hits


@kernel("int64(int64, int64, int64, int64, int64, int64, int64, int64)")
def lookup_rows_half(stripes: int, bits: int, ids: int, n: int, plan: int, segments: int, work: int, out: int) -> int:
    """Read rows as float16, rounded to nearest even; zeros for an id without one.

    Args:
        stripes: Address of int64[S, COLUMNS].
        bits: log2 of S.
        ids: Address of uint64[n].
        n: Number of ids.
        plan: Address of int64[PLAN_COLUMNS].
        segments: Address of int64[k, SEGMENT_COLUMNS].
        work: Address of scratch memory, see `work_bytes`.
        out: Address of float16[n, dim], written.

    Returns:
        How many ids had a row.
    """
    dim = get(plan, DIM)
    stride = get(plan, STRIDE)
    scratch = work + 24 * READ_GROUP
    size = 4 * get(plan, READ_WORDS)
    hits = 0
    for first in range(0, n, READ_GROUP):
        count = min(READ_GROUP, n - first)
        probe_group(stripes, bits, ids + 8 * first, count, stride, size, work)
        for t in range(count):
            row = get(work, t)
            target = out + 2 * dim * (first + t)
            if row == 0:
                for d in range(dim):
                    store_f16(target, d, np.float32(0))
            else:
                hits += 1
                read_row(plan, segments, row, scratch)
                for d in range(dim):
                    store_f16(target, d, load_f32(scratch, d))
    return hits


@kernel(f"int64(int64, int64, int64, int64, {_BATCH}, int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def write_rows(
    stripes: int,
    first: int,
    last: int,
    begin: int,
    starts: int,
    hashes: int,
    grouped: int,
    positions: int,
    plan: int,
    segments: int,
    work: int,
    mode: int,
    values: int,
    states: int,
    times: int,
    time: int,
    existed: int,
) -> int:
    """Assign, add to, import or reset rows, creating those that are missing.

    Args:
        stripes: Address of int64[S, COLUMNS], written.
        first: First stripe.
        last: One past the last stripe.
        begin: Position in the grouped batch to start from.
        starts: Address of int64[S + 1], from `group_by_stripe`, as are the next three.
        hashes: Address of uint64[n].
        grouped: Address of uint64[n].
        positions: Address of int64[n].
        plan: Address of int64[PLAN_COLUMNS].
        segments: Address of int64[k, SEGMENT_COLUMNS].
        work: Address of scratch memory, see `work_bytes`.
        mode: ASSIGN, ADD, IMPORT or RESET.
        values: Address of float32[n, dim] weights; not read by RESET.
        states: Address of float32[n, state] for IMPORT.
        times: Address of uint32[n] for IMPORT.
        time: Unix seconds for the other modes.
        existed: Address of uint8[n], written: 1 where there was a row; 0 to leave out.

    Returns:
        -1, or the position before which the stripe has to grow.
    """
    dim = get(plan, DIM)
    stride = get(plan, STRIDE)
    scratch = work + 24 * READ_GROUP
    for s in range(first, last):
        for j in range(max(get(starts, s), begin), get(starts, s + 1)):
            index = get(stripes, s * COLUMNS + INDEX)
            key = load_u64(grouped, j)
            i = get(positions, j)
            at = np.int64(load_u32(times, i)) if mode == IMPORT else time
            slot = find_slot(index, get(stripes, s * COLUMNS + MASK), key, load_u64(hashes, j))
            number = row_number(load_u64(index, 2 * slot + 1))
            had = np.int8(1)
            if number != 0:
                row = get(stripes, s * COLUMNS + ARENA) + (number - 1) * stride
                store_u64(index, 2 * slot + 1, pack_slot(number, at))
                if mode == RESET:
                    init_row(plan, row, key)
            else:
                if get(stripes, s * COLUMNS + SIZE) >= get(stripes, s * COLUMNS + LIMIT):
                    return j
                had = np.int8(0)
                row = claim_row(stripes, s, stride, slot, key, at)
                init_row(plan, row, key)
            if existed != 0:
                store_i8(existed, i, had)
            source = values + 4 * dim * i
            if mode == ADD:
                if get(plan, SERVING) == 0:
                    for d in range(dim):
                        store_f32(row, d, load_f32(row, d) + load_f32(source, d))
                else:
                    read_row(plan, segments, row, scratch)
                    for d in range(dim):
                        store_f32(scratch, d, load_f32(scratch, d) + load_f32(source, d))
                    store_row(plan, segments, row, scratch)
            elif mode != RESET:
                store_row(plan, segments, row, source)
                if mode == IMPORT:
                    copy_floats(row + 4 * dim, states + 4 * get(plan, STATE) * i, get(plan, STATE))
    return -1


@kernel("void(int64, int64, int64, int64, int64, int64)")
def export_rows(plan: int, segments: int, rows: int, count: int, weights: int, states: int) -> None:
    """Copy rows out: raw weights (decoded from a serving table) and optimizer state.

    Args:
        plan: Address of int64[PLAN_COLUMNS].
        segments: Address of int64[k, SEGMENT_COLUMNS].
        rows: Address of int64[count] addresses of rows.
        count: How many.
        weights: Address of float32[count, dim], written.
        states: Address of float32[count, state], written.
    """
    dim = get(plan, DIM)
    state = get(plan, STATE)
    for i in range(count):
        if i + 8 < count:
            prefetch_row(get(rows, i + 8), get(plan, STRIDE))
        if get(plan, SERVING) != 0:
            read_row(plan, segments, get(rows, i), weights + 4 * dim * i)
        else:
            copy_floats(weights + 4 * dim * i, get(rows, i), dim)
            copy_floats(states + 4 * state * i, get(rows, i) + 4 * dim, state)


@kernel("void(int64, int64, int64, int64)")
def encode_row(plan: int, segments: int, row: int, source: int) -> None:
    """Store weights into a row as its table does.

    Args:
        plan: Address of int64[PLAN_COLUMNS].
        segments: Address of int64[k, SEGMENT_COLUMNS].
        row: Address of the row, written.
        source: Address of float32[dim].
    """
    store_row(plan, segments, row, source)


Structure: TypeAlias = tuple[tuple[str, bool, bool], ...]
"""What an apply kernel is compiled for: per segment optimizer kind, stochastic rounding, one-bit gradient."""


def _segment_step(k: int, kind: str, stochastic: bool, one_bit: bool) -> Callable[..., Any]:
    """The step of segment k: gradient through its reader, optimizer, rounding."""
    advance = STEPS[kind]

    @inlined
    def step_segment(row: Any, grad: Any, segments: int, rates: Any, step: Any, stream: Any, scratch: Any) -> Any:
        dim = get(segments, k * SEGMENT_COLUMNS + SEG_DIM)
        w = row + 4 * get(segments, k * SEGMENT_COLUMNS + SEG_WEIGHT)
        g = grad + 4 * get(segments, k * SEGMENT_COLUMNS + SEG_WEIGHT)
        if one_bit:
            one_bit_gradient(get(segments, k * SEGMENT_COLUMNS + SEG_CODEC_PARAMS), scratch, w, g, dim)
            g = scratch
        # A rounding optimizer's inner step always sees step 0, as upstream.
        inner = np.int64(0) if stochastic else step
        advance(
            w,
            row + get(segments, k * SEGMENT_COLUMNS + SEG_STATE),
            g,
            dim,
            get(segments, k * SEGMENT_COLUMNS + SEG_PARAMS),
            load_f32(rates, k),
            inner,
        )
        if stochastic:
            round_to_half(w, dim, stream + np.uint64(k), step)

    return step_segment


def _chain(first: Callable[..., Any], rest: Callable[..., Any]) -> Callable[..., Any]:
    @inlined
    def step_both(row: Any, grad: Any, segments: int, rates: Any, step: Any, stream: Any, scratch: Any) -> Any:
        first(row, grad, segments, rates, step, stream, scratch)
        rest(row, grad, segments, rates, step, stream, scratch)

    return step_both


@functools.cache
def make_apply(structure: Structure) -> Callable[..., Any]:
    """The apply kernel for one structure; tables that share it share the compilation.

    The optimizers are compiled in, the widths are not: a loop of constant width is unrolled into scalar code before
    LLVM vectorises, one of run-time width is not.
    """
    steps = [_segment_step(k, *segment) for k, segment in enumerate(structure)]
    step_row = functools.reduce(lambda rest, first: _chain(first, rest), reversed(steps[:-1]), steps[-1])
    rounding = any(stochastic for _, stochastic, _ in structure)
    signature = f"int64(int64, int64, int64, int64, {_BATCH}, int64, int64, int64, int64, int64, int64, int64)"

    @kernel(signature, variant=repr(structure))
    def apply_rows(
        stripes: int,
        first: int,
        last: int,
        begin: int,
        starts: int,
        hashes: int,
        grouped: int,
        positions: int,
        plan: int,
        segments: int,
        work: int,
        grads: int,
        rates: int,
        step: int,
        time: int,
    ) -> int:
        """Take one optimizer step per id occurrence, creating missing rows.

        Args:
            stripes: Address of int64[S, COLUMNS], written.
            first: First stripe.
            last: One past the last stripe.
            begin: Position in the grouped batch to start from.
            starts: Address of int64[S + 1], from `group_by_stripe`, as are the next three.
            hashes: Address of uint64[n].
            grouped: Address of uint64[n].
            positions: Address of int64[n].
            plan: Address of int64[PLAN_COLUMNS].
            segments: Address of int64[k, SEGMENT_COLUMNS].
            work: Address of scratch memory, see `work_bytes`.
            grads: Address of float32[n, dim].
            rates: Address of float32[k] learning rates.
            step: Global step.
            time: Unix seconds, the rows' new last update.

        Returns:
            -1, or the position before which the stripe has to grow.
        """
        scratch = work + 24 * READ_GROUP
        stride = get(plan, STRIDE)
        size = 4 * get(plan, WORDS)
        dim = get(plan, DIM)
        seed = get(plan, SEED)
        for s in range(first, last):
            index = get(stripes, s * COLUMNS + INDEX)
            mask = get(stripes, s * COLUMNS + MASK)
            arena = get(stripes, s * COLUMNS + ARENA)
            end = get(starts, s + 1)
            j0 = max(get(starts, s), begin)
            while j0 < end:
                count = min(GROUP, end - j0)
                for t in range(count):
                    prefetch_slot(index, mask, load_u64(hashes, j0 + t))
                    prefetch_row(grads + 4 * dim * get(positions, j0 + t), 4 * dim + 63)
                ready = count
                for t in range(count):
                    key = load_u64(grouped, j0 + t)
                    slot = find_slot(index, mask, key, load_u64(hashes, j0 + t))
                    number = row_number(load_u64(index, 2 * slot + 1))
                    if number != 0:
                        row = arena + (number - 1) * stride
                        prefetch_row(row, size)
                        store_u64(index, 2 * slot + 1, pack_slot(number, time))
                    elif get(stripes, s * COLUMNS + SIZE) >= get(stripes, s * COLUMNS + LIMIT):
                        ready = t
                        break
                    else:
                        row = claim_row(stripes, s, stride, slot, key, time)
                        init_row(plan, row, key)
                    put(work, t, row)
                for t in range(ready):
                    stream = np.uint64(0)
                    if rounding:
                        stream = id_stream(seed, load_u64(grouped, j0 + t))
                    gradient = grads + 4 * dim * get(positions, j0 + t)
                    step_row(get(work, t), gradient, segments, rates, step, stream, scratch)
                if ready < count:
                    return int(j0 + ready)
                j0 += count
        return -1

    return apply_rows


@functools.cache
def make_dense_step(kind: str) -> Callable[..., Any]:
    """The kernel that steps one dense partition as a single row."""
    advance = STEPS[kind]

    @kernel("void(int64, int64, int64, int64, int64, float32, int64)", variant=kind)
    def step_dense(weights: int, state: int, grads: int, size: int, params: int, rate: np.float32, step: int) -> None:
        """Take one optimizer step.

        Args:
            weights: Address of float32[size], written.
            state: Address of the optimizer's state, written.
            grads: Address of float32[size].
            size: Number of weights.
            params: Address of the optimizer's parameters.
            rate: Learning rate.
            step: Global step.
        """
        advance(weights, state, grads, size, params, rate, step)

    return step_dense


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
