"""Entries in ZooKeeper, as processes beside training: two shards with two replicas each, two entries, all mortal."""

from __future__ import annotations

import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.consoles import open_console
from tests.programs import PATIENCE_S, Processes
from tests.served import Load, Trained, train
from tests.waiting import eventually
from trilith.discovery.serving_nodes import ModelState, ServingMeta
from trilith.discovery.zk_url import ZkUrl
from trilith.discovery.zookeeper import ZooKeeper
from trilith.errors import UnavailableError
from trilith.ops.combiners import combiner_of
from trilith.ops.pool import pool_rows
from trilith.serving.exports import ps_base
from trilith.serving.prediction import Predictor
from trilith_proto import hash_table_pb2
from trilith_services.demo.job import TABLE
from trilith_services.local.supervisor import free_ports, is_serving
from trilith_services.ps.engine.row_layout import serving_config
from trilith_services.ps.engine.table import Table
from trilith_services.ps.process.server import ParameterServer, PsOptions
from trilith_services.ps.process.shard import LocalShard

pytestmark = pytest.mark.timeout(900)

ENTRIES = ("one", "two")
REPLICAS = ("replica-0-0", "replica-0-1", "replica-1-0", "replica-1-1")


def scores_by_hand(trained: Trained) -> np.ndarray:
    """What the model gives for the rows of the training PS, compressed as their table's config says."""
    ids = np.concatenate(list(trained.data.vocabulary().values()))
    entries = trained.client.lookup_entries(TABLE, ids)
    rows = np.array([hash_table_pb2.EntryDump.FromString(each).num for each in entries], np.float32)
    (config,) = (each for each in trained.client.describe()[0].tables if each.name == TABLE)
    served = Table(serving_config(config))
    served.assign(ids, rows)
    task, mean = trained.job.task, combiner_of("mean")
    features = [trained.data.features[name] for name in task.features]
    pooled = [pool_rows(served.lookup(each.values), each.row_splits, mean) for each in features]
    with torch.no_grad():
        return torch.sigmoid(task.head(torch.from_numpy(np.stack(pooled, 1)))).numpy()


def start_all(processes: Processes, training: str, serving: str, exports: str) -> None:
    """Training PS, replicas that they fill, and entries that have nothing to serve yet."""
    listed = ("--discovery", serving, "--name", "clicks")
    for index in ("0", "1"):
        shard = ("--index", index, "--count", "2")
        sync = ("--sync-to", serving, "--sync-name", "clicks", "--sync-every", "0.1")
        processes.start(f"ps-{index}", "ps", *shard, "--discovery", training, "--checkpoint-anywhere", *sync)
        for replica in ("0", "1"):
            processes.start(f"replica-{index}-{replica}", "serving", "ps", *shard, "--replica", replica, *listed)
    for name in ENTRIES:
        # Where others starve this machine, half a second is no reason to give a request up.
        quick = ("--http", "", "--poll", "0.1", "--deadline", "5")
        processes.start(name, "serving", "entry", "--export", exports, *listed, *quick)


def states(zookeeper: ZooKeeper) -> list[int]:
    """What the entries' nodes say."""
    return [meta.stat for meta in metas(zookeeper).values()]


def metas(zookeeper: ZooKeeper) -> dict[str, ServingMeta]:
    """The entries' nodes by name."""
    above = f"{zookeeper.url.root}/service/clicks/entry:0"
    bodies = {name: zookeeper.read(f"{above}/{name}") for name in zookeeper.children(above)}
    return {name: ServingMeta.from_json(body) for name, body in bodies.items() if body}


def version_of(processes: Processes, name: str) -> int:
    """Which export an entry serves."""
    with Predictor(f"127.0.0.1:{processes.ports[name]}", timeout_s=20.0) as predictor:
        return predictor.status().model_version


def fresh(predictor: Predictor, records: list[bytes], *, since: float) -> None:
    """Wait until all that was acknowledged by then is at every replica."""
    eventually(lambda: predictor.predict(records[:1]).rows_as_of > since, timeout_s=PATIENCE_S)


@pytest.mark.slow
def test_whoever_dies_no_request_fails_and_scores_are_those_of_the_compressed_training_rows(
    processes: Processes, zk_url: str, tmp_path: Path, cleanup: Callable[..., None]
) -> None:
    exports, serving = str(tmp_path / "exports"), zk_url.replace("?", "/serving?")
    zookeeper = ZooKeeper(ZkUrl.parse(serving))
    cleanup(zookeeper.close)
    start_all(processes, zk_url, serving, exports)
    with (
        train(zk_url, tmp_path / "model") as trained,
        Predictor(serving, name="clicks", timeout_s=20.0) as predictor,
    ):
        exporter, records = trained.exporter(), trained.records.payloads()
        saved = trained.save()
        processes.wait(*REPLICAS)
        eventually(lambda: states(zookeeper) == [ModelState.LOADING] * 2, timeout_s=PATIENCE_S)
        with pytest.raises(UnavailableError, match="lists no entry of serving model 'clicks'"):
            predictor.predict(records, timeout_s=0.1)
        first = exporter.export(saved, exports)
        processes.wait(*ENTRIES)
        assert states(zookeeper) == [ModelState.AVAILABLE] * 2
        for name, meta in metas(zookeeper).items():
            assert (len(name), int(name), meta.server_type, meta.task) == (11, meta.replica, "entry", 0)

        wants = {first.version: scores_by_hand(trained)}
        fresh(predictor, records, since=time.time())
        found = predictor.predict(records)
        assert found.model_version == first.version
        np.testing.assert_allclose(found.scores, wants[first.version], atol=1e-6)
        status = predictor.status()
        assert (status.model, status.mode, status.model_version) == ("deepfm", "distributed", first.version)
        listed = {(int(name[8]), f"127.0.0.1:{processes.ports[name]}") for name in REPLICAS}
        assert {(each.shard, each.address) for each in status.replicas} == listed
        eventually(lambda: all(each.healthy for each in predictor.status().replicas), timeout_s=PATIENCE_S)

        with Load(serving, records, name="clicks") as load:
            load.more()
            for name in ("replica-0-1", "replica-1-0"):
                processes.end(name)
                load.more()
            trained.shift(1.0)
            second = exporter.export(trained.save(), exports)
            wants[second.version] = scores_by_hand(trained)
            eventually(
                lambda: load.errors or all(version_of(processes, name) == second.version for name in ENTRIES),
                timeout_s=PATIENCE_S,
            )
            load.more()
            processes.start("replica-1-0")
            processes.wait("replica-1-0")
            processes.end("one")
            load.more()
            eventually(
                lambda: [each.healthy for each in predictor.status().replicas] == [True] * 3, timeout_s=PATIENCE_S
            )
            load.more()
        assert load.errors == []
        assert {each.model_version for each in load.answers} == set(wants)
        for each in load.answers:
            np.testing.assert_allclose(each.scores, wants[each.model_version], atol=1e-6)

        ids = np.concatenate(list(trained.data.vocabulary().values()))
        trained.client.assign_add({TABLE: (ids, np.full((ids.size, 5), 0.125, np.float32))})
        fresh(predictor, records, since=time.time())
        after = predictor.predict(records)  # what training has learnt since, without another export
        np.testing.assert_allclose(after.scores, scores_by_hand(trained), atol=1e-6)
        assert np.abs(after.scores - wants[second.version]).max() > 1e-3
        assert after.model_version == second.version

        # The session of the killed one ends, and its node with it.
        eventually(lambda: states(zookeeper) == [ModelState.AVAILABLE], timeout_s=PATIENCE_S)
        assert processes.end("two", signal.SIGTERM) == 0
        assert states(zookeeper) == []  # who is asked to stop takes its node with it


def test_a_shard_whose_only_replica_is_killed_is_shown_as_missing_and_the_entry_as_not_ready(
    processes: Processes, zk_url: str, tmp_path: Path, cleanup: Callable[..., None]
) -> None:
    exports, listed = str(tmp_path / "exports"), ("--discovery", zk_url, "--name", "clicks")
    training = ParameterServer(LocalShard(threads=1), PsOptions(checkpoint_anywhere=True))
    cluster = f"static://127.0.0.1:{training.start()}"
    cleanup(training.stop)
    with train(cluster, tmp_path / "model") as trained:
        done = trained.exporter().export(trained.save(), exports)
    rows = f"{ps_base(exports, 0)}/{done.version}/rows"
    http = f"http://127.0.0.1:{free_ports(1)[0]}"
    processes.start("replica", "serving", "ps", "--rows", rows, *listed)
    processes.start("entry", "serving", "entry", "--export", exports, *listed, "--http", http.removeprefix("http://"))
    processes.wait("replica", "entry")

    def asked(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(http + path, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def states(look: dict) -> tuple[list[str], list[tuple[str, bool]]]:
        return (
            [each["state"] for each in look["entries"]],
            [(each["state"], each["alive"]) for each in look["replicas"]],
        )

    with open_console(cluster, serving=zk_url, model="clicks") as console:
        console.until(lambda look: states(look) == (["available"], [("available", True)]))
        assert asked("/healthz") == (200, "ok\n")
        processes.end("replica")
        eventually(lambda: asked("/healthz")[0] == 503, timeout_s=PATIENCE_S)
        assert "no replica of shard 0 of 1 answers" in asked("/healthz")[1]
        assert asked("/livez")[0] == 200
        look = console.until(lambda look: states(look) == (["degraded"], [("missing", False)]), timeout_s=PATIENCE_S)
        assert look["entries"][0]["problem"].startswith("shard 0: 0 of 1 replicas answer")
        eventually(lambda: not is_serving(f"127.0.0.1:{processes.ports['entry']}"), timeout_s=PATIENCE_S)
        with Predictor(f"127.0.0.1:{processes.ports['entry']}") as predictor:
            (missing,) = predictor.status().replicas
            assert (missing.shard, missing.healthy) == (0, False)
            assert missing.address == f"127.0.0.1:{processes.ports['replica']}"
        processes.start("replica")
        processes.wait("entry")
        assert asked("/healthz")[0] == 200
        console.until(lambda look: states(look) == (["available"], [("available", True)]), timeout_s=PATIENCE_S)
