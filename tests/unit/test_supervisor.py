"""The supervisor runs, restarts and ends real processes; these are tiny ones."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health, health_pb2_grpc
from rich.console import Console

from tests.waiting import eventually
from trilith.errors import DeadlineExceededError, InvalidRequestError, UnavailableError
from trilith_services.grpc.serve import Server
from trilith_services.local.supervisor import ProcessSpec, StopRequest, Supervisor, free_ports, is_serving

HEALTHY = """
import signal, sys, grpc
from concurrent import futures
from grpc_health.v1 import health, health_pb2_grpc
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
server = grpc.server(futures.ThreadPoolExecutor(2))
health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
server.add_insecure_port(sys.argv[1])
server.start()
signal.sigwait({signal.SIGTERM})
"""


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def supervisor(tmp_path: Path, screen: io.StringIO) -> Iterator[Supervisor]:
    console = Console(file=screen, width=200, force_terminal=False)
    with Supervisor(console, tmp_path / "logs", grace_s=5.0) as supervisor:
        yield supervisor


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def test_output_is_shown_with_a_prefix_and_kept_in_a_log(supervisor, screen, tmp_path) -> None:
    supervisor.start(ProcessSpec(name="ps-0", argv=python("print('hello [red]you[/red]'); import sys; sys.exit(3)")))
    ended = []
    eventually(lambda: ended.extend(supervisor.poll()) or ended)
    assert [(e.name, e.status, e.restarted, e.tail) for e in ended] == [("ps-0", 3, False, ("hello [red]you[/red]",))]
    assert screen.getvalue() == "ps-0     | hello [red]you[/red]\n"
    assert (tmp_path / "logs" / "ps-0.log").read_text() == "hello [red]you[/red]\n"
    assert supervisor.poll() == []
    assert supervisor.running() == []


def test_a_killed_process_is_started_again_with_the_same_command(supervisor, screen) -> None:
    supervisor.start(ProcessSpec(name="ps-0", argv=python("import time; time.sleep(600)"), restart="always"))
    before = supervisor.pid("ps-0")
    os.kill(before, signal.SIGKILL)
    ended = []
    eventually(lambda: ended.extend(supervisor.poll()) or ended)
    assert (ended[0].status, ended[0].restarted, ended[0].how) == (-9, True, "was killed by SIGKILL")
    assert supervisor.pid("ps-0") != before
    assert supervisor.running(prefix="ps-") == ["ps-0"]
    assert "ps-0 was killed by SIGKILL; starting it again" in screen.getvalue()


def test_a_process_that_keeps_dying_ends_the_run_with_the_end_of_its_log(supervisor) -> None:
    code = "print('out of luck'); import sys; sys.exit(1)"
    supervisor.start(ProcessSpec(name="worker-1", argv=python(code), restart="on-failure"))
    with pytest.raises(UnavailableError) as caught:
        eventually(lambda: supervisor.poll() and False)
    message = str(caught.value)
    assert "worker-1 keeps dying: 3 times within 60 s, at last it ended with status 1" in message
    assert "out of luck" in message
    assert "worker-1.log" in message


def test_deaths_far_apart_do_not_end_the_run(tmp_path: Path) -> None:
    now = [0.0]
    with Supervisor(Console(file=io.StringIO()), tmp_path, max_deaths=2, clock=lambda: now[0]) as supervisor:
        supervisor.start(ProcessSpec(name="ps-0", argv=python("import sys; sys.exit(1)"), restart="always"))
        for _ in range(4):
            eventually(supervisor.poll)
            now[0] += 61.0


def test_a_server_that_refuses_to_run_is_not_started_again(supervisor) -> None:
    code = "import sys; print('error: dim=0 is outside 1..4096'); sys.exit(2)"
    supervisor.start(ProcessSpec(name="ps-0", argv=python(code), restart="always", health="127.0.0.1:1"))
    with pytest.raises(UnavailableError, match=r"ps-0 refused to run(.|\n)*dim=0 is outside"):
        eventually(lambda: supervisor.poll() and False)


@pytest.mark.parametrize(("code", "status"), [("pass", 0), ("import os; os.kill(os.getpid(), 15)", -15)])
def test_a_worker_that_ends_well_or_was_told_to_has_left(supervisor, code, status) -> None:
    supervisor.start(ProcessSpec(name="worker-0", argv=python(code), restart="on-failure"))
    ended = []
    eventually(lambda: ended.extend(supervisor.poll()) or ended)
    assert (ended[0].status, ended[0].restarted) == (status, False)


def test_wait_serving_returns_when_the_health_service_answers(supervisor) -> None:
    endpoint = f"127.0.0.1:{free_ports(1)[0]}"
    supervisor.start(ProcessSpec(name="ps-0", argv=python(HEALTHY, endpoint), health=endpoint))
    supervisor.wait_serving(timeout_s=60.0)
    assert is_serving(endpoint, timeout_s=20.0)
    supervisor.stop()
    assert supervisor.status("ps-0") == 0
    assert not is_serving(endpoint, timeout_s=0.1)


def test_not_serving_is_not_serving(supervisor) -> None:
    from concurrent.futures import ThreadPoolExecutor

    servicer = health.HealthServicer()
    servicer.set("", 2)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert not is_serving(f"127.0.0.1:{port}", timeout_s=5.0)
        sleeper = python("import time; time.sleep(600)")
        supervisor.start(ProcessSpec(name="ps-0", argv=sleeper, health=f"127.0.0.1:{port}"))
        with pytest.raises(DeadlineExceededError, match="ps-0 is not serving on"):
            supervisor.wait_serving(timeout_s=0.2)
    finally:
        server.stop(None)


def test_wait_serving_says_who_died_instead(supervisor) -> None:
    argv = python("print('no such option'); import sys; sys.exit(1)")
    supervisor.start(ProcessSpec(name="ps-0", argv=argv, health=f"127.0.0.1:{free_ports(1)[0]}"))
    with pytest.raises(UnavailableError, match=r"ps-0 ended with status 1(.|\n)*no such option"):
        supervisor.wait_serving(timeout_s=60.0)


def test_stop_kills_what_ignores_sigterm_after_the_grace_period(tmp_path: Path) -> None:
    screen = io.StringIO()
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf'); time.sleep(600)"
    with Supervisor(Console(file=screen, width=200), tmp_path, grace_s=0.2) as supervisor:
        supervisor.start(ProcessSpec(name="ps-0", argv=python(deaf)))
        eventually(lambda: supervisor.tail("ps-0"))
    assert supervisor.status("ps-0") == -9
    assert "ps-0 did not stop within 0.2 s; killing it" in screen.getvalue()


def test_servers_stop_after_those_who_use_them(tmp_path: Path) -> None:
    order = tmp_path / "order"
    note = f"""
import signal, sys, time
def stop(*_):
    open({str(order)!r}, "a").write(sys.argv[1] + "\\n")
    sys.exit(0)
signal.signal(15, stop)
print("up")
time.sleep(600)
"""
    with Supervisor(Console(file=io.StringIO()), tmp_path) as supervisor:
        supervisor.start(ProcessSpec(name="ps", argv=python(note, "ps"), health="127.0.0.1:1"))
        supervisor.start(ProcessSpec(name="worker", argv=python(note, "worker")))
        eventually(lambda: supervisor.tail("ps") and supervisor.tail("worker"))
    assert order.read_text().split() == ["worker", "ps"]


def test_children_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    code = f"""
import time
from trilith_services.local.supervisor import *
supervisor = Supervisor(None, {str(tmp_path)!r})
supervisor.start(ProcessSpec(name="a", argv=[{sys.executable!r}, "-c", "import time; print('up'); time.sleep(600)"]))
while not supervisor.tail("a"):
    time.sleep(0.01)
print(supervisor.pid("a"), flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen(python(code), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    child.wait(timeout=10)


def test_names_are_used_once_and_known(supervisor) -> None:
    supervisor.start(ProcessSpec(name="a", argv=python("import time; time.sleep(600)")))
    with pytest.raises(InvalidRequestError, match="'a' is running already"):
        supervisor.start(ProcessSpec(name="a", argv=python("pass")))
    with pytest.raises(InvalidRequestError, match=r"no process 'b'; there are \['a'\]"):
        supervisor.pid("b")


def test_a_stop_request_is_noted_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5.0)
        assert stop.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_free_port_is_a_servers_from_when_it_was_found_and_nobody_elses() -> None:
    ports = free_ports(3)
    assert len(set(ports)) == 3
    for port in ports:
        for _ in range(2):  # also when it comes back
            with pytest.raises(OSError, match="in use"), socket.socket() as other:  # as others look for free ports
                other.bind(("127.0.0.1", port))
            server = Server("trilith.ParameterServer", {})
            assert server.listen(f"127.0.0.1:{port}") == port
            server.stop(0)


def test_a_free_port_that_is_not_kept_is_anybodys() -> None:
    (port,) = free_ports(1, keep=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
