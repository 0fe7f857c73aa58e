"""The amount of memory that a process may use, with both versions of control groups and without."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blkloom.memory import available, default_budget, parse_budget

MIB = 1 << 20
MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path / "proc"


def describe(proc: Path, groups: str, *mounts: str) -> None:
    (proc / "self/cgroup").write_text(groups)
    lines = (f"{number} 1 0:{number} {mount}\n" for number, mount in enumerate(mounts, 20))
    (proc / "self/mountinfo").write_text("".join(lines))


def limit(folder: Path, file: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(f"{text}\n")


def test_without_control_groups_it_is_the_machine_s(proc: Path) -> None:
    assert available(proc) == MACHINE
    describe(proc, "0::/\n", "/ / rw - ext4 /dev/sda rw")
    assert available(proc) == MACHINE


def test_the_least_of_the_group_and_those_above_it_counts(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    describe(proc, "0::/system.slice/disk.service\n", f"/ {root} rw - cgroup2 cgroup2 rw")
    limit(root / "system.slice/disk.service", "memory.max", "max")
    assert available(proc) == MACHINE
    limit(root / "system.slice", "memory.max", str(512 * MIB))
    assert available(proc) == 512 * MIB
    limit(root / "system.slice/disk.service", "memory.high", str(100 * MIB))
    assert available(proc) == 100 * MIB


def test_a_container_sees_its_group_as_the_root(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    limit(root, "memory.max", str(256 * MIB))
    describe(proc, "0::/\n", f"/ {root} rw - cgroup2 cgroup2 rw")
    assert available(proc) == 256 * MIB
    describe(proc, "0::/docker/1234\n", f"/docker/1234 {root} rw - cgroup2 cgroup2 rw")
    assert available(proc) == 256 * MIB
    describe(proc, "0::/docker/1234\n", f"/elsewhere {root} rw - cgroup2 cgroup2 rw")
    assert available(proc) == 256 * MIB


def test_version_1_has_a_hierarchy_for_memory(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "cgroup/memory"
    groups = "4:cpu:/elsewhere\n3:memory:/a/b\n0::/\n"
    mounts = [f"/ {tmp_path / 'cgroup/cpu'} rw - cgroup cgroup rw,cpu", f"/ {root} rw - cgroup cgroup rw,memory"]
    describe(proc, groups, *mounts)
    limit(root / "a/b", "memory.limit_in_bytes", "9223372036854771712")
    limit(root / "a", "memory.limit_in_bytes", str(128 * MIB))
    assert available(proc) == 128 * MIB


@pytest.mark.parametrize(
    ("limited", "budget"), [(64 * MIB, 64 * MIB), (1 << 30, 128 * MIB), (4 << 30, 512 * MIB), (1 << 50, None)]
)
def test_the_budget_is_an_eighth_within_bounds(proc: Path, tmp_path: Path, limited: int, budget: int | None) -> None:
    root = tmp_path / "cgroup"
    limit(root, "memory.max", str(limited))
    describe(proc, "0::/\n", f"/ {root} rw - cgroup2 cgroup2 rw")
    expected = min(max(MACHINE // 8, 64 * MIB), 1 << 30) if budget is None else min(budget, max(MACHINE // 8, 64 * MIB))
    assert default_budget(proc) == expected


def test_a_budget_says_what_is_too_little() -> None:
    assert parse_budget("8M") == 8 * MIB
    with pytest.raises(ValueError, match="7M is less than 8"):
        parse_budget("7M")
    with pytest.raises(ValueError, match="much"):
        parse_budget("much")
