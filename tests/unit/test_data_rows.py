"""Rows of columns: what is read off their columns is what their bytes say, whatever was done to them in between."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trilith.data
from trilith.data import Column, Dense, Extra, InstanceWeight, Label, Records, Sparse
from trilith.data.parse.columns import Columns, extract
from trilith.data.samples import FilterByFids, FilterByLabel, FilterByValue
from trilith.data.scan.rows import ColumnType, RowColumn, Rows
from trilith.data.scan.schema import Element, Fields
from trilith.ops.ragged import Ragged
from trilith_proto.example_pb2 import Example

EXAMPLES = 60
TYPES = {
    ColumnType.INT: st.integers(-(2**63), 2**63 - 1),
    ColumnType.FID_V1: st.integers(0, 2**64 - 1),
    ColumnType.FID_V2: st.integers(0, 2**64 - 1),
    ColumnType.FLOAT: st.floats(width=32, allow_nan=False),
    ColumnType.BYTES: st.binary(max_size=6),
}
LINES = {
    "__UID__": (ColumnType.INT, TYPES[ColumnType.INT]),
    "__RANK__": (ColumnType.INT, st.integers(-(2**31), 2**31 - 1)),
    "__IS_DRAW__": (ColumnType.INT, st.integers(-3, 3)),
    "__SAMPLE_RATE__": (ColumnType.FLOAT, TYPES[ColumnType.FLOAT]),
    "__CID__": (ColumnType.BYTES, st.text(max_size=3).map(str.encode)),
}
NAMES = ("a", "b", "label", "instance_weight", "__LABEL__", *LINES)


def column(name: str, number: int, kind: ColumnType, lists: list[list[Any]]) -> RowColumn:
    """A column of given values."""
    flat = [each for values in lists for each in values]
    lengths = np.array([len(values) for values in lists], np.int64)
    if kind is not ColumnType.BYTES:
        values = np.array(flat, kind.dtype)
        return RowColumn(
            name=name, type=kind, number=number, lists=Ragged.of_lengths(values, lengths), text=np.zeros(64, np.uint8)
        )
    ends = np.cumsum([len(each) for each in flat], dtype=np.int64)
    spans = np.array([(int(end) - len(each), len(each)) for each, end in zip(flat, ends, strict=True)], np.int64)
    text = np.frombuffer(b"".join(flat) + bytes(64), np.uint8)
    return RowColumn(
        name=name, type=kind, number=number, lists=Ragged.of_lengths(spans.reshape(-1, 2), lengths), text=text
    )


@st.composite
def chunks(draw: Any) -> Rows:
    """Some rows of some of the columns, in any order."""
    count = draw(st.integers(0, 5))
    columns = []
    for number, name in enumerate(draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=6))):
        if name in LINES:
            kind, value = LINES[name]
            lists = [[draw(value)] for _ in range(count)]
        else:
            kind = draw(st.sampled_from(list(TYPES)))
            kind = ColumnType.FLOAT if name == "__LABEL__" else kind
            lists = [draw(st.lists(TYPES[kind], max_size=3)) for _ in range(count)]
        columns.append(column(name, number, kind, lists))
    return Rows(columns=columns, numbers=np.arange(count), sources=(draw(st.sampled_from("xy")),))


def shown(columns: Columns) -> dict[Any, Any]:
    """Everything that was extracted, as plain values."""
    out: dict[Any, Any] = {
        "weight": (columns.instance_weight.present.tolist(), columns.instance_weight.values.tobytes())
    }
    out["label"] = (columns.label.values.tobytes(), columns.label.row_splits.tolist())
    for name, scalars in columns.line_id.items():
        values = scalars.values[scalars.present]
        out[name] = scalars.present.tolist(), values.tolist() if values.dtype == object else values.tobytes()
    for key, named in columns.named.items():
        values = named.ragged.values
        held = values.tolist() if values.dtype == object else values.tobytes()
        out[key] = held, named.ragged.row_splits.tolist(), named.member.tolist()
    return out


FIELDS = [
    Fields(
        label=True,
        instance_weight=True,
        line_id=tuple(name[2:-2].lower() for name in LINES),
        named=(("a", element), ("b", Element.BYTES), ("label", Element.FLOAT), ("instance_weight", Element.INT)),
    )
    for element in Element
    if element is not Element.DOUBLE
]


@settings(max_examples=EXAMPLES, deadline=None)
@given(parts=st.lists(chunks(), min_size=1, max_size=3), data=st.data(), fields=st.sampled_from(FIELDS))
def test_a_scan_of_rows_finds_what_a_scan_of_their_bytes_finds(parts, data, fields):
    wanted = [payload for part in parts for payload in part.payloads()]
    rows = Records.concatenate(parts)
    assert isinstance(rows, Rows)
    order = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8)) if len(rows) else []
    rows, wanted = rows.take(order), [wanted[row] for row in order]
    rows = rows.take(slice(1, None)) if len(order) > 5 else rows
    wanted = wanted[1:] if len(order) > 5 else wanted
    for promote in (True, False):
        given_, bytes_ = extract(rows, fields, promote=promote), extract(rows.encoded(), fields, promote=promote)
        assert shown(given_) == shown(bytes_)
    for payload, want in zip(rows.payloads(), wanted, strict=True):
        # Features and fields stand in the order of their columns; what was taken apart has no empty line id.
        got, expected = Example.FromString(payload), Example.FromString(want)
        if not expected.HasField("line_id") and got.line_id.ByteSize() == 0:
            got.ClearField("line_id")
        assert got == expected
    again = copy.copy(rows)
    assert again.payloads() == rows.payloads()


@pytest.fixture
def files(tmp_path):
    random = np.random.default_rng(3)
    for number in range(3):
        lists = [random.integers(0, 9, random.integers(0, 4)).tolist() for _ in range(700)]
        table = {
            "tags": pa.array(lists, pa.list_(pa.int64())),
            "x": random.random(700),
            "text": [str(each) for each in random.integers(0, 99, 700)],
            "__UID__": np.arange(700) + 700 * number,
            "__LABEL__": random.integers(0, 2, 700),
            "instance_weight": random.random(700),
        }
        names = list(table) if number else list(table)[::-1]
        pq.write_table(
            pa.table({name: table[name] for name in names}), tmp_path / f"{number}.parquet", row_group_size=99
        )
    return str(tmp_path / "*.parquet")


SPEC = {
    "tags": Sparse(), "x": Dense(), "text": Dense(1, "string"), "uid": Extra(), "label": Label(), "w": InstanceWeight(),
}  # fmt: skip


def rows_of(batches):
    found = []
    for batch in batches:
        parts = [batch[name].tolist() for name in SPEC]
        found += list(zip(*parts, strict=True))
    return found


@pytest.mark.parametrize(
    "chain",
    [
        lambda data: data,
        lambda data: data.shuffle(500, seed=2),
        lambda data: data.filter(FilterByValue("uid", "ge", 300)).shuffle(64).skip(7).take(900),
        lambda data: data.filter(FilterByLabel([0.5])).shard(1, 2, by="records"),
        lambda data: data.filter(FilterByFids(has_fids=[1, 2])),
        lambda data: data.filter(lambda records: records.numbers % 3 == 0).repeat(2),
        lambda data: data.merge(data.take(50), block_length=3),
    ],
)
def test_a_pipeline_of_rows_gives_what_one_of_their_bytes_gives(files, chain):
    def encoded(records):
        return records.encoded()

    columns = [Column("tags", "fid_v2"), Column("x", "float"), Column("text", "bytes"), Column("__UID__", "int")]
    columns += [Column("__LABEL__", "float"), Column("instance_weight", "float")]
    data = trilith.data.read(files, cycle_length=2, block_length=5, columns=columns)
    wanted = rows_of(chain(data.apply(encoded)).parse(SPEC).batch(100))
    samples = chain(data).parse(SPEC).batch(100)
    assert rows_of(samples.iterate()) == wanted
    begun = samples.iterate()
    before = rows_of([next(begun)])
    rest = samples.iterate(state=trilith.data.from_json(trilith.data.to_json(begun.state_dict())))
    assert before + rows_of(rest) == wanted


def test_whoever_changes_a_batch_changes_no_other(files):
    records = next(trilith.data.read(files).chunks())
    samples = trilith.data.from_records(records).parse({"tags": Sparse()}).batch(50)
    first = next(samples.iterate())["tags"]
    wanted = first.values.copy()
    first.values[:] = -1
    assert (next(samples.iterate())["tags"].values == wanted).all()
