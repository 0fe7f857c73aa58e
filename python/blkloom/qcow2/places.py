"""Where units are, as the engine's cluster table says it, and what it cannot say: whole arrays of such entries.

`kind << 61 | file << 49 | offset >> 9`, see `_engine.ClusterTable` and target/entries.py. Three values are only used in
Python: SHOWS_THROUGH (the engine's fault); IN_MEMORY, of a unit that must be made (decompressed, or the end of a file
filled up with zeros) before the engine can have it; CORRUPT, of a unit whose metadata contradicts itself. The file
number of the last two is the layer's; the engine has a fault in their place. Pure; any thread.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from blkloom.qcow2.types import Words
from blkloom.target import entries

KIND_SHIFT: Final = np.uint64(61)
FILE_SHIFT: Final = np.uint64(49)
FILE_MASK: Final = np.uint64(0xFFF)
SECTOR_SHIFT: Final = np.uint64(9)

MOST_FILES: Final = 1 << 12

SHOWS_THROUGH: Final = np.uint64(entries.FAULT)
DATA: Final = np.uint64(1 << 61)
READ_ONLY: Final = np.uint64(2 << 61)
READ_ONLY_BIT: Final = DATA ^ READ_ONLY
"""What tells one from the other."""
ZERO: Final = np.uint64(entries.ZERO)
IN_MEMORY: Final = np.uint64(5 << 61)
CORRUPT: Final = np.uint64(6 << 61)

IN_MEMORY_KIND: Final = np.uint64(5)
CORRUPT_KIND: Final = np.uint64(6)


def file_field(number: int) -> np.uint64:
    """The file number in its place."""
    return np.uint64(number << 49)


def kinds(places: Words) -> Words:
    """Of each entry."""
    return places >> KIND_SHIFT


def spread(places: Words, shift: int, unit_bits: int) -> Words:
    """The same places in units of `1 << unit_bits` bytes, `1 << shift` of them for each one."""
    if not shift:
        return places
    parts = 1 << shift
    many = np.repeat(places, parts)
    kind = kinds(many)
    steps = np.tile(np.arange(parts, dtype=np.uint64) << np.uint64(unit_bits - 9), places.size)
    steps[(kind != 1) & (kind != 2)] = 0
    return many + steps
