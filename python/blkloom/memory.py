"""The memory limit of this process: the memory of the machine, or the limit of a control group.

Source: the kernel's Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.high) and cgroup-v1/memory.rst
(memory.limit_in_bytes); proc_pid_mountinfo(5), cgroups(7).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from blkloom.units import Bytes, format_size, parse_size

LEAST_BUDGET: Final = 8 << 20
"""Least useful budget for clients, in bytes."""
_LEAST_DEFAULT: Final = 64 << 20
_MOST_DEFAULT: Final = 1 << 30
_SHARE: Final = 8


def default_budget(proc: Path = Path("/proc")) -> int:
    """Default budget in bytes for clients' requests: an eighth of `available`, 64 MiB to 1 GiB."""
    return min(max(available(proc) // _SHARE, _LEAST_DEFAULT), _MOST_DEFAULT)


def parse_budget(text: str) -> int:
    """A budget in bytes, from a size with a suffix. Raises ValueError."""
    size = parse_size(text)
    if size < LEAST_BUDGET:
        raise ValueError(f"{text} is less than {format_size(Bytes(LEAST_BUDGET))}, the least that requests need")
    return size


def available(proc: Path = Path("/proc")) -> int:
    """Bytes of memory that this process, and others of its control groups with it, may use."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits(proc)])


def _limits(proc: Path) -> Iterator[int]:
    """Of its control group and those above it, as far as they can be seen."""
    try:
        groups = [line.split(":", 2) for line in _text(proc / "self/cgroup").splitlines()]
        mounts = [line.partition(" - ")[::2] for line in _text(proc / "self/mountinfo").splitlines()]
    except OSError:
        return
    for place, kind in mounts:
        root, point = place.split()[3:5]
        match kind.split():
            case ["cgroup2", *_]:
                own, files = [path for number, _, path in groups if number == "0"], ("memory.max", "memory.high")
            case ["cgroup", _, options] if "memory" in options.split(","):
                own = [path for _, names, path in groups if "memory" in names.split(",")]
                files = ("memory.limit_in_bytes", "memory.limit_in_bytes")
            case _:
                continue
        for path in own:
            below = os.path.relpath(path, root)
            # A container may see its own group as the root, and its path from outside.
            start = Path(point) if below.startswith("..") else Path(point, below)
            for folder in (start, *start.parents):
                yield from _values(folder, files)
                if folder == Path(point):
                    break


def _values(folder: Path, files: tuple[str, str]) -> Iterator[int]:
    for file in files:
        try:
            text = _text(folder / file).strip()
        except OSError:  # the root has none
            continue
        if text.isdigit():
            yield int(text)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="surrogateescape")
