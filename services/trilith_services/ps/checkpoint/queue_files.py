"""The JSON file of a checkpoint that holds a PS's string queues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import google_crc32c
from pydantic import BaseModel, ConfigDict, Field

from trilith.checkpoint import FileRecord, Manifest
from trilith.errors import CheckpointError
from trilith.folder import Folder
from trilith_services.ps.checkpoint.damage import as_damage
from trilith_services.ps.engine.queues import QueueState

__all__ = ["read", "read_for", "write"]

FORMAT = "trilith-queues"
VERSION = 1
_MOST_BYTES = 1 << 30


class _Queue(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    capacity: int = Field(ge=0, le=2**63 - 1)
    waiting: tuple[str, ...]
    leased: tuple[
        tuple[Annotated[int, Field(ge=0, le=2**63 - 2)], str, Annotated[float, Field(ge=0, allow_inf_nan=False)], str],
        ...,
    ]


class _File(BaseModel):
    format: str
    version: int
    queues: list[_Queue]


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
        body = _File.model_validate_json(folder.read(name, most=_MOST_BYTES))
        if (body.format, body.version) != (FORMAT, VERSION):
            raise CheckpointError(f"{where}: not a file of format {FORMAT!r}, version {VERSION}")
        states = [QueueState(**dict(queue)) for queue in body.queues]
        leases = [lease for state in states for lease, *_ in state.leased]
        if len({state.name for state in states}) < len(states) or len(set(leases)) < len(leases):
            raise ValueError("a queue or a lease is there twice")
    return states


def read_for(folder: Folder, manifest: Manifest, index: int) -> list[QueueState]:
    """The queues that shard `index` holds: queues live on PS 0, so another number of PS changes nothing."""
    if index >= manifest.shard_count:
        return []
    return [state for file in manifest.parts[index].files if file.kind == "queues" for state in read(folder, file.name)]
