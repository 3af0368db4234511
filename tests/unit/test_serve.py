"""serve(): health while preparing, draining on signals, exit status; each in a process of its own."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from trilith.errors import UnavailableError
from trilith_services.grpc.serve import Limits, Method, Server

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = "trilith.ParameterServer"

PROGRAM = """
import sys, threading
from trilith.errors import InvalidRequestError
from trilith_services.grpc.foreground import serve
from trilith_services.grpc.serve import Limits, Method, Server

def say(*words):
    print(*words, flush=True)

def prepare():
    say("preparing")
    line = sys.stdin.readline()  # until the test says so
    if line.strip() == "fail":
        raise InvalidRequestError("cannot prepare")

entered, go = threading.Event(), threading.Event()

def slow(request, context):
    say("entered")
    if request == b"wait":
        sys.stdin.readline()
    return request + b" done"

server = Server("trilith.ParameterServer", {"Slow": Method(call=slow)}, limits=Limits(drain_s=20))
try:
    status = serve(server, "127.0.0.1:0", prepare=prepare, bound=lambda port: say(port), drained=lambda: say("drained"))
except InvalidRequestError as error:
    say("failed:", error)
    status = 2
sys.exit(status)
"""


class Process:
    """The program above, spoken to over its standard streams."""

    def __init__(self, program=PROGRAM):
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def hear(self):
        return self.process.stdout.readline().strip()

    def say(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def signal(self, number):
        self.process.send_signal(number)

    def status(self):
        return self.process.wait(120)

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def health(port, service=SERVICE):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        return check(health_pb2.HealthCheckRequest(service=service), timeout=10, wait_for_ready=True).status


def wait_until_serving(port):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=30)
        assert any(reply.status == SERVING for reply in watch)
        watch.cancel()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_health_follows_preparation_and_a_signal_ends_with_zero(number):
    with Process() as process:
        port = int(process.hear())
        assert process.hear() == "preparing"
        assert health(port) == NOT_SERVING
        assert health(port, "") == NOT_SERVING
        process.say("go on")
        wait_until_serving(port)
        assert health(port, "") == SERVING
        process.signal(number)
        assert process.hear() == "drained"
        assert process.status() == 0


def test_a_signal_during_preparation_ends_with_zero():
    with Process() as process:
        process.hear()
        assert process.hear() == "preparing"
        process.signal(signal.SIGTERM)
        assert process.status() == 0


def test_a_failed_preparation_is_raised_to_the_caller():
    with Process() as process:
        process.hear()
        assert process.hear() == "preparing"
        process.say("fail")
        assert process.hear() == "failed: cannot prepare"
        assert process.status() == 2


def test_calls_in_flight_finish_and_new_ones_are_refused_while_draining():
    with Process() as process, ThreadPoolExecutor(1) as pool:
        port = int(process.hear())
        process.hear()
        process.say("go on")
        wait_until_serving(port)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = pool.submit(channel.unary_unary(f"/{SERVICE}/Slow"), b"wait", timeout=30)
            assert process.hear() == "entered"
            process.signal(signal.SIGTERM)
            with grpc.insecure_channel(f"127.0.0.1:{port}") as late:
                refused = None
                while refused is None:
                    try:
                        late.unary_unary(f"/{SERVICE}/Slow")(b"late", timeout=3)
                    except grpc.RpcError as error:
                        # A connection that the kernel took just as the port was closed is answered by nobody.
                        refused = None if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else error
                    else:
                        assert process.hear() == "entered"
            # Cancelled: it reached the port just before the server let go. Clients take both for UnavailableError.
            assert refused.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            process.say("finish")
            assert call.result(timeout=10) == b"wait done"
        assert process.hear() == "drained"
        assert process.status() == 0


# ---- in this process -------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    server = Server(SERVICE, {"Echo": Method(call=lambda request, context: request)})
    yield server
    server.stop(0)


def test_an_address_that_is_taken_is_said_to_be(server):
    port = server.listen("127.0.0.1:0")
    other = Server(SERVICE, {})
    with pytest.raises(UnavailableError, match=f"127.0.0.1:{port}: Address already in use"):
        other.listen(f"127.0.0.1:{port}")
    other.stop(0)


def services(server):
    port = server.listen("127.0.0.1:0")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (reply,) = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10
        )
    return {service.name for service in reply.list_services_response.service}


def test_reflection_names_the_service_where_it_is_wanted():
    server = Server(SERVICE, {}, limits=Limits(reflection=True))
    assert {SERVICE, "grpc.health.v1.Health"} <= services(server)
    server.stop(0)


def test_nothing_is_described_to_strangers_unless_wanted(server):
    with pytest.raises(grpc.RpcError) as caught:
        services(server)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_an_unknown_method_is_unimplemented(server):
    port = server.listen("127.0.0.1:0")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/{SERVICE}/Nothing")(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert channel.unary_unary(f"/{SERVICE}/Echo")(b"hello", timeout=10) == b"hello"


def test_calls_that_take_minutes_keep_nobody_from_answering() -> None:
    go = threading.Event()
    methods = {
        "Save": Method(call=lambda request, context: go.wait(30) and request, long=True),
        "Describe": Method(call=lambda request, context: request, control=True),
        "Lookup": Method(call=lambda request, context: request),
    }
    server = Server(SERVICE, methods, limits=Limits(max_queue=3))
    port = server.listen("127.0.0.1:0")
    server.set_serving(True)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        calls = [channel.unary_unary(f"/{SERVICE}/Save").future(b"x", timeout=60) for _ in range(20)]
        ended: queue.Queue[grpc.Future] = queue.Queue()
        for call in calls:
            call.add_done_callback(ended.put)
        refused = [ended.get(timeout=30) for _ in range(20 - 4 - 3)]  # four are at work, three wait
        assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        for method in ("Describe", "Lookup"):
            assert channel.unary_unary(f"/{SERVICE}/{method}")(b"y", timeout=10) == b"y"
        assert health(port) == SERVING
        go.set()
        assert [call.result(timeout=10) for call in calls if call not in refused] == [b"x"] * 7
    server.stop(0)
