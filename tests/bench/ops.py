"""The worker's ops against the same job in plain NumPy (`ops_numpy.py`), and against copying the bytes they produce.

Both sides are checked to give the same before they are timed. One process; times are medians. How fast the output's
bytes could be copied at all is said in a note below the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.bench import ops_numpy
from tests.bench.draws import Zipf, spread
from tests.bench.harness import Benchmark, Context, Entry, Side, higher, interleave
from trilith.compat.monolith.embedding_map import map_id_to_embedding
from trilith.ops.combiners import Combiner
from trilith.ops.fused_gather import fused_gather_embeddings_by_input
from trilith.ops.layout import FidOffsets, fused_embedding_to_layout, fused_embedding_to_layout_grad
from trilith.ops.layout_config import FeatureConfig, FeatureConfigs, OutConfig, OutType, SliceConfig
from trilith.ops.memory import tune_allocator
from trilith.ops.reorder import fused_reorder_by_indices
from trilith.ops.unique import distinct_in_rows

__all__ = ["BENCHMARKS"]

_SHARDS = 10
_REORDER_LISTS, _REORDER_SHARDS = 30, 256
_FEATURES, _TABLES, _LAYOUT_SHARDS, _DIM = 26, 4, 2, 17


def _floats(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    return rng.random(shape, np.float32)


def _copy(size: int) -> Side:
    """Copying as many bytes from one array to another that exists."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    return lambda: partial(np.copyto, target, source)


def _compare(
    context: Context,
    names: Sequence[str],
    work: float,
    unit: str,
    target: float,
    written: int,
    *sides: Callable[[], Any],
) -> list[Entry]:
    """Time NumPy (the first side) and the rest in turn; `work` units are done by each."""
    tune_allocator()
    rounds = context.sizes.op_rounds
    constant: list[Side] = [lambda side=side: side for side in sides]  # type: ignore[misc]
    seconds = interleave(context, f"{names[0]} and numpy in turn", rounds, *constant, _copy(written))
    medians = [float(np.median(each)) for each in seconds]
    entries = []
    for name, taken in zip(names, medians[1:-1], strict=True):
        entries.append(higher(name, work / taken, work / medians[0], unit, target))
        context.note(
            f"{name} takes {taken / medians[-1]:.2f} times as long as copying its {written / 1e6:.1f} MB of output"
        )
    return entries


def map_id(context: Context) -> list[Entry]:
    """Rows of all ids, from ten lists, in random order."""
    count, dim = context.sizes.op_ids, 16
    rng = np.random.default_rng(1)
    ids = spread(0, count).view(np.int64)
    owners = spread(0, count) % np.uint64(_SHARDS)
    lists = [np.ascontiguousarray(ids[owners == s]) for s in range(_SHARDS)]
    rows = [_floats(rng, each.size, dim) for each in lists]
    wanted = rng.permutation(ids)
    ours, theirs = (partial(op, lists, rows, wanted) for op in (map_id_to_embedding, ops_numpy.map_id))
    np.testing.assert_array_equal(ours(), theirs())
    return _compare(context, ["ops.map_id"], count, "ids/s", 3, 4 * dim * count, theirs, ours)


def gather(context: Context, *, dim: int) -> list[Entry]:
    """Vectors at random places of a flat buffer, with one thread and with two."""
    count = context.sizes.op_features
    rng = np.random.default_rng(2)
    fused = _floats(rng, count * dim)
    offsets = (rng.integers(0, count, count) * dim).astype(np.int32)
    out, reference = np.empty((count, dim), np.float32), np.empty((count, dim), np.float32)
    sides = [
        partial(fused_gather_embeddings_by_input, fused, [offsets], [dim], out=[out], threads=threads)
        for threads in (1, 2)
    ]
    theirs = partial(ops_numpy.gather, fused, offsets, dim, reference)
    np.testing.assert_array_equal(sides[0]()[0], theirs())
    name = f"ops.gather.d{dim}"
    return _compare(context, [name, f"{name}.x2"], count, "vectors/s", 1, 4 * dim * count, theirs, *sides)


def fused_reorder(context: Context) -> list[Entry]:
    """Ids of 30 lists arranged for 256 shards: `op_ids` distinct ones or so, each twice on average."""
    count = context.sizes.op_ids
    rng = np.random.default_rng(3)
    pool = (spread(0, 36 * count // 30) >> np.uint64(1)).view(np.int64)
    lists = [rng.choice(part, 2 * count // _REORDER_LISTS) for part in np.array_split(pool, _REORDER_LISTS)]
    dims = [8 + 8 * (k % 3) for k in range(_REORDER_LISTS)]
    ours = partial(fused_reorder_by_indices, lists, _REORDER_SHARDS, dims)
    theirs = partial(ops_numpy.fused_reorder, lists, _REORDER_SHARDS, dims)
    found = ours()
    for left, right in zip(found, theirs(), strict=True):
        np.testing.assert_array_equal(left, right)
    written = found.output.nbytes + found.fused_emb_offset.nbytes
    total = sum(each.size for each in lists)
    context.note(f"ops.fused_reorder arranges {total} ids, {found.output.size} of them distinct in their lists")
    return _compare(context, ["ops.fused_reorder"], total, "ids/s", 3, written, theirs, ours)


def _layout_case(
    context: Context,
) -> tuple[list[npt.NDArray[np.float32]], FidOffsets, FeatureConfigs]:
    """26 features of 4 tables on 2 shards: half with one id a row, half with none to six, sums and means."""
    batch, rng = context.sizes.op_batch, np.random.default_rng(4)
    names = [f"f{i:02}" for i in range(_FEATURES)]
    features = {
        name: FeatureConfig(
            table=f"t{i % _TABLES}",
            slice_dims=(1, _DIM - 1),
            combiner=Combiner("mean" if i % 3 == 0 else "sum"),
        )
        for i, name in enumerate(names)
    }
    bias = tuple(SliceConfig(name, 0, 1) for name in names)
    vectors = tuple(SliceConfig(name, 1, _DIM) for name in names)
    configs = FeatureConfigs(
        features,
        {
            "bias": OutConfig(slices=bias, out_type=OutType.ADDN),
            "deep": OutConfig(slices=vectors, out_type=OutType.CONCAT),
        },
    )
    draw = Zipf(context.sizes.op_vocabulary, context.sizes.zipf_exponent, 5)
    filled = np.zeros(_TABLES * _LAYOUT_SHARDS, np.int64)
    codes, lengths = [], []
    for i in range(_FEATURES):
        sizes = np.ones(batch, np.int64) if i % 2 else rng.integers(0, 7, batch)
        ids = draw.draw(int(sizes.sum()))
        distinct = distinct_in_rows(ids, np.array([0, ids.size]))
        shard = distinct.values % _LAYOUT_SHARDS
        code = np.empty(shard.size, np.int64)
        for s in range(_LAYOUT_SHARDS):
            place = i % _TABLES * _LAYOUT_SHARDS + s
            mine = np.flatnonzero(shard == s)
            code[mine] = (place << 32) + filled[place] + np.arange(mine.size) * _DIM
            filled[place] += mine.size * _DIM
        codes.append(code[distinct.numbers & np.uint32(0x7FFFFFFF)])
        lengths.append(sizes)
    rows = np.concatenate(lengths)
    offsets = FidOffsets(
        version=3,
        ps_num=_LAYOUT_SHARDS,
        fid_offset=np.concatenate(codes).astype(np.uint64),
        feature_offset=np.concatenate([[0], np.cumsum(rows)]).astype(np.int32),
        nfl_offset=np.append(np.arange(_FEATURES) * batch, rows.size + 1).astype(np.uint32),
        batch_size=np.array([batch]),
    )
    return [_floats(rng, int(each)) for each in filled], offsets, configs


def layout_forward(context: Context) -> list[Entry]:
    """A batch's vectors to the model's tensors."""
    embeddings, offsets, configs = _layout_case(context)
    ours = partial(fused_embedding_to_layout, embeddings, offsets, configs)
    theirs = partial(ops_numpy.layout_forward, embeddings, offsets, configs)
    found = ours()
    for left, right in zip(found, theirs(), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
    work = offsets.fid_offset.size
    written = sum(each.nbytes for each in found)
    return _compare(context, ["ops.layout.forward"], work, "ids/s", 3, written, theirs, ours)


def layout_backward(context: Context) -> list[Entry]:
    """The tensors' gradients back to the vectors."""
    embeddings, offsets, configs = _layout_case(context)
    rng = np.random.default_rng(6)
    grads = [_floats(rng, *each.shape) for each in fused_embedding_to_layout(embeddings, offsets, configs)]
    ours = partial(fused_embedding_to_layout_grad, grads, embeddings, offsets, configs)
    theirs = partial(ops_numpy.layout_backward, grads, embeddings, offsets, configs)
    for left, right in zip(ours(), theirs(), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-3)
    work = offsets.fid_offset.size
    written = sum(each.nbytes for each in embeddings)
    return _compare(context, ["ops.layout.backward"], work, "ids/s", 3, written, theirs, ours)


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(("ops.map_id",), map_id),
    *(Benchmark((f"ops.gather.d{dim}", f"ops.gather.d{dim}.x2"), partial(gather, dim=dim)) for dim in (32, 256)),
    Benchmark(("ops.fused_reorder",), fused_reorder),
    Benchmark(("ops.layout.forward",), layout_forward),
    Benchmark(("ops.layout.backward",), layout_backward),
)
