"""One input of the fuzzer: the scanner and the protobuf library held against each other."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from tests.scan_cases import EXAMPLE, INSTANCE, example_rows, instance_rows
from tests.unit.test_data_scan import found, settle_example, settle_instance
from trilith.data.parse.columns import extract
from trilith.data.records import Records
from trilith.errors import DataError

__all__ = ["check"]


def check(data: bytes) -> None:
    """Hold scanner and library against each other on one input."""
    if not data:
        return
    if data[0] % 2:
        kind, fields, rows, settle = "instance", INSTANCE, instance_rows, settle_instance
    else:
        kind, fields, rows, settle = "example", EXAMPLE, example_rows, settle_example
    payload = data[1:]
    try:
        want = rows(payload)
    except (DecodeError, DataError):
        want = None
    columns = extract(Records.of([payload], kind), fields, on_error="skip")
    if (want is None) != (columns.skipped == 1):
        raise AssertionError(f"{kind} {payload.hex()}: the library {'refuses' if want is None else 'reads'} it")
    if want is not None:
        got = found(columns, 0)
        settle(got)
        if got != want:
            raise AssertionError(f"{kind} {payload.hex()}: {[key for key in want if got.get(key) != want[key]]} differ")
