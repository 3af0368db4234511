"""Announcements of server processes, also of those that are stopped while they start; their health over HTTP."""

from __future__ import annotations

import logging
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import generate_latest

import trilith
from trilith.discovery import PS
from trilith.discovery.host_files import HostFilesDirectory
from trilith.errors import TrilithError, UnavailableError
from trilith_services.grpc.server_process import Announcement
from trilith_services.ps.process.membership import Membership
from trilith_services.ps.process.replica_server import ReplicaServer
from trilith_services.ps.process.server import ParameterServer, PsOptions
from trilith_services.ps.process.shard import LocalShard
from trilith_services.ps.replicas.replica import Replica


class Listing:
    """A directory's list of processes that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.away = False

    def announce(self, replica: int | None, address: str, *, available: bool) -> int:
        self.told.append(("announce", replica, address, available))
        return 7 if replica is None else replica

    def withdraw(self, replica: int, address: str) -> None:
        self.told.append(("withdraw", replica, address))
        if self.away:
            raise UnavailableError("nobody answers")

    def close(self) -> None:
        self.told.append(("close",))


@pytest.fixture
def listing() -> Listing:
    return Listing()


def announcement(listing: Listing, number: int | None) -> Announcement:
    return Announcement(listing, number, where=lambda: "10.0.0.1:7100")  # type: ignore[arg-type]


@pytest.mark.parametrize(("given", "number"), [(None, 7), (3, 3)])
def test_a_process_keeps_the_number_it_was_first_announced_under(listing, given, number):
    said = announcement(listing, given)
    said.announce(available=False)
    said.announce(available=True)
    said.withdraw()
    said.close()
    assert listing.told == [
        ("announce", given, "10.0.0.1:7100", False),
        ("announce", number, "10.0.0.1:7100", True),
        ("withdraw", number, "10.0.0.1:7100"),
        ("close",),
    ]


def test_what_was_withdrawn_is_not_announced_again(listing):
    said = announcement(listing, 0)
    said.withdraw()
    said.announce(available=True)
    assert not listing.told


def test_a_directory_that_is_away_does_not_hinder_the_end(listing, caplog):
    said = announcement(listing, 0)
    said.announce(available=True)
    listing.away = True
    said.withdraw()
    assert "could not deregister: nobody answers" in caplog.text


def test_without_a_directory_nobody_asks_for_the_address():
    said = Announcement(None, 0, where=lambda: pytest.fail("asked"))
    said.announce(available=True)
    said.withdraw()
    said.close()


# ---- stopped in the middle of the start ------------------------------------------------------------------------------


def test_a_replica_that_is_stopped_before_it_has_its_rows_never_says_that_it_can_be_asked(listing, monkeypatch):
    server = ReplicaServer(Replica(LocalShard(threads=1)), listed=listing)  # type: ignore[arg-type]
    announced = threading.Event()
    announce = listing.announce

    def say(*said, **how):
        number = announce(*said, **how)
        announced.set()
        return number

    monkeypatch.setattr(listing, "announce", say)
    server.start()
    assert announced.wait(60)
    server.stop()
    assert not server.servicer.ready
    assert [(verb, *more) for verb, _, _, *more in listing.told[:-2]] == [("announce", False)]
    assert [verb for verb, *_ in listing.told[-2:]] == ["withdraw", "close"]


def test_a_ps_that_has_left_does_not_register_any_more(tmp_path):
    member = Membership(f"hosts://{tmp_path}", LocalShard(threads=1))
    member.join()
    member.leave()
    member.announce("10.0.0.1:7000")
    assert HostFilesDirectory(tmp_path).query(PS) == {}
    member.close()


def test_a_ps_that_leaves_while_it_registers_is_not_registered_in_the_end(tmp_path, monkeypatch):
    registering, go = threading.Event(), threading.Event()
    register = HostFilesDirectory.register

    def slow(self, role, index, address):
        registering.set()
        assert go.wait(30)
        register(self, role, index, address)

    monkeypatch.setattr(HostFilesDirectory, "register", slow)
    member = Membership(f"hosts://{tmp_path}", LocalShard(threads=1))
    member.join()
    threads = [threading.Thread(target=member.announce, args=("10.0.0.1:7000",)), threading.Thread(target=member.leave)]
    threads[0].start()
    assert registering.wait(30)
    threads[1].start()
    threads[1].join(0.05)  # it leaves once it is there
    go.set()
    for each in threads:
        each.join(30)
    assert HostFilesDirectory(tmp_path).query(PS) == {}
    member.close()


def test_a_ps_that_is_stopped_while_it_compiles_never_registers(tmp_path: Path, monkeypatch):
    store = LocalShard(threads=1)
    server = ParameterServer(store, PsOptions(discovery=f"hosts://{tmp_path}"))
    compiling, go = threading.Event(), threading.Event()

    def compile_slowly() -> None:
        compiling.set()
        assert go.wait(30)

    monkeypatch.setattr(store, "compile", compile_slowly)
    starting = threading.Thread(target=server.start)
    starting.start()
    assert compiling.wait(30)
    stopping = threading.Thread(target=server._stop)  # what a signal does first
    stopping.start()
    stopping.join(30)
    go.set()
    starting.join(30)
    assert HostFilesDirectory(tmp_path).query(PS) == {}
    server.stop()


# ---- over HTTP -------------------------------------------------------------------------------------------------------


def test_health_over_http_is_that_of_grpc(caplog):
    caplog.set_level(logging.INFO)
    server = ParameterServer(LocalShard(threads=1), PsOptions(metrics_port=0))
    server.start()
    (port,) = (record.port for record in caplog.records if record.getMessage() == "metrics")
    url = f"http://127.0.0.1:{port}/healthz"
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.status == 200
    server._server.set_serving(False)  # as while it drains
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(url, timeout=30)
    server.stop()
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(url, timeout=30)


def test_a_checkpoint_that_a_client_has_written_is_in_stats_and_metrics_as_one_of_the_ps_own_is(tmp_path):
    """Where a job saves, this is how old what would be restored is, and how long it takes to write."""

    def metric(name: str) -> float:
        lines = generate_latest(server.metrics.registry).decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])

    server = ParameterServer(LocalShard(threads=1), PsOptions(restore_from=str(tmp_path)))
    try:
        with trilith.connect(f"static://127.0.0.1:{server.start('127.0.0.1:0')}") as client:
            assert client.stats()[0].last_checkpoint_time == 0
            client.save(str(tmp_path / "ckpt-1"))
            (stats,) = client.stats()
            assert stats.last_checkpoint == str(tmp_path / "ckpt-1")
            assert abs(stats.last_checkpoint_time - time.time()) < 3600
            assert metric("trilith_ps_checkpoint_seconds_count") == 1
            assert metric("trilith_ps_checkpoint_failures_total") == 0
            (tmp_path / "file").write_text("no directory")
            with pytest.raises((TrilithError, OSError)):
                client.save(str(tmp_path / "file" / "ckpt-2"))
            assert metric("trilith_ps_checkpoint_seconds_count") == 1
            assert metric("trilith_ps_checkpoint_failures_total") == 1
            assert client.stats()[0].last_checkpoint == str(tmp_path / "ckpt-1")
    finally:
        server.stop()
