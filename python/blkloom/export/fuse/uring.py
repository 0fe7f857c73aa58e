"""Checks whether the kernel serves FUSE over io_uring; the errors say how to enable it.

Source: Linux fs/fuse/dev_uring.c, Documentation/filesystems/fuse/fuse-io-uring.rst.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

from blkloom.errors import MountError

ENABLE: Final = Path("/sys/module/fuse/parameters/enable_uring")
"""Parameter of the kernel module, "Y" or "N"."""
FORBIDDEN: Final = Path("/proc/sys/kernel/io_uring_disabled")
"""0: all users may use io_uring. 1: root, and a group. 2: no user."""


def check_available(path: str, *, enable: Path = ENABLE) -> None:
    """Raises MountError if it does not. path: of the file that is to be served."""
    try:
        enabled = enable.read_text().strip()
    except FileNotFoundError:
        if enable.parent.exists():
            raise not_available(path) from None
        return  # the module is loaded when it is first used
    if enabled != "Y":
        what = f"the kernel's FUSE over io_uring is switched off ({enable} is {enabled})"
        raise MountError(what, path=path, errno=errno.EOPNOTSUPP, cure=f"as root: echo Y > {enable}")


def not_available(path: str) -> MountError:
    """The error for a kernel without it."""
    what = "this kernel has no FUSE over io_uring (Linux 6.14 with CONFIG_FUSE_IO_URING)"
    cure = f"export it without --fuse-uring; where {ENABLE} exists, it must be Y"
    return MountError(what, path=path, errno=errno.EOPNOTSUPP, cure=cure)
