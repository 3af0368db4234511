"""Named tables spread over a cluster: what a model's features are looked up in, one request per PS and step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trilith.batches import WriteOptions
from trilith.errors import InvalidRequestError
from trilith.steps import as_step
from trilith.tables.config import HashTableConfig
from trilith.tables.spec import TableSpec

if TYPE_CHECKING:
    from trilith.rows import Rows

__all__ = ["DistributedTables", "TableLike", "as_specs"]

Floats = npt.NDArray[np.float32]
TableLike = HashTableConfig | TableSpec
"""A config, or a spec that adds a seed, thresholds and a filter to it."""


def as_specs(configs: Mapping[str, TableLike], *, prefix: str = "") -> dict[str, TableSpec]:
    """Specs by sorted name; the tables of a cluster are called `prefix` and the name."""
    specs = {}
    for name in sorted(configs):
        config = configs[name]
        if isinstance(config, HashTableConfig):
            specs[name] = TableSpec.of_config(prefix + name, config)
        elif config.name == prefix + name:
            specs[name] = config
        else:
            raise InvalidRequestError(f"the spec of table {prefix + name!r} is called {config.name!r}")
    return specs


class DistributedTables:
    """Tables by name, each spread over all PS by the owner of its ids.

    A lookup is one request per PS, whatever the number of tables, and so is a write. Each id travels once: gradients of
    repeated ids are added up, in float32, and rows are handed out to all places that asked. Learning rates are
    evaluated once per update, at its step. Results do not depend on the number of PS.

    Args:
        client: An open cluster; `local://` keeps the tables in this process, `trilith.peers` in the workers.
        configs: By name.
        prefix: Goes before the names to make them those of the cluster's tables.
        transfer_float16: Whether rows and gradients travel as float16; None: as the client was opened.
        timeout_s: Deadline of a call; None takes the client's.
    """

    def __init__(
        self,
        client: Rows,
        configs: Mapping[str, TableLike],
        *,
        prefix: str = "",
        transfer_float16: bool | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if not configs:
            raise InvalidRequestError("tables by name need at least one name")
        self._client = client
        self._specs = as_specs(configs, prefix=prefix)
        client.create_tables(list(self._specs.values()))
        self._batches = client.batches(float16=transfer_float16)
        self._timeout_s = timeout_s

    @property
    def names(self) -> list[str]:
        """Sorted."""
        return list(self._specs)

    @property
    def dims(self) -> list[int]:
        """Floats per row, by sorted name."""
        return [spec.dim for spec in self._specs.values()]

    def lookup(self, ids: Mapping[str, Any]) -> dict[str, Floats]:
        """float32[n, dim] for each requested name: row i for ids[i], zeros where an id has no row."""
        found = self._batches.lookup({self._known(name): each for name, each in ids.items()}, self._timeout_s)
        return dict(zip(ids, found.values(), strict=True))

    def assign(self, updates: Mapping[str, Any], req_time: int | None = None) -> DistributedTables:
        """Set weights, (ids, rows) by name; of a repeated id the last row stays."""
        self._batches.update("assign", self._named(updates), self._terms(None, req_time))
        return self

    def assign_add(self, updates: Mapping[str, Any], req_time: int | None = None) -> DistributedTables:
        """Add to weights, (ids, rows) by name; every repeat adds."""
        self._batches.update("assign_add", self._named(updates), self._terms(None, req_time))
        return self

    def apply_gradients(
        self, updates: Mapping[str, Any], *, global_step: int | None = None, req_time: int | None = None
    ) -> DistributedTables:
        """One optimizer step per distinct id.

        Args:
            updates: (ids, gradients) by name.
            global_step: At which schedules are evaluated; None takes the step the client knows.
            req_time: Becomes the rows' last update; None is now.
        """
        self._batches.update("apply_gradients", self._named(updates), self._terms(global_step, req_time))
        return self

    def reinitialize(self, name: str, ids: npt.ArrayLike, *, request_time: int | None = None) -> npt.NDArray[np.int8]:
        """Reset rows; int8[n] in the order of `ids`: 1 existed, 0 was created, -1 for all if there is no such table."""
        if name not in self._specs:
            return np.full(np.asarray(ids).size, -1, np.int8)
        return self._client.reinitialize(self._known(name), ids, request_time=request_time)

    def _terms(self, global_step: int | None, req_time: int | None) -> WriteOptions:
        step = self._client.known_step if global_step is None else as_step(global_step)
        return WriteOptions(step, req_time, timeout_s=self._timeout_s)

    def _named(self, updates: Mapping[str, Any]) -> dict[str, Any]:
        return {self._known(name): update for name, update in updates.items()}

    def _known(self, name: str) -> str:
        if name not in self._specs:
            raise InvalidRequestError(f"no table {name!r}; there are {self.names}")
        return self._specs[name].name
