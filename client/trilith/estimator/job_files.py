"""What a checkpoint says of its job to whoever reads no tensors, such as a command that lists checkpoints."""

from __future__ import annotations

import json

from trilith.folder import Folder

__all__ = ["JOB", "event_time_of"]

JOB = "job.json"
"""The file of a checkpoint that makes it a job's; see `trilith.estimator.state`."""


def event_time_of(path: str) -> int | None:
    """The latest time of the samples that the job of a checkpoint had learned from, Unix seconds; None: none is known.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        body = json.loads(Folder(path).read(JOB))
    except FileNotFoundError:
        return None
    found = body.get("event_time") if isinstance(body, dict) else None
    if not isinstance(found, int | None):
        raise ValueError(f"event_time={found!r} is no Unix time")
    return found
