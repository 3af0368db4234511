"""Where servers listen unless told otherwise, and what is said where more, or fewer, reach them than was meant."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from trilith.errors import UnavailableError
from trilith.estimator import RunConfig
from trilith.estimator.loggers import serve_metrics
from trilith.runtime.exposure import is_loopback, warn_if_exposed
from trilith_services.cli import app
from trilith_services.console.app import make_server
from trilith_services.console.watcher import Watcher
from trilith_services.grpc.serve import Server
from trilith_services.http.metrics import MetricsServer
from trilith_services.http.server import HttpServer
from trilith_services.listening import bind, reached_by_others
from trilith_services.ps.process.replica_server import ReplicaOptions
from trilith_services.ps.process.server import PsOptions

ROOT = Path(__file__).parents[2]


def flags(name: str, command: click.Command) -> Iterator[tuple[str, str]]:
    for parameter in command.params:
        if parameter.name in ("listen", "http", "metrics_host", "host"):
            yield f"{name} --{parameter.name}", str(parameter.default)
    for child, inner in getattr(command, "commands", {}).items():
        yield from flags(f"{name} {child}", inner)


def test_every_server_listens_on_loopback_unless_told_otherwise() -> None:
    found = dict(flags("trilith", typer.main.get_command(app)))
    assert {
        "trilith ps --listen", "trilith ps --metrics_host", "trilith serving ps --listen",
        "trilith serving ps --metrics_host", "trilith serving entry --listen", "trilith serving entry --http",
        "trilith console --listen",
    } <= set(found)  # fmt: skip
    assert {name: where for name, where in found.items() if not is_loopback(where.partition(":")[0])} == {}
    for options in (PsOptions(), ReplicaOptions(), RunConfig()):
        assert is_loopback(options.metrics_host)


def test_servers_in_containers_say_so_where_others_must_reach_them() -> None:
    compose = (ROOT / "docker-compose.yml").read_text()
    commands = re.findall(r"command: \[(ps|serving, ps|serving, entry|console),(.*?)\]", compose, re.S)
    assert len(commands) == 8
    for name, arguments in commands:
        assert "--listen=0.0.0.0:" in arguments, name
        assert name not in ("ps", "serving, ps") or "--metrics-host=0.0.0.0" in arguments
        assert name != "serving, entry" or "--http=0.0.0.0:" in arguments


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        *[(each, True) for each in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost")],
        *[
            (each, False)
            for each in ("0.0.0.0", "::", "[::]", "", "10.0.0.1", "192.0.2.1", "fd00::1", "no.such.invalid")
        ],
    ],
)
def test_which_hosts_are_this_machine_alone(host, alone) -> None:
    assert is_loopback(host) == alone


def served_on(host: str, kind: str) -> None:
    """Serve there for a moment."""
    if kind == "gRPC":
        server = Server("trilith.Nothing", {})
        server.listen(f"{host}:0")
        server.stop(0)
    elif kind == "metrics of a job":
        serve_metrics(host, 0)()
    elif kind == "metrics":
        MetricsServer(CollectorRegistry(), host, 0, ready=lambda: True).stop()
    elif kind == "HTTP":
        http = HttpServer(FastAPI(), f"{host}:0")
        http.start()
        http.stop()
    else:
        console = make_server(Watcher("static://127.0.0.1:1"), f"{host}:0")
        console.should_exit = True
        console.serve_until_told()


@pytest.mark.parametrize("kind", ["gRPC", "metrics", "metrics of a job", "HTTP", "the console"])
def test_who_listens_beyond_this_machine_says_so_once_and_loudly(kind, caplog) -> None:
    caplog.set_level(logging.WARNING)
    served_on("127.0.0.1", kind)
    assert caplog.messages == []
    served_on("0.0.0.0", kind)
    (told,) = caplog.messages
    assert told.startswith(f"{kind} listens on 0.0.0.0:")
    assert "in plain text and without a login" in told


def test_metrics_may_be_on_ipv6() -> None:
    for host in ("127.0.0.1", "::1"):
        metrics = MetricsServer(CollectorRegistry(), host, 0, ready=lambda: True)
        with socket.create_connection((host, metrics.port), timeout=20) as stream:
            stream.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert b"200 OK" in stream.recv(100)
        with pytest.raises(UnavailableError, match=f"cannot listen on .*:{metrics.port}: Address already in use"):
            MetricsServer(CollectorRegistry(), host, metrics.port, ready=lambda: True)
        metrics.stop()


def test_a_taken_address_is_told_of_by_the_entrys_http_too() -> None:
    with bind("127.0.0.1", 0) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=f"cannot listen on {address}: Address already in use"):
            HttpServer(FastAPI(), address)


@pytest.mark.parametrize(
    ("listen", "advertise", "directory", "told"),
    [
        ("127.0.0.1:0", "", "zk://zk1.invalid/a", "announced in zk://zk1.invalid/a as 127.0.0.1:7000, but listens on"),
        ("127.0.0.1:0", "", "zk://user:geheim@10.0.0.9/a", r"announced in zk://\*\*\*@10.0.0.9/a as 127.0.0.1:7000"),
        (
            "127.0.0.1:0",
            "ps-0.example:0",
            "zk://127.0.0.1/a",
            "as ps-0.example:7000, but .* give --listen 0.0.0.0:7000",
        ),
        ("[::1]:7000", "", "static://a.invalid:7000", "announced in static://a.invalid:7000 as"),
        ("127.0.0.1:0", "10.0.0.1", "hosts:///somewhere", "as 10.0.0.1:7000"),
        ("127.0.0.1:0", "", "zk://localhost,127.0.0.1:2182/a", None),
        ("127.0.0.1:0", "", "static://127.0.0.1:7000", None),
        ("127.0.0.1:0", "", "hosts:///somewhere", None),
        ("127.0.0.1:0", "", None, None),
        ("0.0.0.0:0", "", "zk://zk1.invalid/a", None),
        ("10.0.0.1:0", "ps-0.example:0", "zk://zk1.invalid/a", None),
    ],
)
def test_who_is_announced_where_nobody_reaches_it_warns(listen, advertise, directory, told, caplog) -> None:
    caplog.set_level(logging.WARNING)
    reached_by_others(listen, advertise, directory)(7000)
    assert len(caplog.messages) == (told is not None)
    if told is not None:
        assert re.search(told, caplog.messages[0])
        assert "geheim" not in caplog.text


def test_nothing_is_said_of_loopback(caplog) -> None:
    caplog.set_level(logging.WARNING)
    warn_if_exposed("it", "127.0.0.1", 1)
    warn_if_exposed("it", "::1", 1)
    assert caplog.messages == []
