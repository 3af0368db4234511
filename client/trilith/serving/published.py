"""What of a directory's exports entries may serve: versions that are withdrawn, and the one that all are pinned to.

It is one small file beside the versions, `published.json`, which every entry reads with each look at the directory; so
a rollback reaches all of them, those that start later too. Nothing of an export is changed by it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from trilith.errors import CheckpointError, InvalidRequestError
from trilith.folder import Folder
from trilith.runtime.checked_json import read_json
from trilith.serving.exports import entry_base, list_versions

__all__ = ["PUBLISHED", "Published", "pin", "read_published", "withdraw"]

PUBLISHED = "published.json"
_FORMAT = "trilith-published"
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What people have said of the versions of one directory.

    Attributes:
        pinned: The version that answers, whatever is newer; 0: the newest does.
        withdrawn: Versions that nobody serves.
    """

    pinned: int = 0
    withdrawn: tuple[int, ...] = ()


def read_published(base: str) -> Published:
    """What is said of the exports of a base directory.

    Raises:
        CheckpointError: The file is damaged.
    """
    folder = Folder(entry_base(base))
    try:
        raw = folder.read(PUBLISHED, most=_MOST_BYTES)
    except FileNotFoundError:
        return Published()
    try:
        if json.loads(raw)["format"] != _FORMAT:
            raise ValueError(f"not of format {_FORMAT!r}")
        return read_json(Published, raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder.path(PUBLISHED)}: damaged ({error})") from None


def pin(base: str, version: int) -> Published:
    """Have all entries answer with one version, until this is called with 0.

    Raises:
        InvalidRequestError: There is no such version, or it is withdrawn.
    """

    def change(known: Published) -> Published:
        if version in known.withdrawn:
            raise InvalidRequestError(f"version {version} of {base} is withdrawn; publish it again before")
        return replace(known, pinned=version)

    return _change(base, version, change)


def withdraw(base: str, version: int, *, undo: bool = False) -> Published:
    """Have no entry serve a version any more, or have them serve it again.

    Raises:
        InvalidRequestError: There is no such version, or all are pinned to it.
    """

    def change(known: Published) -> Published:
        if version == known.pinned:
            raise InvalidRequestError(f"{base} is pinned to version {version}; pin another one, or none, before")
        withdrawn = set(known.withdrawn) - {version} if undo else {*known.withdrawn, version}
        return replace(known, withdrawn=tuple(sorted(withdrawn)))

    return _change(base, version, change)


def _change(base: str, version: int, change: Callable[[Published], Published]) -> Published:
    versions = list_versions(entry_base(base))
    if version and version not in versions:
        there = ", ".join(map(str, versions)) or "none"
        raise InvalidRequestError(f"{base} has no version {version}; there is {there}")
    found = change(read_published(base))
    found = replace(found, withdrawn=tuple(each for each in found.withdrawn if each in versions))
    body = {"format": _FORMAT, **asdict(found)}
    Folder(entry_base(base)).write(PUBLISHED, json.dumps(body, indent=1).encode() + b"\n")
    return found
