"""The demo as a worker's task: a reference model on the demo's data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from trilith_services.demo.clicks import ClickData, Parts
from trilith_services.demo.datasets import load_dataset, training_files
from trilith_services.demo.models import ModelSettings
from trilith_services.worker.task import Samples, Task

__all__ = ["click_task", "load_task"]


def click_task(settings: ModelSettings, parts: Parts, samples: Samples[ClickData] | None = None) -> Task:
    """A model on data in memory; `samples` are the training part as it is read, where that is not from memory."""
    features = tuple(parts.train.features)
    return Task(
        name=settings.name,
        build=partial(settings.on_cluster, features=features),
        features=features,
        train=parts.train if samples is None else samples,
        validation=parts.validation,
        epochs=settings.epochs,
        dense_optimizer=settings.dense_optimizer(),
        torch_optimizer=partial(settings.torch_optimizer, dense=True),
    )


def load_task(settings: ModelSettings, data: str, report: Callable[[str], None]) -> Task:
    """A model on the data of that name; the training part is read from files in the cache."""
    parts = load_dataset(data, report=report)
    return click_task(settings, parts, training_files(parts))
