"""Partitions of a block device in the kernel: finds those that are there, and adds and removes them (BLKPG).

The kernel scans the partition table of a node by itself when it is attached, if it knows that kind of table. These
functions read the table through the node, add the partitions that the kernel has not found, and update them after a
change of the table. They may wait for the device, so they run as tasks of `process.py`. Source: linux/blkpg.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

from blkloom.attach.kernel_partitions import KernelPartition, kernel_partitions
from blkloom.attach.users import users_of_block_device
from blkloom.errors import AttachError, DeviceBusy
from blkloom.partitions import Disk, find_partitions
from blkloom.units import SECTOR

_BLKPG, _BLKFLSBUF = 0x1269, 0x1261
_ADD, _DELETE = 1, 2
_PARTITION: Final = struct.Struct("=qqi64s64s4x")
"""struct blkpg_partition: start and length in bytes, number, two unused names."""
_CALL: Final = struct.Struct("@iiiP")
"""struct blkpg_ioctl_arg."""


def update_partitions(file: str, block_size: int, link: str) -> list[str]:
    """Updates the kernel's partitions of a block device to its partition table; correct ones stay. Returns the warnings
    about the table. block_size: the logical one, in bytes. link: another path of the device. Raises DeviceBusy, and
    changes nothing, if a partition that must change is in use; AttachError; OSError.
    """
    device = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, _BLKFLSBUF)  # another client of the device may have changed what is cached
        size = os.lseek(device, 0, os.SEEK_END)

        def read(offset: int, length: int) -> bytes:
            data = os.pread(device, length, offset)
            if len(data) < length:
                raise OSError(errno.EIO, "ends before its size", file)
            return data

        table = find_partitions(Disk(size, block_size, read))
        wanted = {partition.number: (partition.start, partition.length) for partition in table.partitions}
        there = kernel_partitions(file)
        stale = [number for number, (_, *place) in there.items() if wanted.get(number) != tuple(place)]
        _delete(device, file, {number: there[number] for number in stale}, link)
        for number, (start, length) in wanted.items():
            if number not in there or number in stale:
                _change(device, file, _ADD, number, start * SECTOR, length * SECTOR)
        for partition in kernel_partitions(file).values():
            _make_node(partition.path)
    finally:
        os.close(device)
    return table.warnings


def remove_partitions(file: str, link: str) -> None:
    """Removes the kernel's partitions of a block device. Raises DeviceBusy, and removes none, if one is in use."""
    device = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _delete(device, file, kernel_partitions(file), link)
    finally:
        os.close(device)


def _delete(device: int, file: str, partitions: dict[int, KernelPartition], link: str) -> None:
    for number, partition in partitions.items():
        users = users_of_block_device(partition.path, f"{link}-part{number}")
        if users := [user for user in users if "udev" not in user]:
            raise DeviceBusy(f"{partition.path} is in use: {', '.join(users)}", cure="end that first")
    for number, partition in reversed(partitions.items()):
        _change(device, file, _DELETE, number, 0, 0)
        _remove_node(partition.path)


def _change(device: int, file: str, task: int, number: int, start: int, length: int) -> None:
    """start, length: in bytes."""
    partition = ctypes.create_string_buffer(_PARTITION.pack(start, length, number, b"", b""), _PARTITION.size)
    try:
        fcntl.ioctl(device, _BLKPG, _CALL.pack(task, 0, _PARTITION.size, ctypes.addressof(partition)))
    except OSError as error:
        if error.errno == errno.EBUSY and task == _DELETE:
            what = f"partition {number} of {file} is in use"
            raise DeviceBusy(what, cure="end that first") from error
        doing = "added" if task == _ADD else "removed"
        what = f"partition {number} cannot be {doing}: {error.strerror}"
        raise AttachError(what, path=file, errno=error.errno or errno.EIO) from error


def _make_node(path: str) -> None:
    """Makes the node of a partition, if there is no devtmpfs that has made it."""
    major, minor = map(int, Path("/sys/class/block", os.path.basename(path), "dev").read_text().split(":"))
    with suppress(FileExistsError):
        os.mknod(path, 0o60660, os.makedev(major, minor))


def _remove_node(path: str) -> None:
    """Removes the node of a partition that has gone, if there is no devtmpfs that has removed it."""
    with suppress(FileNotFoundError):
        os.unlink(path)
