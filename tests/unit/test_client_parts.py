"""Small parts of the client: the static directory, its settings, and what it accepts as arrays."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from trilith.arrays import as_ids, as_rows
from trilith.config import ClientConfig
from trilith.discovery import PS
from trilith.discovery.static import StaticDirectory
from trilith.errors import InvalidRequestError


def test_a_static_directory_is_its_list():
    directory = StaticDirectory.parse("a:1, b:2,[::1]:3")
    assert directory.query(PS) == {0: "a:1", 1: "b:2", 2: "[::1]:3"}
    assert directory.query("worker") == {}
    seen = []
    stop = directory.watch(PS, seen.append)
    directory.register(PS, 7, "c:4")
    directory.deregister(PS, 0, "a:1")
    stop()
    assert seen == [directory.query(PS)]
    directory.close()


@pytest.mark.parametrize("hosts", ["", " , ", "a", "a:", ":1", "a:0", "a:65536", "a:x", "a:1,a:1"])
def test_a_list_that_is_none_is_refused(hosts):
    with pytest.raises(InvalidRequestError):
        StaticDirectory.parse(hosts)


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout_s": 0},
        {"timeout_s": float("nan")},
        {"create_timeout_s": -1},
        {"max_message_bytes": 100},
        {"chunk_bytes": 0},
        {"chunk_bytes": 1 << 40},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
        ClientConfig(**wrong)


def test_plain_arrays_are_not_copied():
    ids, rows = np.arange(5, dtype=np.int64), np.ones((5, 2), np.float32)
    assert as_ids("t", ids).base is ids
    assert as_rows("t", "values", rows, 5, 2) is rows


def test_awkward_arrays_are_copied_into_plain_ones():
    raw = np.frombuffer(b"x" + np.arange(6, dtype=np.uint64).tobytes(), np.uint8)[1:].view(np.uint64)
    for ids in (raw, raw[::2], raw[::-1]):
        plain = as_ids("t", ids)
        assert plain.flags.aligned
        assert plain.flags.c_contiguous
        assert plain.tolist() == ids.tolist()
    turned = np.ones((2, 5), np.float32).T
    assert as_rows("t", "values", turned, 5, 2).flags.c_contiguous


@pytest.mark.parametrize(
    ("given", "want"), [(None, "-event_engine_client,-event_engine_listener"), ("x", "x"), ("", "")]
)
def test_the_faster_grpc_is_chosen_unless_somebody_chose(given, want):
    program = """
import os
from trilith.config import prepare_grpc
prepare_grpc()
print(os.environ["GRPC_EXPERIMENTS"])
"""
    env = {key: value for key, value in os.environ.items() if key != "GRPC_EXPERIMENTS"}
    if given is not None:
        env["GRPC_EXPERIMENTS"] = given
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == want
