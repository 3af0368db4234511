"""Vectors of conversions, sample ops, reweighting and transforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.conformance.compare import differ
from tests.conformance.data.members import each_of, raises, spread, unknown
from tests.conformance.data.parsing import differences, parsed_as
from trilith.compat.monolith.datasets import FilePBDataset
from trilith.data import messages as convert
from trilith.data.formats.framing import Framing
from trilith.data.formats.readers import open_records
from trilith.data.parse.columns import Fields, extract
from trilith.data.records import Kind, Records
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
    transforms,
)
from trilith.data.samples.label_conf import label_conf, tasks_of
from trilith.data.samples.reweight import InstanceReweight
from trilith.ops.ragged import Ragged
from trilith_proto.example_pb2 import Example, ExampleBatch
from trilith_proto.line_id_pb2 import LineId
from trilith_proto.proto_parser_pb2 import Instance

if TYPE_CHECKING:
    from tests.conformance.data import Check, Found

__all__ = ["GROUPS"]

DRAWS = 2000
STRATEGY = ("strategy_list", "strategy_conf", "keep_empty_strategy")
FRAMES = ("lagrangex_header", "kafka_dump_prefix", "has_sort_id", "kafka_dump")
TRANSFORMS = {name: getattr(transforms, name) for name in transforms.__all__ if name[0].isupper()}


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


# ---- conversions -----------------------------------------------------------------------------------------------------


def without_untyped(message: Any) -> Any:
    """The same Example, in which a feature of no type is none."""
    made = type(message)()
    made.CopyFrom(message)
    for named in getattr(made, "named_feature", ()):
        if named.feature.WhichOneof("type") is None:
            named.ClearField("feature")
    return made


def check_conversions(content: dict[str, Any], folder: Path) -> Found:
    def promoted(text: str) -> Example:
        example = Example.FromString(bytes.fromhex(text))
        convert.promote(example)
        return example

    def both_ways(made: Any, records: Records, index: int, wanted: Any) -> list[str]:
        chunk = convert.convert(records, type(wanted).DESCRIPTOR.name.lower())
        record = type(wanted).FromString(chunk.payload(index))
        found = differ("message", without_untyped(made), without_untyped(wanted))
        return found + differ("record", without_untyped(record), without_untyped(wanted))

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
    compression, snappy = case.get("compression_type"), case.get("use_snappy")
    with open_records(str(path), kind=kind, framing=framing, compression=compression, use_snappy=snappy) as reader:
        return Records.concatenate(list(reader))


PB_OPTIONS = (
    "input_pb_type",
    "output_pb_type",
    "feature_pruning_type",
    "compression_type",
    "use_snappy",
    "lagrangex_header",
    "kafka_dump_prefix",
    "kafka_dump",
)
PB_DATASET = (*PB_OPTIONS, "file", "has_sort_id", "n", "payload_hex", "data_source_keys", "parse")


def check_pb_dataset(content: list[Any], folder: Path) -> Found:
    for number, case in enumerate(content):
        records = records_of(folder / case["file"], case, case["input_pb_type"])
        pruning = case.get("feature_pruning_type")
        made = convert.convert(
            records, case["output_pb_type"], pruning=None if pruning is None else convert.Pruning(pruning)
        )
        found = [f"nothing knows {name}" for name in unknown(case, PB_DATASET)]
        found += differ("n", len(made), case["n"])
        options = {name: case[name] for name in PB_OPTIONS if name in case}
        dataset = FilePBDataset(str(folder / case["file"]), has_sort_id=bool(case.get("has_sort_id")), **options)
        found += differ("dataset", [each.hex() for each in dataset], [each.hex() for each in made.payloads()])
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
            op = FilterByValue(
                case["field_name"], case["op"], case["operand"], keep_empty=case.get("keep_empty", False)
            )
            for sample in with_line_id(case["line_id_hex"]):
                found += differ(str(case), [bool(op.on(sample)), *keeps(op, [sample])], [case["result"]] * 2)
        return found

    def rejects(cases: list[Any]) -> list[str]:
        return [
            wrong
            for case in cases
            for wrong in raises(
                str(case), lambda case=case: FilterByValue(case["field_name"], case["op"], case["operand"])
            )
        ]

    return spread(content, {"cases": cases, "rejects": rejects})


def check_filter_by_value_file(content: dict[str, Any], folder: Path) -> Found:
    messages = [with_line_id(text) for text in content["line_ids_hex"]]

    def op_of(case: Mapping[str, Any]) -> FilterByValue:
        path = str(folder / case["operand_filepath"])
        return FilterByValue(
            case["field_name"],
            case["op"],
            case.get("operand"),
            operand_filepath=path,
            keep_empty=case.get("keep_empty", False),
        )

    def cases(cases: list[Any]) -> list[str]:
        found = []
        for case in cases:
            for samples in zip(*messages, strict=True):
                found += differ(str(case), keeps(op_of(case), samples), case["results"])
                found += differ(str(case), [bool(op_of(case).on(each)) for each in samples], case["results"])
        return found

    def rejects(cases: list[Any]) -> list[str]:
        return [
            wrong for case in cases for wrong in raises(str(case), lambda case=case: op_of(case).on(messages[0][0]))
        ]

    return spread(content, {"cases": cases, "rejects": rejects}, "line_ids_hex")


def check_filter_by_feature_value(content: dict[str, Any], folder: Path) -> Found:
    examples = [Example.FromString(bytes.fromhex(text)) for text in content["examples_hex"]]

    def op_of(case: Mapping[str, Any]) -> FilterByFeatureValue:
        path = case.get("operand_filepath")
        return FilterByFeatureValue(
            case["field_name"],
            case["op"],
            case.get("operand"),
            operand_filepath=str(folder / path) if path else "",
            field_type=case["field_type"],
            keep_empty=case.get("keep_empty", False),
        )

    def cases(cases: list[Any]) -> list[str]:
        found = []
        for case in cases:
            op = op_of(case)
            found += differ(str(case), keeps(op, examples), case["results"])
            found += differ(str(case), [bool(op.on(each)) for each in examples], case["results"])
        return found

    def rejects(cases: list[Any]) -> list[str]:
        return [wrong for case in cases for wrong in raises(str(case), lambda case=case: op_of(case).on(examples[0]))]

    return spread(content, {"cases": cases, "rejects": rejects}, "examples_hex")


def check_filter_by_fids(content: dict[str, Any], folder: Path) -> Found:
    def cases(cases: list[Any]) -> list[str]:
        found = []
        for case in cases:
            op = FilterByFids(**case["args"])
            for cls in (Instance, Example):
                kind = cls.DESCRIPTOR.name.lower()
                message = cls.FromString(bytes.fromhex(content[f"{kind}_hex"]))
                got = [bool(op.on(message)), *keeps(op, [message])]
                found += differ(f"{kind} {case['args']}", got, [case[kind]] * 2)
        return found

    def rejects(cases: list[Any]) -> list[str]:
        return [
            wrong
            for case in cases
            for wrong in raises(str(case), lambda case=case: FilterByFids(**case.get("args", case)))
        ]

    def dataset(case: dict[str, Any]) -> list[str]:
        records = records_of(folder / case["file"], case, "instance")
        op = FilterByFids(**{name: case[name] for name in FilterByFids.__dataclass_fields__ if name in case})
        slots = tuple(case["fidv1_features"])
        columns = extract(op(records), Fields(slots=slots))
        found = []
        for slot in slots:
            found += differ(f"slot {slot}", columns.slots[slot].values.tolist(), case[f"slot_{slot}_values"])
        return found

    checks = {"cases": cases, "dataset": dataset, "rejects": rejects}
    return spread(content, checks, "instance_hex", "example_hex")


def check_negative_req_time(content: dict[str, Any], folder: Path) -> Found:
    message = instance(content["instance_hex"])
    checks = {
        "filter_by_fids_no_conditions": lambda wanted: differ("kept", bool(FilterByFids().on(message)), wanted),
        "transform_keep": lambda wanted: differ(
            "kept", keeps(transform(content["transform_expr"]), [message]), [wanted]
        ),
    }
    return spread(content, checks, "instance_hex", "transform_expr")


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


def kept_shares(cases: list[Any], op_of: Callable[[dict[str, Any]], SampleOp]) -> list[str]:
    """Cases whose share of kept ones, of many draws, is not what they say."""
    found = []
    for case in cases:
        got = rate(op_of(case), case["instance_hex"])
        if abs(got - case["keep_rate"]) > 0.05:
            found.append(f"{case}: kept {got}")
    return found


def rate(op: SampleOp, text: str) -> float:
    return len(op(Records.of([bytes.fromhex(text)] * DRAWS, "instance"))) / DRAWS


def check_negative_sample(content: dict[str, Any], folder: Path) -> Found:
    fields = NegativeSample.__dataclass_fields__

    def of_params(case: dict[str, Any]) -> NegativeSample:
        return NegativeSample(**content["params"])

    def of_its_own(case: dict[str, Any]) -> NegativeSample:
        return NegativeSample(**{name: case[name] for name in fields if name in case})

    def kept(op_of: Callable[[dict[str, Any]], SampleOp]) -> Callable[[Any], list[str]]:
        return lambda cases: [
            wrong
            for case in each_of(cases)
            if "keep" in case
            for wrong in differ(str(case), rate(op_of(case), case["instance_hex"]), float(case["keep"]))
        ]

    checks: dict[str, Callable[[Any], list[str]]] = {
        "cases": kept(of_params),
        "statistical": lambda cases: kept_shares(cases, of_params),
        "drop_all": kept(of_its_own),
        "drop_none": kept(of_its_own),
    }
    return spread(content, checks, "params")


def check_special_strategy(content: dict[str, Any], folder: Path) -> Found:
    def op_of(case: dict[str, Any]) -> SpecialStrategy:
        given = {**content["params"], **case.get("params", {})}
        params = {name: given[name] for name in STRATEGY if name in given}
        params.update((name, case[name]) for name in STRATEGY if name in case)
        return SpecialStrategy(**params)

    def cases(cases: list[Any]) -> list[str]:
        found = []
        for case in cases:
            message = instance(case["instance_hex"])
            for sample in (message, as_example(message)):
                made = op_of(case).on(sample)
                found += differ(str(case), bool(made), case["keep"])
                found += differ(str(case), keeps(op_of(case), [sample]), [case["keep"]])
                if made and "label" in case:
                    found += differ(str(case), list(made[0].label), case["label"])
        return found

    checks: dict[str, Callable[[Any], list[str]]] = {
        "cases": cases,
        "statistical": lambda cases: kept_shares(cases, op_of),
        "rejects": lambda cases: [f for case in cases for f in raises(str(case), lambda case=case: op_of(case))],
    }
    return spread(content, checks, "params")


def check_label_conf(content: dict[str, Any], folder: Path) -> Found:
    def tasks(wanted: list[Any]) -> list[str]:
        made = [
            {"pos": sorted(task.pos_actions), "neg": sorted(task.neg_actions), "rate": task.sample_rate}
            for task in tasks_of(label_conf(content["config"]).conf)
        ]
        return differ("tasks", made, wanted)

    def serialized(wanted: str) -> list[str]:
        return differ("bytes", label_conf(content["config"]).SerializeToString().hex(), wanted)

    def rejects(cases: list[Any]) -> list[str]:
        return [wrong for case in cases for wrong in raises(str(case), lambda case=case: label_conf(case["config"]))]

    return spread(content, {"tasks": tasks, "serialized_hex": serialized, "rejects": rejects}, "config")


# ---- fids ------------------------------------------------------------------------------------------------------------


def check_map_id(content: dict[str, Any], folder: Path) -> Found:
    mapping = {int(key): value for key, value in content["map"].items()}
    options = {"default": content["default"]} if "default" in content else {}
    checks = {"output": lambda wanted: differ("ids", map_id(np.array(content["input"]), mapping, **options), wanted)}
    return spread(content, checks, "map", "default", "input")


def check_gen_fid_mask(content: list[Any], folder: Path) -> Found:
    for number, case in enumerate(content):
        yield str(number), differ(str(case), gen_fid_mask(ragged(case), case["fid"]), case["mask"])


def in_slot(case: Mapping[str, Any], made: Ragged[Any], *, quirk: bool) -> list[str]:
    """How fids of a new slot differ from a case. Upstream lets a bit 48 into the slot (`quirk`), here it is none."""
    if "expected" not in case:
        return []
    wanted = dict(case["expected"])
    if quirk:
        wanted["values"] = [case["slot"] << 48 | value & (1 << 48) - 1 for value in wanted["values"]]
    return differences(f"slot {case['slot']}", made, wanted)


def check_switch_slot(content: dict[str, Any], folder: Path) -> Found:
    def check(cases: Any, *, quirk: bool = False) -> list[str]:
        return [
            wrong
            for case in each_of(cases)
            for wrong in in_slot(case, switch_slot(ragged(case["input"]), case["slot"]), quirk=quirk)
        ]

    return spread(content, {"primary": check, "quirk_49bit": lambda cases: check(cases, quirk=True)})


def check_feature_combine(content: dict[str, Any], folder: Path) -> Found:
    def check(cases: Any, *, quirk: bool = False) -> list[str]:
        found = []
        for case in each_of(cases):
            made = feature_combine(ragged(case["a"]), ragged(case["b"]), case["slot"])
            found += in_slot(case, made, quirk=quirk)
        return found

    return spread(content, {"primary": check, "quirk_49bit": lambda cases: check(cases, quirk=True)})


def check_switch_slot_batch(content: dict[str, Any], folder: Path) -> Found:
    cls: Any = {"example": Example, "example_batch": ExampleBatch}[content["variant_type"]]
    features = {name: (inplace, slot) for name, (inplace, slot) in content["features"].items()}
    op = SwitchSlotBatch(features, **({"suffix": content["suffix"]} if "suffix" in content else {}))
    made = op(Records.of([bytes.fromhex(content["input_hex"])], cls.DESCRIPTOR.name.lower()))

    def message(wanted: str) -> list[str]:
        return differ("message", cls.FromString(made.payload(0)), cls.FromString(bytes.fromhex(wanted)))

    checks: dict[str, Callable[[Any], list[str]]] = {
        "expected_hex": message,
        "parsed": lambda case: parsed_as(made, case),
    }
    return spread(content, checks, "variant_type", "features", "suffix", "input_hex")


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
        yield str(number), raises(expression, lambda expression=expression: transform(expression))


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
        "files",
        "expr",
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

    return spread(content, {"cases": cases}, "expr")


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
