"""`python -m tests.conformance engine FILE`: one line per failed vector, then the count; status 1 if any failed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.conformance.runner import run_file


def main(argv: list[str] | None = None) -> int:
    """Run a file of vectors."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("part", choices=["engine", "worker_ops", "data"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="run the vectors whose name contains this")
    parser.add_argument("--verbose", action="store_true", help="name the vectors that pass, too")
    options = parser.parse_args(argv)
    passed = failed = 0
    for name, failures in run_file(options.part, options.file, options.only):
        if failures:
            failed += 1
            print(f"FAIL {name}: {'; '.join(failures)}", flush=True)
        else:
            passed += 1
            if options.verbose:
                print(f"ok   {name}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
