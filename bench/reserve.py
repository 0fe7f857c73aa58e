"""Memory for a file on tmpfs to grow into.

A virtual machine may give free memory back to its host within a tenth of a second, and a page that has to be fetched
from there again costs up to forty times what writing to it does: filling a file would measure that. So a file that is
to grow is given its pages beforehand, behind its end. To its owner it is as short as before.
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
    """Pages for `growing` to have up to `size` bytes in it. Raises OSError."""
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
