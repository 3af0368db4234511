"""Vectors of the primitive ops: split, unique, map, gather, reduce, pack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.conformance.compare import Partial
from tests.conformance.configs import floats
from trilith.compat.monolith import embedding_map, id_ops, packing, row_ops, shared_buffer
from trilith.errors import InvalidRequestError
from trilith.ops import fused_gather, ragged, reorder

__all__ = ["OPS", "ragged_of"]

Json = Mapping[str, Any]


def ragged_of(value: Any) -> tuple[list[int], list[int]]:
    """Values and row splits of either form a vector may give a ragged array in."""
    if isinstance(value, dict):
        return value["values"], value["row_splits"]
    splits = [0]
    for row in value:
        splits.append(splits[-1] + len(row))
    return [each for row in value for each in row], splits


def numbers(values: Any) -> np.ndarray:
    return np.asarray(floats(values), np.float32)


def tensor(values: Any) -> np.ndarray:
    """float32 or int64, as the numbers are written."""
    array = np.asarray(floats(values))
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)


def split_by_indices(inputs: Json) -> Any:
    (values,) = (each for name, each in inputs.items() if name not in ("indices", "num_splits"))
    return id_ops.split_by_indices(inputs["indices"], tensor(values), inputs["num_splits"])


def split_by_indices_gradient(inputs: Json) -> Any:
    tail = tuple(inputs.get("shape_tail", ()))
    grads = [numbers(each).reshape(-1, *tail) for each in inputs["grads"]]
    return id_ops.split_by_indices_gradient(inputs["indices"], grads, inputs["num_splits"])


def ragged_split_by_indices(inputs: Json) -> Any:
    values, positions = id_ops.ragged_split_by_indices(
        inputs["indices"], *ragged_of(inputs["num"]), inputs["num_splits"]
    )
    return [
        Partial(values=value.values, row_splits=value.row_splits, pos=position.values)
        for value, position in zip(values, positions, strict=True)
    ]


def reorder_by_indices(inputs: Json) -> Any:
    output, sizes = id_ops.reorder_by_indices(inputs["input"], inputs["shard_ids"], inputs["num_of_shards"])
    return Partial(output=output, shard_sizes=sizes).in_order("output", "shard_sizes")


def fused_reorder_by_indices(inputs: Json) -> Any:
    found = reorder.fused_reorder_by_indices(
        inputs["inputs"],
        inputs["num_of_shards"],
        inputs["dim_sizes"],
        rank0_empty=inputs.get("rank0_empty", True),
    )
    return Partial(found._asdict(), fused_embedding_offsets=found.fused_emb_offset).in_order(*found._fields)


def unique_key_fill_finalize(inputs: Json) -> Any:
    keys = shared_buffer.unique_key_with_value_and_offset(*ragged_of(inputs["key"]), inputs["dims"])
    result = Partial(
        unique_key=keys.unique_key,
        unique_key_split=keys.unique_key_split,
        value_offset=keys.value_offset,
        value_offset_split=keys.value_offset_split,
        buffer_size=keys.size,
    )
    if "pos" in inputs:
        pos = ragged_of(inputs["pos"])
        if "dims_fill" in inputs or len(pos[1]) - 1 != len(inputs["dims"]):
            raise InvalidRequestError("rows of positions and dims differ")
        handle = shared_buffer.fill_with_offset_map(*pos, numbers(inputs["value"]), keys)
        result["buffer"] = shared_buffer.finalize_shared_tensor([handle])
        if "buffer_grad" in inputs:
            result["value_grad"] = shared_buffer.fill_with_offset_map_gradient(
                *pos, numbers(inputs["buffer_grad"]), keys
            )
    return result


def map_id_to_embedding(inputs: Json) -> Any:
    ids, rows = inputs["ids"], [numbers(each) for each in inputs["embeddings"]]
    dim = max((each.shape[1] for each in rows if each.size), default=0)
    rows = [each if each.size else each.reshape(0, dim) for each in rows]
    return embedding_map.map_id_to_embedding(ids, rows, inputs["input"])


def map_id_to_embedding_gradient(inputs: Json) -> Any:
    return embedding_map.map_id_to_embedding_gradient_back_prop(
        inputs["ids"], inputs["input"], numbers(inputs["grads"])
    )


def gather_embeddings_by_input(inputs: Json) -> Any:
    rows, mapping = embedding_map.gather_embeddings_by_input(
        inputs["ids"], numbers(inputs["embeddings"]), inputs["input"]
    )
    found = Partial(output=rows, outputs=rows, embeddings=rows, index_mapping=mapping)
    return found.in_order("output", "index_mapping")


def gather_embeddings_by_input_gradient(inputs: Json) -> Any:
    return embedding_map.gather_embeddings_by_ids_gradient_back_prop(
        inputs["ids"], numbers(inputs["grads"]), inputs["index_mapping"]
    )


def tiled(lists: Sequence[Any], times: int) -> list[Any]:
    """Each list repeated."""
    return [each * times for each in lists]


def fused_gather_embeddings_by_input(inputs: Json) -> Any:
    offsets = tiled(inputs["offsets"], inputs.get("repeat", 1))
    return fused_gather.fused_gather_embeddings_by_input(numbers(inputs["fused_embeddings"]), offsets, inputs["dims"])


def fused_gather_embeddings_by_input_gradient(inputs: Json) -> Any:
    times = inputs.get("repeat", 1)
    grads = [numbers(each) for each in tiled(inputs["grads"], times)]
    return fused_gather.fused_gather_embeddings_by_input_gradient(
        inputs["size"], grads, tiled(inputs["offsets"], times), inputs["dims"], scale=inputs.get("scale", 1.0)
    )


def rows_of(values: Any) -> np.ndarray:
    array = numbers(values)
    return array.reshape(0, array.shape[-1] if array.ndim > 1 else 0) if array.size == 0 else array


def reduction(op: Any) -> Any:
    return lambda inputs: op(inputs["rowids"], rows_of(inputs["values"]), inputs["rows"])


def reduction_gradient(op: Any) -> Any:
    return lambda inputs: op(inputs["rowids"], numbers(inputs["grads"]))


def fused_reduce_sum_and_split(inputs: Json) -> Any:
    return row_ops.fused_reduce_sum_and_split(
        inputs["rowids"], numbers(inputs["values"]), inputs["rows"], inputs["split_dims"]
    )


def fused_reduce_sum_and_split_gradient(inputs: Json) -> Any:
    return row_ops.fused_reduce_sum_and_split_gradient(inputs["rowids"], [numbers(each) for each in inputs["grads"]])


def fused_sorted_segment_sum(inputs: Json) -> Any:
    outputs = row_ops.fused_sorted_segment_sum(
        inputs["indices"], [numbers(each) for each in inputs["values"]], inputs["shapes"]
    )
    ones = [np.ones_like(each) for each in outputs]
    grads = row_ops.fused_sorted_segment_sum_gradient(inputs["indices"], ones)
    return Partial(outputs=outputs, grads_for_ones=grads)


def fused_reduce_and_split_gpu(inputs: Json) -> Any:
    splits, dims = inputs["row_splits"], inputs["slice_dims"]
    outputs = row_ops.fused_reduce_and_split(splits, [numbers(each) for each in inputs["embeddings"]], dims)
    given = inputs.get("slice_grads")
    grads = [np.ones_like(each) for each in outputs] if given is None else [numbers(each) for each in given]
    return Partial(outputs=outputs, grads=row_ops.fused_reduce_and_split_gradient(splits, grads, dims))


def aligned_flat_concat_split(inputs: Json) -> Any:
    arrays = [numbers(each) for each in inputs["arrays"]]
    align = {"align": inputs["align"]} if "align" in inputs else {}
    flat = packing.aligned_flat_concat(arrays, inputs.get("scale", 1.0), **align)
    return Partial(flat=flat, split=packing.aligned_flat_split(arrays, flat, **align))


def pack_tensors(inputs: Json) -> Any:
    arrays = {key: tensor(each) for key, each in inputs.get("tensors", inputs.get("dict", {})).items()}
    flat, sizes = packing.pack_tensors(arrays)
    back = packing.unpack_tensors({key: each.shape for key, each in arrays.items()}, (flat, sizes))
    return Partial(flat=flat, packed=flat, sizes=sizes, unpacked=back).in_order("flat", "sizes")


def pack_typed_keyed_tensors(inputs: Json) -> Any:
    groups = [{key: tensor(each) for key, each in group.items()} for group in inputs["list"]]
    packed = packing.pack_typed_keyed_tensors(groups)
    shapes = [{key: each.shape for key, each in group.items()} for group in groups]
    for group, back in zip(groups, packing.unpack_packed_tensors(shapes, packed), strict=True):
        assert all(np.array_equal(each, back[key]) for key, each in group.items())
    return packed


def static_reshape(inputs: Json) -> Any:
    arrays = [np.zeros(shape, np.float32) for shape in inputs["shapes"]]
    reshaped, sizes = packing.static_reshape(arrays, inputs["targets"])
    return {"shapes": [list(each.shape) for each in reshaped], "sizes": sizes}


def unique_first_occurrence(inputs: Json) -> Any:
    fids = inputs["fids"]
    values, indices = id_ops.unique_first_occurrence(
        np.array(fids, np.int64 if min(fids, default=0) < 0 else np.uint64)
    )
    return Partial(unique=values, indices=indices).in_order("unique", "indices")


OPS = {
    "split_by_indices": split_by_indices,
    "split_by_indices_gradient": split_by_indices_gradient,
    "ragged_split_by_indices": ragged_split_by_indices,
    "reorder_by_indices": reorder_by_indices,
    "fused_reorder_by_indices": fused_reorder_by_indices,
    "unique_key_fill_finalize": unique_key_fill_finalize,
    "map_id_to_embedding": map_id_to_embedding,
    "map_id_to_embedding_gradient": map_id_to_embedding_gradient,
    "gather_embeddings_by_input": gather_embeddings_by_input,
    "gather_embeddings_by_input_gradient": gather_embeddings_by_input_gradient,
    "fused_gather_embeddings_by_input": fused_gather_embeddings_by_input,
    "fused_gather_embeddings_by_input_gradient": fused_gather_embeddings_by_input_gradient,
    "reduce_sum": reduction(row_ops.reduce_sum),
    "reduce_mean": reduction(row_ops.reduce_mean),
    "reduce_sqrtn": reduction(row_ops.reduce_norm),
    "reduce_sum_gradient": reduction_gradient(row_ops.reduce_sum_gradient),
    "reduce_mean_gradient": reduction_gradient(row_ops.reduce_mean_gradient),
    "reduce_sqrtn_gradient": lambda inputs: row_ops.reduce_norm_gradient(
        inputs["rowids"], numbers(inputs["values"]), numbers(inputs["grads"])
    ),
    "fused_reduce_sum_and_split": fused_reduce_sum_and_split,
    "fused_reduce_sum_and_split_gradient": fused_reduce_sum_and_split_gradient,
    "fused_sorted_segment_sum": fused_sorted_segment_sum,
    "fused_reduce_and_split_gpu": fused_reduce_and_split_gpu,
    "aligned_flat_concat_split": aligned_flat_concat_split,
    "normalize_merged_split": lambda inputs: id_ops.normalize_merged_split(
        inputs["row_split"], inputs["row_split_size"]
    ),
    "fused_value_rowids": lambda inputs: ragged.value_rowids(inputs["row_splits"]),
    "pack_tensors": pack_tensors,
    "pack_typed_keyed_tensors": pack_typed_keyed_tensors,
    "static_reshape": static_reshape,
    "unique_first_occurrence": unique_first_occurrence,
}
