"""What the parsers read from, and what they find. No I/O but through `Disk.read`.

Positions and lengths in tables on disk are in logical blocks; what comes out is in sectors of 512 bytes,
as in every table of blkloom's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from blkloom.units import SECTOR, Sectors

MOST_PARTITIONS: Final = 255
"""Of one disk, as in the kernel (DISK_MAX_PARTS counts the disk itself)."""
_LARGEST_BLOCK: Final = 4096


@dataclass(frozen=True)
class Disk:
    """size: bytes. block: bytes of a logical block, a power of two from 512 to 4096. read: exactly
    `length` bytes from `offset` on; never asked for what is not inside the disk; raises OSError.
    """

    size: int
    block: int
    read: Callable[[int, int], bytes]

    def __post_init__(self) -> None:
        if not SECTOR <= self.block <= _LARGEST_BLOCK or self.block & (self.block - 1):
            raise ValueError(f"{self.block} is no logical block size: a power of two from {SECTOR} to {_LARGEST_BLOCK}")

    @property
    def blocks(self) -> int:
        """Whole logical blocks there are."""
        return self.size // self.block

    @property
    def sectors(self) -> int:
        """Whole sectors there are."""
        return self.size // SECTOR

    def blocks_at(self, start: int, count: int = 1) -> bytes | None:
        """`count` logical blocks from `start` on; None where the disk does not have them all."""
        if start < 0 or count < 1 or start + count > self.blocks:
            return None
        return self.read(start * self.block, count * self.block)

    def to_sectors(self, blocks: int) -> int:
        """Logical blocks as sectors."""
        return blocks * (self.block // SECTOR)


@dataclass(frozen=True, order=True)
class Partition:
    """number: the kernel's, from 1 on; logical partitions of an MBR from 5 on."""

    number: int
    start: Sectors
    length: Sectors


@dataclass
class PartitionTable:
    """kind: "gpt", "dos" or "" for none. partitions: by number. warnings: what was left out or cut, and
    what of the table is damaged.
    """

    kind: str = ""
    partitions: list[Partition] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, disk: Disk, number: int, start: int, length: int) -> None:
        """A partition from sector `start` on; what lies behind the end of the disk is left out or cut off,
        with a warning. Source: the kernel's blk_add_partition (block/partitions/core.c).
        """
        if start >= disk.sectors:
            self.warnings.append(f"partition {number}: start {start} is beyond the end of the device; left out")
            return
        if start + length > disk.sectors:
            self.warnings.append(f"partition {number}: size {length} extends beyond the end of the device; truncated")
            length = disk.sectors - start
        self.partitions.append(Partition(number, Sectors(start), Sectors(length)))
