"""SingleTable: one table with its rates, its filter and its files, as the reference system's table object has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trilith_services.ps.engine.entry_codec import entry_list
from trilith_services.ps.reference.assets import find_restore_base
from trilith_services.ps.reference.delay_compensation import delay_compensated
from trilith_services.ps.reference.entry_files import restore_table, save_table
from trilith_services.ps.reference.fused import integer_ids

if TYPE_CHECKING:
    from trilith.tables import HashTableConfig
    from trilith_services.ps.engine.filters import OccurrenceFilter
    from trilith_services.ps.engine.table import Table
    from trilith_services.ps.reference.scope import Scope

__all__ = ["SingleTable"]


class SingleTable:
    """One table of a model. Writes return the table itself, so they can be chained.

    Attributes:
        name: Unique in the model.
        config: Its config and rates.
        table: The rows.
    """

    def __init__(
        self,
        scope: Scope,
        config: HashTableConfig,
        *,
        hash_filter: OccurrenceFilter | None = None,
        name_suffix: str = "",
        saver_parallel: int = -1,
    ) -> None:
        self._scope = scope
        self._saver_parallel = saver_parallel
        self.config = config
        self.name = scope.take_name(f"MonolithHashTable_{name_suffix}")
        self.table: Table = scope.make_table(self.name, config, hash_filter)

    @property
    def dim_size(self) -> int:
        """Floats per row."""
        return self.table.dim

    @property
    def extra_restore_names(self) -> list[str]:
        """Earlier names, to be tried when the table is restored from an asset directory."""
        return list(self.config.extra_restore_names)

    def learning_rates(self) -> npt.NDArray[np.float32]:
        """float32[segments]: the rates at the model's step."""
        return self.config.call_learning_rate_fns(self._scope.global_step)

    def assign(self, ids: npt.ArrayLike, values: npt.ArrayLike, req_time: int | None = None) -> SingleTable:
        """Set weights; missing rows that pass the filter are created."""
        self.table.assign(integer_ids(ids), self._values(values), request_time=req_time or 0)
        return self

    def assign_add(self, ids: npt.ArrayLike, values: npt.ArrayLike, req_time: int | None = None) -> SingleTable:
        """Add to weights, one id after another."""
        self.table.assign_add(integer_ids(ids), self._values(values), request_time=req_time or 0)
        return self

    def lookup(
        self, ids: npt.ArrayLike, *, use_multi_threads: bool = False, enable_dedup: bool = False
    ) -> npt.NDArray[np.float32]:
        """float32[n, dim]: what each row reads as, zeros where there is none. The options change nothing."""
        return self.table.lookup(integer_ids(ids))

    def lookup_entry(self, ids: npt.ArrayLike) -> list[bytes]:
        """Per id a serialized EntryDump without id, b"" where there is no row."""
        present, rows = self.table.export_rows(integer_ids(ids))
        found = iter(entry_list(self.table.layout, rows, with_id=False))
        return [next(found) if there else b"" for there in present.tolist()]

    def apply_gradients(
        self,
        ids: npt.ArrayLike,
        grads: npt.ArrayLike,
        *,
        learning_rates: npt.ArrayLike | None = None,
        global_step: int = 0,
        use_multi_threads: bool = False,
        enable_dedup: bool = False,
        req_time: int = 0,
    ) -> SingleTable:
        """Take a step per occurrence of an id, or one per id with the sum of its gradients.

        Args:
            ids: int64 or uint64[n].
            grads: float32[n, dim].
            learning_rates: Instead of the config's.
            global_step: For optimizers and readers that use it; schedules read the model's own.
            use_multi_threads: Changes nothing.
            enable_dedup: Sum the gradients of equal ids.
            req_time: Becomes the rows' last update.
        """
        rates = self.learning_rates() if learning_rates is None else np.asarray(learning_rates, np.float32)
        self.table.apply_gradients(
            integer_ids(ids),
            self._values(grads),
            learning_rates=rates,
            global_step=global_step,
            request_time=req_time,
            dedup=enable_dedup,
        )
        return self

    def apply_delayed_gradients(
        self,
        ids: npt.ArrayLike,
        grads: npt.ArrayLike,
        latest: npt.ArrayLike,
        *,
        lambda_: float,
        learning_rates: npt.ArrayLike | None = None,
        global_step: int = 0,
        req_time: int = 0,
    ) -> SingleTable:
        """Take steps by gradients that are compensated for what has happened since their worker read the rows.

        Args:
            ids: int64 or uint64[n], unique.
            grads: float32[n, dim].
            latest: float32[n, dim]: what the worker had read; zeros for a row that was missing.
            lambda_: Strength of the compensation.
            learning_rates: Instead of the config's.
            global_step: For optimizers and readers that use it.
            req_time: Becomes the rows' last update.
        """
        rows, gradients = integer_ids(ids), self._values(grads)
        present, found = self.table.export_rows(rows)
        weights = np.zeros_like(gradients)
        weights[present] = found.weights
        compensated = delay_compensated(gradients, weights, self._values(latest), lambda_)
        return self.apply_gradients(
            rows, compensated, learning_rates=learning_rates, global_step=global_step, req_time=req_time
        )

    def reinitialize(self, ids: npt.ArrayLike, *, request_time: int) -> npt.NDArray[np.int8]:
        """Reset rows; int8[n]: 1 existed, 0 was created."""
        return self.table.reinitialize(integer_ids(ids), request_time=request_time)

    def size(self) -> int:
        """Number of rows."""
        return len(self.table)

    def save(self, basename: str) -> SingleTable:
        """Write the rows to `<basename>-NNNNN-of-NNNNN`; expired ones are left out."""
        save_table(self.table, basename, parallel=self._saver_parallel)
        return self

    def restore(self, basename: str) -> SingleTable:
        """Replace the rows by saved ones."""
        restore_table(self.table, basename)
        return self

    def restore_from_assets(self, directory: str) -> SingleTable:
        """Replace the rows by those saved under the table's own name, or else under the first earlier one."""
        return self.restore(find_restore_base(directory, [self.name, *self.extra_restore_names]))

    def save_as_tensor(self, shard_idx: int, num_shards: int, limit: int, offset: int) -> tuple[int, list[bytes]]:
        """Page through the rows as EntryDumps with ids: the offset of the next page (0 at the start), and this page."""
        rows, new_offset = self.table.scan(shard_idx, num_shards, limit, offset)
        return new_offset, entry_list(self.table.layout, rows)

    def _values(self, values: npt.ArrayLike) -> npt.NDArray[np.float32]:
        array = np.ascontiguousarray(values, np.float32)
        # An empty list has no width of its own.
        return array if array.size else array.reshape(0, self.dim_size)
