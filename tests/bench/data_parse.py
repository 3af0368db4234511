"""Parsing batches of logged samples: the compiled scanner against the protobuf library and a Python loop per field.

4,096 records of 2 to 4 KB: 40 fid features (half of them flat v1 slots of Instances, or v1 lists of Examples), 3 dense
features, a LineId, labels. Every side makes the same arrays out of the same records, which the twin's first result is
compared with. A second figure compares with the library's bare `FromString`, which makes no arrays at all.

One core; the sides take turns; times are medians.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from tests.bench.harness import Benchmark, Context, Entry, higher, interleave
from trilith.data.parse.parsers import ExampleParser, InstanceParser, Parser
from trilith.data.parse.specs import (
    INVALID_LABEL,
    Dense,
    Extra,
    Features,
    FeatureSpec,
    InstanceWeight,
    Label,
    Slot,
    Sparse,
)
from trilith.data.records import Kind, Records
from trilith.ops.memory import tune_allocator
from trilith.ops.ragged import Ragged
from trilith_proto import example_pb2, proto_parser_pb2

__all__ = ["BENCHMARKS", "example_twin", "instance_twin", "records", "specs"]

_SLOTS = range(1, 21)
_SPARSE = [f"fc_feature_{number}" for number in range(20)]
_DENSE = {"embedding": 16, "context": 8, "statistics": 4}
_LINE = {"uid": 1, "item_id": 1, "req_time": 1, "chnid": 1, "sample_rate": 1, "actions": 2}
_LABELS = 2
_LOW48 = 2**48 - 1


def records(kind: Kind, count: int) -> Records:
    """Made-up samples as a logging pipeline writes them."""
    rng = np.random.default_rng(11)
    make = _instance if kind is Kind.INSTANCE else _example
    return Records.of([make(rng, number) for number in range(count)], kind)


def _ids(rng: np.random.Generator, slot: int, shift: int) -> list[int]:
    return (slot << shift | rng.integers(0, 2**40, int(rng.integers(1, 16)))).tolist()  # type: ignore[no-any-return]


def _ids_up_to_20(rng: np.random.Generator, slot: int) -> list[int]:
    return (slot << 48 | rng.integers(0, 2**40, int(rng.integers(0, 21)))).tolist()  # type: ignore[no-any-return]


def _fill_line(rng: np.random.Generator, number: int, line: Any) -> None:
    line.uid, line.item_id = map(int, rng.integers(0, 2**62, 2))
    line.req_time = 1_700_000_000 + number
    line.chnid = number % 7
    line.actions.extend([1, 2, 300][: number % 4])
    line.sample_rate = 0.5
    line.user_id = f"user{number}"
    line.device_type = "ios"


def _instance(rng: np.random.Generator, number: int) -> bytes:
    message = proto_parser_pb2.Instance(label=[float(number % 2), 0.5], instance_weight=1.0)
    for slot in _SLOTS:
        message.fid.extend(_ids(rng, slot, 54))
    for index, name in enumerate(_SPARSE):
        message.feature.add(name=name, fid=_ids_up_to_20(rng, 100 + index))
    for name, dim in _DENSE.items():
        message.feature.add(name=name, float_value=rng.random(dim))
    _fill_line(rng, number, message.line_id)
    return message.SerializeToString()


def _example(rng: np.random.Generator, number: int) -> bytes:
    message = example_pb2.Example(label=[float(number % 2), 0.5], instance_weight=1.0)
    for slot in _SLOTS:
        feature = message.named_feature.add(name=f"fc_slot_{slot}", id=slot)
        feature.feature.fid_v1_list.value.extend(_ids(rng, slot, 54))
    for index, name in enumerate(_SPARSE):
        feature = message.named_feature.add(name=name, id=100 + index)
        feature.feature.fid_v2_list.value.extend(_ids_up_to_20(rng, 100 + index))
    for index, (name, dim) in enumerate(_DENSE.items()):
        feature = message.named_feature.add(name=name, id=200 + index)
        feature.feature.float_list.value.extend(rng.random(dim))
    _fill_line(rng, number, message.line_id)
    return message.SerializeToString()


def specs(kind: Kind) -> dict[str, FeatureSpec]:
    """What both sides make of the records."""
    out: dict[str, FeatureSpec] = {}
    for slot in _SLOTS:
        out[f"fc_slot_{slot}"] = Slot(slot) if kind is Kind.INSTANCE else Sparse()
    out.update({name: Sparse() for name in _SPARSE})
    out.update({name: Dense(dim) for name, dim in _DENSE.items()})
    out.update(label=Label(_LABELS), instance_weight=InstanceWeight())
    out.update({name: Extra(dim) for name, dim in _LINE.items()})
    return out


# ---- the twin --------------------------------------------------------------------------------------------------------


class _Lists:
    """Fids of one feature: one long list and where rows end."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.splits = [0]

    def row(self, fids: Sequence[int]) -> None:
        self.values.extend(fids)
        self.splits.append(len(self.values))

    def ragged(self) -> Ragged[np.int64]:
        values = np.fromiter(self.values, np.uint64, len(self.values)).view(np.int64)
        return Ragged(values, np.fromiter(self.splits, np.int64, len(self.splits)))


def _line_columns(lines: Sequence[Any]) -> Features:
    out: Features = {}
    n = len(lines)
    for name in ("uid", "item_id"):
        out[name] = np.fromiter((getattr(line, name) for line in lines), np.uint64, n).view(np.int64).reshape(n, 1)
    for name in ("req_time", "chnid"):
        out[name] = np.fromiter((getattr(line, name) for line in lines), np.int64, n).reshape(n, 1)
    out["sample_rate"] = np.fromiter((line.sample_rate for line in lines), np.float32, n).reshape(n, 1)
    actions = out["actions"] = np.zeros((n, _LINE["actions"]), np.int64)
    for row, line in enumerate(lines):
        some = line.actions[: _LINE["actions"]]
        actions[row, : len(some)] = some
    return out


def instance_twin(payloads: Sequence[bytes]) -> Features:
    """What `specs` asks of Instances, by message objects."""
    messages = [proto_parser_pb2.Instance.FromString(payload) for payload in payloads]
    n = len(messages)
    slots = {slot: _Lists() for slot in _SLOTS}
    sparse = {name: _Lists() for name in _SPARSE}
    dense = {name: np.zeros((n, dim), np.float32) for name, dim in _DENSE.items()}
    label = np.zeros((n, _LABELS), np.float32)
    for row, message in enumerate(messages):
        by_slot: dict[int, list[int]] = {slot: [] for slot in _SLOTS}
        for fid in message.fid:
            if fid >> 54 in by_slot:
                by_slot[fid >> 54].append((fid >> 54) << 48 | fid & _LOW48)
        for slot, fids in by_slot.items():
            slots[slot].row(fids)
        named = {feature.name: feature for feature in message.feature}
        for name, lists in sparse.items():
            lists.row(named[name].fid if name in named else ())
        for name, dim in _DENSE.items():
            if name in named and len(named[name].float_value) == dim:
                dense[name][row] = np.fromiter(named[name].float_value, np.float32, dim)
        some = message.label[:_LABELS]
        label[row, : len(some)] = some
    out: Features = {f"fc_slot_{slot}": lists.ragged() for slot, lists in slots.items()}
    out.update({name: lists.ragged() for name, lists in sparse.items()}, **dense, label=label)
    weights = (each.instance_weight if each.HasField("instance_weight") else 1.0 for each in messages)
    out["instance_weight"] = np.fromiter(weights, np.float32, n).reshape(n, 1)
    out.update(_line_columns([message.line_id for message in messages]))
    return out


def example_twin(payloads: Sequence[bytes]) -> Features:
    """What `specs` asks of Examples, by message objects."""
    messages = [example_pb2.Example.FromString(payload) for payload in payloads]
    n = len(messages)
    sparse = {name: _Lists() for name in (*(f"fc_slot_{slot}" for slot in _SLOTS), *_SPARSE)}
    dense = {name: np.zeros((n, dim), np.float32) for name, dim in _DENSE.items()}
    label = np.full((n, _LABELS), INVALID_LABEL, np.float32)
    for row, message in enumerate(messages):
        named = {each.name: each.feature for each in message.named_feature}
        for name, lists in sparse.items():
            feature = named.get(name)
            kind = feature.WhichOneof("type") if feature is not None else None
            if feature is None or kind not in ("fid_v1_list", "fid_v2_list"):
                lists.row(())
            elif kind == "fid_v1_list":
                lists.row([(fid >> 54) << 48 | fid & _LOW48 for fid in feature.fid_v1_list.value])
            else:
                lists.row(feature.fid_v2_list.value)
        for name, dim in _DENSE.items():
            if name in named:
                some = named[name].float_list.value[:dim]
                dense[name][row, : len(some)] = np.fromiter(some, np.float32, len(some))
        labels = message.label[:_LABELS]
        label[row, : len(labels)] = labels
    out: Features = {name: lists.ragged() for name, lists in sparse.items()}
    out.update(dense, label=label)
    weights = (each.instance_weight if each.instance_weight > 0 else 1.0 for each in messages)
    out["instance_weight"] = np.fromiter(weights, np.float32, n).reshape(n, 1)
    out.update(_line_columns([message.line_id for message in messages]))
    return out


# ---- measuring -------------------------------------------------------------------------------------------------------


def _same(got: Features, want: Features) -> None:
    """Both sides must have done the same work."""
    if set(got) != set(want):
        raise AssertionError(f"outputs differ: {sorted(set(got) ^ set(want))}")
    for name, expected in want.items():
        value = got[name]
        if isinstance(expected, Ragged):
            np.testing.assert_array_equal(value.values, expected.values, name)
            np.testing.assert_array_equal(value.row_splits, expected.row_splits, name)
        else:
            np.testing.assert_array_equal(value, expected, name)


def _parse(
    context: Context,
    *,
    kind: Kind,
    parser: type[Parser],
    twin: Callable[[Sequence[bytes]], Features],
    message: Any,
) -> list[Entry]:
    tune_allocator()  # as a worker does; every side gains
    name = f"data.parse.{kind}"
    context.progress("making records", 0, 1)
    batch = records(kind, context.sizes.parse_records)
    payloads = batch.payloads()
    reader = parser(specs(kind))
    for _ in range(2):  # the first sizes the memory of the second
        _same(reader.parse(batch), twin(payloads))
    strings = message.FromString

    def bare() -> None:
        for payload in payloads:
            strings(payload)

    scanned, library, parsed = interleave(
        context,
        name,
        context.sizes.parse_rounds,
        lambda: partial(reader.parse, batch),
        lambda: partial(twin, payloads),
        lambda: bare,
    )
    n = len(payloads)
    rate, twin_rate, bare_rate = (n / float(np.median(each)) for each in (scanned, library, parsed))
    size = batch.payload_bytes / n
    context.note(f"{name}: {size:.0f} bytes a record, {rate * size / 1e9:.2f} GB/s")
    return [
        higher(name, rate, twin_rate, "records/s", 30.0),
        higher(f"{name}.fromstring", rate, bare_rate, "records/s", 1.0),
    ]


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        ("data.parse.instance", "data.parse.instance.fromstring"),
        partial(
            _parse,
            kind=Kind.INSTANCE,
            parser=InstanceParser,
            twin=instance_twin,
            message=proto_parser_pb2.Instance,
        ),
    ),
    Benchmark(
        ("data.parse.example", "data.parse.example.fromstring"),
        partial(
            _parse,
            kind=Kind.EXAMPLE,
            parser=ExampleParser,
            twin=example_twin,
            message=example_pb2.Example,
        ),
    ),
)
"""Figures of parsing."""
