"""Vectors of fused layouts, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.conformance.configs import floats
from trilith.ops.combiners import Combiner, FirstN, combiner_of
from trilith.ops.layout import FidOffsets, fused_embedding_to_layout, fused_embedding_to_layout_grad
from trilith.ops.layout_config import FeatureConfig, FeatureConfigs, OutConfig, OutType, SliceConfig

__all__ = ["OPS", "configs_of"]

Json = Mapping[str, Any]


def pooling_of(feature: Json) -> Combiner:
    """The combiner that a feature's pooling stands for."""
    pooling = feature.get("pooling", "SUM")
    return FirstN(feature["max_sequence_length"]) if pooling == "FIRSTN" else combiner_of(pooling.lower())


def configs_of(features: Json, layouts: Json) -> FeatureConfigs:
    """Configs as vectors write them."""
    return FeatureConfigs(
        {
            name: FeatureConfig(
                table=each["table"],
                slice_dims=tuple(each["slice_dims"]),
                combiner=pooling_of(each),
            )
            for name, each in features.items()
        },
        {
            name: OutConfig(
                slices=tuple(SliceConfig(*slice_) for slice_ in each["slices"]), out_type=OutType[each["out_type"]]
            )
            for name, each in layouts.items()
        },
    )


def offsets_of(inputs: Json) -> FidOffsets:
    names = {"row_splits": "fid_list_row_splits", "emb_row_lengths": "fid_list_emb_row_lenth"}
    plain = ("version", "ps_num", "batch_size", "nfl_size", "feature_size", "fid_size", "emb_size")
    return FidOffsets(
        fid_offset=np.array(inputs["fid_offset"], np.uint64),
        feature_offset=np.array(inputs["feature_offset"], np.int32),
        nfl_offset=np.array(inputs["nfl_offset"], np.uint32),
        **{name: inputs[name] for name in plain if name in inputs},
        **{name: inputs[given] for name, given in names.items() if given in inputs},
    )


def embeddings_of(inputs: Json) -> Any:
    given = floats(inputs["embeddings_list"])
    if inputs["version"] == 4:
        return np.array(given, np.float32)
    return [np.array(each, np.float32) for each in given]


def forward(inputs: Json) -> Any:
    configs = configs_of(inputs["feature_configs"], inputs["out_configs"])
    return fused_embedding_to_layout(embeddings_of(inputs), offsets_of(inputs), configs)


def backward(inputs: Json) -> Any:
    configs = configs_of(inputs["feature_configs"], inputs["out_configs"])
    grads = [np.array(floats(each), np.float32) for each in inputs["tensors_grad"]]
    scale = inputs.get("layout_tensors_grad_scale", inputs.get("scale", 1.0))
    found = fused_embedding_to_layout_grad(grads, embeddings_of(inputs), offsets_of(inputs), configs, scale=scale)
    return found[0] if inputs["version"] == 4 else found


OPS = {"fused_embedding_to_layout": forward, "fused_embedding_to_layout_grad": backward}
