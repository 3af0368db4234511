"""The Arrow IPC files of a checkpoint that hold dense variables: one row per partition on one PS.

Columns: `name` string, `partition` uint32, `optimizer` binary (serialized OptimizerConfig), `values` and `state`
large_list<float32>, `slots` list<struct<name, floats>> (how `state` is divided), `shape` list<list<uint64>> (of
the whole variable; none: unknown). Version 1 has no `shape`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from trilith.checkpoint import FileRecord, Manifest, Part
from trilith.errors import CheckpointError
from trilith.folder import Folder
from trilith.routing import partition_owner, partition_sizes
from trilith.shard import Float32Array
from trilith_proto import hash_table_pb2, ps_pb2
from trilith_services.ps.checkpoint.damage import as_damage, checked_batches
from trilith_services.ps.checkpoint.row_files import check_file, open_arrow, write_arrow
from trilith_services.ps.engine.variables import VariableState

__all__ = ["place", "read", "read_for", "read_into", "read_parts", "write"]

FORMAT = "trilith-variables"
VERSION = 2

_FLOATS = pa.large_list(pa.float32())
_COLUMNS = [
    pa.field("name", pa.string(), nullable=False),
    pa.field("partition", pa.uint32(), nullable=False),
    pa.field("optimizer", pa.binary(), nullable=False),
    pa.field("values", _FLOATS, nullable=False),
    pa.field("state", _FLOATS, nullable=False),
    pa.field("slots", pa.list_(pa.struct([("name", pa.string()), ("floats", pa.uint64())])), nullable=False),
    pa.field("shape", pa.list_(pa.list_(pa.uint64())), nullable=False),
]
_SCHEMA = pa.schema(_COLUMNS, metadata={"trilith.format": FORMAT, "trilith.version": str(VERSION)})
_SCHEMA_1 = pa.schema(_COLUMNS[:-1], metadata={"trilith.format": FORMAT, "trilith.version": "1"})


def write(folder: Folder, name: str, states: Iterable[VariableState]) -> FileRecord:
    """Write partitions, each as one record batch."""
    return write_arrow(folder, name, _SCHEMA, (_batch(state) for state in states), kind="variables")


def _batch(state: VariableState) -> Any:
    return pa.record_batch(
        [
            pa.array([state.spec.name]),
            pa.array([state.spec.partition], pa.uint32()),
            pa.array([state.spec.optimizer.SerializeToString(deterministic=True)]),
            _one_list(state.values),
            _one_list(state.state),
            pa.array([[{"name": slot, "floats": floats} for slot, floats in state.slots]], _SCHEMA.field("slots").type),
            pa.array(
                [[list(state.spec.shape.dims)] if state.spec.HasField("shape") else []], _SCHEMA.field("shape").type
            ),
        ],
        schema=_SCHEMA,
    )


def _one_list(values: Float32Array) -> Any:
    offsets = pa.array([0, values.size], pa.int64())
    return pa.LargeListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values)))


def read(folder: Folder, name: str) -> list[VariableState]:
    """Read a file's partitions."""
    where = folder.path(name)
    with open_arrow(folder, name) as reader:
        if not any(reader.schema.equals(schema, check_metadata=True) for schema in (_SCHEMA, _SCHEMA_1)):
            raise CheckpointError(f"{where}: not a file of format {FORMAT!r}, version {VERSION} or 1")
        states: list[VariableState] = []
        for batch in checked_batches(reader, where):
            with as_damage(where):
                states.append(_state(batch))
        return states


def _state(batch: Any) -> VariableState:
    if batch.num_rows != 1:
        raise ValueError(f"a record batch of {batch.num_rows} partitions, not one")
    values = np.array(batch.column(3).flatten().to_numpy())
    state = np.array(batch.column(4).flatten().to_numpy())
    slots = tuple((slot["name"], slot["floats"]) for slot in batch.column(5)[0].as_py())
    if (
        any(name is None or floats is None for name, floats in slots)
        or sum(floats for _, floats in slots) != state.size
    ):
        raise ValueError(f"{state.size} words of optimizer state in slots of {slots}")
    shapes = batch.column(6)[0].as_py() if batch.num_columns > 6 else []
    if len(shapes) > 1 or any(dims is None or None in dims for dims in shapes):
        raise ValueError(f"shapes {shapes}, not one")
    return VariableState(
        spec=ps_pb2.VariableSpec(
            name=batch.column(0)[0].as_py(),
            partition=batch.column(1)[0].as_py(),
            size=values.size,
            optimizer=hash_table_pb2.OptimizerConfig.FromString(batch.column(2)[0].as_py()),
            shape=ps_pb2.VariableShape(dims=shapes[0]) if shapes else None,
        ),
        values=values,
        state=state,
        slots=slots,
    )


def read_parts(folder: Folder, parts: Iterable[Part], *, check: bool = False) -> Iterator[VariableState]:
    """The partitions that parts of a checkpoint hold; `check` compares the files with their checksums first."""
    for part in parts:
        for file in part.files:
            if file.kind == "variables":
                if check:
                    check_file(folder, file)
                yield from read(folder, file.name)


def read_for(folder: Folder, manifest: Manifest, index: int, count: int) -> list[VariableState]:
    """The partitions that shard `index` of `count` holds, cut anew if the checkpoint has another number of PS."""
    same = manifest.shard_count == count
    parts = [manifest.parts[index]] if same else manifest.parts
    states = list(read_parts(folder, parts))
    return states if same else list(place(states, index, count))


def place(states: Sequence[VariableState], index: int, count: int) -> Iterator[VariableState]:
    """Of all partitions of all variables, those of shard `index` of `count`, cut as a cluster of that size cuts them.

    Raises:
        CheckpointError: A partition is missing or there twice.
    """
    for name, pieces in sorted(_by_name(states).items()):
        sizes = partition_sizes(sum(piece.values.size for piece in pieces), count)
        mine = [part for part in range(len(sizes)) if partition_owner(name, part, count) == index]
        if not mine:
            continue
        whole = _joined(pieces)
        bounds = np.cumsum([0, *sizes])
        for part in mine:
            yield whole if len(sizes) == 1 else _cut(whole, part, int(bounds[part]), int(bounds[part + 1]))


def read_into(
    here: Sequence[VariableState],
    folder: Folder,
    manifest: Manifest,
    sources: ps_pb2.VariableSources,
    index: int,
    count: int,
) -> list[VariableState]:
    """The partitions of shard `index` of `count`, some of them as `sources` takes them from a checkpoint.

    Optimizer state comes with values if the variable here has an optimizer of the same kind, else it stays. A variable
    that is not here yet gets the optimizer that it had.

    Raises:
        CheckpointError: The checkpoint lacks what is taken, or that has not the size of the variable here.
    """
    if not sources.variables:
        return list(here)
    there = _by_name(list(read_parts(folder, manifest.parts)))
    taken = [_taken(source, there, folder.url) for source in sources.variables]
    states = {(state.spec.name, state.spec.partition): state for state in here}
    named = {source.name for source in sources.variables}
    placed = {(state.spec.name, state.spec.partition): state for state in place(taken, index, count)}
    for key in sorted(placed.keys() | {key for key in states if key[0] in named}):
        known, state = states.get(key), placed.get(key)
        if known is not None and (state is None or state.values.size != known.values.size):
            raise CheckpointError(
                f"dense variable {key[0]!r}: {folder.url} has another number of floats for it; partition {key[1]} has "
                f"{known.values.size} here, and would get {0 if state is None else state.values.size}"
            )
        assert state is not None  # it is among `placed` where it is not here
        states[key] = state if known is None else _into(known, state)
    return list(states.values())


def _taken(source: ps_pb2.VariableSource, there: Mapping[str, list[VariableState]], where: str) -> VariableState:
    """A variable whole, put together of pieces of others."""
    pieces = []
    for piece in source.pieces:
        if piece.name not in there:
            raise CheckpointError(f"{where} has no dense variable {piece.name!r}; it has {sorted(there)}")
        whole = _joined(there[piece.name])
        stop = piece.start + piece.size if piece.size else whole.values.size
        if not piece.start < stop <= whole.values.size:
            raise CheckpointError(
                f"{where}: dense variable {piece.name!r} has {whole.values.size} floats; "
                f"{piece.start} to {stop} are asked for"
            )
        pieces.append(_cut(whole, 0, piece.start, stop))
    if not pieces:
        raise CheckpointError(f"dense variable {source.name!r}: it is to be restored from nothing")
    joined = _joined(pieces)
    same_floats = len(pieces) == 1 and joined.values.size == sum(
        state.values.size for state in there[source.pieces[0].name]
    )
    joined.spec.name = source.name
    if not same_floats:
        joined.spec.ClearField("shape")
    return joined


def _into(here: VariableState, taken: VariableState) -> VariableState:
    """A partition that is here with values of another, and its optimizer state where it is of the same kind."""
    kinds = [each.spec.optimizer.WhichOneof("type") for each in (here, taken)]
    alike = kinds[0] == kinds[1] and here.slots == taken.slots
    return VariableState(here.spec, taken.values, taken.state if alike else here.state, here.slots)


def _by_name(states: Sequence[VariableState]) -> dict[str, list[VariableState]]:
    """Partitions by variable, in order."""
    by_name: dict[str, list[VariableState]] = {}
    for state in states:
        by_name.setdefault(state.spec.name, []).append(state)
    for name, pieces in by_name.items():
        pieces.sort(key=lambda piece: piece.spec.partition)
        if [piece.spec.partition for piece in pieces] != list(range(len(pieces))):
            have = [piece.spec.partition for piece in pieces]
            raise CheckpointError(
                f"dense variable {name!r}: the checkpoint holds partitions {have}, not 0 to n-1 once each"
            )
    return by_name


def _joined(pieces: Sequence[VariableState]) -> VariableState:
    """Partitions put together: slots with a number per value join, slots with one for all are the first one's."""
    if len(pieces) == 1:
        return pieces[0]
    values = np.concatenate([piece.values for piece in pieces])
    if any([name for name, _ in piece.slots] != [name for name, _ in pieces[0].slots] for piece in pieces):
        raise CheckpointError(f"dense variable {pieces[0].spec.name!r}: its partitions have other optimizers")
    split = [_slots(piece) for piece in pieces]
    joined: list[Float32Array] = []
    for number, (_, floats) in enumerate(pieces[0].slots):
        if floats == pieces[0].values.size:
            joined.append(np.concatenate([slots[number] for slots in split]))
        else:
            joined.append(split[0][number])
    return _assembled(pieces[0], 0, values, joined)


def _cut(whole: VariableState, partition: int, start: int, stop: int) -> VariableState:
    slots = [slot[start:stop] if slot.size == whole.values.size else slot for slot in _slots(whole)]
    return _assembled(whole, partition, whole.values[start:stop], slots)


def _slots(state: VariableState) -> list[Float32Array]:
    bounds = np.cumsum([floats for _, floats in state.slots])[:-1]
    return np.split(state.state, bounds) if state.slots else []


def _assembled(
    like: VariableState, partition: int, values: Float32Array, slots: Sequence[Float32Array]
) -> VariableState:
    spec = ps_pb2.VariableSpec()
    spec.CopyFrom(like.spec)
    spec.partition, spec.size = partition, values.size
    return VariableState(
        spec=spec,
        values=values,
        state=np.concatenate(slots) if slots else np.empty(0, np.float32),
        slots=tuple((name, slot.size) for (name, _), slot in zip(like.slots, slots, strict=True)),
    )
