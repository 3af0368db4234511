"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

from trilith.errors import InvalidRequestError

__all__ = ["parse_bytes"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: str) -> int:
    """Read "512M", "16GiB", "1.5G" or a plain number of bytes; units are powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise InvalidRequestError(f"{text!r} is not a size; write 512M, 16G or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])
