"""Lists the partitions that the kernel has of a block device. Reads sysfs only, so it does not wait for the device."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class KernelPartition(NamedTuple):
    """A partition in sysfs. path: of its node. start, length: in sectors."""

    path: str
    start: int
    length: int


def kernel_partitions(file: str, *, sysfs: str = "/sys/block") -> dict[int, KernelPartition]:
    """The partitions that the kernel has of a block device, by number. Reads sysfs only."""
    found = {}
    name = os.path.basename(file)
    for part in sorted(Path(sysfs, name).glob(f"{name}*/partition")):
        with suppress(OSError):  # it has just gone
            number = int(part.read_text())
            start, length = int((part.parent / "start").read_text()), int((part.parent / "size").read_text())
            found[number] = KernelPartition(f"/dev/{part.parent.name}", start, length)
    return dict(sorted(found.items()))
