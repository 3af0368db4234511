"""Data for training: files of logged samples in, batches of arrays out.

`read` is the way in: `trilith.data.read("logs/*.pb").filter(...).parse(spec).shuffle(10_000).batch(512).prefetch(4)`.
Importing this package is light; what it exports is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trilith.data.columnar import Column
    from trilith.data.dataset import Dataset, DatasetIterator, from_records, read, read_kafka
    from trilith.data.files import gen_patterns, match_input_patterns
    from trilith.data.framing import Framing
    from trilith.data.item_pool import ItemPool
    from trilith.data.negatives import NegativeConfig
    from trilith.data.parsers import ParseSpec
    from trilith.data.positions import from_json, to_json
    from trilith.data.queue import StrQueue
    from trilith.data.ragged import Ragged
    from trilith.data.readers import open_records
    from trilith.data.records import Kind, Records
    from trilith.data.specs import Dense, Extra, InstanceWeight, Label, Slot, Sparse
    from trilith.data.writers import open_writer

__all__ = [
    "Column",
    "Dataset",
    "DatasetIterator",
    "Dense",
    "Extra",
    "Framing",
    "InstanceWeight",
    "ItemPool",
    "Kind",
    "Label",
    "NegativeConfig",
    "ParseSpec",
    "Ragged",
    "Records",
    "Slot",
    "Sparse",
    "StrQueue",
    "from_json",
    "from_records",
    "gen_patterns",
    "match_input_patterns",
    "open_records",
    "open_writer",
    "read",
    "read_kafka",
    "to_json",
]

_WHERE = {
    "Column": "columnar",
    "Dataset": "dataset",
    "DatasetIterator": "dataset",
    "Dense": "specs",
    "Extra": "specs",
    "Framing": "framing",
    "InstanceWeight": "specs",
    "ItemPool": "item_pool",
    "Kind": "records",
    "Label": "specs",
    "NegativeConfig": "negatives",
    "ParseSpec": "parsers",
    "Ragged": "ragged",
    "Records": "records",
    "Slot": "specs",
    "Sparse": "specs",
    "StrQueue": "queue",
    "from_json": "positions",
    "from_records": "dataset",
    "gen_patterns": "files",
    "match_input_patterns": "files",
    "open_records": "readers",
    "open_writer": "writers",
    "read": "dataset",
    "read_kafka": "dataset",
    "to_json": "positions",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"trilith.data.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
