"""The entries of a cluster table: where one cluster's bytes are, as the u64 that the engine reads.

`kind << 61 | file << 49 | offset >> 9`, as `_engine.ClusterTable` says; `file` counts in the
table's files, offsets are bytes and multiples of 512.
"""

from __future__ import annotations

from typing import Final

from blkloom.units import SECTOR

KIND_SHIFT: Final = 61
FILE_SHIFT: Final = 49
FILES: Final = 1 << (KIND_SHIFT - FILE_SHIFT)
"""Files that a table may have."""

FAULT: Final = 0
"""Ask the target."""
DATA: Final = 1 << KIND_SHIFT
"""In a file. The rest of the entry says where."""
READ_ONLY: Final = 2 << KIND_SHIFT
"""As DATA; writes fault."""
ZERO: Final = 3 << KIND_SHIFT
"""Reads as zeros; writes fault."""
ERROR: Final = 4 << KIND_SHIFT
"""EIO."""

_END: Final = (1 << FILE_SHIFT) * SECTOR


def data(offset: int, *, file: int = 0, read_only: bool = False) -> int:
    """In a file, at byte `offset`. read_only: writes fault. Raises ValueError for what an entry
    cannot hold.
    """
    if offset % SECTOR or not 0 <= offset < _END:
        raise ValueError(f"offset {offset} of a cluster is not a multiple of {SECTOR} from 0 to below 2^58")
    if not 0 <= file < FILES:
        raise ValueError(f"file number {file} is not from 0 to {FILES - 1}")
    return (READ_ONLY if read_only else DATA) | file << FILE_SHIFT | offset // SECTOR
