"""The JSON file of a checkpoint that holds a PS's string queues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import google_crc32c

from trilith.checkpoint import FileRecord, Manifest
from trilith.errors import CheckpointError
from trilith.folder import Folder
from trilith_services.ps.queues import QueueState

__all__ = ["read", "read_for", "write"]

FORMAT = "trilith-queues"
VERSION = 1


def write(folder: Folder, name: str, states: Sequence[QueueState]) -> FileRecord:
    """Write queues."""
    body = {"format": FORMAT, "version": VERSION, "queues": [asdict(state) for state in states]}
    raw = json.dumps(body, indent=1).encode() + b"\n"
    folder.write(name, raw)
    return FileRecord(name=name, kind="queues", bytes=len(raw), crc32c=int(google_crc32c.value(raw)), rows=len(states))


def read(folder: Folder, name: str) -> list[QueueState]:
    """Read what `write` wrote; CheckpointError if it is something else."""
    where = folder.path(name)
    try:
        body = json.loads(folder.read(name))
        if body["format"] != FORMAT or body["version"] != VERSION:
            raise CheckpointError(f"{where}: not a file of format {FORMAT!r}, version {VERSION}")
        return [
            QueueState(
                name=queue["name"],
                capacity=int(queue["capacity"]),
                waiting=tuple(queue["waiting"]),
                leased=tuple(
                    (int(lease), str(worker), float(seconds), str(element))
                    for lease, worker, seconds, element in queue["leased"]
                ),
            )
            for queue in body["queues"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: damaged: {error!r}") from None


def read_for(folder: Folder, manifest: Manifest, index: int) -> list[QueueState]:
    """The queues that shard `index` holds: queues live on PS 0, so another number of PS changes nothing."""
    if index >= manifest.shard_count:
        return []
    return [state for file in manifest.parts[index].files if file.kind == "queues" for state in read(folder, file.name)]
