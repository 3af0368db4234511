"""The job of `docs/recipes/movielens` as its user has it: in a directory of its own, in processes that are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

import trilith
from tests.programs import PATIENCE_S
from trilith_proto import hash_table_pb2
from trilith_services.local.supervisor import trilith_argv

__all__ = ["Job", "made_up_archive"]

RECIPE = Path(__file__).parents[2] / "docs" / "recipes" / "movielens"
TRIES = 20


def made_up_archive(path: Path, *, users: int = 80, films: int = 120, ratings: int = 100) -> Path:
    """Ratings in the layout of GroupLens' archive: users have tastes, films have kinds, and time goes on."""
    rng = np.random.default_rng(5)
    taste, kind = rng.normal(size=(users, 3)), rng.normal(size=(films, 3))
    lines = []
    for user in range(users):
        begin = 883_000_000 if user == users - 1 else 880_000_000  # the last one comes when training is over
        seconds = begin + np.sort(rng.integers(0, 3_000_000, ratings))
        for film, second in zip(rng.permutation(films)[:ratings], seconds, strict=True):
            liking = 3.5 + taste[user] @ kind[film] + rng.normal(scale=0.3)
            lines.append(f"{user + 1}\t{film + 1}\t{int(np.clip(round(liking), 1, 5))}\t{second}")
    people = [f"{user + 1}|{20 + user % 40}|{'MF'[user % 2]}|other|00000" for user in range(users)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ml-100k/u.data", "\n".join(lines) + "\n")
        archive.writestr("ml-100k/u.user", "\n".join(people) + "\n")
    return path


class Job:
    """A directory with the recipe's files and data.

    Args:
        directory: A new one.
        archive: What `data.py` reads.
    """

    def __init__(self, directory: Path, archive: Path) -> None:
        self.directory = directory
        shutil.copytree(RECIPE, directory, ignore=shutil.ignore_patterns("__pycache__"))
        self.python("data.py", str(archive))

    def run(self, argv: list[str], **environ: str) -> str:
        """Run a command in the directory to its end; returns what it has printed."""
        done = subprocess.run(
            argv,
            cwd=self.directory,
            check=False,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env=os.environ | environ,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def python(self, *words: str, **environ: str) -> str:
        """Run Python in the directory; returns what it has printed."""
        return self.run([sys.executable, *words], **environ)

    def trilith(self, *words: str, **settings: object) -> str:
        """Run a command of `trilith` with settings of the run; returns what it has printed."""
        return self.run(trilith_argv(*words, *_sets(settings)))

    def start(self, events: str, **settings: object) -> subprocess.Popen[bytes]:
        """Start a worker that says every step in a file of that name."""
        settings = {"events": events, "log_every_s": 1e-6, "progress": "none", "threads": 1, **settings}
        with (self.directory / "worker.log").open("ab") as log:
            argv = trilith_argv("worker", "ctr:job", *_sets(settings))
            return subprocess.Popen(argv, cwd=self.directory, stdout=log, stderr=log)

    def by_itself(self, **settings: object) -> str:
        """Run the job's file, which trains, evaluates and exports; returns what it has printed."""
        return self.python("ctr.py", **{f"TRILITH_RUN_{name.upper()}": str(value) for name, value in settings.items()})

    def train(self, events: str, **settings: object) -> None:
        """Train to the end."""
        process = self.start(events, **settings)
        try:
            assert process.wait(PATIENCE_S) == 0, self.log()
        finally:
            _kill(process)

    def kill_at(self, step: int, events: str, **settings: object) -> None:
        """Train until a step is done, and kill the worker at once, wherever it is then."""
        process = self.start(events, **settings)
        try:
            self._wait(process, lambda: self.step(events) >= step)
        finally:
            _kill(process)

    def kill_in_a_save(self, events: str, **settings: object) -> None:
        """Kill the worker while it writes a checkpoint; one that was faster is started again and tried again."""
        for _ in range(TRIES):
            model = self.directory / str(settings["model_dir"])
            process = self.start(events, **settings)
            try:
                known = _checkpoints(model)
                self._wait(process, lambda: _checkpoints(model) - known, every_s=0.0)  # noqa: B023
            finally:
                _kill(process)
            if any(not (model / name / "manifest.json").exists() for name in _checkpoints(model)):
                return
        raise AssertionError(f"{TRIES} saves were done before the worker could be killed")

    def _wait(self, process: subprocess.Popen[bytes], condition, *, every_s: float = 0.002) -> None:
        began = time.monotonic()
        while not condition():
            assert process.poll() is None, self.log()
            assert time.monotonic() - began < PATIENCE_S, self.log()
            time.sleep(every_s)

    def step(self, events: str) -> int:
        """The last step that was told; 0 before any."""
        return max((event["step"] for event in self.events(events) if event["event"] == "step"), default=0)

    def events(self, name: str) -> list[dict]:
        """What a worker has told, of all its lives."""
        path = self.directory / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def log(self) -> str:
        """What the workers have said."""
        return (self.directory / "worker.log").read_text()

    def learned(self, model_dir: str, cluster: str) -> dict[str, object]:
        """Everything that was learned: the newest checkpoint's dense part, and the cluster's rows with their state."""
        model = self.directory / model_dir
        newest = max(name for name in _checkpoints(model) if (model / name / "manifest.json").exists())
        found: dict[str, object] = {
            name: (model / newest / name).read_bytes()
            for name in ("job.dense.safetensors", "job.optimizer.safetensors")
        }
        ids = np.arange(2_000, dtype=np.uint64)
        with trilith.connect(cluster, timeout_s=PATIENCE_S) as client:
            found["step"] = client.global_step()
            for table in ("user", "item"):
                entries = client.lookup_entries(table, ids)
                rows = [hash_table_pb2.EntryDump.FromString(each) for each in entries]
                for row in rows:
                    row.ClearField("last_update_ts_sec")
                found[table] = [row.SerializeToString(deterministic=True) for row in rows]
        return found


def _sets(settings: dict[str, object]) -> list[str]:
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def _checkpoints(model: Path) -> set[str]:
    return {path.name for path in model.glob("ckpt-*")}


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait(120)
