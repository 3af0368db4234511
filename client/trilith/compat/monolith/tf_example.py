"""tf.Example to Example: what becomes a fid, what stays dense, what is the label."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from trilith.data.fids import MAX_SLOTS, make_fid_v2
from trilith.data.records import Kind, Records
from trilith.errors import DataError, InvalidRequestError
from trilith_proto import data_op_config_pb2, example_pb2, tf_example_pb2

__all__ = ["TFExampleConverter", "tf_example_to_example"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TFExampleConverter:
    """How tf.Examples become Examples; everything that is not named is dropped.

    Attributes:
        sparse_features: Slot by name: integers become fids of their low 48 bits, floats fids of their magnitude.
        dense_features: Names whose lists are copied.
        label: Name of the float feature that is the label; empty for none.
        instance_weight: Name of the float feature that is the weight; empty for none.
    """

    sparse_features: Mapping[str, int]
    dense_features: Sequence[str] = ()
    label: str = ""
    instance_weight: str = ""

    def __post_init__(self) -> None:
        if both := sorted(set(self.sparse_features) & set(self.dense_features)):
            raise InvalidRequestError(f"sparse_features and dense_features both have {both[0]!r}")
        for role in ("label", "instance_weight"):
            name = getattr(self, role)
            if name and (name in self.sparse_features or name in self.dense_features):
                raise InvalidRequestError(f"{role}={name!r} is a sparse or dense feature, too")
        owners: dict[int, str] = {}
        for name, slot in self.sparse_features.items():
            if not 1 <= slot < MAX_SLOTS:
                raise InvalidRequestError(f"sparse_features: slot {slot} of {name!r} is outside 1..{MAX_SLOTS - 1}")
            if owners.setdefault(slot, name) != name:
                raise InvalidRequestError(f"sparse_features: {owners[slot]!r} and {name!r} share slot {slot}")

    def as_proto(self) -> data_op_config_pb2.TFRecordFeatureDescription:
        """The configuration as the message that operators take."""
        return data_op_config_pb2.TFRecordFeatureDescription(
            sparse_features=self.sparse_features,
            dense_features=self.dense_features,
            label=self.label,
            instance_weight=self.instance_weight,
        )

    def convert(self, serialized: bytes) -> example_pb2.Example:
        """One tf.Example.

        Raises:
            DataError: It cannot be parsed.
        """
        try:
            features = tf_example_pb2.Example.FromString(serialized).features.feature
        except DecodeError as error:
            raise DataError(f"no tf.Example: {error}") from None
        example = example_pb2.Example(instance_weight=1.0)
        for name, slot in self.sparse_features.items():
            if name in features:
                added = example.named_feature.add(name=name, id=slot)
                added.feature.fid_v2_list.value.extend(_fids(name, slot, features[name]))
        for name in self.dense_features:
            if name in features:
                _copy(features[name], example.named_feature.add(name=name).feature)
        if self.label:
            if self.label not in features:
                _LOG.warning("a tf.Example has no label %r", self.label)
            else:
                example.label.extend(features[self.label].float_list.value)
        if self.instance_weight and self.instance_weight in features:
            weights = features[self.instance_weight].float_list.value
            if len(weights) == 1:
                example.instance_weight = weights[0]
        return example

    def convert_records(self, records: Records) -> Records:
        """The Examples of records that are tf.Examples."""
        payloads = []
        for index in range(len(records)):
            try:
                payloads.append(self.convert(records.payload(index)).SerializeToString())
            except DataError as error:
                raise DataError(f"{records.where(index)}: {error}") from None
        made = Records.of(payloads, Kind.EXAMPLE)
        return records.replace(buffer=made.buffer, offsets=made.offsets, lengths=made.lengths, kind=Kind.EXAMPLE)


def tf_example_to_example(
    serialized: bytes,
    sparse_features: Mapping[str, int],
    dense_features: Sequence[str] = (),
    label: str | None = None,
    instance_weight: str | None = None,
) -> example_pb2.Example:
    """The Example of one serialized tf.Example; `TFExampleConverter` says how, and checks the names once for many."""
    converter = TFExampleConverter(
        sparse_features=sparse_features,
        dense_features=dense_features,
        label=label or "",
        instance_weight=instance_weight or "",
    )
    return converter.convert(serialized)


def _fids(name: str, slot: int, feature: tf_example_pb2.Feature) -> list[int]:
    match feature.WhichOneof("kind"):
        case "int64_list":
            signatures = np.array(feature.int64_list.value, np.int64)
        case "float_list":
            values = np.abs(np.array(feature.float_list.value, np.float32)) + np.float32(1)
            # Infinity and NaN have no magnitude: they share the signature of zero.
            magnitudes = np.log2(values, where=np.isfinite(values), out=np.zeros_like(values))
            signatures = np.trunc(magnitudes).astype(np.int64)
        case "bytes_list":
            _LOG.warning("sparse feature %r holds bytes, which make no fids", name)
            return []
        case _:
            return []
    return [int(fid) for fid in make_fid_v2(slot, signatures)]


def _copy(source: tf_example_pb2.Feature, target: example_pb2.Feature) -> None:
    match source.WhichOneof("kind"):
        case "int64_list":
            target.int64_list.value.extend(source.int64_list.value)
        case "float_list":
            target.float_list.value.extend(source.float_list.value)
        case "bytes_list":
            target.bytes_list.value.extend(source.bytes_list.value)
        case _:
            pass
