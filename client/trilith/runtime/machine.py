"""What this process may use of its machine: cores and memory, as its affinity and its cgroups have it."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cgroup_memory_bytes", "commits_strictly", "cores"]

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def cores() -> int:
    """Cores that this process may keep busy, at least 1: those it may run on, or the time its cgroup may take."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        allowed = os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _cpu_quota())))


def cgroup_memory_bytes() -> int:
    """Bytes of memory that this process's cgroups allow, the least of them; 0 if that is no less than the machine's."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = [
        int(limit[0])
        for folder in _folders("memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if len(limit := _numbers(folder / name)) == 1 and 0 < limit[0] < machine
    ]
    return min(found, default=0)


def commits_strictly() -> bool:
    """Whether the kernel counts reserved memory as used, so that little should be reserved ahead."""
    return _numbers(_OVERCOMMIT) == [2]


@functools.lru_cache(1)
def _cpu_quota() -> float:
    """Cores' worth of time that the cgroups allow; infinite if they do not say. Read once: it is asked for often."""
    found = [math.inf]
    for folder in _folders("cpu"):
        v2 = _numbers(folder / "cpu.max")
        quota, period = _numbers(folder / "cpu.cfs_quota_us"), _numbers(folder / "cpu.cfs_period_us")
        if len(v2) == 2 and v2[1] > 0:
            found.append(v2[0] / v2[1])
        elif quota and period and quota[0] > 0 and period[0] > 0:
            found.append(quota[0] / period[0])
    return min(found)


def _folders(controller: str) -> Iterator[Path]:
    """The process's cgroup of a controller and those above it, in version 1 and 2."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        # Version 1 mounts a controller by its name or with those that it shares a mount with. A container may see its
        # own cgroup as the root of the mount, whatever the path says.
        roots = [_CGROUPS] if not controllers else [_CGROUPS / controllers, _CGROUPS / controller]
        for root in roots:
            own = root / path.lstrip("/")
            yield from (each for each in (own, *own.parents) if each == root or root in each.parents)


def _numbers(path: Path) -> list[float]:
    """The numbers in a file, `max` as infinity; none if it cannot be read."""
    try:
        return [math.inf if word == "max" else float(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
