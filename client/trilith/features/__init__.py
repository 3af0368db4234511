"""What a model says about its features: slots, columns, slices, how rows become one, and how updates are made."""

from trilith.features.slices import create_embedding_slices, dummy_lookup_shape, row_mask
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
from trilith.ops.combiners import Combiner, FirstN, combiner_of

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
    "SlotSegment",
    "UserEmbeddingCheck",
    "clip_by_global_norm",
    "clip_gradients",
    "combiner_of",
    "create_embedding_slices",
    "dummy_lookup_shape",
    "global_norm",
    "merge_slices",
    "row_mask",
]
