"""How each group of data vectors is checked."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.conformance.compare import with_absent
from tests.conformance.data.members import EXPECTING, what_was_raised

__all__ = ["data_failures"]

Found = Iterator[tuple[str, list[str]]]
Check = Callable[[Any, Path], Found]

_MODULES = ("formats", "parsing", "samples", "negatives", "datasets")


def data_failures(groups: dict[str, Any], folder: Path, only: str = "") -> Found:
    """Per vector whose name contains `only`, its name ("group.member") and what is wrong with it."""
    checks: dict[str, Check] = {}
    for module in _MODULES:
        checks.update(importlib.import_module(f"tests.conformance.data.{module}").GROUPS)
    for group, content in with_absent(groups, EXPECTING).items():
        members: Iterable[tuple[Any, Any]] = content.items() if isinstance(content, dict) else enumerate(content)
        names = [str(name) for name, _ in members]
        if not any(only in f"{group}.{name}" for name in names):
            continue
        check = checks.get(group)
        if check is None:
            found = {name: ["nothing checks this group"] for name in names}
        elif isinstance(content, dict):
            found = _run(check, content, folder, names)
        else:  # one by one, so that what one of them raises is its own failure
            found = {
                name: _run(check, [member], folder, ["0"])["0"] for name, member in zip(names, content, strict=True)
            }
        for name, failures in found.items():
            if only in f"{group}.{name}":
                yield f"{group}.{name}", failures


def _run(check: Check, content: Any, folder: Path, names: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {name: ["was not checked"] for name in names}
    try:
        found.update(check(content, folder))
    except Exception as error:  # noqa: BLE001 - whatever a group raises is its failure, the others go on
        words = what_was_raised(error)
        found = {name: [words] if failures == ["was not checked"] else failures for name, failures in found.items()}
    return found
