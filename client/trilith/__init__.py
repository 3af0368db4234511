"""Trilith: a parameter-server cluster for training and serving recommender models; this is what a trainer imports.

Importing it is light: numba, torch and discovery backends are loaded when they are first needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trilith.connect import connect
from trilith.errors import TrilithError

if TYPE_CHECKING:
    from trilith import data, nn, tables
    from trilith.client import Client
    from trilith.entry_dumps import describe_entry
    from trilith.rows import Table
    from trilith.serving.prediction import remote_predict

__all__ = [
    "Client",
    "Table",
    "TrilithError",
    "connect",
    "data",
    "describe_entry",
    "nn",
    "remote_predict",
    "tables",
]  # `nn` needs torch

__version__ = "0.1.0"  # pyproject.toml has it too

_LAZY = {
    "Client": "trilith.client",
    "Table": "trilith.rows",
    "describe_entry": "trilith.entry_dumps",
    "remote_predict": "trilith.serving.prediction",
}


def __getattr__(name: str) -> Any:
    if name in ("data", "nn", "tables"):
        return importlib.import_module(f"trilith.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
