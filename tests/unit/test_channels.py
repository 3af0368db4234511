"""Channels: whatever the environment says of proxies, ours lead straight to a server, unless a proxy is asked for."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import trilith
from trilith.errors import TrilithError
from trilith.rpc.channels import PROXY_VARIABLE, open_channel
from trilith.serving.entry import Entry
from trilith.tables import Sgd
from trilith_proto import ps_pb2
from trilith_services.local.supervisor import is_serving
from trilith_services.ps.process.replica_server import ReplicaServer
from trilith_services.ps.process.server import ParameterServer, PsOptions
from trilith_services.ps.process.shard import LocalShard
from trilith_services.ps.replicas.replica import Replica
from trilith_services.ps.replicas.sync.options import SyncOptions

ROOT = Path(__file__).parents[2]
NAMES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "GRPC_PROXY", "ALL_PROXY")


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Everything in the environment leads to this listener, which answers nothing."""
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy", PROXY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for name in NAMES:
            monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield listener


@pytest.fixture
def ps() -> Iterator[str]:
    """A PS that sends its rows to a replica."""
    replica = ReplicaServer(Replica(LocalShard(threads=1)))
    options = PsOptions(sync=SyncOptions(interval_s=0.1), sync_to={"a": f"127.0.0.1:{replica.start()}"})
    server = ParameterServer(LocalShard(threads=1), options)
    yield f"127.0.0.1:{server.start()}"
    server.stop()
    replica.stop()


def called(proxy: socket.socket) -> bool:
    """Whether anybody has connected to it."""
    proxy.settimeout(0)
    try:
        proxy.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def test_proxies_of_the_environment_are_passed_by(proxy, ps) -> None:
    with trilith.connect(f"static://{ps}", timeout_s=20) as client:
        table = client.table("user", dim=2, optimizer=Sgd(learning_rate=1.0))
        table.assign([7], [[1.0, 2.0]])
        np.testing.assert_array_equal(table.lookup([7]), [[1.0, 2.0]])
    assert is_serving(ps, timeout_s=10)
    entry = Entry(ps, max_message_bytes=1 << 20)
    describe = entry.channel.unary_unary("/trilith.ParameterServer/Describe")
    assert ps_pb2.DescribeResponse.FromString(describe(b"", timeout=20)).incarnation
    entry.channel.close()
    assert not called(proxy)


def test_replicas_are_filled_past_proxies(proxy, ps) -> None:
    with trilith.connect(f"static://{ps}", timeout_s=20) as client:
        client.table("user", dim=2, optimizer=Sgd()).assign([7], [[1.0, 2.0]])
        until = time.monotonic() + 60
        while not (stats := client.stats()[0].sync_targets[0]).rows:
            assert time.monotonic() < until, stats
            time.sleep(0.05)
    assert not called(proxy)


def test_a_proxy_that_is_asked_for_is_used(proxy, ps, monkeypatch) -> None:
    monkeypatch.setenv(PROXY_VARIABLE, "1")
    with pytest.raises(TrilithError):
        trilith.connect(f"static://{ps}", timeout_s=1).close()
    assert called(proxy)


def test_channels_are_made_in_one_place() -> None:
    makers = [
        str(path.relative_to(ROOT))
        for root in ("client", "services")
        for path in sorted((ROOT / root).rglob("*.py"))
        if re.search(r"\b(in)?secure_channel\(", path.read_text())
    ]
    assert makers == ["client/trilith/rpc/channels.py"]
    with open_channel("127.0.0.1:1", max_message_bytes=1 << 20):
        pass
