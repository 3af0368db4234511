"""Vectors of features: combiners, slices, slots, rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.conformance.configs import floats, rate_of, table_of
from trilith.features import (
    Combiner,
    FeatureSlot,
    FeatureSlotConfig,
    SlotSegment,
    combiner_of,
    create_embedding_slices,
    dummy_lookup_shape,
    merge_slices,
    row_mask,
)
from trilith.ops.pool import pool_rows
from trilith.tables import Fp32, PolynomialDecay

__all__ = ["OPS"]

Json = Mapping[str, Any]


def combiner(text: str) -> Combiner:
    """The combiner that "ReduceSum", "ReduceMean" or "FirstN(n)" stands for."""
    return combiner_of(text.removesuffix("()").removeprefix("Reduce").lower().replace("firstn", "first"))


def rows(values: Any) -> np.ndarray:
    array = np.asarray(floats(values), np.float32)
    return array if array.ndim == 2 else array.reshape(len(array), -1 if array.size else 0)


def create_slices(inputs: Json) -> Any:
    features = inputs["features"]
    return create_embedding_slices(
        {name: rows(each["embedding"]) for name, each in features.items()},
        {name: each["row_splits"] for name, each in features.items()},
        {name: combiner(each["combiner"]) for name, each in features.items()},
        {name: each["slice_dims"] for name, each in features.items()},
    )


def _segment(given: Json) -> SlotSegment:
    proto = table_of({"segments": [given]}).entry_config.segments[0]
    return SlotSegment(
        dim=given["dim"],
        initializer=proto.init_config,
        optimizer=proto.opt_config,
        compressor=proto.comp_config if proto.HasField("comp_config") else Fp32(),
        learning_rate=rate_of(given["learning_rate_fn"]) if "learning_rate_fn" in given else None,
    )


def merge(inputs: Json) -> Any:
    segments = [_segment(each) for each in inputs["slices"]]
    merged, rates = merge_slices(segments)
    return {
        "merged_dims": [each.dim_size for each in merged],
        "unmerged_dims": [each.dim for each in segments],
        "learning_rates": [rate_as_json(each) for each in rates],
    }


def rate_as_json(rate: Any) -> Any:
    if not isinstance(rate, PolynomialDecay):
        return rate
    return {"polynomial_decay": [rate.initial_learning_rate, rate.decay_steps, rate.end_learning_rate]}


def feature_slot_slices(inputs: Json) -> Any:
    slot = FeatureSlot(FeatureSlotConfig(name="slot", has_bias=inputs.get("has_bias", False)))
    for dim in inputs["dims"]:
        slot.add_feature_slice(dim)
    return [[each.start, each.end] for each in slot.slices]


def polynomial_decay(inputs: Json) -> Any:
    decay = PolynomialDecay(*inputs["params"])
    return [decay(step) for step in inputs["steps"]]


OPS = {
    "combine": lambda inputs: pool_rows(
        rows(inputs["embedding"]), np.array(inputs["row_splits"], np.int64), combiner(inputs["combiner"])
    ),
    "create_embedding_slices": create_slices,
    "dummy_embedding_lookup_shape": lambda inputs: dummy_lookup_shape(
        inputs["batch_size"], inputs["start"], inputs["end"], inputs.get("seq_length") or 0
    ),
    "feature_slot_slices": feature_slot_slices,
    "merge_slices": merge,
    "polynomial_decay": polynomial_decay,
    "row_mask": lambda inputs: row_mask(inputs["seq_length"], inputs["row_lengths"]),
}
