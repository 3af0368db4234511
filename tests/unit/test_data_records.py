"""Chunks of serialized records: taking, joining, naming."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilith.data.records import PADDING, Kind, Records
from trilith.errors import InvalidRequestError

PAYLOADS = [b"zero", b"", b"two" * 50, b"three"]
binaries = st.lists(st.binary(max_size=200), max_size=6)


def test_records_of_payloads_give_them_back():
    records = Records.of(PAYLOADS, "instance", source_keys=[1, 2, 3, 4])
    assert len(records) == 4
    assert records.kind is Kind.INSTANCE
    assert records.payloads() == PAYLOADS
    assert [records.payload(i) for i in range(4)] == PAYLOADS
    assert records.source_keys.tolist() == [1, 2, 3, 4]
    assert records.payload_bytes == sum(map(len, PAYLOADS))
    assert records.buffer.size >= records.payload_bytes + PADDING


@pytest.mark.parametrize("rows", [[2, 0, 0], np.array([True, False, True, False]), slice(1, 3), [], np.zeros(4, bool)])
def test_taken_records_share_the_buffer_and_keep_their_names(rows):
    records = Records.of(PAYLOADS, Kind.EXAMPLE, source="f.pb")
    taken = records.take(rows)
    numbers = np.arange(4)[rows if isinstance(rows, slice) else np.asarray(rows, None if len(rows) else int)].tolist()
    assert taken.payloads() == [PAYLOADS[number] for number in numbers]
    assert taken.buffer is records.buffer
    assert [taken.where(i) for i in range(len(taken))] == [records.where(number) for number in numbers]


@given(parts=st.lists(binaries, min_size=1, max_size=4))
def test_concatenation_keeps_payloads_and_where_they_came_from(parts):
    chunks = [Records.of(part, "example", source=f"file{number % 2}") for number, part in enumerate(parts)]
    joined = Records.concatenate([chunk.take(slice(None, None, -1)) for chunk in chunks])
    assert joined.payloads() == [payload for part in parts for payload in reversed(part)]
    assert joined.buffer.size == joined.payload_bytes + PADDING
    places = [chunk.where(i) for chunk in chunks for i in reversed(range(len(chunk)))]
    assert [joined.where(i) for i in range(len(joined))] == places
    assert len(joined.sources) == len(set(joined.sources))


def test_a_compact_copy_holds_only_its_payloads():
    records = Records.of([bytes(1000), b"kept", bytes(1000)], "plaintext")
    alone = records.take([1]).compact()
    assert alone.payloads() == [b"kept"]
    assert alone.buffer.size == 4 + PADDING
    assert alone.where(0) == "(memory): record 1, byte 1000"


def test_chunks_of_two_kinds_do_not_join():
    with pytest.raises(InvalidRequestError, match=r"\['example', 'instance'\]"):
        Records.concatenate([Records.of([], "instance"), Records.of([], "example")])
    with pytest.raises(InvalidRequestError, match="at least one"):
        Records.concatenate([])
