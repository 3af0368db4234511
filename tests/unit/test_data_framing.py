"""Frames of records: every combination of flags against a naive twin, worked examples, hostile lengths."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import naive_frames as naive
from trilith.data.formats import framing_kernels as kernels
from trilith.data.formats.framing import Framing, Scratch, frame_records, split_all, split_frames
from trilith.data.records import Records
from trilith.errors import DataError, InvalidRequestError

NAMES = ("lagrangex_header", "kafka_dump_prefix", "has_sort_id", "kafka_dump")
FLAGS = st.integers(0, 15)
PAYLOADS = st.lists(st.binary(max_size=20), max_size=6)
STATUS = {
    "whole": kernels.WHOLE,
    "poison": kernels.POISONED,
    "payload": kernels.PAYLOAD_TOO_LONG,
    "sort id": kernels.SORT_ID_TOO_LONG,
}


def framing(flags):
    return Framing(**{name: bool(flags >> bit & 1) for bit, name in enumerate(NAMES)})


def split(data, flags, capacity=64):
    scratch = Scratch(capacity)
    buffer = np.frombuffer(data, np.uint8) if data else np.zeros(1, np.uint8)
    split_frames(buffer, 0, len(data), framing(flags), scratch)
    lagrangex = bool(flags & 1)
    found = [
        (
            int(scratch.starts[i]),
            data[scratch.offsets[i] : scratch.offsets[i] + scratch.lengths[i]],
            int(scratch.keys[i]) if lagrangex else 0,
            int(scratch.types[i]) if lagrangex else 0,
        )
        for i in range(scratch.found)
    ]
    return found, scratch


@given(flags=FLAGS, payloads=PAYLOADS, sort_id=st.binary(max_size=5), kind=st.integers(0, 255), data=st.data())
def test_what_is_written_matches_naive_and_reads_back(flags, payloads, sort_id, kind, data):
    keys = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=len(payloads), max_size=len(payloads)))
    records = Records.of(payloads, "instance", source_keys=keys)
    written = frame_records(records, framing(flags), sort_id=sort_id, payload_type=kind).tobytes()
    assert written == naive.write_frames(payloads, 1 if flags & 1 else flags, keys, sort_id, kind)
    back = split_all(written, framing(flags), "instance")
    assert back.payloads() == payloads
    assert back.source_keys.tolist() == ([key & 0xFFFFFF00 for key in keys] if flags & 1 else [0] * len(keys))


@given(flags=FLAGS, payloads=PAYLOADS, sort_id=st.binary(max_size=5), cut=st.integers(0, 300))
def test_find_frames_matches_naive_on_a_cut_stream(flags, payloads, sort_id, cut):
    data = naive.write_frames(payloads, flags, sort_id=sort_id)[:cut]
    found, scratch = split(data, flags)
    wanted, status = naive.find_frames(data, flags)
    assert (found, scratch.status) == (wanted, STATUS[status])
    left = len(data) - scratch.used
    assert scratch.need > left >= 0


WORDS = st.sampled_from([0, 1, 2, 3, 9, 2**31 - 1, 2**31, 2**63, 2**64 - 1, naive.POISON])


@given(flags=FLAGS, words=st.lists(WORDS, max_size=8), tail=st.binary(max_size=7))
def test_find_frames_matches_naive_on_hostile_headers(flags, words, tail):
    data = struct.pack(f"<{len(words)}Q", *words) + tail
    found, scratch = split(data, flags)
    wanted, status = naive.find_frames(data, flags)
    assert (found, scratch.status) == (wanted, STATUS[status])


def test_a_scratch_that_is_full_is_filled_again_behind_what_was_found():
    data = naive.write_frames([bytes([i]) for i in range(10)], 0)
    buffer = np.frombuffer(data, np.uint8)
    scratch = Scratch(4)
    at, seen = 0, []
    while at < len(data):
        split_frames(buffer, at, len(data), Framing(), scratch)
        seen += [data[at + start] for start in scratch.offsets[: scratch.found].tolist()]
        at += scratch.used
    assert seen == list(range(10))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (0, "02000000000000000102"),
        (4, "030000000000000061626302000000000000000102"),
        (12, "01000000000000007a050000000000000002000000000000000102"),
        (8, "050000000000000002000000000000000102"),
        (6, "00000000000000000900000000000000030000000000000061626302000000000000000102"),
        (6, "030000000000000061626302000000000000000102"),
        (2, "090000000000000002000000000000000102"),
        (1, "01f30d000000000002000000000000000102"),
        (15, "01f30d000000000002000000000000000102"),
    ],
)
def test_worked_examples_hold_their_payload(flags, text):
    records = split_all(bytes.fromhex(text), framing(flags), "plaintext")
    assert records.payloads() == [b"\1\2"]
    assert records.source_keys.tolist() == [914176 if flags & 1 else 0]


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        (b"\1", "inside the record: 1 bytes are left, it takes 8"),
        (struct.pack("<Q", 5) + b"abc", "inside the record: 11 bytes are left, it takes 13"),
        (struct.pack("<Q", 2**63), "longer than 2147483647"),
        (struct.pack("<Q", naive.POISON), "0xfefefefe"),
    ],
)
def test_bytes_that_are_no_records_are_refused_with_their_place(data, wrong):
    good = naive.write_frames([b"x"], 0)
    with pytest.raises(DataError, match=f"f: record 1, byte 9: .*{wrong}"):
        split_all(good + data, Framing(), "instance", source="f")


def test_a_payload_type_is_one_byte():
    with pytest.raises(InvalidRequestError, match="payload_type=256"):
        frame_records(Records.of([], "instance"), Framing(), payload_type=256)
