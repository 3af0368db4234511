"""Clients across fork: a child of a process that has one open is a client of its own, whatever the parent was doing."""

from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import pytest

from tests.congruence.clusters import LocalCluster
from trilith.tables import Sgd, Zeros
from trilith_services.ps.process.server import ParameterServer, PsOptions
from trilith_services.ps.process.shard import LocalShard

_COMMON = """
import faulthandler, os, signal, sys, threading
import numpy as np
import trilith
from trilith.errors import ClosedError, TrilithError
from trilith.tables import Sgd, Zeros

faulthandler.dump_traceback_later(100, exit=True)
IDS = np.arange(12, dtype=np.uint64)
ONES = np.ones((12, 2), np.float32)
TABLE = dict(dim=2, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())

def forked(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.alarm(60)
        work()
    except BaseException as error:
        print("child:", type(error).__name__, error, flush=True)
        os._exit(1)
    os._exit(0)

def wait(*children):
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(ended), ended
"""


def run(program, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", _COMMON + program, *arguments], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(params=["1-ps", "3-ps"])
def cluster(request):
    with LocalCluster(request.param) as cluster, cluster.connect() as client:
        client.table("rows", dim=2, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())
        cluster.rows = lambda: client.table("rows").lookup(np.arange(12))
        yield cluster


def test_writes_of_parent_and_children_are_all_done(cluster):
    run(
        """
with trilith.connect(sys.argv[1], timeout_s=20) as client:
    table = client.table("rows", **TABLE)
    def work(turns=20):
        for _ in range(turns):
            table.apply_gradients(IDS, -ONES)
    work(1)
    def child():
        work()
        wait(forked(work))  # a child of a child
        client.close()
    children = [forked(child), forked(child)]
    work(19)
    wait(*children)
    table.lookup(IDS)  # the children's close did not end the parent's connection
""",
        cluster.address,
    )
    np.testing.assert_array_equal(cluster.rows(), 100.0)


def test_forks_while_other_threads_are_in_calls(cluster):
    out = run(
        """
with trilith.connect(sys.argv[1], timeout_s=20) as client:
    table = client.table("rows", **TABLE)
    stop, wrote = threading.Event(), [0] * 4
    def busy(mine):
        while not stop.is_set():
            table.lookup(IDS)
            table.apply_gradients(IDS, -ONES)
            wrote[mine] += 1
            client.stats()
    threads = [threading.Thread(target=busy, args=(mine,)) for mine in range(4)]
    for thread in threads: thread.start()
    def child():
        for _ in range(5):
            table.apply_gradients(IDS, -ONES)
            table.lookup(IDS)
        client.stats()
    for _ in range(4):
        wait(forked(child), forked(child))
    stop.set()
    for thread in threads: thread.join()
    print(sum(wrote) + 40)
""",
        cluster.address,
    )
    np.testing.assert_array_equal(cluster.rows(), float(out))


def test_workers_of_a_loader_look_rows_up_and_push(cluster):
    run(
        """
import torch
from torch.utils.data import DataLoader, Dataset
from trilith.pipelining import Pusher
with trilith.connect(sys.argv[1], timeout_s=20) as client:
    table = client.table("rows", **TABLE)
    table.assign(IDS, ONES)
    table.lookup(IDS)
    pusher = Pusher(2)
    pusher.push(lambda: table.lookup(IDS))
    class Rows(Dataset):
        def __len__(self): return 8
        def __getitem__(self, index):
            pusher.push(lambda: table.apply_gradients(IDS, -ONES))
            pusher.drain()
            return torch.from_numpy(table.lookup(IDS) * 0 + index)
    got = torch.cat(list(DataLoader(Rows(), batch_size=4, num_workers=2)))
    assert got.shape == (8, 12, 2), got.shape
""",
        cluster.address,
    )
    np.testing.assert_array_equal(cluster.rows(), 9.0)


def test_shared_files_go_to_one_worker_of_a_loader_each(cluster, tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.csv").write_text("id\n" + "\n".join(str(10 * number + row) for row in range(10)) + "\n")
    run(
        """
from torch.utils.data import DataLoader
import trilith.data
with trilith.connect(sys.argv[1], timeout_s=20) as client:
    columns = [trilith.data.Column("id", "fid_v2")]
    samples = trilith.data.read(sys.argv[2] + "/*.csv", format="csv", kind="example", columns=columns)
    samples = samples.share(client, "pass")
    loader = DataLoader(samples.torch(), batch_size=None, num_workers=2)
    count = sum(1 for _ in loader)
    assert count == 80, count
""",
        cluster.address,
        str(tmp_path),
    )


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_loader_share_a_queue_under_names_of_their_own_in_every_epoch(cluster, tmp_path, method):
    for number in range(6):
        (tmp_path / f"{number}").write_bytes(
            b"".join(struct.pack("<Q", 2) + b"%02d" % (10 * number + row) for row in range(10))
        )
    run(
        """
from torch.utils.data import DataLoader
import trilith.data

address, method = sys.argv[1], sys.argv[3]
with trilith.connect(address, timeout_s=20) as client:
    samples = trilith.data.read(sys.argv[2] + "/*", kind="plaintext")
    # An open client is the forked child's own; a spawned one connects by the address.
    samples = samples.share(client if method == "fork" else address, "pass", worker="rank-0")
    loader = DataLoader(samples.torch(), batch_size=None, num_workers=2, multiprocessing_context=method)
    for epoch in range(2):
        found = sorted(int(each) for each in loader)
        assert found == list(range(60)), (epoch, found)
    try:
        list(DataLoader(samples.take(3).torch(), batch_size=None, num_workers=2, multiprocessing_context=method))
    except TrilithError as error:
        assert "take(3) cannot be shared by 2 DataLoader workers" in str(error), error
    else:
        raise AssertionError("nobody has seen all records")
""",
        cluster.address,
        str(tmp_path),
        method,
    )


def test_an_embedded_clusters_queue_is_not_shared_by_processes(tmp_path):
    (tmp_path / "0").write_bytes(struct.pack("<Q", 1) + b"1")
    run(
        """
from torch.utils.data import DataLoader
import trilith.data

with trilith.connect("local://") as client:
    samples = trilith.data.read(sys.argv[1] + "/*", kind="plaintext").share(client, "pass")
    try:
        list(DataLoader(samples.torch(), batch_size=None, num_workers=2))
    except (TrilithError, ClosedError) as error:
        assert "share" in str(error), error
    else:
        raise AssertionError("each process has dealt out all files")
    assert list(samples) == [b"1"]
""",
        str(tmp_path),
    )


def test_a_cluster_in_zookeeper_is_found_anew(zk_url, cleanup):
    for index in range(2):
        server = ParameterServer(LocalShard(index=index, count=2, threads=1), PsOptions(discovery=zk_url))
        cleanup(server.stop)
        server.start()
    run(
        """
with trilith.connect(sys.argv[1], timeout_s=20) as client:
    table = client.table("rows", **TABLE)
    sessions = [client.directory.zookeeper.session]
    def child():
        table.apply_gradients(IDS, -ONES)
        client.table("other", **TABLE)  # compared with the cluster's record
        assert client.directory.zookeeper.session not in sessions
        client.close()
    for _ in range(2):
        wait(forked(child))
        table.apply_gradients(IDS, -ONES)
    assert client.directory.zookeeper.session in sessions  # no child has ended it
    np.testing.assert_array_equal(table.lookup(IDS), 4 * ONES)
""",
        zk_url,
    )


def test_an_embedded_cluster_stays_with_its_process():
    run(
        """
with trilith.connect("local://") as client:
    table = client.table("rows", **TABLE)
    table.assign(IDS, ONES)
    def child():
        for call in (lambda: table.lookup(IDS), lambda: table.assign(IDS, ONES), client.stats):
            try:
                call()
            except ClosedError as error:
                assert str(os.getppid()) in str(error), error
            else:
                raise AssertionError("not refused")
        client.close()
        with trilith.connect("local://") as own:
            own.table("rows", **TABLE).assign(IDS, ONES)
    wait(forked(child))
    np.testing.assert_array_equal(table.lookup(IDS), ONES)
"""
    )


def test_what_was_fetched_ahead_is_the_parents():
    run(
        """
from trilith.pipelining import Ahead, Prefetcher
with Prefetcher(iter(range(10)), lambda item: item, 2) as ahead:
    fetched = iter(ahead)
    next(fetched)
    value = Ahead(lambda: os.getpid())
    value.take()
    def child():
        assert value.take() == os.getpid()
        try:
            next(fetched)
        except ClosedError as error:
            assert "forked" in str(error)
        else:
            raise AssertionError("not refused")
        ahead.close()
    wait(forked(child))
    assert [item for item, _ in fetched] == list(range(1, 10))
"""
    )


def test_a_predictor_connects_anew(cleanup):
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    from trilith_proto import serving_pb2

    def predict(request, context):
        output = serving_pb2.PredictOutput(name="score", width=1, values=np.ones(1, "<f4").tobytes())
        return serving_pb2.PredictResponse(outputs=[output]).SerializeToString()

    server = grpc.server(ThreadPoolExecutor(4))
    cleanup(lambda: server.stop(0))
    methods = {"Predict": grpc.unary_unary_rpc_method_handler(predict)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("trilith.Prediction", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    run(
        """
stop = threading.Event()
def ask():
    assert trilith.remote_predict(sys.argv[1], [b""]).scores[0] == 1.0
def busy():
    while not stop.is_set(): ask()
ask()
threads = [threading.Thread(target=busy) for _ in range(3)]
for thread in threads: thread.start()
for _ in range(3):
    wait(forked(ask), forked(ask))
stop.set()
for thread in threads: thread.join()
""",
        f"127.0.0.1:{port}",
    )


@pytest.mark.parametrize("url", ["static", "hosts"])
def test_the_childs_client_closes_and_the_parents_goes_on(url, tmp_path, cleanup):
    options = PsOptions(discovery=f"hosts://{tmp_path}") if url == "hosts" else PsOptions()
    server = ParameterServer(LocalShard(threads=1), options)
    cleanup(server.stop)
    port = server.start()
    run(
        """
client = trilith.connect(sys.argv[1], timeout_s=20)
table = client.table("rows", **TABLE)
def child():
    with client:
        table.apply_gradients(IDS, -ONES)
wait(forked(child))
table.apply_gradients(IDS, -ONES)
np.testing.assert_array_equal(table.lookup(IDS), 2 * ONES)
""",
        f"hosts://{tmp_path}" if url == "hosts" else f"static://127.0.0.1:{port}",
    )
