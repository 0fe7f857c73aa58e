"""Input and output types of the parsers. No I/O except through `Disk.read`.

Positions and lengths in tables on disk are in logical blocks; the results are in sectors of 512 bytes, as in all tables
of blkloom.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from blkloom.units import SECTOR, Sectors

MOST_PARTITIONS: Final = 255
"""Maximum for one disk, as in the kernel (DISK_MAX_PARTS counts the disk itself)."""
_LARGEST_BLOCK: Final = 4096


@dataclass(frozen=True)
class Disk:
    """A disk to parse. size: bytes. block: bytes of a logical block, a power of two from 512 to 4096. read: returns
    exactly `length` bytes from `offset` on; it is never called for ranges outside the disk; raises OSError.
    """

    size: int
    block: int
    read: Callable[[int, int], bytes]

    def __post_init__(self) -> None:
        if not SECTOR <= self.block <= _LARGEST_BLOCK or self.block & (self.block - 1):
            raise ValueError(f"{self.block} is no logical block size: a power of two from {SECTOR} to {_LARGEST_BLOCK}")

    @property
    def blocks(self) -> int:
        """Number of whole logical blocks."""
        return self.size // self.block

    @property
    def sectors(self) -> int:
        """Number of whole sectors."""
        return self.size // SECTOR

    def blocks_at(self, start: int, count: int = 1) -> bytes | None:
        """Reads `count` logical blocks from `start` on; None if they are not all on the disk."""
        if start < 0 or count < 1 or start + count > self.blocks:
            return None
        return self.read(start * self.block, count * self.block)

    def to_sectors(self, blocks: int) -> int:
        """Converts logical blocks to sectors."""
        return blocks * (self.block // SECTOR)


@dataclass(frozen=True, order=True)
class Partition:
    """One partition. number: as in the kernel, from 1 on; logical partitions of an MBR from 5 on. type: GUID, or two
    digits after 0x. name: of a GPT partition, as it is on disk. uuid: as in PARTUUID of Linux.
    """

    number: int
    start: Sectors
    length: Sectors
    type: str = field(default="", compare=False)
    name: str = field(default="", compare=False)
    uuid: str = field(default="", compare=False)


@dataclass
class PartitionTable:
    """The result of a parser. kind: "gpt", "dos", or "" for none. partitions: by number. warnings: partitions that were
    left out or cut, and damage of the table.
    """

    kind: str = ""
    partitions: list[Partition] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(
        self, disk: Disk, number: int, start: int, length: int, *, type: str = "", name: str = "", uuid: str = ""
    ) -> None:
        """Adds a partition that begins at sector `start`. A partition past the end of the disk is left out, one across
        the end is cut, both with a warning. Source: the kernel's blk_add_partition (block/partitions/core.c).
        """
        if start >= disk.sectors:
            self.warnings.append(f"partition {number}: start {start} is beyond the end of the device; left out")
            return
        if start + length > disk.sectors:
            self.warnings.append(f"partition {number}: size {length} extends beyond the end of the device; truncated")
            length = disk.sectors - start
        self.partitions.append(Partition(number, Sectors(start), Sectors(length), type, name, uuid))
