"""What a process may use, by its affinity and its cgroups of either version."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from trilith.runtime import machine
from trilith_services.sizes import memory_limit

GB = 1 << 30


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty tree of cgroups that this process is in."""
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 64 * GB // 4096, "SC_PAGE_SIZE": 4096}[name])
    machine._cpu_quota.cache_clear()
    yield tmp_path
    machine._cpu_quota.cache_clear()


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_cgroups_it_is_the_machine_and_the_affinity(cgroups: Path) -> None:
    assert machine.cgroup_memory_bytes() == 0
    assert machine.cores() == 16


def test_version_2_counts_with_every_group_above(cgroups: Path) -> None:
    put(cgroups / "own", "0::/kube/pod/box\n")
    root = cgroups / "cgroup"
    put(root / "kube/pod/box/memory.max", "max\n")
    put(root / "kube/pod/memory.max", f"{8 * GB}\n")
    put(root / "kube/memory.max", f"{16 * GB}\n")
    put(root / "kube/pod/cpu.max", "250000 100000\n")
    put(root / "kube/pod/box/cpu.max", "max 100000\n")
    assert machine.cgroup_memory_bytes() == 8 * GB
    assert machine.cores() == 3  # two and a half


def test_version_1_has_a_tree_for_each_controller(cgroups: Path) -> None:
    put(cgroups / "own", "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n")
    root = cgroups / "cgroup"
    put(root / "memory/docker/abc/memory.limit_in_bytes", f"{2 * GB}\n")
    put(root / "memory/memory.limit_in_bytes", "9223372036854771712\n")  # none
    put(root / "cpu,cpuacct/docker/abc/cpu.cfs_quota_us", "50000\n")
    put(root / "cpu,cpuacct/docker/abc/cpu.cfs_period_us", "100000\n")
    put(root / "cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    assert machine.cgroup_memory_bytes() == 2 * GB
    assert machine.cores() == 1


def test_a_container_that_sees_its_own_group_as_the_root(cgroups: Path) -> None:
    put(cgroups / "own", "0::/../../elsewhere\n")
    put(cgroups / "cgroup/memory.max", f"{3 * GB}\n")
    put(cgroups / "cgroup/cpu.max", "400000 100000")
    assert machine.cgroup_memory_bytes() == 3 * GB
    assert machine.cores() == 4


@pytest.mark.parametrize("text", ["", "max", "0 0", "nonsense", "100000 0"])
def test_what_says_nothing_is_no_limit(cgroups: Path, text: str) -> None:
    put(cgroups / "own", "0::/\n")
    put(cgroups / "cgroup/cpu.max", text)
    put(cgroups / "cgroup/memory.max", text)
    assert machine.cgroup_memory_bytes() == 0
    assert machine.cores() == 16


def test_a_memory_limit_stays_within_the_cgroup(cgroups: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(cgroups / "own", "0::/\n")
    assert [memory_limit(each) for each in ("0", "1G", "100G")] == [0, GB, 100 * GB]
    put(cgroups / "cgroup/memory.max", f"{10 * GB}")
    assert [memory_limit(each) for each in ("0", "1G", "9G")] == [8 * GB, GB, 9 * GB]
    assert not caplog.records
    assert memory_limit("100G") == 8 * GB
    assert "100G is more than this process's cgroup allows" in caplog.text
