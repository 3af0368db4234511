"""Tasks of the estimator, exported and scored by entry processes as their trainer scores them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest
import torch

from tests.tasks import batch, everything, examples, instances, rows
from trilith.data import Records
from trilith.estimator import RunConfig
from trilith.serving.exports import ps_base
from trilith.serving.prediction import Predictor
from trilith_services.local.supervisor import free_ports

pytestmark = [pytest.mark.timeout(900), pytest.mark.jobs]


def post(url: str, body: object) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/v1/predict", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        return json.loads(error.read())


@pytest.mark.parametrize("mode", ["standalone", "distributed"])
def test_a_task_of_every_kind_of_feature_is_served_as_it_was_trained(processes, tmp_path, mode):
    run = RunConfig(model_dir=str(tmp_path / "model"), progress="none", epochs=2)
    shards = 1
    if mode == "distributed":
        shards = 2
        names = [f"ps-{index}" for index in range(shards)]
        addresses = [
            processes.start(name, "ps", "--index", str(i), "--count", "2", "--checkpoint-root", str(tmp_path))
            for i, name in enumerate(names)
        ]
        processes.wait(*names)
        run = RunConfig(**run.non_defaults(), cluster=f"static://{','.join(addresses)}")
    base = str(tmp_path / "exports")
    with everything(run) as job:
        job.train()
        samples = batch(99)
        (want,) = job.predict([samples])
        prepared = job.rows.prepare(samples)
        with torch.no_grad():
            tower = job.task.user_tower(job.rows.inputs(prepared, job.rows.fetch(prepared))).numpy()
        version = job.export(base, mode=mode).rpartition("/")[2]
    assert want["both"].shape == (len(samples["user"]), 2)
    assert np.ptp(want["click"]) > 0.05
    replicas: list[str] = []
    if mode == "distributed":
        names = [f"replica-{index}" for index in range(shards)]
        for index, name in enumerate(names):
            shard = ("--index", str(index), "--count", str(shards), "--rows", f"{ps_base(base, index)}/{version}/rows")
            replicas += ["--replicas", f"{index}={processes.start(name, 'serving', 'ps', *shard)}"]
        processes.wait(*names)
    http = f"127.0.0.1:{free_ports(1)[0]}"
    entry = processes.start(
        "entry", "serving", "entry", "--export", base, "--http", http, "--deadline", "30", *replicas
    )
    processes.wait("entry")

    def check(outputs: Any) -> None:
        assert outputs.keys() == want.keys()
        for name, scores in want.items():
            np.testing.assert_allclose(outputs[name], scores, rtol=1e-6, atol=1e-6)

    where = replicas[1::2]
    with everything(RunConfig(progress="none")) as another, another.import_(base, replicas=where) as imported:
        assert (str(imported.version), imported.path.rpartition("/")[2]) == (version, version)
        check(imported(samples))
        check(imported(Records.of(examples(samples), "example")))
        np.testing.assert_allclose(imported(samples, signature="user")["user_tower"], tower, rtol=1e-6, atol=1e-6)

    with Predictor(entry, timeout_s=60) as predictor:
        check(predictor.predict(examples(samples)).outputs)
        check(predictor.predict(instances(samples), kind="instance").outputs)
        clicks = predictor.predict(examples(samples), signature="clicks").outputs
        user = predictor.predict(examples(samples), signature="user").outputs
    answer = post(f"http://{http}", {"records": rows(samples)})
    assert "outputs" in answer, answer
    check(answer["outputs"])
    assert clicks.keys() == {"click"}
    np.testing.assert_allclose(clicks["click"], want["click"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(user["user_tower"], tower, rtol=1e-6, atol=1e-6)
    columns = {name: [row[name] for row in rows(samples)] for name in rows(samples)[0]}
    check(post(f"http://{http}", {"columns": columns})["outputs"])
    answer = post(f"http://{http}", {"records": [rows(samples)[0] | {"city": 1.5}, {"user": 7}]})
    assert "record 0: feature 'city' has 1.5; ids are whole numbers" in answer["message"]
    assert "record 1: features 'city', 'item'," in answer["message"]
    assert answer["message"].endswith("are missing")
    few = [{name: row[name] for name in ("user", "city")} for row in rows(samples)]
    answer = post(f"http://{http}", {"records": few, "signature": "user"})
    assert "outputs" in answer, answer
    np.testing.assert_allclose(answer["outputs"]["user_tower"], tower, rtol=1e-6, atol=1e-6)
    with urllib.request.urlopen(f"http://{http}/v1/model", timeout=60) as response:
        signatures = {each["name"]: each for each in json.loads(response.read())["signatures"]}
    assert list(signatures) == ["serving_default", "clicks", "user", "parts"]
    assert signatures["user"] == {"name": "user", "features": ["user", "city"], "outputs": ["user_tower"]}
