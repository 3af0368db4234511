"""An entry process under load: versions take over, fail, are pinned, named and withdrawn, and no request fails."""

from __future__ import annotations

import json
import shutil
import signal
import urllib.error
import urllib.request

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.programs import PATIENCE_S
from tests.served import Load, train
from tests.waiting import eventually
from trilith.errors import InvalidRequestError
from trilith.serving.prediction import Predictor
from trilith_services.cli import app
from trilith_services.local.supervisor import free_ports

pytestmark = pytest.mark.timeout(900)

CLOSE = 1e-3  # rows are compressed to float16


def command(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serving", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_versions_come_go_and_are_rolled_back_without_a_failed_request(processes, tmp_path):
    base = tmp_path / "exports"
    with train("local://", tmp_path / "model") as trained:
        exporter, wants = trained.exporter(), {}

        def publish() -> int:
            version = exporter.export(trained.save(), str(base), mode="standalone", keep=9).version
            wants[version] = trained.scores()
            trained.shift(0.7)
            return version

        first, second = publish(), publish()
        (tmp_path / "warm-up.jsonl").write_text('{"records": [{}, {}]}\n')
        http = f"127.0.0.1:{free_ports(1)[0]}"
        address = processes.start(
            "entry",
            *("serving", "entry", "--export", str(base), "--http", http, "--poll", "0.1", "--version", "keep:2"),
            *("--warm-up", str(tmp_path / "warm-up.jsonl"), "--missing-features", "ignore"),
        )
        processes.wait("entry")
        records = trained.records.payloads()

        def answers(version: int) -> None:
            eventually(lambda: load.errors or load.answers[-1].model_version == version, timeout_s=PATIENCE_S)
            load.more()

        def loaded() -> list[int]:
            (entry,) = json.loads(command("status", address, "--json"))
            return [int(each["version"]) for each in entry["versions"] if "error" not in each]

        with Load(address, records) as load, Predictor(address, timeout_s=60) as predictor:
            load.more()
            answers(second)
            np.testing.assert_allclose(predictor.predict(records, version=first).scores, wants[first], atol=CLOSE)
            third = publish()
            answers(third)
            eventually(lambda: loaded() == [third, second], timeout_s=PATIENCE_S)
            with pytest.raises(InvalidRequestError, match=f"version {first} is not loaded"):
                predictor.predict(records, version=first)

            command("pin", str(base), str(first))  # which is loaded for it
            answers(first)
            fourth = publish()
            eventually(lambda: loaded() == [fourth, third, first], timeout_s=PATIENCE_S)
            load.more()
            assert load.answers[-1].model_version == first
            command("pin", str(base), "latest")
            answers(fourth)
            command("withdraw", str(base), str(fourth))
            answers(third)
            assert "in use" in command("status", address)

            # One whose files come one by one, the last of them damaged at first.
            made = exporter.export(trained.save(), str(tmp_path / "made"), mode="standalone").path
            fifth = fourth + 100
            shutil.copytree(made, base / str(fifth))
            weights = base / str(fifth) / "weights.safetensors"
            weights.write_bytes(weights.read_bytes()[:-8])
            eventually(lambda: "does not match its checksum" in predictor.status().load_error, timeout_s=PATIENCE_S)
            load.more()
            assert load.answers[-1].model_version == third
            text = command("status", address)
            assert f"{fifth}  not loaded" in text
            assert f"{address}: version {fifth}: " in text
            wants[fifth] = trained.scores()
            shutil.copy(f"{made}/weights.safetensors", weights)
            answers(fifth)

            trained.shift(np.nan)  # training has gone wrong
            exporter.export(trained.save(), str(base), mode="standalone")
            nan = "--warm-up request 1: output 'click' of record 0 is nan"
            eventually(lambda: nan in predictor.status().load_error, timeout_s=PATIENCE_S)
            load.more()
            assert load.answers[-1].model_version == fifth
        assert load.errors == []
    for found in load.answers:
        np.testing.assert_allclose(found.scores, wants[found.model_version], atol=CLOSE)

    def post(body: object) -> tuple[int, dict]:
        request = urllib.request.Request(
            f"http://{http}/v1/predict", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    status, answer = post({"records": [{}], "version": third})
    assert (status, answer["model_version"]) == (200, third)
    status, answer = post({"records": [{}], "version": first})
    assert status == 400
    assert f"version {first} is not loaded; {third}, {fifth} is ({fifth} is in use)" in answer["message"]
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=60) as response:
        page = response.read().decode()
    assert f'trilith_serving_version_loaded{{version="{fifth}"}} 1.0' in page
    assert f'trilith_serving_version_loaded{{version="{third}"}} 0.0' in page
    assert processes.end("entry", signal.SIGTERM) == 0


def test_status_says_which_entry_does_not_answer():
    address = f"127.0.0.1:{free_ports(1)[0]}"
    result = CliRunner().invoke(app, ["serving", "status", address, "--timeout", "1"])
    assert result.exit_code == 1
    assert "no answer" in result.output
    assert f"{address}: " in result.output
