"""TFRecord files: framing against its naive twin, any chunking, any damage."""

from __future__ import annotations

import io
import struct

import cramjam
import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import naive_files as naive
from trilith.data.formats.tfrecord import SNAPPY_BLOCK, RecordWriter, concatenate, frame_records, read_records
from trilith.errors import DataError

RECORDS = st.lists(st.binary(max_size=40), max_size=12)


def write(records, *, snappy=False):
    file = io.BytesIO()
    writer = RecordWriter(file, snappy=snappy)
    writer.write_all(records)
    writer.close()
    return file.getvalue()


def read(data, **options):
    batches = list(read_records(io.BytesIO(data), name="a file", **options))
    firsts = [batch.first for batch in batches]
    assert firsts == np.cumsum([0, *(len(batch) for batch in batches)]).tolist()[: len(firsts)]
    return [payload for batch in batches for payload in batch.payloads()]


def test_the_naive_checksum_is_crc32c():
    assert naive.crc32c(b"123456789") == 0xE3069283 == google_crc32c.value(b"123456789")


@given(records=RECORDS)
def test_frame_records_matches_naive(records):
    assert frame_records(*concatenate(records)).tobytes() == naive.frame_records(records)


@given(records=RECORDS, snappy=st.booleans(), chunk=st.integers(1, 100))
def test_what_is_written_reads_back_in_any_chunks(records, snappy, chunk):
    assert read(write(records, snappy=snappy), snappy=snappy, chunk=chunk) == records


@given(records=RECORDS, cut=st.integers(0, 400))
def test_walk_records_matches_naive_on_a_truncated_file(records, cut):
    data = write(records)[:cut]
    whole, rest = naive.walk_records(data)
    seen = []
    failure = None
    try:
        for batch in read_records(io.BytesIO(data), name="a file", chunk=64):
            seen += batch.payloads()
    except DataError as error:
        failure = str(error)
    assert seen == whole
    assert (failure is not None) == bool(rest)
    assert failure is None or f"record {len(whole)}" in failure


@given(records=RECORDS.filter(any), at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(records, at, bit):
    data = bytearray(write(records))
    data[at % len(data)] ^= 1 << bit
    with pytest.raises(DataError, match="a file"):
        read(bytes(data))


def test_a_length_that_reaches_beyond_the_file_is_a_truncation_not_an_allocation():
    for length in (10**12, 2**63, 2**64 - 1):
        head = struct.pack("<Q", length)
        with pytest.raises(DataError, match="inside record 0"):
            read(head + struct.pack("<I", naive.masked(head)) + b"x" * 100)


def test_many_records_come_in_several_batches():
    records = [struct.pack("<I", i) for i in range(5000)]
    assert read(write(records)) == records


def test_snappy_blocks_are_big_endian_lengths_before_raw_blocks_of_at_most_256_kib():
    random = np.random.default_rng(0).integers(0, 4, 300_000, np.uint8).tobytes()
    data = write([random[:200_000], random[200_000:]], snappy=True)
    stream = b""
    sizes = []
    while data:
        (size,) = struct.unpack(">I", data[:4])
        block = bytes(cramjam.snappy.decompress_raw(data[4 : 4 + size]))
        sizes.append(len(block))
        stream += block
        data = data[4 + size :]
    assert set(sizes[:-1]) == {SNAPPY_BLOCK} == {262144}
    assert sizes[-1] <= SNAPPY_BLOCK
    assert stream == frame_records(*concatenate([random[:200_000], random[200_000:]])).tobytes()


def test_damaged_snappy_streams_are_refused():
    data = write([b"some record" * 50], snappy=True)
    with pytest.raises(DataError, match="inside a snappy block"):
        read(data[:-1], snappy=True)
    with pytest.raises(DataError, match="snappy"):
        read(data[:10] + b"\xff\xff\xff" + data[13:], snappy=True)
    with pytest.raises(DataError, match="claims"):
        read(b"\xff\xff\xff\xff" + data, snappy=True)
    huge = b"\xff\xff\xff\xff\x0f" + b"\x00" * 10
    with pytest.raises(DataError, match="more than"):
        read(struct.pack(">I", len(huge)) + huge, snappy=True)
    with pytest.raises(DataError):
        read(write([b"plain"]), snappy=True)


def test_a_slice_of_a_batch_keeps_its_numbers():
    (batch,) = read_records(io.BytesIO(write([b"a", b"b", b"c"])), name="a file")
    assert (batch[1:].first, batch[1:].payloads(), len(batch[:2])) == (1, [b"b", b"c"], 2)
