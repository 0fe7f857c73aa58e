"""Detects the partition table of a disk: GPT after a protective MBR, otherwise MBR. Pure except `Disk.read`."""

from __future__ import annotations

from blkloom.partitions.found import Disk, PartitionTable
from blkloom.partitions.gpt import block_size_of, read_gpt
from blkloom.partitions.mbr import is_protective, names_gpt, read_entries, read_mbr


def find_partitions(disk: Disk) -> PartitionTable:
    """The partitions of the disk, numbered as in the kernel. Raises the exceptions of `disk.read`."""
    first = disk.blocks_at(0)
    entries = read_entries(first) if first else None
    if entries is None:
        return PartitionTable()
    if not names_gpt(entries):
        return read_mbr(disk, entries)
    if is_protective(entries) and (table := read_gpt(disk)) is not None:
        return table
    block = block_size_of(disk.size, disk.read)
    if block is None:
        return read_mbr(disk, entries)
    if block != disk.block:
        what = f"there is a GPT for blocks of {block} bytes, and the device has blocks of {disk.block}; use -b {block}"
    else:
        what = "there is a GPT, but the MBR's entry for it does not begin at block 1; `fdisk` and its command w mend it"
    return PartitionTable(warnings=[what])
