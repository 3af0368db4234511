"""Sample ops: filters, label and action ops, each a small value that works on whole chunks of records.

An op is called with records and returns records; a chain of them runs through `apply_ops`, which reads and writes each
record once. `op.on(message)` is the same for one message.
"""

from trilith.data.samples.chance import NegativeSample, SpecialStrategy
from trilith.data.samples.chunk import Needs, SampleOp, Samples, apply_ops
from trilith.data.samples.fid_ops import (
    FeatureHash,
    SwitchSlotBatch,
    feature_combine,
    gen_fid_mask,
    map_id,
    switch_slot,
    zeros_like_rows,
)
from trilith.data.samples.filters import (
    FilterByFeatureValue,
    FilterByFids,
    FilterByLabel,
    FilterByValue,
)
from trilith.data.samples.heads import MultiLabelGen, ScatterLabel
from trilith.data.samples.labels import (
    AddAction,
    AddLabel,
    FillMultiRankOutput,
    LabelNormalization,
    LabelUpperBound,
    UseFieldAsLabel,
)
from trilith.data.samples.relations import Relation, relate
from trilith.data.samples.rows import INVALID_LABEL

__all__ = [
    "INVALID_LABEL",
    "AddAction",
    "AddLabel",
    "FeatureHash",
    "FillMultiRankOutput",
    "FilterByFeatureValue",
    "FilterByFids",
    "FilterByLabel",
    "FilterByValue",
    "LabelNormalization",
    "LabelUpperBound",
    "MultiLabelGen",
    "Needs",
    "NegativeSample",
    "Relation",
    "SampleOp",
    "Samples",
    "ScatterLabel",
    "SpecialStrategy",
    "SwitchSlotBatch",
    "UseFieldAsLabel",
    "apply_ops",
    "feature_combine",
    "gen_fid_mask",
    "map_id",
    "relate",
    "switch_slot",
    "zeros_like_rows",
]
