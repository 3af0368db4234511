"""Vectors of conversions, sample ops, reweighting and transforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.conformance.data.parsing import _arguments, _compare
from trilith.data import convert, transforms
from trilith.data.columns import Fields, extract
from trilith.data.framing import Framing
from trilith.data.label_conf import label_conf, tasks_of
from trilith.data.parse import parse_example_batch, parse_examples, parse_instances
from trilith.data.ragged import Ragged
from trilith.data.readers import open_records
from trilith.data.records import Kind, Records
from trilith.data.reweight import InstanceReweight
from trilith.data.samples import (
    AddAction,
    AddLabel,
    FillMultiRankOutput,
    FilterByFeatureValue,
    FilterByFids,
    FilterByLabel,
    FilterByValue,
    LabelNormalization,
    LabelUpperBound,
    MultiLabelGen,
    NegativeSample,
    SampleOp,
    ScatterLabel,
    SpecialStrategy,
    SwitchSlotBatch,
    UseFieldAsLabel,
    feature_combine,
    gen_fid_mask,
    map_id,
    relate,
    switch_slot,
)
from trilith.errors import TrilithError
from trilith_proto.example_pb2 import Example, ExampleBatch
from trilith_proto.line_id_pb2 import LineId
from trilith_proto.proto_parser_pb2 import Instance

if TYPE_CHECKING:
    from tests.conformance.data import Check, Found

__all__ = ["GROUPS"]

DRAWS = 2000
FRAMES = ("lagrangex_header", "kafka_dump_prefix", "has_sort_id", "kafka_dump")
TRANSFORMS = {name: getattr(transforms, name) for name in transforms.__all__ if name[0].isupper()}


def differ(what: str, got: Any, wanted: Any) -> list[str]:
    """Nothing if two values are equal; floats count as equal within a relative 1e-6."""
    if isinstance(wanted, float) or (isinstance(wanted, list) and any(isinstance(each, float) for each in wanted)):
        close = np.shape(got) == np.shape(wanted) and np.allclose(got, wanted, rtol=1e-6, atol=0.0, equal_nan=True)
    else:
        close = got == wanted
    return [] if close else [f"{what}: {got} is not {wanted}"[:300]]


def accepted(what: str, call: Callable[[], Any]) -> list[str]:
    """A failure if the call is not refused with an error of ours."""
    try:
        call()
    except TrilithError:
        return []
    return [f"{what}: nothing was raised"]


def spread(content: Mapping[str, Any], checks: Mapping[str, Callable[[Any], list[str]]]) -> Found:
    """A result per key of a group: what its check finds; other keys describe or are part of a check."""
    for key, value in content.items():
        yield key, checks[key](value) if key in checks else []


def instance(text: str) -> Instance:
    return Instance.FromString(bytes.fromhex(text))


def with_line_id(text: str) -> list[Any]:
    line_id = LineId.FromString(bytes.fromhex(text))
    return [Instance(line_id=line_id), Example(line_id=line_id)]


def as_example(message: Instance) -> Example:
    """The same labels and line id, as an Example."""
    made = Example(label=message.label)
    if message.HasField("line_id"):
        made.line_id.CopyFrom(message.line_id)
    return made


def ragged(content: Mapping[str, Any]) -> Ragged[Any]:
    return Ragged(np.array(content["values"], np.int64), np.array(content["row_splits"], np.int64))


def as_ragged(rows: Ragged[Any]) -> dict[str, Any]:
    return {"values": rows.values.tolist(), "row_splits": rows.row_splits.tolist()}


def parsed_as(records: Records, case: dict[str, Any]) -> list[str]:
    """How the batch that parsing gives differs from what a case expects."""
    arguments = _arguments(case)
    if records.kind is Kind.EXAMPLE_BATCH:
        return _compare(parse_example_batch(records.payload(0), **arguments), case["expected"])
    parse = parse_instances if records.kind is Kind.INSTANCE else parse_examples
    return _compare(parse(records, **arguments), case["expected"])


# ---- conversions -----------------------------------------------------------------------------------------------------


def check_conversions(content: dict[str, Any], folder: Path) -> Found:
    def promoted(text: str) -> Example:
        example = Example.FromString(bytes.fromhex(text))
        convert.promote(example)
        return example

    def both_ways(made: Any, records: Records, index: int, wanted: Any) -> list[str]:
        chunk = convert.convert(records, type(wanted).DESCRIPTOR.name.lower())
        found = differ("message", made, wanted)
        return found + differ("record", type(wanted).FromString(chunk.payload(index)), wanted)

    def to_example(cases: list[Any]) -> list[str]:
        found = []
        for case in cases:
            wanted = Example.FromString(bytes.fromhex(case["example_hex"]))
            records = Records.of([bytes.fromhex(case["instance_hex"])], "instance")
            found += both_ways(convert.instance_to_example(instance(case["instance_hex"])), records, 0, wanted)
        return found

    def to_instance(cases: list[Any]) -> list[str]:
        found = []
        for case in cases:
            records = Records.of([bytes.fromhex(case["example_hex"])], "example")
            made = convert.example_to_instance(promoted(case["example_hex"]))
            found += both_ways(made, records, 0, instance(case["instance_hex"]))
        return found

    def rows(cls: Any, key: str, split: Callable[[ExampleBatch], Any]) -> Callable[[list[Any]], list[str]]:
        def check(cases: list[Any]) -> list[str]:
            found = []
            for case in cases:
                batch = ExampleBatch.FromString(bytes.fromhex(case["batch_hex"]))
                records = Records.of([batch.SerializeToString()], "examplebatch", source_keys=[batch.data_source_key])
                wanted = cls.FromString(bytes.fromhex(case[key]))
                found += both_ways(list(split(batch))[case["index"]], records, case["index"], wanted)
            return found

        return check

    return spread(
        content,
        {
            "instance_to_example": to_example,
            "example_to_instance": to_instance,
            "example_batch_to_example": rows(Example, "example_hex", convert.batch_to_examples),
            "example_batch_to_instance": rows(Instance, "instance_hex", convert.batch_to_instances),
        },
    )


def records_of(path: Path, case: Mapping[str, Any], kind: str) -> Records:
    framing = Framing(**{name: bool(case.get(name, False)) for name in FRAMES})
    compression = case.get("compression_type", case.get("compression"))
    with open_records(
        str(path), kind=kind, framing=framing, compression=compression, use_snappy=case.get("use_snappy")
    ) as reader:
        return Records.concatenate(list(reader))


def check_pb_dataset(content: list[Any], folder: Path) -> Found:
    for number, case in enumerate(content):
        records = records_of(folder / case["file"], case, case["input_pb_type"])
        pruning = case.get("feature_pruning_type")
        made = convert.convert(
            records, case["output_pb_type"], pruning=None if pruning is None else convert.Pruning(pruning)
        )
        found = differ("n", len(made), case["n"])
        if "payload_hex" in case:
            found += differ("payloads", [each.hex() for each in made.payloads()], case["payload_hex"])
        if "data_source_keys" in case:
            found += differ("keys", made.source_keys.tolist(), case["data_source_keys"])
            found += differ("messages", [e.data_source_key for e in convert.messages(made)], case["data_source_keys"])
        if "parse" in case:
            found += parsed_as(made, case["parse"])
        yield str(number), found


# ---- relations and filters -------------------------------------------------------------------------------------------


def check_relational(content: list[Any], folder: Path) -> Found:
    for number, case in enumerate(content):
        yield str(number), differ(str(case), relate(case["op"], case["value"], case["operands"]), case["result"])


def keeps(op: SampleOp, messages: Sequence[Any]) -> list[bool]:
    """What an op keeps of messages, all of one kind, in one chunk."""
    records = Records.of([each.SerializeToString() for each in messages], type(messages[0]).DESCRIPTOR.name.lower())
    kept = set(op(records).numbers.tolist())
    return [number in kept for number in range(len(messages))]


def check_filter_by_value(content: dict[str, Any], folder: Path) -> Found:
    def cases(cases: list[Any]) -> list[str]:
        found = []
        for case in cases:
            op = FilterByValue(case["field_name"], case["op"], case["operand"], keep_empty=case["keep_empty"])
            got = [bool(op.on(each)) for each in with_line_id(case["line_id_hex"])]
            found += differ(str(case), got, [case["result"]] * 2)
        return found

    def rejects(cases: list[Any]) -> list[str]:
        return [
            wrong
            for case in cases
            for wrong in accepted(
                str(case), lambda case=case: FilterByValue(case["field_name"], case["op"], case["operand"])
            )
        ]

    return spread(content, {"cases": cases, "rejects": rejects})


def check_filter_by_value_file(content: dict[str, Any], folder: Path) -> Found:
    messages = [with_line_id(text) for text in content["line_ids_hex"]]

    def op_of(case: Mapping[str, Any]) -> FilterByValue:
        path = str(folder / case["operand_filepath"])
        return FilterByValue(case["field_name"], case["op"], case.get("operand"), operand_filepath=path)

    def cases(cases: list[Any]) -> list[str]:
        found = []
        for case in cases:
            for samples in zip(*messages, strict=True):
                found += differ(str(case), keeps(op_of(case), samples), case["results"])
        return found

    def rejects(cases: list[Any]) -> list[str]:
        return [
            wrong for case in cases for wrong in accepted(str(case), lambda case=case: op_of(case).on(messages[0][0]))
        ]

    return spread(content, {"cases": cases, "rejects": rejects})


def check_filter_by_feature_value(content: dict[str, Any], folder: Path) -> Found:
    examples = [Example.FromString(bytes.fromhex(text)) for text in content["examples_hex"]]

    def cases(cases: list[Any]) -> list[str]:
        found = []
        for case in cases:
            path = case.get("operand_filepath")
            op = FilterByFeatureValue(
                case["field_name"],
                case["op"],
                case.get("operand"),
                operand_filepath=str(folder / path) if path else "",
                field_type=case["field_type"],
                keep_empty=case["keep_empty"],
            )
            found += differ(str(case), keeps(op, examples), case["results"])
            found += differ(str(case), [bool(op.on(each)) for each in examples], case["results"])
        return found

    return spread(content, {"cases": cases})


def check_filter_by_fids(content: dict[str, Any], folder: Path) -> Found:
    def cases(cases: list[Any]) -> list[str]:
        found = []
        for case in cases:
            op = FilterByFids(**case["args"])
            for cls in (Instance, Example):
                kind = cls.DESCRIPTOR.name.lower()
                message = cls.FromString(bytes.fromhex(content[f"{kind}_hex"]))
                found += differ(f"{kind} {case['args']}", bool(op.on(message)), case[kind])
        return found

    def dataset(case: dict[str, Any]) -> list[str]:
        records = records_of(folder / case["file"], case, "instance")
        op = FilterByFids(**{name: case[name] for name in FilterByFids.__dataclass_fields__ if name in case})
        slots = tuple(case["fidv1_features"])
        columns = extract(op(records), Fields(slots=slots))
        found = []
        for slot in slots:
            found += differ(f"slot {slot}", columns.slots[slot].values.tolist(), case[f"slot_{slot}_values"])
        return found

    return spread(content, {"cases": cases, "dataset": dataset})


def check_negative_req_time(content: dict[str, Any], folder: Path) -> Found:
    message = instance(content["instance_hex"])
    checks = {
        "filter_by_fids_no_conditions": lambda wanted: differ("kept", bool(FilterByFids().on(message)), wanted),
        "transform_keep": lambda wanted: differ(
            "kept",
            len(transform(content["transform_expr"])(Records.of([message.SerializeToString()], "instance"))),
            wanted,
        ),
    }
    return spread(content, checks)


# ---- labels and chance -----------------------------------------------------------------------------------------------

LABEL_OPS: dict[str, Callable[[dict[str, Any]], SampleOp]] = {
    "add_action": lambda p: AddAction(p["field_name"], p["operator"], p["operand"], p["action"]),
    "add_label": lambda p: AddLabel(**p),
    "fill_multi_rank_output": lambda p: FillMultiRankOutput(**p),
    "label_normalization": lambda p: LabelNormalization(**p),
    "label_upper_bound": lambda p: LabelUpperBound(**p),
    "multi_label_gen": lambda p: MultiLabelGen(**p),
    "scatter_label": lambda p: ScatterLabel(next(iter(p.values()))),
    "use_field_as_label": lambda p: UseFieldAsLabel(**p),
}


def check_label_ops(content: list[Any], folder: Path) -> Found:
    for number, case in enumerate(content):
        op = LABEL_OPS[case["op"]]({name: value for name, value in case["params"].items() if name != "variant_type"})
        found = []
        for one in case["cases"]:
            message = instance(one["instance_hex"])
            for sample in (message, as_example(message)):
                (made,) = op.on(sample)
                found += differ(f"{one} label", list(made.label), one["label"])
                found += differ(f"{one} actions", list(made.line_id.actions), one["actions"])
                found += differ(f"{one} sample_rate", made.line_id.sample_rate, one["sample_rate"])
        yield str(number), found


def check_filter_by_label(content: list[Any], folder: Path) -> Found:
    for number, case in enumerate(content):
        op = FilterByLabel(case["label_threshold"], case["filter_equal"])
        found = []
        for cls in (Instance, Example):
            messages = [cls(label=label) for label in case["labels"]]
            found += differ(str(case), keeps(op, messages), case["results"])
        yield str(number), found


def check_negative_sample(content: dict[str, Any], folder: Path) -> Found:
    op = NegativeSample(**content["params"])

    def cases(cases: list[Any]) -> list[str]:
        return [
            wrong for case in cases for wrong in differ(str(case), rate(op, case["instance_hex"]), float(case["keep"]))
        ]

    def statistical(cases: list[Any]) -> list[str]:
        found = []
        for case in cases:
            got = rate(op, case["instance_hex"])
            if abs(got - case["keep_rate"]) > 0.05:
                found.append(f"{case}: kept {got}")
        return found

    def alone(case: dict[str, Any]) -> list[str]:
        params = {name: case[name] for name in NegativeSample.__dataclass_fields__ if name in case}
        return differ(str(case), rate(NegativeSample(**params), case["instance_hex"]), float(case["keep"]))

    return spread(content, {"cases": cases, "statistical": statistical, "drop_all": alone, "drop_none": alone})


def rate(op: SampleOp, text: str) -> float:
    return len(op(Records.of([bytes.fromhex(text)] * DRAWS, "instance"))) / DRAWS


def check_special_strategy(content: dict[str, Any], folder: Path) -> Found:
    def cases(cases: list[Any]) -> list[str]:
        found = []
        for case in cases:
            params = {name: value for name, value in content["params"].items() if name != "variant_type"}
            params["keep_empty_strategy"] = case.get("keep_empty_strategy", params.get("keep_empty_strategy", True))
            message = instance(case["instance_hex"])
            for sample in (message, as_example(message)):
                made = SpecialStrategy(**params).on(sample)
                found += differ(str(case), bool(made), case["keep"])
                if made and "label" in case:
                    found += differ(str(case), list(made[0].label), case["label"])
        return found

    return spread(content, {"cases": cases})


def check_label_conf(content: dict[str, Any], folder: Path) -> Found:
    def tasks(wanted: list[Any]) -> list[str]:
        found = []
        made = tasks_of(label_conf(content["config"]).conf)
        for task, each in zip(made, wanted, strict=True):
            found += differ("pos", sorted(task.pos_actions), each["pos"])
            found += differ("neg", sorted(task.neg_actions), each["neg"])
            found += differ("rate", task.sample_rate, each["rate"])
        return found

    return spread(
        content,
        {
            "tasks": tasks,
            "serialized_hex": lambda wanted: differ(
                "bytes", label_conf(content["config"]).SerializeToString().hex(), wanted
            ),
            "rejects": lambda cases: [
                wrong for case in cases for wrong in accepted(str(case), lambda case=case: label_conf(case["config"]))
            ],
        },
    )


# ---- fids ------------------------------------------------------------------------------------------------------------


def check_map_id(content: dict[str, Any], folder: Path) -> Found:
    mapping = {int(key): value for key, value in content["map"].items()}
    check = {
        "output": lambda wanted: differ("ids", map_id(content["input"], mapping, content["default"]).tolist(), wanted)
    }
    return spread(content, check)


def check_gen_fid_mask(content: list[Any], folder: Path) -> Found:
    for number, case in enumerate(content):
        yield str(number), differ(str(case), gen_fid_mask(ragged(case), case["fid"]).tolist(), case["mask"])


def check_switch_slot(content: dict[str, Any], folder: Path) -> Found:
    def primary(case: dict[str, Any]) -> list[str]:
        got = as_ragged(switch_slot(ragged(case["input"]), case["slot"]))
        return differ(str(case), got, as_ragged(ragged(case["expected"])))

    return spread(content, {"primary": primary})


def check_feature_combine(content: dict[str, Any], folder: Path) -> Found:
    def primary(cases: list[Any]) -> list[str]:
        found = []
        for case in cases:
            got = as_ragged(feature_combine(ragged(case["a"]), ragged(case["b"]), case["slot"]))
            found += differ(str(case), got, as_ragged(ragged(case["expected"])))
        return found

    return spread(content, {"primary": primary})


def check_switch_slot_batch(content: dict[str, Any], folder: Path) -> Found:
    cls: Any = {"example": Example, "example_batch": ExampleBatch}[content["variant_type"]]
    features = {name: (inplace, slot) for name, (inplace, slot) in content["features"].items()}
    op = SwitchSlotBatch(features, content["suffix"])
    made = op(Records.of([bytes.fromhex(content["input_hex"])], cls.DESCRIPTOR.name.lower()))

    def parsed(case: dict[str, Any]) -> list[str]:
        return parsed_as(made, case)

    def message(wanted: str) -> list[str]:
        return differ("message", cls.FromString(made.payload(0)), cls.FromString(bytes.fromhex(wanted)))

    return spread(content, {"expected_hex": message, "parsed": parsed})


# ---- reweighting and transforms --------------------------------------------------------------------------------------


def check_instance_reweight(content: list[Any], folder: Path) -> Found:
    for number, case in enumerate(content):
        op = InstanceReweight(case["action_priority"], case["reweight"])
        found = []
        for one in case["cases"]:
            message = instance(one["instance_hex"])
            for sample in (message, as_example(message)):
                made = op.on(sample)
                found += differ(f"{one} copies", len(made), one["replicas"])
                for each in made:
                    found += differ(f"{one} label", list(each.label), one["label"])
        yield str(number), found


def transform(expression: str) -> transforms.Transform:
    made = eval(expression, {"__builtins__": {}}, TRANSFORMS)
    assert isinstance(made, transforms.Transform)
    return made


def check_transform_protos(content: list[Any], folder: Path) -> Found:
    for number, case in enumerate(content):
        yield (
            str(number),
            differ(case["expr"], transform(case["expr"]).as_proto().SerializeToString().hex(), case["hex"]),
        )


def check_transform_rejects(content: list[Any], folder: Path) -> Found:
    for number, expression in enumerate(content):
        yield str(number), accepted(expression, lambda expression=expression: transform(expression))


def check_transform_dataset(content: dict[str, Any], folder: Path) -> Found:
    def surviving(wanted: list[int]) -> list[str]:
        found = []
        for kind, path in content["files"].items():
            records = records_of(folder / path, {"has_sort_id": True}, kind)
            for run in (transform(content["expr"]), lambda each: transforms.apply_transform(config, each)):
                columns = extract(run(records), Fields(line_id=("uid",)))
                found += differ(kind, columns.line_scalars("uid").values.tolist(), wanted)
        return found

    config = bytes.fromhex(content["config_hex"])
    return spread(
        content,
        {
            "config_hex": lambda wanted: differ(
                "bytes", transform(content["expr"]).as_proto().SerializeToString().hex(), wanted
            ),
            "surviving_uids": surviving,
        },
    )


def check_transform_add_label(content: dict[str, Any], folder: Path) -> Found:
    def cases(cases: list[Any]) -> list[str]:
        found = []
        for case in cases:
            message = instance(case["instance_hex"])
            for sample in (message, as_example(message)):
                kind = Kind(type(sample).DESCRIPTOR.name.lower())
                made = transform(content["expr"])(Records.of([sample.SerializeToString()], kind))
                found += differ(str(case), len(made) == 1, case["keep"])
                if len(made):
                    got = convert.message_of(made.payload(0), kind)
                    found += differ(f"{case} label", list(got.label), case["label"])
                    found += differ(f"{case} actions", list(got.line_id.actions), case["actions"])
                    found += differ(f"{case} sample_rate", got.line_id.sample_rate, case["sample_rate"])
        return found

    return spread(content, {"cases": cases})


GROUPS: dict[str, Check] = {
    "conversions": check_conversions,
    "feature_combine": check_feature_combine,
    "filter_by_feature_value": check_filter_by_feature_value,
    "filter_by_fids": check_filter_by_fids,
    "filter_by_label": check_filter_by_label,
    "filter_by_value": check_filter_by_value,
    "filter_by_value_file": check_filter_by_value_file,
    "gen_fid_mask": check_gen_fid_mask,
    "instance_reweight": check_instance_reweight,
    "label_conf": check_label_conf,
    "label_ops": check_label_ops,
    "map_id": check_map_id,
    "negative_req_time": check_negative_req_time,
    "negative_sample_deterministic": check_negative_sample,
    "pb_dataset": check_pb_dataset,
    "relational": check_relational,
    "special_strategy": check_special_strategy,
    "switch_slot": check_switch_slot,
    "switch_slot_batch": check_switch_slot_batch,
    "transform_add_label": check_transform_add_label,
    "transform_dataset": check_transform_dataset,
    "transform_protos": check_transform_protos,
    "transform_rejects": check_transform_rejects,
}
