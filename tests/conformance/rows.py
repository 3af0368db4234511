"""Kinds about single rows, from optimizer to retriever; each runs a Table in which a row's name is an id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.conformance.configs import floats, hash_table_config
from tests.conformance.runner import Kind
from trilith.tables.spec import seed_of
from trilith_proto import hash_table_pb2, ps_pb2
from trilith_services.ps.engine.entry_codec import decode_entries, entry_list
from trilith_services.ps.engine.kernels import codecs
from trilith_services.ps.engine.rows import Rows
from trilith_services.ps.engine.table import Table
from trilith_services.ps.reference.delay_compensation import delay_compensated

__all__ = ["Compressor", "Entry", "EntryDefs", "Initializer", "Optimizer", "Quantizer", "Retriever"]


def build_table(config: Mapping[str, Any], name: str = "rows") -> Table:
    """The table of a vector's config, which lists segments or describes a single one itself."""
    if "segments" not in config:
        config = {**config, "segments": [config]}
    hash_table = hash_table_config(config).table_config
    return Table(ps_pb2.TableConfig(name=name, seed=seed_of(name), hash_table=hash_table))


class RowKind(Kind):
    """Rows by name in one table."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = self.make_table()
        self.ids: dict[str, int] = {}

    def make_table(self) -> Table:
        return build_table(self.config)

    def id_of(self, row: str) -> np.ndarray:
        return np.array([self.ids.setdefault(row, len(self.ids) + 1)], np.uint64)

    def export(self, row: str) -> Rows:
        present, rows = self.table.export_rows(self.id_of(row))
        if not present.all():
            raise KeyError(f"row {row!r} has not been written")
        return rows

    def fresh(self, row: str) -> Rows:
        """The row, made if it does not exist."""
        if not self.table.contains(self.id_of(row)).all():
            self.op_init(row)
        return self.export(row)

    def dump(self, row: str) -> hash_table_pb2.EntryDump:
        (entry,) = entry_list(self.table.layout, self.export(row))
        return hash_table_pb2.EntryDump.FromString(entry)

    def op_init(self, row: str = "a") -> None:
        self.table.reinitialize(self.id_of(row), request_time=0)

    def op_optimize(
        self,
        grad: Sequence[float],
        row: str = "a",
        learning_rates: Sequence[float] | None = None,
        global_step: int = 0,
    ) -> None:
        self.table.apply_gradients(
            self.id_of(row),
            np.array([floats(grad)], np.float32),
            learning_rates=None if learning_rates is None else np.array(learning_rates, np.float32),
            global_step=global_step,
        )

    def op_value(self, row: str = "a") -> np.ndarray:
        return self.export(row).weights[0]

    def op_fill(self, row: str = "a") -> np.ndarray:
        return self.table.lookup(self.id_of(row))[0]

    def op_assign(self, values: Sequence[float], row: str = "a") -> None:
        self.table.assign(self.id_of(row), self._leading(values, self.fresh(row)))

    def op_assign_add(self, values: Sequence[float], row: str = "a") -> None:
        zeros = np.zeros_like(self.fresh(row).weights)
        self.table.assign_add(self.id_of(row), self._leading(values, None, zeros))

    def _leading(self, values: Sequence[float], rows: Rows | None, base: np.ndarray | None = None) -> np.ndarray:
        """Only as many leading weights as given, of as many as there are."""
        whole = rows.weights if rows is not None else base
        given = np.array(floats(list(values)), np.float32)[: self.table.dim]
        whole[0, : given.size] = given
        return whole


class Optimizer(RowKind):
    def op_optimize_with_latest(
        self,
        grad: Sequence[float],
        latest: Sequence[float],
        row: str = "a",
        learning_rates: Sequence[float] | None = None,
        global_step: int = 0,
    ) -> None:
        (gradient,) = delay_compensated(
            np.array([grad], np.float32),
            self.export(row).weights,
            np.array([latest], np.float32),
            self.config["dc"].get("lambda_", 0.0),
        )
        self.op_optimize(gradient.tolist(), row, learning_rates, global_step)

    def op_state(self, field: str, row: str = "a", segment: int = 0) -> Any:
        single = self.dump(row).opt.dump[segment]
        value = getattr(getattr(single, single.WhichOneof("type")), field)
        return value if isinstance(value, (int, float)) else list(value)

    def op_restore_state(self, src: str, dst: str) -> None:
        rows = decode_entries(self.table.layout, [self.dump(src).SerializeToString()])
        weights = np.zeros_like(rows.weights)
        self.table.import_rows(Rows(self.id_of(dst), weights, rows.state, rows.last_update))

    def op_copy_value(self, src: str, dst: str) -> None:
        rows = self.fresh(dst)
        self.table.import_rows(Rows(rows.ids, self.export(src).weights, rows.state, rows.last_update))

    def op_dim(self) -> int:
        return self.table.dim

    def op_size_bytes(self) -> int:
        return 4 * self.table.layout.state_floats


class Entry(RowKind):
    def op_dim(self) -> int:
        return self.table.dim

    def op_slice_count(self) -> int:
        if self.table.layout.serving:
            raise ValueError("a serving row has no optimizer slices")
        return self.table.segments

    op_slice_size = op_slice_count

    def op_save(self, row: str = "a") -> list[float]:
        return list(self.dump(row).num)

    def op_save_restore(self, src: str, dst: str, timestamp: int = 0) -> int:
        rows = self.export(src)
        stamped = Rows(rows.ids, rows.weights, rows.state, np.array([timestamp], np.uint32))
        self.restore(entry_list(self.table.layout, stamped)[0], dst)
        return self.op_timestamp(dst)

    def op_restore_num(self, dst: str, num: Sequence[float], timestamp: int = 0) -> None:
        entry = hash_table_pb2.EntryDump(id=0, num=floats(num), last_update_ts_sec=timestamp)
        self.restore(entry.SerializeToString(), dst)

    def restore(self, entry: bytes, dst: str) -> None:
        rows = decode_entries(self.table.layout, [entry])
        self.table.import_rows(Rows(self.id_of(dst), rows.weights, rows.state, rows.last_update))

    def op_timestamp(self, row: str = "a") -> int:
        return int(self.export(row).last_update[0])

    def op_size_bytes(self) -> int:
        layout = self.table.layout
        return layout.stored_bytes if layout.serving else 4 * (layout.dim + layout.state_floats)


class EntryDefs(RowKind):
    """A row of `length` bytes: its floats, then its time."""

    def make_table(self) -> Table:
        return build_table({"dim": (self.config["length"] - 4) // 4})

    def op_capacity(self) -> int:
        return 4 * self.table.dim

    def op_set_float(self, value: float) -> None:
        rows = self.fresh("a")
        rows.weights[0, 0] = value
        self.table.import_rows(rows)

    def op_float(self) -> float:
        return float(self.export("a").weights[0, 0])

    def op_set_timestamp(self, value: int) -> None:
        rows = self.fresh("a")
        rows.last_update[0] = value
        self.table.import_rows(rows)

    def op_timestamp(self) -> int:
        return int(self.export("a").last_update[0])


class Compressor(RowKind):
    """Serving rows: what is stored is what the codecs make of the values."""

    def make_table(self) -> Table:
        return build_table({**self.config, "entry_type": "SERVING"})

    def op_encode_decode(self, values: Sequence[float]) -> np.ndarray:
        self.op_assign(values)
        return self.op_fill()

    def op_size_bytes(self) -> int:
        return self.table.layout.stored_bytes

    def op_dim(self) -> int:
        return self.table.dim


class Quantizer(RowKind):
    """One weight behind a reader. Its optimizer keeps the gradient that the reader passes on as the new weight."""

    def make_table(self) -> Table:
        passes = {"type": "moving_average", "momentum": 0.0}
        return build_table({"dim": 1, "opt": passes, "comp": dict(self.config)})

    def op_scale(self) -> float:
        return float(self.table.layout.segments[0].codec_parameters[1])

    def op_forward(self, value: float) -> float:
        self.table.assign(self.id_of("a"), np.array([[floats(value)]], np.float32))
        return float(self.op_fill()[0])

    op_quantize = op_forward

    def op_abs_error(self, value: float) -> float:
        return abs(self.op_forward(value) - value)

    def op_backward(self, value: float, grad: float, global_step: int = 0) -> float:
        self.op_forward(value)
        self.op_optimize([grad], learning_rates=[1.0], global_step=global_step)
        return float(self.op_value()[0])


class Initializer(RowKind):
    def op_dim(self) -> int:
        return self.table.dim

    def op_initialize(self) -> np.ndarray:
        self.op_init("a")
        return self.op_value()

    def op_max(self) -> float:
        return float(self.op_value().max())

    def op_min(self) -> float:
        return float(self.op_value().min())

    def op_mean(self) -> float:
        return float(self.op_value().mean(dtype=np.float64))


class Retriever(RowKind):
    """Rows of random weights, and what a lookup makes of them."""

    def make_table(self) -> Table:
        segments = [{**each, "opt": {"type": "moving_average", "momentum": 0.0}} for each in self.config["segments"]]
        return build_table({"segments": segments})

    def _read(self, segment: int) -> tuple[np.ndarray, np.ndarray]:
        weights = np.random.default_rng(7).uniform(-1, 1, (1, self.table.dim)).astype(np.float32)
        self.table.assign(self.id_of("a"), weights)
        layout = self.table.layout.segments[segment]
        columns = slice(layout.weight_offset, layout.weight_offset + layout.dim)
        return weights[0, columns], self.op_fill()[columns]

    def op_read_error(self, segment: int = 0) -> float:
        weights, read = self._read(segment)
        return float(np.abs(weights - read).max())

    def op_tanh_error(self, segment: int | None = None) -> float:
        if segment is None:
            kinds = [each.codec for each in self.table.layout.segments]
            segment = kinds.index(codecs.ONE_BIT)
        weights, read = self._read(segment)
        amplitude, scale = self.table.layout.segments[segment].codec_parameters.astype(np.float64)
        return float(np.abs(amplitude * np.tanh(scale * weights) - read).max())

    def op_backward(self, value: float, grad: float, global_step: int = 0, segment: int = 0) -> float:
        self.table.assign(self.id_of("a"), np.full((1, self.table.dim), value, np.float32))
        self.op_optimize([grad] * self.table.dim, global_step=global_step)
        return float(self.op_value()[self.table.layout.segments[segment].weight_offset])

    def op_forward(self, value: float, segment: int = 0) -> float:
        self.table.assign(self.id_of("a"), np.full((1, self.table.dim), value, np.float32))
        return float(self.op_fill()[self.table.layout.segments[segment].weight_offset])
