"""The hand-written encoding of messages with payloads is the library's, and reads whatever the library reads."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from trilith.errors import InvalidRequestError
from trilith.rpc import wire
from trilith.shard import DensePart, IdPart, UpdateLayout, UpdatePart, Write
from trilith_proto import ps_pb2

NAMES = st.text(max_size=12)
COUNTS = st.integers(0, 40)
U64 = st.integers(0, 2**64 - 1)
I64 = st.integers(-(2**63), 2**63 - 1)
WRITES = st.builds(
    Write,
    client_id=st.integers(1, 2**64 - 1),
    sequence=U64,
    lowest_open=U64,
    client_started=I64,
    origin=st.integers(0, 2**32 - 1),
    incarnation=U64,
    global_step=I64,
    request_time=I64,
    allow_non_finite=st.booleans(),
    dedup=st.booleans(),
)
PARTS = st.lists(st.tuples(NAMES, COUNTS, st.integers(0, 20), st.booleans(), st.booleans()), max_size=4)


def random_ids(n, seed):
    return np.random.default_rng(seed).integers(0, 2**64, n, np.uint64, endpoint=False)


def update_parts(shapes, dtype=np.float32):
    parts = []
    for i, (name, n, dim, counts, rates) in enumerate(shapes):
        rng = np.random.default_rng(i)
        parts.append(
            UpdatePart(
                name,
                random_ids(n, i),
                rng.normal(size=(n, dim)).astype(dtype),
                rng.integers(1, 9, n).astype(np.uint32) if counts else None,
                rng.random(3, np.float32) if rates else None,
            )
        )
    return parts


def same_parts(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.table == other.table
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.values, other.values)
        assert one.values.dtype == other.values.dtype
        for mine, theirs in ((one.counts, other.counts), (one.learning_rates, other.learning_rates)):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                np.testing.assert_array_equal(mine, theirs)


@given(shapes=PARTS, write=WRITES, half=st.booleans())
def test_an_update_request_has_the_librarys_bytes_and_reads_back(shapes, write, half):
    parts = update_parts(shapes, np.float16 if half else np.float32)
    data = wire.pack_update_request(parts, write)
    message = ps_pb2.UpdateRequest.FromString(data)
    assert message.SerializeToString() == data
    pieces = [array for part in parts for array in (part.ids, part.counts, part.values) if array is not None]
    assert message.payload == b"".join(array.tobytes() for array in pieces)
    got, got_write = wire.unpack_update_request(data)
    same_parts(got, parts)
    assert got_write == write


@given(shapes=PARTS, write=WRITES, half=st.booleans())
def test_a_frame_written_in_place_is_the_packed_request(shapes, write, half):
    parts = update_parts(shapes, np.float16 if half and shapes else np.float32)
    layouts = [
        UpdateLayout(part.table, part.ids.size, part.values.shape[1], part.counts is not None, part.learning_rates)
        for part in parts
    ]
    frame = wire.new_update_request(layouts, write, float16=bool(half and shapes))
    for into, part in zip(frame, parts, strict=True):
        into.ids[:] = part.ids
        into.values[:] = part.values
        if part.counts is not None:
            into.counts[:] = part.counts
    assert wire.pack_update_request(frame, write) is frame.message
    assert frame.message == wire.pack_update_request(parts, write)


def test_a_frame_sent_as_another_write_is_packed_again():
    write = Write(client_id=1, sequence=1)
    frame = wire.new_update_request([UpdateLayout("t", 1, 2)], write)
    frame[0].ids[:] = 7
    frame[0].values[:] = 1
    again = Write(client_id=1, sequence=2)
    assert wire.unpack_update_request(wire.pack_update_request(frame, again))[1] == again


@given(shapes=st.lists(st.tuples(NAMES, COUNTS), max_size=4), half=st.booleans())
def test_a_lookup_request_has_the_librarys_bytes_and_reads_back(shapes, half):
    parts = [IdPart(name, random_ids(n, i)) for i, (name, n) in enumerate(shapes)]
    data = wire.pack_lookup_request(parts, float16=half)
    message = ps_pb2.LookupRequest.FromString(data)
    assert message.SerializeToString() == data
    got, dims, got_half = wire.unpack_lookup_request(data)
    assert [(part.table, part.ids.tolist()) for part in got] == [(part.table, part.ids.tolist()) for part in parts]
    assert (dims, got_half) == ([0] * len(parts), half)


@given(shapes=st.lists(st.tuples(NAMES, COUNTS, st.integers(0, 20)), max_size=4), incarnation=U64, half=st.booleans())
def test_a_lookup_response_has_the_librarys_bytes_and_reads_back(shapes, incarnation, half):
    parts = [IdPart(name, random_ids(n, i)) for i, (name, n, _) in enumerate(shapes)]
    data, outs = wire.new_lookup_response(incarnation, parts, [dim for _, _, dim in shapes], float16=half)
    for i, out in enumerate(outs):
        out[:] = np.random.default_rng(i).normal(size=out.shape)
    want = [out.copy() for out in outs]
    message = ps_pb2.LookupResponse.FromString(data)
    assert message.SerializeToString() == data
    got_incarnation, rows = wire.unpack_lookup_response(data)
    assert got_incarnation == incarnation
    for row, expected in zip(rows, want, strict=True):
        np.testing.assert_array_equal(row, expected)


@given(name=NAMES, n=st.integers(1, 300), dim=st.integers(1, 20))
def test_the_rows_of_a_reply_are_aligned_and_writable(name, n, dim):
    data, _ = wire.new_lookup_response(1, [IdPart(name, random_ids(n, 0))], [dim])
    _, (rows,) = wire.unpack_lookup_response(data)
    assert rows.flags.aligned
    assert rows.flags.writeable
    assert rows.__array_interface__["data"][0] % 16 == 0


@given(name=NAMES, n=COUNTS, write=WRITES)
def test_an_ids_request_has_the_librarys_bytes_and_reads_back(name, n, write):
    data = wire.pack_ids(IdPart(name, random_ids(n, 3)), write)
    message = ps_pb2.IdsRequest.FromString(data)
    assert message.SerializeToString() == data
    part, got = wire.unpack_ids(data)
    assert part.table == name
    assert part.ids.tolist() == random_ids(n, 3).tolist()
    assert (got.client_id, got.sequence, got.incarnation) == (write.client_id, write.sequence, write.incarnation)


@given(incarnation=U64, statuses=st.lists(st.integers(-1, 1), max_size=50))
def test_a_statuses_response_has_the_librarys_bytes_and_reads_back(incarnation, statuses):
    data = wire.pack_statuses(incarnation, np.array(statuses, np.int8))
    assert ps_pb2.StatusesResponse.FromString(data).SerializeToString() == data
    got_incarnation, got = wire.unpack_statuses(data)
    assert (got_incarnation, got.tolist()) == (incarnation, statuses)


@given(sizes=st.lists(st.tuples(NAMES, st.integers(0, 9), COUNTS), max_size=4), write=WRITES)
def test_a_dense_update_has_the_librarys_bytes_and_reads_back(sizes, write):
    parts = [DensePart(name, p, np.arange(n, dtype=np.float32)) for name, p, n in sizes]
    data = wire.pack_dense_update(parts, write, learning_rate=0.25)
    assert ps_pb2.DenseUpdateRequest.FromString(data).SerializeToString() == data
    got, got_write, rate = wire.unpack_dense_update(data)
    assert [(part.name, part.partition, part.values.tolist()) for part in got] == [
        (part.name, part.partition, part.values.tolist()) for part in parts
    ]
    assert (got_write.client_id, got_write.sequence, rate) == (write.client_id, write.sequence, 0.25)


@given(sizes=st.lists(st.tuples(NAMES, st.integers(0, 9), COUNTS), max_size=4), incarnation=U64, step=I64)
def test_pulled_variables_have_the_librarys_bytes_and_read_back(sizes, incarnation, step):
    values = [np.arange(n, dtype=np.float32) for _, _, n in sizes]
    data = wire.pack_pulled(incarnation, [(name, p) for name, p, _ in sizes], values, step)
    assert ps_pb2.PullVariablesResponse.FromString(data).SerializeToString() == data
    got_incarnation, got, got_step = wire.unpack_pulled(data)
    assert (got_incarnation, got_step) == (incarnation, step)
    assert [value.tolist() for value in got] == [value.tolist() for value in values]


@given(sizes=st.lists(st.tuples(NAMES, st.integers(0, 9), COUNTS), max_size=4), write=WRITES)
def test_a_create_variables_request_has_the_librarys_bytes_and_reads_back(sizes, write):
    specs = [ps_pb2.VariableSpec(name=name, partition=p, size=n) for name, p, n in sizes]
    initial = [np.arange(n, dtype=np.float32) for _, _, n in sizes]
    data = wire.pack_create_variables(specs, initial, write)
    assert ps_pb2.CreateVariablesRequest.FromString(data).SerializeToString() == data
    header, got = wire.unpack_create_variables(data)
    assert list(header.variables) == specs
    identity = Write(
        client_id=write.client_id,
        sequence=write.sequence,
        lowest_open=write.lowest_open,
        client_started=write.client_started,
        origin=write.origin,
        incarnation=write.incarnation,
    )
    assert wire.unpack_write(header.write, header.incarnation) == identity
    assert [value.tolist() for value in got] == [value.tolist() for value in initial]


# ---- other legal layouts ---------------------------------------------------------------------------------------------

HEADER = ps_pb2.IdsRequest(table="user", request_time=7).SerializeToString()
PAYLOAD = ps_pb2.IdsRequest(payload=np.array([5, 6], np.uint64).tobytes()).SerializeToString()
OTHER_PAYLOAD = ps_pb2.IdsRequest(payload=b"12345678").SerializeToString()
UNKNOWN_VARINT, UNKNOWN_FIXED32, UNKNOWN_FAR = b"\x60\x96\x01", b"\x65abcd", b"\x82\x01\x01x"  # fields 12, 12, 16


@pytest.mark.parametrize(
    "data",
    [
        HEADER + PAYLOAD,
        PAYLOAD + HEADER,
        OTHER_PAYLOAD + HEADER + PAYLOAD,
        HEADER + OTHER_PAYLOAD + PAYLOAD,
        UNKNOWN_VARINT + HEADER + PAYLOAD,
        HEADER + UNKNOWN_FIXED32 + PAYLOAD,
        HEADER + UNKNOWN_FAR + PAYLOAD,
        HEADER + PAYLOAD + UNKNOWN_FAR,
    ],
)
def test_a_payload_is_found_wherever_protobuf_allows_it(data):
    part, write = wire.unpack_ids(data)
    assert (part.table, part.ids.tolist(), write.request_time) == ("user", [5, 6], 7)
    assert ps_pb2.IdsRequest.FromString(data).payload == part.ids.tobytes()


@given(data=st.binary(max_size=60))
def test_any_bytes_are_read_as_the_library_reads_them_or_refused(data):
    try:
        message = ps_pb2.IdsRequest.FromString(data)
    except DecodeError:
        message = None
    try:
        header, (content, start) = wire.unpack(ps_pb2.IdsRequest, data)
    except InvalidRequestError:
        assert message is None
        return
    assert message is not None
    assert content[start:] == message.payload
    message.ClearField("payload")
    assert header == message


_FIELDS = st.one_of(
    st.builds(
        lambda table, rows, dim: ps_pb2.LookupRequest(
            tables=[ps_pb2.TableBatch(table=table, rows=rows, dim=dim)]
        ).SerializeToString(),
        NAMES,
        st.integers(0, 3),
        st.integers(0, 2**32 - 1),
    ),
    st.builds(lambda n: ps_pb2.LookupRequest(payload=b"12345678" * n).SerializeToString(), st.integers(0, 3)),
    st.sampled_from([b"", UNKNOWN_VARINT, UNKNOWN_FIXED32, UNKNOWN_FAR, b"\x09abcdefgh", b"\x72\x02ab"]),
    st.sampled_from([b"\x10\x01", b"\x10\x80\x80\x80\x80\x10", b"\x10" + b"\x80" * 11 + b"\x00", b"\x0a\x00"]),
    st.sampled_from([b"\x0a\x04\x0a\x02\xff\xff", b"\x0a\x04\x10\x01\x10\x02", b"\x0a\x05\x20\x01\x10\x01\x18"]),
    st.binary(max_size=6),
)


@given(data=st.lists(_FIELDS, max_size=4).map(b"".join), cut=st.integers(0, 3))
def test_any_lookup_request_is_read_as_the_library_reads_it_or_refused(data, cut):
    data = data[: len(data) - cut]
    try:
        message = ps_pb2.LookupRequest.FromString(data)
    except DecodeError:
        message = None
    try:
        parts, dims, half = wire.unpack_lookup_request(data)
    except InvalidRequestError:
        fits = message is not None and len(message.payload) == 8 * sum(batch.rows for batch in message.tables)
        assert not fits or message.rows_type not in (ps_pb2.FLOAT32, ps_pb2.FLOAT16)
        return
    assert message is not None
    assert half == (message.rows_type == ps_pb2.FLOAT16)
    assert [part.table for part in parts] == [batch.table for batch in message.tables]
    assert [part.ids.size for part in parts] == [batch.rows for batch in message.tables]
    assert dims == [batch.dim for batch in message.tables]
    assert b"".join(part.ids.tobytes() for part in parts) == message.payload


@given(cut=st.integers(1, 200))
def test_a_truncated_request_is_refused(cut):
    data = wire.pack_update_request(update_parts([("user", 5, 4, True, True)]), Write(client_id=1, sequence=2))
    with pytest.raises(InvalidRequestError):
        wire.unpack_update_request(data[: -min(cut, len(data) - 1)])


@pytest.mark.parametrize("extra", [b"", b"12345678"])
def test_a_payload_that_does_not_fit_its_header_is_refused(extra):
    header = ps_pb2.LookupRequest(tables=[ps_pb2.TableBatch(table="user", rows=3)], payload=b"12345678" * 2 + extra * 2)
    with pytest.raises(InvalidRequestError, match="payload has"):
        wire.unpack_lookup_request(header.SerializeToString())


def test_an_unknown_row_type_is_refused():
    with pytest.raises(InvalidRequestError, match="rows_type=7"):
        wire.unpack_lookup_request(ps_pb2.LookupRequest(rows_type=7).SerializeToString())


def test_ids_that_are_no_whole_number_of_words_are_refused():
    with pytest.raises(InvalidRequestError, match="uint64"):
        wire.unpack_ids(ps_pb2.IdsRequest(payload=b"123").SerializeToString())


def test_rows_of_two_types_do_not_travel_together():
    parts = update_parts([("a", 1, 2, False, False)]) + update_parts([("b", 1, 2, False, False)], np.float16)
    with pytest.raises(InvalidRequestError, match="one type"):
        wire.pack_update_request(parts, Write())
