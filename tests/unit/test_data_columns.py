"""Parquet and CSV as Examples and ExampleBatches, and back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trilith.data.columnar import Column, ragged_column
from trilith.data.readers import Position, open_records, position_of
from trilith.data.records import Records
from trilith.data.writers import open_writer
from trilith.errors import DataError, InvalidRequestError
from trilith_proto.example_pb2 import Example, ExampleBatch
from trilith_proto.line_id_pb2 import LineId

TABLE = pa.table(
    {
        "__LABEL__": pa.array([[1.0], [0.0, 1.0], None], pa.list_(pa.float32())),
        "__UID__": pa.array([1, 2, -1], pa.int64()),
        "__CID__": pa.array(["a", "b", "c"]),
        "ids": pa.array([[1, 2], None, [3, None]], pa.list_(pa.int64())),
        "small": pa.array([1, None, 3], pa.int32()),
        "score": pa.array([0.5, 1.5, 2.5], pa.float64()),
        "text": pa.array([b"x", b"y", None]),
        "nested": pa.array([[[1], [2]], [], [None, [3]]], pa.list_(pa.list_(pa.int64()))),
        "inside": pa.array([{"list": [7]}, None, {"list": None}], pa.struct([("list", pa.list_(pa.int64()))])),
    }
)
COLUMNS = [
    Column("__LABEL__", "float"),
    Column("__UID__", "int"),
    Column("__CID__", "bytes"),
    Column("ids", "fid_v2"),
    Column("nested", "fid_v1"),
    Column("text", "bytes"),
    Column("inside", "int"),
]


@pytest.fixture
def parquet(tmp_path):
    path = str(tmp_path / "t.parquet")
    pq.write_table(TABLE, path, row_group_size=2, write_page_checksum=True)
    return path


def examples(path, **options):
    with open_records(path, kind="example", **options) as reader:
        return [Example.FromString(payload) for chunk in reader for payload in chunk.payloads()]


def values(example):
    return {
        each.name: list(getattr(each.feature, each.feature.WhichOneof("type")).value) for each in example.named_feature
    }


def test_rows_of_parquet_are_examples(parquet):
    first, second, third = examples(parquet, format="parquet", columns=COLUMNS)
    assert (list(first.label), list(second.label), list(third.label)) == ([1], [0, 1], [])
    assert first.line_id == LineId(uid=1, cid="a")
    assert third.line_id.uid == 2**64 - 1
    assert values(first) == {"ids": [1, 2], "nested": [1, 2], "text": [b"x"], "inside": [7]}
    assert values(second) == {"ids": [], "nested": [], "text": [b"y"], "inside": []}
    assert values(third) == {"ids": [3], "nested": [3], "text": [], "inside": []}
    assert [each.id for each in first.named_feature] == [10003, 10004, 10005, 10006]
    assert first.named_feature[0].feature.WhichOneof("type") == "fid_v2_list"


def test_without_columns_all_are_read_as_they_are_stored(parquet):
    first = examples(parquet, format="parquet")[0]
    kinds = {each.name: each.feature.WhichOneof("type") for each in first.named_feature}
    assert kinds["small"] == "int64_list"
    assert kinds["score"] == "float_list"
    assert kinds["text"] == "bytes_list"


@pytest.mark.parametrize("drop", [True, False])
def test_batches_reach_across_row_groups(parquet, drop):
    options = {"format": "parquet", "columns": COLUMNS, "batch_size": 2, "drop_remainder": drop}
    for kind in ("examplebatch", "plaintext"):
        with open_records(parquet, kind=kind, **options) as reader:
            chunks = list(reader)
        batches = [ExampleBatch.FromString(payload) for chunk in chunks for payload in chunk.payloads()]
        assert [batch.batch_size for batch in batches] == ([2] if drop else [2, 1])
        assert [(each.name, each.id) for each in batches[0].named_feature_list] == [
            (column.name, index) for index, column in enumerate(COLUMNS)
        ]
        assert [list(each.fid_v2_list.value) for each in batches[0].named_feature_list[3].feature] == [[1, 2], []]
        assert chunks[0].where(0) == f"{parquet}: record 0, byte 0"


@pytest.mark.parametrize("file_format", ["parquet", "csv"])
def test_a_reader_of_columns_goes_on_from_any_row(parquet, tmp_path, file_format):
    path = parquet
    if file_format == "csv":
        path = str(tmp_path / "t.csv")
        (tmp_path / "t.csv").write_text("ids,text\n1,a\n2,b\n,c\n")
    options = {"format": file_format, "columns": [Column("ids", "fid_v2"), Column("text", "bytes")]}
    whole = [values(each) for each in examples(path, **options)]
    assert len(whole) == 3
    with open_records(path, kind="example", **options) as reader:
        places = [position_of(chunk, index) for chunk in reader for index in range(len(chunk))]
        assert reader.position == Position(3)
    for row, place in enumerate(places):
        assert [values(each) for each in examples(path, start=place, **options)] == whole[row:]


def test_a_damaged_row_group_costs_its_own_rows(parquet):
    meta = pq.ParquetFile(parquet).metadata.row_group(0).column(3)
    with open(parquet, "r+b") as file:
        file.seek((meta.dictionary_page_offset or meta.data_page_offset) + meta.total_compressed_size - 1)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0xFF]))
    options = {"format": "parquet", "columns": [Column("ids", "int")]}
    with pytest.raises(DataError, match=r"t.parquet: record 0, byte 0: row group 0 is damaged"):
        examples(parquet, **options)
    with open_records(parquet, kind="example", on_error="skip", **options) as reader:
        assert [chunk.numbers.tolist() for chunk in reader] == [[2]]
        assert reader.losses.records == 2


def test_bad_cells_and_lines_of_csv_are_named_or_skipped(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b,c\n1,2.5,x\n,3,\n3,x,z\n4,5,6,7\n18446744073709551615,6.5,\n")
    options = {"format": "csv", "columns": [Column("a", "fid_v1"), Column("b", "float"), Column("c", "bytes")]}
    with pytest.raises(DataError, match="record 2, byte 0: column 'b'"):
        examples(str(path), **options)
    with open_records(str(path), kind="example", on_error="skip", **options) as reader:
        found = [values(Example.FromString(payload)) for chunk in reader for payload in chunk.payloads()]
        assert reader.losses.records == 2
    assert found == [
        {"a": [1], "b": [2.5], "c": [b"x"]},
        {"a": [], "b": [3], "c": []},
        {"a": [2**64 - 1], "b": [6.5], "c": []},
    ]
    assert any("4 cells where 3 are due" in message for message in reader.losses.messages)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"columns": [Column("none", "int")]}, "no column 'none'"),
        ({"columns": [Column("text", "int")]}, "cannot be read as int"),
        ({"columns": [Column("small", "fid_v2")]}, "cannot be read as fid_v2"),
        ({"columns": [Column("__UID__", "fid_v2")]}, "fills line_id.uid"),
        ({"columns": [Column("ids", "int"), Column("ids", "int")]}, "asked for twice"),
        ({"kind": "instance"}, "not 'instance'"),
        ({"batch_size": 0, "kind": "examplebatch"}, "batch_size=0"),
    ],
)
def test_columns_that_cannot_be_are_refused(parquet, options, wrong):
    with pytest.raises(InvalidRequestError, match=wrong):
        open_records(parquet, **{"format": "parquet", "kind": "example", **options})
    with pytest.raises(InvalidRequestError, match="type 'double' is none of"):
        Column("x", "double")


def test_a_line_id_field_takes_exactly_one_value(tmp_path):
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"__UID__": pa.array([[1], [1, 2]])}), path)
    with pytest.raises(DataError, match=r"record 1, byte 0: column '__UID__' has 2 values; line_id.uid takes one"):
        examples(path, format="parquet")


@pytest.mark.parametrize(
    ("column", "values", "wrong"),
    [
        ("__RANK__", [1, 1 << 31], "column '__RANK__' has a value outside .*, what line_id.rank takes"),
        ("__CID__", [b"fine", b"\xff"], "column '__CID__' holds bytes that are no UTF-8"),
    ],
)
def test_what_a_line_id_field_cannot_hold_is_refused(tmp_path, column, values, wrong):
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({column: pa.array(values)}), path)
    with pytest.raises(DataError, match=f"record 1, byte 0: {wrong}"):
        examples(path, format="parquet")


def test_rows_are_the_bytes_that_the_protobuf_library_writes(tmp_path):
    path = str(tmp_path / "t.parquet")
    lists = [[], [0], [-1, 127, 128, 1 << 40], [-(1 << 63)] * 90, [7]]
    texts = [[], [b""], [b"x" * 200, b"y"], [b"z"] * 70, [b"\xff"]]
    table = {"ints": lists, "fids": lists, "texts": texts, "__IS_DRAW__": [0, 1, 0, 1, 5], "__RANK__": [0, -1, 3, 4, 5]}
    floats = [[], [0.5], [1.5] * 40, [], [-2.0]]
    pq.write_table(pa.table({**table, "floats": floats, "__LABEL__": floats, "__UID__": [0, -1, 2, 3, 1 << 62]}), path)
    columns = [Column("floats", "float"), Column("__UID__", "int"), Column("fids", "fid_v1"), Column("texts", "bytes")]
    columns += [Column(name, "int") for name in ("ints", "__RANK__", "__IS_DRAW__")] + [Column("__LABEL__", "float")]
    wanted = []
    for row in range(5):
        example = Example(label=floats[row])
        example.line_id.uid = [0, (1 << 64) - 1, 2, 3, 1 << 62][row]
        example.line_id.rank, example.line_id.is_draw = table["__RANK__"][row], bool(table["__IS_DRAW__"][row])
        for number, (name, member, values_) in enumerate(
            (
                ("floats", "float_list", floats),
                ("fids", "fid_v1_list", [[each & (1 << 64) - 1 for each in fids] for fids in lists]),
                ("texts", "bytes_list", texts),
                ("ints", "int64_list", lists),
            )
        ):
            added = example.named_feature.add(name=name, id=10_000 + (0, 2, 3, 4)[number]).feature
            getattr(added, member).SetInParent()
            getattr(added, member).value.extend(values_[row])
        wanted.append(example.SerializeToString(deterministic=True))
    with open_records(path, kind="example", format="parquet", columns=columns) as reader:
        assert [payload for chunk in reader for payload in chunk.payloads()] == wanted


def test_batches_of_rows_are_the_bytes_that_the_protobuf_library_writes(tmp_path):
    path = str(tmp_path / "t.parquet")
    lists = [[], [0], [-1, 127, 1 << 40], [5] * 90, [7]]
    texts = [[b""], [], [b"x" * 200, b"y"], [b"z"] * 70, [b"\xff"]]
    pq.write_table(pa.table({"ints": lists, "texts": texts}), path)
    wanted = []
    for rows in (range(2), range(2, 4), range(4, 5)):
        batch = ExampleBatch(batch_size=len(rows))
        for index, (name, member, columns) in enumerate(
            (("ints", "int64_list", lists), ("texts", "bytes_list", texts))
        ):
            named = batch.named_feature_list.add(name=name, id=index)
            for row in rows:
                added = getattr(named.feature.add(), member)
                added.SetInParent()
                added.value.extend(columns[row])
        wanted.append(batch.SerializeToString(deterministic=True))
    options = {"kind": "examplebatch", "format": "parquet", "batch_size": 2, "drop_remainder": False}
    with open_records(path, **options) as reader:
        assert [payload for chunk in reader for payload in chunk.payloads()] == wanted


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "x").write_bytes(b"PAR1 or not")
    with pytest.raises(DataError, match="no Parquet file"):
        examples(str(tmp_path / "x"), format="parquet")


def test_ragged_columns_of_slices_have_their_own_values():
    array = pa.array([[1], [2, 3], None, [4]], pa.list_(pa.int64()))
    found, splits = ragged_column(array.slice(1, 3), "int")
    assert (np.asarray(found).tolist(), splits.tolist()) == ([2, 3, 4], [0, 2, 2, 3])


def test_examples_written_as_parquet_read_back(tmp_path):
    wanted = []
    for number in range(3):
        example = Example(
            label=[number, 0.5], instance_weight=2.0, line_id=LineId(uid=2**64 - 1, cid="c", req_time=number)
        )
        example.named_feature.add(name="f").feature.fid_v2_list.value.extend([number, 7 << 48])
        example.named_feature.add(name="d").feature.float_list.value.extend([0.5] * number)
        example.named_feature.add(name="b").feature.bytes_list.value.append(b"\xff")
        wanted.append(example)
    path = str(tmp_path / "t.parquet")
    with open_writer(path, format="parquet") as writer:
        writer.write(Records.of([each.SerializeToString() for each in wanted[:2]], "example"))
        writer.write(Records.of([each.SerializeToString() for each in wanted[2:]], "example"))
    columns = [Column("__LABEL__", "float"), Column("__UID__", "int"), Column("__CID__", "bytes")]
    columns += [Column("__REQ_TIME__", "int"), Column("f", "fid_v2"), Column("d", "float"), Column("b", "bytes")]
    for got, example in zip(examples(path, format="parquet", columns=columns), wanted, strict=True):
        assert (got.line_id, list(got.label), values(got)) == (example.line_id, list(example.label), values(example))


def test_what_parquet_cannot_hold_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(InvalidRequestError, match="of kind 'example', not 'instance'"):
        _write(tmp_path / "t", Records.of([b""], "instance"))
    with pytest.raises(DataError, match="record 0, byte 0: cannot be parsed"):
        _write(tmp_path / "t", Records.of([b"\xff"], "example"))
    with pytest.raises(InvalidRequestError, match="no lists"):
        open_writer(str(tmp_path / "t"), format="csv")
    with pytest.raises(InvalidRequestError, match="standard output"):
        open_writer("", format="parquet")
    assert list(tmp_path.iterdir()) == []


def _write(path, records):
    with open_writer(str(path), format="parquet") as writer:
        writer.write(records)
