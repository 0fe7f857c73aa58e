"""New files for the exceptions of snapshots."""

from __future__ import annotations

import os

from blkloom.errors import UsageError
from blkloom.units import SECTOR


def make_store(path: str, size: int) -> None:
    """Makes a sparse file of `size` bytes. Raises OSError, FileExistsError: it may be the store of another snapshot."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        os.truncate(descriptor, size)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)


def roomy_store(size: int) -> int:
    """Bytes of a store with room for all chunks of a device of `size` bytes, whatever their size: an exception has 16
    bytes, and a chunk at least a sector.
    """
    return size + size // 16 + (4 << 20)


def chunk_sectors(chunk: int) -> int:
    """A chunk size of so many bytes in sectors. Raises UsageError."""
    if chunk % SECTOR:
        raise UsageError(
            f"a chunk of {chunk} bytes is no whole number of sectors", cure="give a power of 2, such as 16k"
        )
    return chunk // SECTOR
