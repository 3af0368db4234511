"""Sizes in bytes as people write them."""

from __future__ import annotations

import logging
import re

from trilith.errors import InvalidRequestError
from trilith.runtime.machine import cgroup_memory_bytes

__all__ = ["memory_limit", "parse_bytes"]

log = logging.getLogger(__name__)

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: str) -> int:
    """Read "512M", "16GiB", "1.5G" or a plain number of bytes; units are powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None or (not match[2] and "." in match[1]):  # half a byte is no limit, and may mean half the memory
        raise InvalidRequestError(f"{text!r} is not a size; write 512M, 16G or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def memory_limit(text: str) -> int:
    """Bytes that a process may use for what it keeps, 0 if there is no limit.

    Args:
        text: What was asked for, as `parse_bytes` reads it; "0" for no limit.

    Returns:
        As asked; within a cgroup with a limit of its own at most four fifths of that, since messages, kernels and the
        interpreter need room beside.
    """
    asked, allowed = parse_bytes(text), cgroup_memory_bytes()
    if not allowed:
        return asked
    most = allowed * 4 // 5
    if asked > allowed:
        log.warning(
            "--memory-limit %s is more than this process's cgroup allows (%d bytes); %d are used", text, allowed, most
        )
    return most if asked == 0 or asked > allowed else asked
