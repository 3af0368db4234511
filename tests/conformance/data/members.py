"""A group of vectors by its members: which are checked, which say what is given, and which nothing knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from trilith.errors import TrilithError

if TYPE_CHECKING:
    from tests.conformance.data import Found

__all__ = ["EXPECTING", "each_of", "raises", "spread", "unknown", "what_was_raised"]

EXPECTING = frozenset(
    {
        *("absent", "basenames", "column_name", "data_source_key", "effective", "expanded", "expected"),
        *("expected_gids", "expected_keys", "features", "feeds", "found", "good_records", "hash", "hex", "item_ids"),
        *("item_ids_as_set", "keep", "label", "lookup", "mask", "missing", "n", "names", "offsets", "output", "path"),
        *("patterns", "payload_hex", "pb_type", "replicas", "result", "results", "returns", "slots", "split_item_ids"),
        "values",
    }
)
"""What vectors call that which they expect; what they leave out of it is not checked."""

_TEXT = ("note", "notes", "id", "why")


def raises(what: str, call: Callable[[], object]) -> list[str]:
    """A failure if the call is not refused with an error of ours."""
    try:
        call()
    except TrilithError:
        return []
    return [f"{what}: nothing was raised"[:300]]


def what_was_raised(error: Exception) -> str:
    """An error in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def unknown(content: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """Members that are neither known nor text, nor optional (`quirk_*`)."""
    return [name for name in content if name not in {*known, *_TEXT} and not name.startswith("quirk_")]


def spread(content: Mapping[str, Any], checks: Mapping[str, Callable[[Any], list[str]]], *given: str) -> Found:
    """A result per member: what its check finds. Members that are `given` are used by the checks of others."""
    strange = unknown(content, [*checks, *given])
    for name, value in content.items():
        if name in checks:
            try:
                found = checks[name](value)
            except Exception as error:  # noqa: BLE001 - whatever a member raises is its failure, the others go on
                found = [what_was_raised(error)]
            yield name, found
        else:
            yield name, ["nothing checks this member"] if name in strange else []


def each_of(value: Any) -> list[Any]:
    """The cases of a member that holds one or a list of them."""
    return value if isinstance(value, list) else [value]
