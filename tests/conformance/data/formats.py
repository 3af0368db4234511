"""Vectors of formats: fids, frames, compression, TFRecord, messages in queues, names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.conformance.compare import differ, in_order
from tests.conformance.data.members import raises, spread
from tests.conformance.data.parsing import parsed_as
from trilith.compat.monolith.feature_list import FeatureList
from trilith.compat.monolith.messages import string_to_variant
from trilith.compat.monolith.names import FeatureNameMapper, SlotNames
from trilith.compat.monolith.tf_example import TFExampleConverter
from trilith.data import fids
from trilith.data.formats.compression import effective_compression
from trilith.data.formats.framing import Framing, Scratch, frame_records, split_all, split_frames
from trilith.data.formats.readers import open_records
from trilith.data.formats.tfrecord import concatenate
from trilith.data.formats.tfrecord import frame_records as frame_tfrecords
from trilith.data.records import Records
from trilith.errors import TrilithError

if TYPE_CHECKING:
    from tests.conformance.data import Check, Found

__all__ = ["GROUPS"]

CONVERTER = ("sparse_features", "dense_features", "label", "instance_weight")
FLAGS = ("lagrangex_header", "kafka_dump_prefix", "has_sort_id", "kafka_dump")


def framing_of(flags: Mapping[str, Any]) -> Framing:
    return Framing(**{name: bool(flags.get(name, False)) for name in FLAGS})


# ---- fids and hashes -----------------------------------------------------------------------------------------------


def check_fid(content: dict[str, Any], folder: Path) -> Found:
    def makes(make: Callable[[int, int], int]) -> Callable[[list[Any]], list[str]]:
        return lambda cases: [
            wrong for case in cases for wrong in differ(str(case), make(case["slot"], case["signature"]), case["fid"])
        ]

    def refuses(make: Callable[[int, int], int]) -> Callable[[list[int]], list[str]]:
        return lambda slots: [
            wrong for slot in slots for wrong in raises(f"slot {slot}", lambda slot=slot: make(slot, 1))
        ]

    def gives(function: Callable[[Any], Any], given: str, wanted: str) -> Callable[[list[Any]], list[str]]:
        def check(cases: list[Any]) -> list[str]:
            values = np.array([case[given] for case in cases], np.uint64)
            found = differ("array", function(values), [case[wanted] for case in cases])
            return found + [wrong for case in cases for wrong in differ(str(case), function(case[given]), case[wanted])]

        return check

    checks = {
        "make_v1": makes(fids.make_fid_v1),
        "make_v2": makes(fids.make_fid_v2),
        "make_v1_error_slots": refuses(fids.make_fid_v1),
        "make_v2_error_slots": refuses(fids.make_fid_v2),
        "slot_of_v1": gives(fids.slot_of_v1, "fid", "slot"),
        "slot_of_v2": gives(fids.slot_of_v2, "fid", "slot"),
        "v1_to_v2": gives(fids.v1_to_v2, "v1", "v2"),
    }
    return spread(content, checks)


def check_extract_fid(content: dict[str, Any], folder: Path) -> Found:
    def primary(cases: list[Any]) -> list[str]:
        return [
            wrong
            for case in cases
            for wrong in differ(str(case), fids.extract_fid(case["value"], case["slot"]), case["fid"])
        ]

    def quirk(cases: list[Any]) -> list[str]:
        # Upstream lets the hash's bit 48 into the slot; here a slot stays what was asked for.
        return primary([{**case, "fid": case["slot"] << 48 | case["fid"] & fids.SIGNATURE_V2} for case in cases])

    return spread(content, {"primary": primary, "quirk_49bit": quirk})


def check_java_hash(content: list[dict[str, Any]], folder: Path) -> Found:
    for number, case in enumerate(content):
        found = differ("hash", fids.java_hash(case["name"]), case["hash"])
        yield str(number), found + differ("key", fids.data_source_key(case["name"]), case["data_source_key"])


# ---- frames and compression ----------------------------------------------------------------------------------------


def check_framing(content: dict[str, Any], folder: Path) -> Found:
    def truncated(member: dict[str, Any]) -> list[str]:
        return [wrong for case in member["cases"] for wrong in _truncated(case, folder)]

    return spread(
        content,
        {
            "cases": lambda cases: [wrong for case in cases for wrong in _framed_file(case, folder)],
            "truncated": truncated,
            "poison": lambda case: _poison(case, folder),
        },
    )


def _framed_file(case: dict[str, Any], folder: Path) -> list[str]:
    framing = framing_of(case)
    path = folder / case["file"]
    expected = [record["payload_hex"] for record in case["records"]]
    keys = [record["data_source_key"] for record in case["records"]]
    found = []
    for block in (1, 100, 1 << 20):
        with open_records(str(path), framing=framing, block_bytes=block) as reader:
            whole = Records.concatenate(list(reader))
        payloads = whole.payloads()
        found += differ(f"{case['file']}: blocks of {block}", [each.hex() for each in payloads], expected)
        found += differ(f"{case['file']}: data_source_key", whole.source_keys, keys)
    data = path.read_bytes()
    scratch = Scratch()
    split_frames(np.frombuffer(data, np.uint8), 0, len(data), framing, scratch)
    types = scratch.types[: scratch.found] if framing.lagrangex_header else np.zeros(scratch.found, np.uint8)
    found += differ(f"{case['file']}: pb_type", types, [record["pb_type"] for record in case["records"]])
    written = frame_records(Records.of(payloads, "plaintext", source_keys=whole.source_keys), framing)
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
        return differ(case["file"], len(payloads), records)
    return [] if list(_flags_of_fixture(path, records)) else [f"{case['file']}: not {records} records"]


def _poison(case: dict[str, Any], folder: Path) -> list[str]:
    if "good_records" not in case:
        return []
    reads = list(_flags_of_fixture(folder / case["file"], case["good_records"]))
    return [] if any(error for _, error in reads) else [f"{case['file']}: no error after the good records"]


def check_compression(content: dict[str, Any], folder: Path) -> Found:
    payloads = [bytes.fromhex(each) for each in content["expected_payload_hex"]]
    framing = framing_of(content)

    def read_as(case: dict[str, Any]) -> list[str]:
        wrong = []
        for block in (1, 100, 1 << 20):
            options = {"framing": framing, "compression": case["type"], "block_bytes": block}
            got, error = _read_until_error(folder / case["file"], **options)
            if got != payloads or error:
                wrong.append(f"{case['file']}: {len(got)} of {len(payloads)} records, {error}")
        return wrong

    checks: dict[str, Callable[[Any], list[str]]] = {
        "cases": lambda cases: [wrong for case in cases for wrong in read_as(case)],
        "plain": lambda file: read_as({"type": "NO", "file": file}),
        "n_records": lambda wanted: differ("records", len(payloads), wanted),
    }
    return spread(content, checks, "expected_payload_hex", *FLAGS)


def check_compression_selection(content: list[dict[str, Any]], folder: Path) -> Found:
    for number, case in enumerate(content):
        try:
            options = {"compression": case["compression_type"], "use_snappy": case["use_snappy"]}
            got = effective_compression(case["file"], **options).upper()
        except TrilithError:
            got = "ERROR"
        if "effective" not in case:
            yield str(number), []
            continue
        none = {"NO": "NONE", "UNKNOW": "NONE"}
        wanted = case["effective"].upper()
        yield str(number), differ("effective", got, none.get(wanted, wanted))


def check_tfrecord_crc(content: list[dict[str, Any]], folder: Path) -> Found:
    for number, case in enumerate(content):
        if "payload_hex" not in case:
            yield str(number), []
            continue
        payload, record = bytes.fromhex(case["payload_hex"]), bytes.fromhex(case["record_hex"])
        yield str(number), differ("record", frame_tfrecords(*concatenate([payload])).tobytes().hex(), record.hex())


# ---- tf.Example ----------------------------------------------------------------------------------------------------


def _converter(content: Mapping[str, Any]) -> TFExampleConverter:
    return TFExampleConverter(
        sparse_features=content["sparse_features"],
        dense_features=content["dense_features"],
        label=content.get("label") or "",
        instance_weight=content.get("instance_weight") or "",
    )


def check_tf_example(content: dict[str, Any], folder: Path) -> Found:
    converter = _converter(content)

    def read(name: str) -> Records:
        with open_records(str(folder / name), kind="plaintext", format="tfrecord") as reader:
            return Records.concatenate([converter.convert_records(chunk) for chunk in reader])

    return spread(content, {"parse": lambda case: parsed_as(read(content["file"]), case)}, "file", *CONVERTER)


def check_tf_example_edge(content: dict[str, Any], folder: Path) -> Found:
    serialized = bytes.fromhex(content["serialized_hex"])

    def parse(case: dict[str, Any]) -> list[str]:
        converter = _converter(content)
        found = parsed_as(converter.convert_records(Records.of([serialized], "plaintext")), case)
        alone = converter.convert(serialized).SerializeToString()
        return found + parsed_as(Records.of([alone], "example"), case)

    def errors(cases: list[Any]) -> list[str]:
        return [wrong for case in cases for wrong in raises(case["why"], lambda case=case: _converter(case))]

    return spread(content, {"parse": parse, "errors": errors}, "serialized_hex", *CONVERTER)


# ---- messages ------------------------------------------------------------------------------------------------------


def check_string_to_variant(content: dict[str, Any], folder: Path) -> Found:
    params = content["params"]
    records, present = string_to_variant(
        [bytes.fromhex(each) for each in content["inputs_hex"]],
        params["variant_type"].replace("_", ""),
        has_header=params["has_header"],
        framing=framing_of(params),
        chnids=params.get("chnids"),
        datasources=params.get("datasources"),
        default_datasource=params.get("default_datasource", ""),
    )

    def keys(wanted: list[Any]) -> list[str]:
        pairs = zip(wanted, records.source_keys.tolist(), strict=True)
        return differ("data_source_key", [None if each is None else key for each, key in pairs], wanted)

    checks: dict[str, Callable[[Any], list[str]]] = {
        "data_source_key": keys,
        "has_variant": lambda wanted: differ("has_variant", present, wanted),
    }
    return spread(content, checks, "params", "inputs_hex")


def check_kafka_message(content: dict[str, Any], folder: Path) -> Found:
    def payloads(wanted: list[str]) -> list[str]:
        records = split_all(bytes.fromhex(content["message_hex"]), framing_of(content), "instance")
        return differ("payloads", [each.hex() for each in records.payloads()], wanted)

    return spread(content, {"payload_hex": payloads}, "message_hex", *FLAGS)


# ---- names ---------------------------------------------------------------------------------------------------------


def check_feature_list(content: dict[str, Any], folder: Path) -> Found:
    parsed = FeatureList.load(str(folder / content["file"]))
    expected = content["expected"]
    wrong = differ("column_name", sorted(parsed.column_name), in_order(expected["column_name"]))
    for members, wanted in ((parsed.feeds, expected["feeds"]), (parsed.features, expected["features"])):
        wrong += differ("names", sorted(members), in_order(wanted))
        for name, values in wanted.items():
            for key, value in values.items():
                wrong += differ(f"{name}.{key}", getattr(members[name], key), value)
    for key, name in expected["lookup"].items():
        wrong += differ(f"lookup {key}", parsed[int(key) if key.isdigit() else key].feature_name, name)
    for key in expected["missing"]:
        wrong += raises(f"lookup {key}", lambda key=key: parsed[int(key) if key.isdigit() else key])
        wrong += differ(f"get {key}", parsed.get(int(key) if key.isdigit() else key), None)
    for name, short in expected["names"].items():
        wrong += differ(f"short name of {name}", parsed.features[name].name, short)
    yield from spread(content, {"expected": lambda _: wrong}, "file")


def check_slot_names(content: dict[str, Any], folder: Path) -> Found:
    def named(*, tob: bool) -> Callable[[dict[str, str]], list[str]]:
        names = SlotNames(tob=tob)
        return lambda wanted: differ("names", {slot: names.name_of(int(slot)) for slot in wanted}, wanted)

    def from_name(pairs: list[Any]) -> list[str]:
        return differ("slots", [[name, SlotNames().slot_of(name)] for name, _ in pairs], pairs)

    def auto_assign(case: dict[str, Any]) -> list[str]:
        fresh = SlotNames()
        return differ("slots", [fresh.slot_of(name) for name in case["fresh"]], case["slots"])

    def registered(case: dict[str, Any]) -> list[str]:
        registry = SlotNames()
        registry.register(case["mapping"])
        return differ("lookup", [[name, registry.slot_of(name)] for name, _ in case["lookup"]], case["lookup"])

    checks = {
        "default": named(tob=False),
        "tob": named(tob=True),
        "from_name": from_name,
        "auto_assign": auto_assign,
        "registered": registered,
    }
    return spread(content, checks)


def check_mapper(content: list[dict[str, Any]], folder: Path) -> Found:
    for number, case in enumerate(content):
        mapper = FeatureNameMapper(enabled=True)
        returned = [getattr(mapper, name)(argument) for name, argument in case["ops"]]
        wrong = differ("returns", returned, case["returns"])
        wrong += differ("found", {name: mapper.find(name) for name in case["found"]}, case["found"])
        wrong += differ("absent", [mapper.find(name) for name in case["absent"]], [None] * len(case["absent"]))
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
