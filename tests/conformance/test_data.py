"""Every group of data vectors of the golden copy, a test case each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conformance.data import data_failures

FOLDER = Path(__file__).parents[1] / "golden/conformance"
GROUPS = json.loads((FOLDER / "data.json").read_text())["vectors"]


@pytest.mark.parametrize("group", GROUPS)
def test_the_data_pipeline_reproduces(group):
    found = dict(data_failures({group: GROUPS[group]}, FOLDER))
    members = GROUPS[group] if isinstance(GROUPS[group], dict) else range(len(GROUPS[group]))
    assert set(found) == {f"{group}.{member}" for member in members}
    assert {name: failures for name, failures in found.items() if failures} == {}


def test_a_group_that_nothing_checks_is_a_failure():
    assert dict(data_failures({"teapots": [1, {}]}, FOLDER)) == {
        "teapots.0": ["nothing checks this group"],
        "teapots.1": ["nothing checks this group"],
    }


def test_a_check_that_raises_fails_every_member_and_no_other_group():
    found = dict(data_failures({"java_hash": [{"nonsense": 1}], "fid": {"notes": ""}}, FOLDER))
    assert found["java_hash.0"][0].startswith("KeyError")
    assert found["fid.notes"] == []
