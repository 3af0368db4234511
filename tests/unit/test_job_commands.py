"""Jobs on the command line: new, worker, evaluate, predict and export of MODULE:JOB, its run, its data, its errors."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trilith
import trilith.data
from tests.waiting import eventually
from trilith.checkpoint import newest_complete
from trilith.data import Records
from trilith.errors import InvalidRequestError
from trilith.estimator import Embedding, Estimator, Label, RunConfig, Task
from trilith.serving.exports import list_versions
from trilith_services import exporting
from trilith_services.cli import main
from trilith_services.commands.jobs import DataFlags, find_job
from trilith_services.local.supervisor import trilith_argv


class Tiny(Task):
    user = Embedding(dim=2, bias=True)
    labels = {"click": Label()}  # noqa: RUF012 - as a user writes it

    def forward(self, x):
        return x.user.bias + x.user.vector.sum(1)


MODULE = """
from tests.unit.test_job_commands import Tiny
from trilith.estimator import Estimator, RunConfig

def batches(count=4):
    for start in range(count):
        yield {"user": [start, start + 1], "click": [0.0, 1.0]}

job = Estimator(Tiny(), RunConfig(progress="none", model_dir="model"), train=batches, evaluate=batches)

def make():
    return Estimator(Tiny(), RunConfig(progress="none"), train=batches)

def other():
    return {}

def needs(size):
    return job

class Holder:
    inner = job
"""


@pytest.fixture
def name(tmp_path, monkeypatch):
    """The name of a module in the current directory, of its own, as modules stay imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"shop_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    pq.write_table(pa.table({"user": [1, 2, 3], "label": [1.0, 0.0, 1.0]}), tmp_path / "users.parquet")
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def run(capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


# ---- finding a job -------------------------------------------------------------------------------------------------


def test_a_job_is_an_estimator_or_a_function_that_returns_one(name):
    assert isinstance(find_job(f"{name}:job"), Estimator)
    assert find_job(f"{name}:make") is not find_job(f"{name}:make")
    assert find_job(f"{name}:Holder.inner") is find_job(f"{name}:job")


@pytest.mark.parametrize(
    ("job", "error"),
    [
        ("{}", r"'shop\w*' is not MODULE:JOB, such as my_shop.ctr:job"),
        ("s3://models:job", r"'s3://models:job' is not MODULE:JOB"),
        ("nowhere:job", r"no module 'nowhere' in /.* or the Python path$"),
        ("{}s:job", r"no module 'shop\w*' in .*; do you mean 'shop\w*'\?"),
        ("{}:jbo", r"shop\w* has no 'jbo'; do you mean 'job'\?"),
        ("{}:trainer", r"shop\w* has no 'trainer'; its estimators are job"),
        ("{}:Tiny", r"shop\w*:Tiny is the class Tiny, not a trilith.estimator.Estimator"),
        ("{}:other", r"shop\w*:other\(\) returned a dict, not a trilith.estimator.Estimator"),
        ("{}:needs", r"shop\w*:needs\(\) cannot be called without arguments: .*'size'"),
        ("{}:Holder.outer", r"shop\w*.Holder has no 'outer'"),
    ],
)
def test_what_is_no_job_is_refused_in_one_line(name, job, error):
    with pytest.raises(InvalidRequestError, match=error) as raised:
        find_job(job.format(name))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said", "shown"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero", ", line 1, in <module>"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named", ", line 1, in <module>"),
        ("def f(:", "SyntaxError: invalid syntax", "def f(:"),
        ("import sys; sys.exit(3)", "SystemExit: exit status 3", "SystemExit: 3"),
        ("from trilith.estimator import RunConfig; RunConfig(epoch=3)", "do you mean 'epochs'?", "<module>"),
    ],
)
def test_an_exception_in_a_users_module_is_shown_with_its_own_traceback(name, run, text, said, shown):
    Path(f"{name}_bad.py").write_text(text + "\n")
    status, _, err = run("evaluate", f"{name}_bad:job")
    *traceback, last = err.splitlines()
    assert status == 2
    assert last.startswith(f"error: importing {name}_bad: ")
    assert said in last
    assert shown in err
    assert "importlib" not in "\n".join(traceback)
    assert "commands/jobs.py" not in err


# ---- the run and the data ------------------------------------------------------------------------------------------


def test_flags_go_over_the_file_over_the_code(name, run, monkeypatch):
    seen = []
    monkeypatch.setattr(Estimator, "train", lambda job, data=None: seen.append((job.run, data)) or {"loss": 0.5})
    Path("run.toml").write_text("epochs = 2\nseed = 7\n")
    status, out, _ = run("worker", f"{name}:job", "--config", "run.toml", "--set", "epochs=3", "--set", "prefetch=1")
    assert (status, out) == (0, "worker: loss=0.5\n")
    ((found, data),) = seen
    assert (found.epochs, found.seed, found.prefetch, found.model_dir, data) == (3, 7, 1, "model", None)


def test_an_open_estimator_keeps_its_run():
    with Estimator(Tiny(), RunConfig(progress="none")) as job, pytest.raises(InvalidRequestError, match="is open"):
        job.configure(RunConfig(epochs=2))
    assert job.configure(RunConfig(epochs=2)).run.epochs == 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ("worker", "--cluster", "static://a:1"),
            "No such option: --cluster; what a run of MODULE:JOB does is said by --set, as --set cluster=VALUE; see",
        ),
        (("worker", "{}:job", "--state", "f"), "No such option: --state (Possible options: --data, --set); see"),
        (("worker", "--set", "epochs=3"), "Missing argument 'MODULE:JOB': An Estimator, or a function that returns"),
        (("evaluate", "{}:job", "--timeout", "3"), "No such option: --timeout; what a run of MODULE:JOB does is said"),
        (
            ("evaluate", "--set", "epochs=3"),
            "Missing argument 'MODULE:JOB': An Estimator, or a function that returns one, in a module of the current",
        ),
        (("worker", "{}:job", "--set", "epoch=3"), "--set epoch=3: a run has no 'epoch'; do you mean 'epochs'?"),
        (("up", "--set", "epochs=3"), "--set is for a job of yours: name it, as MODULE:JOB"),
        (("up", "--job", "{}:jbo"), "{} has no 'jbo'; do you mean 'job'?"),
        (("up", "--job", "{}:job", "--workers", "0"), "--job {}:job, but no workers are started: leave out"),
        (("up", "--job", "{}:job", "--set", "rank=1"), "--set rank=1: whoever starts all workers decides that"),
        (("up", "--job", "{}:job", "--checkpoint-dir", "d"), "a job saves into its model_dir: write --set model_dir=d"),
        (("worker", "{}:job", "--set", "epochs"), "--set epochs: write name=value"),
        (("worker", "{}:job", "--config", "none.toml"), "--config none.toml: No such file or directory"),
        (("worker", "{}:job", "--data", "none-*.pb"), "--data none-*.pb: there is no such file"),
        (
            ("export", "model/ckpt-1", "out"),
            "'model/ckpt-1' is not MODULE:JOB, such as my_shop.ctr:job; if it is a checkpoint, write trilith export ",
        ),
        (("export", "{}:job", "out", "--checkpoint", "nowhere"), "{here}/nowhere: no manifest.json: nothing is there"),
        (("export", "{}:job", "out", "--keep", "0"), "--keep: it should be greater than or equal to 1, not '0'"),
        (("export", "{}:job", "out"), "nothing is trained: rows are in this process (cluster='local://'), and model_"),
        (("evaluate", "{}:make"), "nothing is trained: rows are in this process (cluster='local://'), and the run"),
        (("evaluate", "{}:job"), "nothing is trained: rows are in this process (cluster='local://'), and model_dir="),
        (
            ("predict", "{}:job", "--data", "users.parquet", "--output", "a.csv"),
            "--output a.csv: it must end in .parquet or .jsonl, or be -",
        ),
        (
            ("predict", "{}:job", "--data", "users.parquet", "--output", "no/a.jsonl"),
            "--output no/a.jsonl: there is no directory no",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_is_one_line_and_status_2(name, run, arguments, error):
    status, _, err = run(*(each.format(name) for each in arguments))
    assert status == 2
    assert err.splitlines()[-1].startswith(f"error: {error.format(name, here=Path.cwd())}")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("kafka://", "write kafka://TOPIC"),
        ("kafka://clicks/more", "write kafka://TOPIC"),
        ("kafka://clicks?server=a:1", "'server' is none of servers, group_id, stream_timeout, offset, unframe"),
        ("kafka://clicks?stream_timeout=soon", "is no number of milliseconds"),
        ("kafka://clicks?offset=7", "offset='7' is neither 'earliest' nor 'latest'"),
        ("kafka://clicks?unframe=no", "unframe='no' is neither 'true' nor 'false'"),
    ],
)
def test_a_wrong_topic_is_refused(data, said):
    with pytest.raises(InvalidRequestError, match=said):
        DataFlags().read(data, 2)


def test_topics_are_read_with_their_options(monkeypatch):
    seen = {}

    class Batched:
        def batch(self, size):
            seen["size"] = size

    def read_kafka(topics, **options):
        seen.update(topics=topics, **options)
        return Batched()

    monkeypatch.setattr("trilith.data.pipeline.dataset.read_kafka", read_kafka)
    DataFlags(kind="example").read("kafka://Clicks,more?servers=a:1,b:2&group_id=g&stream_timeout=50", 8)
    assert seen == {
        "topics": ["Clicks", "more"], "servers": "a:1,b:2", "group_id": "g", "stream_timeout": 50, "kind": "example",
        "size": 8,
    }  # fmt: skip


def test_a_job_is_trained_evaluated_predicted_and_exported(name, run):
    assert run("worker", f"{name}:job", "--data", "users.parquet", "--batch-size", "2", "--set", "epochs=2")[0] == 0
    sys.modules.pop(name)
    status, out, _ = run("evaluate", f"{name}:job", "--data", "user*.parquet", "--json")
    assert status == 0
    assert set(json.loads(out)) == {"loss"}
    for to in ("scores.parquet", "scores.jsonl", "-"):
        sys.modules.pop(name)
        status, out, err = run("predict", f"{name}:job", "--data", "users.parquet", "--output", to)
        assert (status, err.splitlines()[-1].partition(" to ")[0]) == (0, "predict: 3 samples")
    lines = [json.loads(line)["click"] for line in out.splitlines()]
    assert pq.read_table("scores.parquet")["click"].to_pylist() == lines
    assert Path("scores.jsonl").read_text() == out
    assert sorted(path.name for path in Path().glob(".scores*")) == []
    sys.modules.pop(name)
    status, out, _ = run("export", f"{name}:job", "exports", "--mode", "standalone", "--json")
    assert status == 0
    done = json.loads(out)
    assert Path(done["path"]).is_dir()
    assert (Path(done["path"]).name, done["step"]) == (str(done["version"]), 4)
    sys.modules.pop(name)
    status, out, _ = run("export", f"{name}:job", "exports", "--checkpoint", "model", "--dense-only", "--keep", "1")
    version = int(re.fullmatch(r"export: version=(\d+) step=4 path=.*/entry/\1\n", out)[1])
    assert (status, list_versions("exports/entry"), list(Path("exports").glob("ps_*"))) == (0, [version], [])


def test_a_worker_that_leaves_the_export_to_the_chief_says_nothing_of_it(name, run, monkeypatch):
    assert run("worker", f"{name}:job")[0] == 0
    sys.modules.pop(name)
    monkeypatch.setattr(Estimator, "chief", False)
    monkeypatch.setattr(Estimator, "export", lambda *_, **__: "")
    assert run("export", f"{name}:job", "exports")[:2] == (0, "")


def test_whoever_exports_a_path_is_told_the_whole_command(run):
    told = run("export", "model/ckpt-1", "out")[2]
    assert told.endswith(
        " write trilith export MODULE:JOB DIR --checkpoint model/ckpt-1, with trilith_services.demo.job:deepfm for the "
        "demo's\n"
    )


def test_an_export_that_sigterm_ends_leaves_nothing_of_its_version(name, run, monkeypatch):
    assert run("worker", f"{name}:job")[0] == 0
    sys.modules.pop(name)
    write = exporting.write_serving_rows

    def asked_to_end(*arguments: Any, **options: Any) -> int:
        rows = write(*arguments, **options)
        signal.raise_signal(signal.SIGTERM)
        return rows

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as ending:
        ending.setattr(exporting, "write_serving_rows", asked_to_end)
        assert run("export", f"{name}:job", "exports")[0] == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert sorted(path.name for path in Path("exports").rglob("*")) == ["entry", "ps_0"]


def test_a_prediction_that_fails_leaves_no_file(name, run):
    assert run("worker", f"{name}:job")[0] == 0
    sys.modules.pop(name)
    pq.write_table(pa.table({"user": [0.5]}), "halves.parquet")
    status, _, err = run("predict", f"{name}:job", "--data", "halves.parquet", "--output", "scores.parquet")
    assert status == 2
    assert "user" in err.splitlines()[-1]
    assert list(Path().glob("*scores*")) == []


# ---- processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """What `trilith new` has written."""
    directory = tmp_path_factory.mktemp("new") / "clicks"
    done = subprocess.run(trilith_argv("new", str(directory)), check=True, capture_output=True, text=True, timeout=120)
    assert "trilith worker job:job" in done.stdout
    return directory


def test_a_new_job_passes_its_test(job):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=job, check=False, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.fixture(scope="module")
def trained(job):
    """The same, trained by its own file; what that has printed."""
    done = subprocess.run(
        [sys.executable, "job.py"], cwd=job, check=False, capture_output=True, text=True, timeout=240,
        env=os.environ | {"TRILITH_RUN_EPOCHS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_new_job_runs_by_itself_and_scores_what_comes_through_a_pipe(job, trained):
    assert "click/auc" in trained
    assert newest_complete(str(job / "model")) is not None
    with trilith.data.open_writer(job / "some.pb") as out:
        out.write(next(iter(trilith.data.read(job / "valid.parquet").batch(10))))
    with (job / "some.pb").open("rb") as records:
        done = subprocess.run(
            trilith_argv("predict", "job:job", "--data", "-", "--kind", "example", "--output", "-"),
            cwd=job, check=False, stdin=records, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = [json.loads(line)["click"] for line in done.stdout.splitlines()]
    assert len(scores) == 10
    assert all(0 < score < 1 for score in scores)


def test_sigterm_ends_a_worker_with_a_save_and_status_0(job, tmp_path):
    events, model = tmp_path / "events.jsonl", tmp_path / "model"
    sets = [f"model_dir={model}", f"events={events}", "epochs=100000", "save_every=0", "log_every_s=0.01"]
    argv = trilith_argv("worker", "job:job", *(word for each in sets for word in ("--set", each)))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(argv, cwd=job, stdout=log, stderr=log)
    try:
        eventually(lambda: events.exists() and '"event": "step"' in events.read_text(), timeout_s=120)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
    told = [json.loads(line) for line in events.read_text().splitlines()]
    assert told[-1]["event"] == "stopped"
    assert newest_complete(str(model)) is not None


def test_a_new_job_is_written_into_an_empty_directory_only(job, run):
    before = (job / "job.py").stat().st_mtime_ns
    status, _, err = run("new", str(job))
    assert status == 2
    assert err == f"error: {job} is not empty; a job is written into a new or empty directory\n"
    assert (job / "job.py").stat().st_mtime_ns == before
    assert run("new", str(job / "job.py"))[2].startswith(f"error: {job}/job.py is a file")


COUNTING = """
from trilith.estimator import Embedding, Estimator, Label, RunConfig, Task
from trilith.tables import Sgd, Zeros

class Count(Task):
    user = Embedding(dim=1, optimizer=Sgd(learning_rate=1.0), initializer=Zeros())
    labels = {"click": Label()}

    def forward(self, x):
        return x.user.vector[:, 0]

    def loss(self, outputs, labels, weight):
        return outputs["click"].sum()  # each time that a user is seen takes 1 from its row

job = Estimator(Count(), RunConfig(progress="none", model_dir="model", save_every=1), train=list)
"""
USERS = 12


@pytest.fixture
def counting(name, tmp_path):
    """A job whose rows say how often each user was seen."""
    (tmp_path / f"{name}.py").write_text(COUNTING)
    return name


def users() -> pa.Table:
    return pa.table({"user": range(USERS), "label": [float(n % 2) for n in range(USERS)]})


def seen() -> list[float]:
    with trilith.connect("local://") as client:
        client.restore(newest_complete("model").path)
        return (-client.table("user").lookup(range(USERS))[:, 0]).tolist()


def test_a_worker_reads_files_by_a_pattern_and_goes_on_where_it_saved(counting, run):
    for part in range(3):
        pq.write_table(users().slice(part * 4, 4), f"part-{part}.parquet")
    data = ("--data", "part-*.parquet", "--batch-size", "2")
    for steps in (3, 6):
        status, _, shown = run("worker", f"{counting}:job", *data, "--set", f"steps={steps}")
        assert status == 0, shown
        assert seen() == [float(n < 2 * steps) for n in range(USERS)]
    status, shown, error = run("evaluate", f"{counting}:job", *data, "--json")
    assert status == 0, error
    assert json.loads(shown)["loss"] == -2.0
    status, shown, _ = run("predict", f"{counting}:job", *data, "--output", "-")
    assert len(shown.splitlines()) == USERS


def test_a_worker_reads_a_topic_and_goes_on_where_it_saved(counting, run):
    kafka = pytest.importorskip("confluent_kafka")
    producer = kafka.Producer({"test.mock.num.brokers": 1, "logger": logging.getLogger("mock")})
    (broker,) = producer.list_topics(timeout=60).brokers.values()
    for payload in trilith.data.from_arrow(users()):
        producer.produce("clicks", payload, partition=0)
    assert producer.flush(60) == 0
    url = f"kafka://clicks?servers={broker.host}:{broker.port}&group_id=trainer&offset=earliest&unframe=false"
    for steps in (3, 6):
        data = ("--data", url, "--kind", "example", "--batch-size", "2", "--set", f"steps={steps}")
        status, _, shown = run("worker", f"{counting}:job", *data)
        assert status == 0, shown
        assert seen() == [float(n < 2 * steps) for n in range(USERS)]


def test_a_worker_reads_standard_input_and_goes_on_where_it_saved(counting, tmp_path):
    with trilith.data.open_writer("users.pb") as out:
        out.write(Records.of(list(trilith.data.from_arrow(users())), "example"))
    for steps in (3, 6):
        command = trilith_argv("worker", f"{counting}:job", "--data", "-", "--kind", "example", "--batch-size", "2")
        with open("users.pb", "rb") as piped:
            done = subprocess.run(
                [*command, "--set", f"steps={steps}"],
                stdin=piped,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
        assert done.returncode == 0, done.stderr
        assert seen() == [float(n < 2 * steps) for n in range(USERS)]
