"""Calls over streams: replies, deadlines, refusals, draining; a real server on loopback."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from trilith.errors import OverloadedError
from trilith.rpc.remote import ERROR_KEY
from trilith.rpc.streams import MAX_STREAMS, StreamedMethod
from trilith_services.grpc.serve import Limits, Method, Server

SERVICE = "trilith.ParameterServer"


class Echo:
    """Answers a request with itself; `wait` holds until `go`, `fail` aborts, a stream's calls and unary ones apart."""

    def __init__(self):
        self.unary, self.streamed = [], []
        self.entered, self.go = threading.Semaphore(0), threading.Event()

    def answer(self, kept):
        def call(request, context):
            kept.append(request)
            if request == b"wait":
                self.entered.release()
                assert self.go.wait(30)
            if request == b"fail":
                context.set_trailing_metadata(((ERROR_KEY, "InvalidRequestError"),))
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
            return request

        return call


@contextlib.contextmanager
def serving(*, streamed=True, **limits):
    echo = Echo()
    refused = []
    methods = {"Echo": Method(call=echo.answer(echo.unary))}
    if streamed:
        methods["EchoStream"] = Method(call=echo.answer(echo.streamed), stream=True)
    server = Server(SERVICE, methods, limits=Limits(**limits), refused=lambda: refused.append(1))
    port = server.listen("127.0.0.1:0")
    echo.server, echo.refused, echo.port = server, refused, port
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        echo.method = StreamedMethod(channel, f"/{SERVICE}/Echo", f"/{SERVICE}/EchoStream")
        try:
            yield echo
        finally:
            echo.go.set()
            server.stop(0)


def test_calls_share_a_stream_and_get_their_own_replies():
    with serving() as echo:
        assert [echo.method(b"%d" % n, timeout=10) for n in range(50)] == [b"%d" % n for n in range(50)]
        assert echo.unary == []


def test_calls_in_flight_beyond_the_streams_are_unary():
    calls = MAX_STREAMS + 3
    with serving(threads=calls) as echo, ThreadPoolExecutor(calls) as pool:
        futures = [pool.submit(echo.method, b"wait", timeout=30) for _ in range(calls)]
        for _ in range(calls):
            assert echo.entered.acquire(timeout=30)
        echo.go.set()
        assert {future.result() for future in futures} == {b"wait"}
        assert (len(echo.streamed), len(echo.unary)) == (MAX_STREAMS, 3)


def test_a_call_ends_at_its_deadline_and_the_next_one_works():
    with serving() as echo:
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            echo.method(b"wait", timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 0.2 <= time.monotonic() - started < 20
        assert echo.method(b"after", timeout=10) == b"after"


def test_a_short_deadline_counts_also_after_a_long_one():
    with serving() as echo, ThreadPoolExecutor(1) as pool:
        patient = pool.submit(echo.method, b"wait", timeout=60)
        assert echo.entered.acquire(timeout=30)
        with pytest.raises(grpc.RpcError) as caught:
            echo.method(b"wait", timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        echo.go.set()
        assert patient.result() == b"wait"


def test_an_error_keeps_its_status_and_metadata_and_the_next_call_works():
    with serving() as echo:
        with pytest.raises(grpc.RpcError) as caught:
            echo.method(b"fail", timeout=10)
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "no")
        assert (ERROR_KEY, "InvalidRequestError") in [tuple(pair) for pair in caught.value.trailing_metadata()]
        assert echo.method(b"after", timeout=10) == b"after"


def test_a_server_without_room_for_a_stream_is_called_the_unary_way():
    with serving(streams=1) as echo, ThreadPoolExecutor(1) as pool:
        first = pool.submit(echo.method, b"wait", timeout=30)
        assert echo.entered.acquire(timeout=30)
        assert echo.method(b"second", timeout=10) == b"second"
        assert echo.unary == [b"second"]
        echo.go.set()
        assert first.result() == b"wait"


def test_a_server_that_knows_no_streams_is_called_the_unary_way():
    with serving(streamed=False) as echo:
        assert echo.method(b"x", timeout=10) == b"x"
        assert echo.method(b"y", timeout=10) == b"y"
        assert echo.unary == [b"x", b"y"]


def test_a_grpcio_that_drives_streams_in_another_way_is_called_the_unary_way(monkeypatch, caplog):
    with serving() as echo:
        monkeypatch.setattr(echo.method, "_channel", object())
        assert [echo.method(b"1", timeout=10) for _ in range(3)] == [b"1"] * 3
        assert (echo.unary, echo.streamed) == ([b"1"] * 3, [])
        assert caplog.text.count("calls are slower") == 1


def test_more_calls_than_turns_wait_and_more_than_may_wait_are_refused():
    with serving(threads=1, max_queue=1) as echo, ThreadPoolExecutor(2) as pool:
        working = pool.submit(echo.method, b"wait", timeout=30)
        assert echo.entered.acquire(timeout=30)
        waiting = pool.submit(echo.method, b"waits its turn", timeout=30)
        deadline = time.monotonic() + 30
        while not echo.server.queued:
            assert time.monotonic() < deadline
        with pytest.raises(grpc.RpcError) as caught:
            echo.method(b"too many", timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(caught.value.trailing_metadata())[ERROR_KEY] == OverloadedError.__name__
        assert echo.refused == [1]
        echo.go.set()
        assert (working.result(), waiting.result()) == (b"wait", b"waits its turn")


def test_a_stopping_server_finishes_the_call_in_flight_and_ends_idle_streams_at_once():
    with serving() as echo, ThreadPoolExecutor(2) as pool:
        idle = threading.Barrier(2)

        def twice():
            idle.wait()  # both at once: two streams
            return echo.method(b"idle", timeout=10)

        for future in [pool.submit(twice) for _ in range(2)]:
            assert future.result() == b"idle"
        working = pool.submit(echo.method, b"wait", timeout=30)
        assert echo.entered.acquire(timeout=30)
        stopping = threading.Thread(target=echo.server.stop, args=(60,))
        stopping.start()
        echo.go.set()
        assert working.result() == b"wait"
        stopping.join(30)
        assert not stopping.is_alive()
        with pytest.raises(grpc.RpcError) as caught:
            echo.method(b"after", timeout=5)
        assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


def test_streams_that_ended_while_they_were_idle_are_not_noticed_by_the_next_call():
    kept = []
    methods = {
        "Echo": Method(call=Echo().answer(kept)),
        "EchoStream": Method(call=Echo().answer(kept), stream=True),
    }
    first = Server(SERVICE, methods)
    port = first.listen("127.0.0.1:0")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, ThreadPoolExecutor(2) as pool:
        method = StreamedMethod(channel, f"/{SERVICE}/Echo", f"/{SERVICE}/EchoStream")
        both = threading.Barrier(2)

        def call(request):
            both.wait()
            return method(request, timeout=10)

        assert list(pool.map(call, [b"1", b"2"])) == [b"1", b"2"]
        first.stop(0)
        second = Server(SERVICE, methods)
        try:
            second.listen(f"127.0.0.1:{port}")
            assert list(pool.map(call, [b"3", b"4"])) == [b"3", b"4"]
        finally:
            second.stop(0)


def test_closing_the_channel_ends_the_call_in_flight_and_refuses_the_next():
    with serving() as echo, grpc.insecure_channel(f"127.0.0.1:{echo.port}") as channel, ThreadPoolExecutor(1) as pool:
        method = StreamedMethod(channel, f"/{SERVICE}/Echo", f"/{SERVICE}/EchoStream")
        assert method(b"before", timeout=10) == b"before"
        waiting = pool.submit(method, b"wait", timeout=60)
        assert echo.entered.acquire(timeout=30)
        channel.close()
        with pytest.raises((grpc.RpcError, ValueError)):
            waiting.result(30)
        with pytest.raises(ValueError, match="closed"):
            method(b"after", timeout=10)
