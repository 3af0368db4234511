"""Conversions between the kinds of messages that records hold, one message at a time and whole chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any, Literal

import numpy as np
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from trilith.data.records import Kind, Records
from trilith.errors import DataError, InvalidRequestError
from trilith_proto import example_pb2, feature_pb2, proto_parser_pb2, tf_example_pb2

__all__ = [
    "HINT",
    "INSTANCE_WEIGHT",
    "LABEL",
    "LINE_ID",
    "RESERVED",
    "Message",
    "Pruning",
    "batch_to_examples",
    "batch_to_instances",
    "convert",
    "example_to_instance",
    "instance_to_example",
    "is_tf_example",
    "message_of",
    "messages",
    "promote",
    "prune",
    "read_message",
]

LINE_ID = "__LINE_ID__"
LABEL = "__LABEL__"
INSTANCE_WEIGHT = "instance_weight"
RESERVED = frozenset((LINE_ID, LABEL, INSTANCE_WEIGHT))
"""Named features that carry the line id, the labels and the weight of an Example or of the rows of an ExampleBatch."""

HINT = "these are tf.Examples: make Examples of them with trilith.compat.monolith.tf_example.TFExampleConverter"
"""What to tell whoever reads tf.Examples as something else."""

Message = proto_parser_pb2.Instance | example_pb2.Example | example_pb2.ExampleBatch

_CLASSES: dict[Kind, type[Message]] = {
    Kind.INSTANCE: proto_parser_pb2.Instance,
    Kind.EXAMPLE: example_pb2.Example,
    Kind.EXAMPLE_BATCH: example_pb2.ExampleBatch,
}

# Which list of an Example's feature each field of an Instance's feature becomes; the first that is filled counts.
_FROM_INSTANCE = {
    "fid": "fid_v2_list",
    "float_value": "float_list",
    "int64_value": "int64_list",
    "bytes_value": "bytes_list",
    "fid_list": "fid_v2_lists",
    "float_list": "float_lists",
    "int64_list": "int64_lists",
    "bytes_list": "bytes_lists",
}
_TO_INSTANCE = {there: here for here, there in _FROM_INSTANCE.items()}


class Pruning(IntEnum):
    """What reading leaves out."""

    AS_IS = 0
    NAMED = 1
    RAW = 2


# ---- one message -----------------------------------------------------------------------------------------------------


def promote(example: example_pb2.Example) -> None:
    """Move what reserved features say into the fields of `example`, in place; the features stay.

    Labels are appended, so a message is promoted once, when it is read.
    """
    seen = set()
    for named in example.named_feature:
        if named.name not in RESERVED:
            continue
        _set_reserved(example, named.name, named.feature)
        seen.add(named.name)
        if len(seen) == len(RESERVED):
            return


def _set_reserved(target: Any, name: str, feature: example_pb2.Feature) -> None:
    """Put the content of a reserved feature into the field of an Example or Instance that it stands for."""
    if name == LABEL:
        target.label.extend(feature.float_list.value)
    elif name == INSTANCE_WEIGHT:
        values = feature.float_list.value
        target.instance_weight = values[0] if values else 1.0
    elif feature.bytes_list.value:
        try:
            target.line_id.ParseFromString(feature.bytes_list.value[0])
        except DecodeError:
            raise DataError(f"the feature {LINE_ID!r} holds no serialized LineId") from None


def prune(message: Message, pruning: Pruning) -> None:
    """Drop features of a message in place; the reserved features of an ExampleBatch stay."""
    if isinstance(message, proto_parser_pb2.Instance):
        return
    if isinstance(message, example_pb2.Example):
        if pruning is Pruning.NAMED:
            del message.named_feature[:]
        elif pruning is Pruning.RAW:
            del message.named_raw_feature[:]
    elif pruning is Pruning.NAMED:
        kept = [each for each in message.named_feature_list if each.name in RESERVED]
        del message.named_feature_list[:]
        message.named_feature_list.extend(kept)
    elif pruning is Pruning.RAW:
        del message.named_raw_feature_list[:]


def instance_to_example(instance: proto_parser_pb2.Instance) -> example_pb2.Example:
    """The Example that says the same; flat fids become a feature `fc_slot_N` per slot, in order of first appearance."""
    example = example_pb2.Example(
        label=instance.label, instance_weight=instance.instance_weight if instance.HasField("instance_weight") else 1.0
    )
    if instance.HasField("line_id"):
        example.line_id.CopyFrom(instance.line_id)
    if instance.value:
        _add(example, "value").float_list.value.extend(instance.value)
    slots: dict[int, list[int]] = {}
    for fid in instance.fid:
        slots.setdefault(fid >> 54, []).append(fid)
    for slot, fids in slots.items():
        _add(example, f"fc_slot_{slot}").fid_v1_list.value.extend(fids)
    for feature in instance.feature:
        added = _add(example, feature.name)
        for field, values in feature.ListFields():  # in the order of numbers
            if field.name != "name":
                _fill(added, _FROM_INSTANCE[field.name], values)
                break
    return example


def _add(example: example_pb2.Example, name: str) -> example_pb2.Feature:
    return example.named_feature.add(name=name, id=len(example.named_feature)).feature


def _fill(added: example_pb2.Feature, target: str, values: Any) -> None:
    """Fill a list, or a list of lists, of an Example's feature with values of an Instance's feature."""
    if target.endswith("_lists"):
        lists = getattr(added, target).list
        for each in values:
            lists.add().value.extend(each.value)
    else:
        getattr(added, target).value.extend(values)


def example_to_instance(example: example_pb2.Example) -> proto_parser_pb2.Instance:
    """The Instance with the named features of `example`.

    Labels, line id and weight come from the reserved features alone; names of features of v1 fids are lost.
    """
    instance = proto_parser_pb2.Instance()
    for named in example.named_feature:
        _add_to_instance(instance, named.name, named.feature)
    return instance


def _add_to_instance(instance: proto_parser_pb2.Instance, name: str, feature: example_pb2.Feature) -> None:
    kind = feature.WhichOneof("type")
    if name in RESERVED:
        _set_reserved(instance, name, feature)
    elif kind == "fid_v1_list":
        instance.fid.extend(feature.fid_v1_list.value)
    elif kind is not None:
        added = instance.feature.add(name=name)
        if kind in _TO_INSTANCE:
            _fill_instance(added, _TO_INSTANCE[kind], getattr(feature, kind))


def _fill_instance(added: feature_pb2.Feature, target: str, source: Any) -> None:
    if target.endswith("_list"):
        lists = getattr(added, target)
        for each in source.list:
            lists.add().value.extend(each.value)
    else:
        getattr(added, target).extend(source.value)


def batch_to_examples(batch: example_pb2.ExampleBatch, pruning: Pruning = Pruning.RAW) -> Iterator[example_pb2.Example]:
    """The rows of `batch` as Examples; reserved features become fields only."""
    return map(example_pb2.Example.FromString, _example_rows(batch, pruning))


def _example_rows(batch: example_pb2.ExampleBatch, pruning: Pruning) -> list[bytes]:
    """The rows of `batch` as serialized Examples.

    Features go from message to message as bytes: measured on 40 columns of 10 fids, 2.5 times the speed of copying.
    """
    _check_batch(batch, raw=pruning is not Pruning.RAW)
    rest = [example_pb2.Example(data_source_key=batch.data_source_key) for _ in range(batch.batch_size)]
    columns = []
    for column in batch.named_feature_list:
        if column.name in RESERVED:
            for example, feature in zip(rest, _spread(column, column.feature, batch.batch_size), strict=True):
                _set_reserved(example, column.name, feature)
        elif pruning is not Pruning.NAMED:
            columns.append(_spread(column, _wrapped(1, column, column.feature), batch.batch_size))
    if pruning is not Pruning.RAW:
        columns += [
            _spread(raw, _wrapped(2, raw, raw.raw_feature), batch.batch_size) for raw in batch.named_raw_feature_list
        ]
    columns.append([example.SerializeToString() for example in rest])
    return [b"".join(parts) for parts in zip(*columns, strict=True)]


def _spread(column: Any, values: Sequence[Any], rows: int) -> list[Any]:
    """One value per row; a shared column has the same one in all."""
    return [values[0]] * rows if column.type == example_pb2.SHARED else list(values)


def _wrapped(number: int, column: Any, features: Any) -> list[bytes]:
    """Each feature of a column as field `number` of an Example: a message of its name, the feature and its id."""
    name = _delimited(1, column.name.encode())
    end = b"\x18" + _varint(column.id & (2**64 - 1)) if column.id else b""
    return [_delimited(number, name + _delimited(2, each.SerializeToString()) + end) for each in features]


def _delimited(number: int, content: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def batch_to_instances(
    batch: example_pb2.ExampleBatch, pruning: Pruning = Pruning.RAW
) -> Iterator[proto_parser_pb2.Instance]:
    """The rows of `batch` as Instances."""
    _check_batch(batch, raw=False)
    columns = [
        (column.name, _spread(column, column.feature, batch.batch_size))
        for column in batch.named_feature_list
        if pruning is not Pruning.NAMED or column.name in RESERVED
    ]
    for row in range(batch.batch_size):
        instance = proto_parser_pb2.Instance(data_source_key=batch.data_source_key)
        for name, features in columns:
            _add_to_instance(instance, name, features[row])
        yield instance


def _check_batch(batch: example_pb2.ExampleBatch, *, raw: bool) -> None:
    """Refuse a batch whose columns do not have its rows, rather than ending the data there without a word."""
    columns = [(each.name, each.type, len(each.feature)) for each in batch.named_feature_list]
    if raw:
        columns += [(each.name, each.type, len(each.raw_feature)) for each in batch.named_raw_feature_list]
    for name, kind, length in columns:
        if kind == example_pb2.SHARED and not length:
            raise DataError(f"the shared column {name!r} has no feature; it needs one")
        if kind != example_pb2.SHARED and length != batch.batch_size:
            raise DataError(f"column {name!r} has {length} features in a batch of {batch.batch_size} rows")


def is_tf_example(payload: bytes) -> bool:
    """Whether bytes are a tf.Example with features, and nothing else."""
    try:
        message = tf_example_pb2.Example.FromString(payload)
    except DecodeError:
        return False
    features = message.features.feature
    if not features or len(message.SerializeToString()) != len(payload):
        return False
    return all(each.WhichOneof("kind") is not None for each in features.values()) and not any(
        len(UnknownFieldSet(each)) for each in (message, message.features, *features.values())
    )


# ---- chunks ----------------------------------------------------------------------------------------------------------


def message_of(payload: bytes, kind: Kind) -> Message:
    """A payload as a message, with nothing promoted.

    Raises:
        DataError: It is none of that kind.
    """
    if kind not in _CLASSES:
        raise InvalidRequestError(f"records of kind {str(kind)!r} are no messages")
    try:
        return _CLASSES[kind].FromString(payload)
    except DecodeError:
        hint = f"; {HINT}" if is_tf_example(payload) else ""
        raise DataError(f"the payload is no {_CLASSES[kind].DESCRIPTOR.name}{hint}") from None


def read_message(records: Records, index: int, *, pruning: Pruning = Pruning.AS_IS) -> Message:
    """One record as a message, read as the reference reads it.

    The data source key is that of the record's header whatever the payload says, and reserved features are promoted.
    """
    try:
        message = message_of(records.payload(index), records.kind)
        if isinstance(message, example_pb2.Example):
            promote(message)
    except DataError as error:
        raise DataError(f"{records.where(index)}: {error}") from None
    key = int(records.source_keys[index])
    if message.data_source_key != key:  # setting a field of an Instance to its default would be written out
        message.data_source_key = key
    prune(message, pruning)
    return message


def messages(records: Records, *, pruning: Pruning = Pruning.AS_IS) -> Iterator[Message]:
    """Every record as a message, as `read_message` reads it."""
    return (read_message(records, index, pruning=pruning) for index in range(len(records)))


def convert(
    records: Records,
    kind: Kind | str,
    *,
    pruning: Pruning | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    lost: Callable[[int], None] | None = None,
) -> Records:
    """The records as another kind; where each came from stays known.

    Plaintext is the payload of anything, and an ExampleBatch becomes one record per row.

    Args:
        records: Of any kind but plaintext.
        kind: Wanted.
        pruning: Features to leave out; by default raw features, but nothing of records that have the wanted kind.
        on_error: Raise `DataError` for the first damaged record, or leave damaged records out.
        lost: Called with how many records were left out, if any.
    """
    kind = Kind(kind)
    if kind is Kind.PLAINTEXT:
        return records.replace(buffer=records.buffer, offsets=records.offsets, lengths=records.lengths, kind=kind)
    same = kind is records.kind
    if same and pruning in (None, Pruning.AS_IS):
        return records
    if not same and (records.kind is Kind.PLAINTEXT or kind is Kind.EXAMPLE_BATCH):
        hint = "say which kind these are" if records.kind is Kind.PLAINTEXT else "choose instance, example or plaintext"
        raise InvalidRequestError(f"records of kind {str(records.kind)!r} cannot be made into {str(kind)!r}: {hint}")
    pruning = Pruning.RAW if pruning is None else Pruning(pruning)
    payloads: list[bytes] = []
    rows = np.zeros(len(records), np.int64)
    damaged = 0
    for index in range(len(records)):
        try:
            made = [_pruned(records, index, pruning)] if same else _converted(records, index, kind, pruning)
        except DataError:
            if on_error == "raise":
                raise
            damaged += 1
            continue
        payloads += made
        rows[index] = len(made)
    if damaged and lost is not None:
        lost(damaged)
    written = Records.of(payloads, kind)
    return records.take(np.repeat(np.arange(len(records)), rows)).replace(
        buffer=written.buffer, offsets=written.offsets, lengths=written.lengths, kind=kind
    )


def _converted(records: Records, index: int, kind: Kind, pruning: Pruning) -> list[bytes]:
    message = read_message(records, index, pruning=pruning)
    try:
        if isinstance(message, proto_parser_pb2.Instance):
            return [instance_to_example(message).SerializeToString()]
        if isinstance(message, example_pb2.Example):
            return [example_to_instance(message).SerializeToString()]
        if kind is Kind.EXAMPLE:
            return _example_rows(message, pruning)
        return [each.SerializeToString() for each in batch_to_instances(message, pruning)]
    except DataError as error:
        raise DataError(f"{records.where(index)}: {error}") from None


def _pruned(records: Records, index: int, pruning: Pruning) -> bytes:
    """One record without some features. It is promoted only where the reserved features go, or it would be twice."""
    if pruning is Pruning.NAMED:
        return read_message(records, index, pruning=pruning).SerializeToString()
    try:
        message = message_of(records.payload(index), records.kind)
    except DataError as error:
        raise DataError(f"{records.where(index)}: {error}") from None
    prune(message, pruning)
    return message.SerializeToString()
