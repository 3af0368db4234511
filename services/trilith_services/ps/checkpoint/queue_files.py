"""The JSON file of a checkpoint that holds a PS's string queues."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import google_crc32c

from trilith.checkpoint import FileRecord, Manifest
from trilith.errors import CheckpointError
from trilith.folder import Folder
from trilith_services.ps.checkpoint.damage import as_damage, whole_number
from trilith_services.ps.engine.queues import QueueState

__all__ = ["read", "read_for", "write"]

FORMAT = "trilith-queues"
VERSION = 1
_MOST_BYTES = 1 << 30


def write(folder: Folder, name: str, states: Sequence[QueueState]) -> FileRecord:
    """Write queues."""
    body = {"format": FORMAT, "version": VERSION, "queues": [asdict(state) for state in states]}
    raw = json.dumps(body, indent=1).encode() + b"\n"
    folder.write(name, raw)
    return FileRecord(name=name, kind="queues", bytes=len(raw), crc32c=int(google_crc32c.value(raw)), rows=len(states))


def read(folder: Folder, name: str) -> list[QueueState]:
    """Read what `write` wrote; CheckpointError if it is something else."""
    where = folder.path(name)
    with as_damage(where):
        body = json.loads(folder.read(name, most=_MOST_BYTES))
        if body["format"] != FORMAT or body["version"] != VERSION:
            raise CheckpointError(f"{where}: not a file of format {FORMAT!r}, version {VERSION}")
        states = [_state(queue) for queue in body["queues"]]
        leases = [lease for state in states for lease, *_ in state.leased]
        if len({state.name for state in states}) < len(states) or len(set(leases)) < len(leases):
            raise ValueError("a queue or a lease is there twice")
    return states


def _state(queue: Mapping[str, Any]) -> QueueState:
    return QueueState(
        name=_text(queue["name"]),
        capacity=whole_number(queue["capacity"], 2**63 - 1, "capacity"),
        waiting=tuple(map(_text, _list(queue["waiting"]))),
        leased=tuple(
            (whole_number(lease, 2**63 - 2, "lease"), _text(worker), _seconds(seconds), _text(element))
            for lease, worker, seconds, element in _list(queue["leased"])
        ),
    )


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} where a list is due")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where text is due")
    value.encode()  # half a surrogate pair is no text
    return value


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} where seconds are due")
    return float(value)


def read_for(folder: Folder, manifest: Manifest, index: int) -> list[QueueState]:
    """The queues that shard `index` holds: queues live on PS 0, so another number of PS changes nothing."""
    if index >= manifest.shard_count:
        return []
    return [state for file in manifest.parts[index].files if file.kind == "queues" for state in read(folder, file.name)]
