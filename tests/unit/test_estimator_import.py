"""Exports come back into a process: `Estimator.import_` scores batches as the trainer does."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tasks import batch, everything, examples
from trilith.data import Records
from trilith.errors import CheckpointError, InvalidRequestError
from trilith.estimator import RunConfig


@pytest.fixture
def job(tmp_path):
    run = RunConfig(model_dir=str(tmp_path / "model"), export_mode="standalone", progress="none")
    with everything(run, batches=2) as made:
        yield made


def check(found, want):
    assert found.keys() == want.keys()
    for name, scores in want.items():
        np.testing.assert_allclose(found[name], scores, rtol=1e-6, atol=1e-6)


def test_an_export_scores_as_the_trainer_does_and_stays_as_it_was(job, tmp_path):
    job.train()
    samples = batch(7)
    (want,) = job.predict([samples])
    path = job.export()
    with job.import_() as infer:  # where export has written to
        assert (infer.path, infer.step) == (path, job.step_count)
        check(infer(samples), want)
        check(infer(Records.of(examples(samples), "example")), want)
        assert set(infer(samples, signature="clicks")) == {"click"}
        job.train()
        check(infer(samples), want)
        with pytest.raises(InvalidRequestError, match="feature 'user'"):
            infer({name: each for name, each in samples.items() if name != "user"})
    newer = job.export()
    with job.import_(path) as old, job.import_(str(tmp_path / "model" / "exports")) as new:
        assert (old.path, new.path) == (path, newer)
        check(old(samples), want)
        check(new(samples), next(job.predict([samples])))


def test_what_is_no_export_is_refused(job, tmp_path):
    with pytest.raises(CheckpointError, match="nothing is no version of an export, and has none"):
        job.import_(str(tmp_path / "nothing"))
    job.train()
    path = job.export(mode="distributed")
    with pytest.raises(InvalidRequestError, match="a distributed export needs to know where its serving replicas are"):
        job.import_(path)
    with everything(RunConfig(progress="none")) as other, pytest.raises(InvalidRequestError, match=r"import_\(DIR\)"):
        other.import_()
