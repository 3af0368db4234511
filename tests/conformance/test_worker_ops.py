"""Every worker vector of the golden copy, and the specification's examples in the same form, a test case each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conformance.worker_ops import worker_vector_failures

GOLDEN = Path(__file__).parents[1] / "golden/conformance"
VECTORS = [
    (f"{each['op']}.{name}{number}", each)
    for name, file in (("", "worker_ops.json"), ("example", "worker_examples.json"))
    for number, each in enumerate(json.loads((GOLDEN / file).read_text()))
]


@pytest.mark.parametrize("vector", [pytest.param(each, id=name) for name, each in VECTORS])
def test_the_worker_reproduces(vector):
    assert worker_vector_failures(vector) == []


def test_a_vector_that_cannot_run_or_raises_for_nothing_is_a_failure():
    assert worker_vector_failures({"op": "teapot", "inputs": {}, "expected": []})
    assert worker_vector_failures({"op": "fused_value_rowids", "inputs": {"row_splits": [0, 1]}, "expected": [1]})
    assert worker_vector_failures({"op": "fused_value_rowids", "inputs": {"row_splits": [1]}, "expected": [0]})
    fine = {"op": "fused_value_rowids", "inputs": {"row_splits": [0, 1]}, "expected": {"raises": True}}
    assert worker_vector_failures(fine)
