"""Data for training: files of logged samples in, batches of arrays out.

`read` is the way in: `trilith.data.read("logs/*.pb").filter(...).parse(spec).shuffle(10_000).batch(512).prefetch(4)`.
Importing this package is light; what it exports is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trilith.data.dataset import Dataset, DatasetIterator, from_records, read
    from trilith.data.files import gen_patterns, match_input_patterns
    from trilith.data.framing import Framing
    from trilith.data.positions import from_json, to_json
    from trilith.data.queue import StrQueue
    from trilith.data.records import Kind, Records

__all__ = [
    "Dataset",
    "DatasetIterator",
    "Framing",
    "Kind",
    "Records",
    "StrQueue",
    "from_json",
    "from_records",
    "gen_patterns",
    "match_input_patterns",
    "read",
    "to_json",
]

_WHERE = {
    "Dataset": "dataset",
    "DatasetIterator": "dataset",
    "Framing": "framing",
    "Kind": "records",
    "Records": "records",
    "StrQueue": "queue",
    "from_json": "positions",
    "from_records": "dataset",
    "gen_patterns": "files",
    "match_input_patterns": "files",
    "read": "dataset",
    "to_json": "positions",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"trilith.data.{_WHERE[name]}"), name)
