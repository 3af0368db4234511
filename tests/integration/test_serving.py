"""Entries as real processes: standalone exports, replicas that are killed and versions that change under load."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.programs import PATIENCE_S
from tests.served import Load, Trained, train
from tests.waiting import eventually
from trilith.errors import InvalidRequestError, UnavailableError
from trilith.serving.exports import ps_base
from trilith.serving.prediction import Predictor, remote_predict
from trilith_services.local.supervisor import free_ports

pytestmark = pytest.mark.timeout(900)

CLOSE = 1e-3  # rows are compressed to float16


@pytest.fixture
def trained(tmp_path: Path) -> Iterator[Trained]:
    with train("local://", tmp_path / "model") as trained:
        yield trained


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
    address = processes.start(
        "entry", "serving", "entry", "--export", base, "--http", http, "--poll", "0.1", "--reflection"
    )
    processes.wait("entry")
    records = trained.records.payloads()

    found = remote_predict(address, trained.records)
    np.testing.assert_allclose(found.scores, old, atol=CLOSE)
    assert found.model_version == first.version
    assert 0 < time.time() - found.rows_as_of < 300
    with pytest.raises(InvalidRequestError, match="record 1"):
        remote_predict(address, [records[0], b"\xff\xff"])
    with pytest.raises(InvalidRequestError, match="0 records"):
        remote_predict(address, [])

    _check_http(f"http://{http}", trained, old)
    _check_reflection(address)

    with Load(address, records) as load:
        load.more()
        trained.shift(1.0)
        second = exporter.export(trained.save(), base, mode="standalone")
        eventually(lambda: load.errors or load.answers[-1].model_version == second.version, timeout_s=PATIENCE_S)
        load.more()
    assert load.errors == []
    new = trained.scores()
    assert np.abs(new - old).max() > 100 * CLOSE
    wants = {first.version: old, second.version: new}
    for found in load.answers:
        np.testing.assert_allclose(found.scores, wants[found.model_version], atol=CLOSE)
    assert processes.end("entry", signal.SIGTERM) == 0


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
    np.testing.assert_allclose(answer["outputs"]["click"], scores[:2], atol=CLOSE)
    encoded = [base64.b64encode(each).decode() for each in trained.records.payloads()]
    status, answer = get(f"{url}/v1/predict", {"examples": encoded})
    np.testing.assert_allclose(answer["outputs"]["click"], scores, atol=CLOSE)
    assert get(f"{url}/v1/predict", {"examples": ["//8="]})[0] == 400
    assert get(f"{url}/v1/predict", {})[0] == 400
    status, answer = get(f"{url}/v1/predict", {"what": 1})
    assert status == 400
    assert answer == {"error": "InvalidRequestError", "message": "body.what: Extra inputs are not permitted"}
    status, answer = get(f"{url}/v1/nothing")
    assert (status, answer["message"]) == (404, "GET /v1/nothing: Not Found; GET /openapi.json lists what there is")
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
    processes.wait("replica-0", "replica-1")
    entry = processes.start(
        "entry",
        *("serving", "entry", "--export", base, "--http", "", "--deadline", "5"),
        *(part for address in addresses for part in ("--replicas", f"0={address}")),
    )
    processes.wait("entry")
    predictor = Predictor(entry, timeout_s=20.0)
    try:
        with Load(entry, trained.records.payloads()) as load:
            load.more()
            processes.end("replica-1")
            load.more()
            eventually(
                lambda: [each.healthy for each in predictor.status().replicas] == [True, False], timeout_s=PATIENCE_S
            )
            assert addresses[1] in predictor.status().replicas[1].error
            processes.start("replica-1")
            processes.wait("replica-1")
            eventually(
                lambda: [each.healthy for each in predictor.status().replicas] == [True, True], timeout_s=PATIENCE_S
            )
            load.more()
            processes.running["replica-0"].send_signal(signal.SIGSTOP)  # it does not even refuse
            load.more()
            eventually(
                lambda: [each.healthy for each in predictor.status().replicas] == [False, True], timeout_s=PATIENCE_S
            )
            load.more()
            processes.running["replica-0"].send_signal(signal.SIGCONT)
            eventually(lambda: all(each.healthy for each in predictor.status().replicas), timeout_s=PATIENCE_S)
            before = predictor.status().replicas[0].lookups
            load.more()
            assert predictor.status().replicas[0].lookups > before, "both are asked again"
        assert load.errors == []
        for found in load.answers:
            np.testing.assert_allclose(found.scores, trained.scores(), atol=CLOSE)
        for name in ("replica-0", "replica-1"):
            processes.end(name)
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="no replica of shard 0 of 1"):
            predictor.predict(trained.records, timeout_s=8.0)
        assert time.monotonic() - started < 60.0
    finally:
        predictor.close()


def test_an_export_copied_file_by_file_is_served_and_one_that_is_taken_away_is_told_of(processes, trained, tmp_path):
    made, base = tmp_path / "made", tmp_path / "exports"
    exporter = trained.exporter()
    first, second = (exporter.export(trained.save(), str(made), mode="standalone").version for _ in range(2))
    shutil.copytree(made / str(first), base / str(first))
    http = f"127.0.0.1:{free_ports(1)[0]}"
    processes.start("entry", "serving", "entry", "--export", str(base), "--http", http, "--poll", "0.1")
    processes.wait("entry")

    def served(want: int, *, why: str) -> bool:
        model = get(f"http://{http}/v1/model")[1]
        return model["model_version"] == want and (why in model["load_error"] if why else not model["load_error"])

    assert served(first, why="")
    files = sorted(path.relative_to(made / str(second)) for path in (made / str(second)).rglob("*") if path.is_file())
    assert files[0].name == "manifest.json"  # as rsync goes
    for name in files:
        (base / str(second) / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / str(second) / name, base / str(second) / name)
        if name != files[-1]:
            eventually(lambda: served(first, why=f"version {second}: "), timeout_s=PATIENCE_S)
    eventually(lambda: served(second, why=""), timeout_s=PATIENCE_S)

    shutil.rmtree(base / str(second))
    eventually(lambda: served(first, why=f"version {second} is gone"), timeout_s=PATIENCE_S)
    shutil.copytree(made / str(first), base / ".coming")
    (base / ".coming").rename(base / str(second + 5))  # an old one under a newer number
    eventually(lambda: served(second + 5, why=""), timeout_s=PATIENCE_S)
    assert f"version={second + 5}" in processes.log("entry")
