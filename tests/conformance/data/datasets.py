"""Groups of vectors by name, each with its check."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.conformance.data import Check

__all__ = ["GROUPS"]

GROUPS: dict[str, Check] = {}
