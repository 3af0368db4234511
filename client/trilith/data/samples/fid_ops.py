"""Ops on fids: on ragged arrays that parsing gave, and on features of messages before parsing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from trilith.data.fids import city_hash64, make_fid_v1, make_fid_v2, reslot_v1, reslot_v2
from trilith.data.messages import Message, message_of
from trilith.data.records import Kind, Records
from trilith.data.samples.relations import Bits, count_distinct
from trilith.errors import DataError, InvalidRequestError
from trilith.ops.ragged import Ragged
from trilith_proto import example_pb2

__all__ = [
    "FeatureHash",
    "MessageOp",
    "SwitchSlotBatch",
    "feature_combine",
    "gen_fid_mask",
    "map_id",
    "switch_slot",
    "zeros_like_rows",
]

_NONE = np.uint64(0)
_M = TypeVar("_M", bound=Message)


# ---- ragged arrays ---------------------------------------------------------------------------------------------------


def switch_slot(fids: Ragged[Any], slot: int) -> Ragged[np.int64]:
    """v2 fids in another slot; the signature is 48 bits, so nothing of the old slot is left."""
    return Ragged(reslot_v2(fids.values, slot).view(np.int64), fids.row_splits)


def feature_combine(a: Ragged[Any], b: Ragged[Any], slot: int) -> Ragged[np.int64]:
    """Combine every fid of a row of `a` with every one of the same row of `b`, into v2 fids of `slot`.

    The signature is the high half of the signed 128-bit product, exclusive or the low half.

    Args:
        a: n rows; the outer loop of the product.
        b: n rows.
        slot: Of the result.
    """
    if len(a) != len(b):
        raise InvalidRequestError(f"a has {len(a)} rows and b has {len(b)}; rows are combined pairwise")
    inner = np.repeat(b.lengths, a.lengths)
    left = np.repeat(a.values[a.row_splits[0] : a.row_splits[-1]].view(np.int64), inner)
    ends = np.cumsum(inner)
    within = np.arange(left.size) - np.repeat(ends - inner, inner)
    right = b.values.view(np.int64)[np.repeat(np.repeat(b.row_splits[:-1], a.lengths), inner) + within]
    fids = make_fid_v2(slot, _high_half(left, right) ^ (left * right).view(np.uint64))
    return Ragged.of_lengths(fids.view(np.int64), a.lengths * b.lengths)


def _high_half(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """The upper 64 bits of signed products."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = left.view(np.uint64), right.view(np.uint64)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    carry = x0 * y1 + (middle & low)
    unsigned = x1 * y1 + (middle >> half) + (carry >> half)
    # Each factor below zero was read as 2^64 too large.
    high: npt.NDArray[np.uint64] = unsigned - np.where(left < 0, y, _NONE) - np.where(right < 0, x, _NONE)
    return high


def gen_fid_mask(fids: Ragged[Any], fid: int) -> npt.NDArray[np.float32]:
    """float32[n]: 1 for rows that contain a fid, given unsigned or as the int64 of the same bits."""
    return (count_distinct(np.array([fid & 0xFFFFFFFFFFFFFFFF], np.uint64), Bits(fids)) > 0).astype(np.float32)


@overload
def map_id(ids: Ragged[Any], mapping: Mapping[int, int], default: int = -1) -> Ragged[np.int64]: ...
@overload
def map_id(ids: npt.ArrayLike, mapping: Mapping[int, int], default: int = -1) -> npt.NDArray[np.int64]: ...
def map_id(ids: Any, mapping: Mapping[int, int], default: int = -1) -> Any:
    """Replace every id by what the mapping has for it, by `default` where it has nothing."""
    if isinstance(ids, Ragged):
        return Ragged(map_id(ids.values, mapping, default), ids.row_splits)
    values = np.asarray(ids, np.int64)
    if not mapping:
        return np.full(values.shape, default, np.int64)
    keys = np.array(sorted(mapping), np.int64)
    targets = np.array([mapping[int(key)] for key in keys], np.int64)
    place = np.minimum(np.searchsorted(keys, values), keys.size - 1)
    return np.where(keys[place] == values, targets[place], default)


def zeros_like_rows(records: Records) -> npt.NDArray[np.int64]:
    """int64[n]: a zero for each record, for pipelines that are tested without parsing."""
    return np.zeros(len(records), np.int64)


# ---- messages --------------------------------------------------------------------------------------------------------


class MessageOp(ABC):
    """An op that edits one message at a time."""

    @abstractmethod
    def on(self, message: _M) -> _M:
        """An edited copy of an Example or ExampleBatch."""

    def __call__(self, records: Records) -> Records:
        """The records, each edited."""
        if records.kind not in (Kind.EXAMPLE, Kind.EXAMPLE_BATCH):
            raise InvalidRequestError(f"{type(self).__name__} edits examples; these records are {str(records.kind)!r}")
        made = Records.of([each.SerializeToString() for each in self._edited(records)], records.kind)
        return records.replace(buffer=made.buffer, offsets=made.offsets, lengths=made.lengths)

    def _edited(self, records: Records) -> Iterator[Any]:
        for index, payload in enumerate(records.payloads()):
            try:
                message: Any = message_of(payload, records.kind)
            except DataError as error:
                raise DataError(f"{records.where(index)}: {error}") from None
            yield self.on(message)


@dataclass(frozen=True)
class SwitchSlotBatch(MessageOp):
    """Put the fids of named features into other slots.

    Attributes:
        features: Per name whether the feature itself is changed, else a changed copy is added, and the slot.
        suffix: A copy is called name_suffix; it has the id, sorted id and type of list of the original.
    """

    features: Mapping[str, tuple[bool, int]]
    suffix: str = "share"

    def __post_init__(self) -> None:
        for _, slot in self.features.values():
            make_fid_v2(slot, 0)

    def on(self, message: _M) -> _M:
        """An edited copy."""
        made: Any = type(message)()
        made.CopyFrom(message)
        columns = made.named_feature if isinstance(made, example_pb2.Example) else made.named_feature_list
        for column in list(columns):
            if column.name in self.features:
                inplace, slot = self.features[column.name]
                target = column
                if not inplace:
                    target = columns.add()
                    target.CopyFrom(column)
                    target.name = f"{column.name}_{self.suffix}"
                features = (target.feature,) if isinstance(target, example_pb2.NamedFeature) else target.feature
                for feature in features:
                    _reslot(feature, slot)
        return made  # type: ignore[no-any-return]


def _reslot(feature: example_pb2.Feature, slot: int) -> None:
    kind = feature.WhichOneof("type")
    if kind is None or not kind.startswith("fid_"):
        return
    filled = getattr(feature, kind)
    if "_v1_" in kind:
        make_fid_v1(slot, 0)
    reslot = reslot_v1 if "_v1_" in kind else reslot_v2
    for each in filled.list if kind.endswith("lists") else (filled,):
        each.value[:] = reslot(np.array(each.value, np.uint64), slot).tolist()


@dataclass(frozen=True)
class FeatureHash(MessageOp):
    """Examples of nothing but line id, labels and some features, whose strings are hashed to v2 fids.

    The signature is CityHash64 of the first eight bytes of "value-name", with zero bytes behind a shorter text. Numbers
    are kept as they are.

    Attributes:
        names: Of features and raw features; a mapping gives the slot of each one's fids, which is 0 otherwise.
    """

    names: Mapping[str, int] | Sequence[str]

    def __post_init__(self) -> None:
        for slot in self._slots.values():
            make_fid_v2(slot, 0)

    @cached_property
    def _slots(self) -> dict[str, int]:
        return dict(self.names) if isinstance(self.names, Mapping) else dict.fromkeys(self.names, 0)

    def on(self, message: _M) -> _M:
        """The Example of hashed features."""
        if not isinstance(message, example_pb2.Example):
            raise InvalidRequestError("FeatureHash edits Examples, not ExampleBatches")
        made: Any = example_pb2.Example(label=message.label)
        if message.HasField("line_id"):
            made.line_id.CopyFrom(message.line_id)
        for named in message.named_feature:
            self._add(made, named.name, named.id, (named.feature,))
        for raw in message.named_raw_feature:
            self._add(made, raw.name, raw.id, raw.raw_feature.feature)
        return made  # type: ignore[no-any-return]

    def _add(self, made: example_pb2.Example, name: str, number: int, features: Sequence[example_pb2.Feature]) -> None:
        if name not in self._slots:
            return
        added = made.named_feature.add(name=name, id=number).feature
        for feature in features:
            if feature.WhichOneof("type") != "bytes_list":
                added.MergeFrom(feature)
                continue
            for value in feature.bytes_list.value:
                text = (value + b"-" + name.encode())[:8].ljust(8, b"\0")
                added.fid_v2_list.value.append(make_fid_v2(self._slots[name], city_hash64(text)))
