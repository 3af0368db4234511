"""Ranks as threads of this process: what does not need processes of their own."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import trilith
from tests.conformance.worker_ops.exchange import _Rank, _Ranks
from trilith.errors import ClusterMismatchError, InvalidRequestError, UnknownVariableError
from trilith.peers import PeerClient
from trilith.tables import Sgd, Zeros

TABLE = {"dim": 1, "optimizer": Sgd(learning_rate=1.0), "initializer": Zeros()}


def together(size, work):
    """Call work(client, rank) on every rank; what each gave."""
    exchanges = [_Ranks(size) for _ in range(3)]
    found, failures = [None] * size, []

    def run(rank):
        made = iter(exchanges)
        try:
            with PeerClient(lambda rows: _Rank(next(made), rank), threads=1) as client:
                found[rank] = work(client, rank)
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)
            for each in exchanges:
                each.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise next((each for each in failures if not isinstance(each, threading.BrokenBarrierError)), failures[0])
    return found


def test_from_five_ranks_on_rank_0_holds_no_rows_and_its_checkpoint_is_of_four_shards(tmp_path):
    def work(client, rank):
        client.table("t", **TABLE)
        client.apply_gradients({"t": (np.arange(20), np.full((20, 1), rank, np.float32))})
        client.create_variables({"w": np.full(3, 2, np.float32)}, optimizer=Sgd())
        client.save(str(tmp_path / "five"))
        return sum(table.rows for shard in client.stats() for table in shard.tables), client.pull_variables()[0]["w"]

    found = together(5, work)
    assert [rows for rows, _ in found] == [0, 5, 5, 5, 5]
    assert all(values.tolist() == [2, 2, 2] for _, values in found)
    with trilith.connect("local://", threads=1) as client:
        client.restore(str(tmp_path / "five"))
        assert client.lookup({"t": range(20)})["t"].ravel().tolist() == [-10] * 20


def test_thresholds_count_occurrences_of_every_rank():
    def work(client, rank):
        client.table("t", occurrence_threshold=3, **TABLE)
        client.apply_gradients({"t": ([4, 4, 5], np.ones((3, 1), np.float32))})
        client.apply_gradients({"t": ([4, 5], np.ones((2, 1), np.float32))})
        return client.lookup({"t": [4, 5]})["t"].ravel().tolist()

    # What workers of a PS do one after another.
    with trilith.connect("local://", threads=1) as client:
        client.table("t", occurrence_threshold=3, **TABLE)
        for ids in ([4, 4, 5], [4, 4, 5], [4, 5], [4, 5]):
            client.apply_gradients({"t": (ids, np.ones((len(ids), 1), np.float32))})
        wanted = client.lookup({"t": [4, 5]})["t"].ravel().tolist()
    assert together(2, work) == [wanted, wanted]
    assert wanted[0] < wanted[1] < 0


def test_ranks_that_disagree_about_a_table_are_told():
    with pytest.raises(ClusterMismatchError, match="rank 1 makes tables"):
        together(2, lambda client, rank: client.table("t", **{**TABLE, "dim": 1 + rank}))


def test_what_is_not_there_is_refused():
    def work(client, rank):
        with pytest.raises(InvalidRequestError, match="no tables yet"):
            client.lookup({"t": [1]})
        table = client.table("t", **TABLE)
        assert (table.dim, client.table("t").name) == (1, "t")
        with pytest.raises(NotImplementedError):
            table.assign([1], [[1.0]])
        with pytest.raises(InvalidRequestError, match="negative"):
            client.lookup({"t": [-1]})
        with pytest.raises(UnknownVariableError, match="'w'"):
            client.pull_variables(["w"])
        assert client.restore_newest("memory://nothing") == ""

    together(1, work)
