"""Workers that hold the rows themselves, as real processes over gloo: against PS steps in the order of the ranks."""

from __future__ import annotations

import itertools
import multiprocessing

import numpy as np
import pytest

import trilith
from tests.congruence.clusters import LocalCluster
from tests.integration import peers_child
from tests.integration.peers_child import TABLES, batch
from trilith.nn import FusedLayouts
from trilith.tables.factories import create_partitioned_tables

IDS = list(range(1, 60))
TIMEOUT_S = 240


def run(size, folder, *calls):
    """Let `size` processes make the calls; per rank what each call gave."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.integration.peers_child"])  # torch is imported once
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (rank, size, str(folder / "meeting"), list(calls), theirs)
        processes.append(context.Process(target=peers_child.main, args=arguments))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        found = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(TIMEOUT_S), f"rank {rank} said nothing"
            found.append(pipe.recv())
        for process in processes:
            process.join(TIMEOUT_S)
            assert process.exitcode == 0
        return found
    finally:
        for process in processes:
            process.kill()
            process.join()


def on_ps(client, size, steps):
    """The same steps, one worker after another."""
    for name, table in TABLES.items():
        client.table(name, **table)
    for step in range(steps):
        for rank in range(size):
            client.apply_gradients(batch(rank, step), global_step=step, request_time=step + 1)


def rows_of(client):
    return client.lookup(dict.fromkeys(TABLES, IDS))


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name, rows in one.items():
        np.testing.assert_array_equal(rows, two[name])
        assert rows.any()


@pytest.fixture(scope="module")
def ps_checkpoint(tmp_path_factory):
    """What two workers did on two PS of this process, and the rows."""
    path = str(tmp_path_factory.mktemp("ps") / "checkpoint")
    with LocalCluster("3-ps") as cluster, cluster.connect() as client:
        on_ps(client, 2, 2)
        client.create_variables({"w2": np.full(5, 8, np.float32)}, optimizer=trilith.tables.Sgd())
        client.global_step(set_to=11)
        client.save(path)
        return path, rows_of(client)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_workers_that_hold_the_rows_are_as_workers_of_ps(size, tmp_path, ps_checkpoint):
    written = str(tmp_path / "written")
    there, there_rows = ps_checkpoint
    found = run(
        size,
        tmp_path,
        ("train", 3),
        ("lookup", IDS),
        ("rows_here",),
        ("variables",),
        ("refuse",),
        ("lookup", IDS),
        ("save", written),
        ("restore", there),
        ("lookup", IDS),
        ("module", 0, 0),
        ("module", 2, 2),
        ("module", 1, 2, 1),
        ("write",),
        ("layouts", 0),
        ("layouts", 2),
        ("average",),
    )
    _, trained, held, variables, refused, present, saved, restored, loaded, *rest = zip(*found, strict=True)
    exact, late, staged, wrote, laid, ahead, means = rest
    # The steps of every rank are those of a worker of PS, rank after rank.
    with trilith.connect("local://", threads=1) as client:
        on_ps(client, size, 3)
        for rows in trained:
            assert_same(rows, rows_of(client))
        assert sum(held) == sum(client.table(name).size() for name in TABLES)
    assert all(held)
    for values in variables:
        assert values["w3"].tolist() == [[0, 1], [2, 3]]
        assert values["w5"].tolist() == [[5, 5], [5, 5]]
    # A NaN is refused where it was made; the others' gradients count.
    assert refused == ("NonFiniteError",) + ("",) * (size - 1)
    # A cluster of any size reads their checkpoint, and they read its.
    assert set(saved) == {7}
    with LocalCluster("3-ps") as cluster, cluster.connect() as client:
        assert client.restore(written) == 7
        assert_same(rows_of(client), present[0])
        assert client.pull_variables()[0]["w3"].tolist() == [0, 1, 2, 3]
    assert set(restored) == {11}
    for rows in loaded:
        assert_same(rows, there_rows)
    # Modules look up ahead and push behind; every step is `size` steps, and nothing is lost.
    for one, other, third in zip(exact, late, staged, strict=True):
        assert all(after < before for before, after in itertools.pairwise(one))
        assert third[-1] < other[-1] < one[-1]
    for tensors in itertools.chain.from_iterable(means):
        np.testing.assert_allclose(tensors[0], [(size + 1) / 2] * 3, rtol=1e-3)
        assert tensors[1:] == [None, [[60000.0]]]
    assert_writes(size, wrote)
    assert_layouts(size, laid)
    for one, other in zip(laid, ahead, strict=True):
        assert not np.array_equal(one[-1]["bias"], other[-1]["bias"])  # the rows have gone on


def assert_writes(size, wrote):
    """Every rank saw what PS hold after the same writes, rank after rank."""
    with trilith.connect("local://", threads=1) as client:
        for name, table in TABLES.items():
            client.table(name, **table)
        for verb in ("assign", "assign_add"):
            for rank in range(size):
                rows = {name: (ids % 20 + 100, rows) for name, (ids, rows) in batch(rank, 50).items()}
                getattr(client, verb)(rows, request_time=9)
        wanted = client.lookup(dict.fromkeys(TABLES, range(100, 120)))
    for each in wrote:
        assert_same({name: each[name] for name in TABLES}, wanted)
        assert each["reset"] == [1, 0, 1]


def assert_layouts(size, laid):
    """Layouts are those of workers of PS that step one after another."""
    features, layouts = peers_child.layout_features()
    with trilith.connect("local://", threads=1) as client:
        modules = [
            FusedLayouts(create_partitioned_tables(client, features, layouts, prefix="layouts/")) for _ in range(size)
        ]
        for step in range(3):
            fetched = [
                each.tables.fetch(each.tables.shard(peers_child.layout_batch(rank, step), 5))
                for rank, each in enumerate(modules)
            ]
            for rank, (each, rows) in enumerate(zip(modules, fetched, strict=True)):
                tensors = each(rows)
                for name, tensor in tensors.items():
                    np.testing.assert_allclose(laid[rank][step][name], tensor.detach(), rtol=1e-5, atol=1e-6)
                sum(tensor.sum() for tensor in tensors.values()).backward()
