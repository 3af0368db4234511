"""CSV files as people have them, and what a bad cell, row or file costs."""

from __future__ import annotations

import bz2
import gzip
import zlib

import pytest

import trilith.data
from trilith.data import Column, Dense, Extra, Label, Sparse
from trilith.data.formats.readers import open_records
from trilith.data.formats.reading import position_of
from trilith.errors import DataError, InvalidRequestError
from trilith_proto.example_pb2 import Example, ExampleBatch

IDS = [Column("u", "fid_v2"), Column("s", "float")]


def write(tmp_path, content, name="t.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows(path, **options):
    """Values of every row by column, and the reader's losses."""
    found = []
    with open_records(path, kind="example", **options) as reader:
        for chunk in reader:
            for payload in chunk.payloads():
                example = Example.FromString(payload)
                lists = {each.name: each.feature for each in example.named_feature}
                found.append({name: list(getattr(f, f.WhichOneof("type")).value) for name, f in lists.items()})
        return found, reader.losses


def column(path, name, **options):
    return [each.get(name) for each in rows(path, **options)[0]]


def kinds(path, **options):
    with open_records(path, kind="example", **options) as reader:
        examples = [Example.FromString(payload) for chunk in reader for payload in chunk.payloads()]
    return [{each.name: each.feature.WhichOneof("type") for each in example.named_feature} for example in examples]


# ---- bad cells -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "kind", "why"),
    [
        ("x", "fid_v2", "'x' is no id of 64 bits"),
        ("1.5", "fid_v2", "'1.5' is no id of 64 bits"),
        ("1e3", "fid_v1", "'1e3' is no id"),
        ("18446744073709551616", "fid_v2", "no id of 64 bits"),
        ("-9223372036854775809", "fid_v2", "no id of 64 bits"),
        ("9223372036854775808", "int", "no integer of 64 bits"),
        ("1_000", "int", "'1_000' is no integer"),
        ("1e39", "float", "'1e39' is no number within float32"),
        ("1,5", "float", "'1,5' is no number"),
        ("é", "float", "'é' is no number"),
    ],
)
def test_a_bad_cell_is_named_and_costs_its_row(tmp_path, cell, kind, why):
    path = write(tmp_path, f'a,b\n1,2\n3,"{cell}"\n4,5\n')
    columns = [Column("a", "fid_v2"), Column("b", kind)]
    with pytest.raises(DataError, match=rf"t.csv: record 1, byte 0: column 'b': .*{why}"):
        rows(path, columns=columns)
    found, losses = rows(path, columns=columns, on_error="skip")
    assert [each["a"] for each in found] == [[1], [4]]
    assert losses.records == 1
    assert why in losses.messages[0]


def test_rows_in_front_of_a_bad_cell_are_given_out_first(tmp_path):
    path = write(tmp_path, "u,s\n" + "1,1\n" * 700 + "x,1\n" + "2,1\n")
    with open_records(path, columns=IDS) as reader:
        assert sum(map(len, [next(reader)])) == 700
        with pytest.raises(DataError, match="record 700"):
            next(reader)


def test_one_bad_cell_leaves_its_chunk_whole(tmp_path):
    """Rows around a bad one are not read one by one."""
    path = write(tmp_path, "u,s\n" + "1,1\n" * 50_000 + "x,1\n" + "2,1\n" * 50_000)
    with open_records(path, columns=IDS, on_error="skip") as reader:
        chunks = [len(chunk) for chunk in reader]
        assert (sum(chunks), reader.losses.records) == (100_000, 1)
    assert len(chunks) < 5


def test_many_bad_cells_cost_their_rows_and_keep_positions(tmp_path):
    path = write(tmp_path, "u,s\n" + "".join(f"{'x' if k % 3 == 0 else k},1\n" for k in range(900)))
    with open_records(path, columns=IDS, on_error="skip", block_bytes=1000) as reader:
        found = [(chunk, index) for chunk in reader for index in range(len(chunk))]
        assert reader.losses.records == 300
        assert len(reader.losses.messages) == 10
    assert [int(chunk.numbers[index]) for chunk, index in found] == [k for k in range(900) if k % 3]
    chunk, index = found[401]
    with open_records(path, columns=IDS, on_error="skip", start=position_of(chunk, index)) as again:
        assert sum(map(len, again)) == 600 - 401


def test_batches_of_rows_pass_over_bad_ones(tmp_path):
    path = write(tmp_path, "u,s\n" + "".join(f"{'x' if k % 3 == 0 else k},1\n" for k in range(30)))
    options = {"kind": "examplebatch", "columns": IDS, "batch_size": 7, "drop_remainder": False, "on_error": "skip"}
    with open_records(path, **options, block_bytes=40) as reader:
        chunks = list(reader)
        assert reader.losses.records == 10
    batches = [ExampleBatch.FromString(payload) for chunk in chunks for payload in chunk.payloads()]
    assert [each.batch_size for each in batches] == [7, 7, 6]
    ids = [f.fid_v2_list.value[0] for each in batches for f in each.named_feature_list[0].feature]
    assert ids == [k for k in range(30) if k % 3]
    assert [int(number) for chunk in chunks for number in chunk.numbers] == [1, 11, 22]


def test_a_row_without_its_line_id_is_skipped(tmp_path):
    path = write(tmp_path, "u,__UID__\n1,5\n2,\n3,6\n")
    with pytest.raises(DataError, match=r"record 1, .*column '__UID__' has 0 values"):
        rows(path)
    found, losses = rows(path, on_error="skip")
    assert ([each["u"] for each in found], losses.records) == ([[1], [3]], 1)


def test_numbers_are_read_as_they_are_written_elsewhere(tmp_path):
    path = write(tmp_path, 'u,s\n 7 ,+1.5\n"8", 2\n9.0,.5\n+10,1e-3\n"",\n,""\nTrue,false\n')
    found = rows(path, columns=IDS)[0]
    assert [each["u"] for each in found] == [[7], [8], [9], [10], [], [], [1]]
    assert [each["s"] for each in found] == [[1.5], [2], [0.5], [pytest.approx(1e-3)], [], [], [0]]


# ---- ids, types by guess -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [None, [Column("u", "fid_v2")]])
def test_negative_and_large_ids(tmp_path, columns):
    given = [-1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0]
    path = write(tmp_path, "u\n" + "".join(f"{each}\n" for each in given))
    samples = trilith.data.read(path, columns=columns).parse({"u": Sparse()})
    (found,) = samples.batch(10)
    assert [each % 2**64 for each in found["u"].values.tolist()] == [each % 2**64 for each in given]


def test_columns_are_guessed_by_their_values(tmp_path):
    path = write(tmp_path, "i,f,t,b,n,d\n1,1.5,a,true,,2024-01-01\n2,2,7,False,,2024-01-02\n")
    assert (
        kinds(path)
        == [{"i": "int64_list", "f": "float_list", "t": "bytes_list", "b": "int64_list", "d": "bytes_list"}] * 2
    )
    assert column(path, "b") == [[1], [0]]


@pytest.mark.parametrize("kind", ["example", "examplebatch"])
def test_integers_that_become_floats_and_columns_that_begin_empty(tmp_path, kind):
    body = "".join(f"{k},{k},\n" for k in range(200)) + "".join(f"{k},{k}.5,{k}\n" for k in range(200, 400))
    path = write(tmp_path, "u,s,late\n" + body)
    options = {"block_bytes": 500, "batch_size": 64, "drop_remainder": False}
    samples = trilith.data.read(path, kind=kind, **({} if kind == "example" else {**options}))
    if kind == "example":
        samples = trilith.data.read(path, block_bytes=500)
    found = list(
        samples.parse({"u": Sparse(), "s": Dense(), "late": Sparse()}).batch(1000 if kind == "example" else 10)
    )
    assert [x for each in found for x in each["u"].values.tolist()] == list(range(400))
    assert [x for each in found for x in each["s"][:, 0].tolist()] == [*range(200), *(k + 0.5 for k in range(200, 400))]
    assert [x for each in found for x in each["late"].values.tolist()] == list(range(200, 400))


def test_a_bad_cell_among_the_first_does_not_make_a_column_text(tmp_path):
    path = write(tmp_path, "u,s,t\n7,1,a\n8,x,b\ny,2.5,3\n9,3,4\n10,4,c\n")
    with pytest.raises(DataError, match=r"record 1, .*column 's': 'x' is no number.*Column\('s', 'bytes'\) reads"):
        rows(path)
    found, losses = rows(path, on_error="skip")
    assert found == [
        {"u": [7], "s": [1], "t": [b"a"]},
        {"u": [9], "s": [3], "t": [b"4"]},
        {"u": [10], "s": [4], "t": [b"c"]},
    ]
    assert losses.records == 2


def test_types_do_not_depend_on_where_reading_begins(tmp_path):
    path = write(
        tmp_path, "s\n" + "".join(f"{k}\n" for k in range(50)) + "0.5\n" + "".join(f"{k}\n" for k in range(50))
    )
    with open_records(path, block_bytes=40) as reader:
        places = [(chunk, index) for chunk in reader for index in range(len(chunk))]
        whole = [chunk.payload(index) for chunk, index in places]
    for row in (0, 49, 60, 100):
        with open_records(path, block_bytes=40, start=position_of(*places[row])) as reader:
            assert [payload for chunk in reader for payload in chunk.payloads()] == whole[row:]


def test_text_in_a_column_of_numbers_is_a_bad_cell_later_on(tmp_path):
    path = write(tmp_path, "u\n" + "1\n" * 100 + "x\n" + "2\n" * 100)
    found, losses = rows(path, block_bytes=60, on_error="skip")
    assert (len(found), losses.records) == (200, 1)


# ---- how files are written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-8-sig", None),
        ("utf-16", None),
        ("utf-32", None),
        ("utf-16-le", "utf-16-le"),
        ("utf-16", "utf-16"),
        ("latin-1", "latin-1"),
        ("cp1252", "cp1252"),
        ("utf-8", "utf-8"),
    ],
)
def test_encodings(tmp_path, encoding, said):
    path = write(tmp_path, "ü,note\n7,é\n8,à\n".encode(encoding))
    assert column(path, "ü", encoding=said) == [[7], [8]]
    assert column(path, "note", encoding=said) == [["é".encode()], ["à".encode()]]


def test_gbk(tmp_path):
    path = write(tmp_path, "用户,城市\n7,北京\n".encode("gbk"))
    assert column(path, "城市", encoding="gbk") == [["北京".encode()]]
    with pytest.raises(DataError, match=r"t.csv: .*header is no UTF-8.*encoding='gbk'"):
        rows(path)


@pytest.mark.parametrize(
    ("content", "said", "wrong"),
    [
        ("ü\n7\n".encode("latin-1"), None, "no UTF-8.*encoding='latin-1'"),
        ("u\n7\n".encode("utf-16-le"), None, "zero bytes; encoding='utf-16-le'"),
        (b"u\n7\n" + b"\xff\xff", "utf-8-sig", "no utf-8"),
        (b"u\n7\n" + b"\xff", "gbk", "no gbk"),
        (b"<!DOCTYPE html>\n<p>", None, "no CSV file: it begins with"),
        (b'{"u": 7}\n', None, "no CSV file: it begins with"),
        (b"", None, "empty"),
        (b"\n\n", None, "empty"),
    ],
)
def test_what_is_no_such_text_is_refused_or_skipped(tmp_path, content, said, wrong):
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=rf"t.csv: record \d+, byte 0: .*{wrong}"):
        rows(path, encoding=said)
    assert rows(path, encoding=said, on_error="skip")[1].records == 1


def test_bytes_that_are_no_text_cost_their_cells(tmp_path):
    path = write(tmp_path, b"u,t\n7,a\n8,\xff\xfe\n\xe9,b\n9\xff\n10,\xe5\x8c\x97\n")
    columns = [Column("u", "fid_v2"), Column("t", "bytes")]
    found, losses = rows(path, columns=columns, on_error="skip")
    assert found == [{"u": [7], "t": [b"a"]}, {"u": [8], "t": [b"\xff\xfe"]}, {"u": [10], "t": ["北".encode()]}]
    assert [message.split("byte 0: ")[1] for message in losses.messages] == [
        "column 'u': '\\\\xe9' is no id of 64 bits",
        "line 5 of the file has 1 cells where 2 are due: '9\\\\xff'",
    ]
    found, losses = rows(path, columns=columns, on_error="skip", encoding="utf-8")
    assert [each["u"] for each in found] == [[7], [10]]
    assert "column 't': '\\\\xff\\\\xfe' is no utf-8" in losses.messages[0]


def test_an_encoding_that_is_none_is_refused_at_once(tmp_path):
    for encoding in ("klingon", "base64"):
        with pytest.raises(InvalidRequestError, match=f"encoding='{encoding}'"):
            trilith.data.read("x.csv", encoding=encoding)


@pytest.mark.parametrize(
    ("ending", "pack"), [(".gz", gzip.compress), (".GZ", gzip.compress), (".zz", zlib.compress), ("", gzip.compress)]
)
def test_compressed_files(tmp_path, ending, pack):
    path = write(tmp_path, pack(b"u,s\n7,1\n8,0.5\n"), f"t.csv{ending}")
    assert column(path, "u", columns=IDS) == [[7], [8]]
    said = "zlib" if ending == ".zz" else "gzip"
    assert column(path, "u", columns=IDS, compression=said) == [[7], [8]]
    with pytest.raises(DataError, match=r"t.csv"):
        rows(path, columns=IDS, compression="zstd")


def test_a_name_that_promises_compression_of_plain_text(tmp_path):
    assert column(write(tmp_path, "u\n7\n", "t.csv.gz"), "u") == [[7]]


def test_a_cut_compressed_file_gives_what_is_there(tmp_path):
    packed = gzip.compress(b"u\n" + b"".join(b"%d\n" % (k * 7919 % 99991) for k in range(100_000)))
    path = write(tmp_path, packed[: len(packed) // 2], "t.csv.gz")
    found, losses = rows(path, on_error="skip")
    assert len(found) > 1000
    assert losses.records == 1
    with pytest.raises(DataError, match=r"t.csv.gz: record \d+, .*gzip stream ends too early"):
        rows(path)


def test_what_cannot_be_unpacked_is_named(tmp_path):
    path = write(tmp_path, bz2.compress(b"u\n7\n"), "t.csv.bz2")
    with pytest.raises(DataError, match="packed by bzip2, which is not read"):
        rows(path)


@pytest.mark.parametrize("ending", ["tsv", "tab", "tsv.gz"])
def test_tabs(tmp_path, ending):
    content = b"u\ts\n7\t1,5\n"
    path = write(tmp_path, gzip.compress(content) if ending.endswith("gz") else content, f"t.{ending}")
    assert rows(path)[0] == [{"u": [7], "s": [b"1,5"]}]


def test_other_delimiters(tmp_path):
    path = write(tmp_path, "u;s\n7;1\n")
    assert rows(path, delimiter=";")[0] == [{"u": [7], "s": [1]}]
    with pytest.raises(InvalidRequestError, match=r"no column 'u'; there are \['u;s'\]; is it delimiter=';'"):
        rows(path, columns=IDS)
    with pytest.raises(InvalidRequestError, match="delimiter='::'"):
        rows(path, delimiter="::")


def test_files_without_a_header(tmp_path):
    path = write(tmp_path, "1\t5\t68fd1e64\n0\t\t05db9164\n", "day_0")
    options = {"format": "csv", "delimiter": "\t", "header": ["label", "i1", "c1"]}
    assert rows(path, **options)[0] == [
        {"label": [1], "i1": [5], "c1": [b"68fd1e64"]},
        {"label": [0], "i1": [], "c1": [b"05db9164"]},
    ]
    (found,) = trilith.data.read(path, **options).parse({"label": Label(), "i1": Sparse()}).batch(5)
    assert (found["label"].tolist(), found["i1"].tolist()) == ([[1], [0]], [[5], []])
    with pytest.raises(DataError, match="3 cells where 2 are due"):
        rows(path, **{**options, "header": ["label", "i1"]})
    with pytest.raises(InvalidRequestError, match="a name of its own"):
        rows(path, **{**options, "header": ["a", "a", "b"]})


def test_several_values_in_a_cell(tmp_path):
    path = write(tmp_path, "ids,tags,x\n3|5|7,a|b,0.5|1\n,,\n9||-1,c,2|3\n8|x,d,4|5\n")
    columns = [Column("ids", "fid_v2"), Column("tags", "bytes"), Column("x", "float")]
    found, losses = rows(path, columns=columns, list_separator="|", on_error="skip")
    assert [each["ids"] for each in found] == [[3, 5, 7], [], [9, 2**64 - 1]]
    assert [each["tags"] for each in found] == [[b"a", b"b"], [], [b"c"]]
    assert [each["x"] for each in found] == [[0.5, 1], [], [2, 3]]
    assert losses.messages == [f"{path}: record 3, byte 0: column 'ids': 'x' is no id of 64 bits"]
    assert column(path, "ids", list_separator="|", on_error="skip") == [[3, 5, 7], [], [9, -1]]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_quotes(tmp_path, end):
    path = write(tmp_path, f'u,"a, ""b""",s{end}7,"line{end}break, ""quoted""",1{end}8,,2')
    name = 'a, "b"'
    assert rows(path)[0] == [
        {"u": [7], name: [f'line{end}break, "quoted"'.encode()], "s": [1]},
        {"u": [8], name: [], "s": [2]},
    ]


def test_a_header_with_a_line_break(tmp_path):
    path = write(tmp_path, '\n"user\nid",s\n7,1\n8\n')
    with pytest.raises(DataError, match="line 5 of the file has 1 cells where 2 are due"):
        rows(path)
    assert rows(path, on_error="skip")[0] == [{"user\nid": [7], "s": [1]}]


def test_a_header_alone_is_no_rows(tmp_path):
    for content in ("u,s", "u,s\n", "u,s\n\n\n"):
        assert rows(write(tmp_path, content), columns=IDS)[0] == []


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(InvalidRequestError, match="two columns are called 'u'"):
        rows(write(tmp_path, "u,u\n1,2\n"))


def test_line_ids_are_read_as_what_they_are(tmp_path):
    path = write(tmp_path, "__UID__,__CID__,__LABEL__,u\n5,77,1,1\n6,78,0,2\n")
    samples = trilith.data.read(path).parse({"uid": Extra(), "cid": Extra(), "y": Label(), "u": Sparse()})
    (found,) = samples.batch(5)
    assert (found["uid"].tolist(), found["cid"].tolist()) == ([[5], [6]], [[b"77"], [b"78"]])
    assert found["y"].tolist() == [[1], [0]]


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"format": "parquet", "delimiter": ";"}, "delimiter is for CSV"),
        ({"format": "tfrecord", "header": ["u"]}, "header is for CSV"),
        ({"format": "records", "encoding": "gbk"}, "encoding is for CSV"),
        ({"format": "parquet", "list_separator": "|"}, "list_separator is for CSV"),
        ({"format": "parquet", "compression": "gzip"}, "compression='gzip'"),
        ({"format": "records", "columns": IDS}, "columns are for Parquet and CSV"),
        ({"format": "csv", "list_separator": ","}, "something else than the delimiter"),
    ],
)
def test_options_that_do_not_apply_are_refused(tmp_path, options, wrong):
    with pytest.raises(InvalidRequestError, match=wrong):
        open_records(write(tmp_path, "u\n7\n", "t"), **options)


def test_what_databases_write_for_no_value_is_none(tmp_path):
    path = tmp_path / "dump.csv"
    path.write_text('id,score,text\n7,\\N,NULL\nNULL,1.5,"NULL"\n\\N,null,x\n9,2,\n')
    assert column(path, "id") == [[7], [], [], [9]]
    assert column(path, "score") == [[], [1.5], [], [2.0]]
    assert column(path, "text") == [[], [b"NULL"], [b"x"], []]
