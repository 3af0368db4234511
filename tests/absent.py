"""What a machine may lack: tests that need it are skipped there, and fail in CI, which has to bring it."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

__all__ = ["absent"]


def absent(why: str) -> NoReturn:
    """Skip the test for that reason; with CI=true, fail it."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{why}; with CI=true that is no reason to skip", pytrace=False)
    pytest.skip(why)
