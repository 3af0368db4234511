"""`make quick`: the unit tests of a part of Trilith, or of the parts in which files have changed; under a minute.

`python -m tests.quick engine data` runs those of two parts, `python -m tests.quick` those of what changed since main.
What takes long, needs processes or compares implementations is left to `make test`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

__all__ = ["PARTS", "Part", "changed_files", "files_of", "parts_of"]

ROOT = Path(__file__).resolve().parents[1]
_PS = "services/trilith_services/ps/"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of Trilith.

    Attributes:
        sources: How paths of its sources begin; of several parts, that with the longest beginning has a file.
        tests: Patterns of names of files in tests/unit, without test_ and .py.
    """

    sources: tuple[str, ...]
    tests: tuple[str, ...]


PARTS = {
    "engine": Part(
        (_PS,),
        (
            "checkpoint", "checkpoint_root", "engine_*", "entries", "entry_files", "filters", "jit", "limits",
            "machine", "named_tables", "pool", "rounds", "sequences", "snapshot", "store", "table", "table_*", "times",
        ),
    ),
    "data": Part(
        ("client/trilith/data/",),
        ("arranging_ops", "clicks", "data_*", "dataset", "dataset_workers", "flows", "negatives", "tfrecord"),
    ),
    "client": Part(
        ("client/trilith/", "protos/"),
        (
            "backoff", "channels", "client_*", "debugging", "dedup", "discovery", "extras", "routing", "streams",
            "verbs", "waiting", "wire",
        ),
    ),
    "serving": Part(
        (
            "services/trilith_services/serving/", "services/trilith_services/exporting.py", f"{_PS}replicas/",
            f"{_PS}checkpoint/serving_rows.py", "client/trilith/rpc/balancer.py", "client/trilith/serving/",
            "client/trilith/nn/program.py", "client/trilith/nn/serving.py",
        ),
        (
            "entry_http", "entry_replicas", "entry_requests", "exports", "prediction", "served_tasks", "sync",
            "versions", "warm_up",
        ),
    ),
    "nn": Part(
        (
            "client/trilith/nn/", "client/trilith/features/", "client/trilith/tables/", "client/trilith/ops/",
            "client/trilith/peers.py", "client/trilith/pipelining.py", "services/trilith_services/demo/",
        ),
        ("demo_job", "features", "gpu", "layout", "nn_*", "ops", "peers", "pipelining", "tables_*"),
    ),
    "estimator": Part(
        ("client/trilith/estimator/", "client/trilith/compat/monolith/dense_reload.py"),
        ("dense_reload", "estimator", "estimator_*"),
    ),
    "ops": Part(
        ("services/trilith_services/",),
        (
            "commands", "console", "job_commands", "listening", "logs", "quick", "serve", "server_process",
            "supervisor", "training_view",
        ),
    ),
}  # fmt: skip
"""By the name that `make quick PART=` takes."""


def files_of(names: Iterable[str]) -> list[Path]:
    """The files of tests of parts, and those of none, which look at all sources."""
    wanted = {*names, None}
    return [file for file in sorted((ROOT / "tests/unit").glob("test_*.py")) if _part_of_test(file) in wanted]


def parts_of(files: Iterable[str]) -> list[str]:
    """The parts that files belong to: sources by their path, tests by their name."""
    found = {name for file in files if (name := _part_of(file)) is not None}
    return [name for name in PARTS if name in found]


def _part_of(file: str) -> str | None:
    path = Path(file)
    if path.parent == Path("tests/unit"):
        return _part_of_test(path)
    begun = [
        (len(beginning), name)
        for name, part in PARTS.items()
        for beginning in part.sources
        if file.startswith(beginning)
    ]
    return max(begun)[1] if begun else None


def _part_of_test(path: Path) -> str | None:
    stem = path.stem.removeprefix("test_")
    return next((name for name, part in PARTS.items() if any(fnmatch(stem, pattern) for pattern in part.tests)), None)


def changed_files(root: Path = ROOT) -> list[str]:
    """Paths of what has changed since main, committed or not; what git ignores is left out."""

    def git(*arguments: str) -> list[str]:
        done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
        return done.stdout.splitlines()

    base = git("merge-base", "HEAD", "main")[0] if git("branch", "--list", "main") else "HEAD"
    return sorted({*git("diff", "--name-only", base), *git("ls-files", "--others", "--exclude-standard")})


def main(arguments: Sequence[str]) -> int:
    """Run; returns the exit status of pytest, or 2 for a part that is none."""
    names = [name for argument in arguments if not argument.startswith("-") for name in argument.split(",")]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        print(f"error: no part {unknown[0]!r}; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if not names:
        names = parts_of(changed_files())
        if not names:
            print(f"nothing has changed in any part; name one with PART=: {', '.join(PARTS)}")
            return 0
    print(f"quick: {', '.join(names)}", flush=True)
    how = [
        "-q",
        "-m",
        "not slow",
        "-n",
        "2",
        "--dist",
        "loadfile",
        *(argument for argument in arguments if argument.startswith("-")),
    ]
    return subprocess.call([sys.executable, "-m", "pytest", *how, *map(str, files_of(names))], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
