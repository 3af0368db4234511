"""Stand-ins for tests of the torch modules: a cluster in a dict that steps by plain gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trilith.batches import TableInfo


@dataclass
class FakeClient:
    """Rows by (table, id); every call is noted."""

    dims: dict[str, int]
    learning_rate: float = 1.0
    initial: float = 0.0
    rows: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    variables: dict[str, np.ndarray] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    step: int = 0

    together = False
    origin = "a dict"

    @property
    def known_step(self) -> int:
        return self.step

    def hear_step(self, step: int) -> None:
        self.step = max(self.step, step)

    def drain(self) -> None:
        """Nothing waits."""

    def record_features(self, tables: Mapping[str, str]) -> None:
        """Nowhere to be kept."""

    def __deepcopy__(self, memo: object) -> FakeClient:
        return self

    def table(self, name: str) -> FakeTable:
        return FakeTable(self, name)

    def lookup(self, requests: Mapping[str, Any]) -> dict[str, np.ndarray]:
        self.calls.append("lookup")
        found = {}
        for table, ids in requests.items():
            zeros = np.zeros(self.dims[table], np.float32)
            rows = [self.rows.get((table, int(one)), zeros) for one in ids]
            found[table] = np.array(rows, np.float32).reshape(len(ids), self.dims[table])
        return found

    def table_info(self, name: str) -> TableInfo:
        return TableInfo(None, self.dims[name], (self.learning_rate,))

    def apply_gradients(
        self,
        updates: Mapping[str, tuple[Any, Any]],
        *,
        advance: int = 0,
        rate_factors: Mapping[str, float] | None = None,
    ) -> None:
        self.calls.append("apply_gradients")
        self.step += advance
        for table, (ids, grads) in updates.items():
            rate = self.learning_rate * (rate_factors or {}).get(table, 1.0)
            assert grads.shape == (len(ids), self.dims[table])
            for one, grad in zip(ids, grads, strict=True):
                self._row(table, one)[:] -= rate * grad

    def assign_add(self, updates: Mapping[str, tuple[Any, Any]]) -> None:
        self.calls.append("assign_add")
        for table, (ids, values) in updates.items():
            for one, value in zip(ids, values, strict=True):
                self._row(table, one)[:] += value

    def _row(self, table: str, one: Any) -> np.ndarray:
        return self.rows.setdefault((table, int(one)), np.full(self.dims[table], self.initial, np.float32))

    def create_variables(self, initial: Mapping[str, Any], *, optimizer: Any) -> dict[str, bool]:
        new = {name: value.copy() for name, value in initial.items() if name not in self.variables}
        self.variables.update(new)
        return {name: name in new for name in initial}

    def pull_variables(self, names: Any = None) -> tuple[dict[str, np.ndarray], int]:
        return {name: self.variables[name].copy() for name in names}, self.step

    def apply_dense_gradients(
        self, gradients: Mapping[str, Any], *, learning_rate: float | None = None, advance: int = 0
    ) -> None:
        self.calls.append("apply_dense_gradients")
        self.step += advance
        for name, grad in gradients.items():
            self.variables[name] -= (learning_rate or self.learning_rate) * grad

    def assign_variables(self, values: Mapping[str, Any]) -> None:
        self.variables.update({name: value.copy() for name, value in values.items()})


@dataclass
class FakeTable:
    client: FakeClient
    name: str

    @property
    def dim(self) -> int:
        return self.client.dims[self.name]
