"""What the console reads off a cluster when somebody asks: rows, how they are spread, variables, configs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.json_format import MessageToDict

from trilith.entry_dumps import describe_entry, parse_id, signed_id
from trilith.errors import TrilithError, UnknownTableError, UnknownVariableError
from trilith.routing import owners
from trilith.shard import IdPart
from trilith_proto import hash_table_pb2, ps_pb2
from trilith_services.console.members import Members
from trilith_services.console.schema import (
    Config,
    Distribution,
    Histogram,
    Optimizer,
    Replica,
    ReplicaRow,
    Row,
    TableConfig,
    Variable,
    VariableState,
    number,
    numbers,
)

__all__ = ["Reader", "age_histogram", "norm_histogram"]

_BINS = 24
_SHOWN_VALUES = 256


class Reader:
    """Reads one cluster. Thread-safe."""

    def __init__(self, members: Members) -> None:
        self._members = members

    # ---- tables ------------------------------------------------------------------------------------------------------

    def tables(self) -> list[TableConfig]:
        """Every table's config, by name."""
        features = self._members.features()
        configs = sorted(self._members.describe_any().tables, key=lambda config: config.name)
        return [_table_config(config, features) for config in configs]

    def table(self, name: str) -> TableConfig:
        """One table's config.

        Raises:
            UnknownTableError: There is none of that name.
        """
        return _table_config(self._config(name), self._members.features())

    def _config(self, name: str) -> ps_pb2.TableConfig:
        configs = {config.name: config for config in self._members.describe_any().tables}
        if name not in configs:
            raise UnknownTableError(f"no table {name!r}; this cluster has {sorted(configs)}")
        return configs[name]

    def feature_tables(self) -> Mapping[str, str]:
        """Table by feature; a table is also found by its own name."""
        names = [config.name for config in self._members.describe_any().tables]
        recorded = {feature: table for feature, table in self._members.features().items() if table in names}
        return {**{name: name for name in names}, **recorded}

    # ---- rows --------------------------------------------------------------------------------------------------------

    def row_dumps(self, table: str, ids: Sequence[int]) -> list[bytes]:
        """Per id, unsigned, a serialized EntryDump without its id; b"" where there is no row."""
        wanted = np.array(ids, np.uint64)
        owner = owners(wanted, self._members.count)
        found: list[bytes] = [b""] * wanted.size
        for index in np.unique(owner).tolist():
            places = np.flatnonzero(owner == index)
            answer = self._members.shard(index).lookup_entries(IdPart(table, wanted[places]))
            for place, dump in zip(places.tolist(), answer, strict=True):
                found[place] = dump
        return found

    def row(self, table: str, text: str, replicas: Sequence[Replica] = ()) -> Row:
        """All there is to know of one id.

        Args:
            table: Table name.
            text: The id, decimal or 0x….
            replicas: Where else to look it up; those of other shards are left alone.

        Raises:
            UnknownTableError: There is no such table.
        """
        value = parse_id(text)
        (dump,) = self.row_dumps(table, [value])
        owner = self._members.owner(value)
        answer = Row(
            table=table,
            id=str(value),
            signed_id=str(signed_id(value)),
            owner=owner,
            address=self._members.addresses()[owner],
            found=bool(dump),
        )
        weights: list[float] = []
        if dump:
            described = describe_entry(dump)
            weights = described["weights"]
            moment = int(described["last_update_unix_s"])
            with np.errstate(over="ignore"):
                norm = float(np.linalg.norm(np.array(weights, np.float64)))
            answer = answer.model_copy(
                update={
                    "weights": numbers(weights),
                    "norm": number(norm),
                    "optimizers": [_optimizer(state) for state in described["optimizers"]],
                    "last_update_unix_s": moment or None,
                    "age_s": time.time() - moment if moment else None,
                }
            )
        mine = [replica for replica in replicas if replica.shard == owner and replica.address]
        copies = self._members.each(
            range(len(mine)), lambda i: self._replica_row(mine[i], table, value, weights if dump else None)
        )
        return answer.model_copy(
            update={
                "replicas": [
                    ReplicaRow(
                        name=replica.name, address=replica.address, found=False, error=f"{type(copy).__name__}: {copy}"
                    )
                    if isinstance(copy, TrilithError)
                    else copy
                    for replica, copy in zip(mine, copies.values(), strict=True)
                ]
            }
        )

    def _replica_row(self, replica: Replica, table: str, value: int, trained: list[float] | None) -> ReplicaRow:
        shard = self._members.replicas.get((replica.shard, replica.address)).until(time.monotonic() + 2.0)
        part = IdPart(table, np.array([value], np.uint64))
        if not shard.contains(part)[0]:
            return ReplicaRow(name=replica.name, address=replica.address, found=False)
        served = np.asarray(shard.lookup([part])[0][0], np.float32)
        difference = None
        if trained is not None and len(trained) == served.size:
            gaps = np.abs(served.astype(np.float64) - np.array(trained, np.float64))
            difference = float(gaps.max(initial=0.0)) if np.isfinite(gaps).all() else None
        return ReplicaRow(
            name=replica.name,
            address=replica.address,
            found=True,
            weights=numbers(served),
            largest_difference=difference,
        )

    # ---- how rows are spread -----------------------------------------------------------------------------------------

    def distribution(self, table: str, sample: int) -> Distribution:
        """Norms and ages of up to `sample` rows.

        Rows come in the order of the shards' indexes, which is that of their ids' hashes: any stretch of it is a fair
        sample.

        Raises:
            TrilithError: No shard answers.
        """
        members = self._members
        limit = -(-sample // members.count)

        def ask(index: int) -> tuple[int, list[bytes]]:
            shard = members.shard(index)
            found: list[bytes] = []
            offset = -1
            while offset and len(found) < limit:
                page = shard.dump_entries(table, part=0, parts=1, limit=limit - len(found), offset=max(0, offset))
                found += page.entries
                offset = page.offset
            rows = next((stats.rows for stats in shard.stats().tables if stats.table == table), 0)
            return rows, found

        answers = members.each(range(members.count), ask)
        failures = {index: answer for index, answer in answers.items() if isinstance(answer, TrilithError)}
        unknown = next((failure for failure in failures.values() if isinstance(failure, UnknownTableError)), None)
        if unknown is not None or len(failures) == members.count:
            raise unknown or next(iter(failures.values()))
        rows, norms, moments = 0, [], []
        for answer in answers.values():
            if isinstance(answer, TrilithError):
                continue
            rows += answer[0]
            for serialized in answer[1]:
                dump = hash_table_pb2.EntryDump.FromString(serialized)
                norms.append(_norm(dump.num))
                moments.append(dump.last_update_ts_sec)
        with np.errstate(over="ignore"):
            lengths = np.array(norms, np.float64)
        finite = np.isfinite(lengths)
        times = np.array(moments, np.int64)
        return Distribution(
            table=table,
            rows=max(rows, len(norms)),
            sampled=len(norms),
            norms=norm_histogram(lengths[finite]),
            ages=age_histogram(np.maximum(time.time() - times[times > 0], 0.0)),
            not_finite=int((~finite).sum()),
            without_time=int((times <= 0).sum()),
            silent_shards=sorted(failures),
        )

    # ---- variables ---------------------------------------------------------------------------------------------------

    def variables(self) -> list[Variable]:
        """Every dense variable, by name.

        Raises:
            TrilithError: A shard does not answer.
        """
        return [_variable(name, parts) for name, parts in sorted(self._variable_parts().items())]

    def variable(self, name: str) -> VariableState:
        """One variable's values.

        Raises:
            UnknownVariableError: There is none of that name.
        """
        parts = self._variable_parts()
        if name not in parts:
            raise UnknownVariableError(f"no variable {name!r}; this cluster has {sorted(parts)}")
        values = self._pull({name: parts[name]})[name].astype(np.float64)
        finite = values[np.isfinite(values)]
        return VariableState(
            **_variable(name, parts[name]).model_dump(),
            values=numbers(values[:_SHOWN_VALUES]),
            norm=number(float(np.linalg.norm(values))),
            mean=number(float(values.mean())) if values.size else None,
            least=number(float(finite.min())) if finite.size else None,
            greatest=number(float(finite.max())) if finite.size else None,
        )

    def values(self, names: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
        """Values, float32[size], of those of the names that the cluster has.

        Raises:
            TrilithError: A shard does not answer.
        """
        if not names:
            return {}
        parts = self._variable_parts()
        return self._pull({name: parts[name] for name in names if name in parts})

    def _variable_parts(self) -> dict[str, dict[int, tuple[int, ps_pb2.VariableSpec]]]:
        """By variable and partition, who holds it."""
        parts: dict[str, dict[int, tuple[int, ps_pb2.VariableSpec]]] = {}
        for index, answer in self._members.describe().items():
            if isinstance(answer, TrilithError):
                raise answer
            for spec in answer.variables:
                parts.setdefault(spec.name, {})[spec.partition] = (index, spec)
        return parts

    def _pull(
        self, parts: Mapping[str, Mapping[int, tuple[int, ps_pb2.VariableSpec]]]
    ) -> dict[str, npt.NDArray[np.float32]]:
        wanted: dict[int, list[tuple[str, int]]] = {}
        for name, held in parts.items():
            for partition, (index, _) in held.items():
                wanted.setdefault(index, []).append((name, partition))
        pieces: dict[tuple[str, int], Any] = {}
        for index, refs in wanted.items():
            values, _ = self._members.shard(index).pull_variables(refs)
            pieces.update(zip(refs, values, strict=True))
        return {
            name: np.concatenate([pieces[name, partition] for partition in sorted(held)])
            for name, held in parts.items()
        }


def norm_histogram(values: npt.NDArray[np.float64]) -> Histogram:
    """Equal bins from the least to the greatest of float64[n]."""
    return _histogram(values, lambda low, high: np.linspace(low, high, _BINS + 1))


def age_histogram(values: npt.NDArray[np.float64]) -> Histogram:
    """Bins from the least to the greatest of float64[n] that grow geometrically."""
    return _histogram(
        values,
        lambda low, high: np.concatenate([[low], np.geomspace(max(low, min(1.0, high / 100)), high, _BINS + 1)[1:]]),
    )


def _histogram(values: npt.NDArray[np.float64], edges_of: Any) -> Histogram:
    if not values.size:
        return Histogram(edges=[], counts=[], least=None, median=None, greatest=None)
    low, high = float(values.min()), float(values.max())
    # Values that are all but equal are one bin: there is nothing between them to tell apart.
    if high - low <= 1e-6 * max(abs(high), 1e-30):
        edges = np.array([low, high if high > low else np.nextafter(low, np.inf)])
    else:
        edges = edges_of(low, high)
    counts, edges = np.histogram(values, edges)
    return Histogram(
        edges=edges.tolist(), counts=counts.tolist(), least=low, median=float(np.median(values)), greatest=high
    )


def _norm(values: Sequence[float]) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.linalg.norm(np.array(values, np.float64)))


def _optimizer(described: dict[str, Any]) -> Optimizer:
    slots = {
        name: numbers(value) if isinstance(value, list) else (value if isinstance(value, int) else number(value))
        for name, value in described["slots"].items()
    }
    return Optimizer(optimizer=described["optimizer"], slots=slots)


def _variable(name: str, parts: Mapping[int, tuple[int, ps_pb2.VariableSpec]]) -> Variable:
    held = [parts[partition] for partition in sorted(parts)]
    return Variable(
        name=name,
        floats=sum(spec.size for _, spec in held),
        partitions=len(held),
        owners=[index for index, _ in held],
        optimizer=_in_words(held[0][1].optimizer),
    )


def _table_config(config: ps_pb2.TableConfig, features: Mapping[str, str]) -> TableConfig:
    segments = config.hash_table.entry_config.segments
    return TableConfig(
        name=config.name,
        dim=sum(segment.dim_size for segment in segments),
        segments=[
            Config(
                dim=segment.dim_size,
                optimizer=_in_words(segment.opt_config),
                initializer=_in_words(segment.init_config),
                compressor=_in_words(segment.comp_config),
            )
            for segment in segments
        ],
        features=sorted(feature for feature, table in features.items() if table == config.name),
        config=MessageToDict(config, preserving_proto_field_name=True),
    )


def _in_words(message: Any) -> str:
    """The chosen kind of a config and what is set in it: adagrad(learning_rate=0.05)."""
    kind = message.WhichOneof("type")
    if kind is None:
        return "default"
    fields = [
        f"{field.name}={number(value) if isinstance(value, float) else value}"
        for field, value in getattr(message, kind).ListFields()
        if field.name != "dim_size"
    ]
    return f"{kind}({', '.join(fields)})" if fields else str(kind)
