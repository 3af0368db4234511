"""MultiTable: many named tables behind one object, with one filter and one set of files.

Everything flat is in the order of the sorted names. Three rules are the reference system's and easily surprise:
assigning sets the rows' time to 0, adding asks the filter about ids that have rows too, and when rows expire on saving
is said by the first table that says so at all. `strict=True` does without the three.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith_proto import hash_table_pb2
from trilith_services.ps.reference.entry_files import restore_tables, save_tables
from trilith_services.ps.reference.fused import FusedTables, integer_ids

if TYPE_CHECKING:
    from trilith.tables import HashTableConfig
    from trilith_services.ps.engine.filters import OccurrenceFilter
    from trilith_services.ps.engine.table import Table
    from trilith_services.ps.reference.scope import Scope

__all__ = ["MultiTable"]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.uint64]
Update = tuple[npt.ArrayLike, npt.ArrayLike]


class MultiTable(FusedTables):
    """Tables by name; missing names in a call mean no ids.

    Attributes:
        name: Unique in the model.
        names: Of the tables, sorted.
        tables: The rows, in that order.
    """

    def __init__(
        self,
        scope: Scope,
        configs: Mapping[str, HashTableConfig],
        *,
        hash_filter: OccurrenceFilter | None = None,
        name_suffix: str = "",
        saver_parallel: int = -1,
        strict: bool = False,
    ) -> None:
        if not configs:
            raise InvalidRequestError("a multi-table needs at least one table")
        self._scope = scope
        self._saver_parallel = saver_parallel
        self._strict = strict
        self.name = scope.take_name(f"MonolithMultiHashTable_{name_suffix}")
        self.names = sorted(configs)
        self.configs = {name: configs[name] for name in self.names}
        self.tables: dict[str, Table] = {
            name: scope.make_table(name, config, hash_filter) for name, config in self.configs.items()
        }

    @property
    def rows(self) -> list[Table]:
        """The tables' rows, by sorted name."""
        return list(self.tables.values())

    def learning_rates(self) -> Floats:
        """float32[segments of all tables]: the rates at the model's step, by sorted name."""
        step = self._scope.global_step
        return np.concatenate([config.call_learning_rate_fns(step) for config in self.configs.values()])

    # ---- by name -----------------------------------------------------------------------------------------------

    def lookup(self, ids: Mapping[str, npt.ArrayLike]) -> dict[str, Floats]:
        """float32[n, dim] for each requested name."""
        return {name: self._table(name).lookup(integer_ids(wanted)) for name, wanted in ids.items()}

    def assign(self, updates: Mapping[str, Update], req_time: int = 0) -> MultiTable:
        """Set weights. The rows' time becomes 0 (`req_time` if strict)."""
        for table, ids, values in self._updates(updates).values():
            table.assign(ids, values, request_time=req_time if self._strict else 0)
        return self

    def assign_add(self, updates: Mapping[str, Update], req_time: int = 0) -> MultiTable:
        """Add to weights. The filter is asked about every id (only about those without rows if strict)."""
        for table, ids, values in self._updates(updates).values():
            table.assign_add(ids, values, request_time=req_time, filter_present=not self._strict)
        return self

    def apply_gradients(self, updates: Mapping[str, Update], *, global_step: int = 0, req_time: int = 0) -> MultiTable:
        """Take a step per occurrence of an id, at the rates of the configs."""
        for name, (table, ids, grads) in self._updates(updates).items():
            table.apply_gradients(
                ids,
                grads,
                learning_rates=self.configs[name].call_learning_rate_fns(self._scope.global_step),
                global_step=global_step,
                request_time=req_time,
            )
        return self

    def reinitialize(self, name: str, ids: npt.ArrayLike, *, request_time: int) -> npt.NDArray[np.int8]:
        """Reset rows; int8[n]: 1 existed, 0 was created, -1 for all if there is no such table."""
        rows = integer_ids(ids)
        if name not in self.tables:
            return np.full(rows.size, -1, np.int8)
        return self.tables[name].reinitialize(rows, request_time=request_time)

    # ---- flat --------------------------------------------------------------------------------------------------

    def raw_lookup(self, ids: npt.ArrayLike, splits: npt.ArrayLike) -> Floats:
        """Look up ragged ids.

        Args:
            ids: int64 or uint64[n]: of the first table, of the second, ...; for R requests, request after request.
            splits: int[R * K + 1], where each table's ids begin in each request.

        Returns:
            float32[total]: rows in the same order.
        """
        flat = integer_ids(ids)
        bounds = self._bounds(splits, flat.size, stacked=True)
        pieces = [
            table.lookup(flat[bounds[i] : bounds[i + 1]]).reshape(-1)
            for i, table in enumerate(list(self.tables.values()) * ((bounds.size - 1) // len(self.names)))
        ]
        return np.concatenate(pieces)

    def raw_assign(self, ids: npt.ArrayLike, splits: npt.ArrayLike, values: npt.ArrayLike) -> MultiTable:
        """Set weights: ragged ids as in `raw_lookup`, float32[total] values table after table."""
        return self.assign(self._named(ids, splits, values))

    def raw_assign_add(
        self, ids: npt.ArrayLike, splits: npt.ArrayLike, values: npt.ArrayLike, req_time: int = 0
    ) -> MultiTable:
        """Add to weights, arguments as for `raw_assign`."""
        return self.assign_add(self._named(ids, splits, values), req_time)

    def raw_apply_gradients(
        self,
        ids: npt.ArrayLike,
        splits: npt.ArrayLike,
        grads: npt.ArrayLike,
        *,
        learning_rates: npt.ArrayLike | None = None,
        global_step: int = 0,
        req_time: int = 0,
    ) -> MultiTable:
        """Take a step per occurrence of an id.

        Args:
            ids: As in `raw_lookup`.
            splits: int[K + 1].
            grads: float32[total], table after table.
            learning_rates: float32[segments of all tables], table after table; None takes the configs'.
            global_step: For optimizers and readers that use it.
            req_time: Becomes the rows' last update.
        """
        rates = self.learning_rates() if learning_rates is None else np.asarray(learning_rates, np.float32)
        wanted = sum(table.segments for table in self.tables.values())
        if rates.size < wanted:
            raise InvalidRequestError(f"{rates.size} learning rates for {wanted} segments")
        cursor = 0
        for table, rows, gradients in self._updates(self._named(ids, splits, grads)).values():
            table.apply_gradients(
                rows,
                gradients,
                learning_rates=rates[cursor : cursor + table.segments],
                global_step=global_step,
                request_time=req_time,
            )
            cursor += table.segments
        return self

    # ---- files -------------------------------------------------------------------------------------------------

    def save(self, basename: str) -> MultiTable:
        """Write all tables' rows into one set of files, with row counts beside them."""
        save_tables(self.tables, basename, parallel=self._saver_parallel, expire=self._save_expiry())
        return self

    def restore(self, basename: str) -> MultiTable:
        """Read saved rows into the tables of the same names; nothing is cleared."""
        restore_tables(self.tables, basename)
        return self

    def size(self) -> dict[str, int]:
        """Rows by table."""
        return {name: len(table) for name, table in self.tables.items()}

    # ---- inside ------------------------------------------------------------------------------------------------

    def _save_expiry(self) -> hash_table_pb2.SlotExpireTimeConfig | None:
        if self._strict:
            return None
        configs = (table.config.hash_table.slot_expire_time_config for table in self.tables.values())
        given = (config for config in configs if config.ByteSize())
        return next(given, hash_table_pb2.SlotExpireTimeConfig())

    def _table(self, name: str) -> Table:
        if name not in self.tables:
            raise InvalidRequestError(f"{self.name} has no table {name!r}; it has {self.names}")
        return self.tables[name]

    def _updates(self, updates: Mapping[str, Update]) -> dict[str, tuple[Table, Ids, Floats]]:
        """Checked updates by sorted name: nothing is written if one is wrong."""
        checked = {}
        for name in sorted(updates):
            table = self._table(name)
            ids, values = integer_ids(updates[name][0]), np.ascontiguousarray(updates[name][1], np.float32)
            if values.size != ids.size * table.dim:
                raise InvalidRequestError(
                    f"table {name!r}: values of shape {values.shape} for {ids.size} ids of dim {table.dim}"
                )
            checked[name] = (table, ids, values.reshape(ids.size, table.dim))
        return checked

    def _bounds(self, splits: npt.ArrayLike, ids: int, *, stacked: bool = False) -> npt.NDArray[np.int64]:
        bounds = np.asarray(splits, np.int64).reshape(-1)
        tables = len(self.names)
        requests = (bounds.size - 1) // tables
        if bounds.size != requests * tables + 1 or requests < 1 or (requests > 1 and not stacked):
            raise InvalidRequestError(f"{bounds.size} row splits for {tables} tables; {tables + 1} are due")
        if bounds[0] != 0 or bounds[-1] != ids or (np.diff(bounds) < 0).any():
            raise InvalidRequestError(f"row splits {bounds.tolist()} do not cut {ids} ids")
        return bounds

    def _named(self, ids: npt.ArrayLike, splits: npt.ArrayLike, values: npt.ArrayLike) -> dict[str, Update]:
        """Ragged ids and flat values by name."""
        flat, floats = integer_ids(ids), np.ascontiguousarray(values, np.float32).reshape(-1)
        bounds = self._bounds(splits, flat.size)
        wanted = int((np.diff(bounds) * self.dims).sum())
        if floats.size < wanted:
            raise InvalidRequestError(f"{floats.size} values; the ids and dims make {wanted}")
        named: dict[str, Update] = {}
        cursor = 0
        for i, (name, dim) in enumerate(zip(self.names, self.dims, strict=True)):
            rows = flat[bounds[i] : bounds[i + 1]]
            named[name] = rows, floats[cursor : cursor + rows.size * dim]
            cursor += rows.size * dim
        return named
