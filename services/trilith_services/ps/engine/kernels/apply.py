"""Kernels that take optimizer steps, one compiled for each combination of optimizers that tables have.

As `write`, they return where the index has to grow first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from trilith.ops.hashing import unmix64
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import load_f32, load_u64, prefetch, store_u32
from trilith_services.ps.engine.kernels.codecs import one_bit_gradient
from trilith_services.ps.engine.kernels.index import (
    GROUP,
    claim_row,
    find_row,
    get,
    home_line,
    is_full,
    put,
    row_at,
    state_at,
    stripe_at,
    time_at,
)
from trilith_services.ps.engine.kernels.optimizers import KINDS, round_to_half
from trilith_services.ps.engine.kernels.plan import (
    DIM,
    SEED,
    SEG_CODEC_PARAMS,
    SEG_DIM,
    SEG_PARAMS,
    SEG_STATE,
    SEG_WEIGHT,
    SEGMENT_COLUMNS,
    STATE,
)
from trilith_services.ps.engine.kernels.read import SCRATCH, prefetch_row
from trilith_services.ps.engine.kernels.write import id_stream, init_row

Structure: TypeAlias = tuple[tuple[str, bool, bool], ...]
"""What an apply kernel is compiled for: per segment optimizer kind, stochastic rounding, one-bit gradient."""


def _segment_step(k: int, kind: str, stochastic: bool, one_bit: bool) -> Callable[..., Any]:
    """The step of segment k: gradient through its reader, optimizer, rounding."""
    advance = KINDS[kind].step

    @inlined
    def step_segment(
        row: Any, state: Any, grad: Any, segments: int, rates: Any, step: Any, stream: Any, scratch: Any
    ) -> Any:
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
            state + get(segments, k * SEGMENT_COLUMNS + SEG_STATE),
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
    def step_both(
        row: Any, state: Any, grad: Any, segments: int, rates: Any, step: Any, stream: Any, scratch: Any
    ) -> Any:
        first(row, state, grad, segments, rates, step, stream, scratch)
        rest(row, state, grad, segments, rates, step, stream, scratch)

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
    signature = f"int64({', '.join(['int64'] * 14)})"

    @kernel(signature, variant=repr(structure))
    def apply_rows(
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
        grads: int,
        rates: int,
        step: int,
        time: int,
    ) -> int:
        """Take one optimizer step per id occurrence, creating missing rows.

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
            grads: Address of float32[n, dim].
            rates: Address of float32[k] learning rates.
            step: Global step.
            time: Unix seconds, the rows' new last update.

        Returns:
            -1, or the position before which the stripe has to grow.
        """
        scratch = work + SCRATCH
        dim = get(plan, DIM)
        state_words = get(plan, STATE)
        seed = get(plan, SEED)
        for s in range(first, last):
            stripe = stripe_at(stripes, s)
            end = get(starts, s + 1)
            j0 = max(get(starts, s), begin)
            while j0 < end:
                count = min(GROUP, end - j0)
                for t in range(count):
                    prefetch(home_line(stripe, load_u64(hashes, j0 + t)))
                    prefetch_row(grads + 4 * dim * get(positions, j0 + t), 4 * dim + 63)
                ready = count
                for t in range(count):
                    number = find_row(stripe, load_u64(hashes, j0 + t))
                    if number != 0:
                        prefetch_row(row_at(stripe, number), 4 * dim)
                        if state_words != 0:
                            prefetch_row(state_at(stripe, number), 4 * state_words)
                        prefetch(time_at(stripe, number))
                    elif is_full(stripe):
                        ready = t
                        break
                    else:
                        number = claim_row(stripe, load_u64(hashes, j0 + t))
                        key = unmix64(load_u64(hashes, j0 + t))
                        init_row(plan, row_at(stripe, number), state_at(stripe, number), key)
                    put(work, t, number)
                for t in range(ready):
                    number = get(work, t)
                    store_u32(time_at(stripe, number), 0, np.uint32(time))
                    stream = np.uint64(0)
                    if rounding:
                        stream = id_stream(seed, unmix64(load_u64(hashes, j0 + t)))
                    gradient = grads + 4 * dim * get(positions, j0 + t)
                    row, state = row_at(stripe, number), state_at(stripe, number)
                    step_row(row, state, gradient, segments, rates, step, stream, scratch)
                if ready < count:
                    return int(j0 + ready)
                j0 += count
        return -1

    return apply_rows


@functools.cache
def make_dense_step(kind: str) -> Callable[..., Any]:
    """The kernel that steps one dense partition as a single row."""
    advance = KINDS[kind].step

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
