"""Runs one vector: its steps on an object of its kind, then its expectations."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.conformance.compare import mismatch
from trilith.errors import TrilithError

__all__ = ["Kind", "engine_failures", "failures_of", "run_file"]


class Kind:
    """Base of the kinds: a step `{"op": "x", ...}` calls `op_x(**rest)`, which may return a result.

    Attributes:
        config: The vector's.
        folder: Where the files of this vector go.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        self.config = config
        self.folder = folder

    def path(self, name: str) -> str:
        """Where a file that a vector names is."""
        return str(self.folder / name)

    def run(self, steps: list[dict[str, Any]]) -> dict[str, Any]:
        """Do the steps; results by label."""
        results = {}
        for step in steps:
            arguments = {name: _signed(value) for name, value in step.items() if name not in {"op", "out", "error"}}
            operation = getattr(self, f"op_{step['op']}", None)
            if operation is None:
                raise NotImplementedError(f"no op {step['op']!r} in kind {type(self).__name__}")
            if step.get("error"):
                results[step.get("out")] = _raises(operation, arguments)
                continue
            result = operation(**arguments)
            if "out" in step:
                results[step["out"]] = result
        return results


def _signed(value: Any) -> Any:
    """Ids of 2^63 and above as the int64 they are, so that a list of ids has one type."""
    if isinstance(value, dict):
        return {key: _signed(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_signed(each) for each in value]
    return value - 2**64 if isinstance(value, int) and value >= 2**63 else value


def _raises(operation: Any, arguments: dict[str, Any]) -> bool:
    try:
        operation(**arguments)
    except (TrilithError, ValueError, NotImplementedError):
        return True
    return False


def failures_of(vector: Mapping[str, Any]) -> list[str]:
    """What is wrong with one engine vector; an empty list if nothing."""
    from tests.conformance.kinds import KINDS

    kind = KINDS.get(vector.get("kind", ""))
    if kind is None:
        return [f"no kind {vector.get('kind')!r}"]
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        try:
            results = kind(vector.get("config") or {}, Path(folder)).run(vector["steps"])
        except Exception as error:  # noqa: BLE001 - whatever a vector raises is its failure, the others go on
            return [_one_line(f"{type(error).__name__}: {error}")]
    found = []
    for label, expected in (vector.get("expected") or {}).items():
        wrong = "nothing was given out" if label not in results else mismatch(results[label], expected)
        if wrong:
            found.append(_one_line(f"{label}: {wrong}"))
    return found


def _one_line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 300 else f"{words[:297]}..."


def engine_failures(vectors: list[dict[str, Any]], only: str = "") -> Iterator[tuple[str, list[str]]]:
    """Per vector whose name contains `only`, its name and what is wrong with it."""
    for number, vector in enumerate(vectors):
        name = str(vector.get("name", number))
        if only in name:
            yield name, failures_of(vector)


def run_file(part: str, path: Path, only: str = "") -> Iterator[tuple[str, list[str]]]:
    """Run the vectors of a file of "engine", "worker_ops" or "data" vectors whose names contain `only`."""
    vectors = json.loads(path.read_text())
    if part == "engine":
        return engine_failures(vectors, only)
    if part == "data":
        from tests.conformance.data import data_failures

        return data_failures(vectors["vectors"], path.parent, only)
    from tests.conformance.worker_ops import worker_failures

    return worker_failures(vectors, only)
