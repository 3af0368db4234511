"""Slow, plain twins of the worker's ops: obvious loops over lists, each the definition of right for its namesake."""

from __future__ import annotations

import numpy as np


def split_by_indices(indices, rows, splits):
    return [[row for index, row in zip(indices, rows, strict=True) if index == s] for s in range(splits)]


def reorder_by_indices(keys, shards, count):
    owner = {}
    for key, shard in zip(keys, shards, strict=True):
        owner.setdefault(key, shard)
    found = [[key for key in owner if owner[key] == s][::-1] for s in range(count)]
    return [key for shard in found for key in shard], [len(shard) for shard in found]


def fused_reorder(lists, shards, dims, rank0_empty=True):
    spared = int(rank0_empty and shards > 4)
    cells = [[[] for _ in lists] for _ in range(shards)]
    for k, ids in enumerate(lists):
        for each in ids:
            cell = cells[each % (shards - spared) + spared][k]
            if each not in cell:
                cell.append(each)
    offset, start = {}, 0
    for row in cells:
        for k, cell in enumerate(row):
            for each in cell:
                offset[k, each] = start
                start += dims[k]
    return (
        [each for row in cells for cell in row for each in cell],
        [sum(map(len, row)) for row in cells],
        [len(cell) for row in cells for cell in row],
        [len(ids) for ids in lists],
        [offset[k, each] for k, ids in enumerate(lists) for each in ids],
    )


def unique_rows(rows, dims):
    """Per row: {id: offsets of its occurrences}."""
    at, found = 0, []
    for ids, dim in zip(rows, dims, strict=True):
        places = {}
        for each in ids:
            places.setdefault(each, []).append(at)
            at += dim
        found.append(places)
    return found


def map_rows(ids, blocks, wanted):
    row_of = {}
    for some, block in zip(ids, blocks, strict=True):
        for each, row in zip(some, block, strict=True):
            row_of.setdefault(each, row)
    return np.array([row_of[each] for each in wanted], np.float32)


def map_gradient(ids, wanted, grads):
    place = {}
    for p, some in enumerate(ids):
        for i, each in enumerate(some):
            place.setdefault(each, (p, i))
    out = [np.zeros((len(some), grads.shape[1]), np.float32) for some in ids]
    for each, grad in zip(wanted, grads, strict=True):
        p, i = place[each]
        out[p][i] += grad
    return out


def bags(rowids, values, rows):
    """Per bag its rows, float32[m, d]."""
    rowids = np.asarray(rowids)
    return [values[rowids == r] for r in range(rows)]


def layout_values(configs, rows_of, vector_of):
    """The layout tensors of a batch.

    Args:
        configs: FeatureConfigs.
        rows_of: By feature its ids row by row; one row for a shared one.
        vector_of: (feature, id) to its vector.
    """
    batch = max(map(len, rows_of.values()))
    pooled = {}
    for name, feature in configs.features.items():
        rows = rows_of[name] if len(rows_of[name]) == batch else rows_of[name] * batch
        out = []
        for ids in rows:
            vectors = [vector_of(name, each) for each in ids]
            kind = feature.combiner.kind
            if kind == "first":
                padded = np.zeros((feature.combiner.n, feature.dim), np.float32)
                for i, vector in enumerate(vectors[: feature.combiner.n]):
                    padded[i] = vector
                out.append(padded)
            else:
                total = np.sum(vectors, axis=0) if vectors else np.zeros(feature.dim, np.float32)
                divisor = {"sum": 1, "mean": len(vectors), "sqrtn": len(vectors) ** 0.5}[kind]
                out.append(total / (divisor or 1))
        pooled[name] = np.array(out, np.float32)
    tensors = []
    for name in sorted(configs.layouts):
        layout = configs.layouts[name]
        parts = [pooled[each.feature_name][..., each.start : each.end] for each in layout.slices]
        kind = layout.out_type.name
        if kind == "NONE":
            tensors += parts
        elif kind == "CONCAT":
            tensors.append(np.concatenate(parts, axis=-1))
        else:
            tensors.append(np.stack(parts, axis=1) if kind == "STACK" else sum(parts))
    return tensors
