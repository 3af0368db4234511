"""Fuzz the scanner against the protobuf library, guided by coverage.

Needs atheris, which is no dependency of the project: `pip install atheris`. Then

    NUMBA_DISABLE_JIT=1 python -m tests.fuzz.scan [corpus folder] [-max_total_time=60]

With the JIT off the kernels are Python, so that the fuzzer sees which of their branches it reached; without the
variable it runs compiled code, far faster and blind. The first byte of an input chooses the kind of record, the rest is
the record. A difference between scanner and library is an exception, which atheris reports with the input that made it.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Fuzz until stopped."""
    import atheris

    with atheris.instrument_imports(include=["trilith.data.scan"]):
        from tests.fuzz.check import check

    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
