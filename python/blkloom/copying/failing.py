"""Errors of a copy. Pure."""

from __future__ import annotations

import errno as _errno
import os
from typing import ClassVar

from blkloom.errors import BlkloomError, LostData
from blkloom.printing import printable


class CopyFailed(BlkloomError, OSError):
    """A request of a copy has failed. side: source or target. offset, length: bytes of the device."""

    exit_code: ClassVar[int] = 74  # EX_IOERR

    def __init__(self, name: str, side: str, operation: str, offset: int, length: int, number: int) -> None:
        what = f"{operation} of {length} bytes at {offset}: {os.strerror(number)}"
        super().__init__(what, cure=_CURES.get(number, ""), errno=number)
        self.name = name
        self.side = side
        self.offset = offset

    def __str__(self) -> str:
        return f"{printable(self.name)}: {super().__str__()}"


_CURES = {
    _errno.ENOSPC: "make room there",
    _errno.EDQUOT: "make room there, or raise the quota",
    _errno.EROFS: "it is read-only",
    _errno.ENODEV: "the disk is gone",
}


class ContentsDiffer(BlkloomError):
    """A comparison has found a difference. offset: the first byte that differs."""

    errno = None
    exit_code = 1

    def __init__(self, source: str, target: str, offset: int) -> None:
        super().__init__(f"{source} and {target} differ, first at byte {offset}", cure="copy again")
        self.offset = offset


def lost(name: str, error: OSError) -> LostData:
    """The error of a flush of the target that failed."""
    what = f"{name}: the flush at the end failed: {error.strerror or error}; what was written may be lost"
    return LostData(what, cure="copy again when the disk is well", errno=error.errno)
