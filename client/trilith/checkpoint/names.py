"""What the files of checkpoints are called."""

from __future__ import annotations

import re
from urllib.parse import quote

__all__ = [
    "FILE_NAME",
    "HELD",
    "LEAVING",
    "NUMBERED",
    "ORDER",
    "PART",
    "SAVING",
    "checkpoint_name",
    "file_name",
    "holder_name",
    "part_name",
    "round_name",
    "saving_name",
]

NUMBERED = re.compile(r"ckpt-(\d{20})")
ORDER = re.compile(r"(order|round)\.(\d{20})")
PART = re.compile(r"part\.(\d{5,})-of-(\d{5,})(?:\.([0-9a-f]{8}))?\.json")
SAVING = re.compile(r"saving\.(\d{5,})-of-(\d{5,})\.([0-9a-f]{8})")
LEAVING = re.compile(r"leaving\.(\d{5,})-of-(\d{5,})\.(\d{20})")
HELD = re.compile(r"held\.(\d{11,})\.[0-9a-f]{8}")
FILE_NAME = re.compile(r"[\w%~-][\w.%~-]*", re.ASCII)


def checkpoint_name(number: int) -> str:
    """Directory of the numbered checkpoint; names sort as numbers do."""
    return f"ckpt-{number:020d}"


def file_name(kind: str, table: str, index: int, count: int, token: str, suffix: str = "arrow") -> str:
    """Name of a data file; a table name that is no file name is percent-encoded."""
    stem = {"rows": "table", "filter": "filter"}.get(kind, kind)
    stem = f"{stem}-{quote(table, safe='')}" if table else stem
    return f"{stem}.{index:05d}-of-{count:05d}.{token}.{suffix}"


def part_name(index: int, count: int, life: str = "") -> str:
    """Name of a PS's part manifest."""
    return f"part.{index:05d}-of-{count:05d}.{life}.json" if life else f"part.{index:05d}-of-{count:05d}.json"


def saving_name(index: int, count: int, life: str) -> str:
    """Name of the file that is there while a PS writes its part."""
    return f"saving.{index:05d}-of-{count:05d}.{life}"


def round_name(order: int) -> str:
    """Name of the file that makes a checkpoint one in which all PS take part by themselves."""
    return f"round.{order:020d}"


def holder_name(index: int, count: int) -> str:
    """Name of the file that says which process a PS is."""
    return f"ps.{index:05d}-of-{count:05d}.json"
