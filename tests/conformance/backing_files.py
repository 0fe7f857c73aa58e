"""Backing files for the devices under test: with holes, or with all blocks allocated and many extents."""

from __future__ import annotations

import ctypes
import os
import random
import stat

FILE = 1 << 20
"""Bytes of every file."""
BLOCK = 4096

_COLLAPSE_RANGE = 0x08  # <linux/falloc.h>


def first_contents(name: str) -> bytearray:
    """A file's contents: data, and the holes between them as zeros."""
    chance, content = random.Random(name), bytearray(FILE)
    for _ in range(6):
        at, length = chance.randrange(FILE), chance.choice([100, 4096, 70_000, 150_000])
        length = min(length, FILE - at)
        content[at : at + length] = chance.randbytes(length)
    return content


def write_sparse(path: str, content: bytes | bytearray) -> None:
    """As it is written here, ranges of zeros are holes."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        if stat.S_ISBLK(os.fstat(fd).st_mode):
            os.pwrite(fd, content, 0)
            return
        os.truncate(fd, len(content))
        for at in range(0, len(content), BLOCK):
            if any(block := content[at : at + BLOCK]):
                os.pwrite(fd, block, at)
    finally:
        os.close(fd)


def write_in_extents(path: str, content: bytes | bytearray, *, extents: int = 8) -> None:
    """Every block is written and durable, and the file lies in that many pieces on a file system that can
    collapse ranges (ext4, xfs): what lies between two pieces is cut out. `content` is a multiple of BLOCK.
    """
    chance = random.Random(extents)
    cuts = sorted(chance.sample(range(BLOCK, len(content), BLOCK), extents - 1))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        at = 0
        for first, last in zip([0, *cuts], [*cuts, len(content)], strict=True):
            os.pwrite(fd, content[first:last] + bytes(BLOCK), at)
            at += last - first + BLOCK
        os.fsync(fd)
        for cut in [*cuts, len(content)][:-1]:
            collapse(fd, cut, BLOCK)
        os.truncate(fd, len(content))
        os.fsync(fd)
    finally:
        os.close(fd)


def collapse(fd: int, offset: int, length: int) -> None:
    """Cuts the range out of the file, which gets shorter. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if libc.fallocate(fd, _COLLAPSE_RANGE, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"descriptor {fd}, {length} bytes at {offset} cannot be cut out")
