"""What runs each kind of engine vector; here the small ones: files, rates, configs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.conformance import filters, named, rows, tables
from tests.conformance.configs import hash_table_config, optimizer_of, rate_of
from tests.conformance.runner import Kind
from trilith.tables.schedules import rate_at
from trilith_services.ps.engine.row_layout import OptimizerLayout
from trilith_services.ps.reference.shard_files import shard_file_names, validate_shard_files

__all__ = ["KINDS"]


class Files(Kind):
    def op_validate(self, basename: str, files: Sequence[str]) -> int:
        return validate_shard_files(basename, files)

    def op_validate_generated(self, basename: str, nshards: int) -> int:
        return validate_shard_files(basename, shard_file_names(basename, nshards))

    def op_names(self, basename: str, nshards: int) -> list[str]:
        return shard_file_names(basename, nshards)


class LearningRate(Kind):
    step = 0

    def op_set_global_step(self, value: int) -> None:
        self.step = value

    def op_value(self) -> float:
        return rate_at(rate_of(self.config), self.step)

    def op_dense_adagrad(
        self, var: Sequence[float], grad: Sequence[float], accumulator: float, steps: int
    ) -> np.ndarray:
        """A dense variable is one row, stepped by the optimizer of its config."""
        adagrad = {"type": "adagrad", "initial_accumulator_value": accumulator}
        table = rows.build_table({"dim": len(var), "opt": adagrad})
        fid = np.zeros(1, np.uint64)
        table.assign(fid, np.array([var], np.float32))
        for _ in range(steps):
            table.apply_gradients(fid, np.array([grad], np.float32), learning_rates=[self.op_value()])
        return table.lookup(fid)[0]


class Config(Kind):
    def op_same_string(self, a: str, b: str) -> bool:
        left, right = (self._instance(name) for name in (a, b))
        return str(left) == str(right)

    def _instance(self, name: str) -> Any:
        instance = self.config["instances"][name]
        return hash_table_config({**instance["table"], **{k: v for k, v in instance.items() if k != "table"}})

    def op_wrapped_kind(self, optimizer: dict[str, Any]) -> str:
        layout = OptimizerLayout.of(optimizer_of(optimizer), 1)
        return f"stochastic({layout.kind})" if layout.stochastic else layout.kind


KINDS: dict[str, type[Kind]] = {
    "optimizer": rows.Optimizer,
    "entry": rows.Entry,
    "entry_defs": rows.EntryDefs,
    "compressor": rows.Compressor,
    "quantizer": rows.Quantizer,
    "initializer": rows.Initializer,
    "retriever": rows.Retriever,
    "table": tables.Tables,
    "linalg": tables.Linalg,
    "multi_table": named.MultiTable,
    "multi_type_table": named.MultiTypeTable,
    "merged_table": named.MergedTable,
    "filter": filters.Filter,
    "probabilistic_filter": filters.Probabilistic,
    "files": Files,
    "lr_fn": LearningRate,
    "config": Config,
}
