"""JSON files with a format, a version and a checksum of their own: a flipped digit in them is damage like any other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trilith.errors import CheckpointError

__all__ = ["pack", "unpack"]

VERSION = 1


def pack(kind: str, body: Mapping[str, Any]) -> bytes:
    """The file's content."""
    content = {"format": kind, "version": VERSION, **body}
    content["crc32c"] = _checksum(content)
    return json.dumps(content, indent=1).encode() + b"\n"


def unpack(where: str, kind: str, raw: bytes) -> dict[str, Any]:
    """What `pack` was given, and the format.

    Raises:
        CheckpointError: `raw`, of the file `where`, is damaged, or of another format or version.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: damaged: {error}") from None
    if not isinstance(body, dict) or body.get("format") != kind:
        raise CheckpointError(f"{where}: not a file of format {kind!r}")
    if body.get("version") != VERSION:
        raise CheckpointError(f"{where}: version {body.get('version')!r}; this program reads version {VERSION}")
    stated = body.pop("crc32c", None)
    if stated != _checksum(body):
        raise CheckpointError(f"{where}: damaged: its content does not match its checksum")
    return body


def _checksum(body: Mapping[str, Any]) -> int:
    import google_crc32c

    return int(google_crc32c.value(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()))
