"""Data for training: files of logged samples in, batches of arrays out.

`read` is the way in: `trilith.data.read("logs/*.pb").filter(...).parse(spec).shuffle(10_000).batch(512).prefetch(4)`.
Importing this package is light; what it exports is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trilith.data.formats.files import gen_patterns, match_input_patterns
    from trilith.data.formats.framing import Framing
    from trilith.data.formats.readers import open_records
    from trilith.data.formats.writers import open_writer
    from trilith.data.parse.parsers import ParseSpec
    from trilith.data.parse.specs import Dense, Extra, InstanceWeight, Label, Slot, Sparse
    from trilith.data.pipeline.arrow import from_arrow
    from trilith.data.pipeline.dataset import Dataset, DatasetIterator, from_records, read, read_kafka
    from trilith.data.pipeline.positions import from_json, to_json
    from trilith.data.pipeline.queue import StrQueue
    from trilith.data.records import Kind, Records
    from trilith.data.samples.item_pool import ItemPool
    from trilith.data.samples.negatives import NegativeConfig
    from trilith.data.scan.rows import Column
    from trilith.ops.ragged import Ragged
    from trilith.ops.strings import hash_strings

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
    "from_arrow",
    "from_json",
    "from_records",
    "gen_patterns",
    "hash_strings",
    "match_input_patterns",
    "open_records",
    "open_writer",
    "read",
    "read_kafka",
    "to_json",
]

_NAMES = {
    ".ops.ragged": "Ragged",
    ".ops.strings": "hash_strings",
    "formats.files": "gen_patterns match_input_patterns",
    "formats.framing": "Framing",
    "formats.readers": "open_records",
    "formats.writers": "open_writer",
    "parse.parsers": "ParseSpec",
    "parse.specs": "Dense Extra InstanceWeight Label Slot Sparse",
    "pipeline.arrow": "from_arrow",
    "pipeline.dataset": "Dataset DatasetIterator from_records read read_kafka",
    "pipeline.positions": "from_json to_json",
    "pipeline.queue": "StrQueue",
    "records": "Kind Records",
    "samples.item_pool": "ItemPool",
    "samples.negatives": "NegativeConfig",
    "scan.rows": "Column",
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
