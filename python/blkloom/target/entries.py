"""The entries of a cluster table: where one cluster's bytes are, as the u64 that the engine reads.

`kind << 61 | file << 49 | offset >> 9`, as `_engine.ClusterTable` says; `file` counts in the
table's files, offsets are bytes and multiples of 512.
"""

from __future__ import annotations

from typing import Final

from blkloom.units import SECTOR

FAULT: Final = 0
"""Ask the target."""
ZERO: Final = 3 << 61
"""Reads as zeros; writes fault."""
ERROR: Final = 4 << 61
"""EIO."""

_FILES: Final = 1 << 12
_END: Final = (1 << 49) * SECTOR


def data(offset: int, *, file: int = 0, read_only: bool = False) -> int:
    """In a file, at byte `offset`. read_only: writes fault. Raises ValueError for what an entry
    cannot hold.
    """
    if offset % SECTOR or not 0 <= offset < _END:
        raise ValueError(f"offset {offset} of a cluster is not a multiple of {SECTOR} from 0 to below 2^58")
    if not 0 <= file < _FILES:
        raise ValueError(f"file number {file} is not from 0 to {_FILES - 1}")
    return (2 if read_only else 1) << 61 | file << 49 | offset // SECTOR
