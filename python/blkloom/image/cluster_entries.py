"""Arrays of entries of the engine's cluster table, with more values for units that the engine cannot represent.

The bits are those of `blkloom.entries`. Three values are used in Python only: SHOWS_THROUGH (a fault for the engine):
the layer below provides the unit. IN_MEMORY: the unit must be made (decompressed, or the end of a file padded with
zeros) before the engine can use it. CORRUPT: the metadata of the unit is inconsistent. The file number of the last two
is that of the layer; the engine has a fault in their place. Pure; any thread.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from blkloom import entries
from blkloom.image.types import Words

KIND_SHIFT: Final = np.uint64(entries.KIND_SHIFT)
FILE_SHIFT: Final = np.uint64(entries.FILE_SHIFT)
FILE_MASK: Final = np.uint64(entries.FILES - 1)
SECTOR_SHIFT: Final = np.uint64(9)

SHOWS_THROUGH: Final = np.uint64(entries.FAULT)
DATA: Final = np.uint64(entries.DATA)
READ_ONLY: Final = np.uint64(entries.READ_ONLY)
READ_ONLY_BIT: Final = DATA ^ READ_ONLY
"""The bit that differs between the two kinds."""
ZERO: Final = np.uint64(entries.ZERO)
IN_MEMORY_KIND: Final = np.uint64(5)
CORRUPT_KIND: Final = np.uint64(6)
IN_MEMORY: Final = IN_MEMORY_KIND << KIND_SHIFT
CORRUPT: Final = CORRUPT_KIND << KIND_SHIFT


def file_field(number: int) -> np.uint64:
    """The file number, shifted to its bits of an entry."""
    return np.uint64(number << entries.FILE_SHIFT)


def kinds(found: Words) -> Words:
    """The kind of each entry."""
    return found >> KIND_SHIFT


def spread(found: Words, shift: int, unit_bits: int) -> Words:
    """The entries in smaller units of `1 << unit_bits` bytes, `1 << shift` of them for each entry."""
    if not shift:
        return found
    parts = 1 << shift
    many = np.repeat(found, parts)
    kind = kinds(many)
    steps = np.tile(np.arange(parts, dtype=np.uint64) << np.uint64(unit_bits - 9), found.size)
    steps[(kind != 1) & (kind != 2)] = 0
    return many + steps
