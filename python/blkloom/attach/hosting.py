"""Finds all file systems and block devices below an open file, down to the lowest.

Reads /proc and /sys only: a file system may be on the device in question, and not answer. Source: proc_pid_fdinfo(5),
proc_pid_mountinfo(5), Documentation/ABI/testing/sysfs-block.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from blkloom.attach.fuse import FuseWay
from blkloom.export.fuse.mountinfo import Mounted, parse_with_ids
from blkloom.export.fuse.state import FuseDetails

if TYPE_CHECKING:
    from blkloom.control.states import ExportState, NodeState

_LOCAL = frozenset({"devtmpfs", "tmpfs"})
"""File systems in memory. They always answer, so files in them can be examined."""


def hosts_of(descriptor: int) -> set[str]:
    """The numbers ("major:minor") of all file systems and block devices below an open file or block device. Below a
    loop device, its backing file is followed. Empty if the file was opened in another mount namespace.
    """
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        mounts = parse_with_ids(lines)
    found: set[str] = set()
    mount = mounts.get(_mount_of(descriptor))
    if mount is not None and mount.kind in _LOCAL:
        status = os.fstat(descriptor)
        if stat.S_ISBLK(status.st_mode):
            _add(_number(status.st_rdev), list(mounts.values()), found)
    if mount is not None:
        _add_mount(mount, list(mounts.values()), found)
    return found


def _mount_of(descriptor: int) -> int:
    """Number of the mount through which it was opened; -1 if the kernel does not report it."""
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii", errors="replace") as lines:
        return next((int(line.split()[1]) for line in lines if line.startswith("mnt_id:")), -1)


def _add_mount(mount: Mounted, mounts: list[Mounted], found: set[str]) -> None:
    if mount.number in found:
        return
    _add(mount.number, mounts, found)
    if mount.number.startswith("0:") and mount.source.startswith("/dev/"):  # btrfs has a number of its own
        with suppress(OSError):
            status = os.stat(mount.source)
            if stat.S_ISBLK(status.st_mode):
                _add(_number(status.st_rdev), mounts, found)


def _add(number: str, mounts: list[Mounted], found: set[str]) -> None:
    """Adds a device and all devices below it."""
    if number in found:
        return
    found.add(number)
    folder = Path("/sys/dev/block", number)
    for below in _below(folder):
        _add(below, mounts, found)
    with suppress(OSError):
        backing = os.fsdecode((folder / "loop/backing_file").read_bytes()).removesuffix("\n")
        if (mount := _holding(backing, mounts)) is not None:
            _add_mount(mount, mounts, found)


def _below(folder: Path) -> Iterator[str]:
    """The whole device of a partition, and the devices below a stacked one (dm, md)."""
    with suppress(OSError):
        if (folder / "partition").exists():
            yield (folder.resolve().parent / "dev").read_text().strip()
    with suppress(OSError):
        for below in sorted((folder / "slaves").iterdir()):
            yield (below / "dev").read_text().strip()


def _holding(path: str, mounts: list[Mounted]) -> Mounted | None:
    """The mount that contains a path; the last one of several at the same mount point."""
    inside = [mount for mount in mounts if path == mount.path or path.startswith(f"{mount.path.rstrip('/')}/")]
    return max(inside, key=lambda mount: len(mount.path), default=None) if inside else None


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def numbers_of(node: NodeState | None, exports: Iterable[ExportState]) -> set[str]:
    """The numbers ("major:minor") of the node of a device and of the mounts of its FUSE exports."""
    found = {FuseDetails.of(export).number for export in exports if export.kind == FuseWay.export}
    if node is not None and node.path.startswith("/dev/"):
        with suppress(OSError):
            found.add(Path("/sys/block", os.path.basename(node.path), "dev").read_text().strip())
    return found - {""}
