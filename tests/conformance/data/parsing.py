"""Vectors of parsing: Instances, Examples, ExampleBatches, ragged arrays, fids spread over shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.conformance.compare import Absent, differ
from tests.conformance.data.members import raises, spread, unknown
from trilith.compat.monolith.expanding import contract, expand
from trilith.compat.monolith.names import SlotNames
from trilith.compat.monolith.parse_functions import (
    parse_example_batch,
    parse_example_batch_list,
    parse_examples,
    parse_instances,
    parse_instances_legacy,
    parse_instances_raw,
)
from trilith.data.parse.sharding import ShardingConfig, shard_fids
from trilith.data.records import Kind, Records
from trilith.ops.ragged import Ragged

if TYPE_CHECKING:
    from tests.conformance.data import Check

__all__ = ["GROUPS"]

Found = Iterator[tuple[str, list[str]]]

REQUEST = ("fidv1_features", "fidv2_features", "sparse_features", "dense_features", "extra_features", "tob_env")
BATCH_LIST = (
    "names",
    "shapes",
    "dtypes",
    "extra_features",
    "label_config",
    "positive_label",
    "negative_label",
)


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
        if got.values.dtype != want.get("dtype", "int64"):
            return [f"{name}: dtype {got.values.dtype} instead of {want['dtype']}"]
        parts = ("values", "row_splits")
        return [f for part in parts for f in differ(f"{name}.{part}", getattr(got, part), want[part])]
    if want["kind"] != "dense":
        return [f"{name}: nothing checks what is {want['kind']}"]
    if not isinstance(got, np.ndarray) or list(got.shape) != want["shape"]:
        return [f"{name}: shape {getattr(got, 'shape', None)} instead of {want['shape']}"]
    if want["dtype"] == "string":
        return differ(name, got, _text(want["values"]))
    if got.dtype != want["dtype"]:
        return [f"{name}: dtype {got.dtype} instead of {want['dtype']}"]
    return differ(name, got, want["values"])


def _compare(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    if isinstance(want, Absent):
        return []
    missing = [f"{name} is missing" for name in want if name not in got]
    unasked = [f"{name} was not asked for" for name in got if name not in want]
    return missing + unasked + [f for name in want if name in got for f in differences(name, got[name], want[name])]


def _cases(parse: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[list[dict[str, Any]]], list[str]]:
    def check(cases: list[dict[str, Any]]) -> list[str]:
        found = []
        for number, case in enumerate(cases):
            name = case.get("id", number)
            found += [
                f"{name}: nothing knows {each}" for each in unknown(case, ("serialized_hex", "expected", *REQUEST))
            ]
            found += [f"{name}: {f}" for f in _compare(parse(case), case["expected"])]
        return found

    return check


def _errors(parse: Callable[[dict[str, Any]], object]) -> Callable[[list[dict[str, Any]]], list[str]]:
    return lambda cases: [f for case in cases for f in raises(str(case), lambda case=case: parse(case))]


def parsed_as(records: Records, case: dict[str, Any]) -> list[str]:
    """How the batch that parsing gives differs from what a case expects."""
    arguments = _arguments(case)
    if records.kind is Kind.EXAMPLE_BATCH:
        return _compare(parse_example_batch(records.payload(0), **arguments), case["expected"])
    parse = parse_instances if records.kind is Kind.INSTANCE else parse_examples
    return _compare(parse(records, **arguments), case["expected"])


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

    def either(case: dict[str, Any]) -> object:
        return _raw(case) if case.get("op") == "raw_concat" else parse(case)

    def concatenated(cases: list[dict[str, Any]]) -> list[str]:
        found = []
        for case in cases:
            offsets, values = _raw(case)
            found += differ("offsets", offsets, case["offsets"]) + differ("values", values, case["values"])
        return found

    checks: dict[str, Callable[[Any], list[str]]] = {
        "cases": _cases(parse),
        "errors": _errors(either),
        "raw_concat": concatenated,
        "tob_names": lambda case: differ("keys", list(parse(case)), case["expected_keys"]),
    }
    return spread(content, checks)


def _legacy(content: dict[str, Any], folder: Path) -> Found:
    def expected(wanted: dict[str, Any]) -> list[str]:
        got = parse_instances_legacy(_payloads(content), fidv1_features=content["fidv1_features"])
        return [f for name, want in wanted.items() for f in differ(name, got.get(name), want)]

    return spread(content, {"expected": expected}, "serialized_hex", "fidv1_features")


def _examples(content: dict[str, Any], folder: Path) -> Found:
    def parse(case: dict[str, Any]) -> dict[str, Any]:
        return parse_examples(_payloads(case), **_arguments(case))

    return spread(content, {"cases": _cases(parse), "errors": _errors(parse)})


def _example_batch(content: dict[str, Any], folder: Path) -> Found:
    def parse(case: dict[str, Any]) -> dict[str, Any]:
        return parse_example_batch(_payloads(case)[0], **_arguments(case))

    return spread(content, {"cases": _cases(parse), "errors": _errors(parse)})


def _example_batch_list(content: dict[str, Any], folder: Path) -> Found:
    def expected(wanted: dict[str, Any]) -> list[str]:
        arguments = {name: content[name] for name in BATCH_LIST if name in content}
        return _compare(
            parse_example_batch_list([bytes.fromhex(each) for each in content["inputs_hex"]], **arguments), wanted
        )

    return spread(content, {"expected": expected}, "inputs_hex", *BATCH_LIST)


def _ragged(content: dict[str, Any], folder: Path) -> Found:
    splits = np.array(content["row_splits"], np.int64)
    features = {"r": Ragged(np.array(content["values"], np.int64), splits), "other": np.ones(2)}
    parts = expand(features, value_rowids=True)
    back = contract(parts)
    kept = parts["other"] is features["other"] and back["other"] is features["other"]
    found = differ("contracted", back["r"].tolist(), features["r"].tolist())

    def of(name: str) -> Callable[[Any], list[str]]:
        return lambda wanted: found + differ(name, np.asarray(parts["r"][name]), wanted)

    checks = {name: of(name) for name in ("values", "row_splits", "nrows", "value_rowids")}
    return spread(content, {**checks, "passthrough_key_kept": lambda wanted: differ("kept", kept, wanted)})


def _flat(value: Any) -> Any:
    """Arrays and numbers as lists of unsigned integers: a fid is written with or without its sign."""
    if isinstance(value, dict):
        return {key: _flat(each) for key, each in value.items()}
    values = value.reshape(-1).tolist() if isinstance(value, np.ndarray) else value
    return [int(each) % 2**64 for each in (values if isinstance(values, list) else [values])]


def _sharding(content: dict[str, Any], folder: Path) -> Found:
    def cases(cases: list[dict[str, Any]]) -> list[str]:
        found = []
        for number, case in enumerate(cases):
            config = ShardingConfig(
                features={name: (each["table"], each["slice_dims"]) for name, each in case["feature_cfgs"].items()},
                ps_num=case["ps_num"],
                unique=case["unique"],
                version=case.get("version", content.get("version", 5)),
            )
            got = shard_fids(Records.of(_payloads(case), case["input_type"]), config)
            for name, want in case["expected"].items():
                found += differ(f"case {number}, {name}", _flat(got[name]), _flat(want))
        return found

    return spread(content, {"cases": cases}, "version")


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
