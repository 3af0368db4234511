"""The compiled walk over a batch's ids: rows pooled into layout tensors, and gradients brought back.

A plan is int64[slices, 8], grouped by feature: feature, first column, width, target address of batch row 0, floats from
one batch row to the next, floats from one place of a sequence to the next, whether to add to what is there, 0.
"""

from __future__ import annotations

import numpy as np

from trilith.ops.combiners import FIRST, MEAN, SQRTN
from trilith.ops.jit import inlined, kernel
from trilith.ops.memory import as_index, copy_floats, load_u32, load_u64, prefetch
from trilith.ops.vectors import add_plain, add_scaled, set_scaled, set_zero

__all__ = ["FIELDS", "SHARED", "gather_layouts", "scatter_layouts"]

FIELDS = 8
SHARED = 0x80000000

_ROW = np.uint32(SHARED - 1)
_SHARED = np.uint32(SHARED)
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_ONE = np.float32(1.0)
_AHEAD = 8


@inlined
def _number(address: int, index: int) -> int:
    return as_index(load_u64(address, index))


@inlined
def _vector(code: np.uint64, unit: int, dim: int, lists: int, starts: int, sizes: int) -> int:
    """Address of the vector behind a fid offset; 0 if it is in no list or leaves its list."""
    place = as_index(code >> _HIGH)
    offset = as_index(code & _LOW) * unit
    if place >= lists or offset + dim > _number(sizes, place):
        return 0
    return _number(starts, place) + 4 * offset


@inlined
def _look_ahead(fids: int, i: int, total: int, unit: int, lists: int, starts: int) -> None:
    """Prefetch the vector some ids ahead; rows lie one after another, so this reaches into the next ones."""
    if i + _AHEAD < total:
        code = load_u64(fids, i + _AHEAD)
        place = as_index(code >> _HIGH)
        if place < lists:
            prefetch(_number(starts, place) + 4 * unit * as_index(code & _LOW))


@inlined
def _write(plan: int, first: int, last: int, b: int, vector: int, factor: np.float32, again: bool) -> None:
    """Put a vector's slices into batch row b: over what is there, or onto it."""
    for s in range(first, last):
        entry = plan + 8 * FIELDS * s
        target = _number(entry, 3) + 4 * b * _number(entry, 4)
        source, width = vector + 4 * _number(entry, 1), _number(entry, 2)
        if again or _number(entry, 6):
            add_scaled(target, source, width, factor)
        elif factor == _ONE:
            copy_floats(target, source, width)
        else:
            set_scaled(target, source, width, factor)


@inlined
def _write_zeros(plan: int, first: int, last: int, b: int) -> None:
    """Make batch row b zero, unless its slices are added to what is there."""
    for s in range(first, last):
        entry = plan + 8 * FIELDS * s
        if not _number(entry, 6):
            set_zero(_number(entry, 3) + 4 * b * _number(entry, 4), _number(entry, 2))


@inlined
def _share(pooling: int, count: int) -> np.float32:
    """What each of `count` vectors is multiplied by."""
    if count > 1 and pooling == MEAN:
        return _ONE / np.float32(count)
    if count > 1 and pooling == SQRTN:
        return np.float32(_ONE / np.sqrt(np.float32(count)))
    return _ONE


@kernel(
    "int64(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64)"
)
def gather_layouts(
    plan: int,
    bounds: int,
    features: int,
    about: int,
    fids: int,
    total: int,
    rows: int,
    firsts: int,
    lists: int,
    starts: int,
    sizes: int,
    by_row: int,
    scratch: int,
    begin: int,
    end: int,
) -> int:
    """Write rows begin..end of all layouts.

    Args:
        plan: Address of the plan.
        bounds: Address of uint64[features + 1]: the slices of each feature in the plan.
        features: Number of features.
        about: Address of uint64[features, 3]: floats per vector, pooling, places of a sequence.
        fids: Address of uint64[total]: list << 32 | position, row after row.
        total: Number of ids.
        rows: Address of uint32[...]: where each row begins among `fids`, and the end.
        firsts: Address of uint32[features + 1]: first row of each feature, with SHARED where all batch rows share it.
        lists: Number of lists.
        starts: Address of uint64[lists]: address of each list of vectors.
        sizes: Address of uint64[lists]: floats in each.
        by_row: Whether positions count vectors rather than floats.
        scratch: Address of float32[longest vector], written.
        begin: First batch row.
        end: One past the last.

    Returns:
        A place in `fids` that points outside its list; -1 if there is none.
    """
    for f in range(features):
        first, last = _number(bounds, f), _number(bounds, f + 1)
        if first == last:
            continue
        dim, pooling, places = _number(about, 3 * f), _number(about, 3 * f + 1), _number(about, 3 * f + 2)
        unit = dim if by_row else 1
        mark = load_u32(firsts, f)
        row, shared = as_index(mark & _ROW), as_index(mark & _SHARED) != 0
        present = _present(firsts, f, features)
        if shared and present and pooling != FIRST:
            p, q = as_index(load_u32(rows, row)), as_index(load_u32(rows, row + 1))
            set_zero(scratch, dim)
            for i in range(p, q):
                vector = _vector(load_u64(fids, i), unit, dim, lists, starts, sizes)
                if vector == 0:
                    return i
                add_scaled(scratch, vector, dim, _share(pooling, q - p))
            for b in range(begin, end):
                _write(plan, first, last, b, scratch, _ONE, False)
            continue
        for b in range(begin, end):
            p, q = 0, 0
            if present:
                at = row if shared else row + b
                p, q = as_index(load_u32(rows, at)), as_index(load_u32(rows, at + 1))
            if pooling == FIRST:
                q = min(q, p + places)
                for s in range(first, last):
                    entry = plan + 8 * FIELDS * s
                    target = _number(entry, 3) + 4 * b * _number(entry, 4)
                    for k in range(q - p, places):
                        set_zero(target + 4 * k * _number(entry, 5), _number(entry, 2))
            elif p == q:
                _write_zeros(plan, first, last, b)
            factor = _share(pooling, q - p)
            for i in range(p, q):
                _look_ahead(fids, i, total, unit, lists, starts)
                vector = _vector(load_u64(fids, i), unit, dim, lists, starts, sizes)
                if vector == 0:
                    return i
                if pooling != FIRST:
                    _write(plan, first, last, b, vector, factor, i > p)
                    continue
                for s in range(first, last):
                    entry = plan + 8 * FIELDS * s
                    target = _number(entry, 3) + 4 * b * _number(entry, 4) + 4 * (i - p) * _number(entry, 5)
                    copy_floats(target, vector + 4 * _number(entry, 1), _number(entry, 2))
    return -1


@inlined
def _present(firsts: int, f: int, features: int) -> bool:
    """Whether a feature has rows at all; the last entry of `firsts` counts the final total as a row."""
    after = as_index(load_u32(firsts, f + 1) & _ROW) - (1 if f + 1 == features else 0)
    return after > as_index(load_u32(firsts, f) & _ROW)


@kernel(
    "int64(int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, int64,"
    " int64, int64, int64, int64, float32)"
)
def scatter_layouts(
    plan: int,
    bounds: int,
    features: int,
    about: int,
    fids: int,
    total: int,
    rows: int,
    firsts: int,
    lists: int,
    starts: int,
    sizes: int,
    by_row: int,
    scratch: int,
    batch: int,
    begin: int,
    end: int,
    scale: np.float32,
) -> int:
    """Add the layouts' gradients onto the vectors of features begin..end.

    Features have vectors of their own, so several may be worked on at the same time.

    Args:
        plan: Address of the plan; its targets are read.
        bounds: As for `gather_layouts`.
        features: As there.
        about: As there.
        fids: As there.
        total: As there.
        rows: As there.
        firsts: As there.
        lists: As there.
        starts: As there; the lists are added to.
        sizes: As there.
        by_row: As there.
        scratch: Address of float32[longest vector], written.
        batch: Batch rows.
        begin: First feature.
        end: One past the last.
        scale: What all gradients are multiplied by.

    Returns:
        A place in `fids` that points outside its list; -1 if there is none.
    """
    for f in range(begin, end):
        first, last = _number(bounds, f), _number(bounds, f + 1)
        if first == last or not _present(firsts, f, features):
            continue
        dim, pooling, places = _number(about, 3 * f), _number(about, 3 * f + 1), _number(about, 3 * f + 2)
        unit = dim if by_row else 1
        mark = load_u32(firsts, f)
        row, shared = as_index(mark & _ROW), as_index(mark & _SHARED) != 0
        if shared and pooling != FIRST:
            set_zero(scratch, dim)
            for s in range(first, last):
                entry = plan + 8 * FIELDS * s
                for b in range(batch):
                    target = _number(entry, 3) + 4 * b * _number(entry, 4)
                    add_plain(scratch + 4 * _number(entry, 1), target, _number(entry, 2))
            p, q = as_index(load_u32(rows, row)), as_index(load_u32(rows, row + 1))
            for i in range(p, q):
                vector = _vector(load_u64(fids, i), unit, dim, lists, starts, sizes)
                if vector == 0:
                    return i
                add_scaled(vector, scratch, dim, np.float32(scale * _share(pooling, q - p)))
            continue
        for b in range(batch):
            at = row if shared else row + b
            p, q = as_index(load_u32(rows, at)), as_index(load_u32(rows, at + 1))
            factor = np.float32(scale * _share(pooling, q - p))
            if pooling == FIRST:
                q = min(q, p + places)
            for i in range(p, q):
                _look_ahead(fids, i, total, unit, lists, starts)
                vector = _vector(load_u64(fids, i), unit, dim, lists, starts, sizes)
                if vector == 0:
                    return i
                for s in range(first, last):
                    entry = plan + 8 * FIELDS * s
                    target = _number(entry, 3) + 4 * b * _number(entry, 4)
                    if pooling == FIRST:
                        target += 4 * (i - p) * _number(entry, 5)
                    add_scaled(vector + 4 * _number(entry, 1), target, _number(entry, 2), factor)
    return -1
