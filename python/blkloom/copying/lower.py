"""Finds what a block device is on, by number: the file of a loop device, the disk of a partition, the slaves of a
device-mapper or MD device. A copy must not write to what it reads.

Reads sysfs only. What cannot be read there has nothing below it. Source: Documentation/ABI/testing/sysfs-block.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

Number = tuple[int, int]
"""(file system, inode) of a file, or (-1, device number) of a block device."""
_BLOCK: Final = -1


def number_of(status: os.stat_result) -> Number:
    """The number of a file or block device."""
    return (_BLOCK, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def number_at(path: str) -> Number | None:
    """The number of what is at a path. None: nothing that can be reached."""
    try:
        return number_of(os.stat(path))
    except (OSError, ValueError):
        return None


def below(number: Number, *, mapped: bool = True) -> frozenset[Number]:
    """All files and block devices below one, without itself. mapped: also below device-mapper and MD devices, which may
    keep what they are on as it is (a snapshot does).
    """
    found: set[Number] = set()
    left = [number]
    while left:
        new = set(_directly_below(left.pop(), mapped=mapped)) - found - {number}
        found |= new
        left += new
    return frozenset(found)


def _directly_below(number: Number, *, mapped: bool) -> Iterator[Number]:
    if number[0] != _BLOCK:
        return
    folder = Path(f"/sys/dev/block/{os.major(number[1])}:{os.minor(number[1])}")
    if (folder / "partition").exists():
        yield from _device(folder.resolve().parent)
    with suppress(OSError):
        backing = os.fsdecode((folder / "loop/backing_file").read_bytes()).removesuffix("\n")
        if (found := number_at(backing)) is not None:
            yield found
    if mapped:
        with suppress(OSError):
            for slave in (folder / "slaves").iterdir():
                yield from _device(slave)


def _device(folder: Path) -> Iterator[Number]:
    with suppress(OSError, ValueError):
        major, minor = (folder / "dev").read_text(encoding="ascii").split(":")
        yield _BLOCK, os.makedev(int(major), int(minor))
