"""A wrong expectation is noticed, whatever the kind or group of the vector: nothing passes unchecked."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.data import data_failures
from tests.conformance.runner import failures_of

FOLDER = Path(__file__).parents[1] / "golden/conformance"
ENGINE = json.loads((FOLDER / "engine.json").read_text())
GROUPS = json.loads((FOLDER / "data.json").read_text())["vectors"]

# What data vectors call the things that they expect.
EXPECTED = {
    *("basenames", "data_source_key", "data_source_keys", "expected", "expected_hex", "expected_keys", "found"),
    *("good_records", "has_variant", "hash", "hex", "item_ids_as_set", "keep", "mask", "merged_item_ids_as_set", "n"),
    *("n_records", "nrows", "offsets", "output", "path", "payload_hex", "replicas", "result", "results", "returns"),
    *("slots", "split_item_ids", "surviving_uids", "tasks", "value_rowids"),
}
# What there is beside or below them and is something else.
GIVEN = {"kwargs", "missing", "note"}
# Their files are no part of the golden copy: such are written from what is expected.
WRITTEN = {"item_pool", "file_sharding"}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if not isinstance(value, (dict, list)):
        yield path, value
        return
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(each, (*path, key))


def changed(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case None:
            return 7
        case str():
            return f"{value}00"
        case _:
            return value + 1 if abs(value) < 1e30 else 0.0


def with_another(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    made = copy.deepcopy(content)
    holder = made
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return made


def one_of_each_form(content: Any) -> dict[tuple[Any, ...], tuple[tuple[Any, ...], Any]]:
    """A leaf of each path, whatever the numbers in it."""
    found: dict[tuple[Any, ...], tuple[tuple[Any, ...], Any]] = {}
    for path, value in leaves(content):
        found.setdefault(tuple("#" if isinstance(key, int) else key for key in path), (path, value))
    return found


@pytest.mark.parametrize("kind", sorted({vector["kind"] for vector in ENGINE}))
def test_a_wrong_engine_vector_fails(kind):
    vector = next(each for each in ENGINE if each["kind"] == kind and not each.get("slow"))
    for label, expected in vector["expected"].items():
        for bound, by in (("min", 1e9), ("max", -1e9)):
            if bound in expected:
                wrong = {**expected, bound: expected[bound] + by}
                assert failures_of({**vector, "expected": {label: wrong}})
        for path, value in list(leaves(expected.get("value", {})))[:1]:
            far = (
                changed(value)
                if isinstance(value, (bool, str, type(None)))
                else value + 1 + 2 * expected.get("abs_tol", 0)
            )
            wrong = with_another(expected, ("value", *path), far)
            assert failures_of({**vector, "expected": {label: wrong}}), f"{label}: {far} passes"


@pytest.mark.parametrize("group", sorted(GROUPS.keys() - WRITTEN))
def test_a_wrong_data_vector_fails(group):
    missed = []
    for path, value in one_of_each_form(GROUPS[group]).values():
        if EXPECTED.isdisjoint(path) or not GIVEN.isdisjoint(path):
            continue
        wrong = with_another(GROUPS[group], path, changed(value))
        if not any(failures for _, failures in data_failures({group: wrong}, FOLDER)):
            missed.append((path, value))
    assert missed == []


def objects(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all members."""
    if isinstance(value, (dict, list)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from objects(each, (*path, key))


def without(content: Any, path: tuple[Any, ...]) -> Any:
    made = copy.deepcopy(content)
    holder = made
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return made


@pytest.mark.parametrize("group", sorted(GROUPS.keys() - WRITTEN))
def test_what_a_vector_leaves_out_is_not_expected(group):
    forms = {tuple("#" if isinstance(key, int) else key for key in path): path for path in objects(GROUPS[group])}
    for path in forms.values():
        if path[-1] not in EXPECTED | {"item_ids", "expanded"}:
            continue
        left = without(GROUPS[group], path)
        failures = {name: wrong for name, wrong in data_failures({group: left}, FOLDER) if wrong}
        assert failures == {}, path


def test_what_is_left_is_checked():
    (case, *_) = GROUPS["dataset_input_patterns"]
    left = without([case], (0, "item_ids"))
    assert [wrong for _, wrong in data_failures({"dataset_input_patterns": left}, FOLDER)] == [[]]
    wrong = with_another(left, (0, "expanded"), ["elsewhere"])
    assert all(failures for _, failures in data_failures({"dataset_input_patterns": wrong}, FOLDER))


def test_a_member_that_nothing_checks_is_a_failure():
    assert dict(data_failures({"fid": {"make_v3": [], "note": "", "quirk_x": []}}, FOLDER)) == {
        "fid.make_v3": ["nothing checks this member"],
        "fid.note": [],
        "fid.quirk_x": [],
    }
