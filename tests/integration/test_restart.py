"""Checkpoints and restarts of real PS processes."""

from __future__ import annotations

import io
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import trilith
from trilith import checkpoint
from trilith.errors import UnavailableError
from trilith.tables import Adam, RandomUniform
from trilith_services.local.supervisor import PsCluster, Supervisor, free_ports, is_serving, trilith_argv

IDS = np.array([0, 1, 2**63, 2**64 - 1, *range(10_000, 12_000)], np.uint64)
USERS = {"dim": 5, "optimizer": Adam(learning_rate=0.1), "initializer": RandomUniform(-1.0, 1.0)}

pytestmark = pytest.mark.timeout(900)

Start = Callable[[int], PsCluster]


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    with Supervisor(Console(file=io.StringIO()), tmp_path / "logs") as supervisor:
        yield supervisor


@pytest.fixture
def start(supervisor: Supervisor, tmp_path: Path) -> Start:
    """Start so many PS on the test's checkpoint directory, after stopping those that run."""

    def start(count: int) -> PsCluster:
        supervisor.stop()
        # One tick long after the test: all that is written is the last checkpoint of a graceful stop.
        cluster = PsCluster(supervisor, count, checkpoint_dir=tmp_path / "checkpoints", checkpoint_every_s=86_400)
        cluster.start()
        return cluster

    return start


def train(client: trilith.Client) -> None:
    users = client.table("user", **USERS)
    for step in range(3):
        grads = np.random.default_rng(step).standard_normal((IDS.size, 5)).astype(np.float32)
        users.apply_gradients(IDS, grads, request_time=1_700_000_000 + step)
    weight = np.arange((1 << 20) + 7, dtype=np.float32)  # large enough to be cut into a partition per PS
    client.create_variables({"weight": weight, "bias": np.ones(3, np.float32)}, optimizer=Adam(learning_rate=0.5))
    client.apply_dense_gradients({"weight": np.ones_like(weight), "bias": np.ones(3, np.float32)})
    client.global_step(set_to=17)


def content(client: trilith.Client) -> tuple[list[bytes], dict[str, bytes], int]:
    values, step = client.pull_variables()
    return client.table("user").lookup_entries(IDS), {name: v.tobytes() for name, v in values.items()}, step


def test_a_cluster_restores_into_another_number_of_ps_row_for_row(start) -> None:
    with trilith.connect(start(2).address, timeout_s=60.0) as client:
        train(client)
        trained = content(client)
    for count in (3, 1):
        with trilith.connect(start(count).address, timeout_s=60.0) as client:
            assert content(client) == trained
            assert client.table("user").size() == IDS.size
            # The dense optimizer's state came along: the next step is as if nothing had happened.
            assert all(answer.restored_step == 17 for answer in client.describe())


def test_dense_steps_go_on_alike_on_another_number_of_ps(start) -> None:
    def step(client: trilith.Client) -> dict[str, bytes]:
        weight = np.full((1 << 20) + 7, 0.5, np.float32)
        client.apply_dense_gradients({"weight": weight, "bias": np.ones(3, np.float32)})
        return {name: value.tobytes() for name, value in client.pull_variables()[0].items()}

    with trilith.connect(start(2).address, timeout_s=60.0) as client:
        train(client)
    with trilith.connect(start(3).address, timeout_s=60.0) as client:
        first = step(client)
    with trilith.connect("local://") as twin:
        train(twin)
        assert step(twin) == first


def test_an_incomplete_checkpoint_is_ignored(start, supervisor, tmp_path) -> None:
    with trilith.connect(start(2).address, timeout_s=60.0) as client:
        train(client)
        trained = content(client)
    supervisor.stop()
    whole = checkpoint.newest_complete(str(tmp_path / "checkpoints"))
    later = tmp_path / "checkpoints" / checkpoint.checkpoint_name(whole.number + 1000)
    later.mkdir()
    for file in Path(whole.path).iterdir():
        if file.name != checkpoint.MANIFEST and not file.name.startswith("part.00001-of-00002."):
            (later / file.name).write_bytes(file.read_bytes())
    with trilith.connect(start(2).address, timeout_s=60.0) as client:
        assert content(client) == trained
        assert {answer.restored_from for answer in client.describe()} == {whole.path}


def test_a_damaged_checkpoint_is_refused_and_not_retried(start, supervisor, tmp_path) -> None:
    with trilith.connect(start(2).address, timeout_s=60.0) as client:
        train(client)
    supervisor.stop()
    whole = checkpoint.newest_complete(str(tmp_path / "checkpoints"))
    (victim,) = Path(whole.path).glob("table-user.00001-*")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0x40
    victim.write_bytes(content)
    with pytest.raises(UnavailableError) as caught:
        start(2)
    message = str(caught.value)
    assert "ps-1 refused to run (status 2)" in message
    assert f"error: {victim}: damaged: CRC-32C is" in message


def test_sigterm_while_a_ps_starts_ends_it_with_status_0() -> None:
    argv = trilith_argv("ps", "--listen", f"127.0.0.1:{free_ports(1)[0]}")
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "listening" in line:
            process.send_signal(signal.SIGTERM)
            break
    process.stderr.read()
    process.stderr.close()
    assert process.wait(120) == 0


def test_a_ps_checkpoints_by_the_clock_while_it_serves(tmp_path) -> None:
    endpoint = f"127.0.0.1:{free_ports(1)[0]}"
    directory = str(tmp_path / "checkpoints")
    every = ["--checkpoint-dir", directory, "--checkpoint-every", "0.2", "--checkpoint-keep", "2"]
    process = subprocess.Popen(trilith_argv("ps", "--listen", endpoint, *every), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        seen: set[int] = set()
        while not is_serving(endpoint):
            assert time.monotonic() < deadline
        with trilith.connect(f"static://{endpoint}") as client:
            users = client.table("user", **USERS)
            while len(seen) < 5:
                assert time.monotonic() < deadline
                users.apply_gradients(IDS, np.ones((IDS.size, 5), np.float32))
                seen.update(info.number for info in checkpoint.list_checkpoints(directory) if info.complete)
            assert client.stats()[0].last_checkpoint.startswith(directory)
    finally:
        process.terminate()
        assert process.wait(120) == 0
    found = checkpoint.list_checkpoints(directory)
    assert sum(info.complete for info in found) == 2
    assert all(number % 200 == 0 for number in seen)
