"""Files of saved rows: what is written can be read by plain code, and what is read is whole or refused."""

from __future__ import annotations

import logging
import struct
import time

import cramjam
import numpy as np
import pytest

from tests import naive_files as naive
from trilith.errors import CheckpointError, InvalidRequestError
from trilith.tables import Adagrad, Fp16, Momentum, RandomUniform, Segment, Sgd, Zeros, table_config
from trilith_proto import hash_table_pb2
from trilith_services.ps.engine.table import Table
from trilith_services.ps.reference import assets
from trilith_services.ps.reference.entry_files import (
    feature_stat,
    read_rows,
    restore_table,
    restore_tables,
    save_table,
    save_tables,
)
from trilith_services.ps.reference.shard_files import (
    find_shard_files,
    shard_file_name,
    shard_file_names,
    validate_shard_files,
)

DAY = 86_400


def make_table(name="t", dim=2, optimizer=None, **options):
    return Table(table_config(name, dim=dim, optimizer=optimizer or Adagrad(), initializer=Zeros(), **options).proto)


def fill(table, n, *, first=0, time=1000):
    ids = np.arange(first, first + n, dtype=np.uint64)
    values = np.repeat(np.arange(n, dtype=np.float32)[:, None], table.dim, axis=1)
    table.assign(ids, values, request_time=time)
    table.apply_gradients(ids, np.ones_like(values), request_time=time)
    return ids


def content(table):
    """Every row as (id, weights, state, time), by id."""
    stripes = [table.export_stripe(s) for s in range(table.stripes)]
    return {
        int(fid): (weights.tolist(), state.tolist(), int(time))
        for rows in stripes
        for fid, weights, state, time in zip(rows.ids, rows.weights, rows.state, rows.last_update, strict=True)
    }


# ---- names ---------------------------------------------------------------------------------------------------------


def test_a_set_of_shards_is_whole_or_refused():
    assert shard_file_name("d/t", 7, 123456) == "d/t-00007-of-123456"
    assert validate_shard_files("d/t", shard_file_names("d/t", 3)) == 3
    assert validate_shard_files("t", ["t-00000-of-00001", "t-00000-of-00001.tmp-12", "t-x", "t1-00000-of-00002"]) == 1
    for files, words in [
        ([], "no file"),
        (["t-00000-of-00001-tmp-1"], "no file"),
        (["t-00000-of-00002"], "00001-of-00002 is missing"),
        (["t-00000-of-00001", "t-00001-of-00001"], "only 1 shards"),
        (["t-00000-of-00001", "t-00000-of-00002"], "several sets"),
        (["other"], "not a file of"),
        (["t-00000-of-00000"], "only 0 shards"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            validate_shard_files("t", files)


def test_a_table_and_another_whose_name_it_begins_do_not_mix(tmp_path):
    for name in ("table1", "table10"):
        (tmp_path / shard_file_name(name, 0, 1)).touch()
    assert find_shard_files(f"{tmp_path}/table1") == [f"{tmp_path}/table1-00000-of-00001"]


# ---- one table -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [-1, 1, 3, 40])
def test_a_saved_table_reads_back_bit_for_bit(tmp_path, parallel):
    table, other = make_table(), make_table()
    fill(table, 300)
    assert save_table(table, f"{tmp_path}/t", parallel=parallel) == 300
    assert len(find_shard_files(f"{tmp_path}/t")) == max(parallel, 1)
    fill(other, 5, first=10_000)
    assert restore_table(other, f"{tmp_path}/t") == 300
    assert content(other) == content(table), "and the rows that were there are gone"
    assert other.newest_update == 1000


def test_an_empty_table_is_saved_and_restored(tmp_path):
    table = make_table()
    assert save_table(make_table(), f"{tmp_path}/t") == 0
    fill(table, 3)
    assert restore_table(table, f"{tmp_path}/t") == 0
    assert len(table) == 0


def test_the_file_is_a_tfrecord_of_entry_dumps(tmp_path):
    table = make_table()
    fill(table, 20)
    save_table(table, f"{tmp_path}/t")
    records, rest = naive.walk_records((tmp_path / "t-00000-of-00001").read_bytes())
    assert rest == b""
    entries = [hash_table_pb2.EntryDump.FromString(record) for record in records]
    assert {
        entry.id: (list(entry.num), list(entry.opt.dump[0].adagrad.norm), entry.last_update_ts_sec) for entry in entries
    } == content(table)


def test_a_file_that_plain_protobuf_wrote_reads(tmp_path):
    entry = hash_table_pb2.EntryDump(id=-5, num=[1.5, 2.5])
    entry.opt.dump.add().adagrad.norm.extend([3, 4])
    (tmp_path / "t-00000-of-00001").write_bytes(naive.frame_records([entry.SerializeToString()]))
    table = make_table()
    restore_table(table, f"{tmp_path}/t")
    assert content(table) == {2**64 - 5: ([1.5, 2.5], [3.0, 4.0], 0)}


def test_saving_again_in_fewer_files_leaves_no_mixed_set(tmp_path):
    table = make_table()
    fill(table, 50)
    save_table(table, f"{tmp_path}/t", parallel=4)
    (tmp_path / "t1-00000-of-00004").touch()
    save_table(table, f"{tmp_path}/t", parallel=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "t-00000-of-00002",
        "t-00001-of-00002",
        "t1-00000-of-00004",
    ]


def test_expired_rows_are_not_saved_but_stay_in_memory(tmp_path):
    table, other = make_table(ttl_days=1), make_table()
    for fid, when in ((1, 9_913_599), (2, 9_913_601), (3, 10_000_000)):
        table.assign(np.array([fid]), np.ones((1, 2), np.float32), request_time=when)
    save_table(table, f"{tmp_path}/t")
    assert len(table) == 3
    restore_table(other, f"{tmp_path}/t")
    assert sorted(content(other)) == [2, 3]


def test_a_time_still_to_come_expires_no_other_row(tmp_path):
    table, other = make_table(ttl_days=30), make_table()
    now = int(time.time())
    for fid, when in ((1, now), (2, now + 365 * 86_400)):
        table.assign(np.array([fid]), np.ones((1, 2), np.float32), request_time=when)
    assert save_table(table, f"{tmp_path}/t") == 2
    restore_table(other, f"{tmp_path}/t")
    assert sorted(content(other)) == [1, 2]


def test_a_serving_table_takes_weights_alone_and_cannot_be_saved(tmp_path):
    table = make_table()
    fill(table, 4)
    save_table(table, f"{tmp_path}/t")
    serving = Table(
        table_config(
            "s", segments=[Segment(2, compressor=Fp16())], entry_type="serving", skip_zero_embedding=True
        ).proto
    )
    table.assign(np.array([0]), np.zeros((1, 2), np.float32), request_time=1000)
    save_table(table, f"{tmp_path}/t")
    restore_table(serving, f"{tmp_path}/t")
    assert sorted(content(serving)) == [1, 2, 3], "zero rows are left out"
    assert {time for _, _, time in content(serving).values()} == {0}
    with pytest.raises(InvalidRequestError, match="serving"):
        save_table(serving, f"{tmp_path}/s")
    assert not list(tmp_path.glob("s*"))


def test_a_missing_set_leaves_the_table_alone(tmp_path):
    table = make_table()
    fill(table, 3)
    with pytest.raises(CheckpointError, match="no file t-"):
        restore_table(table, f"{tmp_path}/t")
    with pytest.raises(CheckpointError):
        restore_table(table, f"{tmp_path}/nowhere/t")
    assert len(table) == 3


def test_damage_is_named_by_file_and_record(tmp_path):
    table = make_table()
    fill(table, 30)
    save_table(table, f"{tmp_path}/t")
    file = tmp_path / "t-00000-of-00001"
    whole = file.read_bytes()
    for damaged, words in [
        (whole[:-3], "ends inside record 29"),
        (whole[:5], "ends inside record 0"),
        (whole[:20] + bytes([whole[20] ^ 1]) + whole[21:], "record 0 is damaged"),
        (naive.frame_records([b"", b"\x09"]), "record 0: .*id"),
        (whole + naive.frame_records([b"\xff\xff"]), "record 30: .*no EntryDump"),
    ]:
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=words) as caught:
            list(read_rows(table.layout, str(file)))
        assert "t-00000-of-00001" in str(caught.value)
    other = make_table(dim=3)
    file.write_bytes(whole)
    with pytest.raises(CheckpointError, match="2 weights, the table has 3"):
        restore_table(other, f"{tmp_path}/t")


def test_nothing_is_left_of_a_file_whose_writing_failed(tmp_path, monkeypatch):
    table = make_table()
    fill(table, 3)
    monkeypatch.setattr(Table, "export_stripe", lambda self, s: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        save_table(table, f"{tmp_path}/t")
    assert list(tmp_path.iterdir()) == []


def test_paths_may_be_urls():
    table, other = make_table(), make_table()
    fill(table, 10)
    save_table(table, "memory://entry-files/t", parallel=2)
    restore_table(other, "memory://entry-files/t")
    assert content(other) == content(table)


# ---- several tables ------------------------------------------------------------------------------------------------


def make_tables():
    tables = {
        "a": make_table("a", 1, Sgd()),
        "b": make_table("b", 3, Momentum()),
        "empty": make_table("empty", 2),
        "z": make_table("z", 2),
    }
    for n, table in zip((5, 70, 0, 9), tables.values(), strict=True):
        fill(table, n)
    return tables


@pytest.mark.parametrize("parallel", [-1, 3])
def test_saved_tables_read_back_by_name(tmp_path, parallel):
    tables = make_tables()
    assert save_tables(tables, f"{tmp_path}/m", parallel=parallel) == {"a": 5, "b": 70, "empty": 0, "z": 9}
    assert feature_stat(f"{tmp_path}/m") == {"a": 5, "b": 70, "empty": 0, "z": 9}
    twins = {
        "z": make_table("z", 2),
        "b": make_table("b", 3, Momentum()),
        "new": make_table("new"),
    }
    kept = fill(twins["b"], 2, first=500)
    fill(twins["new"], 1)
    assert restore_tables(twins, f"{tmp_path}/m") == {"z": 9, "b": 70}
    assert content(twins["z"]) == content(tables["z"])
    assert content(tables["b"]).items() <= content(twins["b"]).items()
    assert twins["b"].contains(kept).all(), "nothing is cleared"
    assert len(twins["new"]) == 1


def test_a_table_that_the_files_do_not_have_is_warned_about(tmp_path, caplog):
    save_tables({"a": make_table("a")}, f"{tmp_path}/m")
    with caplog.at_level(logging.WARNING):
        restore_tables({"a": make_table("a"), "b": make_table("b")}, f"{tmp_path}/m")
    assert "'b' is not in" in caplog.text


def test_the_files_are_a_snappy_stream_and_plain_metadata(tmp_path):
    tables = make_tables()
    save_tables(tables, f"{tmp_path}/m")
    data, stream = (tmp_path / "m-00000-of-00001").read_bytes(), b""
    while data:
        (size,) = struct.unpack(">I", data[:4])
        stream += bytes(cramjam.snappy.decompress_raw(data[4 : 4 + size]))
        data = data[4 + size :]
    entries, rest = naive.walk_records(stream)
    assert rest == b""
    metas, _ = naive.walk_records((tmp_path / "m.meta-00000-of-00001").read_bytes())
    counted = [hash_table_pb2.MultiHashTableMetadata.FromString(each) for each in metas]
    assert [(each.table_name, each.num_entries) for each in counted] == [("a", 5), ("b", 70), ("empty", 0), ("z", 9)]
    widths = [len(hash_table_pb2.EntryDump.FromString(entry).num) for entry in entries]
    assert widths == [1] * 5 + [3] * 70 + [2] * 9


def test_one_expiry_may_hold_for_all_tables(tmp_path):
    tables = {"a": make_table("a", ttl_days=1), "b": make_table("b")}
    for table in tables.values():
        fill(table, 2, time=0)
        fill(table, 1, first=100, time=DAY)
    expire = hash_table_pb2.SlotExpireTimeConfig(default_expire_time=5)
    expire.slot_expire_times.add(slot=0, expire_time=1)
    assert save_tables(tables, f"{tmp_path}/m") == {"a": 1, "b": 3}
    assert save_tables(tables, f"{tmp_path}/m", expire=expire) == {"a": 1, "b": 1}
    expire.slot_expire_times[0].expire_time = 2
    assert save_tables(tables, f"{tmp_path}/m", expire=expire) == {"a": 3, "b": 3}


def test_data_and_metadata_that_disagree_are_refused(tmp_path):
    tables = make_tables()
    save_tables(tables, f"{tmp_path}/m")
    meta = tmp_path / "m.meta-00000-of-00001"
    whole = meta.read_bytes()

    def counted(*pairs):
        return naive.frame_records(
            [hash_table_pb2.MultiHashTableMetadata(table_name=n, num_entries=c).SerializeToString() for n, c in pairs]
        )

    for content_of_meta, words in [
        (counted(("a", 5), ("b", 70)), "more records than"),
        (counted(("a", 5), ("b", 70), ("z", 10)), "1 records before"),
        (counted(("b", 75), ("z", 9)), "1 weights, the table has 3"),
        (counted(("unknown", 200)), "116 records before"),
        (naive.frame_records([b"\xff"]), "no MultiHashTableMetadata"),
        (whole[:-1], "ends inside"),
    ]:
        meta.write_bytes(content_of_meta)
        with pytest.raises(CheckpointError, match=words):
            restore_tables(tables, f"{tmp_path}/m")
    meta.unlink()
    with pytest.raises(CheckpointError, match=r"m\.meta"):
        restore_tables(tables, f"{tmp_path}/m")
    save_tables(tables, f"{tmp_path}/m", parallel=2)
    for index in range(2):
        (tmp_path / shard_file_name("m.meta", index, 2)).unlink()
    meta.write_bytes(whole)
    with pytest.raises(CheckpointError, match="2 data files and 1 metadata"):
        restore_tables(tables, f"{tmp_path}/m")


# ---- the checkpoint's directory ------------------------------------------------------------------------------------


def test_assets_stand_where_the_reference_puts_them():
    directory = assets.asset_directory("d/model.ckpt", 100)
    assert directory == "d/model.ckpt-100.assets/"
    assert assets.asset_base(directory, "MonolithHashTable_a:b/c") == f"{directory}MonolithHashTable_a-b-c"
    assert assets.multi_table_base(directory, "x") == f"{directory}MonolithMultiHashTable_x"
    assert assets.filter_base(directory, 3) == f"{directory}hash_filter_3"


def test_a_table_is_found_under_the_first_name_that_has_files(tmp_path):
    for name in ("new10-00000-of-00001", "old-1-00000-of-00001", "older.meta-00000-of-00001"):
        (tmp_path / name).touch()
    assert assets.find_restore_base(f"{tmp_path}/", ["new1", "old:1", "older"]) == f"{tmp_path}/old-1"
    assert assets.find_restore_base(f"{tmp_path}/", ["older"]) == f"{tmp_path}/older"
    with pytest.raises(ValueError, match="'new1'"):
        assets.find_restore_base(f"{tmp_path}/", ["new1"])


def test_the_only_asset_directory_is_found(tmp_path):
    assert assets.only_asset_directory(str(tmp_path)) is None
    (tmp_path / "m-1.assets").mkdir()
    assert assets.only_asset_directory(str(tmp_path)) == f"{tmp_path}/m-1.assets/"
    (tmp_path / "m-2.assets").mkdir()
    assert assets.only_asset_directory(str(tmp_path)) is None


def test_row_counts_are_a_text_file(tmp_path):
    assets.write_ckpt_info(str(tmp_path), 5, {"user": 3, "item": 4})
    assert 'key: "user"' in (tmp_path / "ckpt.info-5").read_text()
    assert dict(assets.read_ckpt_info(str(tmp_path), 5).feature_counts) == {"user": 3, "item": 4}
    with pytest.raises(CheckpointError, match="missing"):
        assets.read_ckpt_info(str(tmp_path), 6)
    (tmp_path / "ckpt.info-6").write_text("{")
    with pytest.raises(CheckpointError, match="ckpt.info-6"):
        assets.read_ckpt_info(str(tmp_path), 6)


def test_random_rows_survive(tmp_path):
    spec = table_config("t", dim=5, optimizer=Adagrad(), initializer=RandomUniform(-1, 1), seed=3)
    table, other = Table(spec.proto), Table(spec.proto)
    table.reinitialize(np.array([0, 2**64 - 1, 7], np.uint64), request_time=5)
    save_table(table, f"{tmp_path}/t")
    restore_table(other, f"{tmp_path}/t")
    assert content(other) == content(table)
    assert 2**64 - 1 in content(other)
