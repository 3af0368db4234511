"""What goes wrong between client and PS: a pause or a clear error, never a wrong number and never a hang."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

import trilith
from tests.congruence.faults import Blocking, Failing, LosingProxy, Meddled
from tests.waiting import eventually
from trilith.client import Client
from trilith.cluster import Cluster
from trilith.config import ClientConfig
from trilith.errors import (
    ClosedError,
    ClusterMismatchError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    ShardRestartedError,
    UnavailableError,
    UnknownTableError,
)
from trilith.rpc import wire
from trilith.rpc.remote import RemoteShard
from trilith.shard import IdPart
from trilith.tables import Adagrad, RandomUniform, Sgd, Zeros, table_config
from trilith.verbs import SERVICE
from trilith_services.grpc.serve import Limits
from trilith_services.ps.process.server import ParameterServer

ONES = np.ones((2, 4), np.float32)
IN_TIME_S = 15.0  # a call with a deadline of its own has ended by then on any machine; without, it would take 30 s
REMOTE = pytest.mark.parametrize("shape", ["1-ps", "3-ps"], scope="session")


def sgd(client, name="user"):
    return client.table(name, dim=4, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())


def adagrad(client, name="user"):
    return client.table(name, dim=4, optimizer=Adagrad(learning_rate=0.1), initializer=RandomUniform(-1, 1))


def wrapper(cls):
    """`wrap` for LocalCluster, and the list of what it made."""
    made = []

    def wrap(store):
        made.append(cls(store))
        return made[-1]

    return wrap, made


# ---- answers that get lost -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [UnavailableError("lost"), OverloadedError("busy")])
@REMOTE
def test_a_write_whose_answer_was_lost_is_done_once(local, shape, error):
    wrap, shards = wrapper(Failing)
    with local(shape, wrap=wrap).connect() as client:
        table = sgd(client)
        client.create_variables({"w": np.zeros(3, np.float32)}, optimizer=Sgd(learning_rate=1.0))
        for shard in shards:
            shard.errors = [error, error]
        table.apply_gradients([1, 2], ONES)
        np.testing.assert_array_equal(table.lookup([1, 2]), -ONES)
        shards[0].errors = [error]
        assert client.global_step(advance=5) == 5
        for shard in shards:
            shard.errors = [error]
        client.apply_dense_gradients({"w": np.ones(3, np.float32)})
        np.testing.assert_array_equal(client.pull_variables(["w"])[0]["w"], [-1, -1, -1])
        assert client.global_step() == 5
        table.assign_add([1, 2], ONES)
        np.testing.assert_array_equal(table.lookup([1, 2]), 0 * ONES)


def test_a_connection_that_breaks_before_the_answer_does_not_repeat_the_step(local):
    cluster = local("1-ps")
    proxy = LosingProxy(cluster.ports[0])
    try:
        with trilith.connect(f"static://127.0.0.1:{proxy.port}") as client:
            table = sgd(client)
            for step in range(1, 6):
                proxy.lose_next_answer()
                table.apply_gradients([1, 2], ONES)
                assert proxy.lost == step
            np.testing.assert_array_equal(table.lookup([1, 2]), -5 * ONES)
    finally:
        proxy.close()


def test_the_same_error_again_and_again_ends_at_the_deadline(local):
    tries = []

    class Down(Meddled):
        def lookup_into(self, parts, outs):
            tries.append(1)
            raise UnavailableError("still down")

    with local("1-ps", wrap=Down).connect() as client:
        table = sgd(client)
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="still down"):
            client.lookup({table.name: [1]}, timeout_s=1.0)
        assert time.monotonic() - started < IN_TIME_S
        assert len(tries) > 1


# ---- restarts --------------------------------------------------------------------------------------------------------


@REMOTE
def test_a_restarted_ps_is_noticed_by_every_verb_and_nothing_is_done(local, shape):
    cluster = local(shape)
    with cluster.connect() as client:
        table = sgd(client)
        client.create_variables({"w": np.zeros(3, np.float32)}, optimizer=Sgd())
        table.assign(np.arange(9), np.ones((9, 4), np.float32))
        for index in range(len(cluster.servers)):
            cluster.kill(index)
            cluster.restart(index)
        nine = np.ones((9, 4), np.float32)
        for call in (
            lambda: table.lookup(np.arange(9)),
            lambda: table.apply_gradients(np.arange(9), nine),
            lambda: table.assign(np.arange(9), nine),
            lambda: table.assign_add(np.arange(9), nine),
            lambda: table.contains(np.arange(9)),
            lambda: table.reinitialize(np.arange(9)),
            lambda: table.erase(np.arange(9)),
            lambda: table.lookup_entries(np.arange(9)),
            lambda: sgd(client),
            lambda: sgd(client, "other"),
            lambda: client.pull_variables(["w"]),
            lambda: client.apply_dense_gradients({"w": np.ones(3)}),
            lambda: client.create_variables({"x": np.ones(3)}, optimizer=Sgd()),
            lambda: client.global_step(advance=1),
            client.stats,
            client.rejoin,
        ):
            with pytest.raises(ShardRestartedError):
                call()
        assert all(not store.tables for store in cluster.stores)


@REMOTE
def test_tables_are_begun_anew_only_on_request(local, shape):
    cluster = local(shape)
    with cluster.connect() as client:
        table = sgd(client)
        table.assign(np.arange(9), np.ones((9, 4), np.float32))
        client.global_step(set_to=40)
        last = len(cluster.servers) - 1
        cluster.kill(last)
        cluster.restart(last)
        with pytest.raises(ShardRestartedError, match="without tables.*user"):
            client.rejoin()
        (back,) = client.rejoin(recreate_tables=True)
        assert (back.index, back.restored_from, back.missing_tables, back.known_step) == (last, "", ("user",), 40)
        assert client.rejoin() == []
        count = len(cluster.servers)
        kept = [each for each in range(9) if each % count != last]
        assert table.contains(np.arange(9)).tolist() == [each in kept for each in range(9)]
        table.assign(np.arange(9), np.ones((9, 4), np.float32))
        assert table.size() == 9


@REMOTE
def test_a_ps_that_comes_back_from_a_checkpoint_is_rejoined(local, shape, tmp_path):
    cluster = local(shape)
    path = str(tmp_path / "ckpt")
    ids = np.arange(30)
    with cluster.connect() as client:
        table = adagrad(client)
        table.apply_gradients(ids, np.ones((30, 4), np.float32))
        client.global_step(set_to=10)
        client.save(path)
        saved = table.lookup(ids)
        client.global_step(set_to=25)
        table.apply_gradients(ids, np.ones((30, 4), np.float32))
        later = table.lookup(ids)

        cluster.kill(0)
        cluster.restart(0, lambda shard: shard.restore(path))
        with pytest.raises(ShardRestartedError):
            table.lookup(ids)
        (back,) = client.rejoin()
        assert (back.index, back.restored_from, back.restored_step, back.known_step) == (0, path, 10, 25)
        first = ids % len(cluster.servers) == 0
        np.testing.assert_array_equal(table.lookup(ids), np.where(first[:, None], saved, later))
        table.apply_gradients(ids, np.ones((30, 4), np.float32))


def test_calls_wait_for_a_ps_that_comes_back(local):
    """A dead PS is a pause: the call that was made while it was away succeeds once the client has rejoined."""
    cluster = local("3-ps")
    with cluster.connect() as client:
        table = sgd(client)
        cluster.kill(1)
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(lambda: table.lookup([0, 1, 2]))
            cluster.restart(1)
            with pytest.raises(ShardRestartedError):
                pending.result(timeout=30)
        client.rejoin(recreate_tables=True)
        np.testing.assert_array_equal(table.lookup([0, 1, 2]), np.zeros((3, 4)))


def test_a_new_client_does_not_paper_over_a_shard_that_lost_its_rows(local):
    cluster = local("3-ps")
    with cluster.connect() as client:
        sgd(client).assign(np.arange(9), np.ones((9, 4), np.float32))
    cluster.kill(2)
    cluster.restart(2)
    with cluster.connect() as client:
        with pytest.raises(ShardRestartedError, match="6 rows on other shards but is unknown to shard 2"):
            sgd(client)
        assert "user" not in cluster.stores[2].tables


def test_an_empty_table_that_some_shards_lack_is_simply_created(local):
    cluster = local("3-ps")
    with cluster.connect() as client:
        sgd(client)
    cluster.kill(2)
    cluster.restart(2)
    with cluster.connect() as client:
        sgd(client)
        assert "user" in cluster.stores[2].tables


# ---- who is who ------------------------------------------------------------------------------------------------------


def test_a_list_in_the_wrong_order_is_refused_with_both_sides_shown(local):
    a, b, c = (f"127.0.0.1:{port}" for port in local("3-ps").ports)
    with pytest.raises(ClusterMismatchError) as caught:
        trilith.connect(f"static://{a},{c},{b}")
    message = str(caught.value)
    assert f"{c} is shard 1 of 3" in message
    assert "shard 2 of 3, owner rule 'mod' by its own account" in message
    assert a not in message


@pytest.mark.parametrize("listed", [slice(0, 1), slice(0, 2)])
def test_a_list_of_the_wrong_length_is_refused(local, listed):
    addresses = [f"127.0.0.1:{port}" for port in local("3-ps").ports][listed]
    with pytest.raises(ClusterMismatchError, match=rf"shard 0 of {len(addresses)}.*shard 0 of 3"):
        trilith.connect("static://" + ",".join(addresses))


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1:7000", "static://", "static://nowhere", "static://a:1,a:1", "zap://x", "local://x"]
)
def test_addresses_that_are_none_are_refused(address):
    with pytest.raises(InvalidRequestError):
        trilith.connect(address)


def test_a_ps_that_moves_is_followed(local):
    cluster = local("1-ps")
    where = [cluster.ports[0]]
    shard = RemoteShard(lambda: f"127.0.0.1:{where[0]}", ClientConfig())
    with Client(Cluster([shard], ClientConfig())) as client:
        table = sgd(client)
        table.assign([1, 2], ONES)
        store = cluster.stores[0]
        other = local("1-ps")
        other.servers[0].stop(0.0)
        other.stores[0] = store
        other.servers[0] = ParameterServer(store)
        where[0] = other.servers[0].start()
        cluster.servers[0]._server.stop(0.0)
        np.testing.assert_array_equal(table.lookup([1, 2]), ONES)


@REMOTE
def test_a_reader_that_accepts_restarts_goes_on_and_writes_wait_for_rejoin(local, shape):
    cluster = local(shape)
    with cluster.connect(on_restart="accept") as reader, cluster.connect() as writer:
        table = sgd(writer)
        table.assign(np.arange(6), np.ones((6, 4), np.float32))
        read = reader.table(table.name)
        variables = reader.variables()
        cluster.kill(0)
        cluster.restart(0, prepare=lambda store: store.create_tables([table.config]))
        there = (np.arange(6) % reader.shards != 0).astype(np.float32)
        for _ in range(2):
            np.testing.assert_array_equal(read.lookup(np.arange(6))[:, 0], there)
            np.testing.assert_array_equal(read.contains(np.arange(6)), there.astype(bool))
            assert [bool(entry) for entry in read.lookup_entries(np.arange(6))] == list(there.astype(bool))
            assert len(list(reader.dump_entries(table.name))) == there.sum() == read.size()
            assert reader.variables() == variables
            assert reader.global_step() == 0
            with pytest.raises(ShardRestartedError):
                read.assign([0], np.ones((1, 4), np.float32))
        with pytest.raises(ShardRestartedError):
            table.lookup([0])
        reader.rejoin()
        read.assign([0], np.ones((1, 4), np.float32))
        assert read.contains([0]).all()


@REMOTE
def test_a_reader_that_accepts_restarts_notices_another_table_of_the_name(local, shape):
    cluster = local(shape)
    with cluster.connect(on_restart="accept") as reader:
        read = sgd(reader)
        cluster.kill(0)
        cluster.restart(0)
        with pytest.raises(UnknownTableError):
            read.lookup([0])
        wider = table_config(read.name, dim=5, optimizer=Sgd(), initializer=Zeros())
        cluster.stores[0].create_tables([wider.proto])
        with pytest.raises(ShardRestartedError, match="had dim 4 .* has 5"):
            read.lookup([0])


@pytest.mark.parametrize(
    ("address", "options", "match"),
    [
        ("local://", {"float16": True}, "float16=True: local:// is in this process, where nothing travels"),
        ("local://", {"chunk_bytes": 100}, "chunk_bytes=100: local"),
        ("local://", {"max_message_bytes": 1 << 24}, "max_message_bytes=16777216: local"),
        ("local://", {"retry_max_s": 1.0}, "retry_max_s=1.0: local"),
        ("local://", {"keepalive_s": 1.0}, "keepalive_s=1.0: local"),
        ("local://", {"tune_allocator": True}, "tune_allocator=True: local"),
        ("static://127.0.0.1:1", {"threads": 2}, "threads=2 is for local:// only; a PS takes --threads"),
        ("static://127.0.0.1:1", {"memory_limit_bytes": 5}, "memory_limit_bytes=5 is for local:// only"),
        ("static://127.0.0.1:1", {"retry_first_s": 0.0}, "retry_first_s=0.0 is not above 0"),
        ("local://", {"on_restart": "ignore"}, "on_restart='ignore' is neither 'raise' nor 'accept'"),
    ],
)
def test_options_that_do_not_apply_are_refused_by_name(address, options, match):
    with pytest.raises(InvalidRequestError, match=match):
        trilith.connect(address, **options)


# ---- deadlines and overload ------------------------------------------------------------------------------------------


@REMOTE
def test_a_call_ends_at_its_deadline(local, shape):
    wrap, shards = wrapper(Blocking)
    with local(shape, wrap=wrap).connect() as client:
        table = sgd(client)
        started = time.monotonic()
        with pytest.raises(DeadlineExceededError, match="no answer within"):
            client.lookup({table.name: np.arange(9)}, timeout_s=0.2)
        assert time.monotonic() - started < IN_TIME_S
        for shard in shards:
            shard.release.set()
        assert table.lookup([1]).shape == (1, 4)


def test_nobody_there_is_unavailable_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=r"shard 0 at 127\.0\.0\.1:\d+: Describe: no connection: "):
        trilith.connect(f"static://127.0.0.1:{port}", timeout_s=2.0)
    assert time.monotonic() - started < IN_TIME_S


@REMOTE
def test_a_save_waits_for_a_ps_that_is_away_no_longer_than_other_calls_do(local, shape, tmp_path):
    cluster = local(shape)
    with cluster.connect(timeout_s=2.0) as client:
        cluster.kill(0)
        started = time.monotonic()
        with pytest.raises(UnavailableError, match=r"shard 0 at 127\.0\.0\.1:\d+: Save: .*\(attempt "):
            client.save(str(tmp_path))
        with pytest.raises(UnavailableError, match="Describe"):
            client.restore(str(tmp_path))
        assert time.monotonic() - started < IN_TIME_S


def test_a_call_that_waits_for_others_of_its_client_ends_at_its_deadline(local):
    wrap, made = wrapper(Blocking)
    with local("3-ps", wrap=wrap).connect() as client, ThreadPoolExecutor(30) as pool:
        table = sgd(client)
        waiting = [pool.submit(lambda: table.lookup(np.arange(9))) for _ in range(30)]
        for shard in made[1:] * 4:  # by then the client's threads are busy
            assert shard.entered.acquire(timeout=30)
        started = time.monotonic()
        try:
            with pytest.raises(DeadlineExceededError, match=r"(no answer|nothing was sent) within 0\.\d"):
                client.lookup({table.name: np.arange(9)}, timeout_s=0.2)
            assert time.monotonic() - started < IN_TIME_S
        finally:
            for shard in made:
                shard.release.set()
        for call in waiting:
            call.result(timeout=30)


def test_work_whose_deadline_passed_in_the_queue_is_not_done(local):
    wrap, made = wrapper(Blocking)
    cluster = local("1-ps", wrap=wrap, limits=Limits(threads=1, max_queue=10))
    (shard,) = made
    with cluster.connect() as client, ThreadPoolExecutor(1) as pool:
        table = sgd(client)
        first = pool.submit(lambda: table.lookup([1]))
        assert shard.entered.acquire(timeout=30)
        with pytest.raises(DeadlineExceededError):
            table.apply_gradients([1, 2], ONES, timeout_s=0.1)
        client.describe()  # on the same connection: when it is answered, the cancellation has arrived
        shard.release.set()
        first.result(timeout=30)
        table.lookup([1])  # behind the late write in the queue
        assert shard.applied == 0
        assert table.size() == 0


def test_a_full_queue_refuses_at_once_and_control_calls_still_answer(local):
    wrap, made = wrapper(Blocking)
    cluster = local("1-ps", wrap=wrap, limits=Limits(threads=1, max_queue=2))
    (shard,) = made
    with cluster.connect() as client, ThreadPoolExecutor(3) as pool:
        table = sgd(client)
        calls = [pool.submit(lambda: table.lookup([1]))]
        assert shard.entered.acquire(timeout=30)
        calls += [pool.submit(lambda: table.lookup([1])) for _ in range(2)]
        eventually(lambda: client.stats()[0].queued_requests == 2)
        with pytest.raises(OverloadedError, match="2 calls are waiting") as caught:
            client.lookup({table.name: [1]}, timeout_s=2.0)
        assert caught.value.__notes__ == [f"raised by shard 0 at {cluster.address.removeprefix('static://')}"]
        assert client.describe()[0].shard_index == 0
        shard.release.set()
        for call in calls:
            assert call.result(timeout=30).shape == (1, 4)
        # An overloaded PS is worth waiting for.
        assert table.lookup([1]).shape == (1, 4)


def test_an_overload_that_passes_is_only_a_pause(local):
    wrap, made = wrapper(Blocking)
    cluster = local("1-ps", wrap=wrap, limits=Limits(threads=1, max_queue=1))
    (shard,) = made
    with cluster.connect() as client, ThreadPoolExecutor(16) as pool:
        table = sgd(client)
        table.assign([1], ONES[:1])
        calls = [pool.submit(lambda: table.lookup([1])) for _ in range(16)]
        assert shard.entered.acquire(timeout=30)
        shard.release.set()
        for call in calls:
            np.testing.assert_array_equal(call.result(timeout=30), ONES[:1])


def test_a_ps_that_is_not_ready_is_waited_for(local):
    cluster = local("1-ps")
    cluster.servers[0].servicer.ready = False
    with pytest.raises(UnavailableError, match="still starting"):
        cluster.connect(timeout_s=2.0)
    timer = threading.Timer(0.2, lambda: setattr(cluster.servers[0].servicer, "ready", True))
    timer.start()
    with cluster.connect() as client:
        assert client.describe()[0].shard_index == 0
    timer.join()


# ---- clients that die, messages that are none ------------------------------------------------------------------------


def test_a_client_that_dies_in_the_middle_disturbs_nobody(local):
    wrap, made = wrapper(Blocking)
    cluster = local("1-ps", wrap=wrap, limits=Limits(threads=2, max_queue=4))
    (shard,) = made
    with cluster.connect() as client:
        table = sgd(client)
        table.assign([1, 2], ONES)
        for _ in range(4):
            channel = grpc.insecure_channel(f"127.0.0.1:{cluster.ports[0]}")
            lookup = channel.unary_unary(f"/{SERVICE}/Lookup")
            lookup.future(wire.pack_lookup_request([IdPart("user", np.arange(9, dtype=np.uint64))]))
            shard.entered.acquire(timeout=0.2)  # the last two wait in the queue
            channel.close()
        shard.release.set()
        np.testing.assert_array_equal(table.lookup([1, 2]), ONES)
        eventually(lambda: client.stats()[0].queued_requests == 0)


@pytest.mark.parametrize("method", ["Lookup", "ApplyGradients", "Contains", "CreateVariables", "ApplyDenseGradients"])
def test_bytes_that_are_no_message_are_an_invalid_request(local, method):
    cluster = local("1-ps")
    with grpc.insecure_channel(f"127.0.0.1:{cluster.ports[0]}") as channel:
        call = channel.unary_unary(f"/{SERVICE}/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"\xff\xff\xff no message")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ("trilith-error", "InvalidRequestError") in caught.value.trailing_metadata()


def test_a_message_above_the_limit_is_refused_clearly(local):
    cluster = local("1-ps", limits=Limits(max_message_bytes=1 << 20))
    with cluster.connect() as client:
        table = sgd(client)
        with pytest.raises(InvalidRequestError, match="larger than max"):
            table.lookup(np.arange(1 << 17))
        with pytest.raises(InvalidRequestError, match="larger than max"):
            table.assign(np.arange(1 << 16), np.ones((1 << 16, 4), np.float32))
        assert table.size() == 0


def test_closing_a_client_ends_its_calls(local):
    wrap, made = wrapper(Blocking)
    cluster = local("1-ps", wrap=wrap)
    (shard,) = made
    client = cluster.connect()
    table = sgd(client)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(lambda: table.lookup([1]))
        assert shard.entered.acquire(timeout=30)
        client.close()
        with pytest.raises(ClosedError):
            call.result(timeout=30)
    shard.release.set()
