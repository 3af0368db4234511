"""What a person sees of `trilith data`: guesses, counts, samples, conversions, damage, one-line errors."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trilith.data.formats.compression import Compression
from trilith.data.formats.detect import detect
from trilith.data.formats.framing import Framing, frame_records
from trilith.data.formats.readers import open_records
from trilith.data.formats.writers import open_writer
from trilith.data.records import Records
from trilith_proto import tf_example_pb2
from trilith_proto.example_pb2 import Example
from trilith_proto.line_id_pb2 import LineId
from trilith_proto.proto_parser_pb2 import Instance
from trilith_services.cli import main

SORTED = Framing(has_sort_id=True)


def instances(count=30):
    messages = []
    for number in range(count):
        message = Instance(fid=[number], label=[1.0], line_id=LineId(uid=number))
        message.feature.add(name="emb", float_value=[0.5])
        messages.append(message.SerializeToString())
    return Records.of(messages, "instance")


@pytest.fixture
def run(capsys):
    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["data", *map(str, arguments)])
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "day=1.pb"
    with open_writer(str(path), framing=SORTED, sort_id=b"key") as writer:
        writer.write(instances())
    return path


@pytest.mark.parametrize("compression", list(Compression))
@pytest.mark.parametrize("flags", range(9))
def test_format_compression_framing_and_kind_are_guessed(tmp_path, flags, compression):
    bits = {name: bool(flags >> bit & 1) for bit, name in enumerate(("kafka_dump_prefix", "has_sort_id", "kafka_dump"))}
    framing = Framing(lagrangex_header=True) if flags == 8 else Framing(**bits)
    path = tmp_path / "f"
    records = Records.of(instances().payloads(), "instance", source_keys=[512] * 30)
    with open_writer(str(path), framing=framing, compression=compression, sort_id=b"key") as writer:
        writer.write(records)
    found = detect(str(path))
    assert (found.format, found.compression, found.kind) == ("records", compression, "instance")
    with open_records(str(path), framing=found.framing, compression=compression) as reader:
        (chunk,) = reader
    assert chunk.payloads() == records.payloads()
    # Headers of nothing but zeros read the same under several flags.
    assert found.framing == framing or flags in (1, 4, 5)


def test_tfrecords_and_examples_are_guessed(tmp_path):
    example = Example(label=[1.0])
    example.named_feature.add(name="f").feature.fid_v2_list.value.append(1)
    for payload, kind in ((example.SerializeToString(), "example"), (b"\xff\xff", "plaintext")):
        path = str(tmp_path / kind)
        with open_writer(path, format="tfrecord") as writer:
            writer.write(Records.of([payload] * 3, kind))
        assert (detect(path).format, detect(path).kind) == ("tfrecord", kind)


def test_inspect_shows_what_records_hold(run, file):
    status, out, _ = run("inspect", file)
    assert status == 0
    assert "framing: sort_id" in out
    assert "emb" in out
    status, out, _ = run("inspect", "--json", file)
    found = json.loads(out)
    assert (found["format"], found["framing"], found["kind"], found["looked_at"]) == (
        "records",
        "sort_id",
        "instance",
        30,
    )
    assert {"feature": "line_id.uid", "type": "field", "records": 30} in found["features"]


def test_count_sums_files(run, file, tmp_path):
    status, out, err = run("count", tmp_path / "*.pb", file, "--json")
    (counted,) = map(json.loads, out.splitlines())
    assert (status, counted["records"], counted["skipped"]) == (0, 30, 0)
    assert "guessed format records, kind instance, framing sort_id" in err
    assert "30" in run("count", file)[1]


def test_sample_prints_json_lines(run, file):
    _, out, _ = run("sample", file, "-n", 2)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["record"] for line in lines] == [
        f"{file}: record 0, byte 0",
        f"{file}: record 1, byte {second_at(file)}",
    ]
    assert lines[1]["message"]["fid"] == ["1"]
    drawn = [run("sample", file, "-n", 5, "--seed", 1)[1] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len(drawn[0].splitlines()) == 5


def second_at(file):
    with open_records(str(file), framing=SORTED) as reader:
        return int(next(reader).positions[1])


def test_convert_changes_format_framing_compression_and_kind(run, file, tmp_path):
    first = tmp_path / "out.zst"
    status, out, _ = run("convert", file, "-o", first, "--to-compression", "zstd", "--to-framing", "prefix,dump")
    assert (status, "30 records read, 30 written" in out) == (0, True)
    second = tmp_path / "out.parquet"
    status, *_ = run("convert", first, "-o", second, "--to-kind", "example", "--to-format", "parquet", "--limit", 7)
    assert status == 0
    with open_records(str(second), format="parquet", kind="example") as reader:
        examples = [Example.FromString(payload) for chunk in reader for payload in chunk.payloads()]
    assert [example.line_id.uid for example in examples] == list(range(7))


def test_convert_reads_standard_input_and_writes_standard_output(run, monkeypatch):
    data = frame_records(instances(3), Framing()).tobytes()
    target = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(buffer=target, isatty=lambda: False))
    with pytest.raises(SystemExit) as ended:
        main(["data", "convert", "-", "-o", "-"])
    assert not ended.value.code
    assert target.getvalue() == data


def test_validate_names_what_is_damaged_and_says_so_by_its_status(run, file, tmp_path):
    assert run("validate", file)[:2] == (0, "1 file, 30 records: all good\n")
    bad = tmp_path / "bad.pb"
    bad.write_bytes(
        frame_records(Records.of([b"\xff"], "instance"), SORTED, sort_id=b"a").tobytes() + file.read_bytes()[:-1]
    )
    status, out, err = run("validate", bad, "--framing", "sort_id", "--kind", "instance")
    assert (status, out) == (1, "1 file, 29 records: 2 damaged\n")
    assert f"damaged: {bad}: record 0, byte 0: the payload is no Instance" in err
    assert f"damaged: {bad}: record 30, byte" in err
    status, out, _ = run("validate", bad, "--framing", "sort_id", "--kind", "instance", "--json")
    assert (status, json.loads(out)["damaged"]) == (1, 2)


def test_damage_stops_a_command_or_is_skipped_and_counted(run, file, tmp_path):
    cut = tmp_path / "cut"
    cut.write_bytes(file.read_bytes()[:-1])
    target = tmp_path / "out"
    status, _, err = run("convert", cut, "-o", target)
    assert (status, target.exists()) == (2, False)
    assert f"error: {cut}: record 29, byte " in err
    status, out, err = run("convert", cut, "-o", target, "--skip-damage")
    assert status == 0
    assert "29 records read (1 damaged skipped), 29 written" in out
    assert f"skipped: {cut}: record 29, byte " in err


def test_convert_skips_records_that_are_no_samples_and_counts_them(run, tmp_path):
    payloads = [*instances().payloads(), b"\xff\xff"]
    path, target = tmp_path / "mixed", tmp_path / "out"
    with open_writer(str(path), format="tfrecord") as writer:
        writer.write(Records.of(payloads, "instance"))
    flags = "--kind", "instance", "--to-kind", "example", "-o", target
    assert run("convert", path, *flags)[0] == 2
    status, out, _ = run("convert", path, *flags, "--skip-damage")
    assert (status, out.split(",")[0]) == (0, "31 records read (1 damaged skipped)")


def test_a_compressed_file_that_ends_early_is_still_known(tmp_path):
    path = tmp_path / "f"
    with open_writer(str(path), compression="gzip") as writer:
        for _ in range(200):
            writer.write(instances())
    path.write_bytes(path.read_bytes()[:-9])
    assert (detect(str(path)).compression, detect(str(path)).kind) == ("gzip", "instance")


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["inspect", os.devnull], "is empty"),
        (["count", "/none/*.pb"], "no file matches"),
        (["inspect", "/none"], "/none: no such file"),
        (["count", "{file}", "--framing", "x"], "framing 'x': choose from"),
        (["count", "{file}", "--format", "parquet"], "no Parquet file"),
        (["count", "{file}", "--columns", "x"], "write name:type"),
        (["sample", "{file}", "--kind", "example", "--framing", "none"], "is no Example"),
    ],
)
def test_errors_are_one_line(run, file, arguments, wrong):
    status, out, err = run(*(each.format(file=file) for each in arguments))
    lines = [line for line in err.splitlines() if line.strip() and "guessed" not in line]
    assert (status, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: ")
    assert wrong in lines[0]


def test_a_parquet_file_without_rows_shows_its_columns(run, tmp_path):
    table = pa.table(
        {"u": pa.array([], pa.int32()), "n": pa.nulls(0), "m": pa.array([], pa.map_(pa.int8(), pa.int8()))}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    code, out, _ = run("inspect", tmp_path / "t.parquet")
    shown = " ".join(out.split())
    assert code == 0
    assert "columns: u (int), n (no values), m (column 'm' is stored as map" in shown
    assert "no records" in out


def test_tf_examples_are_recognized(run, tmp_path):
    message = tf_example_pb2.Example()
    message.features.feature["user"].int64_list.value.append(7)
    with open_writer(str(tmp_path / "t.tfrecord"), format="tfrecord") as writer:
        writer.write(Records.of([message.SerializeToString()] * 3, "plaintext"))
    code, out, _ = run("inspect", tmp_path / "t.tfrecord")
    assert (code, "TFExampleConverter" in " ".join(out.split())) == (0, True)
    assert json.loads(run("inspect", "--json", tmp_path / "t.tfrecord")[1])["tf_examples"] is True
    code, _, err = run("validate", "--kind", "example", tmp_path / "t.tfrecord")
    assert (code, "TFExampleConverter" in err) == (1, True)


@pytest.mark.parametrize("arguments", [(), ("--format", "csv"), ("--format", "csv", "--compression", "gzip")])
def test_compressed_csv_files_are_read_as_they_are_called(run, tmp_path, arguments):
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"u,s\n7,1\n8,2\n"))
    (tmp_path / "t.tsv.gz").write_bytes(gzip.compress(b"u\ts\n7\t1\n8\t2\n"))
    for name in ("t.csv.gz", "t.tsv.gz"):
        code, out, _ = run("count", "--json", *arguments, tmp_path / name)
        assert (code, json.loads(out)["records"]) == (0, 2)
    assert "csv, gzip compression" in " ".join(run("inspect", tmp_path / "t.csv.gz")[1].split())


def test_csv_files_are_read_as_they_are_said_to_be_written(run, tmp_path):
    (tmp_path / "t.csv").write_bytes("7;3|5;ü\n8;4;é\n".encode("latin-1"))
    form = (
        "--csv",
        "delimiter=;",
        "--csv",
        "header=u,tags,t",
        "--csv",
        "list_separator=|",
        "--csv",
        "encoding=latin-1",
    )
    code, out, _ = run("sample", *form, "--columns", "u:fid_v2,tags:int", tmp_path / "t.csv")
    first = json.loads(out.splitlines()[0])["message"]["named_feature"]
    assert (code, first[1]["feature"]["int64_list"]["value"]) == (0, ["3", "5"])
    assert "columns: u, tags, t" in " ".join(run("inspect", *form, tmp_path / "t.csv")[1].split())
    (tmp_path / "day_0").write_text("u\ts\n7\t1\n")
    assert json.loads(run("count", "--json", "--csv", "delimiter=\\t", tmp_path / "day_0")[1])["records"] == 1
    assert "columns: u, s" in " ".join(run("inspect", "--csv", "delimiter=\\t", tmp_path / "day_0")[1].split())
    code, _, err = run("count", "--csv", "separator=;", tmp_path / "t.csv")
    assert (code, "write NAME=VALUE with a name of delimiter" in err) == (2, True)
