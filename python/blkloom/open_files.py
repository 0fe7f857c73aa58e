"""Files of data: how they are opened and closed, the limit of open files of this process (RLIMIT_NOFILE), how much of
it is left, and what is kept in reserve.

A worker keeps some descriptors that its clients cannot use up: without them it could not be taken over by the next
supervisor, nor hand over what it has. The supervisor keeps some for the same: each descriptor of its workers passes
through it. The soft limit is 1024 on most systems, for programs that use select(2); none of ours does, and processes
that serve raise it to the hard one. Those are not inherited by other programs: nothing here starts any.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
import sys
from typing import Final

WORKER_RESERVE: Final = 64
"""For a supervisor's connection, and what is sent to it at once (`Host.keep`)."""
SUPERVISOR_RESERVE: Final = 320
"""For what comes in one message of a worker, while another worker is started."""
_GETVERSION: Final = 0x80087601
"""FS_IOC_GETVERSION, which writes an int (ioctl_iflags(2))."""


def raise_limit() -> None:
    """The soft limit becomes the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def is_rotational(fd: int, *, sysfs: str = "/sys/dev/block") -> bool:
    """Whether a file or block device is on a rotating disk, as far as the kernel tells. False for file systems that are
    not on one block device. Source: Documentation/ABI/stable/sysfs-block.
    """
    status = os.fstat(fd)
    number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    device = f"{sysfs}/{os.major(number)}:{os.minor(number)}"
    for queue in (f"{device}/queue", f"{device}/../queue"):  # a partition is in the directory of its disk
        try:
            with open(f"{queue}/rotational", encoding="ascii") as file:
                return file.read().strip() == "1"
        except OSError:
            continue
    return False


def close(fd: int) -> None:
    """A descriptor of a file of data. Storage that breaks says so here, too (FUSE, NFS), in whatever process closes a
    copy: it is closed even so, and a sync will tell. Raises OSError only if it was none.
    """
    try:
        os.close(fd)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise


def limit() -> int:
    """The soft limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def left() -> int:
    """How many more descriptors can be opened; not below 0."""
    # From Linux 6.2 on the folder's size is their number (proc_pid_fd(5)); before, and in sandboxes, it is 0.
    used = os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd"))
    return max(0, limit() - used)


def are_scarce(reserve: int, *, more: int = 0) -> bool:
    """Whether `more` descriptors cannot be had without touching the reserve. A limit too low for one that large has a
    quarter of it in reserve.
    """
    return left() - more <= min(reserve, limit() // 4)


def advice() -> str:
    """What to do where there are too few."""
    return (
        f"raise the hard limit of open files, which is {limit()} here (ulimit -Hn, or LimitNOFILE= in a systemd unit)"
    )


def descriptor_path(fd: int) -> str:
    """A path that leads to what this process's descriptor is, whatever has become of its name: opening it makes an open
    file description of its own, with flags of its own (proc_pid_fd(5)).
    """
    return f"/proc/self/fd/{fd}"


def generation(fd: int) -> int:
    """Generation number of the inode; a later file with the same inode number has another one. 0 if there is none."""
    buffer = bytearray(8)
    try:
        fcntl.ioctl(fd, _GETVERSION, buffer)
    except OSError:
        return 0
    return int.from_bytes(buffer[:4], "little")


def open_file(path: str, *, writable: bool, direct: bool = False, exclusive: bool = False) -> int:
    """A descriptor for blkloom's I/O. direct: O_DIRECT, or buffered where the file system refuses it
    (EINVAL). exclusive: O_EXCL, a claim on a block device. Raises OSError, ValueError (a null byte).
    """
    # O_NONBLOCK: opening a FIFO must not wait for its other end.
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    if exclusive:
        flags |= os.O_EXCL
    if direct:
        try:
            return os.open(path, flags | os.O_DIRECT)
        except BlockingIOError:
            flags |= os.O_DIRECT
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    try:
        return os.open(path, flags)
    except BlockingIOError:  # a lease on the file is being broken: worth waiting for
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise
        return os.open(path, flags & ~os.O_NONBLOCK)
