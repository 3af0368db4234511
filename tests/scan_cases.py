"""What the scanner must find in a record, said with the protobuf library; and damage that records may have."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from hypothesis import strategies as st

from trilith.data.line_ids import line_fields
from trilith.data.messages import promote
from trilith.data.parse.columns import Element, Fields
from trilith_proto import example_pb2, line_id_pb2, proto_parser_pb2

__all__ = ["EXAMPLE", "INSTANCE", "bits", "damaged", "example_rows", "examples", "instance_rows", "instances"]

NAMES = ("a", "feature_b", "a_name_of_twenty_byt", "ü", "")
SLOTS = (0, 1, 1023)
LINE = tuple(line_fields())

INSTANCE = Fields(
    label=True,
    instance_weight=True,
    line_id=LINE,
    named=tuple((name, element) for name in NAMES for element in ("fid", "float", "int", "bytes")),  # type: ignore[misc]
    slots=SLOTS,
    slots_as_v2=True,
    fids=True,
    every_fid=True,
)
EXAMPLE = Fields(
    label=True,
    instance_weight=True,
    line_id=LINE,
    named=tuple(
        (name, Element(element))
        for name in (*NAMES, "instance_weight", "__LABEL__")
        for element in ("fid", "float", "int", "bytes")
    ),
    every_fid=True,
)


def bits(value: float) -> bytes:
    """A float32 as bytes; every NaN as one: Python's own floats turn some into others."""
    return b"nan" if value != value else struct.pack("<f", value)


def _line(message: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in LINE:
        value = getattr(message, name)
        if line_fields()[name].repeated:
            out[name] = list(value)
        else:
            value = value.encode() if isinstance(value, str) else bits(value) if isinstance(value, float) else value
            out[name] = (message.HasField(name), value)
    return out


def instance_rows(payload: bytes) -> dict[Any, Any]:
    """What `extract(..., INSTANCE)` must find in one record; DecodeError if it must refuse."""
    message = proto_parser_pb2.Instance.FromString(payload)
    out: dict[Any, Any] = {
        "label": list(map(bits, message.label)),
        "weight": (message.HasField("instance_weight"), bits(message.instance_weight)),
        "fids": list(message.fid),
        "every": ([], [fid for feature in message.feature for fid in feature.fid]),
        **_line(message.line_id),
    }
    for slot in SLOTS:
        out[slot] = [(fid >> 54) << 48 | fid & 2**48 - 1 for fid in message.fid if fid >> 54 == slot]
    for name in NAMES:
        found = [feature for feature in message.feature if feature.name == name]
        out[name, "fid"] = [
            fid
            for feature in found
            for fid in (*feature.fid, *(each for part in feature.fid_list for each in part.value))
        ]
        last = found[-1] if found else proto_parser_pb2.Instance().feature.add()
        out[name, "float"] = list(map(bits, last.float_value))
        out[name, "int"] = list(last.int64_value)
        out[name, "bytes"] = list(last.bytes_value)
        out[name, "seen"] = bool(found)
    return out


def example_rows(payload: bytes) -> dict[Any, Any]:
    """What `extract(..., EXAMPLE)` must find in one record; DecodeError or DataError if it must refuse."""
    message = example_pb2.Example.FromString(payload)
    promote(message)
    out: dict[Any, Any] = {
        "label": list(map(bits, message.label)),
        "every": (
            [fid for each in message.named_feature for fid in each.feature.fid_v1_list.value],
            [fid for each in message.named_feature for fid in each.feature.fid_v2_list.value],
        ),
        **_line(message.line_id),
    }
    out["weight"] = bits(message.instance_weight)
    for name in (*NAMES, "instance_weight", "__LABEL__"):
        found = [each for each in message.named_feature if each.name == name]
        feature = found[-1].feature if found else example_pb2.Feature()
        out[name, "fid"] = [*feature.fid_v1_list.value, *feature.fid_v2_list.value]
        out[name, "float"] = [*map(bits, feature.float_list.value), *map(_narrow, feature.double_list.value)]
        out[name, "int"] = list(feature.int64_list.value)
        out[name, "bytes"] = list(feature.bytes_list.value)
        kind = feature.WhichOneof("type")
        out[name, "seen"] = (
            (example_pb2.Feature.DESCRIPTOR.fields_by_name[kind].number if kind else 255) if found else 0
        )
    return out


def _narrow(value: float) -> bytes:
    with np.errstate(over="ignore", invalid="ignore"):
        return bits(float(np.float32(value)))


# ---- strategies ------------------------------------------------------------------------------------------------------

_uint64 = st.one_of(
    st.integers(0, 2**64 - 1), st.builds(lambda s, v: s << 54 | v, st.sampled_from(SLOTS), st.integers(0, 2**54 - 1))
)
_int64 = st.integers(-(2**63), 2**63 - 1)
_int32 = st.integers(-(2**31), 2**31 - 1)
_float = st.floats(width=32, allow_nan=False)
_name = st.sampled_from((*NAMES, "nobody asked for it"))
_text = st.text(max_size=5)
_short: dict[str, int] = {"max_size": 4}

line_ids = st.builds(
    line_id_pb2.LineId,
    uid=st.none() | _uint64,
    req_time=st.none() | _int64,
    actions=st.lists(_int32, **_short),
    special_strategies=st.lists(_int32, **_short),
    sample_rate=st.none() | _float,
    user_id=st.none() | _text,
    is_draw=st.none() | st.booleans(),
    rank=st.none() | _int32,
    data_source_name=st.none() | _text,
)


def _feature(name: str, kind: str, values: list[Any]) -> Any:
    feature = proto_parser_pb2.Instance().feature.add()
    feature.name = name
    if kind.endswith("_list"):
        for value in values:
            getattr(feature, kind).add().value.extend([value, value])
    else:
        getattr(feature, kind).extend(values)
    return feature


def _values(kinds: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[tuple[str, list[Any]]]:
    return st.sampled_from(sorted(kinds)).flatmap(
        lambda kind: st.tuples(st.just(kind), st.lists(kinds[kind], **_short))
    )


_INSTANCE_KINDS = {
    "fid": _uint64,
    "float_value": _float,
    "int64_value": _int64,
    "bytes_value": st.binary(max_size=9),
    "fid_list": _uint64,
    "float_list": _float,
    "int64_list": _int64,
    "bytes_list": st.binary(max_size=3),
}
_features = st.builds(lambda name, held: _feature(name, *held), _name, _values(_INSTANCE_KINDS))


@st.composite
def instances(draw: st.DrawFn) -> bytes:
    """Sound Instances, some in pieces that merge."""
    message = proto_parser_pb2.Instance(
        fid=draw(st.lists(_uint64, max_size=8)),
        label=draw(st.lists(_float, **_short)),
        instance_weight=draw(st.none() | _float),
        line_id=draw(st.none() | line_ids),
        feature=draw(st.lists(_features, max_size=6)),
        dense=draw(st.lists(_float, max_size=2)),
        next_fid=draw(st.lists(_uint64, max_size=2)),
        data_source_key=draw(st.none() | st.integers(0, 2**32 - 1)),
    )
    if draw(st.booleans()):
        message.label_tag.add(key=draw(_int32), val=draw(_float))
    payload = message.SerializeToString()
    return payload + draw(instances()) if draw(st.integers(0, 5)) == 0 else payload


_EXAMPLE_KINDS = {
    "fid_v1_list": _uint64,
    "fid_v2_list": _uint64,
    "float_list": _float,
    "double_list": st.floats(allow_nan=False),
    "int64_list": _int64,
    "bytes_list": st.binary(max_size=9),
    "fid_v2_lists": _uint64,
    "float_lists": _float,
    "bytes_lists": st.binary(max_size=3),
    "int64_value": _int64,
    "bytes_value": st.binary(max_size=3),
    "float_value": _float,
    "double_value": st.floats(allow_nan=False),
}


def _example_feature(kind: str, values: list[Any]) -> Any:
    feature = example_pb2.Feature()
    if kind.endswith("_value"):
        setattr(feature, kind, values[0] if values else getattr(feature, kind))
    elif kind.endswith("_lists"):
        getattr(feature, kind).SetInParent()
        for value in values:
            getattr(feature, kind).list.add().value.extend([value, value])
    else:
        getattr(feature, kind).SetInParent()
        getattr(feature, kind).value.extend(values)
    return feature


_example_features = st.one_of(
    st.just(example_pb2.Feature()), _values(_EXAMPLE_KINDS).map(lambda held: _example_feature(*held))
)
_reserved = st.one_of(
    st.tuples(st.just("__LABEL__"), st.lists(_float, **_short).map(lambda v: _example_feature("float_list", v))),
    st.tuples(st.just("instance_weight"), st.lists(_float, **_short).map(lambda v: _example_feature("float_list", v))),
    st.tuples(
        st.just("__LINE_ID__"),
        st.lists(line_ids.map(lambda line: line.SerializeToString()), max_size=2).map(
            lambda v: _example_feature("bytes_list", v)
        ),
    ),
    st.tuples(st.sampled_from(("__LABEL__", "instance_weight", "__LINE_ID__")), _example_features),
)
_named = st.builds(
    lambda pair, number: example_pb2.NamedFeature(name=pair[0], feature=pair[1], id=number),
    st.tuples(_name, _example_features) | _reserved,
    _int32,
)


@st.composite
def examples(draw: st.DrawFn) -> bytes:
    """Sound Examples (but for line ids of reserved features), some in pieces that merge."""
    message = example_pb2.Example(
        named_feature=draw(st.lists(_named, max_size=6)),
        line_id=draw(st.none() | line_ids),
        label=draw(st.lists(_float, **_short)),
        instance_weight=draw(st.just(0.0) | _float),
    )
    if draw(st.booleans()):
        raw = message.named_raw_feature.add(name=draw(_text))
        raw.raw_feature.feature.append(draw(_example_features))
    payload = message.SerializeToString()
    return payload + draw(examples()) if draw(st.integers(0, 5)) == 0 else payload


_JUNK = (
    b"\xff" * 9 + b"\x01",  # a length of 2^64 - 1
    b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",  # of 2^63
    b"\xff" * 11,
    b"\xa3\x01" * 40 + b"\xa4\x01" * 40,
    b"\xa3\x01" * 200,
    b"\x07",
    b"\x00",
    b"\x4a\x05\x12\x01a\x0a\x00",
    b"\x0a\x06\x0a\x02\xc3\x28\x12\x00",
    b"\x80\x00",
    b"\x12\x08" + bytes(8),
    b"\x09" + bytes(8),
    b"\x1d" + bytes(4),
)


@st.composite
def damaged(draw: st.DrawFn, payloads: st.SearchStrategy[bytes]) -> bytes:
    """Records with bytes changed, cut out, put in, or cut off; some stay sound."""
    data = bytearray(draw(payloads))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        how = draw(st.integers(0, 3))
        if how == 0 and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif how == 1:
            del data[at : at + draw(st.integers(1, 4))]
        elif how == 2:
            data[at:at] = draw(st.sampled_from(_JUNK) | st.binary(max_size=4))
        else:
            del data[at:]
    return bytes(data)
