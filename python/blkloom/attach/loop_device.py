"""Kernel loop devices: attach one to a file, detach, resize. Source: linux/loop.h, loop(4).

These functions may wait for the backing file, whose worker may be restarting, so they run as tasks of `process.py`.
`state_of` reads sysfs only, and does not wait.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from blkloom.attach.records import remove_record, write_record
from blkloom.attach.users import users_of_block_device
from blkloom.errors import AttachError, DeviceBusy

CONTROL: Final = "/dev/loop-control"
MAJOR: Final = 7
BUSY_SECONDS: Final = 3.0
"""How long a detach waits for udev, which opens new and changed devices for a moment."""
_GONE_SECONDS: Final = 5.0
"""How long the kernel may take to detach a device after its last close."""
_PAUSE: Final = 0.02

_CLR_FD, _SET_STATUS64, _GET_STATUS64 = 0x4C01, 0x4C04, 0x4C05
_SET_CAPACITY, _SET_BLOCK_SIZE, _CONFIGURE, _GET_FREE = 0x4C07, 0x4C09, 0x4C0A, 0x4C82
_BLKROSET, _BLKROGET = 0x125D, 0x125E
_READ_ONLY, _AUTOCLEAR, _PARTSCAN, _DIRECT_IO = 1, 4, 8, 16
_INFO: Final = struct.Struct("=5Q4I64s64s32s2Q")
"""struct loop_info64."""
_CONFIG: Final = struct.Struct(f"=2I{_INFO.size}s64x")
"""struct loop_config."""
_FLAGS_AT: Final = 8
"""Place of lo_flags among the fields of `_INFO`."""


class LoopState(NamedTuple):
    """State of an attached loop device in sysfs. backing: path of its file; "/" if that was unmounted. sequence: the
    kernel's diskseq, unique for each attachment since boot; 0 before Linux 5.15.
    """

    backing: str
    sequence: int


def path_of(number: int) -> str:
    """The path of the device node."""
    return f"/dev/loop{number}"


def state_of(number: int, *, sysfs: str = "/sys/block") -> LoopState | None:
    """The state of a loop device; None if it is not attached."""
    folder = Path(sysfs, f"loop{number}")
    try:
        backing = os.fsdecode((folder / "loop/backing_file").read_bytes()).removesuffix("\n")
    except OSError:
        return None
    try:
        return LoopState(backing, int((folder / "diskseq").read_text()))
    except (OSError, ValueError):
        return LoopState(backing, 0)


def attach(
    file: str, records: str, name: str, read_only: bool, block_size: int, partitions: bool, supervisor: int
) -> dict[str, Any]:
    """Attaches the first free loop device to a file, for direct I/O. Returns number, sequence, direct_io. records: the
    directory of its record. supervisor: pid of the calling supervisor; if it has ended, the loop device is detached.

    The kernel reads the partition table before this returns. Until then, the kernel detaches the device if this process
    ends.
    """
    flags = _AUTOCLEAR | _DIRECT_IO | _READ_ONLY * read_only | _PARTSCAN * partitions
    backing = os.open(file, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        number, device = _configure_free(backing, file, records, name, flags, block_size)
    finally:
        os.close(backing)
    try:
        found = state_of(number)
        if found is None or os.getppid() != supervisor:
            raise AttachError("was detached at once", path=path_of(number), errno=errno.ENODEV)
        write_record(records, f"loop{number}", name, found.sequence)
        if not read_only:
            _set_read_only(device, False)  # a former user may have left it so
        _change_flags(device, lambda flags: flags & ~_AUTOCLEAR)
    except BaseException:
        os.close(device)
        remove_record(records, f"loop{number}")
        raise
    os.close(device)
    direct = Path(f"/sys/block/loop{number}/loop/dio").read_text().strip() == "1"
    return {"number": number, "sequence": found.sequence, "direct_io": direct}


def _configure_free(backing: int, file: str, records: str, name: str, flags: int, block_size: int) -> tuple[int, int]:
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, os.fsencode(file)[-63:], b"", b"", 0, 0)
    config = _CONFIG.pack(backing, block_size, info)
    control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        while True:
            number = fcntl.ioctl(control, _GET_FREE)
            device = _open(number)
            write_record(records, f"loop{number}", name, 0)  # before udev sees it
            try:
                fcntl.ioctl(device, _CONFIGURE, config)
            except OSError as error:
                os.close(device)
                remove_record(records, f"loop{number}")
                if error.errno == errno.EBUSY:
                    continue  # another process was quicker
                cure = "Linux 5.8 or later is needed" if error.errno in (errno.EINVAL, errno.ENOTTY) else ""
                what = f"cannot be attached to {file}: {error.strerror}"
                raise AttachError(what, path=path_of(number), errno=error.errno or errno.EIO, cure=cure) from error
            return number, device
    finally:
        os.close(control)


def _open(number: int) -> int:
    """Opens the device; first makes its node if there is no devtmpfs."""
    with suppress(FileExistsError):
        os.mknod(path_of(number), 0o60660, os.makedev(MAJOR, number))
    return os.open(path_of(number), os.O_RDWR | os.O_CLOEXEC)


def _change_flags(device: int, change: Callable[[int], int]) -> None:
    try:
        fields = list(_INFO.unpack(fcntl.ioctl(device, _GET_STATUS64, bytes(_INFO.size))))
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise
        # The file does not answer; offset and limit of our devices are 0, and the kernel ignores the rest.
        fields = [0] * 8 + [_AUTOCLEAR, b"", b"", b"", 0, 0]
    fields[_FLAGS_AT] = change(fields[_FLAGS_AT])
    fcntl.ioctl(device, _SET_STATUS64, _INFO.pack(*fields))


def detach(number: int, sequence: int, lazy: bool, link: str, records: str) -> None:
    """Detaches a loop device. lazy: after its last close. Without `lazy`, raises DeviceBusy if it is in use, and it
    stays attached. Does nothing if it is attached to another file meanwhile. link: another path of the device.
    records: the directory of its record.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while (found := state_of(number)) is not None and found.sequence == sequence:
        if _detached(number, lazy=lazy):
            break
        users = users_of_block_device(path_of(number), link)
        if time.monotonic() >= deadline or any("udev" not in user for user in users):
            by = ", ".join(users) or f"`fuser -vm {path_of(number)}` tells by whom"
            raise DeviceBusy(f"{path_of(number)} is in use: {by}", cure="end that first, or use --lazy or --force")
        time.sleep(_PAUSE)
    remove_record(records, f"loop{number}")
    if lazy:
        announce(number)
        return
    deadline = time.monotonic() + _GONE_SECONDS
    while (found := state_of(number)) is not None and found.sequence == sequence and time.monotonic() < deadline:
        time.sleep(_PAUSE)


def _detached(number: int, *, lazy: bool) -> bool:
    """Tries to detach the device. Whether it is detached, or will be after its last close."""
    try:
        device = os.open(path_of(number), os.O_RDONLY | os.O_CLOEXEC | (0 if lazy else os.O_EXCL))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        if error.errno in (errno.ENXIO, errno.ENOENT):
            return True
        raise
    try:
        if state_of(number) is not None:
            _set_read_only(device, False)  # the kernel would keep this for the next file
        fcntl.ioctl(device, _CLR_FD)
        if not lazy:  # another process has it open: undo the pending detach
            _change_flags(device, lambda flags: flags & ~_AUTOCLEAR)
            return False
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
    finally:
        os.close(device)
    return True


def set_read_only(file: str, read_only: bool) -> None:
    """Has the kernel refuse writes to a block device, or allow them."""
    device = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _set_read_only(device, read_only)
    finally:
        os.close(device)


def _set_read_only(device: int, read_only: bool) -> None:
    (now,) = struct.unpack("i", fcntl.ioctl(device, _BLKROGET, bytes(4)))
    if bool(now) != read_only:
        fcntl.ioctl(device, _BLKROSET, struct.pack("i", read_only))


def announce(number: int) -> None:
    """Sends a uevent, so that udev reads the record again."""
    with suppress(OSError):  # it has gone
        Path(f"/sys/block/loop{number}/uevent").write_text("change")


def logical_block_size(path: str) -> int:
    """The logical block size of a block device, in bytes. Reads sysfs. Raises OSError."""
    return int(Path("/sys/block", os.path.basename(path), "queue/logical_block_size").read_text())


def refresh(number: int, file: str, read_only: bool, block_size: int, link: str) -> None:
    """Takes over the size of its file, the logical block size in bytes, and whether it can be written to. Raises
    DeviceBusy if the block size changes while the device is in use; the rest is changed all the same. link: another
    path of the device.
    """
    os.stat(file)  # the kernel's loop device takes the size that it knows
    device = os.open(path_of(number), os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, _SET_CAPACITY)
        _set_read_only(device, read_only)
    finally:
        os.close(device)
    if logical_block_size(path_of(number)) != block_size:
        _set_block_size(number, block_size, link)


def _set_block_size(number: int, block_size: int, link: str) -> None:
    """Changes the block size while no other program uses the device: a mounted file system would break."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            device = os.open(path_of(number), os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _SET_BLOCK_SIZE, block_size)
            finally:
                os.close(device)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EAGAIN):
                raise
            users = users_of_block_device(path_of(number), link)
            if time.monotonic() >= deadline or any("udev" not in user for user in users):
                now = logical_block_size(path_of(number))
                what = (
                    f"{path_of(number)} keeps its blocks of {now} bytes: it is in use: {', '.join(users) or 'unknown'}"
                )
                cure = "end that first, then resume the device again"
                raise DeviceBusy(what, cure=cure) from error
            time.sleep(_PAUSE)
        else:
            return
