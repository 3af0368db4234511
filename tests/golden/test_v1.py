"""Everything that version 1 wrote is read today, and means what it meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.golden import samples
from tests.golden.write import new_rows, routing, seeds
from trilith.checkpoint import read_manifest
from trilith.rpc import wire
from trilith.shard import IdPart
from trilith_proto import ps_pb2
from trilith_services.ps.checkpoint.snapshot import verify
from trilith_services.ps.engine.filters import SlidingFilter
from trilith_services.ps.engine.rows import Rows
from trilith_services.ps.engine.table import Table
from trilith_services.ps.process.shard import LocalShard
from trilith_services.ps.reference.entry_files import feature_stat, restore_table, restore_tables
from trilith_services.ps.reference.filter_shards import restore_filter

V1 = Path(__file__).parent / "v1"
ENTRIES = str(V1 / "entries")
VALUES = json.loads((V1 / "values.json").read_text())
MESSAGES = {name: bytes.fromhex(data) for name, data in VALUES["messages"].items()}

KINDS = {
    "lookup_request": ps_pb2.LookupRequest,
    "lookup_response": ps_pb2.LookupResponse,
    "update_request": ps_pb2.UpdateRequest,
    "ids_request": ps_pb2.IdsRequest,
    "statuses_response": ps_pb2.StatusesResponse,
    "create_variables": ps_pb2.CreateVariablesRequest,
    "dense_update": ps_pb2.DenseUpdateRequest,
    "pulled_variables": ps_pb2.PullVariablesResponse,
}


def same_rows(got: Rows, want: Rows) -> None:
    order = np.argsort(got.ids), np.argsort(want.ids)
    for name in ("ids", "weights", "last_update", "state"):
        one, other = (getattr(rows, name)[by] for rows, by in zip((got, want), order, strict=True))
        # As bits: an int64 in the state may look like a NaN.
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8), err_msg=name)


def all_rows(table: Table) -> Rows:
    return Rows.concatenate([table.export_stripe(s) for s in range(table.stripes)])


def copy_of(data: bytes) -> bytes:
    """Bytes that nobody else holds."""
    return bytes(bytearray(data))


# ---- messages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_means_the_same_to_the_library_as_when_it_is_written_today(name):
    kind = KINDS[name.removesuffix("_half")]
    assert kind.FromString(MESSAGES[name]) == kind.FromString(samples.messages()[name])


@pytest.mark.parametrize("half", [False, True])
def test_lookups_read(half):
    suffix = "_half" if half else ""
    parts, dims, float16 = wire.unpack_lookup_request(MESSAGES[f"lookup_request{suffix}"])
    assert [(part.table, part.ids.tolist()) for part in parts] == [("user", samples.IDS.tolist()), ("empty", [])]
    assert (dims, float16) == ([0, 0], half)
    incarnation, rows = wire.unpack_lookup_response(copy_of(MESSAGES[f"lookup_response{suffix}"]))
    assert incarnation == samples.INCARNATION
    want = samples.update_parts(np.float16 if half else np.float32)[0].values
    np.testing.assert_array_equal(rows[0], want, strict=True)
    assert rows[1].shape == (0, 5)


@pytest.mark.parametrize("half", [False, True])
def test_updates_read(half):
    parts, write = wire.unpack_update_request(MESSAGES["update_request_half" if half else "update_request"])
    assert write == samples.WRITE
    for got, want in zip(parts, samples.update_parts(np.float16 if half else np.float32), strict=True):
        assert got.table == want.table
        for name in ("ids", "values", "counts", "learning_rates"):
            one, other = getattr(got, name), getattr(want, name)
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_array_equal(one, other, strict=True)


def test_the_small_messages_read():
    part, write = wire.unpack_ids(MESSAGES["ids_request"])
    assert (part.table, part.ids.tolist()) == ("user", samples.IDS.tolist())
    assert (write.client_id, write.sequence, write.incarnation) == (2**64 - 3, 300, 77)
    incarnation, statuses = wire.unpack_statuses(MESSAGES["statuses_response"])
    assert (incarnation, statuses.tolist()) == (samples.INCARNATION, [-1, 0, 1])


def test_dense_messages_read():
    header, values = wire.unpack_create_variables(MESSAGES["create_variables"])
    assert list(header.variables) == [samples.variable_spec(name) for name in samples.VARIABLES]
    parts, _, rate = wire.unpack_dense_update(MESSAGES["dense_update"])
    assert [(part.name, part.partition) for part in parts] == [("bias", 0), ("w", 3)]
    assert rate == 0.125
    _, pulled, step = wire.unpack_pulled(MESSAGES["pulled_variables"])
    assert step == 2**40
    for got in (values, [part.values for part in parts], pulled):
        for one, other in zip(got, samples.VARIABLES.values(), strict=True):
            np.testing.assert_array_equal(one, other)


# ---- pure functions ------------------------------------------------------------------------------------------------


def test_everything_is_owned_by_whom_it_was():
    assert routing() == VALUES["routing"]


def test_new_rows_are_what_they_were():
    assert new_rows() == VALUES["new_rows"]


def test_names_give_the_seeds_that_they_gave():
    assert seeds() == VALUES["seeds"]


# ---- entry files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", samples.specs())
def test_saved_rows_read(name):
    table = Table(samples.specs()[name].proto)
    restore_table(table, f"{ENTRIES}/{name}")
    same_rows(all_rows(table), samples.rows_of(table))


def test_several_saved_tables_read():
    tables = {name: Table(spec.proto) for name, spec in samples.specs().items()}
    counts = dict.fromkeys(tables, samples.IDS.size)
    assert feature_stat(f"{ENTRIES}/several") == counts
    assert restore_tables(tables, f"{ENTRIES}/several") == counts
    for table in tables.values():
        same_rows(all_rows(table), samples.rows_of(table))


def test_a_saved_filter_reads_and_goes_on_counting():
    restored, made = SlidingFilter(300, 7), samples.sliding_filter()
    restore_filter(restored, f"{ENTRIES}/filter")
    assert restored == made
    more = np.arange(150, 400, dtype=np.uint64) << np.uint64(17)
    assert restored.add(more).tolist() == made.add(more).tolist()


# ---- the checkpoint ------------------------------------------------------------------------------------------------


def test_the_checkpoint_is_whole():
    assert [problem for _, problem in verify(str(V1 / "checkpoint")) if problem] == []
    manifest = read_manifest(str(V1 / "checkpoint"))
    assert (manifest.global_step, manifest.shard_count) == (samples.CHECKPOINT_STEP, samples.CHECKPOINT_SHARDS)
    assert manifest.rows() == dict.fromkeys(("user", "segments", "rare"), samples.IDS.size)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_checkpoint_restores_into_any_number_of_ps(count, tmp_path):
    # A copy: restoring must never need to write beside the files. The clock is late: rows are of times yet to come.
    path = shutil.copytree(V1 / "checkpoint", tmp_path / "checkpoint")
    stores = [LocalShard(index=index, count=count, threads=1, clock=lambda: 2.0**32 - 1) for index in range(count)]
    try:
        for store in stores:
            assert store.restore(str(path)).global_step == samples.CHECKPOINT_STEP
        for config in samples.checkpoint_configs():
            pieces = [store.table(config.name) for store in stores]
            assert all(piece.config == config for piece in pieces)
            same_rows(Rows.concatenate([all_rows(piece) for piece in pieces]), samples.rows_of(pieces[0]))
        for name, values in samples.VARIABLES.items():
            found = [state for store in stores for state in store.variables.export() if state.spec.name == name]
            assert [state.spec for state in found] == [samples.variable_spec(name)]
            np.testing.assert_array_equal(found[0].values, values)
            np.testing.assert_array_equal(found[0].state, np.full(values.size, 0.25))
        if count == samples.CHECKPOINT_SHARDS:
            for index, store in enumerate(stores):
                waiting = np.array([1 << 17 | index, 3 << 17 | index], np.uint64)
                assert not store.contains(IdPart("rare", waiting)).any()
                assert store.table("rare").filter.get(waiting).tolist() == [1, 1], "and how often they had been seen"
    finally:
        for store in stores:
            store.close()
