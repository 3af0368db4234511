"""Replica: serving rows of one shard, kept fresh by the pushes of a training PS."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc
import numpy as np
from google.protobuf import json_format

from trilith.config import LARGEST_MESSAGE
from trilith.errors import ClusterMismatchError, InvalidRequestError
from trilith.shard import DensePart, Float32Array
from trilith.steps import as_step
from trilith.tables import check_table_config
from trilith.tables.checks import check_optimizer
from trilith_proto import hash_table_pb2, parameter_sync_pb2, ps_pb2
from trilith_services.ps.engine.row_layout import serving_config
from trilith_services.ps.engine.store import Store
from trilith_services.ps.engine.table import Table
from trilith_services.ps.replicas.sync import wire

__all__ = ["Replica", "read_configs"]

log = logging.getLogger(__name__)

_UNKNOWN_STREAM = grpc.StatusCode.FAILED_PRECONDITION.value[0]
_LATE = grpc.StatusCode.ABORTED.value[0]
_MOST_AHEAD_S = 86400.0  # clocks of training and serving may differ, but not by more
_Store = TypeVar("_Store", bound=Store)
_MOST_FLOATS = LARGEST_MESSAGE // 4  # of a partition of a dense variable


@dataclass(slots=True)
class _Gathered:
    """A partition of a dense variable that has not arrived whole: its first floats are `filled`."""

    values: Float32Array
    filled: int = 0


class Replica(Generic[_Store]):
    """Takes pushes into a Store; thread-safe, one push at a time.

    A row's last update is the time at which the copy of its table began that it came with or after. That tells, when a
    copy ends, which rows it did not bring.
    """

    def __init__(
        self,
        store: _Store,
        *,
        configs: Iterable[ps_pb2.TableConfig] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Fill `store`.

        Args:
            store: Empty, of the same index and count as the training PS.
            configs: Serving configs of tables that shall be stored in another way than their training config says.
            clock: Unix seconds.
        """
        self.store = store
        self.complete = threading.Event()
        self._configs = {config.name: config for config in configs}
        self._clock = clock
        self._lock = threading.Lock()
        self._stream = 0
        self._sequence = 0
        self._began: dict[str, int] = {}  # by table when its latest copy began, above the time of any row before
        self._copying: set[str] = set()
        self._replacing: dict[str, Table] = {}  # tables of a new config, not served before their copy ends
        self._pieces: dict[tuple[str, int], _Gathered] = {}
        self._stats = ps_pb2.ReplicaStats()

    @property
    def stats(self) -> ps_pb2.ReplicaStats:
        """What has been taken."""
        found = ps_pb2.ReplicaStats()
        with self._lock:
            found.CopyFrom(self._stats)
            found.copying = bool(self._copying) or not self._stream
        return found

    def push(self, data: bytes) -> parameter_sync_pb2.PushResponse:
        """Do what an encoded PushRequest says.

        Raises:
            ClusterMismatchError: It comes from another shard.
            InvalidRequestError: It is damaged, or does not fit its tables; nothing was changed.
            MemoryLimitError: There is no room for its rows; some may have been written.
        """
        header, deltas = wire.unpack_push(data)
        self._check_sender(header)
        as_step(header.global_step)
        with self._lock:
            begins = header.stream_begins and header.stream != self._stream
            if not begins and header.stream != self._stream:
                return self._answer(_UNKNOWN_STREAM, f"stream {header.stream:#x} did not begin here")
            if not begins and header.sequence <= self._sequence:
                # An attempt that was given up, and comes after one that was not: its rows are old.
                return self._answer(_LATE, f"push {header.sequence} comes after push {self._sequence}")
            self._check_header(header)
            self._check_variables(header.delta_variables)
            kept = set(header.inventory.tables) if header.HasField("inventory") else set(self.store.tables)
            if (missing := self._check_deltas(deltas, kept)) is not None:
                self._stream = 0
                return self._answer(_UNKNOWN_STREAM, f"no table {missing!r}: its full copy did not begin")
            if begins:
                self._begin(header.stream)
            self._sequence = header.sequence
            if header.HasField("inventory"):
                self._keep(header.inventory)
            done = 0
            for delta in deltas:
                done += self._change(self._table_for(delta), delta)
            for piece in header.delta_variables:
                self._set_variable(piece)
            if header.global_step:
                self.store.global_step(set_to=header.global_step)
            self._stats.pushes += 1
            if header.HasField("as_of"):
                if not self.complete.is_set():
                    log.info("the first full copy is complete", extra={"tables": sorted(self.store.tables)})
                self._stats.as_of = header.as_of
                self.complete.set()
            return self._answer(0, "", done)

    def _answer(self, status: int, message: str, done: int = 0) -> parameter_sync_pb2.PushResponse:
        return parameter_sync_pb2.PushResponse(
            status_code=status, error_message=message, update_num=done, incarnation=self.store.incarnation
        )

    def _check_sender(self, header: parameter_sync_pb2.PushRequest) -> None:
        if (header.shard_index, header.shard_count) != (self.store.index, self.store.count):
            raise ClusterMismatchError(
                f"this replica serves shard {self.store.index} of {self.store.count}; the push comes from shard "
                f"{header.shard_index} of {header.shard_count}"
            )
        if header.model_name and header.model_name.rpartition(":")[2] != f"ps_{self.store.index}":
            raise ClusterMismatchError(f"this replica serves ps_{self.store.index}; the push is of {header.model_name}")

    # ---- whatever could be refused, before anything is changed -------------------------------------------------------

    def _check_header(self, header: parameter_sync_pb2.PushRequest) -> None:
        if not header.stream:
            raise InvalidRequestError("a push of stream 0; streams have numbers above")
        if header.signature_name not in ("", wire.SIGNATURE):
            raise InvalidRequestError(f"signature {header.signature_name!r} is not {wire.SIGNATURE!r}")
        if header.global_step < 0:
            raise InvalidRequestError(f"global_step={header.global_step} is below 0")
        most = self._clock() + _MOST_AHEAD_S
        if not 0 <= header.as_of <= most:  # NaN is not, either
            raise InvalidRequestError(f"as_of={header.as_of} is no time up to now, which is {self._clock():.0f}")

    def _check_deltas(self, deltas: Iterable[wire.Delta], kept: Container[str]) -> str | None:
        """The name of a table whose copy did not begin, if there is one."""
        dims: dict[str, int] = {}
        for delta in deltas:
            if delta.copy_begins:
                dims[delta.table] = _dim_of(self._config_for(delta))
            elif delta.table not in dims:
                table = self._replacing.get(delta.table, self.store.tables.get(delta.table))
                if table is None or delta.table not in self._began or delta.table not in kept:
                    return delta.table
                dims[delta.table] = table.dim
            if delta.dim != dims[delta.table]:
                raise InvalidRequestError(
                    f"table {delta.table!r} has rows of {dims[delta.table]} floats here and of {delta.dim} in the push"
                )
        return None

    def _config_for(self, delta: wire.Delta) -> ps_pb2.TableConfig:
        """How a table is kept whose copy begins."""
        if delta.config is None:
            raise InvalidRequestError(f"table {delta.table!r}: a full copy begins without a config")
        if delta.config.name != delta.table:
            raise InvalidRequestError(f"table {delta.table!r}: its config is of table {delta.config.name!r}")
        config = self._configs.get(delta.table) or serving_config(delta.config)
        check_table_config(config)
        return config

    def _check_variables(self, pieces: Iterable[parameter_sync_pb2.DeltaVariable]) -> None:
        known = {key: (piece.filled, piece.values.size) for key, piece in self._pieces.items()}
        for piece in pieces:
            spec = piece.spec
            key = spec.name, spec.partition
            where = f"variable {spec.name!r} partition {spec.partition}"
            if not spec.name or not 0 < spec.size <= _MOST_FLOATS:
                raise InvalidRequestError(f"{where} of {spec.size} floats: it takes a name, and 1 to {_MOST_FLOATS}")
            check_optimizer(f"variable {spec.name!r}", spec.optimizer, spec.size)
            expected = known.get(key) if piece.offset else (0, spec.size)
            end = piece.offset + len(piece.values) // 4
            if expected != (piece.offset, spec.size) or len(piece.values) % 4 or end > spec.size:
                raise InvalidRequestError(
                    f"{where}: floats {piece.offset}..{end} of {spec.size} ({len(piece.values)} bytes) not expected"
                )
            known[key] = end, spec.size

    def _begin(self, stream: int) -> None:
        self._stream, self._sequence = stream, 0
        self._copying.clear()
        self._replacing.clear()
        self._pieces.clear()

    def _keep(self, inventory: parameter_sync_pb2.Inventory) -> None:
        for name in set(self.store.tables) - set(inventory.tables):
            self.store.drop_table(name)
        self._copying &= set(inventory.tables)
        self.store.variables.keep({(each.name, each.partition) for each in inventory.variables})

    # ---- rows --------------------------------------------------------------------------------------------------------

    def _table_for(self, delta: wire.Delta) -> Table:
        if delta.copy_begins:
            self._begin_copy(delta)
        replacing = self._replacing.get(delta.table)
        return replacing if replacing is not None else self.store.table(delta.table)

    def _begin_copy(self, delta: wire.Delta) -> None:
        config = self._config_for(delta)
        # Not `or`: an empty table is false.
        table = self._replacing.get(delta.table, self.store.tables.get(delta.table))
        if table is None or table.config != config:
            table = self.store.new_table(config)
            if delta.table in self.store.tables:
                self._replacing[delta.table] = table
            else:
                self.store.put_table(table)
        self._began[delta.table] = max(int(self._clock()), table.newest_update + 1)
        self._copying.add(delta.table)

    def _change(self, table: Table, delta: wire.Delta) -> int:
        if len(delta.ids):
            table.assign(delta.ids, delta.weights, request_time=self._began[delta.table])
        if len(delta.erased):
            table.erase(delta.erased)
        self._stats.rows += len(delta.ids)
        self._stats.erased += len(delta.erased)
        if delta.copy_ends:
            self._copying.discard(delta.table)
            replacing = self._replacing.pop(delta.table, None)
            if replacing is not None:
                self.store.put_table(replacing)
            dropped = table.erase_before(self._began[delta.table])
            log.info("table copied", extra={"table": delta.table, "rows": len(table), "dropped": dropped})
        return len(delta.ids) + len(delta.erased)

    # ---- dense variables ---------------------------------------------------------------------------------------------

    def _set_variable(self, piece: parameter_sync_pb2.DeltaVariable) -> None:
        """Gather the pieces of a partition, and set it when it is whole."""
        spec = piece.spec
        key = spec.name, spec.partition
        if piece.offset == 0:
            self._pieces[key] = _Gathered(np.empty(spec.size, np.float32))
        gathered = self._pieces[key]
        values = gathered.values
        part = np.frombuffer(piece.values, "<f4")
        values[piece.offset : piece.offset + len(part)] = part
        gathered.filled = piece.offset + len(part)
        if gathered.filled < len(values):
            return
        del self._pieces[key]
        variables = self.store.variables
        if any(each.spec != spec for each in variables if (each.spec.name, each.spec.partition) == key):
            variables.keep({each for each in ((p.spec.name, p.spec.partition) for p in variables) if each != key})
        if not variables.create([spec], [values])[0]:
            variables.assign([DensePart(*key, values)])


def _dim_of(config: ps_pb2.TableConfig) -> int:
    return sum(segment.dim_size for segment in config.hash_table.entry_config.segments)


def read_configs(text: str) -> list[ps_pb2.TableConfig]:
    """Read a JSON list of TableConfigs, each of a serving table.

    Raises:
        InvalidRequestError: It is none.
    """
    try:
        content = json.loads(text)
        configs = [json_format.ParseDict(each, ps_pb2.TableConfig()) for each in content]
    except (ValueError, TypeError, json_format.ParseError) as error:
        raise InvalidRequestError(f"no JSON list of table configs: {error}") from None
    for config in configs:
        check_table_config(config)
        if config.hash_table.entry_config.entry_type != hash_table_pb2.EntryConfig.SERVING:
            raise InvalidRequestError(f"table {config.name!r}: a replica holds SERVING rows, not TRAINING ones")
    return configs
