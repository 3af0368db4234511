"""The parse functions of the reference, by the names and argument conventions that its users know.

Each call compiles its request or finds it compiled: with the same arguments, later calls only scan.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from trilith.compat.monolith.names import SlotNames
from trilith.data.choices import OnError
from trilith.data.line_ids import line_field
from trilith.data.parse.parsers import BatchParser, ExampleParser, InstanceParser, Parser
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
from trilith.errors import InvalidRequestError
from trilith.ops.ragged import Ragged
from trilith_proto import example_pb2

__all__ = [
    "Samples",
    "parse_example_batch",
    "parse_example_batch_list",
    "parse_examples",
    "parse_instances",
    "parse_instances2",
    "parse_instances_legacy",
    "parse_instances_raw",
]

Samples: TypeAlias = Records | Sequence[bytes] | Sequence[Any]
"""Records, serialized messages, or message objects."""

_LOW48 = np.uint64(2**48 - 1)


def _records(samples: Any, kind: Kind) -> tuple[Records, bool]:
    """As records; and whether they are serialized, so that reserved features were not read yet."""
    if isinstance(samples, Records):
        return samples, True
    given: list[Any] = [samples] if isinstance(samples, bytes) or not isinstance(samples, Sequence) else list(samples)
    if all(isinstance(each, bytes) for each in given):
        return Records.of(given, kind), True
    return Records.of([each.SerializeToString() for each in given], kind), False


@functools.lru_cache(maxsize=128)
def _parser(kind: type[Parser], specs: tuple[tuple[str, FeatureSpec], ...], on_error: OnError) -> Parser:
    return kind(dict(specs), on_error=on_error, strict=False)


class _Request:
    """Outputs in the order asked for; a name twice is refused."""

    def __init__(self) -> None:
        self.specs: dict[str, FeatureSpec] = {}

    def add(self, name: str, spec: FeatureSpec) -> None:
        if name in self.specs:
            raise InvalidRequestError(f"two outputs are called {name!r}")
        self.specs[name] = spec

    def add_dense(self, name: str, dim: int, dtype: Any) -> None:
        spec = Dense(int(dim), "float32" if dtype is None else _dtype_name(dtype))
        if name in ("label", "instance_weight"):
            if spec.dtype != "float32":
                raise InvalidRequestError(f"{name!r} is float32, not {spec.dtype}")
            self.add(name, Label(spec.dim) if name == "label" else InstanceWeight(spec.dim))
        else:
            self.add(name, spec)

    def parser(self, kind: type[Parser], on_error: OnError) -> Parser:
        return _parser(kind, tuple(self.specs.items()), on_error)


def _dtype_name(dtype: Any) -> str:
    if isinstance(dtype, str) and dtype in ("str", "bytes", "object"):
        return "string"
    if isinstance(dtype, str):
        return dtype
    found = np.dtype(dtype)
    return "string" if found.kind in "OSU" else found.name


def _same_length(what: str, names: Sequence[Any], others: Sequence[Any]) -> None:
    if len(names) != len(others):
        raise InvalidRequestError(f"{what}: {len(names)} names and {len(others)} values that go with them")


def _add_slots(request: _Request, slots: Iterable[int | str], names: SlotNames | None) -> None:
    """Ask for v1 slots: numbers under the names of their slots, or names under themselves."""
    names = names or SlotNames()
    slots = list(slots)
    if slots and all(isinstance(each, str) for each in slots):
        for name in slots:
            slot = names.slot_of(str(name))
            if slot is None:
                raise InvalidRequestError(f"feature {name!r} has no slot")
            request.add(str(name), Slot(slot))
        return
    for each in slots:
        if isinstance(each, str):
            raise InvalidRequestError(f"fidv1_features mixes slots and names: {slots}")
        request.add(names.name_of(int(each)), Slot(int(each)))


def _add_common(
    request: _Request,
    dense_features: Sequence[str],
    dense_feature_shapes: Sequence[int],
    dense_feature_types: Sequence[Any] | None,
    extra_features: Sequence[str],
    extra_feature_shapes: Sequence[int],
) -> None:
    _same_length("dense_features", dense_features, dense_feature_shapes)
    _same_length("extra_features", extra_features, extra_feature_shapes)
    types = [None] * len(dense_features) if dense_feature_types is None else list(dense_feature_types)
    _same_length("dense_feature_types", dense_features, types)
    for name, dim, dtype in zip(dense_features, dense_feature_shapes, types, strict=True):
        request.add_dense(name, dim, dtype)
    for name, dim in zip(extra_features, extra_feature_shapes, strict=True):
        _ = line_field(name).batch_dtype
        request.add(name, Extra(int(dim)))


def _collapsed(features: Features) -> Features:
    """Dense outputs without their batch axis, of a single row."""
    out: Features = {}
    for name, value in features.items():
        if isinstance(value, np.ndarray):
            if len(value) != 1:
                raise InvalidRequestError(f"collapse_batch_dim needs one record, not {len(value)}")
            value = value[0]
        out[name] = value
    return out


def parse_instances(
    samples: Samples,
    *,
    fidv1_features: Sequence[int | str] = (),
    fidv2_features: Sequence[str] = (),
    dense_features: Sequence[str] = (),
    dense_feature_shapes: Sequence[int] = (),
    dense_feature_types: Sequence[Any] | None = None,
    extra_features: Sequence[str] = (),
    extra_feature_shapes: Sequence[int] = (),
    names: SlotNames | None = None,
    collapse_batch_dim: bool = False,
    on_error: OnError = "raise",
) -> Features:
    """Parse Instances.

    Args:
        samples: The Instances.
        fidv1_features: Slots of flat fids, or only names that `names` knows the slots of.
        fidv2_features: Names of features with fids.
        dense_features: Names of dense features; "label" and "instance_weight" are the fields of that name.
        dense_feature_shapes: Elements per row of each.
        dense_feature_types: "float32" (default), "int64" or "string" of each.
        extra_features: Names of LineId fields.
        extra_feature_shapes: Elements per row of each.
        names: Which name belongs to which slot.
        collapse_batch_dim: Give dense outputs of a single Instance without the batch axis.
        on_error: "skip" leaves damaged records out.

    Returns:
        Per name a `Ragged` of int64 fids, or an array [rows, dim].
    """
    request = _Request()
    _add_slots(request, fidv1_features, names)
    for name in fidv2_features:
        request.add(name, Sparse())
    _add_common(
        request, dense_features, dense_feature_shapes, dense_feature_types, extra_features, extra_feature_shapes
    )
    records, _ = _records(samples, Kind.INSTANCE)
    features = request.parser(InstanceParser, on_error).parse(records)
    return _collapsed(features) if collapse_batch_dim else features


def parse_instances2(
    samples: Samples,
    *,
    fidv1_features: Sequence[int | str] = (),
    fidv2_features: Sequence[str] = (),
    float_features: Sequence[str] = (),
    float_feature_dims: Sequence[int] = (),
    int64_features: Sequence[str] = (),
    int64_feature_dims: Sequence[int] = (),
    string_features: Sequence[str] = (),
    string_feature_dims: Sequence[int] = (),
    misc_float_features: Sequence[str] = (),
    misc_float_dims: Sequence[int] = (),
    misc_int64_features: Sequence[str] = (),
    misc_int64_dims: Sequence[int] = (),
    misc_string_features: Sequence[str] = (),
    misc_string_dims: Sequence[int] = (),
    names: SlotNames | None = None,
    on_error: OnError = "raise",
) -> Features:
    """Parse Instances, features sorted by type.

    Args:
        samples: The Instances.
        fidv1_features: Slots of flat fids.
        fidv2_features: Names of features with fids.
        float_features: Names of float features.
        float_feature_dims: Elements per row of each; so with the other types.
        int64_features: Names of integer features.
        int64_feature_dims: Elements per row of each.
        string_features: Names of string features.
        string_feature_dims: Elements per row of each.
        misc_float_features: Float fields of LineId, "label" and "instance_weight".
        misc_float_dims: Elements per row of each.
        misc_int64_features: Integer fields of LineId.
        misc_int64_dims: Elements per row of each.
        misc_string_features: String fields of LineId.
        misc_string_dims: Elements per row of each.
        names: Which name belongs to which slot.
        on_error: "skip" leaves damaged records out.
    """
    request = _Request()
    _add_slots(request, fidv1_features, names)
    for name in fidv2_features:
        request.add(name, Sparse())
    typed = (
        ("float32", float_features, float_feature_dims),
        ("int64", int64_features, int64_feature_dims),
        ("string", string_features, string_feature_dims),
    )
    for dtype, members, dims in typed:
        _same_length(f"{dtype} features", members, dims)
        for name, dim in zip(members, dims, strict=True):
            request.add(name, Dense(int(dim), dtype))
    misc = (
        (np.dtype(np.float32), misc_float_features, misc_float_dims),
        (np.dtype(np.int64), misc_int64_features, misc_int64_dims),
        (np.dtype(np.object_), misc_string_features, misc_string_dims),
    )
    for wanted, members, dims in misc:
        _same_length("misc features", members, dims)
        for name, dim in zip(members, dims, strict=True):
            if wanted == np.float32 and name in ("label", "instance_weight"):
                request.add_dense(name, int(dim), None)
                continue
            if np.dtype(line_field(name).batch_dtype) != wanted:
                raise InvalidRequestError(f"LineId.{name} is no {wanted} field")
            request.add(name, Extra(int(dim)))
    records, _ = _records(samples, Kind.INSTANCE)
    return request.parser(InstanceParser, on_error).parse(records)


def parse_instances_legacy(
    samples: Samples,
    *,
    fidv1_features: Sequence[int | str] = (),
    fidv2_features: Sequence[str] = (),
    float_features: Sequence[str] = (),
    float_feature_dims: Sequence[int] = (),
    int64_features: Sequence[str] = (),
    int64_feature_dims: Sequence[int] = (),
    string_features: Sequence[str] = (),
    string_feature_dims: Sequence[int] = (),
    misc_float_features: Sequence[str] = ("sample_rate",),
    misc_int64_features: Sequence[str] = ("req_time", "uid"),
    misc_string_features: Sequence[str] = (),
    misc_repeated_float_features: Sequence[str] = ("label",),
    misc_repeated_float_dims: Sequence[int] = (1,),
    misc_repeated_int64_features: Sequence[str] = (),
    misc_repeated_int64_dims: Sequence[int] = (),
    misc_repeated_string_features: Sequence[str] = (),
    misc_repeated_string_dims: Sequence[int] = (),
    names: SlotNames | None = None,
    on_error: OnError = "raise",
) -> Features:
    """The older wrapper of `parse_instances2`: its defaults, and scalar float and int64 LineId fields of shape [rows].

    Args:
        samples: The Instances.
        fidv1_features: Slots of flat fids.
        fidv2_features: Names of features with fids.
        float_features: As in `parse_instances2`, like those that follow.
        float_feature_dims: Elements per row of each.
        int64_features: Names.
        int64_feature_dims: Elements per row of each.
        string_features: Names.
        string_feature_dims: Elements per row of each.
        misc_float_features: Scalar float fields of LineId.
        misc_int64_features: Scalar integer fields of LineId.
        misc_string_features: Scalar string fields of LineId, of shape [rows, 1].
        misc_repeated_float_features: Lists of floats.
        misc_repeated_float_dims: Elements per row of each.
        misc_repeated_int64_features: Lists of integers.
        misc_repeated_int64_dims: Elements per row of each.
        misc_repeated_string_features: Lists of strings.
        misc_repeated_string_dims: Elements per row of each.
        names: Which name belongs to which slot.
        on_error: "skip" leaves damaged records out.
    """
    features = parse_instances2(
        samples,
        fidv1_features=fidv1_features,
        fidv2_features=fidv2_features,
        float_features=float_features,
        float_feature_dims=float_feature_dims,
        int64_features=int64_features,
        int64_feature_dims=int64_feature_dims,
        string_features=string_features,
        string_feature_dims=string_feature_dims,
        misc_float_features=(*misc_float_features, *misc_repeated_float_features),
        misc_float_dims=(*(1 for _ in misc_float_features), *misc_repeated_float_dims),
        misc_int64_features=(*misc_int64_features, *misc_repeated_int64_features),
        misc_int64_dims=(*(1 for _ in misc_int64_features), *misc_repeated_int64_dims),
        misc_string_features=(*misc_string_features, *misc_repeated_string_features),
        misc_string_dims=(*(1 for _ in misc_string_features), *misc_repeated_string_dims),
        names=names,
        on_error=on_error,
    )
    for name in (*misc_float_features, *misc_int64_features):
        features[name] = features[name].reshape(-1)
    return features


def parse_instances_raw(
    samples: Samples,
    *,
    fidv1_features: Sequence[int | str] = (),
    fidv2_features: Sequence[str] = (),
    fid_output_type: str = "REGULAR",
    names: SlotNames | None = None,
    **dense_and_extra: Any,
) -> list[npt.NDArray[Any]]:
    """The op below the parsers: a list of arrays instead of a dict.

    Args:
        samples: The Instances.
        fidv1_features: Slots of flat fids.
        fidv2_features: Names of features with fids.
        fid_output_type: "REGULAR": the row splits of every fid feature, then the values of every one. "CONCAT", for one
            Instance: where each feature begins in one vector of all fids, int64[features + 1], then that vector.
        names: Which name belongs to which slot.
        dense_and_extra: As in `parse_instances`; these outputs come last.
    """
    if fid_output_type not in ("REGULAR", "CONCAT"):
        raise InvalidRequestError(f"fid_output_type={fid_output_type!r} is neither 'REGULAR' nor 'CONCAT'")
    records, _ = _records(samples, Kind.INSTANCE)
    if fid_output_type == "CONCAT" and len(records) != 1:
        raise InvalidRequestError(f"CONCAT takes one Instance, not {len(records)}")
    features = parse_instances(
        records, fidv1_features=fidv1_features, fidv2_features=fidv2_features, names=names, **dense_and_extra
    )
    fids = [value for value in features.values() if isinstance(value, Ragged)]
    others = [value for value in features.values() if not isinstance(value, Ragged)]
    if fid_output_type == "REGULAR":
        return [*(each.row_splits for each in fids), *(each.values for each in fids), *others]
    offsets = np.zeros(len(fids) + 1, np.int64)
    np.cumsum([each.values.size for each in fids], out=offsets[1:])
    return [offsets, np.concatenate([np.empty(0, np.int64), *(each.values for each in fids)]), *others]


def parse_examples(
    samples: Samples,
    *,
    sparse_features: Sequence[str] = (),
    dense_features: Sequence[str] = (),
    dense_feature_shapes: Sequence[int] = (),
    dense_feature_types: Sequence[Any] | None = None,
    extra_features: Sequence[str] = (),
    extra_feature_shapes: Sequence[int] = (),
    on_error: OnError = "raise",
) -> Features:
    """Parse Examples.

    Args:
        samples: The Examples. Reserved features of serialized ones stand for the fields they name; message objects are
            taken as they are.
        sparse_features: Names of features with fids, given as v2.
        dense_features: Names of dense features, "label" and "instance_weight" among them.
        dense_feature_shapes: Elements per row of each.
        dense_feature_types: "float32" (default), "int64" or "string" of each.
        extra_features: Names of LineId fields.
        extra_feature_shapes: Elements per row of each.
        on_error: "skip" leaves damaged records out.
    """
    request = _Request()
    for name in sparse_features:
        request.add(name, Sparse())
    _add_common(
        request, dense_features, dense_feature_shapes, dense_feature_types, extra_features, extra_feature_shapes
    )
    records, serialized = _records(samples, Kind.EXAMPLE)
    return request.parser(ExampleParser, on_error).parse(records, promote=serialized)


def parse_example_batch(
    batch: Records | bytes | example_pb2.ExampleBatch,
    *,
    sparse_features: Sequence[str] = (),
    dense_features: Sequence[str] = (),
    dense_feature_shapes: Sequence[int] = (),
    dense_feature_types: Sequence[Any] | None = None,
    extra_features: Sequence[str] = (),
    extra_feature_shapes: Sequence[int] = (),
    on_error: OnError = "raise",
) -> Features:
    """Parse an ExampleBatch.

    Args:
        batch: The batch; of records with several, the rows of all.
        sparse_features: Names of lists with fids, given as v2.
        dense_features: Names of dense lists, "label" and "instance_weight" among them.
        dense_feature_shapes: Elements per row of each.
        dense_feature_types: "float32" (default), "int64" or "string" of each.
        extra_features: Names of LineId fields.
        extra_feature_shapes: Elements per row of each.
        on_error: "skip" leaves damaged batches out.
    """
    request = _Request()
    for name in sparse_features:
        request.add(name, Sparse())
    _add_common(
        request, dense_features, dense_feature_shapes, dense_feature_types, extra_features, extra_feature_shapes
    )
    records, _ = _records(batch, Kind.EXAMPLE_BATCH)
    return request.parser(BatchParser, on_error).parse(records)


def parse_example_batch_list(
    batches: Samples,
    *,
    names: Sequence[str],
    shapes: Sequence[int],
    dtypes: Sequence[Any],
    extra_features: Sequence[str] = (),
    label_config: str = "",
    positive_label: float = 1.0,
    negative_label: float = 0.0,
) -> Features:
    """Parse ExampleBatches that hold different columns of the same rows.

    Every fid is moved into the slot that is its list's id.

    Args:
        batches: The batches.
        names: Outputs.
        shapes: Elements per row of each, -1 for ragged fids.
        dtypes: "float32", "int64" or "string" of each.
        extra_features: Which of `names` are LineId fields.
        label_config: Tasks "pos:neg" of comma-separated actions, joined by ";": adds "label", float32[rows, tasks].
        positive_label: Label of a row with an action of pos.
        negative_label: Label of one without, if neg is empty, or with an action of neg; any other has `INVALID_LABEL`.
    """
    _same_length("shapes", names, shapes)
    _same_length("dtypes", names, dtypes)
    tasks = _label_tasks(label_config)
    request = _Request()
    for name, shape, dtype in zip(names, shapes, dtypes, strict=True):
        if name in extra_features:
            request.add(name, Extra(int(shape)))
        elif shape == -1:
            request.add(name, Sparse())
        elif name == "label":
            request.add(name, Label(int(shape)))
        else:
            request.add(name, Dense(int(shape), _dtype_name(dtype)))
    missing = set(extra_features) - set(names)
    if missing:
        raise InvalidRequestError(f"extra_features {sorted(missing)} are not among the names")
    parts, _ = _records(batches, Kind.EXAMPLE_BATCH)
    # Messages one behind another are one merged message.
    records = Records.of([b"".join(parts.payloads())], Kind.EXAMPLE_BATCH)
    parser = _parser(_ColumnsParser, tuple(request.specs.items()), "raise")
    assert isinstance(parser, _ColumnsParser)
    features = parser.parse_one(records, 0)
    if tasks:
        if "label" in features:
            raise InvalidRequestError("'label' is asked for by name and by label_config")
        features["label"] = parser.task_labels(records, tasks, positive_label, negative_label)
    return features


class _ColumnsParser(BatchParser):
    """Parses merged batches: the id of a list says which slot its fids belong to."""

    def sparse(self, batch: Any, name: str) -> Ragged[np.int64]:
        """Fids of one list, in the slot of its id."""
        found = super().sparse(batch, name)
        number = self._scanner.schema.name_numbers[name]
        slot = np.uint64(max(int(batch.lists[number, 2]), 0))
        fids = found.values.view(np.uint64) & _LOW48 | slot << np.uint64(48)
        return Ragged(fids.view(np.int64), found.row_splits)

    def task_labels(
        self, records: Records, tasks: list[tuple[set[int], set[int]]], positive: float, negative: float
    ) -> npt.NDArray[np.float32]:
        """float32[rows, tasks], from the actions of each row."""
        actions = _actions_parser().action_lists(records)
        rows = actions.value_rowids
        out = np.full((len(actions), len(tasks)), INVALID_LABEL, np.float32)
        for task, (pos, neg) in enumerate(tasks):
            if neg:
                out[rows[np.isin(actions.values, list(neg))], task] = negative
            else:
                out[:, task] = negative
            out[rows[np.isin(actions.values, list(pos))], task] = positive
        return out


class _ActionsParser(BatchParser):
    """Reads the actions of an ExampleBatch."""

    def __init__(self) -> None:
        super().__init__({"actions": Extra()})

    def action_lists(self, records: Records) -> Ragged[np.int64]:
        """All actions of each row."""
        batch = self._scanner.scan(records, 0)
        lines = self._lines(batch, records, 0)
        if lines is None:
            return Ragged(np.empty(0, np.int64), np.zeros(batch.batch_size + 1, np.int64))
        schema = self._line_ids.schema
        column = schema.line_columns["actions"]
        return Ragged(lines.values[column], lines.splits[column])


@functools.cache
def _actions_parser() -> _ActionsParser:
    return _ActionsParser()


def _label_tasks(text: str) -> list[tuple[set[int], set[int]]]:
    tasks = []
    for task in filter(None, (part.strip() for part in text.split(";"))):
        parts = task.split(":")
        if len(parts) != 2:
            raise InvalidRequestError(f"label_config: {task!r} is not 'pos:neg'")
        try:
            pos, neg = ({int(each) for each in part.split(",") if each.strip()} for part in parts)
        except ValueError:
            raise InvalidRequestError(f"label_config: {task!r} has an action that is no number") from None
        if not pos:
            raise InvalidRequestError(f"label_config: {task!r} has no positive action")
        tasks.append((pos, neg))
    return tasks
