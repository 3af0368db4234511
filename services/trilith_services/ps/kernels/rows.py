"""Kernels that read and write rows: lookup, apply, assign and their kin.

All of them walk a batch grouped by stripe in groups of `GROUP` ids and three passes: request the index lines; probe,
and request the rows' lines; then do the work. Those that may add rows return the position in the batch where the index
has to grow first, or -1 when done; the caller grows that stripe and calls again with `begin` at that position.

A table's constants travel as `plan` (int64, columns below) and `segments` (int64[k, columns below]).
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
from trilith_services.ps.kernels.codecs import decode_weights, encode_weights, one_bit_gradient, read_weights
from trilith_services.ps.kernels.index import (
    ARENA,
    GROUP,
    I64,
    INDEX,
    LIMIT,
    MASK,
    SIZE,
    U64,
    Matrix,
    claim_row,
    find_slot,
    pack_slot,
    prefetch_slot,
    row_number,
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
PLAN_COLUMNS = 9

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

_BATCH = "int64[::1], uint64[::1], uint64[::1], int64[::1]"  # starts, hashes, grouped, positions


@inlined
def id_stream(seed: Any, key: Any) -> Any:
    """The random stream of one row: a pure function of table seed and id."""
    return mix64(np.uint64(seed) ^ mix64(key))


@inlined
def init_row(plan: I64, row: Any, key: Any) -> Any:
    """Give a new row its initial weights and state."""
    copy_floats(row, plan[IMAGE], plan[WORDS])
    random = plan[RANDOM]
    if random != 0:
        dim = plan[DIM]
        stream = id_stream(plan[SEED], key)
        for d in range(dim):
            value = load_f32(row, d) + load_f32(random, d) * uniform01(stream, np.uint64(d))
            store_f32(row, d, min(value, load_f32(random, dim + d)))


@inlined
def prefetch_row(row: Any, size: Any) -> Any:
    """Request the lines of `size` bytes at `row`, up to eight; the hardware follows a longer stream by itself."""
    for offset in range(0, min(size, 512), 64):
        prefetch(row + offset)


@inlined
def read_row(plan: I64, segments: Matrix, row: Any, target: Any) -> Any:
    """Write what a lookup sees of a row, float32[dim], to address `target`."""
    if plan[CODED] == 0:
        copy_floats(target, row, plan[DIM])
        return
    for k in range(segments.shape[0]):
        offset = 4 * segments[k, SEG_WEIGHT]
        if plan[SERVING] != 0:
            decode_weights(
                segments[k, SEG_CODEC],
                segments[k, SEG_CODEC_PARAMS],
                target + offset,
                row + segments[k, SEG_STORED],
                segments[k, SEG_DIM],
            )
        else:
            read_weights(
                segments[k, SEG_CODEC],
                segments[k, SEG_CODEC_PARAMS],
                target + offset,
                row + offset,
                segments[k, SEG_DIM],
            )


@inlined
def store_row(plan: I64, segments: Matrix, row: Any, source: Any) -> Any:
    """Store raw weights float32[dim] from address `source` into a row."""
    if plan[SERVING] == 0:
        copy_floats(row, source, plan[DIM])
        return
    for k in range(segments.shape[0]):
        encode_weights(
            segments[k, SEG_CODEC],
            segments[k, SEG_CODEC_PARAMS],
            row + segments[k, SEG_STORED],
            source + 4 * segments[k, SEG_WEIGHT],
            segments[k, SEG_DIM],
        )


@inlined
def probe_group(
    stripes: Matrix, s: Any, plan: I64, grouped: U64, hashes: U64, first: Any, count: Any, rows: Any
) -> Any:
    """Find the rows of grouped[first:first + count] and request their weights: rows[t] is an address, 0 if missing."""
    index = stripes[s, INDEX]
    mask = stripes[s, MASK]
    arena = stripes[s, ARENA] - plan[STRIDE]
    size = 4 * plan[DIM]
    for t in range(count):
        prefetch_slot(index, mask, hashes[first + t])
    for t in range(count):
        slot = find_slot(index, mask, grouped[first + t], hashes[first + t])
        number = row_number(load_u64(index, 2 * slot + 1))
        row = np.int64(0)
        if number != 0:
            row = arena + number * plan[STRIDE]
            prefetch_row(row, size)
        rows[t] = row


@kernel(f"int64(int64[:, ::1], int64, int64, {_BATCH}, int64[::1], int64[:, ::1], int64)")
def lookup_rows(
    stripes: Matrix,
    first: int,
    last: int,
    starts: I64,
    hashes: U64,
    grouped: U64,
    positions: I64,
    plan: I64,
    segments: Matrix,
    out: int,
) -> int:
    """Read rows; zeros for an id without one.

    Args:
        stripes: int64[S, COLUMNS].
        first: First stripe.
        last: One past the last stripe.
        starts: int64[S + 1], from `group_by_stripe`, as are the next three.
        hashes: uint64[n].
        grouped: uint64[n].
        positions: int64[n].
        plan: int64[PLAN_COLUMNS].
        segments: int64[k, SEGMENT_COLUMNS].
        out: Address of float32[n, dim], written at the batch's positions.

    Returns:
        How many ids had a row.
    """
    rows = np.empty(GROUP, np.int64)
    dim = plan[DIM]
    hits = 0
    for s in range(first, last):
        end = starts[s + 1]
        for j0 in range(starts[s], end, GROUP):
            count = min(GROUP, end - j0)
            probe_group(stripes, s, plan, grouped, hashes, j0, count, rows)
            for t in range(count):
                target = out + 4 * dim * positions[j0 + t]
                if rows[t] != 0:
                    read_row(plan, segments, rows[t], target)
                    hits += 1
                else:
                    for d in range(dim):
                        store_f32(target, d, np.float32(0))
    return hits


@kernel(f"int64(int64[:, ::1], int64, int64, {_BATCH}, int64[::1], int64[:, ::1], int64)")
def lookup_rows_half(
    stripes: Matrix,
    first: int,
    last: int,
    starts: I64,
    hashes: U64,
    grouped: U64,
    positions: I64,
    plan: I64,
    segments: Matrix,
    out: int,
) -> int:
    """Read rows as float16, rounded to nearest even; zeros for an id without a row.

    Args:
        stripes: int64[S, COLUMNS].
        first: First stripe.
        last: One past the last stripe.
        starts: int64[S + 1], from `group_by_stripe`, as are the next three.
        hashes: uint64[n].
        grouped: uint64[n].
        positions: int64[n].
        plan: int64[PLAN_COLUMNS].
        segments: int64[k, SEGMENT_COLUMNS].
        out: Address of float16[n, dim], written at the batch's positions.

    Returns:
        How many ids had a row.
    """
    rows = np.empty(GROUP, np.int64)
    dim = plan[DIM]
    scratch = np.empty(dim, np.float32)
    hits = 0
    for s in range(first, last):
        end = starts[s + 1]
        for j0 in range(starts[s], end, GROUP):
            count = min(GROUP, end - j0)
            probe_group(stripes, s, plan, grouped, hashes, j0, count, rows)
            for t in range(count):
                target = out + 2 * dim * positions[j0 + t]
                if rows[t] != 0:
                    read_row(plan, segments, rows[t], scratch.ctypes.data)
                    for d in range(dim):
                        store_f16(target, d, scratch[d])
                    hits += 1
                else:
                    for d in range(dim):
                        store_f16(target, d, np.float32(0))
    return hits


@kernel(
    f"int64(int64[:, ::1], int64, int64, int64, {_BATCH}, int64[::1], int64[:, ::1], "
    "int64, int64, int64, int64, int64, int64)"
)
def write_rows(
    stripes: Matrix,
    first: int,
    last: int,
    begin: int,
    starts: I64,
    hashes: U64,
    grouped: U64,
    positions: I64,
    plan: I64,
    segments: Matrix,
    mode: int,
    values: int,
    states: int,
    times: int,
    time: int,
    existed: int,
) -> int:
    """Assign, add to, import or reset rows, creating those that are missing.

    Args:
        stripes: int64[S, COLUMNS], written.
        first: First stripe.
        last: One past the last stripe.
        begin: Position in the grouped batch to start from.
        starts: int64[S + 1], from `group_by_stripe`, as are the next three.
        hashes: uint64[n].
        grouped: uint64[n].
        positions: int64[n].
        plan: int64[PLAN_COLUMNS].
        segments: int64[k, SEGMENT_COLUMNS].
        mode: ASSIGN, ADD, IMPORT or RESET.
        values: Address of float32[n, dim] weights; not read by RESET.
        states: Address of float32[n, state] for IMPORT.
        times: Address of uint32[n] for IMPORT.
        time: Unix seconds for the other modes.
        existed: Address of uint8[n], written: 1 where there was a row; 0 to leave out.

    Returns:
        -1, or the position before which the stripe has to grow.
    """
    dim = plan[DIM]
    stride = plan[STRIDE]
    scratch = np.empty(dim, np.float32)
    for s in range(first, last):
        for j in range(max(starts[s], begin), starts[s + 1]):
            index = stripes[s, INDEX]
            key = grouped[j]
            i = positions[j]
            at = np.int64(load_u32(times, i)) if mode == IMPORT else time
            slot = find_slot(index, stripes[s, MASK], key, hashes[j])
            number = row_number(load_u64(index, 2 * slot + 1))
            had = np.int8(1)
            if number != 0:
                row = stripes[s, ARENA] + (number - 1) * stride
                store_u64(index, 2 * slot + 1, pack_slot(number, at))
                if mode == RESET:
                    init_row(plan, row, key)
            else:
                if stripes[s, SIZE] >= stripes[s, LIMIT]:
                    return j
                had = np.int8(0)
                row = claim_row(stripes, s, stride, slot, key, at)
                init_row(plan, row, key)
            if existed != 0:
                store_i8(existed, i, had)
            source = values + 4 * dim * i
            if mode == ADD:
                if plan[SERVING] == 0:
                    for d in range(dim):
                        store_f32(row, d, load_f32(row, d) + load_f32(source, d))
                else:
                    read_row(plan, segments, row, scratch.ctypes.data)
                    for d in range(dim):
                        scratch[d] += load_f32(source, d)
                    store_row(plan, segments, row, scratch.ctypes.data)
            elif mode != RESET:
                store_row(plan, segments, row, source)
                if mode == IMPORT:
                    copy_floats(row + 4 * dim, states + 4 * plan[STATE] * i, plan[STATE])
    return -1


@kernel("void(int64[::1], int64[:, ::1], int64[::1], int64, int64, int64)")
def export_rows(plan: I64, segments: Matrix, rows: I64, count: int, weights: int, states: int) -> None:
    """Copy rows out: raw weights (decoded from a serving table) and optimizer state.

    Args:
        plan: int64[PLAN_COLUMNS].
        segments: int64[k, SEGMENT_COLUMNS].
        rows: int64[>= count], addresses of rows.
        count: How many.
        weights: Address of float32[count, dim], written.
        states: Address of float32[count, state], written.
    """
    dim = plan[DIM]
    state = plan[STATE]
    for i in range(count):
        if i + 8 < count:
            prefetch_row(rows[i + 8], plan[STRIDE])
        if plan[SERVING] != 0:
            read_row(plan, segments, rows[i], weights + 4 * dim * i)
        else:
            copy_floats(weights + 4 * dim * i, rows[i], dim)
            copy_floats(states + 4 * state * i, rows[i] + 4 * dim, state)


@kernel("void(int64[::1], int64[:, ::1], int64, int64)")
def encode_row(plan: I64, segments: Matrix, row: int, source: int) -> None:
    """Store weights into a row as its table does.

    Args:
        plan: int64[PLAN_COLUMNS].
        segments: int64[k, SEGMENT_COLUMNS].
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
    def step_segment(row: Any, grad: Any, segments: Matrix, rates: Any, step: Any, stream: Any, scratch: Any) -> Any:
        dim = segments[k, SEG_DIM]
        w = row + 4 * segments[k, SEG_WEIGHT]
        g = grad + 4 * segments[k, SEG_WEIGHT]
        if one_bit:
            one_bit_gradient(segments[k, SEG_CODEC_PARAMS], scratch, w, g, dim)
            g = scratch
        # A rounding optimizer's inner step always sees step 0, as upstream.
        inner = np.int64(0) if stochastic else step
        advance(w, row + segments[k, SEG_STATE], g, dim, segments[k, SEG_PARAMS], load_f32(rates, k), inner)
        if stochastic:
            round_to_half(w, dim, stream + np.uint64(k), step)

    return step_segment


def _chain(first: Callable[..., Any], rest: Callable[..., Any]) -> Callable[..., Any]:
    @inlined
    def step_both(row: Any, grad: Any, segments: Matrix, rates: Any, step: Any, stream: Any, scratch: Any) -> Any:
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
    signature = (
        f"int64(int64[:, ::1], int64, int64, int64, {_BATCH}, int64[::1], int64[:, ::1], int64, int64, int64, int64)"
    )

    @kernel(signature, variant=repr(structure))
    def apply_rows(
        stripes: Matrix,
        first: int,
        last: int,
        begin: int,
        starts: I64,
        hashes: U64,
        grouped: U64,
        positions: I64,
        plan: I64,
        segments: Matrix,
        grads: int,
        rates: int,
        step: int,
        time: int,
    ) -> int:
        """Take one optimizer step per id occurrence, creating missing rows.

        Args:
            stripes: int64[S, COLUMNS], written.
            first: First stripe.
            last: One past the last stripe.
            begin: Position in the grouped batch to start from.
            starts: int64[S + 1], from `group_by_stripe`, as are the next three.
            hashes: uint64[n].
            grouped: uint64[n].
            positions: int64[n].
            plan: int64[PLAN_COLUMNS].
            segments: int64[k, SEGMENT_COLUMNS].
            grads: Address of float32[n, dim].
            rates: Address of float32[k] learning rates.
            step: Global step.
            time: Unix seconds, the rows' new last update.

        Returns:
            -1, or the position before which the stripe has to grow.
        """
        rows = np.empty(GROUP, np.int64)
        scratch_memory = np.empty(plan[DIM], np.float32)
        scratch = scratch_memory.ctypes.data
        stride = plan[STRIDE]
        size = 4 * plan[WORDS]
        dim = plan[DIM]
        for s in range(first, last):
            end = starts[s + 1]
            j0 = max(starts[s], begin)
            while j0 < end:
                count = min(GROUP, end - j0)
                index = stripes[s, INDEX]
                mask = stripes[s, MASK]
                for t in range(count):
                    prefetch_slot(index, mask, hashes[j0 + t])
                ready = count
                for t in range(count):
                    key = grouped[j0 + t]
                    slot = find_slot(index, mask, key, hashes[j0 + t])
                    number = row_number(load_u64(index, 2 * slot + 1))
                    if number != 0:
                        row = stripes[s, ARENA] + (number - 1) * stride
                        prefetch_row(row, size)
                        store_u64(index, 2 * slot + 1, pack_slot(number, time))
                    elif stripes[s, SIZE] >= stripes[s, LIMIT]:
                        ready = t
                        break
                    else:
                        row = claim_row(stripes, s, stride, slot, key, time)
                        init_row(plan, row, key)
                    rows[t] = row
                for t in range(ready):
                    stream = np.uint64(0)
                    if rounding:
                        stream = id_stream(plan[SEED], grouped[j0 + t])
                    step_row(rows[t], grads + 4 * dim * positions[j0 + t], segments, rates, step, stream, scratch)
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
