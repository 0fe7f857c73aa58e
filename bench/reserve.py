"""Reserves memory for a file on tmpfs.

A virtual machine may return free memory to its host within a tenth of a second. To get such a page back costs up to
forty times as much as to write to it, and a measurement of writes to a growing file would include that. So the pages of
a growing file are allocated in advance, past its end. The size of the file does not change.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

_HUGE_PAGE: Final = 2 << 20
_METADATA: Final = 32 << 20
"""Bytes that a file takes beyond what is in it."""
_KEEP_SIZE: Final = 1  # fallocate(2)

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def reserve(growing: Path, size: int) -> None:
    """Allocate pages for `growing`, for up to `size` bytes of data. Raises OSError."""
    whole = size + _METADATA
    warm = growing.with_name("warm")
    with growing.open("rb+") as file:
        with warm.open("xb", buffering=0) as written:  # pages that are in memory for certain are those just let go of
            for _ in range(0, whole, _HUGE_PAGE):
                written.write(bytes(_HUGE_PAGE))
        warm.unlink()
        if _libc.fallocate(file.fileno(), _KEEP_SIZE, 0, whole):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(growing))
