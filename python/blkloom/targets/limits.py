"""I/O limits of a device: the block sizes for reads and writes.

Pure. Source: queue limits of the kernel (Documentation/ABI/stable/sysfs-block: logical_block_size,
optimal_io_size); NBD proto.md "Size constraints".
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from blkloom.errors import UsageError
from blkloom.units import SECTOR

_LARGEST = 65536


class BlockLimits(msgspec.Struct, frozen=True):
    """Block sizes in bytes, powers of two. logical: alignment of offsets and lengths, 512 to 65536. optimal: the
    preferred I/O size, at least `logical`. discard: smaller discards free nothing. Raises UsageError for other
    values.
    """

    logical: int = SECTOR
    optimal: int = 4096
    discard: int = 4096

    def __post_init__(self) -> None:
        sizes = (("logical", self.logical, SECTOR), ("optimal", self.optimal, self.logical))
        for what, value, least in (*sizes, ("discard", self.discard, SECTOR)):
            if value & (value - 1) or not least <= value <= (_LARGEST if what == "logical" else 1 << 31):
                raise UsageError(f"{what} block size {value} is not possible", cure=f"a power of two, at least {least}")

    @classmethod
    def of_all(cls, limits: Iterable[BlockLimits]) -> BlockLimits:
        """The limits that satisfy all of `limits`."""
        found = list(limits)
        if not found:
            return cls()
        logical = max(limit.logical for limit in found)
        discard = max(limit.discard for limit in found)
        return cls(logical, max(logical, *(limit.optimal for limit in found)), discard)
