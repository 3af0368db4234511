"""The benchmark program runs, and its JSON has the form that is promised; what it measures is not looked at."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FIGURES = {
    "data.read": ("higher", 0.5),
    "data.parse.instance": ("higher", 30.0),
    "data.parse.instance.fromstring": ("higher", 1.0),
    "data.parse.example": ("higher", 30.0),
    "data.parse.example.fromstring": ("higher", 1.0),
    "data.columnar.parquet": ("higher", 0.5),
    "data.columnar.csv": ("higher", 0.5),
    "data.pipeline.threads": ("higher", 0.85),
    "data.pipeline.memory": ("lower", 1.0),
    "demo.speed": ("higher", 0.8),
    "discovery.back": ("lower", 1.0),
    "engine.lookup.d8": ("higher", 0.5),
    "engine.lookup.d16": ("higher", 0.5),
    "engine.lookup.d64": ("higher", 0.5),
    "engine.adagrad.d16": ("higher", 0.25),
    "engine.adam.d16": ("higher", 0.2),
    "engine.threads.lookup": ("higher", 0.85),
    "engine.threads.apply": ("higher", 0.85),
    "engine.grow.stall": ("lower", 20),
    "engine.grow.bytes": ("lower", 1.35),
    "engine.stall.export": ("lower", 5.0),
    "ops.map_id": ("higher", 3),
    "ops.gather.d32": ("higher", 1),
    "ops.gather.d32.x2": ("higher", 1),
    "ops.gather.d256": ("higher", 1),
    "ops.gather.d256.x2": ("higher", 1),
    "ops.fused_reorder": ("higher", 3),
    "ops.layout.forward": ("higher", 3),
    "ops.layout.backward": ("higher", 3),
    "rpc.lookup.d16": ("higher", 0.45),
    "rpc.lookup.d16.socket": ("higher", None),
    "rpc.lookup.d16.x4": ("higher", 0.5),
    "rpc.apply.d16": ("higher", 0.36),
    "rpc.lookup.small": ("lower", 1.25),
    "rpc.lookup.zipf": ("higher", 0.35),
    "rpc.lookup.distinct": ("higher", 0.2),
    "rpc.step.zipf": ("higher", 0.14),
    "serving.predict": ("lower", 2.0),
    "serving.predict.p99": ("lower", 4.0),
    "sync.lag.p50": ("lower", 1.0),
    "sync.lag.p99": ("lower", 1.0),
    "sync.cost": ("lower", 3.0),
    "tables.step": ("higher", 0.12),
    "tables.many.create": ("lower", None),
    "tables.many.bytes": ("lower", 1.0),
    "train.deepfm": ("higher", 0.3),
    "train.deepfm.cpu": ("lower", None),
    "train.deepfm.pipelined": ("higher", 0.6),
    "train.deepfm.pipelined.cpu": ("lower", None),
    "train.estimator": ("higher", 0.95),
    "train.compile": ("higher", 0.9),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.timeout(1200)
def test_a_quick_run_measures_every_figure(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    done = run("--quick", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads(output.read_text())
    left_out = ["train.compile"] if shutil.which("g++") is None else []
    assert [entry["name"] for entry in entries] == [name for name in FIGURES if name not in left_out]
    assert [name for name in FIGURES if f"{name} is left out: " in " ".join(done.stdout.split())] == left_out
    for entry in entries:
        assert list(entry) == ["name", "value", "unit", "reference", "ratio", "target", "better"]
        assert (entry["better"], entry["target"]) == FIGURES[entry["name"]]
        assert entry["value"] > 0
        assert entry["reference"] > 0
        assert entry["ratio"] == pytest.approx(entry["value"] / entry["reference"])
        assert entry["name"] in done.stdout


def test_figures_are_chosen_by_prefix() -> None:
    listed = run("--list").stdout.split()
    assert listed == list(FIGURES)
    refused = run("engine.look")
    assert refused.returncode == 2
    assert "no such benchmark" in refused.stdout
