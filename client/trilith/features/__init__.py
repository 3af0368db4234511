"""What a model says about its features: slots, columns, slices, how rows become one, and how updates are made."""

from trilith.features.combiners import Combiner, FirstN, ReduceMean, ReduceSum, combine, combiner_of, row_mask
from trilith.features.slices import create_embedding_slices, dummy_lookup_shape
from trilith.features.slots import (
    FeatureColumn,
    FeatureRegistry,
    FeatureSlice,
    FeatureSlot,
    FeatureSlotConfig,
    SlotSegment,
    merge_slices,
)
from trilith.features.updates import (
    ClipType,
    GradientUpdate,
    UserEmbeddingCheck,
    clip_by_global_norm,
    clip_gradients,
    global_norm,
)

__all__ = [
    "ClipType",
    "Combiner",
    "FeatureColumn",
    "FeatureRegistry",
    "FeatureSlice",
    "FeatureSlot",
    "FeatureSlotConfig",
    "FirstN",
    "GradientUpdate",
    "ReduceMean",
    "ReduceSum",
    "SlotSegment",
    "UserEmbeddingCheck",
    "clip_by_global_norm",
    "clip_gradients",
    "combine",
    "combiner_of",
    "create_embedding_slices",
    "dummy_lookup_shape",
    "global_norm",
    "merge_slices",
    "row_mask",
]
