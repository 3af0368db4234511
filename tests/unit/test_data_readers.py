"""Readers and writers of streams: every compression, any block, any start, any damage."""

from __future__ import annotations

import io
import os
import struct
import sys
import threading
import types
import zlib

import cramjam
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilith.data.formats.compression import Compression, compressing, effective_compression
from trilith.data.formats.framing import Framing, frame_records
from trilith.data.formats.readers import open_records
from trilith.data.formats.reading import BLOCK_BYTES, Position, position_of
from trilith.data.formats.tfrecord import concatenate
from trilith.data.formats.tfrecord import frame_records as frame_tfrecords
from trilith.data.formats.writers import open_writer
from trilith.data.records import PADDING, Records
from trilith.errors import DataError, InvalidRequestError

PAYLOADS = [b"zero", b"", b"two" * 40, b"three", bytes(300), b"five"]
COMPRESSIONS = list(Compression)
SORTED = Framing(has_sort_id=True)


def write(path, payloads=PAYLOADS, **options):
    with open_writer(str(path), **options) as writer:
        writer.write(Records.of(payloads, "instance"))
    return str(path)


def read(path, **options):
    """Payloads and the error that ended them, and what was skipped."""
    payloads = []
    with open_records(path, **options) as reader:
        try:
            for chunk in reader:
                payloads += chunk.payloads()
        except DataError as error:
            return payloads, str(error), reader.losses
    return payloads, None, reader.losses


def framed(payloads, framing=None):
    return frame_records(Records.of(payloads, "instance"), framing or Framing()).tobytes()


# ---- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("options", [{"format": "tfrecord"}, {"framing": SORTED}], ids=["tfrecord", "records"])
def test_what_is_written_reads_back_in_any_blocks(tmp_path, options, compression, block):
    path = write(tmp_path / "f", compression=compression, **options)
    assert read(path, compression=compression, block_bytes=block, **options)[:2] == (PAYLOADS, None)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("options", [{"format": "tfrecord"}, {"framing": SORTED}], ids=["tfrecord", "records"])
def test_a_reader_goes_on_from_any_record_and_from_behind_any_chunk(tmp_path, options, compression):
    path = write(tmp_path / "f", compression=compression, **options)
    options = {**options, "compression": compression}
    seen = 0
    with open_records(path, block_bytes=64, **options) as reader:
        for chunk in reader:
            for index in range(len(chunk)):
                place = position_of(chunk, index)
                assert place.records == seen + index
                assert read(path, start=place, **options)[0] == PAYLOADS[seen + index :]
                with open_records(path, start=place, **options) as other:
                    assert next(other).where(0) == chunk.where(index)
            seen += len(chunk)
            assert read(path, start=reader.position, **options)[0] == PAYLOADS[seen:]
    assert seen == len(PAYLOADS)


def test_names_tell_file_record_and_byte(tmp_path):
    path = write(tmp_path / "f")
    (chunk,) = open_records(path)
    assert chunk.where(2) == f"{path}: record 2, byte 20"
    assert chunk.kind == "instance"
    assert chunk.buffer.size >= int((chunk.offsets + chunk.lengths).max()) + PADDING


def test_chunks_that_are_kept_keep_their_bytes(tmp_path):
    payloads = [bytes([i % 251]) * (i % 50) for i in range(500)]
    path = write(tmp_path / "f", payloads)
    with open_records(path, block_bytes=256) as reader:
        chunks = list(reader)
    assert len(chunks) > 10
    assert [payload for chunk in chunks for payload in chunk.payloads()] == payloads


def test_a_consumer_that_lets_go_of_chunks_costs_no_new_buffers(tmp_path):
    path = write(tmp_path / "f", [bytes(100)] * 500)
    with open_records(path, block_bytes=1 << 10) as reader:
        buffers = {chunk.buffer.ctypes.data for chunk in reader}
    assert len(buffers) <= 3


@given(payloads=st.lists(st.binary(max_size=60), max_size=8), block=st.integers(1, 80), sizes=st.integers(1, 9))
def test_a_pipe_that_gives_little_at_a_time_reads_the_same(payloads, block, sizes):
    from trilith.data.formats.framed import StreamReader
    from trilith.data.formats.streams import FileStream
    from trilith.data.records import Kind

    class Drip(io.BytesIO):
        def readinto1(self, target):
            return self.readinto(memoryview(target)[:sizes])

    stream = FileStream(Drip(framed(payloads, SORTED)), seekable=False)
    reader = StreamReader(stream, name="pipe", kind=Kind.INSTANCE, framing=SORTED, block_bytes=block)
    assert [payload for chunk in reader for payload in chunk.payloads()] == payloads


def test_standard_input_gives_records_while_it_is_still_open(monkeypatch):
    receiver, sender = os.pipe()
    with open(receiver, "rb") as source, open(sender, "wb", buffering=0) as sink:
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=source))
        sink.write(framed([b"first"]))
        with open_records("") as reader:
            chunk = next(reader)
            assert chunk.payloads() == [b"first"]
            assert chunk.where(0) == "(standard input): record 0, byte 0"
            sink.write(framed([b"second"]))
            sink.close()
            assert [chunk.payloads() for chunk in reader] == [[b"second"]]


def test_standard_output_takes_records(monkeypatch):
    target = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(buffer=target))
    write("", compression="gzip")
    assert zlib.decompress(target.getvalue(), 31) == framed(PAYLOADS)


def test_urls_are_read_and_written():
    path = write("memory://somewhere/f.snappy")
    assert read(path)[:2] == (PAYLOADS, None)
    assert read(path, start=Position(2, 20))[0] == PAYLOADS[2:]


def test_a_writer_whose_body_raises_leaves_no_file(tmp_path):
    def fail():
        with open_writer(str(tmp_path / "f")) as writer:
            writer.write(Records.of(PAYLOADS, "instance"))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_reader_in_another_thread_ends_when_it_is_closed(tmp_path):
    path = write(tmp_path / "f", [b"x"] * 1000)
    reader = open_records(path, block_bytes=32)
    thread = threading.Thread(target=lambda: sum(len(chunk) for chunk in reader))
    next(reader)
    reader.close()
    reader.close()
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("options", [{"format": "tfrecord"}, {"framing": SORTED}], ids=["tfrecord", "records"])
def test_a_file_cut_anywhere_gives_a_prefix_and_then_says_so(tmp_path, options, compression):
    whole = (tmp_path / "whole").read_bytes() if write(tmp_path / "whole", compression=compression, **options) else b""
    cut = tmp_path / "cut"
    options = {**options, "compression": compression}
    for size in range(0, len(whole), 1 if len(whole) < 150 else 11):
        cut.write_bytes(whole[:size])
        payloads, error, _ = read(str(cut), **options)
        assert payloads == PAYLOADS[: len(payloads)]
        if len(payloads) < len(PAYLOADS) and error is None:
            # Only between two records, or two blocks of records, does a stream seem whole.
            assert compression in (Compression.NONE, Compression.SNAPPY) or not size
        assert error is None or f"{cut}: record {len(payloads)}, byte " in error
        again, no_error, losses = read(str(cut), on_error="skip", **options)
        assert (again, no_error, losses.records) == (payloads, None, int(error is not None))
        assert losses.messages == ([error] if error else [])


@pytest.mark.parametrize("compression", [each for each in COMPRESSIONS if each is not Compression.NONE])
def test_a_compressed_stream_that_is_damaged_never_gives_wrong_bytes_silently_or_hangs(tmp_path, compression):
    whole = bytearray((tmp_path / "f").read_bytes() if write(tmp_path / "f", compression=compression) else b"")
    for at in range(0, len(whole), 3):
        damaged = whole.copy()
        damaged[at] ^= 0x55
        (tmp_path / "d").write_bytes(damaged)
        payloads, error, _ = read(str(tmp_path / "d"), compression=compression)
        # snappy and zstd as written here carry no checksum: a literal may change, but nothing crashes.
        if compression in (Compression.GZIP, Compression.ZLIB) and error is None:
            assert payloads == PAYLOADS
        assert error is None or "/d: record " in error


def test_a_poisoned_record_ends_a_file_behind_the_good_ones(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(framed([b"good"]) + struct.pack("<Q", 0xFEFEFEFE) + bytes(100))
    assert read(str(path))[:2] == (
        [b"good"],
        f"{path}: record 1, byte 12: the length is 0xfefefefe, the mark of a broken record",
    )
    payloads, error, losses = read(str(path), on_error="skip")
    assert (payloads, error) == ([b"good"], None)
    assert (losses.records, losses.bytes) == (1, 108)
    assert "the rest of the file is lost" in losses.messages[0]


@pytest.mark.parametrize("length", [2**31, 2**63, 2**64 - 1])
def test_a_hostile_length_is_refused_without_reading_or_holding_the_rest(tmp_path, length):
    path = tmp_path / "f"
    path.write_bytes(framed([b"good"]) + struct.pack("<Q", length) + bytes(1 << 20))
    with open_records(str(path), block_bytes=1 << 10) as reader:
        assert next(reader).payloads() == [b"good"]
        with pytest.raises(DataError, match="record 1, byte 12: the header claims a payload longer"):
            next(reader)
        assert reader.progress[0] <= 2 << 10
    _, _, losses = read(str(path), on_error="skip", block_bytes=1 << 10)
    assert losses.bytes == 8 + (1 << 20)


def test_a_length_beyond_the_end_costs_memory_for_what_is_there_only(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(struct.pack("<Q", 2**31 - 1) + bytes(5000))
    with open_records(str(path), block_bytes=64) as reader:
        with pytest.raises(DataError, match="ends inside the record: 5008 bytes are left, it takes 2147483655"):
            next(reader)
        assert reader._buffer.size < 25_000


def test_a_tfrecord_with_a_wrong_payload_costs_only_itself(tmp_path):
    data = bytearray(frame_tfrecords(*concatenate([b"a", b"bb", b"c"])).tobytes())
    data[17 + 12] ^= 1
    path = tmp_path / "f"
    path.write_bytes(data)
    options = {"format": "tfrecord", "kind": "plaintext"}
    message = f"{path}: record 1, byte 17: the checksum of the payload does not match"
    assert read(str(path), **options)[:2] == ([b"a"], message)
    payloads, error, losses = read(str(path), on_error="skip", **options)
    assert (payloads, error, losses.records, losses.bytes) == ([b"a", b"c"], None, 1, 18)
    with open_records(str(path), on_error="skip", **options) as reader:
        assert [chunk.numbers.tolist() for chunk in reader] == [[0], [2]]


def test_a_tfrecord_with_a_wrong_length_costs_the_rest(tmp_path):
    data = bytearray(frame_tfrecords(*concatenate([b"a", b"bb", b"c"])).tobytes())
    data[17] ^= 1
    path = tmp_path / "f"
    path.write_bytes(data)
    options = {"format": "tfrecord", "kind": "plaintext"}
    assert "record 1, byte 17: the checksum of the length" in read(str(path), **options)[1]
    payloads, _, losses = read(str(path), on_error="skip", **options)
    assert (payloads, losses.records, losses.bytes) == ([b"a"], 1, 35)


def test_a_tfrecord_may_claim_anything(tmp_path):
    head = struct.pack("<Q", 2**63)
    from tests.naive_files import masked

    path = tmp_path / "f"
    path.write_bytes(head + struct.pack("<I", masked(head)) + bytes(100))
    assert "longer than" in read(str(path), format="tfrecord")[1]


def test_a_start_behind_the_end_is_refused(tmp_path):
    for compression in COMPRESSIONS:
        path = write(tmp_path / compression, compression=compression)
        with pytest.raises(InvalidRequestError, match="cannot start at byte 10000"):
            open_records(path, compression=compression, start=Position(1, 10_000))


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"block_bytes": 0}, "block_bytes=0"),
        ({"compression": "lzma"}, "compression='lzma'"),
        ({"compression": "gzip", "use_snappy": True}, "compression='gzip'"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, wrong):
    with pytest.raises(InvalidRequestError, match=wrong):
        open_records(write(tmp_path / "f"), **options)


def test_a_file_that_is_not_there_is_named(tmp_path):
    for path in (str(tmp_path / "none"), "memory://none", "nonsense://x"):
        with pytest.raises(InvalidRequestError, match=path):
            open_records(path)
    with pytest.raises(InvalidRequestError, match="cannot be opened"):
        open_records(str(tmp_path))


# ---- snappy blocks and names of compressions -----------------------------------------------------------------------


def test_hadoop_snappy_is_blocks_of_chunks_in_big_endian(tmp_path):
    text = b"hello world hello world "
    assert bytes.fromhex("000000180000001a185c68656c6c6f20776f726c642068656c6c6f20776f726c6420")[8:] != b""
    first, second = (bytes(cramjam.snappy.compress_raw(each)) for each in (framed([text])[:9], framed([text])[9:]))
    size = len(framed([text]))
    block = struct.pack(">II", size, len(first)) + first + struct.pack(">I", len(second)) + second
    path = tmp_path / "f.snappy"
    path.write_bytes(block + struct.pack(">I", 0) + block)
    assert read(str(path))[:2] == ([text, text], None)


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        (struct.pack(">II", 5, 2**32 - 1), "claims 4294967295 bytes"),
        (
            struct.pack(">II", 5, 7) + b"\xff\xff\xff\xff\x0f\0\0",
            "a chunk holds 4294967295 bytes where its block has 5",
        ),
        (struct.pack(">II", 5, 3) + b"\x05\xff\xff", "damaged"),
        (b"\0\0", "inside the header of a block"),
        (struct.pack(">I", 5) + b"\0", "inside the header of a chunk"),
        (struct.pack(">II", 5, 100) + b"x", "inside the chunk of 100 bytes"),
    ],
)
def test_snappy_streams_that_are_damaged_say_how(tmp_path, data, wrong):
    path = tmp_path / "f.snappy"
    path.write_bytes(data)
    assert wrong in read(str(path))[1]
    assert read(str(path), on_error="skip")[2].records == 1


def test_a_small_compressed_file_that_unpacks_to_much_is_read_in_bounded_pieces(tmp_path):
    for compression in (Compression.ZSTD, Compression.GZIP, Compression.ZLIB, Compression.SNAPPY):
        path = tmp_path / compression
        with path.open("wb") as file:
            sink = compressing(file, compression)
            for _ in range(40):
                sink.write(struct.pack("<Q", 1 << 19) + bytes(1 << 19))
            sink.finish()
        with open_records(str(path), compression=compression) as reader:
            sizes = [chunk.buffer.size for chunk in reader]
        assert max(sizes) <= BLOCK_BYTES + PADDING


@pytest.mark.parametrize("compression", [Compression.GZIP, Compression.ZLIB, Compression.ZSTD, Compression.SNAPPY])
def test_members_one_behind_another_are_one_stream(tmp_path, compression):
    path = tmp_path / "f"
    one = (tmp_path / "one").read_bytes() if write(tmp_path / "one", compression=compression) else b""
    path.write_bytes(one + one)
    assert read(str(path), compression=compression)[:2] == (PAYLOADS * 2, None)


@pytest.mark.parametrize(
    ("name", "use_snappy", "compression", "wanted"),
    [
        ("a.pb", None, None, "none"),
        ("a.pb", None, 0, "none"),
        ("a.pb", None, "UNKNOW", "none"),
        ("a.pb", None, 3, "zstd"),
        ("a.pb", None, "ZLIB", "zlib"),
        ("a.pb", True, None, "snappy"),
        ("a.pb", True, "SNAPPY", "snappy"),
        ("a.snappy", None, None, "snappy"),
        ("a.snappy", False, None, "none"),
        ("a.snappy", False, "gzip", "gzip"),
    ],
)
def test_the_effective_compression_follows_from_name_and_wish(name, use_snappy, compression, wanted):
    assert effective_compression(name, compression=compression, use_snappy=use_snappy) == wanted


@pytest.mark.parametrize(
    ("name", "use_snappy", "compression"),
    [("a", True, 3), ("a.snappy", None, "GZIP"), ("a", None, "x"), ("a", None, 9)],
)
def test_compressions_that_contradict_are_refused(name, use_snappy, compression):
    with pytest.raises(InvalidRequestError):
        effective_compression(name, compression=compression, use_snappy=use_snappy)


def test_records_of_a_slice_are_written_as_such(tmp_path):
    records = Records.of(PAYLOADS, "instance").take(np.array([5, 0]))
    for file_format in ("records", "tfrecord"):
        path = str(tmp_path / file_format)
        with open_writer(path, format=file_format) as writer:
            writer.write(records)
        assert read(path, format=file_format)[0] == [b"five", b"zero"]
