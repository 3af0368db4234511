"""Parquet and CSV as Examples and ExampleBatches, and back."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trilith.data
from trilith.data import Column, Dense, Extra, Label, Sparse
from trilith.data.formats.column_types import numbers_of
from trilith.data.formats.readers import open_records
from trilith.data.formats.reading import Position, position_of
from trilith.data.formats.writers import open_writer
from trilith.data.records import Records
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
        ({"columns": [Column("text", "fid_v2")]}, "cannot be read as fid_v2"),
        ({"columns": [Column("ids", "bytes")]}, "cannot be read as bytes"),
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


@pytest.mark.parametrize("header", ["label,user", 2, True])
def test_a_header_that_is_no_list_of_names_is_refused(tmp_path, header):
    (tmp_path / "t.csv").write_text("1,2\n")
    with pytest.raises(InvalidRequestError, match="header=.*give a list of names"):
        open_records(str(tmp_path / "t.csv"), kind="example", header=header)


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
    found, bad = numbers_of(array.slice(1, 3), "int")
    assert (found.values.tolist(), found.row_splits.tolist(), bad) == ([2, 3, 4], [0, 2, 2, 3], {})


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


def ids_of(path, **options):
    samples = trilith.data.read(path, **options).parse({"u": Sparse()})
    return [[each % 2**64 for each in row] for batch in samples.batch(100) for row in batch["u"].tolist()]


INTEGERS = [
    pa.array([1, None, 100], getattr(pa, f"{sign}int{bits}")()) for sign in ("", "u") for bits in (8, 16, 32, 64)
]
WHOLE = [
    *INTEGERS,
    pa.array([Decimal(1), None, Decimal(100)], pa.decimal128(20, 0)),
    pa.array([Decimal(1), None, Decimal(100)], pa.decimal256(40, 0)),
    pa.array([1, None, 100]).dictionary_encode(),
    pa.array([[1], None, [100]], pa.large_list(pa.int32())),
    pa.array([[1], None, [100]], pa.list_(pa.uint16(), 1)),
    pa.array([[1], None, [100]], pa.list_(pa.decimal128(9, 0))),
]


@pytest.mark.parametrize("given", WHOLE, ids=lambda given: str(given.type))
@pytest.mark.parametrize("columns", [None, [Column("u", "fid_v2")], [Column("u", "int")]])
def test_every_integer_is_an_id(tmp_path, given, columns):
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"u": given}), path)
    assert ids_of(path, columns=columns) == [[1], [], [100]]


@pytest.mark.parametrize("columns", [None, [Column("u", "fid_v2")]])
@pytest.mark.parametrize(
    "given",
    [
        pa.array([2**64 - 1, 2**63, 0], pa.uint64()),
        pa.array([-1, -(2**63), 0], pa.int64()),
        pa.array([Decimal(2**64 - 1), Decimal(2**63), Decimal(0)], pa.decimal128(38, 0)),
    ],
    ids=["uint64", "int64", "decimal"],
)
def test_ids_of_64_bits(tmp_path, given, columns):
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"u": given}), path)
    assert ids_of(path, columns=columns) == [[2**64 - 1], [2**63], [0]]


@pytest.mark.parametrize(
    "given",
    [
        pa.array([True, False, None]),
        pa.array([1, 0, None], pa.int8()),
        pa.array([1.0, 0.0, None], pa.float64()),
        pa.array(np.array([1, 0], np.float16)),
        pa.array([Decimal("1.00"), Decimal("0.00"), None], pa.decimal128(9, 2)),
        pa.array([1, 0, None]).dictionary_encode(),
    ],
    ids=lambda given: str(given.type),
)
@pytest.mark.parametrize("name", ["__LABEL__", "label"])
@pytest.mark.parametrize("declared", [True, False])
def test_labels_of_every_type(tmp_path, given, name, declared):
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({name: given}), path)
    columns = [Column(name, "float")] if declared else None
    (found,) = trilith.data.read(path, columns=columns).parse({"y": Label()}).batch(10)
    assert found["y"][:2].tolist() == [[1], [0]]


@pytest.mark.parametrize("columns", [None, [Column("u", "fid_v2"), Column("x", "float"), Column("n", "bytes")]])
def test_a_column_without_any_value_is_empty(tmp_path, columns):
    path = str(tmp_path / "t.parquet")
    table = pa.table({"u": pa.nulls(2), "x": pa.array([[None], None], pa.list_(pa.null())), "n": pa.nulls(2)})
    pq.write_table(table, path)
    samples = trilith.data.read(path, columns=columns)
    (found,) = samples.parse({"u": Sparse(), "x": Dense(), "n": Dense(1, "string")}).batch(10)
    assert (found["u"].tolist(), found["n"].tolist()) == ([[], []], [[b""], [b""]])


TIMES = [
    *(
        pa.array([1_700_000_000 * n + n // 2, None], pa.timestamp(unit))
        for unit, n in zip(["s", "ms", "us", "ns"], [1, 10**3, 10**6, 10**9], strict=True)
    ),
    pa.array([1_700_000_000], pa.timestamp("s", "Asia/Shanghai")),
]


@pytest.mark.parametrize("given", TIMES, ids=lambda given: str(given.type))
def test_times_are_seconds(tmp_path, given):
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"t": given, "__REQ_TIME__": given.fill_null(given[0])}), path)
    for columns in (None, [Column("t", "int"), Column("__REQ_TIME__", "int")]):
        samples = trilith.data.read(path, columns=columns)
        (found,) = samples.parse({"t": Dense(1, "int64"), "req_time": Extra()}).batch(10)
        assert found["t"][0].tolist() == found["req_time"][0].tolist() == [1_700_000_000]


def test_dates_are_seconds(tmp_path):
    path = str(tmp_path / "t.parquet")
    days = [date(2023, 11, 14), date(1969, 12, 31)]
    pq.write_table(pa.table({"a": pa.array(days, pa.date32()), "b": pa.array(days, pa.date64())}), path)
    (found,) = trilith.data.read(path).parse({"a": Dense(1, "int64"), "b": Dense(1, "int64")}).batch(10)
    assert found["a"].tolist() == found["b"].tolist() == [[1_699_920_000], [-86400]]


@pytest.mark.parametrize(
    "stored",
    [
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.large_binary(),
        pa.binary(1),
        pa.dictionary(pa.int32(), pa.string()),
    ],
    ids=str,
)
def test_strings_of_every_type(tmp_path, stored):
    path = str(tmp_path / "t.parquet")
    pq.write_table(
        pa.table(
            {"s": pa.array(["a", None, "b"]).cast(pa.binary(1) if stored == pa.binary(1) else pa.string()).cast(stored)}
        ),
        path,
    )
    (found,) = trilith.data.read(path).parse({"s": Dense(1, "string")}).batch(10)
    assert found["s"].tolist() == [[b"a"], [b""], [b"b"]]


@pytest.mark.parametrize("stored", ["list_view", "large_list_view"])
def test_views_of_lists(stored):
    if not hasattr(pa, stored):
        pytest.skip("pyarrow is older")
    given = pa.array([[1, 2], None, [3]], getattr(pa, stored)(pa.int64()))
    found, bad = numbers_of(given, "fid_v2")
    assert (found.tolist(), bad) == ([[1, 2], [], [3]], {})


@pytest.mark.parametrize(
    ("given", "kind", "why"),
    [
        (pa.array([1.0, 1.5]), "fid_v2", "1.5 is no whole number"),
        (pa.array([1.0, 2.0**53 + 2]), "fid_v2", "no whole number that a double holds exactly"),
        (pa.array([1.0, 2.0**25], pa.float32()), "int", "no whole number that a float holds exactly"),
        (pa.array([1.0, float("inf")]), "fid_v1", "inf is no whole number"),
        (pa.array([1.0, 1e39]), "float", r"1e\+39 is beyond float32"),
        (pa.array([1, 2**63], pa.uint64()), "int", "9223372036854775808 is no int64; read the column as fid_v2"),
        (pa.array([Decimal(1), Decimal(2**64)], pa.decimal128(38, 0)), "fid_v2", "no id of 64 bits"),
        (pa.array([[1.0], [0.5, 1e300]]), "float", "is beyond float32"),
    ],
)
def test_a_value_that_does_not_fit_costs_its_row(tmp_path, given, kind, why):
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"u": given}), path)
    options = {"columns": [Column("u", kind)]}
    with pytest.raises(DataError, match=rf"t.parquet: record 1, byte 0: column 'u': .*{why}"):
        examples(path, **options)
    assert len(examples(path, **options, on_error="skip")) == 1


def test_floats_that_are_whole_numbers_are_ids_where_that_is_declared(tmp_path):
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"u": pa.array([5.0, None, float("nan"), -1.0, 2.0**53])}), path)
    assert ids_of(path, columns=[Column("u", "fid_v2")]) == [[5], [], [], [2**64 - 1], [2**53]]
    assert ids_of(path, columns=[Column("u", "int")])[0] == [5]


def test_files_whose_columns_differ(tmp_path):
    columns = {
        "0": {"u": pa.array([1, 2], pa.int64()), "x": [1.0, 2.0]},
        "1": {"x": [1.0, 2.0], "u": pa.array([3, 2**64 - 4], pa.uint64()), "new": ["a", "b"]},
        "2": {"u": pa.array([5.0, None]), "x": [1, 2]},
        "3": {"u": pa.array([6, 7], pa.int32()), "x": pa.array([1, 2], pa.int8())},
        "4": {"u": pa.nulls(2), "x": pa.nulls(2)},
        "5": {"u": pa.array([[8, 9], []]), "x": [True, False]},
    }
    for name, table in columns.items():
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    wanted = [[1], [2], [3], [2**64 - 4], [5], [], [6], [7], [], [], [8, 9], []]
    path = str(tmp_path / "*.parquet")
    assert ids_of(path, columns=[Column("u", "fid_v2"), Column("x", "float")]) == wanted
    assert ids_of(path, exclude=lambda name: name.endswith("2.parquet")) == wanted[:4] + wanted[6:]
    samples = trilith.data.read(path).parse({"x": Dense(), "new": Dense(1, "string")})
    assert len(next(iter(samples.batch(100)))["x"]) == 12


def test_batches_of_a_column_of_differing_types(tmp_path):
    path = str(tmp_path / "t.parquet")
    given = [*range(1200), 2**64 - 1, *range(1300)]  # of the chunks of rows only the second needs ids
    pq.write_table(pa.table({"u": pa.array(given, pa.uint64())}), path)
    options = {"kind": "examplebatch", "batch_size": 1500, "drop_remainder": False}
    assert ids_of(path, **options) == [[each] for each in given]


def test_two_columns_of_one_name_are_refused_where_they_are_wanted(tmp_path):
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table([pa.array([1]), pa.array([2]), pa.array([3])], ["u", "t", "t"]), path)
    assert ids_of(path) == [[1]]
    with pytest.raises(InvalidRequestError, match="2 columns are called 't'"):
        examples(path, columns=[Column("t", "int")])
