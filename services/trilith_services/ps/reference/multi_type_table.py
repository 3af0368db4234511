"""MultiTypeTable: a dict of single tables behind the interface of one object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trilith.errors import InvalidRequestError
from trilith_services.ps.reference.assets import asset_base
from trilith_services.ps.reference.fused import FusedTables
from trilith_services.ps.reference.single_table import SingleTable

if TYPE_CHECKING:
    from trilith.tables import HashTableConfig
    from trilith_services.ps.engine.filters import OccurrenceFilter
    from trilith_services.ps.engine.table import Table
    from trilith_services.ps.reference.scope import Scope

__all__ = ["MultiTypeTable"]

Floats = npt.NDArray[np.float32]
Update = tuple[npt.ArrayLike, npt.ArrayLike]


class MultiTypeTable(FusedTables):
    """Single tables by name, named after it in the scope; everything flat is in the order of the sorted names.

    Attributes:
        tables: By sorted name.
    """

    def __init__(
        self, scope: Scope, configs: Mapping[str, HashTableConfig], *, hash_filter: OccurrenceFilter | None = None
    ) -> None:
        self.tables = {
            name: SingleTable(scope, configs[name], hash_filter=hash_filter, name_suffix=name)
            for name in sorted(configs)
        }

    @property
    def names(self) -> list[str]:
        """Of the tables, sorted."""
        return list(self.tables)

    @property
    def rows(self) -> list[Table]:
        """The tables' rows, by sorted name."""
        return [table.table for table in self.tables.values()]

    def learning_rates(self) -> Floats:
        """float32[segments of all tables]: the rates at the model's step, by sorted name."""
        return np.concatenate([table.learning_rates() for table in self.tables.values()])

    def lookup(self, ids: Mapping[str, npt.ArrayLike]) -> dict[str, Floats]:
        """float32[n, dim] for each requested name."""
        return {name: self._table(name).lookup(wanted) for name, wanted in ids.items()}

    def assign(self, updates: Mapping[str, Update], req_time: int = 0) -> MultiTypeTable:
        """Set weights."""
        for name, (ids, values) in sorted(updates.items()):
            self._table(name).assign(ids, values, req_time)
        return self

    def assign_add(self, updates: Mapping[str, Update], req_time: int = 0) -> MultiTypeTable:
        """Add to weights."""
        for name, (ids, values) in sorted(updates.items()):
            self._table(name).assign_add(ids, values, req_time)
        return self

    def apply_gradients(
        self, updates: Mapping[str, Update], *, global_step: int = 0, req_time: int = 0
    ) -> MultiTypeTable:
        """Take a step per occurrence of an id, at the rates of the configs."""
        for name, (ids, grads) in sorted(updates.items()):
            self._table(name).apply_gradients(ids, grads, global_step=global_step, req_time=req_time)
        return self

    def reinitialize(self, name: str, ids: npt.ArrayLike, *, request_time: int) -> npt.NDArray[np.int8]:
        """Not offered for tables of several types."""
        raise NotImplementedError("a table of several types cannot reinitialize rows; use a MultiTable")

    def save(self, directory: str) -> MultiTypeTable:
        """Write every table's files into the directory, under the tables' own names."""
        for table in self.tables.values():
            table.save(asset_base(directory, table.name))
        return self

    def restore(self, directory: str) -> MultiTypeTable:
        """Replace every table's rows by those saved in the directory under its own or an earlier name."""
        for table in self.tables.values():
            table.restore_from_assets(directory)
        return self

    def size(self) -> dict[str, int]:
        """Rows by table."""
        return {name: table.size() for name, table in self.tables.items()}

    def _table(self, name: str) -> SingleTable:
        if name not in self.tables:
            raise InvalidRequestError(f"no table {name!r}; there are {self.names}")
        return self.tables[name]
