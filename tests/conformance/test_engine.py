"""Every engine vector of the golden copy, a test case each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conformance.__main__ import main
from tests.conformance.compare import mismatch
from tests.conformance.runner import failures_of
from trilith.ops.jit import JIT_DISABLED

VECTORS = json.loads((Path(__file__).parents[1] / "golden/conformance/engine.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_the_engine_reproduces(vector):
    if vector.get("slow") and JIT_DISABLED:
        pytest.skip("a million ids through plain Python")
    assert failures_of(vector) == []


def test_a_vector_that_cannot_run_is_a_failure():
    assert failures_of({"kind": "teapot", "steps": [], "expected": {}})
    assert failures_of({"kind": "linalg", "steps": [{"op": "brew", "out": "x"}], "expected": {"x": {"value": 1}}})
    assert failures_of({"kind": "linalg", "steps": [], "expected": {"x": {"value": 1}}})


def test_a_step_that_must_raise_and_does_not_is_a_failure():
    steps = [{"op": "validate", "basename": "a", "files": ["a-00000-of-00001"], "error": True, "out": "raised"}]
    assert failures_of({"kind": "files", "steps": steps, "expected": {"raised": {"value": True, "exact": True}}})


@pytest.mark.parametrize(
    ("got", "expected", "fine"),
    [
        (1.0, {"value": 1, "abs_tol": 0}, True),
        (1.0 + 1e-9, {"value": 1, "abs_tol": 0}, True),
        (1.0 + 1e-6, {"value": 1, "abs_tol": 0}, False),
        (1.01, {"value": 1.0, "rel_tol": 0.02}, True),
        (1.03, {"value": 1.0, "rel_tol": 0.02}, False),
        (1.029, {"value": 1.0, "rel_tol": 0.02, "abs_tol": 0.01}, True),
        (float("nan"), {"value": 1.0, "abs_tol": 1e6}, False),
        (float("nan"), {"value": "nan", "abs_tol": 0}, True),
        (float("nan"), {"max": 1.0}, False),
        (0.5, {"min": 0.1, "max": 0.5}, True),
        (0.05, {"min": 0.1, "max": 0.5}, False),
        ([1, [2]], {"value": [1, [2]], "exact": True}, True),
        ([1, [2, 3]], {"value": [1, [2]], "exact": True}, False),
        (None, {"value": 0.0, "abs_tol": 1}, False),
        ([None], {"value": [None], "exact": True}, True),
        (True, {"value": 1, "exact": True}, False),
        ({"a": 1, "b": 2}, {"value": {"a": 1}, "exact": True}, False),
    ],
)
def test_values_compare_as_the_format_says(got, expected, fine):
    assert (mismatch(got, expected) is None) == fine


def test_the_command_counts_and_says_by_its_status(tmp_path, capsys):
    vectors = [
        {"name": "good", "kind": "linalg", "config": {}, "steps": [], "expected": {}},
        {"name": "bad", "kind": "linalg", "config": {}, "steps": [{"op": "x"}], "expected": {}},
    ]
    file = tmp_path / "v.json"
    file.write_text(json.dumps(vectors))
    assert main(["engine", str(file)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["FAIL bad", "1 passed, 1 failed"]
    assert main(["engine", str(file), "--only", "good"]) == 0


def test_parts_that_are_not_built_fail_every_vector(tmp_path, capsys):
    file = tmp_path / "v.json"
    file.write_text(json.dumps({"meta": {}, "vectors": {"a": [1, 2], "b": {"c": {}}}}))
    assert main(["data", str(file)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 3 failed"
    file.write_text(json.dumps([{"op": "split", "inputs": {}, "expected": {}}]))
    assert main(["worker_ops", str(file)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 1 failed"
