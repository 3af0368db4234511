"""The worker's ops in plain NumPy, as fast as NumPy lets them be: what the compiled ones are measured against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trilith.ops.layout import FidOffsets
from trilith.ops.layout_config import FeatureConfigs, OutType

__all__ = ["fused_reorder", "gather", "layout_backward", "layout_forward", "map_id"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_FIRST = np.uint32(0x7FFFFFFF)


def map_id(ids: Sequence[Ints], embeddings: Sequence[Floats], wanted: Ints) -> Floats:
    """Sort the ids once, search, take."""
    known = np.concatenate(ids)
    order = np.argsort(known)
    place = order[np.searchsorted(known, wanted, sorter=order)]
    if not np.array_equal(known[place], wanted):
        raise ValueError("an id is unknown")
    return np.take(np.concatenate(embeddings), place, axis=0, mode="clip")


def gather(fused: Floats, offsets: npt.NDArray[np.int32], dim: int, out: Floats) -> Floats:
    """One `np.take` of whole rows, possible because every vector of this buffer has the same width."""
    return np.take(fused.reshape(-1, dim), offsets // dim, axis=0, out=out, mode="clip")


def fused_reorder(inputs: Sequence[Ints], shards: int, dims: Sequence[int]) -> tuple[npt.NDArray[np.generic], ...]:
    """Per list sort to find the distinct ids, sort them back by first occurrence, then by shard."""
    owned = shards - 1 if shards > 4 else shards
    uniques, owners, inverses, cells = [], [], [], np.empty((len(inputs), shards), np.int64)
    for k, each in enumerate(inputs):
        values, first, inverse = np.unique(each, return_index=True, return_inverse=True)
        order = np.argsort(first)
        number = np.empty_like(order)
        number[order] = np.arange(order.size)
        distinct = values[order]
        owner = distinct % owned + (shards - owned)
        by_owner = np.argsort(owner, kind="stable")
        place = np.empty_like(by_owner)
        place[by_owner] = np.arange(by_owner.size)
        cells[k] = np.bincount(owner, minlength=shards)
        uniques.append(distinct[by_owner])
        owners.append(owner[by_owner])
        inverses.append(place[number[inverse]])
    sizes = cells.T.reshape(-1)
    floats = sizes * np.tile(dims, shards)
    starts = (np.cumsum(sizes) - sizes).reshape(shards, -1)
    bases = (np.cumsum(floats) - floats).reshape(shards, -1)
    output = np.empty(int(sizes.sum()), np.int64)
    offsets = []
    for k, (unique, owner, inverse) in enumerate(zip(uniques, owners, inverses, strict=True)):
        rank = np.arange(unique.size) - (np.cumsum(cells[k]) - cells[k])[owner]
        output[starts[owner, k] + rank] = unique
        offsets.append((bases[owner, k] + rank * dims[k])[inverse])
    lengths = np.array([each.size for each in inputs])
    return output, cells.sum(axis=0), sizes, lengths, np.concatenate(offsets).astype(np.int32)


def _addresses(embeddings: Sequence[Floats], fids: npt.NDArray[np.uint64]) -> Ints:
    """Where each vector begins in all buffers put together."""
    sizes = np.array([each.size for each in embeddings])
    bases = np.cumsum(sizes) - sizes
    return bases[fids >> np.uint64(32)] + (fids & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _features(offsets: FidOffsets, configs: FeatureConfigs) -> dict[str, tuple[slice, Ints, Ints]]:
    """Per feature its ids, where its rows begin among them, and their lengths."""
    firsts = (offsets.nfl_offset & _FIRST).astype(np.int64)
    batch = int(offsets.batch_size[0])
    found = {}
    for f, name in enumerate(configs.feature_names):
        bounds = offsets.feature_offset[firsts[f] : firsts[f] + batch + 1].astype(np.int64)
        found[name] = (slice(bounds[0], bounds[-1]), bounds[:-1] - bounds[0], np.diff(bounds))
    return found


def layout_forward(embeddings: Sequence[Floats], offsets: FidOffsets, configs: FeatureConfigs) -> list[Floats]:
    """Per feature: take its vectors, add them up by row, scale; then put the columns where they belong."""
    flat = np.concatenate(embeddings)
    begin = _addresses(embeddings, offsets.fid_offset)
    pooled = {}
    for name, (ids, starts, lengths) in _features(offsets, configs).items():
        feature = configs.features[name]
        rows = np.lib.stride_tricks.sliding_window_view(flat, feature.dim)[begin[ids]]
        sums = np.zeros((lengths.size, feature.dim), np.float32)
        filled = lengths > 0
        sums[filled] = np.add.reduceat(rows, starts[filled], axis=0)
        if feature.combiner.kind == "mean":
            sums /= np.maximum(lengths, 1).astype(np.float32)[:, None]
        pooled[name] = sums
    tensors: list[Floats] = []
    for layout in sorted(configs.layouts):
        out = configs.layouts[layout]
        parts = [pooled[each.feature_name][:, each.start : each.end] for each in out.slices]
        if out.out_type is OutType.CONCAT:
            tensors.append(np.concatenate(parts, axis=1))
        elif out.out_type is OutType.STACK:
            tensors.append(np.stack(parts, axis=1))
        else:
            tensors.append(np.sum(parts, axis=0))
    return tensors


def layout_backward(
    grads: Sequence[Floats], embeddings: Sequence[Floats], offsets: FidOffsets, configs: FeatureConfigs
) -> list[Floats]:
    """Per feature: put its columns' gradients together, repeat them by row, sort them by vector, add them up."""
    sizes = np.array([each.size for each in embeddings])
    flat = np.zeros(int(sizes.sum()), np.float32)
    begin = _addresses(embeddings, offsets.fid_offset)
    batch = int(offsets.batch_size[0])
    pooled = {name: np.zeros((batch, each.dim), np.float32) for name, each in configs.features.items()}
    for grad, layout in zip(grads, sorted(configs.layouts), strict=True):
        out = configs.layouts[layout]
        column = 0
        for i, each in enumerate(out.slices):
            width = each.end - each.start
            piece = grad
            if out.out_type is OutType.CONCAT:
                piece = grad[:, column : column + width]
            elif out.out_type is OutType.STACK:
                piece = grad[:, i]
            pooled[each.feature_name][:, each.start : each.end] += piece
            column += width
    for name, (ids, _, lengths) in _features(offsets, configs).items():
        feature = configs.features[name]
        rows = pooled[name]
        if feature.combiner.kind == "mean":
            rows = rows / np.maximum(lengths, 1).astype(np.float32)[:, None]
        targets = begin[ids]
        order = np.argsort(targets, kind="stable")
        owners = np.repeat(np.arange(batch), lengths)[order]
        distinct, firsts = np.unique(targets[order], return_index=True)
        sums = np.add.reduceat(rows[owners], firsts, axis=0)
        flat[distinct[:, None] + np.arange(feature.dim)] = sums
    return np.split(flat, np.cumsum(sizes)[:-1])
