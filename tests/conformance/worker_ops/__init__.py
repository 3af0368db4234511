"""How each op of the worker's vectors is run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.conformance.compare import Absent, Partial, mismatch, plain
from trilith.errors import TrilithError

__all__ = ["worker_failures", "worker_vector_failures"]

Run = Callable[[Mapping[str, Any]], Any]

_MODULES = ("primitives", "layouts", "sharding", "features", "updates", "tables", "exchange")
_RELATIVE, _ABSOLUTE = 1e-4, 1e-5


def worker_failures(vectors: list[dict[str, Any]], only: str = "") -> Iterator[tuple[str, list[str]]]:
    """Per vector whose name ("op.number") contains `only`, its name and what is wrong with it."""
    for number, vector in enumerate(vectors):
        name = f"{vector.get('op', 'vector')}.{number}"
        if only in name:
            yield name, worker_vector_failures(vector)


def worker_vector_failures(vector: Mapping[str, Any]) -> list[str]:
    """What is wrong with one vector; an empty list if nothing."""
    runs: dict[str, Run] = {}
    for module in _MODULES:
        runs.update(importlib.import_module(f"tests.conformance.worker_ops.{module}").OPS)
    run = runs.get(vector.get("op", ""))
    if run is None:
        return [f"no op {vector.get('op')!r}"]
    expected = vector.get("expected", Absent())
    raises = isinstance(expected, dict) and bool(expected.get("raises"))
    try:
        got = plain(run(vector["inputs"]))
    except Exception as error:  # noqa: BLE001 - whatever a vector raises is its failure, the others go on
        if raises and isinstance(error, (TrilithError, NotImplementedError)):
            return []
        return [" ".join(f"{type(error).__name__}: {error}".split())[:300]]
    if raises:
        return ["did not raise"]
    wrong = None if isinstance(expected, Absent) else _differs(got, expected)
    return [" ".join(wrong.split())[:300]] if wrong else []


def _differs(got: Any, wanted: Any) -> str | None:
    """Compare as `mismatch` does, but whole numbers with whole numbers exactly: ids are too large for a tolerance."""
    if isinstance(wanted, list) and isinstance(got, Partial) and got.order:
        got = [got[key] for key in got.order]
    if isinstance(wanted, list) and isinstance(got, list) and len(got) == len(wanted):
        return next((wrong for pair in zip(got, wanted, strict=True) if (wrong := _differs(*pair))), None)
    if isinstance(wanted, dict) and isinstance(got, dict) and (isinstance(got, Partial) or got.keys() == wanted.keys()):
        wrongs = ((key, _differs(got.get(key), each)) for key, each in wanted.items())
        return next((f"{key}: {wrong}" for key, wrong in wrongs if wrong), None)
    if type(wanted) is int and type(got) is int:
        return None if got == wanted else f"{got} is not {wanted}"
    return mismatch(got, {"value": wanted, "rel_tol": _RELATIVE, "abs_tol": _ABSOLUTE})
