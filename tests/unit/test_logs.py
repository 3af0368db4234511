"""Log lines, sizes and metrics: what operators read."""

from __future__ import annotations

import io
import json
import logging
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry

from trilith.errors import InvalidRequestError
from trilith_proto import ps_pb2
from trilith_services.http.metrics import MetricsServer
from trilith_services.logs import setup_logging
from trilith_services.ps.process.metrics import Metrics
from trilith_services.sizes import parse_bytes


@pytest.fixture
def lines():
    """Set logging up with a stream of its own."""
    stream = io.StringIO()

    def setup(form, **options):
        setup_logging(form, stream=stream, **options)
        return stream

    return setup


def test_text_lines_end_in_pairs(lines):
    stream = lines("text", role={"ps": 3})
    logging.getLogger("a.b").info("served %d", 7, extra={"port": 70, "path": "a b", "empty": ""})
    (line,) = stream.getvalue().splitlines()
    assert line.split(" ", 1)[0].endswith("Z")
    assert line.split(" ", 1)[1] == 'INFO a.b served 7 ps=3 port=70 path="a b" empty=""'


def test_json_lines_are_objects_and_carry_tracebacks(lines):
    stream = lines("json", role={"ps": 3})
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        logging.getLogger("a").exception("oh\nno", extra={"port": 70})
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert {key: entry[key] for key in ("level", "logger", "message", "ps", "port")} == {
        "level": "ERROR",
        "logger": "a",
        "message": "oh\nno",
        "ps": 3,
        "port": 70,
    }
    assert "ZeroDivisionError: by zero" in entry["traceback"]


def test_lines_below_the_level_are_left_out(lines):
    stream = lines("text", level="warning")
    logging.getLogger("a").info("quiet")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("17", 17), ("512M", 512 << 20), ("16GiB", 16 << 30), ("1.5k", 1536), (" 2 TB ", 2 << 40)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "1 X", "1..5M"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InvalidRequestError, match="is not a size"):
        parse_bytes(text)


def test_metrics_are_served_over_http():
    metrics = Metrics()
    metrics.called("Lookup", "OK", 0.002)
    metrics.called("Lookup", "NOT_FOUND", 0.002)
    metrics.carried("Lookup", 5, 40, 320)
    metrics.refused()
    metrics.checkpointed(1.5, 1000, True)
    metrics.checkpointed(0.1, 0, False)
    stats = ps_pb2.StatsResponse(
        tables=[ps_pb2.TableStats(table="user", rows=7, bytes=900, lookup_ids=10, lookup_hits=4)], queued_requests=3
    )
    metrics.watch(lambda: stats)
    server = MetricsServer(metrics.registry, "127.0.0.1", 0, ready=lambda: True)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as reply:
            text = reply.read().decode()
    finally:
        server.stop()
    for line in (
        'trilith_ps_requests_total{method="Lookup",status="OK"} 1.0',
        'trilith_ps_requests_total{method="Lookup",status="NOT_FOUND"} 1.0',
        'trilith_ps_rpc_seconds_bucket{le="0.0025",method="Lookup"} 2.0',
        'trilith_ps_ids_total{method="Lookup"} 5.0',
        'trilith_ps_message_bytes_total{direction="sent",method="Lookup"} 320.0',
        "trilith_ps_refused_total 1.0",
        "trilith_ps_checkpoint_failures_total 1.0",
        'trilith_ps_rows{table="user"} 7.0',
        'trilith_ps_lookup_hit_ratio{table="user"} 0.4',
        'trilith_ps_lookup_ids_total{table="user"} 10.0',
        "trilith_ps_queue_calls 3.0",
    ):
        assert line in text.splitlines()
    assert (metrics.totals()["Lookup"].calls, metrics.totals()["Lookup"].failures) == (2, 1)


def test_health_over_http_says_whether_calls_are_answered():
    ready = threading.Event()
    server = MetricsServer(CollectorRegistry(), "127.0.0.1", 0, ready=ready.is_set)
    url = f"http://127.0.0.1:{server.port}/healthz"
    try:
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(url)
        ready.set()
        with urllib.request.urlopen(url) as reply:
            assert (reply.status, reply.read()) == (200, b"ok\n")
    finally:
        server.stop()
