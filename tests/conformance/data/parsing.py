"""Vectors of parsing: Instances, Examples, ExampleBatches, ragged arrays, fids spread over shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trilith.data.names import SlotNames
from trilith.data.parse import (
    parse_example_batch,
    parse_example_batch_list,
    parse_examples,
    parse_instances,
    parse_instances_legacy,
    parse_instances_raw,
)
from trilith.data.ragged import Ragged, contract, expand
from trilith.data.records import Records
from trilith.data.sharding import ShardingConfig, shard_fids
from trilith.errors import TrilithError

if TYPE_CHECKING:
    from tests.conformance.data import Check

__all__ = ["GROUPS"]

Found = Iterator[tuple[str, list[str]]]


def _payloads(case: dict[str, Any]) -> list[bytes]:
    serialized = case["serialized_hex"]
    return [bytes.fromhex(each) for each in ([serialized] if isinstance(serialized, str) else serialized)]


def _arguments(case: dict[str, Any]) -> dict[str, Any]:
    """The request of a case as keyword arguments."""
    dense, extra = case.get("dense_features", []), case.get("extra_features", [])
    arguments: dict[str, Any] = {
        "dense_features": [name for name, _, _ in dense],
        "dense_feature_shapes": [dim for _, dim, _ in dense],
        "dense_feature_types": [dtype for _, _, dtype in dense],
        "extra_features": [name for name, _ in extra],
        "extra_feature_shapes": [dim for _, dim in extra],
    }
    for name in ("fidv1_features", "fidv2_features", "sparse_features"):
        if name in case:
            arguments[name] = case[name]
    return arguments


def _text(values: Any) -> Any:
    return [_text(each) for each in values] if isinstance(values, list) else values.encode()


def differences(name: str, got: Any, want: Any) -> list[str]:
    """How one output differs from what a vector says."""
    if want["kind"] == "ragged":
        if not isinstance(got, Ragged):
            return [f"{name}: {type(got).__name__} instead of a ragged array"]
        pairs = (("values", got.values), ("row_splits", got.row_splits))
        return [
            f"{name}.{part}: {array.tolist()} != {want[part]}" for part, array in pairs if array.tolist() != want[part]
        ]
    if not isinstance(got, np.ndarray) or list(got.shape) != want["shape"]:
        return [f"{name}: shape {getattr(got, 'shape', None)} instead of {want['shape']}"]
    if want["dtype"] == "string":
        return [] if got.tolist() == _text(want["values"]) else [f"{name}: {got.tolist()} != {want['values']}"]
    if got.dtype != want["dtype"]:
        return [f"{name}: dtype {got.dtype} instead of {want['dtype']}"]
    if want["dtype"] == "int64":
        return [] if got.tolist() == want["values"] else [f"{name}: {got.tolist()} != {want['values']}"]
    close = np.allclose(got, np.array(want["values"], np.float32), rtol=1e-6, atol=0, equal_nan=True)
    return [] if close else [f"{name}: {got.tolist()} != {want['values']}"]


def _compare(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    missing = [f"{name} is missing" for name in want if name not in got]
    unasked = [f"{name} was not asked for" for name in got if name not in want]
    return missing + unasked + [f for name in want if name in got for f in differences(name, got[name], want[name])]


def _cases(cases: list[dict[str, Any]], parse: Callable[[dict[str, Any]], dict[str, Any]]) -> list[str]:
    return [
        f"{case.get('id', number)}: {f}"
        for number, case in enumerate(cases)
        for f in _compare(parse(case), case["expected"])
    ]


def _refused(case: dict[str, Any], run: Callable[[], object]) -> list[str]:
    try:
        run()
    except TrilithError:
        return []
    return [f"{case['id']}: nothing was raised, expected {case['error']!r}"]


def _others(content: dict[str, Any], *checked: str) -> Found:
    """Members of a group that hold no check of their own."""
    for name in content:
        if name not in checked:
            yield name, []


def _names(case: dict[str, Any]) -> SlotNames:
    return SlotNames(tob=bool(case.get("tob_env", False)))


def _raw(case: dict[str, Any]) -> list[Any]:
    return parse_instances_raw(
        _payloads(case),
        fidv1_features=case.get("fidv1_features", ()),
        fidv2_features=case.get("fidv2_features", ()),
        fid_output_type="CONCAT",
    )


def _instances(content: dict[str, Any], folder: Path) -> Found:
    def parse(case: dict[str, Any]) -> dict[str, Any]:
        return parse_instances(_payloads(case), names=_names(case), **_arguments(case))

    yield "cases", _cases(content.get("cases", []), parse)
    failures = []
    for case in content.get("errors", []):
        run = (lambda case=case: _raw(case)) if case.get("op") == "raw_concat" else (lambda case=case: parse(case))
        failures += _refused(case, run)
    yield "errors", failures
    failures = []
    for case in content.get("raw_concat", []):
        offsets, values = _raw(case)
        for name, got in (("offsets", offsets), ("values", values)):
            if got.tolist() != case[name]:
                failures.append(f"{name}: {got.tolist()} != {case[name]}")
    yield "raw_concat", failures
    case = content.get("tob_names")
    if case is not None:
        keys = list(parse(case))
        yield "tob_names", [] if keys == case["expected_keys"] else [f"{keys} != {case['expected_keys']}"]
    yield from _others(content, "cases", "errors", "raw_concat", "tob_names")


def _legacy(content: dict[str, Any], folder: Path) -> Found:
    got = parse_instances_legacy(_payloads(content), fidv1_features=content["fidv1_features"])
    failures = []
    for name, want in content["expected"].items():
        value = got.get(name)
        expected = np.array(want)
        if value is None or value.shape != expected.shape or not np.allclose(value, expected, rtol=1e-6):
            failures.append(f"{name}: {value} != {want}")
    yield "expected", failures
    yield from _others(content, "expected")


def _examples(content: dict[str, Any], folder: Path) -> Found:
    def parse(case: dict[str, Any]) -> dict[str, Any]:
        return parse_examples(_payloads(case), **_arguments(case))

    yield "cases", _cases(content.get("cases", []), parse)
    yield "errors", [f for case in content.get("errors", []) for f in _refused(case, lambda case=case: parse(case))]  # type: ignore[misc]
    yield from _others(content, "cases", "errors")


def _example_batch(content: dict[str, Any], folder: Path) -> Found:
    def parse(case: dict[str, Any]) -> dict[str, Any]:
        return parse_example_batch(_payloads(case)[0], **_arguments(case))

    yield "cases", _cases(content.get("cases", []), parse)
    yield "errors", [f for case in content.get("errors", []) for f in _refused(case, lambda case=case: parse(case))]  # type: ignore[misc]
    yield from _others(content, "cases", "errors")


def _example_batch_list(content: dict[str, Any], folder: Path) -> Found:
    got = parse_example_batch_list(
        [bytes.fromhex(each) for each in content["inputs_hex"]],
        names=content["names"],
        shapes=content["shapes"],
        dtypes=content["dtypes"],
        extra_features=content.get("extra_features", ()),
        label_config=content.get("label_config", ""),
        positive_label=content.get("positive_label", 1.0),
        negative_label=content.get("negative_label", 0.0),
    )
    yield "expected", _compare(got, content["expected"])
    yield from _others(content, "expected")


def _ragged(content: dict[str, Any], folder: Path) -> Found:
    splits = np.array(content["row_splits"], np.int64)
    features = {"r": Ragged(np.array(content["values"], np.int64), splits), "other": np.ones(2)}
    parts = expand(features, value_rowids=True)
    for name in ("values", "row_splits", "nrows", "value_rowids"):
        if name in content:
            got = np.asarray(parts["r"][name]).tolist()
            yield name, [] if got == content[name] else [f"{got} != {content[name]}"]
    kept = parts["other"] is features["other"]
    back = contract(parts)
    same = kept and back["r"].tolist() == features["r"].tolist() and back["other"] is features["other"]
    yield "passthrough_key_kept", [] if same == content.get("passthrough_key_kept", True) else [f"{same}"]
    yield from _others(content, "values", "row_splits", "nrows", "value_rowids", "passthrough_key_kept")


def _flat(value: Any) -> Any:
    """Arrays and numbers as lists of unsigned integers: a fid is written with or without its sign."""
    if isinstance(value, dict):
        return {key: _flat(each) for key, each in value.items()}
    values = value.reshape(-1).tolist() if isinstance(value, np.ndarray) else value
    return [int(each) % 2**64 for each in (values if isinstance(values, list) else [values])]


def _sharding(content: dict[str, Any], folder: Path) -> Found:
    failures = []
    for number, case in enumerate(content["cases"]):
        tables = {name: (each["table"], each["slice_dims"]) for name, each in case["feature_cfgs"].items()}
        config = ShardingConfig(
            features=tables,
            ps_num=case["ps_num"],
            unique=case["unique"],
            version=case.get("version", content.get("version", 5)),
        )
        got = shard_fids(Records.of(_payloads(case), case["input_type"]), config)
        for name, want in case["expected"].items():
            plain = _flat(got[name])
            if plain != _flat(want):
                failures.append(f"case {number}, {name}: {plain} != {want}")
    yield "cases", failures
    yield from _others(content, "cases")


GROUPS: dict[str, Check] = {
    "parse_instances": _instances,
    "parse_instances_legacy_defaults": _legacy,
    "parse_examples": _examples,
    "parse_example_batch": _example_batch,
    "parse_example_batch_list": _example_batch_list,
    "ragged_helper": _ragged,
    "sharding_sparse_fids": _sharding,
}
"""Groups of vectors by name, each with its check."""
