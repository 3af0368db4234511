"""Vectors of formats: fids, frames, compression, TFRecord, messages in queues, names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.conformance.compare import mismatch
from trilith.data import fids
from trilith.data.compression import effective_compression
from trilith.data.feature_list import FeatureList
from trilith.data.framing import Framing, Scratch, frame_records, split_all, split_frames
from trilith.data.messages import string_to_variant
from trilith.data.names import FeatureNameMapper, SlotNames
from trilith.data.readers import open_records
from trilith.data.records import Records
from trilith.data.tf_example import TFExampleConverter
from trilith.data.tfrecord import concatenate
from trilith.data.tfrecord import frame_records as frame_tfrecords
from trilith.errors import TrilithError
from trilith_proto.example_pb2 import Example

if TYPE_CHECKING:
    from tests.conformance.data import Check, Found

__all__ = ["GROUPS"]

INVALID_LABEL = -3.4028235e38
FLAGS = ("lagrangex_header", "kafka_dump_prefix", "has_sort_id", "kafka_dump")


def same(what: str, got: Any, wanted: Any) -> list[str]:
    """Nothing if the values are equal, floats to a relative 1e-6."""
    wrong = mismatch(got, {"value": wanted, "exact": True})
    if wrong and mismatch(got, {"value": wanted, "rel_tol": 1e-6}):
        return [f"{what}: {wrong}"]
    return []


def raises(what: str, call: Callable[[], object]) -> list[str]:
    """Nothing if the call raises an error of ours."""
    try:
        call()
    except TrilithError:
        return []
    return [f"{what}: nothing was raised"]


def by_key(content: Mapping[str, Any], found: Mapping[str, list[str]], rest: str) -> Found:
    """A result per key: its own failures; keys that are no checks share those of `rest`."""
    for key in content:
        yield key, found.get(key, found[rest])


def framing_of(flags: Mapping[str, Any]) -> Framing:
    return Framing(**{name: bool(flags.get(name, False)) for name in FLAGS})


# ---- fids and hashes -----------------------------------------------------------------------------------------------


def check_fid(content: dict[str, Any], folder: Path) -> Found:
    two = {"make_v1": fids.make_fid_v1, "make_v2": fids.make_fid_v2}
    one = {"slot_of_v1": fids.slot_of_v1, "slot_of_v2": fids.slot_of_v2, "v1_to_v2": fids.v1_to_v2}
    arguments = {"slot_of_v1": ("fid", "slot"), "slot_of_v2": ("fid", "slot"), "v1_to_v2": ("v1", "v2")}
    for key, cases in content.items():
        found: list[str] = []
        if key in two:
            for case in cases:
                found += same(str(case), two[key](case["slot"], case["signature"]), case["fid"])
        elif key in one:
            given, wanted = arguments[key]
            values = np.array([case[given] for case in cases], np.uint64)
            found += same("array", one[key](values), [case[wanted] for case in cases])
            for case in cases:
                found += same(str(case), one[key](case[given]), case[wanted])
        elif key.endswith("_error_slots"):
            make = two[key.removesuffix("_error_slots")]
            for slot in cases:
                found += raises(f"slot {slot}", lambda make=make, slot=slot: make(slot, 1))
        yield key, found


def check_extract_fid(content: dict[str, Any], folder: Path) -> Found:
    wrong = []
    for case in content.get("primary", []):
        wrong += same(str(case), fids.extract_fid(case["value"], case["slot"]), case["fid"])
    # Upstream lets the hash's bit 48 into the slot; here a slot stays what was asked for.
    quirk = []
    for case in content.get("quirk_49bit", []):
        wanted = case["slot"] << 48 | case["fid"] & fids.SIGNATURE_V2
        quirk += same(str(case), fids.extract_fid(case["value"], case["slot"]), wanted)
    yield from by_key(content, {"primary": wrong, "quirk_49bit": quirk}, "primary")


def check_java_hash(content: list[dict[str, Any]], folder: Path) -> Found:
    for number, case in enumerate(content):
        found = same("hash", fids.java_hash(case["name"]), case["hash"])
        yield str(number), found + same("key", fids.data_source_key(case["name"]), case["data_source_key"])


# ---- frames and compression ----------------------------------------------------------------------------------------


def check_framing(content: dict[str, Any], folder: Path) -> Found:
    yield from by_key(
        content,
        {
            "cases": [wrong for case in content.get("cases", []) for wrong in _framed_file(case, folder)],
            "truncated": [
                wrong for case in content.get("truncated", {}).get("cases", []) for wrong in _truncated(case, folder)
            ],
            "poison": _poison(content["poison"], folder) if "poison" in content else [],
        },
        "cases",
    )


def _framed_file(case: dict[str, Any], folder: Path) -> list[str]:
    framing = framing_of(case)
    path = folder / case["file"]
    payloads = [bytes.fromhex(record["payload_hex"]) for record in case["records"]]
    keys = [record["data_source_key"] for record in case["records"]]
    found = []
    for block in (1, 100, 1 << 20):
        with open_records(str(path), framing=framing, block_bytes=block) as reader:
            whole = Records.concatenate(list(reader))
        if whole.payloads() != payloads:
            found.append(f"{case['file']}: payloads differ with blocks of {block}")
        found += same(f"{case['file']}: data_source_key", whole.source_keys, keys)
    data = path.read_bytes()
    scratch = Scratch()
    split_frames(np.frombuffer(data, np.uint8), 0, len(data), framing, scratch)
    types = scratch.types[: scratch.found] if framing.lagrangex_header else np.zeros(scratch.found, np.uint8)
    found += same(f"{case['file']}: pb_type", types, [record["pb_type"] for record in case["records"]])
    written = frame_records(Records.of(payloads, "plaintext", source_keys=keys), framing)
    if split_all(written.tobytes(), framing, "plaintext").payloads() != payloads:
        found.append(f"{case['file']}: what is written does not read back")
    return found


def _read_until_error(path: Path, **options: Any) -> tuple[list[bytes], str | None]:
    payloads: list[bytes] = []
    with open_records(str(path), **options) as reader:
        try:
            for chunk in reader:
                payloads += chunk.payloads()
        except TrilithError as error:
            return payloads, str(error)
    return payloads, None


def _flags_of_fixture(path: Path, records: int) -> Iterator[tuple[list[bytes], str | None]]:
    """What a file whose framing the vector does not name reads as: with a sort id, or the flags that it says."""
    for framing in (Framing(has_sort_id=True), Framing()):
        payloads, error = _read_until_error(path, framing=framing)
        if len(payloads) == records:
            yield payloads, error


def _truncated(case: dict[str, Any], folder: Path) -> list[str]:
    path, records = folder / case["file"], case["complete_records"]
    if any(name in case for name in FLAGS):
        payloads, _ = _read_until_error(path, framing=framing_of(case))
        return same(case["file"], len(payloads), records)
    return [] if list(_flags_of_fixture(path, records)) else [f"{case['file']}: not {records} records"]


def _poison(case: dict[str, Any], folder: Path) -> list[str]:
    reads = list(_flags_of_fixture(folder / case["file"], case["good_records"]))
    return [] if any(error for _, error in reads) else [f"{case['file']}: no error after the good records"]


def check_compression(content: dict[str, Any], folder: Path) -> Found:
    payloads = [bytes.fromhex(each) for each in content["expected_payload_hex"]]
    framing = framing_of(content)
    wrong = []
    for case in [{"type": "NO", "file": content["plain"]}, *content["cases"]]:
        for block in (1, 100, 1 << 20):
            options = {"framing": framing, "compression": case["type"], "block_bytes": block}
            got, error = _read_until_error(folder / case["file"], **options)
            if got != payloads or error:
                wrong.append(f"{case['file']}: {len(got)} of {len(payloads)} records, {error}")
    yield from by_key(content, {"cases": wrong}, "cases")


def check_compression_selection(content: list[dict[str, Any]], folder: Path) -> Found:
    for number, case in enumerate(content):
        try:
            options = {"compression": case["compression_type"], "use_snappy": case["use_snappy"]}
            got = effective_compression(case["file"], **options).upper()
        except TrilithError:
            got = "ERROR"
        none = {"NO": "NONE", "UNKNOW": "NONE"}
        wanted = case["effective"].upper()
        yield str(number), same("effective", got, none.get(wanted, wanted))


def check_tfrecord_crc(content: list[dict[str, Any]], folder: Path) -> Found:
    for number, case in enumerate(content):
        payload, record = bytes.fromhex(case["payload_hex"]), bytes.fromhex(case["record_hex"])
        yield str(number), same("record", frame_tfrecords(*concatenate([payload])).tobytes().hex(), record.hex())


# ---- tf.Example ----------------------------------------------------------------------------------------------------


def _converter(content: Mapping[str, Any]) -> TFExampleConverter:
    return TFExampleConverter(
        sparse_features=content["sparse_features"],
        dense_features=content["dense_features"],
        label=content.get("label") or "",
        instance_weight=content.get("instance_weight") or "",
    )


def _parsed(examples: Sequence[Example], parse: Mapping[str, Any]) -> dict[str, Any]:
    """Examples as a parser gives them, for the few kinds of features that a tf.Example becomes."""
    rows = [{each.name: each.feature for each in example.named_feature} for example in examples]
    out: dict[str, Any] = {}
    for name in parse["sparse_features"]:
        values = [list(row[name].fid_v2_list.value) if name in row else [] for row in rows]
        splits = [0, *np.cumsum([len(each) for each in values]).tolist()]
        out[name] = {"kind": "ragged", "values": [fid for each in values for fid in each], "row_splits": splits}
    for name, dim, dtype in parse["dense_features"]:
        if name == "label":
            values = [[*example.label[:dim], *[INVALID_LABEL] * dim][:dim] for example in examples]
        elif name == "instance_weight":
            values = [[example.instance_weight] for example in examples]
        elif dtype == "string":
            values = [[row[name].bytes_list.value[0].decode("latin-1") if name in row else ""] for row in rows]
        else:
            member = "int64_list" if dtype == "int64" else "float_list"
            lists = [list(getattr(row[name], member).value) if name in row else [] for row in rows]
            values = [[*each[:dim], *[0] * dim][:dim] for each in lists]
        out[name] = {"kind": "dense", "values": values}
    return out


def _compare_parsed(got: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    found = []
    for name, wanted in expected.items():
        for member in ("row_splits", "values"):
            if member in wanted:
                found += same(f"{name}.{member}", got[name][member], wanted[member])
    return found


def check_tf_example(content: dict[str, Any], folder: Path) -> Found:
    converter = _converter(content)
    with open_records(str(folder / content["file"]), kind="plaintext", format="tfrecord") as reader:
        chunks = [converter.convert_records(chunk) for chunk in reader]
    examples = [Example.FromString(payload) for chunk in chunks for payload in chunk.payloads()]
    wrong = _compare_parsed(_parsed(examples, content["parse"]), content["parse"]["expected"])
    yield from by_key(content, {"parse": wrong}, "parse")


def check_tf_example_edge(content: dict[str, Any], folder: Path) -> Found:
    example = _converter(content).convert(bytes.fromhex(content["serialized_hex"]))
    wrong = _compare_parsed(_parsed([example], content["parse"]), content["parse"]["expected"])
    errors = [each for case in content["errors"] for each in raises(case["why"], lambda case=case: _converter(case))]
    yield from by_key(content, {"parse": wrong, "errors": errors}, "parse")


# ---- messages ------------------------------------------------------------------------------------------------------


def check_string_to_variant(content: dict[str, Any], folder: Path) -> Found:
    params = content["params"]
    records, present = string_to_variant(
        [bytes.fromhex(each) for each in content["inputs_hex"]],
        params["variant_type"],
        has_header=params["has_header"],
        framing=framing_of(params),
        chnids=params.get("chnids"),
        datasources=params.get("datasources"),
        default_datasource=params.get("default_datasource", ""),
    )
    found: dict[str, list[str]] = {"inputs_hex": []}
    wanted = content["data_source_key"]
    got = [None if each is None else key for each, key in zip(wanted, records.source_keys.tolist(), strict=True)]
    found["data_source_key"] = same("data_source_key", got, wanted)
    if "has_variant" in content:
        found["has_variant"] = same("has_variant", present, content["has_variant"])
    yield from by_key(content, found, "inputs_hex")


def check_kafka_message(content: dict[str, Any], folder: Path) -> Found:
    records = split_all(bytes.fromhex(content["message_hex"]), framing_of(content), "instance")
    wrong = same("payloads", [each.hex() for each in records.payloads()], content["payload_hex"])
    yield from by_key(content, {"payload_hex": wrong}, "payload_hex")


# ---- names ---------------------------------------------------------------------------------------------------------


def check_feature_list(content: dict[str, Any], folder: Path) -> Found:
    parsed = FeatureList.load(str(folder / content["file"]))
    expected = content["expected"]
    wrong = same("column_name", sorted(parsed.column_name), sorted(expected["column_name"]))
    for members, wanted in ((parsed.feeds, expected["feeds"]), (parsed.features, expected["features"])):
        wrong += same("names", sorted(members), sorted(wanted))
        for name, values in wanted.items():
            for key, value in values.items():
                wrong += same(f"{name}.{key}", getattr(members[name], key), value)
    for key, name in expected["lookup"].items():
        wrong += same(f"lookup {key}", parsed[int(key) if key.isdigit() else key].feature_name, name)
    for key in expected["missing"]:
        wrong += raises(f"lookup {key}", lambda key=key: parsed[int(key) if key.isdigit() else key])
        wrong += same(f"get {key}", parsed.get(int(key) if key.isdigit() else key), None)
    for name, short in expected["names"].items():
        wrong += same(f"short name of {name}", parsed.features[name].name, short)
    yield from by_key(content, {"expected": wrong}, "expected")


def check_slot_names(content: dict[str, Any], folder: Path) -> Found:
    found: dict[str, list[str]] = {"none": []}
    for key, tob in (("default", False), ("tob", True)):
        names = SlotNames(tob=tob)
        wanted = content.get(key, {})
        found[key] = same(key, {slot: names.name_of(int(slot)) for slot in wanted}, wanted)
    cases = content.get("from_name", [])
    found["from_name"] = same(
        "from_name", [SlotNames().slot_of(name) for name, _ in cases], [slot for _, slot in cases]
    )
    if "auto_assign" in content:
        fresh, slots = SlotNames(), content["auto_assign"]
        found["auto_assign"] = same("slots", [fresh.slot_of(name) for name in slots["fresh"]], slots["slots"])
    if "registered" in content:
        registry, wanted = SlotNames(), content["registered"]
        registry.register(wanted["mapping"])
        slots = [registry.slot_of(name) for name, _ in wanted["lookup"]]
        found["registered"] = same("lookup", slots, [slot for _, slot in wanted["lookup"]])
    yield from by_key(content, found, "none")


def check_mapper(content: list[dict[str, Any]], folder: Path) -> Found:
    for number, case in enumerate(content):
        mapper = FeatureNameMapper(enabled=True)
        returned = [getattr(mapper, name)(argument) for name, argument in case["ops"]]
        wrong = same("returns", returned, case["returns"])
        wrong += same("found", {name: mapper.find(name) for name in case["found"]}, case["found"])
        wrong += same("absent", [mapper.find(name) for name in case["absent"]], [None] * len(case["absent"]))
        yield str(number), wrong


GROUPS: dict[str, Check] = {
    "compression": check_compression,
    "compression_selection": check_compression_selection,
    "extract_fid": check_extract_fid,
    "feature_list": check_feature_list,
    "fid": check_fid,
    "framing": check_framing,
    "java_hash": check_java_hash,
    "kafka_message": check_kafka_message,
    "mapper": check_mapper,
    "slot_names": check_slot_names,
    "string_to_variant": check_string_to_variant,
    "string_to_variant_lagrangex": check_string_to_variant,
    "tf_example": check_tf_example,
    "tf_example_edge": check_tf_example_edge,
    "tfrecord_crc": check_tfrecord_crc,
}
