"""Sample requests that a version scores before it answers: written of a job's data, carried by exports, and obeyed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.served import Trained, train
from tests.tasks import batch, everything, rows
from trilith.errors import CheckpointError, InvalidRequestError
from trilith.estimator import RunConfig
from trilith.serving.exports import WARM_UP, read_export
from trilith_services.cli import app
from trilith_services.serving.models import Models
from trilith_services.serving.requests import PredictBody
from trilith_services.serving.unknown import UnknownPolicy
from trilith_services.serving.warm_up import WarmUp, read_warm_up


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in (Path(path) / WARM_UP).read_text().splitlines()]


def test_a_job_writes_samples_of_its_data_which_entries_score_first(tmp_path, caplog):
    run = RunConfig(model_dir=str(tmp_path / "model"), progress="none", export_mode="standalone", export_warm_up=3)
    base = str(tmp_path / "exports")
    with everything(run, batches=2) as job:
        unseen = lines(job.export(str(tmp_path / "early")))  # before it has learned anything: its first samples
        job.train()
        path = job.export(base)
        given = lines(job.export(str(tmp_path / "given"), warm_up=[batch(7, 70), batch(8, 12)]))
        without = job.export(str(tmp_path / "without"), warm_up=0)
        with pytest.raises(InvalidRequestError, match="warm_up=-1: how many samples"):
            job.export(base, warm_up=-1)
    assert [len(each["records"]) for each in given] == [64, 6, 12]
    assert WARM_UP not in read_export(without).files
    for found, seed in ((unseen, 0), (lines(path), 1)):
        ((name, records),) = found[0].items()
        assert (name, len(found), len(records)) == ("records", 1, 3)
        for record, sample in zip(records, rows(batch(seed)), strict=False):
            assert record["user"] == [sample["user"]]
            assert record["tags"] == sample["tags"]
            assert record["tag_weights"] == pytest.approx(sample["tag_weights"])
            assert record["seen"] == sample["seen"][-4:]
            assert record["context"] == sample["context"]
            assert record["born"] == [sample["born"]]
            assert record.keys() == sample.keys()
    models = Models(base)
    with caplog.at_level(logging.INFO):
        assert models.refresh()
    (told,) = [each for each in caplog.records if each.message == "warmed up"]
    assert told.requests == 1
    models.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    with train("local://", tmp_path_factory.mktemp("model")) as trained:
        yield trained


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (b'{"records": [{"usr": 7}]}', "warm-up request 1: record 0: the model has no feature 'usr'"),
        (b'\n{"records": [{}]}\n{"examples": ["//8="]}', "warm-up request 2: request: record 0"),
        (b'{"records": [{}]}\nnothing', "warmup.jsonl: line 2: Invalid JSON"),
        (b'{"records": []}', "warmup.jsonl: line 1: give one of records, columns, examples and instances"),
        (b'{"records": [{}], "version": 3}', "warmup.jsonl: line 1: it names a version"),
        (b'{"record": [{}]}', "warmup.jsonl: line 1: record: Extra inputs are not permitted"),
    ],
)
def test_a_version_whose_warm_up_fails_is_refused_and_the_present_one_goes_on(trained, tmp_path, own, why):
    exporter, base = trained.exporter(), str(tmp_path / "exports")
    first = exporter.export(trained.save(), base, mode="standalone", warm_up=b'{"records": [{}]}').version
    models = Models(base)
    assert models.refresh()
    second = exporter.export(trained.save(), base, mode="standalone", warm_up=own).version
    assert not models.refresh()
    assert models.current.version == first
    assert f"version {second}: {why}" in models.load_error
    models.close()


def test_a_score_that_is_no_number_refuses_a_version(trained, tmp_path):
    base = str(tmp_path / "exports")
    trained.shift(np.nan)
    trained.exporter().export(trained.save(), base, mode="standalone")
    asked = WarmUp(requests=(PredictBody(records=[{}, {}]),))
    models = Models(base, warm_up=asked)
    assert not models.refresh()
    assert "--warm-up request 1: output 'click' of record 0 is nan" in models.load_error
    models.close()


def test_features_that_are_ignored_in_requests_are_in_a_warm_up(trained, tmp_path):
    base = str(tmp_path / "exports")
    asked = (PredictBody(records=[{"strange": 1}]),)
    with train("local://", tmp_path / "model") as fresh:
        fresh.exporter().export(fresh.save(), base, mode="standalone")
    for policy, loads in ((UnknownPolicy.json, False), (UnknownPolicy.ignore, True)):
        models = Models(base, warm_up=WarmUp(requests=asked, policy=policy))
        assert models.refresh() is loads
        models.close()


def test_a_file_that_holds_no_requests_is_told_by_its_line(tmp_path):
    path = tmp_path / "warm-up.jsonl"
    path.write_text('{"records": [{}]}\n\n{"records": 7}\n')
    with pytest.raises(InvalidRequestError, match=r"warm-up.jsonl: line 3: records: Input should be a valid array"):
        read_warm_up(path.read_bytes(), str(path))
    result = CliRunner().invoke(app, ["serving", "entry", "--export", str(tmp_path), "--warm-up", str(path)])
    assert isinstance(result.exception, InvalidRequestError)
    assert read_warm_up(b"\n", "none") == []
    with pytest.raises(CheckpointError, match="warm-up request 1"):
        WarmUp().run(_Refusing(), [PredictBody(records=[{}])], timeout_s=1.0)


class _Refusing:
    declared: dict = {}  # noqa: RUF012

    def predict(self, *args, **kwargs):
        raise InvalidRequestError("no")
