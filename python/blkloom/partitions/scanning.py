"""Which partition table a disk has: GPT behind a protective MBR, else MBR. Pure but for `Disk.read`."""

from __future__ import annotations

from blkloom.partitions.found import Disk, PartitionTable
from blkloom.partitions.gpt import read_gpt
from blkloom.partitions.mbr import is_protective, read_entries, read_mbr


def find_partitions(disk: Disk) -> PartitionTable:
    """The disk's partitions, numbered as the kernel numbers them. Raises what `disk.read` raises."""
    first = disk.blocks_at(0)
    entries = read_entries(first) if first else None
    if entries is None:
        return PartitionTable()
    if is_protective(entries) and (table := read_gpt(disk)) is not None:
        return table
    return read_mbr(disk, entries)
