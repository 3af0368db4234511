"""Saved rows: encoder and decoder kernels against the protobuf library, on sound and on damaged messages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import naive_files as naive
from trilith.errors import CheckpointError, InvalidRequestError
from trilith.tables import (
    Adadelta,
    Adagrad,
    Adam,
    Amsgrad,
    BatchSoftmax,
    DynamicWdAdagrad,
    Fp16,
    Ftrl,
    GroupAdagrad,
    GroupFtrl,
    Momentum,
    MovingAverage,
    Rmsprop,
    RmspropV2,
    Segment,
    Sgd,
    Zeros,
    table_config,
)
from trilith_proto import hash_table_pb2
from trilith_services.ps.engine.entry_codec import (
    EntryCodec,
    decode_entries,
    encode_entries,
    entry_list,
    extract_slot_from_entry,
    iterate_table_and_apply,
)
from trilith_services.ps.engine.row_layout import RowLayout
from trilith_services.ps.engine.rows import Rows
from trilith_services.ps.engine.table import Table

OPTIMIZERS = [
    Adagrad(),
    Sgd(),
    Ftrl(),
    GroupFtrl(),
    DynamicWdAdagrad(enable_dynamic_wd=False, flip_direction=False),
    Adadelta(),
    Adam(),
    Amsgrad(),
    Momentum(),
    Rmsprop(),
    RmspropV2(),
    MovingAverage(),
    GroupAdagrad(),
    BatchSoftmax(),
]
SEGMENTS = st.lists(st.tuples(st.sampled_from(OPTIMIZERS), st.integers(1, 40)), min_size=1, max_size=4)
WORDS = st.sampled_from([0, 1, -1, 127, 128, 2**31, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)


def make_spec(parts):
    segments = [Segment(1 if isinstance(each, BatchSoftmax) else dim, Zeros(), each) for each, dim in parts]
    return table_config("t", segments=segments)


def make_layout(parts):
    return RowLayout(make_spec(parts).proto)


def make_rows(layout, seed, n, step=0):
    """Random rows; where the state is an int64, it is `step`."""
    random = np.random.default_rng(seed)
    state = random.standard_normal((n, layout.state_floats)).astype(np.float32)
    for segment in layout.segments:
        if segment.kind == "batch_softmax":
            at = segment.state_offset
            state[:, at : at + 2] = np.array([step], np.int64).view(np.float32)
    return Rows(
        random.integers(0, 2**64, n, np.uint64),
        random.standard_normal((n, layout.dim)).astype(np.float32),
        state,
        random.integers(0, 2**32, n, np.uint64).astype(np.uint32),
    )


def naive_entry(layout, rows, row, with_id):
    segments, state = [], []
    for segment in layout.segments:
        slots, values, at = [], [], segment.state_offset
        for name, floats in segment.slots:
            words = rows.state[row, at : at + floats]
            slots.append(name)
            values.append(int(words.view(np.int64)[0]) if segment.kind == "batch_softmax" else words.tolist())
            at += floats
        segments.append((segment.kind, slots))
        state.append(values)
    return naive.encode_entry(
        segments, int(rows.ids[row]), rows.weights[row].tolist(), state, int(rows.last_update[row]), with_id
    )


def same(left, right):
    for name in ("ids", "weights", "last_update"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    np.testing.assert_array_equal(left.state.view(np.uint32), right.state.view(np.uint32))


@given(parts=SEGMENTS, seed=st.integers(0, 2**32), n=st.integers(0, 5), step=WORDS, with_id=st.booleans())
def test_encode_entries_matches_naive_and_reads_back(parts, seed, n, step, with_id):
    layout = make_layout(parts)
    rows = make_rows(layout, seed, n, step)
    entries = entry_list(layout, rows, with_id=with_id)
    assert entries == [naive_entry(layout, rows, row, with_id) for row in range(n)]
    back = decode_entries(layout, entries, with_id=with_id)
    same(back, rows if with_id else Rows(np.zeros(n, np.uint64), rows.weights, rows.state, rows.last_update))


def parsed(layout, rows, row):
    """A decoded row in the form of `naive.decode_entry`."""
    state = []
    for segment in layout.segments:
        at = segment.state_offset
        for name, floats in segment.slots:
            words = rows.state[row, at : at + floats]
            if segment.kind == "batch_softmax":
                state.append(int(words.view(np.int64)[0]))
            else:
                scalar = name in {"beta1_power", "beta2_power", "grad_square_sum"}
                state.append(float(words[0]) if scalar else words.tolist())
            at += floats
    return int(rows.ids[row]), rows.weights[row].tolist(), state, int(rows.last_update[row])


def outcome(layout, message, with_id):
    """What the decoder makes of one message, None if it refuses."""
    try:
        rows = decode_entries(layout, [message], with_id=with_id)
    except CheckpointError:
        return None
    return parsed(layout, rows, 0)


def packed(entry):
    """The same message with its weights packed."""
    bare = hash_table_pb2.EntryDump()
    bare.CopyFrom(entry)
    del bare.num[:]
    data = np.array(entry.num, np.float32).tobytes()
    size = len(data)
    varint = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return bare.SerializeToString() + b"\x12" + varint + data


@given(parts=SEGMENTS, seed=st.integers(0, 2**32), step=WORDS)
def test_other_encodings_of_a_message_read_the_same(parts, seed, step):
    layout = make_layout(parts)
    rows = make_rows(layout, seed, 1, step)
    (message,) = entry_list(layout, rows)
    entry = hash_table_pb2.EntryDump.FromString(message)
    state_first = hash_table_pb2.EntryDump(opt=entry.opt, last_update_ts_sec=1).SerializeToString()
    rest = hash_table_pb2.EntryDump(id=entry.id, num=entry.num, last_update_ts_sec=entry.last_update_ts_sec)
    for other in (packed(entry), state_first + rest.SerializeToString(), message + b"\xa8\x06\x07"):
        same(decode_entries(layout, [message, other]), Rows(*(np.repeat(column, 2, 0) for column in columns(rows))))


def columns(rows):
    return rows.ids, rows.weights, rows.state, rows.last_update


@given(
    parts=st.lists(st.tuples(st.sampled_from(OPTIMIZERS), st.integers(1, 4)), min_size=1, max_size=2),
    seed=st.integers(0, 2**32),
    damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.integers(0, 60),
    with_id=st.booleans(),
)
def test_decode_entries_matches_naive_on_damaged_messages(parts, seed, damage, cut, with_id):
    layout = make_layout(parts)
    (message,) = entry_list(layout, make_rows(layout, seed, 1, 3), with_id=with_id)
    broken = bytearray(message)
    for at, byte in damage:
        broken[at % len(broken)] = byte
    broken = bytes(broken)[: max(0, len(broken) - cut)] if cut % 2 else bytes(broken)
    np.testing.assert_equal(outcome(layout, broken, with_id), naive.decode_entry(layout, broken, with_id))


def test_a_message_of_another_layout_is_refused_and_named():
    ours = make_layout([(Adagrad(), 4)])
    good = entry_list(ours, make_rows(ours, 1, 2))
    others = {
        "5 weights, the table has 4": make_layout([(Adagrad(), 5)]),
        "optimizer momentum, the table has adagrad": make_layout([(Momentum(), 4)]),
        "2 segments, the table has it for 1": make_layout([(Adagrad(), 2), (Adagrad(), 2)]),
    }
    for words, theirs in others.items():
        with pytest.raises(CheckpointError, match=rf"entries: record 2: .*{words}"):
            decode_entries(ours, [*good, *entry_list(theirs, make_rows(theirs, 1, 1))])
    short = hash_table_pb2.EntryDump.FromString(good[0])
    del short.opt.dump[0].adagrad.norm[0]
    with pytest.raises(CheckpointError, match=r"3 values of adagrad.norm, the table has 4"):
        decode_entries(ours, [short.SerializeToString()])
    adam = make_layout([(Adam(), 1)])
    (entry,) = entry_list(adam, make_rows(adam, 1, 1))
    bare = hash_table_pb2.EntryDump.FromString(entry)
    bare.opt.dump[0].adam.ClearField("beta2_power")
    with pytest.raises(CheckpointError, match="adam without beta2_power"):
        decode_entries(adam, [bare.SerializeToString()])


def test_a_message_without_id_or_state_is_refused_unless_none_is_due():
    sgd = make_layout([(Sgd(), 2)])
    bare = hash_table_pb2.EntryDump(num=[1, 2]).SerializeToString()
    with pytest.raises(CheckpointError, match="without id"):
        decode_entries(sgd, [bare])
    rows = decode_entries(sgd, [bare], with_id=False)
    assert (rows.weights.tolist(), rows.last_update.tolist()) == ([[1, 2]], [0])
    with pytest.raises(CheckpointError, match="0 segments"):
        decode_entries(make_layout([(Adagrad(), 2)]), [bare], with_id=False)
    with pytest.raises(CheckpointError, match="no EntryDump"):
        decode_entries(sgd, [b"\xff"])


def test_a_serving_row_takes_the_weights_of_a_training_dump():
    training = make_layout([(Adam(), 3)])
    rows = make_rows(training, 1, 4)
    serving = RowLayout(table_config("t", segments=[Segment(3, compressor=Fp16())], entry_type="serving").proto)
    read = decode_entries(serving, entry_list(training, rows))
    np.testing.assert_array_equal(read.weights, rows.weights)
    assert read.state.shape == (4, 0)
    with pytest.raises(InvalidRequestError, match="serving"):
        entry_list(serving, read)


def test_rows_of_another_shape_are_refused():
    layout = make_layout([(Adagrad(), 2)])
    rows = make_rows(make_layout([(Adagrad(), 3)]), 1, 1)
    with pytest.raises(InvalidRequestError, match="shapes"):
        encode_entries(layout, rows)


def test_an_empty_optimizer_message_is_written_where_no_segment_dumps():
    layout = make_layout([(MovingAverage(), 1)])
    entry = hash_table_pb2.EntryDump.FromString(entry_list(layout, make_rows(layout, 1, 1))[0])
    assert entry.HasField("opt")
    assert len(entry.opt.dump) == 0
    assert EntryCodec.of(layout).segments.shape == (0, 3)


def test_slots_are_read_from_entries():
    entries = [hash_table_pb2.EntryDump(id=fid).SerializeToString() for fid in (1 << 48, -1, 5 << 54)]
    assert extract_slot_from_entry(entries).tolist() == [1, 0x7FFF, (5 << 6) & 0x7FFF]
    assert extract_slot_from_entry(entries, fid_v2=False).tolist() == [0, 1023, 5]


def test_walking_a_table_gives_every_row_once_in_chunks():
    spec = make_spec([(Adagrad(), 2)])
    table = Table(spec.proto)
    ids = np.arange(500, dtype=np.uint64) * np.uint64(977)
    table.assign(ids, np.ones((500, 2), np.float32))
    seen, sizes = [], []

    def take(entries):
        sizes.append(len(entries))
        seen.extend(decode_entries(table.layout, entries).ids.tolist())

    iterate_table_and_apply(table, take, limit=7, nshards=3)
    assert sorted(seen) == ids.tolist()
    assert max(sizes) <= 7
    calls = []
    iterate_table_and_apply(table, lambda entries: calls.append(entries) or False, limit=7)
    assert len(calls) == 1
