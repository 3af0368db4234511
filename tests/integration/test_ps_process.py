"""`trilith ps` as a process: signals, metrics, logs, checkpoints, kill -9."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.request
from queue import Empty, Queue

import numpy as np
import pytest

import trilith
from tests.waiting import eventually
from trilith.errors import ShardRestartedError
from trilith.tables import Adagrad, RandomUniform

CONFIG = {"dim": 4, "optimizer": Adagrad(learning_rate=0.1), "initializer": RandomUniform(-1, 1)}


class Ps:
    """One process, and what it logs."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trilith_services", "ps", "--log-format", "json", *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines = []
        self._news = Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)
            self._news.put(json.loads(line) if line.startswith("{") else {"message": line})

    def wait_for(self, message):
        """The first log entry that says so."""
        while True:
            try:
                entry = self._news.get(timeout=240)
            except Empty:
                raise AssertionError(f"{message!r} was not logged:\n{''.join(self.lines)}") from None
            if entry["message"] == message:
                return entry

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        status = self.process.wait(120)
        self._reader.join(10)
        return status

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.process.kill()
        self.process.wait()
        self._reader.join(10)
        self.process.stderr.close()


def test_a_ps_serves_and_ends_with_zero():
    with Ps("--listen", "127.0.0.1:0", "--metrics-port", 0, "--index", 0, "--count", 1) as ps:
        port = ps.wait_for("listening")["port"]
        metrics_port = ps.wait_for("metrics")["port"]
        assert ps.wait_for("serving")["ps"] == 0
        with trilith.connect(f"static://127.0.0.1:{port}") as client:
            table = client.table("user", **CONFIG)
            table.apply_gradients([1, 2], np.ones((2, 4), np.float32))
            assert table.lookup([1, 2]).any()
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics") as reply:
            text = reply.read().decode()
        assert 'trilith_ps_rows{table="user"} 2.0' in text
        assert ps.end() == 0


def test_a_signal_at_any_time_after_the_start_ends_with_zero():
    with Ps("--listen", "127.0.0.1:0") as ps:
        ps.wait_for("listening")
        assert ps.end() == 0


def test_sigusr1_shows_where_every_thread_is_and_changes_nothing():
    with Ps("--listen", "127.0.0.1:0") as ps:
        port = ps.wait_for("serving")["port"]
        ps.process.send_signal(signal.SIGUSR1)
        eventually(lambda: any("most recent call first" in line for line in ps.lines), timeout_s=60)
        with trilith.connect(f"static://127.0.0.1:{port}") as client:
            client.table("t", **CONFIG).assign([1], np.ones((1, 4), np.float32))
            assert client.table("t").lookup([1]).tolist() == [[1.0] * 4]
        assert ps.end() == 0
    assert any("run" in line and "trilith_services" in line for line in ps.lines)


def test_a_checkpoint_at_the_end_is_restored_at_the_start(tmp_path):
    ids = np.arange(50)
    with Ps("--listen", "127.0.0.1:0", "--checkpoint-dir", tmp_path) as ps:
        with trilith.connect(f"static://127.0.0.1:{ps.wait_for('listening')['port']}", timeout_s=240.0) as client:
            table = client.table("user", **CONFIG)
            table.apply_gradients(ids, np.ones((50, 4), np.float32))
            client.global_step(set_to=9)
            want = table.lookup(ids)
        assert ps.end() == 0
    with Ps("--listen", "127.0.0.1:0", "--checkpoint-dir", tmp_path) as ps:
        with trilith.connect(f"static://127.0.0.1:{ps.wait_for('listening')['port']}", timeout_s=240.0) as client:
            np.testing.assert_array_equal(client.table("user").lookup(ids), want)
            (answer,) = client.describe()
            assert answer.restored_step == client.global_step() == 9
            assert answer.restored_from
        assert ps.end() == 0


def test_a_killed_ps_comes_back_from_its_checkpoint_and_the_client_goes_on(tmp_path):
    ids = np.arange(50)
    arguments = ("--checkpoint-dir", tmp_path, "--checkpoint-every", 0.2)
    with Ps("--listen", "127.0.0.1:0", *arguments) as ps:
        port = ps.wait_for("listening")["port"]
        with trilith.connect(f"static://127.0.0.1:{port}", timeout_s=240.0) as client:
            table = client.table("user", **CONFIG)
            table.apply_gradients(ids, np.ones((50, 4), np.float32))
            client.global_step(set_to=5)
            want = table.lookup(ids)
            while ps.wait_for("checkpoint complete")["step"] != 5:
                pass
            client.global_step(set_to=8)
            ps.end(signal.SIGKILL)
            with Ps("--listen", f"127.0.0.1:{port}", *arguments):
                with pytest.raises(ShardRestartedError):
                    table.lookup(ids)
                (back,) = client.rejoin()
                assert (back.index, back.known_step) == (0, 8)
                assert back.restored_step in (5, 8)
                np.testing.assert_array_equal(table.lookup(ids), want)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--index", "3", "--count", "2"], "index 3"),
        (["--memory-limit", "much"], "'much' is not a size"),
        (["--checkpoint-every", "5"], "--checkpoint-every 5 needs --checkpoint-dir"),
        (["--checkpoint-dir", "/dev/null", "--listen", "127.0.0.1:0"], "/dev/null: no files can be written there"),
        (["--listen", "256.1.1.1:70"], "cannot listen on 256.1.1.1:70"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_status_two(arguments, says):
    done = subprocess.run(
        [sys.executable, "-m", "trilith_services", "ps", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last
