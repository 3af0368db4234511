"""How each group of data vectors is checked."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["data_failures"]

Found = Iterator[tuple[str, list[str]]]
Check = Callable[[Any, Path], Found]

_MODULES = ("formats", "parsing", "samples", "negatives", "datasets")


def data_failures(groups: dict[str, Any], folder: Path, only: str = "") -> Found:
    """Per vector whose name contains `only`, its name ("group.member") and what is wrong with it."""
    checks: dict[str, Check] = {}
    for module in _MODULES:
        checks.update(importlib.import_module(f"tests.conformance.data.{module}").GROUPS)
    for group, content in groups.items():
        names = list(content) if isinstance(content, dict) else [str(number) for number in range(len(content))]
        if not any(only in f"{group}.{name}" for name in names):
            continue
        check = checks.get(group)
        missing = ["nothing checks this group"]
        found = _run(check, content, folder, names) if check else dict.fromkeys(names, missing)
        for name, failures in found.items():
            if only in f"{group}.{name}":
                yield f"{group}.{name}", failures


def _run(check: Check, content: Any, folder: Path, names: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {name: ["was not checked"] for name in names}
    try:
        # A check may know members that this file does not have; only what fails there is told.
        found.update((name, failures) for name, failures in check(content, folder) if name in found or failures)
    except Exception as error:  # noqa: BLE001 - whatever a group raises is its failure, the others go on
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        found = {name: [words] if failures == ["was not checked"] else failures for name, failures in found.items()}
    return found
