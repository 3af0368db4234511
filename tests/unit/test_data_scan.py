"""The scanner against the protobuf library: the same values of sound records, the same records refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scan_cases import (
    EXAMPLE,
    INSTANCE,
    bits,
    damaged,
    example_rows,
    examples,
    instance_rows,
    instances,
)
from trilith.data.messages import promote
from trilith.data.parse.columns import Columns, Element, Fields, Scalars, extract
from trilith.data.records import Records
from trilith.data.samples.rewrite import rewrite
from trilith.errors import DataError, InvalidRequestError
from trilith.ops.jit import JIT_DISABLED
from trilith.ops.ragged import Ragged
from trilith_proto import example_pb2, proto_parser_pb2

EXAMPLES = 10 if JIT_DISABLED else 70


def _bits(values: Any) -> list[bytes]:
    return [bits(value) for value in values.tolist()]


def found(columns: Columns, row: int) -> dict[Any, Any]:
    """One row of what was extracted, as `scan_cases` says it."""
    assert columns.label is not None
    assert columns.instance_weight is not None
    out: dict[Any, Any] = {"label": _bits(columns.label[row])}
    weight = columns.instance_weight
    out["weight"] = (bool(weight.present[row]), bits(float(weight.values[row])))
    for name, column in columns.line_id.items():
        if isinstance(column, Ragged):
            out[name] = column[row].tolist()
        else:
            value = column.values[row]
            plain = bits(float(value)) if isinstance(value, np.float32) else value
            out[name] = (bool(column.present[row]), plain)
    for (name, element), held in columns.named.items():
        values = held.ragged[row]
        out[name, str(element)] = _bits(values) if element == "float" else values.tolist()
        out[name, "seen"] = int(held.member[row])
    assert columns.every_fid is not None
    out["every"] = tuple(each[row].tolist() for each in columns.every_fid)
    for slot, fids in columns.slots.items():
        out[slot] = fids[row].tolist()
    if columns.fids is not None:
        out["fids"] = columns.fids[row].tolist()
    return out


def _library(payload: bytes, rows: Any) -> Any:
    try:
        return rows(payload)
    except (DecodeError, DataError):
        return None


def _compare(payloads: list[bytes], kind: str, fields: Fields, rows: Any, settle: Any) -> None:
    wanted = [_library(payload, rows) for payload in payloads]
    records = Records.of(payloads, kind)
    columns = extract(records, fields, on_error="skip")
    kept = [index for index, want in enumerate(wanted) if want is not None]
    assert columns.skipped == len(payloads) - len(kept)
    assert columns.records.numbers.tolist() == kept
    for row, index in enumerate(kept):
        got = found(columns, row)
        settle(got)
        assert got == wanted[index], payloads[index].hex()
    if len(kept) < len(payloads):
        with pytest.raises(DataError, match="record"):
            extract(records, fields)


def settle_instance(got: dict[Any, Any]) -> None:
    if not got["weight"][0]:
        got["weight"] = (False, bits(0.0))  # the library says 0 where we say the default, 1
    for key in [key for key in got if isinstance(key, tuple) and key[1] == "seen"]:
        got[key] = bool(got[key])


def settle_example(got: dict[Any, Any]) -> None:
    present, value = got["weight"]
    got["weight"] = value if present else bits(0.0)


@settings(max_examples=EXAMPLES)
@given(payloads=st.lists(damaged(instances()), max_size=4))
def test_instances_are_read_as_the_protobuf_library_reads_them(payloads):
    _compare(payloads, "instance", INSTANCE, instance_rows, settle_instance)


@settings(max_examples=EXAMPLES)
@given(payloads=st.lists(damaged(examples()), max_size=4))
def test_examples_are_read_as_the_protobuf_library_reads_them(payloads):
    _compare(payloads, "example", EXAMPLE, example_rows, settle_example)


@settings(max_examples=EXAMPLES // 3)
@given(payloads=st.lists(instances(), min_size=1, max_size=3))
def test_what_is_asked_for_does_not_change_what_is_refused(payloads):
    records = Records.of([payload[:-1] for payload in payloads if payload] or [b"\x0a"], "instance")
    everything = extract(records, INSTANCE, on_error="skip")
    nothing = extract(records, Fields(), on_error="skip")
    assert everything.records.numbers.tolist() == nothing.records.numbers.tolist()


@settings(max_examples=EXAMPLES // 3)
@given(payloads=st.lists(instances(), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_a_rewritten_instance_has_the_new_values_and_all_else_as_before(payloads, seed):
    _check_rewrite(payloads, proto_parser_pb2.Instance, "instance", seed)


@settings(max_examples=EXAMPLES // 3)
@given(payloads=st.lists(examples(), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_a_rewritten_example_has_the_new_values_and_all_else_as_before(payloads, seed):
    sound = [payload for payload in payloads if _library(payload, example_rows) is not None]
    _check_rewrite(sound, example_pb2.Example, "example", seed)


def _check_rewrite(payloads: list[bytes], kind: Any, name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = len(payloads)
    labels = Ragged.of_lengths(*_ragged(rng, n, np.float32))
    actions = Ragged.of_lengths(*_ragged(rng, n, np.int64))
    present = rng.random(n) < 0.5
    uid = Scalars(rng.integers(0, 2**63, n).astype(np.uint64) * np.uint64(2), present)
    user = np.array([b"x" * int(k) for k in rng.integers(0, 4, n)], np.object_)
    weight = rng.random(n).astype(np.float32)
    line = {"actions": actions, "uid": uid, "user_id": user, "rank": -np.arange(n)}
    out = rewrite(Records.of(payloads, name), label=labels, instance_weight=weight, line_id=line)
    assert len(out) == n
    for row, payload in enumerate(payloads):
        want = kind.FromString(payload)
        if name == "example":
            promote(want)
            kept = [
                each for each in want.named_feature if each.name not in ("__LABEL__", "__LINE_ID__", "instance_weight")
            ]
            del want.named_feature[:]
            want.named_feature.extend(kept)
        del want.label[:]
        want.label.extend(labels[row].tolist())
        want.instance_weight = weight[row]
        del want.line_id.actions[:]
        want.line_id.actions.extend(actions[row].tolist())
        want.line_id.ClearField("uid")
        if present[row]:
            want.line_id.uid = int(uid.values[row])
        want.line_id.user_id = user[row].decode()
        want.line_id.rank = -row
        assert kind.FromString(out.payload(row)) == want


def _ragged(rng: np.random.Generator, n: int, dtype: Any) -> tuple[Any, Any]:
    lengths = rng.integers(0, 4, n)
    return rng.integers(-(2**31), 2**31, int(lengths.sum())).astype(dtype), lengths


@pytest.mark.parametrize(
    "rest",
    [
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x4a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
        b"\x0a\x05",
        b"\x4a\x7f\x0a",
    ],
)
def test_an_error_names_file_record_and_byte(rest):
    good = proto_parser_pb2.Instance(label=[1.0]).SerializeToString()
    records = Records.of([good, good, good + rest], "instance", source="day=1.pb")
    with pytest.raises(DataError, match=rf"day=1\.pb: record 2, byte {2 * len(good)}: .* at byte {len(good)} of"):
        extract(records, Fields(label=True))
    kept = extract(records, Fields(label=True), on_error="skip")
    assert kept.skipped == 1
    assert kept.label.tolist() == [[1.0], [1.0]]


def test_groups_nest_as_deep_as_the_library_allows_and_end_in_linear_time():
    def groups(depth):
        return b"\xa3\x01" * depth + b"\xa4\x01" * depth

    odd = b"\x23\x00\x00\x03\x04\x24"  # field number 0, which the library lets pass in a group that it skips
    assert extract(Records.of([odd], "instance"), Fields()).skipped == 0
    payloads = [groups(100), groups(101), b"\xa3\x01" + groups(1) * (100 if JIT_DISABLED else 200_000) + b"\xa4\x01"]
    assert extract(Records.of(payloads, "instance"), Fields(), on_error="skip").records.numbers.tolist() == [0, 2]


def test_columns_grow_when_a_chunk_has_more_values_than_the_last():
    fields = Fields(fids=True, named=(("grows", Element.FID),))
    sizes = (1, 3000, 2) if not JIT_DISABLED else (1, 40, 2)
    for size in sizes:
        message = proto_parser_pb2.Instance(fid=range(size))
        message.feature.add(name="grows", fid=range(size))
        columns = extract(Records.of([message.SerializeToString()] * 3, "instance"), fields)
        assert columns.fids.tolist() == [list(range(size))] * 3
        assert columns.named["grows", Element.FID].ragged.tolist() == [list(range(size))] * 3


def test_splits_of_many_rows_are_those_of_each_row():
    rows = 200
    payloads = [proto_parser_pb2.Instance(label=[1.0] * (row % 5)).SerializeToString() for row in range(rows)]
    columns = extract(Records.of(payloads, "instance"), Fields(label=True))
    assert columns.label.lengths.tolist() == [row % 5 for row in range(rows)]


def test_a_result_keeps_its_values_while_later_chunks_are_read():
    fields = Fields(fids=True)
    chunks = [
        Records.of([proto_parser_pb2.Instance(fid=[k] * 9).SerializeToString()] * 2, "instance") for k in range(6)
    ]
    held = [extract(chunk, fields).fids for chunk in chunks[:3]]
    for chunk in chunks[3:]:
        assert extract(chunk, fields).fids.tolist() == [[chunks.index(chunk)] * 9] * 2
    assert [each.tolist() for each in held] == [[[k] * 9] * 2 for k in range(3)]


def test_requests_that_cannot_be_met_are_refused():
    with pytest.raises(InvalidRequestError, match="slot 1024"):
        Fields(slots=(1024,))
    with pytest.raises(InvalidRequestError, match="no_such"):
        Fields(line_id=("no_such",))
    with pytest.raises(InvalidRequestError, match="twice"):
        Fields(line_id=("uid", "uid"))
    with pytest.raises(InvalidRequestError, match="flat fids"):
        extract(Records.of([b""], "example"), Fields(fids=True))
    with pytest.raises(InvalidRequestError, match="plaintext"):
        extract(Records.of([b""], "plaintext"), Fields(label=True))
    with pytest.raises(InvalidRequestError, match="at once"):
        extract(Records.of([b""], "example"), Fields(named=(("x", Element.FLOAT), ("x", Element.DOUBLE))))


def test_records_that_point_outside_their_buffer_are_refused():
    records = Records.of([b"\x1a\x00"], "instance")
    bad = records.replace(buffer=records.buffer[:40], offsets=records.offsets, lengths=records.lengths)
    with pytest.raises(InvalidRequestError, match="outside their buffer"):
        extract(bad, Fields(label=True))
