"""Entries as real processes: standalone exports, replicas that are killed and versions that change under load."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import trilith
from tests.served import Trained, train
from tests.zookeeper import eventually
from trilith.errors import DataError, InvalidRequestError, UnavailableError
from trilith.exports import ps_base
from trilith.prediction import Predictor, remote_predict
from trilith_services.supervisor import free_ports, is_serving, trilith_argv

pytestmark = pytest.mark.timeout(300)

CLOSE = 1e-3  # rows are compressed to float16


class Processes:
    """`trilith` processes by name."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str) -> str:
        """Start it; returns its address at once."""
        address = f"127.0.0.1:{free_ports(1)[0]}"
        with (self._logs / f"{name}.log").open("ab") as log:
            argv = trilith_argv(*arguments, "--listen", address, "--threads", "1")
            self.running[name] = subprocess.Popen(argv, stdout=log, stderr=log)

        return address

    def wait(self, name: str, address: str) -> None:
        def serving() -> bool:
            assert self.running[name].poll() is None, (self._logs / f"{name}.log").read_text()
            return is_serving(address)

        eventually(serving, timeout_s=120.0)

    def end(self, name: str, number: int = signal.SIGTERM) -> int:
        process = self.running.pop(name)
        process.send_signal(number)
        return process.wait(30)

    def close(self) -> None:
        for name in list(self.running):
            self.end(name, signal.SIGKILL)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    made.close()


@pytest.fixture
def trained(tmp_path: Path) -> Iterator[Trained]:
    with trilith.connect("local://") as client:
        yield train(client, tmp_path / "model")


class Load:
    """Threads that ask for scores without a pause, and keep what they were told."""

    def __init__(self, address: str, records: list[bytes], threads: int = 2) -> None:
        self.answers: list[tuple[int, np.ndarray]] = []
        self.errors: list[Exception] = []
        self._stop = threading.Event()
        self._predictor = Predictor(address, timeout_s=10.0)
        self._threads = [threading.Thread(target=self._run, args=(records,)) for _ in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._predictor.close()

    def _run(self, records: list[bytes]) -> None:
        while not self._stop.is_set():
            try:
                found = self._predictor.predict(records)
            except Exception as error:  # noqa: BLE001 - the test looks at it
                self.errors.append(error)
                return
            self.answers.append((found.model_version, found.scores))

    def more(self, count: int = 30) -> None:
        """Wait until so many more requests were answered."""
        before = len(self.answers)
        eventually(lambda: self.errors or len(self.answers) >= before + count, timeout_s=60.0)


def get(url: str, body: object = None) -> tuple[int, dict]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_standalone_export_is_served_and_a_newer_one_takes_over_without_a_failed_request(
    processes, trained, tmp_path
):
    exporter, base = trained.exporter(), str(tmp_path / "exports")
    first = exporter.export(trained.save(), base, mode="standalone")
    old = trained.scores()
    http = f"127.0.0.1:{free_ports(1)[0]}"
    address = processes.start("entry", "serving", "entry", "--export", base, "--http", http, "--poll", "0.1")
    processes.wait("entry", address)
    records = trained.records.payloads()

    found = remote_predict(address, trained.records)
    np.testing.assert_allclose(found.scores, old, atol=CLOSE)
    assert found.model_version == first.version
    assert 0 < time.time() - found.rows_as_of < 300
    with pytest.raises(DataError, match="record 1"):
        remote_predict(address, [records[0], b"\xff\xff"])
    with pytest.raises(InvalidRequestError, match="0 records"):
        remote_predict(address, [])

    _check_http(f"http://{http}", trained, old)
    _check_reflection(address)

    with Load(address, records) as load:
        load.more()
        trained.shift(1.0)
        second = exporter.export(trained.save(), base, mode="standalone")
        eventually(lambda: load.errors or load.answers[-1][0] == second.version, timeout_s=60.0)
        load.more()
    assert load.errors == []
    new = trained.scores()
    assert np.abs(new - old).max() > 100 * CLOSE
    wants = {first.version: old, second.version: new}
    for version, scores in load.answers:
        np.testing.assert_allclose(scores, wants[version], atol=CLOSE)
    assert processes.end("entry") == 0


def _check_http(url: str, trained: Trained, scores: np.ndarray) -> None:
    status, model = get(f"{url}/v1/model")
    assert (status, model["model"], model["mode"], model["failures"]) == (200, "deepfm", "standalone", 2)
    assert model["seconds_behind"]["rows"] > 0
    features = [
        {name: each.take(np.array([row])).values.tolist() for name, each in trained.data.features.items()}
        for row in (0, 1)
    ]
    status, answer = get(f"{url}/v1/predict", {"records": features})
    assert status == 200
    np.testing.assert_allclose(answer["outputs"]["score"], scores[:2], atol=CLOSE)
    encoded = [base64.b64encode(each).decode() for each in trained.records.payloads()]
    status, answer = get(f"{url}/v1/predict", {"examples": encoded})
    np.testing.assert_allclose(answer["outputs"]["score"], scores, atol=CLOSE)
    assert get(f"{url}/v1/predict", {"examples": ["//8="]})[0] == 400
    assert get(f"{url}/v1/predict", {})[0] == 400
    assert get(f"{url}/v1/predict", {"what": 1})[0] == 422
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        assert b'trilith_serving_calls_total{method="Predict",status="OK"}' in response.read()
    with urllib.request.urlopen(f"{url}/healthz", timeout=30) as response:
        assert response.read() == b"ok\n"


def _check_reflection(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    assert "trilith.Prediction" in {each.name for each in answer.list_services_response.service}


def test_requests_go_on_when_a_replica_is_killed_or_hangs_and_it_is_used_again_when_it_is_back(
    processes, trained, tmp_path
):
    base = str(tmp_path / "exports")
    done = trained.exporter().export(trained.save(), base)
    rows = f"{ps_base(base, 0)}/{done.version}/rows"
    addresses = [processes.start(f"replica-{i}", "serving", "ps", "--replica", str(i), "--rows", rows) for i in (0, 1)]
    for i, address in enumerate(addresses):
        processes.wait(f"replica-{i}", address)
    entry = processes.start(
        "entry",
        *("serving", "entry", "--export", base, "--http", "", "--deadline", "2"),
        *(part for address in addresses for part in ("--replicas", f"0={address}")),
    )
    processes.wait("entry", entry)
    predictor = Predictor(entry)
    try:
        with Load(entry, trained.records.payloads()) as load:
            load.more()
            processes.running["replica-1"].send_signal(signal.SIGKILL)
            load.more()
            eventually(lambda: [each.healthy for each in predictor.status().replicas] == [True, False], timeout_s=10.0)
            assert addresses[1] in predictor.status().replicas[1].error
            processes.end("replica-1")
            _restart(processes, "replica-1", addresses[1], rows)
            eventually(lambda: [each.healthy for each in predictor.status().replicas] == [True, True], timeout_s=60.0)
            load.more()
            processes.running["replica-0"].send_signal(signal.SIGSTOP)  # it does not even refuse
            load.more()
            eventually(lambda: [each.healthy for each in predictor.status().replicas] == [False, True], timeout_s=10.0)
            load.more()
            processes.running["replica-0"].send_signal(signal.SIGCONT)
            eventually(lambda: all(each.healthy for each in predictor.status().replicas), timeout_s=30.0)
            before = predictor.status().replicas[0].lookups
            load.more()
            assert predictor.status().replicas[0].lookups > before, "both are asked again"
        assert load.errors == []
        for _, scores in load.answers:
            np.testing.assert_allclose(scores, trained.scores(), atol=CLOSE)
        for name in ("replica-0", "replica-1"):
            processes.end(name, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="no replica of shard 0 of 1"):
            predictor.predict(trained.records, timeout_s=4.0)
        assert time.monotonic() - started < 10.0
    finally:
        predictor.close()


def _restart(processes: Processes, name: str, address: str, rows: str) -> None:
    argv = trilith_argv("serving", "ps", "--replica", "1", "--rows", rows, "--listen", address, "--threads", "1")
    processes.running[name] = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
