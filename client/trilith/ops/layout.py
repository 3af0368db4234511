"""Fused layouts: the vectors of all features of a batch, pooled and laid out as the model's tensors in one walk.

`FidOffsets` says where the vectors are (`trilith.data.parse.sharding` makes it), `FeatureConfigs` what becomes of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith.ops.layout_config import FeatureConfigs, OutType
from trilith.ops.layout_kernels import FIELDS, SHARED, gather_layouts, scatter_layouts
from trilith.ops.memory import address_of
from trilith.ops.ragged import Int64Array, as_floats, as_integers
from trilith.ops.threads import in_parts, thread_count

__all__ = [
    "FidOffsets",
    "Request",
    "embedding_lists",
    "flatten_layout",
    "fused_embedding_to_layout",
    "fused_embedding_to_layout_grad",
    "nest_layout",
    "split_requests",
]

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class FidOffsets:
    """Where the vectors of a batch's ids are.

    Lists are numbered t * P + s for table t and shard s; versions and their position codes are those of
    `trilith.data.parse.sharding`.

    Attributes:
        version: 1 to 5: how `fid_offset` and the embeddings are to be read.
        ps_num: P, number of shards.
        fid_offset: uint64[ids], list << 32 | position, feature by feature, row by row.
        feature_offset: int32[rows + 1], where each row begins in `fid_offset`.
        nfl_offset: uint32[features + 1], the first row of each feature, its highest bit set where all batch rows share
            that row; the last is rows + 1.
        batch_size: int32[requests].
        row_splits: Version 2: per list int64[features of its table + 1].
        emb_row_lengths: Version 4: int32[P * K], floats of table t of shard s at s * K + t.
        nfl_size: Version 5: int32[requests], how each request's part is cut out of `nfl_offset`.
        feature_size: The same for `feature_offset`.
        fid_size: The same for `fid_offset`.
        emb_size: Version 5: int32[requests * K * P], floats of every list in each request.
    """

    version: int
    ps_num: int
    fid_offset: npt.NDArray[np.uint64]
    feature_offset: npt.NDArray[np.int32]
    nfl_offset: npt.NDArray[np.uint32]
    batch_size: Int64Array
    row_splits: Sequence[npt.ArrayLike] | None = None
    emb_row_lengths: npt.ArrayLike | None = None
    nfl_size: npt.ArrayLike | None = None
    feature_size: npt.ArrayLike | None = None
    fid_size: npt.ArrayLike | None = None
    emb_size: npt.ArrayLike | None = None

    def __post_init__(self) -> None:
        if self.version not in range(1, 6):
            raise InvalidRequestError(f"version={self.version} is outside 1..5")
        object.__setattr__(self, "ps_num", max(1, int(self.ps_num)))
        for name, dtype in (("fid_offset", np.uint64), ("feature_offset", np.int32), ("nfl_offset", np.uint32)):
            value = np.asarray(getattr(self, name))
            if value.ndim != 1 or (value.size and value.dtype.kind not in "iu"):
                raise InvalidRequestError(f"{name} is {value.dtype}{value.shape}, one-dimensional integers are needed")
            object.__setattr__(self, name, np.require(value, dtype, ("C", "A")))
        object.__setattr__(self, "batch_size", np.atleast_1d(as_integers("batch_size", self.batch_size)))
        if self.batch_size.ndim != 1 or (self.batch_size < 0).any():
            raise InvalidRequestError(f"batch_size {self.batch_size.tolist()} is not made of counts")
        if self.batch_size.size != 1 and self.version != 5:
            raise InvalidRequestError(f"{self.batch_size.size} requests need version 5, this is {self.version}")


@dataclass(frozen=True, slots=True)
class Request:
    """One request's part of a batch.

    Attributes:
        batch: Its rows.
        fids: uint64[...].
        rows: int32[...].
        firsts: uint32[features + 1].
    """

    batch: int
    fids: npt.NDArray[np.uint64]
    rows: npt.NDArray[np.int32]
    firsts: npt.NDArray[np.uint32]


@dataclass(slots=True)
class _Tensors:
    """The layout tensors of a call, and the plan that leads to them.

    Attributes:
        tensors: By layout, sorted.
        plan: int64[slices, FIELDS], by feature.
        bounds: int64[features + 1] of the plan.
        about: int64[features, 3].
    """

    tensors: list[Float32Array]
    plan: Int64Array
    bounds: Int64Array
    about: Int64Array


def split_requests(offsets: FidOffsets, configs: FeatureConfigs) -> list[Request]:
    """Cut a batch into its requests and check that their rows fit the features.

    Raises:
        InvalidRequestError: Sizes that do not add up, rows that fall, a feature with too few rows.
    """
    count = offsets.batch_size.size
    parts = []
    for name, whole, sizes in (
        ("fid_offset", offsets.fid_offset, offsets.fid_size),
        ("feature_offset", offsets.feature_offset, offsets.feature_size),
        ("nfl_offset", offsets.nfl_offset, offsets.nfl_size),
    ):
        lengths = as_integers(name, [whole.size] if sizes is None else sizes, shape=(count,))
        if (lengths < 0).any() or lengths.sum() != whole.size:
            raise InvalidRequestError(f"sizes {lengths.tolist()} do not cut {name} of {whole.size}")
        parts.append(np.split(whole, np.cumsum(lengths)[:-1]))
    requests = [Request(int(batch), *each) for batch, *each in zip(offsets.batch_size, *parts, strict=True)]
    for request in requests:
        _check_request(request, configs)
    return requests


def _check_request(request: Request, configs: FeatureConfigs) -> None:
    names = configs.feature_names
    rows = request.rows
    if request.firsts.size != len(names) + 1:
        raise InvalidRequestError(f"nfl_offset has {request.firsts.size} entries for {len(names)} features and the end")
    if rows.size == 0 or rows[0] < 0 or (rows[1:] < rows[:-1]).any() or rows[-1] > request.fids.size:
        raise InvalidRequestError(f"feature_offset does not rise from 0 to {request.fids.size}, the number of ids")
    firsts = (request.firsts & np.uint32(SHARED - 1)).astype(np.int64)
    firsts[-1] -= 1
    counts = np.diff(firsts)
    if firsts[0] < 0 or (counts < 0).any() or firsts[-1] > rows.size - 1:
        raise InvalidRequestError(f"nfl_offset {firsts.tolist()} does not rise to {rows.size - 1}, the number of rows")
    shared = (request.firsts[:-1] & np.uint32(SHARED)) != 0
    wrong = ~shared & (counts != request.batch) & (counts != 0)
    if wrong.any():
        f = int(wrong.argmax())
        raise InvalidRequestError(f"feature {names[f]!r} has {counts[f]} rows in a batch of {request.batch}")


def embedding_lists(
    embeddings: Sequence[Float32Array], offsets: FidOffsets, configs: FeatureConfigs
) -> list[tuple[Int64Array, Int64Array, Int64Array]]:
    """Work out where each list of vectors lies.

    Args:
        embeddings: Version 4: one flat buffer. Others: K * P buffers; flat, or [rows, dim] in version 1.
        offsets: The batch.
        configs: Its features.

    Returns:
        Per request int64[lists] three times: the buffer of each list, where it begins there, how many floats it has.
    """
    tables, shards = configs.features_by_table, offsets.ps_num
    cells = len(tables) * shards
    if len(embeddings) != (1 if offsets.version == 4 else cells):
        raise InvalidRequestError(
            f"{len(embeddings)} embedding buffers, version {offsets.version} with {len(tables)} tables and {shards}"
            f" shards has {1 if offsets.version == 4 else cells}"
        )
    sizes = np.array([each.size for each in embeddings], np.int64)
    which, zeros = np.arange(cells), np.zeros(cells, np.int64)
    if offsets.version in (1, 3):
        return [(which, zeros, sizes)]
    if offsets.version == 2:
        return [_feature_lists(offsets, configs, sizes)]
    if offsets.version == 4:
        if offsets.emb_row_lengths is None:
            raise InvalidRequestError("version 4 needs emb_row_lengths to cut its buffer")
        lengths = as_integers("emb_row_lengths", offsets.emb_row_lengths, shape=(cells,))
        if (lengths < 0).any() or lengths.sum() != sizes[0]:
            raise InvalidRequestError(f"emb_row_lengths {lengths.tolist()} do not cut a buffer of {sizes[0]} floats")
        # The buffer goes shard by shard, lists are numbered table by table.
        by_table = np.arange(cells).reshape(shards, len(tables)).T.reshape(-1)
        return [(zeros, (np.cumsum(lengths) - lengths)[by_table], lengths[by_table])]
    requests = offsets.batch_size.size
    if offsets.emb_size is None:
        if requests != 1:
            raise InvalidRequestError(f"emb_size must say how {requests} requests share the embeddings")
        return [(which, zeros, sizes)]
    cut = as_integers("emb_size", offsets.emb_size, shape=(requests * cells,)).reshape(requests, cells)
    if (cut < 0).any() or (cut.sum(axis=0) != sizes).any():
        raise InvalidRequestError(f"emb_size {cut.tolist()} does not cut buffers of {sizes.tolist()} floats")
    begins = np.cumsum(cut, axis=0) - cut
    return [(which, begins[q], cut[q]) for q in range(requests)]


def _feature_lists(
    offsets: FidOffsets, configs: FeatureConfigs, sizes: Int64Array
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Version 2: a list per table, shard and feature."""
    if offsets.row_splits is None or len(offsets.row_splits) != sizes.size:
        raise InvalidRequestError(f"version 2 needs row_splits for each of {sizes.size} buffers")
    which, begins, lengths = [], [], []
    for t, names in enumerate(configs.features_by_table.values()):
        dims = np.array([configs.features[name].dim for name in names], np.int64)
        for s in range(offsets.ps_num):
            cell = t * offsets.ps_num + s
            splits = as_integers(f"row_splits[{cell}]", offsets.row_splits[cell], shape=(dims.size + 1,))
            floats = np.diff(splits) * dims
            if (floats < 0).any() or splits[0] != 0 or floats.sum() != sizes[cell]:
                raise InvalidRequestError(f"row_splits[{cell}] {splits.tolist()} do not cut {sizes[cell]} floats")
            which += [cell] * dims.size
            begins.append(np.cumsum(floats) - floats)
            lengths.append(floats)
    return np.array(which, np.int64), np.concatenate(begins), np.concatenate(lengths)


def _plan(configs: FeatureConfigs, tensors: list[Float32Array]) -> _Tensors:
    """Lead every slice to its place in `tensors`, which are float32[B, ...], C-contiguous, in order of the layouts."""
    number = {name: f for f, name in enumerate(configs.feature_names)}
    entries: list[list[int]] = []
    place = 0
    for layout in sorted(configs.layouts):
        out = configs.layouts[layout]
        column = 0
        for i, each in enumerate(out.slices):
            tensor = tensors[place + i] if out.out_type is OutType.NONE else tensors[place]
            width = each.end - each.start
            row = int(np.prod(tensor.shape[1:]))
            start, sequence = 0, width
            if out.out_type is OutType.CONCAT:
                start, sequence = column, tensor.shape[-1]
            elif out.out_type is OutType.STACK:
                start = i * int(np.prod(tensor.shape[2:]))
            add = int(out.out_type is OutType.ADDN)
            target = address_of(tensor) + 4 * start
            entries.append([number[each.feature_name], each.start, width, target, row, sequence, add, i])
            column += width
        place += len(out.slices) if out.out_type is OutType.NONE else 1
    # In the order of the walk; the first slice of a sum sets, the others add.
    entries.sort(key=lambda entry: entry[0])
    begun: set[int] = set()
    for entry in entries:
        if entry[6] and entry[3] not in begun:
            begun.add(entry[3])
            entry[6] = 0
    plan = np.array(entries, np.int64).reshape(-1, FIELDS)
    about = np.array(
        [
            (each.dim, each.combiner.code, each.combiner.n)
            for each in (configs.features[name] for name in configs.feature_names)
        ],
        np.int64,
    )
    bounds = np.searchsorted(plan[:, 0], np.arange(len(number) + 1)).astype(np.int64)
    return _Tensors(tensors, plan, bounds, about)


def _walk(
    offsets: FidOffsets,
    configs: FeatureConfigs,
    buffers: Sequence[Float32Array],
    planned: _Tensors,
    step: Callable[[Request, tuple[int, ...], Int64Array], None],
) -> None:
    """Do `step(request, kernel arguments after the plan, plan)` for every request."""
    requests = split_requests(offsets, configs)
    plan = planned.plan
    for request, (which, begins, lengths) in zip(requests, embedding_lists(buffers, offsets, configs), strict=True):
        bases = np.array([address_of(each) for each in buffers], np.int64)
        starts = bases[which] + 4 * begins
        lengths = np.ascontiguousarray(lengths)
        step(
            request,
            (
                address_of(planned.bounds),
                len(configs.features),
                address_of(planned.about),
                address_of(request.fids),
                request.fids.size,
                address_of(request.rows),
                address_of(request.firsts),
                starts.size,
                address_of(starts),
                address_of(lengths),
                int(offsets.version <= 2),
            ),
            plan,
        )
        # The next request's rows follow in every tensor.
        plan = plan.copy()
        plan[:, 3] += 4 * request.batch * plan[:, 4]


def fused_embedding_to_layout(
    embeddings: Sequence[npt.ArrayLike] | npt.ArrayLike,
    offsets: FidOffsets,
    configs: FeatureConfigs,
    *,
    threads: int | None = None,
) -> list[Float32Array]:
    """Pool a batch's vectors into the layouts' tensors.

    Args:
        embeddings: Version 4: float32[floats]. Others: K * P times float32, flat, or [rows, dim] in version 1.
        offsets: Where the vectors are.
        configs: What becomes of them.
        threads: How many may work on it; None decides by size.

    Returns:
        float32[B, ...] by sorted layout, a layout of type NONE with one for each slice. Zeros where a row has no ids.
    """
    buffers = _buffers(embeddings, offsets.version)
    batch = int(offsets.batch_size.sum())
    planned = _plan(configs, [np.empty((batch, *shape), np.float32) for shape in _shapes(configs)])
    longest = int(planned.about[:, 0].max())
    floats = int(offsets.fid_offset.size * planned.about[:, 0].mean()) + sum(each.size for each in planned.tensors)

    def step(request: Request, arguments: tuple[int, ...], plan: Int64Array) -> None:
        def part(begin: int, end: int) -> None:
            scratch = np.empty(longest, np.float32)
            everything: list[Any] = [address_of(plan), *arguments, address_of(scratch), begin, end]
            _refuse(gather_layouts(*everything), request, offsets.version)

        in_parts(part, request.batch, thread_count(threads, 4 * floats))

    _walk(offsets, configs, buffers, planned, step)
    return planned.tensors


def fused_embedding_to_layout_grad(
    grads: Sequence[npt.ArrayLike],
    embeddings: Sequence[npt.ArrayLike] | npt.ArrayLike,
    offsets: FidOffsets,
    configs: FeatureConfigs,
    *,
    scale: float = 1.0,
    threads: int | None = None,
) -> list[Float32Array]:
    """Bring the layouts' gradients back to the vectors.

    Args:
        grads: float32[B, ...] in the order of `fused_embedding_to_layout`.
        embeddings: As given there; only their shapes matter.
        offsets: As there.
        configs: As there.
        scale: What all gradients are multiplied by.
        threads: How many may work on it; None decides by size.

    Returns:
        Per buffer its gradient, of its shape; a list of one in version 4.
    """
    shapes = [np.shape(each) for each in _each(embeddings, offsets.version)]
    batch = int(offsets.batch_size.sum())
    wanted = _shapes(configs)
    if len(grads) != len(wanted):
        raise InvalidRequestError(f"{len(grads)} gradients for {len(wanted)} layout tensors")
    tensors = [
        as_floats(f"grads[{i}]", grad, shape=(batch, *shape))
        for i, (grad, shape) in enumerate(zip(grads, wanted, strict=True))
    ]
    planned = _plan(configs, tensors)
    longest = int(planned.about[:, 0].max())
    buffers = [np.zeros(shape, np.float32) for shape in shapes]
    floats = int(offsets.fid_offset.size * planned.about[:, 0].mean()) + sum(each.size for each in tensors)

    def step(request: Request, arguments: tuple[int, ...], plan: Int64Array) -> None:
        def part(begin: int, end: int) -> None:
            scratch = np.empty(longest, np.float32)
            room = address_of(scratch)
            everything: list[Any] = [address_of(plan), *arguments, room, request.batch, begin, end, np.float32(scale)]
            _refuse(scatter_layouts(*everything), request, offsets.version)

        in_parts(part, len(configs.features), thread_count(threads, 4 * floats))

    _walk(offsets, configs, buffers, planned, step)
    return buffers


def nest_layout(
    tensors: Sequence[Float32Array], configs: FeatureConfigs
) -> dict[str, Float32Array | list[Float32Array]]:
    """By layout its tensor, or its tensors for type NONE."""
    nested: dict[str, Float32Array | list[Float32Array]] = {}
    at = 0
    for name in sorted(configs.layouts):
        out = configs.layouts[name]
        if out.out_type is OutType.NONE:
            nested[name] = list(tensors[at : at + len(out.slices)])
            at += len(out.slices)
        else:
            nested[name] = tensors[at]
            at += 1
    if at != len(tensors):
        raise InvalidRequestError(f"{len(tensors)} tensors for {at} of the layouts")
    return nested


def flatten_layout(nested: Mapping[str, Float32Array | Sequence[Float32Array]]) -> list[Float32Array]:
    """Undo `nest_layout`."""
    flat: list[Float32Array] = []
    for name in sorted(nested):
        each = nested[name]
        flat += list(each) if isinstance(each, (list, tuple)) else [each]  # type: ignore[list-item]
    return flat


def _shapes(configs: FeatureConfigs) -> list[tuple[int, ...]]:
    return [shape for name in sorted(configs.layouts) for shape in configs.tensor_shapes(name)]


def _each(embeddings: Sequence[npt.ArrayLike] | npt.ArrayLike, version: int) -> Sequence[npt.ArrayLike]:
    if version != 4:
        return embeddings  # type: ignore[return-value]
    whole = isinstance(embeddings, np.ndarray) or not len(embeddings) or np.ndim(embeddings[0]) == 0  # type: ignore[arg-type, index]
    return [embeddings] if whole else embeddings  # type: ignore[list-item, return-value]


def _buffers(embeddings: Sequence[npt.ArrayLike] | npt.ArrayLike, version: int) -> list[Float32Array]:
    return [as_floats(f"embeddings[{i}]", each) for i, each in enumerate(_each(embeddings, version))]


def _refuse(bad: int, request: Request, version: int) -> None:
    if bad >= 0:
        code = int(request.fids[bad])
        unit = "vector" if version <= 2 else "float"
        raise InvalidRequestError(
            f"fid_offset[{bad}] points at {unit} {code & 0xFFFFFFFF} of list {code >> 32}, which does not reach so far"
        )
