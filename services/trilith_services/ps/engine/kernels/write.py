"""Kernels that write rows: assign, add, import, reset.

A batch comes grouped by stripe. Kernels that may add rows return the position in the batch where the index has to grow
first, or -1 when done; the caller grows that stripe and calls again with `begin` at that position.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trilith.ops.hashing import mix64, uniform01, unmix64
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import copy_floats, load_f32, load_u32, load_u64, store_f32, store_i8, store_u32
from trilith_services.ps.engine.kernels.codecs import encode_weights
from trilith_services.ps.engine.kernels.index import (
    claim_row,
    find_row,
    get,
    is_full,
    row_at,
    state_at,
    stripe_at,
    time_at,
)
from trilith_services.ps.engine.kernels.plan import (
    DIM,
    IMAGE,
    RANDOM,
    SEED,
    SEG_CODEC,
    SEG_CODEC_PARAMS,
    SEG_DIM,
    SEG_STORED,
    SEG_WEIGHT,
    SEGMENT_COLUMNS,
    SEGMENTS,
    SERVING,
    STATE,
    WORDS,
)
from trilith_services.ps.engine.kernels.read import SCRATCH, read_row

# modes of write_rows
ASSIGN = 0
ADD = 1
IMPORT = 2
RESET = 3


@inlined
def id_stream(seed: Any, key: Any) -> Any:
    """The random stream of one row: a pure function of table seed and id."""
    return mix64(np.uint64(seed) ^ mix64(key))


@inlined
def init_row(plan: int, row: Any, state: Any, key: Any) -> Any:
    """Give a new row its initial weights and state."""
    words = get(plan, WORDS)
    copy_floats(row, get(plan, IMAGE), words)
    copy_floats(state, get(plan, IMAGE) + 4 * words, get(plan, STATE))
    random = get(plan, RANDOM)
    if random != 0:
        dim = get(plan, DIM)
        stream = id_stream(get(plan, SEED), key)
        for d in range(dim):
            value = load_f32(row, d) + load_f32(random, d) * uniform01(stream, np.uint64(d))
            store_f32(row, d, min(value, load_f32(random, dim + d)))


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


@kernel(f"int64({', '.join(['int64'] * 16)})")
def write_rows(
    stripes: int,
    first: int,
    last: int,
    begin: int,
    starts: int,
    hashes: int,
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
        stripes: Address of int64[STRIPES, COLUMNS], written.
        first: First stripe.
        last: One past the last stripe.
        begin: Position in the grouped batch to start from.
        starts: Address of int64[STRIPES + 1], from `group_by_stripe`, as are the next two.
        hashes: Address of uint64[n].
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
    scratch = work + SCRATCH
    for s in range(first, last):
        stripe = stripe_at(stripes, s)
        for j in range(max(get(starts, s), begin), get(starts, s + 1)):
            value = load_u64(hashes, j)
            i = get(positions, j)
            at = np.int64(load_u32(times, i)) if mode == IMPORT else time
            number = find_row(stripe, value)
            had = np.int8(1)
            if number == 0:
                if is_full(stripe):
                    return j
                had = np.int8(0)
                number = claim_row(stripe, value)
            row, state = row_at(stripe, number), state_at(stripe, number)
            if had == 0 or mode == RESET:
                init_row(plan, row, state, unmix64(value))
            store_u32(time_at(stripe, number), 0, np.uint32(at))
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
                    copy_floats(state, states + 4 * get(plan, STATE) * i, get(plan, STATE))
    return -1


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
