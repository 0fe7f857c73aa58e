"""Mappability of a file: whether its blocks stay where they are until another process opens the file.

Files may be sparse, shared, defragmented or truncated: the usual objection to dm-loop. This module checks the state of
the file; a lease (`lease`) protects it against later changes. Every refusal names the reason.
Source: FIEMAP_EXTENT_* (fiemap.rst), FS_*_FL and FS_XFLAG_* (include/uapi/linux/fs.h), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import stat
import struct
from typing import Final

import msgspec
import numpy as np

from blkloom.filemap import fiemap
from blkloom.filemap.not_mappable import NotMappable

_GETFLAGS: Final = 0x80086601
_GETXATTR: Final = 0x801C581F
_XFLAG_REALTIME: Final = 0x1
_EXT: Final = 0xEF53
_XFS: Final = 0x58465342

_ATTRIBUTES: Final = {
    0x00000004: "it is compressed",
    0x00000800: "it is encrypted",
    0x00004000: "its data goes through the journal (chattr +j)",
    0x00100000: "fs-verity protects it",
    0x02000000: "it is accessed directly in memory (DAX)",
    0x10000000: "its data may lie in its inode",
}
"""FS_COMPR_FL, FS_ENCRYPT_FL, FS_JOURNAL_DATA_FL, FS_VERITY_FL, FS_DAX_FL, FS_INLINE_DATA_FL."""

_EXTENTS: Final = (
    (fiemap.DELALLOC, "is not allocated on the disk yet (delayed allocation)"),
    (fiemap.UNKNOWN, "is in no known place"),
    (fiemap.ENCRYPTED, "is encrypted"),
    (fiemap.ENCODED, "is compressed or encrypted"),
    (fiemap.INLINE, "lies in the file system's metadata"),
    (fiemap.TAIL, "shares a block with other files"),
    (fiemap.NOT_ALIGNED, "does not begin and end with a block"),
    (fiemap.UNWRITTEN, "is allocated but not written"),
    (fiemap.SHARED, "is shared with another file (reflink)"),
)
_CURES: Final = {
    fiemap.UNWRITTEN: "write it once: dd if=/dev/zero of=FILE bs=1M conv=notrunc count=...",
    fiemap.SHARED: "copy it: cp --reflink=never",
}

_libc: Final = ctypes.CDLL(None, use_errno=True)
_STATFS: Final = 256
"""Bytes; larger than every `struct statfs`."""


class Disk(msgspec.Struct, frozen=True):
    """The block device of a file system. node: its path. number: its st_rdev."""

    node: str
    number: int


def disk_of(fd: int) -> Disk:
    """The block device below an open file, if files of this file system can be mapped. Raises NotMappable, OSError."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise NotMappable("The file is not a regular file", "use the device without block_map")
    magic = _magic(fd)
    if magic not in (_EXT, _XFS):
        name = (_mounted(status.st_dev) or (f"file system {magic:#x}",))[0]
        raise NotMappable(f"{name} may move the blocks of a file at any time", "put it on ext2, ext3, ext4 or xfs")
    node = _node(status.st_dev)
    if magic == _EXT and "data=journal" in _ext4_options(node, status.st_dev):
        raise NotMappable("its file system is mounted with data=journal", "mount it with data=ordered")
    attributes = _attributes(fd)
    for flag, why in _ATTRIBUTES.items():
        if attributes & flag:
            raise NotMappable(why)
    if magic == _XFS and _xflags(fd) & _XFLAG_REALTIME:
        raise NotMappable("it lies on the realtime device of its file system")
    return Disk(node, status.st_dev)


def check_extents(extents: fiemap.Extents, start: int, end: int, *, holes: bool) -> None:
    """Checks that the file's bytes from `start` to `end` may be mapped. holes: whether holes are allowed. Raises
    NotMappable, which names the first byte that may not be mapped.
    """
    for flag, why in _EXTENTS:
        if (bad := np.flatnonzero(extents.flags & np.uint32(flag))).size:
            at = int(extents.logical[bad[0]])
            raise NotMappable(f"its extent at byte {at} {why}", _CURES.get(flag, ""))
    if (other := np.flatnonzero(extents.flags)).size:
        first = other[0]
        raise NotMappable(f"its extent at byte {extents.logical[first]} has unknown flags {extents.flags[first]:#x}")
    if holes:
        return
    ends = extents.logical + extents.length
    expected = np.concatenate((np.array([start], np.uint64), ends))
    begins = np.concatenate((extents.logical, np.array([end], np.uint64)))
    if (gaps := np.flatnonzero(begins != expected)).size:
        at = int(expected[gaps[0]])
        raise NotMappable(f"File is sparse: there is a hole at byte {at}", "fill it, or make the device read-only")


def check_place(extents: fiemap.Extents, size: int) -> None:
    """Checks that the extents lie on a block device of `size` bytes. Raises NotMappable."""
    if np.any((extents.physical > np.uint64(size)) | (extents.length > np.uint64(size) - extents.physical)):
        raise NotMappable(f"its extents reach past the {size} bytes of its block device", "check the file system")


def check_alignment(extents: fiemap.Extents, start: int, end: int, block: int) -> None:
    """Checks that direct I/O can reach all bytes. block: logical block size of the block device, bytes. Raises
    NotMappable.
    """
    for what, value in (("offset", start), ("end", end)):
        if value % block:
            raise NotMappable(
                f"Unaligned {what} {value}: its block device has blocks of {block} bytes", f"a multiple of {block}"
            )
    if np.any((extents.physical % np.uint64(block)) | (extents.logical % np.uint64(block))):
        raise NotMappable(f"its extents do not begin with a block of {block} bytes")


def _magic(fd: int) -> int:
    """Magic number of the file system, from fstatfs(2). It is right also where mountinfo and st_dev are not: in another
    mount namespace, and on overlayfs.
    """
    buffer = ctypes.create_string_buffer(_STATFS)
    if _libc.fstatfs(fd, buffer):
        number = ctypes.get_errno()
        raise OSError(number, f"fstatfs: {os.strerror(number)}")
    return int(ctypes.c_ulong.from_buffer(buffer).value)


def _mounted(number: int) -> tuple[str, frozenset[str]] | None:
    """Type and options of the file system on a device, from mountinfo; None if it is not mounted here."""
    wanted = f"{os.major(number)}:{os.minor(number)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields, _, tail = line.partition(" - ")
            if fields.split()[2] == wanted:
                kind, _, options = tail.split()[:3]
                return kind, frozenset(options.split(","))
    return None


def _ext4_options(node: str, number: int) -> frozenset[str]:
    """Mount options of an ext4 file system. mountinfo leaves out options that the superblock sets."""
    try:
        with open(f"/proc/fs/ext4/{os.path.basename(node)}/options", encoding="utf-8", errors="replace") as lines:
            return frozenset(line.strip() for line in lines)
    except OSError:  # the kernel's driver for ext2 alone, which has no journal, or another /proc
        found = _mounted(number)
    if found is None:
        raise NotMappable("its mount options cannot be seen (/proc/fs/ext4, /proc/self/mountinfo)")
    return found[1]


def _node(number: int) -> str:
    try:
        with open(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/uevent", encoding="ascii") as lines:
            found = re.search(r"^DEVNAME=(.+)$", lines.read(), re.MULTILINE)
    except FileNotFoundError:
        found = None
    if found is None:
        raise NotMappable("its file system has no block device")
    return f"/dev/{found[1]}"


def _attributes(fd: int) -> int:
    buffer = bytearray(8)
    fcntl.ioctl(fd, _GETFLAGS, buffer)
    return int.from_bytes(buffer[:4], "little")


def _xflags(fd: int) -> int:
    buffer = bytearray(28)
    fcntl.ioctl(fd, _GETXATTR, buffer)
    return int(struct.unpack_from("=I", buffer)[0])
