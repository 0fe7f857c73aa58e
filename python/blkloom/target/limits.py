"""What a device asks of those who use it: the sizes in which it wants to be read and written.

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
    """Bytes, powers of two. logical: what offsets and lengths should be multiples of, 512 to 65536.
    optimal: what is efficient, at least `logical`. Raises UsageError otherwise.
    """

    logical: int = SECTOR
    optimal: int = 4096

    def __post_init__(self) -> None:
        for what, value, least in (("logical", self.logical, SECTOR), ("optimal", self.optimal, self.logical)):
            if value & (value - 1) or not least <= value <= (_LARGEST if what == "logical" else 1 << 31):
                raise UsageError(f"{what} block size {value} is not possible", cure=f"a power of two, at least {least}")

    @classmethod
    def of_all(cls, limits: Iterable[BlockLimits]) -> BlockLimits:
        """What satisfies each of them."""
        found = list(limits)
        if not found:
            return cls()
        logical = max(limit.logical for limit in found)
        return cls(logical, max(logical, *(limit.optimal for limit in found)))
