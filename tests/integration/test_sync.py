"""Training PS and serving replicas as real processes, which find each other in ZooKeeper, die and come back."""

from __future__ import annotations

import signal
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import trilith
from tests import zookeeper
from tests.programs import PATIENCE_S, Processes
from tests.waiting import eventually
from trilith.client import Client
from trilith.config import ClientConfig
from trilith.rpc.remote import RemoteShard
from trilith.shard import IdPart
from trilith.tables import FixedR8, Fp16, RandomUniform, Sgd, table_config
from trilith_services.local.supervisor import free_ports
from trilith_services.ps.engine.row_layout import serving_config
from trilith_services.ps.engine.table import Table

DIM = 4
TABLES = {
    "user": {"dim": DIM, "compressor": Fp16(), "ttl_days": 1},
    "item": {"dim": 2 * DIM, "compressor": FixedR8(4.0)},
}
COMMON = {"optimizer": Sgd(learning_rate=0.01), "initializer": RandomUniform(-1, 1)}
IDS = np.arange(20_000, dtype=np.uint64)

pytestmark = pytest.mark.timeout(900)


class Training:
    """Steps, erasures and evictions without pause."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.tables = {name: client.table(name, **COMMON, **options) for name, options in TABLES.items()}
        self.steps = 0
        self._stop = threading.Event()
        self._failure: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        rng = np.random.default_rng(1)
        try:
            while not self._stop.wait(0.005):
                self.steps += 1
                for table in self.tables.values():
                    ids = rng.choice(IDS, 500)
                    # Some rows are a day older than the others: evicting takes them.
                    at = 10 * 86400 - (2 * 86400 if self.steps % 3 == 0 else 0)
                    grads = rng.normal(size=(500, table.dim)).astype(np.float32)
                    self.client.apply_gradients({table.name: (ids, grads)}, request_time=at)
                    table.erase(rng.choice(IDS, 20))
                if self.steps % 50 == 0:
                    self.tables["user"].evict()
        except BaseException as error:  # noqa: BLE001 - raised again in the test
            self._failure.append(error)

    def end(self) -> float:
        """Stop; returns when the last write had been acknowledged."""
        self._stop.set()
        self._thread.join()
        if self._failure:
            raise self._failure[0]
        return time.time()


def replica_shard(address: str) -> RemoteShard:
    return RemoteShard(lambda: address, ClientConfig(timeout_s=30))


def check(training: Training, address: str, ended: float) -> None:
    """Every row at the replica equals the compressed training row, and it has no others."""
    shard = replica_shard(address)
    eventually(lambda: shard.stats().replica.as_of > ended, timeout_s=PATIENCE_S)
    for name, table in training.tables.items():
        present = table.contains(IDS)
        assert 0 < present.sum() < len(IDS)
        np.testing.assert_array_equal(shard.contains(IdPart(name, IDS)), present)
        config = table_config(name, **COMMON, **TABLES[name]).proto
        want = Table(serving_config(config))
        want.assign(IDS[present], raw_rows(training.client, name, IDS[present]))
        np.testing.assert_array_equal(shard.lookup([IdPart(name, IDS)])[0], want.lookup(IDS))
    shard.close()


def raw_rows(client: Client, table: str, ids: np.ndarray) -> np.ndarray:
    """float32[n, dim] as they are in training: a lookup may see compressed ones."""
    from trilith_proto import hash_table_pb2

    entries = client.lookup_entries(table, ids)
    return np.array([hash_table_pb2.EntryDump.FromString(each).num for each in entries], np.float32)


def test_replicas_die_come_back_and_are_added_and_end_equal_to_training(processes: Processes, tmp_path: Path) -> None:
    zookeeper.require_zookeeper()
    with zookeeper.ensemble(tmp_path) as servers:
        url = f"zk://{servers.hosts}/serving?session_timeout={zookeeper.SESSION_S:g}"
        metrics = free_ports(1)[0]
        ps = processes.start(
            "ps", "ps", "--sync-to", url, "--sync-name", "m", "--sync-every", "0.1", "--metrics-port", str(metrics)
        )
        where = ("--discovery", url, "--name", "m")
        replica_0 = processes.start("replica-0", "serving", "ps", *where, "--replica", "0")
        processes.wait("ps")
        with trilith.connect(f"static://{ps}", timeout_s=60) as client:
            training = Training(client)
            try:
                processes.wait("replica-0")
                for _ in range(2):
                    processes.end("replica-0")
                    before = training.steps
                    eventually(lambda: training.steps > before + 20, timeout_s=PATIENCE_S)  # noqa: B023
                    processes.start("replica-0", "serving", "ps", *where, "--replica", "0")
                    processes.wait("replica-0")
                replica_1 = processes.start("replica-1", "serving", "ps", *where, "--replica", "1")
                servers.leader().kill()
                processes.wait("replica-1")
                before = training.steps
                eventually(lambda: training.steps > before + 60, timeout_s=PATIENCE_S)
            finally:
                ended = training.end()
            check(training, replica_0, ended)
            check(training, replica_1, ended)
            both = {"replica-0", "replica-1"}
            # A session that the change of leaders has cost is renewed.
            eventually(lambda: {target.name for target in client.stats()[0].sync_targets} == both, timeout_s=PATIENCE_S)
            with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics") as reply:
                text = reply.read().decode()
            for name in ("lag_seconds", "lag_rows", "rows_total", "failures_total"):
                assert f'trilith_ps_sync_{name}{{target="replica-1"}}' in text
        assert processes.end("replica-0", signal.SIGTERM) == 0
        assert processes.end("ps", signal.SIGTERM) == 0


def test_a_training_ps_that_comes_back_empty_empties_its_replica(processes: Processes) -> None:
    replica = processes.start("replica", "serving", "ps")
    to = ("--sync-to", f"here={replica}", "--sync-every", "0.1")
    ps = processes.start("ps", "ps", *to)
    processes.wait("ps")
    with trilith.connect(f"static://{ps}", timeout_s=60) as client:
        users = client.table("user", **COMMON, **TABLES["user"])
        users.assign(IDS[:100], np.ones((100, DIM), np.float32))
        processes.wait("replica")
        shard = replica_shard(replica)
        acknowledged = time.time()
        eventually(lambda: shard.stats().replica.as_of > acknowledged, timeout_s=PATIENCE_S)
        assert shard.contains(IdPart("user", IDS[:200])).sum() == 100
    processes.end("ps")
    assert shard.contains(IdPart("user", IDS[:200])).sum() == 100  # it goes on serving
    processes.start("ps", "ps", *to)
    processes.wait("ps")
    with trilith.connect(f"static://{ps}", timeout_s=60) as client:
        users = client.table("user", **COMMON, **TABLES["user"])
        users.assign(IDS[150:160], np.ones((10, DIM), np.float32))
        acknowledged = time.time()
        eventually(lambda: shard.stats().replica.as_of > acknowledged, timeout_s=PATIENCE_S)
    assert shard.contains(IdPart("user", IDS[:200])).nonzero()[0].tolist() == list(range(150, 160))
    shard.close()
