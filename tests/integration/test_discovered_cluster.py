"""Clusters found in ZooKeeper: real PS that move, die, come back, or do not fit."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from rich.console import Console

import trilith
from tests.waiting import eventually
from trilith.checkpoint import checkpoint_name
from trilith.discovery import PS
from trilith.discovery.zk_directory import ZooKeeperDirectory
from trilith.discovery.zk_url import ZkUrl
from trilith.errors import ClusterMismatchError, TableExistsError, TableMismatchError, UnavailableError
from trilith.features.slots import FeatureRegistry, FeatureSlotConfig
from trilith.tables import Adagrad, Sgd, Zeros
from trilith_services.cli import main
from trilith_services.local.supervisor import ProcessSpec, PsCluster, Supervisor, free_ports, trilith_argv
from trilith_services.ps.process.server import ParameterServer, PsOptions
from trilith_services.ps.process.shard import LocalShard

USERS = {"dim": 4, "optimizer": Sgd(learning_rate=1.0), "initializer": Zeros()}
IDS = np.arange(10, dtype=np.uint64)
ONES = np.ones((10, 4), np.float32)

Serve = Callable[..., ParameterServer]


@pytest.fixture
def serve(zk_url, cleanup) -> Serve:
    """Serve a store, a new one unless given, in this process, registered at `zk_url`."""

    def serve(index: int = 0, count: int = 1, *, store: LocalShard | None = None, **options) -> ParameterServer:
        store = store or LocalShard(index=index, count=count, threads=1)
        server = ParameterServer(store, PsOptions(discovery=zk_url, checkpoint_anywhere=True, **options))
        cleanup(server.stop)
        server.start()
        return server

    return serve


@pytest.fixture
def spectator(zk_url, cleanup) -> ZooKeeperDirectory:
    directory = ZooKeeperDirectory(zk_url, timeout_s=20.0)
    cleanup(directory.close)
    return directory


@pytest.fixture
def supervisor(tmp_path) -> Iterator[Supervisor]:
    with Supervisor(Console(file=io.StringIO()), tmp_path / "logs") as supervisor:
        yield supervisor


# ---- finding and following -----------------------------------------------------------------------------------------


def test_a_client_waits_for_the_ps_and_says_which_are_missing(zk_url, serve):
    with pytest.raises(UnavailableError, match="no PS has registered there"):
        trilith.connect(zk_url, timeout_s=3.0)
    serve(0, 2)
    with pytest.raises(UnavailableError, match=r"PS \[1\] of 2 are not in the directory"):
        trilith.connect(zk_url, timeout_s=3.0)
    late = threading.Timer(0.5, serve, (1, 2))
    late.start()
    with trilith.connect(zk_url, timeout_s=60.0) as client:
        users = client.table("user", **USERS)
        users.apply_gradients(IDS, ONES)
        np.testing.assert_array_equal(users.lookup(IDS), -ONES)
    late.join()


def test_a_ps_deregisters_when_it_stops(serve, spectator):
    server = serve()
    eventually(lambda: 0 in spectator.query(PS))
    server.stop()
    eventually(lambda: spectator.query(PS) == {})


def test_a_client_follows_a_shard_to_another_address(zk_url, serve):
    store = LocalShard(threads=1)
    first = serve(store=store)
    with trilith.connect(zk_url, timeout_s=20.0) as client:
        users = client.table("user", **USERS)
        users.apply_gradients(IDS, ONES)
        second = serve(store=store)  # registers in the place of the first, which goes on answering

        def reached_second() -> bool:
            users.lookup(IDS)
            return any(name == "Lookup" and count for name, count in second.servicer.stats().requests.items())

        eventually(reached_second)
        users.apply_gradients(IDS, ONES)
        assert first.servicer.stats().requests["ApplyGradients"] == 1  # the one before the move
        np.testing.assert_array_equal(users.lookup(IDS), -2 * ONES)


def test_a_call_that_hangs_at_a_paused_ps_goes_to_where_the_shard_is_now(zk_url, serve, cleanup):
    port = free_ports(1)[0]
    argv = trilith_argv("ps", "--listen", f"127.0.0.1:{port}", "--discovery", zk_url, "--threads", "1")
    paused = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    cleanup(paused.wait)
    cleanup(paused.kill)
    with trilith.connect(zk_url, timeout_s=250.0) as client:
        client.table("user", **USERS)
        paused.send_signal(signal.SIGSTOP)
        answer: list[object] = []

        def look() -> None:
            try:
                answer.append(client.table("user").lookup(IDS))
            except trilith.TrilithError as error:
                answer.append(error)

        caller = threading.Thread(target=look)
        caller.start()
        serve()  # the shard anew, elsewhere, without the table
        caller.join(60)
        # What the new shard says came back, long before the call's deadline: it is not the shard this client knew.
        assert isinstance(answer[0], trilith.errors.ShardRestartedError)


def test_a_ps_killed_and_restarted_is_back_in_the_view_within_the_session_timeout_and_3_s(
    zk_url, spectator, supervisor, tmp_path
):
    url = zk_url.partition("?")[0]
    session_s = ZkUrl.parse(url).session_timeout_s  # what a PS has unless told otherwise
    ports = free_ports(2)

    def spec(port: int) -> ProcessSpec:
        more = ("--listen", f"127.0.0.1:{port}", "--discovery", url, "--checkpoint-dir", str(tmp_path / "ckpt"))
        return ProcessSpec(name=f"ps-at-{port}", argv=trilith_argv("ps", *more), health=f"127.0.0.1:{port}")

    started = time.monotonic()
    supervisor.start(spec(ports[0]))
    supervisor.wait_serving()
    # A PS starts in 2 s on two idle cores. Where others starve it, the second start is granted what the first one took.
    starved_s = max(2 * (time.monotonic() - started - 3.0), 0.0)
    with trilith.connect(url, timeout_s=60.0) as client:
        users = client.table("user", **USERS)
        users.apply_gradients(IDS, ONES)
        client.save(str(tmp_path / "ckpt" / checkpoint_name(1)))
        heard = []
        spectator.watch(PS, heard.append)
        supervisor.signal(f"ps-at-{ports[0]}", signal.SIGKILL)
        killed = time.monotonic()
        supervisor.start(spec(ports[1]))
        eventually(lambda: spectator.query(PS).get(0, "").endswith(f":{ports[1]}"), timeout_s=60.0)
        back_s = time.monotonic() - killed
        eventually(lambda: client.rejoin() or client.describe()[0].restored_from, timeout_s=60.0)
        np.testing.assert_array_equal(users.lookup(IDS), -ONES)
        served_s = time.monotonic() - killed
    print(f"back in the view after {back_s:.2f} s, serving this client after {served_s:.2f} s")
    assert back_s < session_s + 3 + starved_s
    assert served_s < session_s + 3 + starved_s
    assert heard[-1] == {0: f"127.0.0.1:{ports[1]}"}


def test_a_ps_whose_place_another_has_taken_ends_without_a_last_checkpoint(zk_url, serve, supervisor, tmp_path):
    port = free_ports(1)[0]
    more = ("--listen", f"127.0.0.1:{port}", "--discovery", zk_url, "--checkpoint-dir", str(tmp_path / "ckpt"))
    argv = trilith_argv("ps", *more, "--threads", "1")
    supervisor.start(ProcessSpec(name="old", argv=argv, health=f"127.0.0.1:{port}"))
    supervisor.wait_serving()
    serve()
    eventually(lambda: supervisor.status("old") is not None)
    assert supervisor.status("old") == 2
    assert "another process has registered as this shard" in "".join(supervisor.tail("old"))
    assert [file.name for file in (tmp_path / "ckpt").iterdir() if file.name.startswith("ckpt-")] == []


def test_standby_ps_fill_the_places_and_replace_one_that_dies(zk_url, supervisor, spectator, tmp_path):
    def start(name: str, port: int) -> None:
        listen = ("--listen", f"127.0.0.1:{port}", "--discovery", zk_url, "--checkpoint-dir", str(tmp_path / "ckpt"))
        argv = trilith_argv("ps", "--standby", "--count", "2", "--standby-after", "0.5", *listen, "--threads", "1")
        supervisor.start(ProcessSpec(name=name, argv=argv))

    names = {f"127.0.0.1:{port}": f"ps-at-{port}" for port in free_ports(3)}
    for address, name in names.items():
        start(name, int(address.rpartition(":")[2]))
    eventually(lambda: sorted(spectator.query(PS)) == [0, 1], timeout_s=60.0)
    with trilith.connect(zk_url, timeout_s=60.0) as client:
        users = client.table("user", **USERS)
        users.apply_gradients(IDS, ONES)
        client.save(str(tmp_path / "ckpt" / checkpoint_name(1)))
        first = dict(spectator.query(PS))
        supervisor.signal(names[first[1]], signal.SIGKILL)
        (third,) = set(names) - set(first.values())
        eventually(lambda: spectator.query(PS) == {0: first[0], 1: third}, timeout_s=60.0)
        assert [shard.index for shard in client.rejoin()] == [1]
        np.testing.assert_array_equal(users.lookup(IDS), -ONES)
    assert "standing by" in "".join(supervisor.tail(names[third]))


# ---- the record ----------------------------------------------------------------------------------------------------


def test_a_ps_that_disagrees_with_the_record_is_refused_and_never_listed(serve, spectator):
    heard = []
    spectator.watch(PS, heard.append)
    serve(0, 2)
    with pytest.raises(ClusterMismatchError, match="recorded as 2 PS.*PS 1 has 3 PS"):
        serve(1, 3)
    serve(1, 2)
    eventually(lambda: sorted(heard[-1]) == [0, 1])
    assert all(1 not in members or members == heard[-1] for members in heard)


def test_a_client_that_disagrees_is_refused(zk_url, serve):
    serve()
    with pytest.raises(ClusterMismatchError, match="recorded as 1 PS.*this client has 2 PS"):
        trilith.connect(zk_url, num_ps=2)
    with trilith.connect(zk_url) as client:
        client.table("user", **USERS)
    with trilith.connect(zk_url) as other:
        other.table("user", **USERS)
        with pytest.raises(TableMismatchError, match=r"(?s)than this client has: .*adagrad.* asked") as caught:
            other.table("user", dim=4, optimizer=Adagrad(learning_rate=0.1))
        assert isinstance(caught.value, TableExistsError)


def test_a_ps_that_came_back_empty_takes_no_table_that_contradicts_the_record(zk_url, serve, spectator):
    first = serve()
    with trilith.connect(zk_url) as client:
        client.table("user", **USERS)
    first.stop()
    eventually(lambda: not spectator.query(PS))
    serve()
    eventually(lambda: spectator.query(PS))
    address = spectator.query(PS)[0]
    # This client knows nothing of the record; the PS does.
    with trilith.connect(f"static://{address}") as stranger:
        with pytest.raises(TableMismatchError, match=r"(?s)than PS 0 has: .*dim_size is \d in the record, 8 asked"):
            stranger.table("user", dim=8, optimizer=Sgd(learning_rate=1.0))
        stranger.table("user", **USERS)


def test_a_checkpoint_that_contradicts_the_record_is_not_restored(zk_url, serve, tmp_path):
    with trilith.connect("local://") as client:
        client.table("user", dim=8, optimizer=Sgd(learning_rate=1.0))
        client.save(str(tmp_path / "other"))
    serve()
    with trilith.connect(zk_url) as client:
        users = client.table("user", **USERS)
        users.apply_gradients(IDS, ONES)
        with pytest.raises((TableMismatchError, TableExistsError)):
            client.restore(str(tmp_path / "other"))
        np.testing.assert_array_equal(users.lookup(IDS), -ONES)


def test_features_are_recorded_with_their_tables(zk_url, serve, spectator):
    from trilith.nn.features import FeatureEmbeddings

    serve()
    registry = FeatureRegistry()
    slot = registry.create_feature_slot(FeatureSlotConfig(name="place"))
    slot.add_feature_slice(4)
    registry.create_feature_column(slot, "street")
    with trilith.connect(zk_url) as client:
        FeatureEmbeddings(client, registry)
        client.record_features({"city": "user"})
        with pytest.raises(ClusterMismatchError, match="'city'"):
            client.record_features({"city": "item"})
    assert spectator.read_record().features == {"city": "user", "street": "place"}


# ---- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys) -> Callable[..., str]:
    """Run a command in this process; returns what it printed, stderr included."""

    def run(*arguments: str, status: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        printed = capsys.readouterr()
        assert (ended.value.code or 0) == status, printed.err
        return printed.out + printed.err

    return run


def test_commands_take_the_clusters_url_and_show_no_credentials(zk_url, supervisor, monkeypatch, run):
    secret = "s3cret-pass"
    url = zk_url.replace("zk://", f"zk://trilith:{secret}@")
    cluster = PsCluster(supervisor, 1, discovery=url, arguments=["--threads", "1"])
    assert secret not in cluster.address
    assert cluster.start()
    monkeypatch.setenv("ZK_AUTH", f"trilith:{secret}")
    with trilith.connect(cluster.address) as client:
        client.table("user", **USERS).apply_gradients(IDS, ONES)
    shown = [
        run("query", cluster.address, "user", "3", "--json"),
        run("top", url, "--once", "--json", "--interval", "0.2"),
        run("top", url, "--once", "--interval", "0.2"),
        run("discovery", "show", url, "--json"),
        *(path.read_text() for path in supervisor.log_dir.iterdir()),
    ]
    assert secret not in "".join(shown)
    assert json.loads(shown[0])[0]["address"] == cluster.endpoints[0]
    assert json.loads(shown[1])["shards"][0]["alive"]
    described = json.loads(shown[3])
    assert described["members"][PS] == {"0": cluster.endpoints[0]}
    assert list(described["record"]["tables"]) == ["user"]
    refused = run("discovery", "forget", url, status=2)
    assert "stop them first" in refused
    assert secret not in refused
    supervisor.stop()
    assert run("discovery", "forget", url) == "forgotten\n"


def test_up_registers_its_ps_and_hands_the_url_to_whoever_joins(zk_url, tmp_path, cleanup, spectator, run):
    file = tmp_path / "address"
    argv = trilith_argv("up", "--ps", "2", "--discovery", zk_url, "--address-file", str(file))
    up = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cleanup(up.wait)
    cleanup(up.terminate)
    eventually(file.exists, timeout_s=60.0)
    assert file.read_text().strip() == zk_url
    eventually(lambda: sorted(spectator.query(PS)) == [0, 1])
    run("bench", zk_url, "--ids", "500", "--batch", "100", "--seconds", "0.3", "--dim", "4", "--json")
    up.terminate()
    assert up.wait(120) == 0
    eventually(lambda: spectator.query(PS) == {})
