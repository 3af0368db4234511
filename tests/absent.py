"""What a machine may lack: tests that need it are skipped there, and fail in CI, which has to bring it."""

from __future__ import annotations

import importlib
import os
from typing import Any, NoReturn

import pytest

__all__ = ["absent", "optional"]


def absent(why: str) -> NoReturn:
    """Skip the test for that reason; with CI=true, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{why}; with CI=true that is no reason to skip", pytrace=False)
    pytest.skip(why)


def optional(name: str) -> Any:
    """A package that Trilith works with and does not need; skips the test without, but for `make test-extras`."""
    if os.environ.get("TRILITH_TEST_EXTRAS"):
        return importlib.import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed; make test-extras installs it")
