"""Files that are cut off, empty, something else, damaged or gone: one loss each where damage is skipped."""

from __future__ import annotations

import gzip
import logging
import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trilith.data
from trilith.data import Column, Records, Sparse
from trilith.data.formats.readers import open_records
from trilith.errors import DataError, InvalidRequestError, TrilithError
from trilith_proto.example_pb2 import Example

ROWS = 500


def zstd(data):
    return pa.compress(data, "zstd", asbytes=True)


def make_parquet(path):
    pq.write_table(pa.table({"u": np.arange(ROWS)}), path, row_group_size=100, write_page_checksum=True)


def make_csv(path):
    path.write_text("u\n" + "".join(f"{k}\n" for k in range(ROWS)))


def make_tfrecord(path):
    payloads = [Example(label=[k]).SerializeToString() for k in range(ROWS)]
    with trilith.data.open_writer(str(path), format="tfrecord") as out:
        out.write(Records.of(payloads, "example"))


def make_records(path):
    payloads = [Example(label=[k]).SerializeToString() for k in range(ROWS)]
    with trilith.data.open_writer(str(path)) as out:
        out.write(Records.of(payloads, "example"))


MAKERS = {"parquet": make_parquet, "csv": make_csv, "tfrecord": make_tfrecord, "records": make_records}


def cut(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path):
    os.truncate(path, 0)


def replace_by_page(path):
    path.write_text("<html>404 Not Found</html>")


@pytest.mark.parametrize(
    ("file_format", "spoil"),
    [
        ("parquet", cut),
        ("parquet", empty),
        ("parquet", replace_by_page),
        ("parquet", os.remove),
        ("csv", empty),
        ("csv", replace_by_page),
        ("csv", os.remove),
        ("tfrecord", cut),
        ("tfrecord", replace_by_page),
        ("tfrecord", os.remove),
        ("records", cut),
        ("records", os.remove),
    ],
)
@pytest.mark.parametrize("cycle", [1, 3])
def test_a_file_that_cannot_be_read_is_one_loss(tmp_path, file_format, spoil, cycle):
    paths = [tmp_path / f"{number}.data" for number in range(3)]
    for path in paths:
        MAKERS[file_format](path)
    samples = trilith.data.read([str(path) for path in paths], format=file_format, kind="example", cycle_length=cycle)
    iterator = trilith.data.read(
        [str(path) for path in paths], format=file_format, kind="example", cycle_length=cycle, on_error="skip"
    ).iterate()
    raising = samples.iterate()
    if spoil is os.remove:  # behind the look for files
        names = [str(path) for path in paths]
        iterator = samples_of(names, file_format, "skip").iterate()
        raising = samples_of(names, file_format, "raise").iterate()
    spoil(paths[1])
    found = sum(1 for _ in iterator)
    assert 2 * ROWS <= found < 3 * ROWS
    assert iterator.losses.records == 1
    assert str(paths[1]) in iterator.losses.messages[0]
    with pytest.raises(TrilithError, match="1.data"):
        list(raising)


def samples_of(names, file_format, on_error):
    """A dataset that is dealt files without a look at them."""
    from trilith.data.pipeline.sources import ListedFiles

    samples = trilith.data.read("x", format=file_format, kind="example", on_error=on_error)
    return samples.deal(lambda epoch: ListedFiles(names))


def test_a_file_without_the_columns_is_one_loss_unless_it_is_all(tmp_path):
    make_csv(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("other\n1\n")
    columns = [Column("u", "fid_v2")]
    iterator = trilith.data.read(str(tmp_path / "*.csv"), columns=columns, on_error="skip").iterate()
    assert (sum(1 for _ in iterator), iterator.losses.records) == (ROWS, 1)
    with pytest.raises(InvalidRequestError, match=r"b.csv: no column 'u'; there are \['other'\]"):
        list(trilith.data.read(str(tmp_path / "*.csv"), columns=columns))
    with pytest.raises(InvalidRequestError, match="no column 'usr'"):
        list(trilith.data.read(str(tmp_path / "*.csv"), columns=[Column("usr", "fid_v2")], on_error="skip"))


@pytest.mark.parametrize("other", [pa.array(["a"]), pa.array([[(1, 2)]], pa.map_(pa.int8(), pa.int8()))], ids=str)
def test_a_file_whose_columns_are_something_else_is_one_loss_unless_it_is_all(tmp_path, other):
    make_parquet(tmp_path / "a.parquet")
    pq.write_table(pa.table({"u": other}), tmp_path / "b.parquet")
    columns = [Column("u", "fid_v2")]
    with pytest.raises(InvalidRequestError, match=r"b.parquet: column 'u' is stored as"):
        list(trilith.data.read(tmp_path, columns=columns))
    iterator = trilith.data.read(tmp_path, columns=columns, on_error="skip").iterate()
    assert (sum(1 for _ in iterator), iterator.losses.records) == (ROWS, 1)
    with pytest.raises(InvalidRequestError, match=r"b.parquet: column 'u' is stored as"):
        list(trilith.data.read(tmp_path / "b.parquet", columns=columns, on_error="skip"))


def test_what_is_written_is_read_as_it_is_called(tmp_path):
    example = Example()
    example.named_feature.add(name="u").feature.fid_v2_list.value.append(7)
    for name in ("t.parquet", "t.tfrecord", "t.pb"):
        with trilith.data.open_writer(tmp_path / name) as out:
            out.write(Records.of([example.SerializeToString()], "example"))
        assert [
            each["u"].tolist() for each in trilith.data.read(tmp_path / name, kind="example").parse({"u": Sparse()})
        ] == [[[7]]]
    assert pq.read_table(tmp_path / "t.parquet").num_rows == 1


def test_a_position_in_a_file_that_is_gone(tmp_path):
    paths = [tmp_path / f"{number}.parquet" for number in range(2)]
    for path in paths:
        make_parquet(path)
    names = [str(path) for path in paths]
    iterator = samples_of(names, "parquet", "skip").parse({"u": Sparse()}).batch(100).iterate()
    next(iterator)
    state = iterator.state_dict()
    iterator.close()
    os.remove(paths[0])
    again = samples_of(names, "parquet", "skip").parse({"u": Sparse()}).batch(100).iterate(state=state)
    assert sum(len(batch["u"]) for batch in again) == ROWS
    assert again.losses.records == 1


@pytest.mark.parametrize("packing", ["none", "snappy", "zstd"])
def test_parquet_files_with_flipped_bits_are_errors_or_losses(tmp_path, packing, caplog):
    """Whatever a flipped bit does, it is a DataError, an InvalidRequestError of the columns, or rows."""
    caplog.set_level(logging.CRITICAL)
    path = tmp_path / "t.parquet"
    table = pa.table({"u": np.arange(300), "x": np.arange(300) / 7, "t": [f"text {k}" for k in range(300)]})
    pq.write_table(table, path, row_group_size=100, compression=packing, write_page_checksum=True)
    whole, draw = path.read_bytes(), random.Random(7)
    for _ in range(150):
        spoilt = bytearray(whole)
        for _ in range(draw.choice([1, 1, 1, 8])):
            at = draw.randrange(len(spoilt))
            spoilt[at] ^= 1 << draw.randrange(8)
        path.write_bytes(spoilt)
        for on_error in ("raise", "skip"):
            try:
                with open_records(str(path), on_error=on_error) as reader:
                    rows = sum(len(chunk) for chunk in reader)
                assert rows <= 300
            except DataError:
                assert on_error == "raise"
            except InvalidRequestError:
                pass


def test_csv_files_with_other_bytes_are_errors_or_losses(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    path, draw = tmp_path / "t.csv", random.Random(3)
    whole = b"u,x,t\n" + b"".join(b'%d,%.2f,"text ""%d"""\n' % (k, k / 7, k) for k in range(200))
    for turn in range(150):
        spoilt = bytearray(whole)
        for _ in range(draw.choice([1, 3, 30])):
            spoilt[draw.randrange(len(spoilt))] = draw.choice(b'\0\xff"\n\r,x7')
        path.write_bytes(gzip.compress(spoilt)[: -draw.randrange(1, 200)] if turn % 5 == 0 else spoilt)
        for options in ({}, {"encoding": "utf-8-sig"}, {"columns": [Column("u", "fid_v2"), Column("x", "float")]}):
            try:
                with open_records(
                    str(path), on_error="skip", block_bytes=draw.choice([700, 1 << 20]), **options
                ) as reader:
                    assert sum(len(chunk) for chunk in reader) <= 500
            except InvalidRequestError:
                pass


@pytest.mark.parametrize("kept", range(0, 100, 3))
def test_parquet_files_cut_anywhere_are_errors(tmp_path, kept):
    path = tmp_path / "t.parquet"
    make_parquet(path)
    os.truncate(path, path.stat().st_size * kept // 100)
    with pytest.raises(DataError, match=r"t.parquet: record 0, byte 0: no Parquet file"):
        open_records(str(path))
    with open_records(str(path), on_error="skip") as reader:
        assert (list(reader), reader.losses.records) == ([], 1)


@pytest.mark.parametrize("name", ["t.parquet", "T.PARQUET", "t.pq", "whatever", "t.tfrecord", "t.tfrecords", "t.csv"])
def test_a_format_that_is_not_given_is_told_by_the_name_or_the_file(tmp_path, name):
    path = tmp_path / name
    kind = "csv" if name.endswith("csv") else "tfrecord" if "tfrecord" in name else "parquet"
    MAKERS[kind](path)
    samples = trilith.data.read(path, kind="example" if kind == "tfrecord" else None)
    assert sum(1 for _ in samples) == ROWS


@pytest.mark.parametrize("file_format", [None, "tfrecord"])
def test_a_file_of_which_no_record_can_be_read_names_who_guesses(tmp_path, file_format):
    path = tmp_path / "t.pb"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(DataError, match="record 0, byte 0: .*read as .*`trilith data inspect`"):
        list(trilith.data.read(path, format=file_format))


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
@pytest.mark.parametrize("ending", ["", ".packed"])
def test_packed_tfrecords_are_known_by_their_mark(tmp_path, pack, ending):
    make_tfrecord(tmp_path / "plain")
    path = tmp_path / f"t.tfrecord{ending}"
    path.write_bytes(pack((tmp_path / "plain").read_bytes()))
    assert sum(1 for _ in trilith.data.read(path, format="tfrecord", kind="example")) == ROWS


def test_packed_records_are_known_by_their_name(tmp_path):
    make_records(tmp_path / "plain")
    plain = (tmp_path / "plain").read_bytes()
    (tmp_path / "t.pb.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "t.pb.zst").write_bytes(zstd(plain))
    (tmp_path / "u.pb.gz").write_bytes(plain)  # a browser unpacked it
    for name in ("t.pb.gz", "t.pb.zst", "u.pb.gz"):
        assert sum(1 for _ in trilith.data.read(tmp_path / name, kind="example")) == ROWS
    with pytest.raises(DataError, match="gzip stream is damaged"):
        list(trilith.data.read(tmp_path / "u.pb.gz", kind="example", compression="gzip"))
