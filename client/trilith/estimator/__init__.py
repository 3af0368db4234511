"""A user's model on a user's data: who this worker is, what a run is told, what it counts, and what it says.

Importing it is light: what needs torch is loaded when it is first used.

Flat: a file for each part that a run is made of, and the Estimator alone puts them together.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trilith.estimator import metrics
from trilith.estimator.callbacks import BestByMetric, Callback, Callbacks, EarlyStopping
from trilith.estimator.config import RunConfig
from trilith.estimator.events import (
    Done,
    Epoch,
    Evaluated,
    Event,
    Exported,
    Failed,
    Restored,
    RowsRejoined,
    Saved,
    SaveFailed,
    ShardRestarted,
    Started,
    Step,
    Stop,
    Stopped,
)
from trilith.estimator.identity import WorkerIdentity
from trilith.estimator.loggers import JsonLines, Mlflow, Profiler, ProgressBars, Prometheus, TensorBoard, WandB
from trilith.runtime.extras import missing_extra

if TYPE_CHECKING:
    from trilith.data.parse.specs import Dense, Label
    from trilith.estimator.batches import Batch, DenseColumn, IdColumn, LabelColumn, Wanted, arrange
    from trilith.estimator.estimator import Estimator
    from trilith.estimator.features import Embedding, Inputs, Sequence
    from trilith.estimator.group import local_device, process_group
    from trilith.estimator.task import Task

__all__ = [
    "Batch",
    "BestByMetric",
    "Callback",
    "Callbacks",
    "Dense",
    "DenseColumn",
    "Done",
    "EarlyStopping",
    "Embedding",
    "Epoch",
    "Estimator",
    "Evaluated",
    "Event",
    "Exported",
    "Failed",
    "IdColumn",
    "Inputs",
    "JsonLines",
    "Label",
    "LabelColumn",
    "Mlflow",
    "Profiler",
    "ProgressBars",
    "Prometheus",
    "Restored",
    "RowsRejoined",
    "RunConfig",
    "SaveFailed",
    "Saved",
    "Sequence",
    "ShardRestarted",
    "Started",
    "Step",
    "Stop",
    "Stopped",
    "Task",
    "TensorBoard",
    "WandB",
    "Wanted",
    "WorkerIdentity",
    "arrange",
    "local_device",
    "metrics",
    "process_group",
]

_NEED_TORCH = {
    "Batch": "batches",
    "Dense": "task",
    "DenseColumn": "batches",
    "Embedding": "features",
    "Estimator": "estimator",
    "IdColumn": "batches",
    "Inputs": "features",
    "Label": "task",
    "LabelColumn": "batches",
    "Wanted": "batches",
    "Sequence": "features",
    "Task": "task",
    "arrange": "batches",
    "local_device": "group",
    "process_group": "group",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"trilith.estimator.{_NEED_TORCH[name]}"), name)
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None
