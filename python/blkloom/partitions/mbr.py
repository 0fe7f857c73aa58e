"""The MBR: four entries in block 0, and chains of extended boot records for the logical partitions.

Read as the kernel reads it (block/partitions/msdos.c): positions in logical blocks, those in a chain
relative to it; the extended partition itself is a partition of 1 KiB or one block, so that nobody takes
its contents for a file system. A chain that comes back to itself, is too long or leaves the disk ends.
Pure; everything in it is hostile.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from blkloom.partitions.found import MOST_PARTITIONS, Disk, PartitionTable
from blkloom.units import SECTOR

PROTECTIVE: Final = 0xEE
"""The type of an entry that says: this is a GPT disk."""
_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
_ENTRY: Final = struct.Struct("<B3xB3xII")
_FIRST_ENTRY: Final = 446
_ENTRIES: Final = 4
_MAGIC: Final = b"\x55\xaa"
_MAGIC_AT: Final = 510
_FIRST_LOGICAL: Final = 5
_MOST_EMPTY_RECORDS: Final = 100
"""Records of a chain in a row without a partition, before the kernel gives up."""
_EXTENDED_SHOWN: Final = 1024


@dataclass(frozen=True)
class Entry:
    """start, length: logical blocks; start counts from what the record says, see `_read_chain`."""

    flag: int
    type: int
    start: int
    length: int

    @property
    def extended(self) -> bool:
        """It holds a chain of records."""
        return self.type in _EXTENDED


def read_entries(record: bytes) -> list[Entry] | None:
    """The four entries of a boot record (its first 512 bytes count); None without its magic number."""
    if record[_MAGIC_AT : _MAGIC_AT + 2] != _MAGIC:
        return None
    return [Entry(*_ENTRY.unpack_from(record, _FIRST_ENTRY + at * _ENTRY.size)) for at in range(_ENTRIES)]


def is_protective(entries: list[Entry]) -> bool:
    """Whether they say that this is a GPT disk (UEFI 5.2.3): only then is the GPT believed."""
    return any(entry.type == PROTECTIVE and entry.start == 1 for entry in entries)


def read_mbr(disk: Disk, entries: list[Entry]) -> PartitionTable:
    """The partitions of `entries`, those of block 0. kind "" where they are no partition table: some file
    systems have the same magic number, with other things before it.
    """
    if any(entry.flag not in (0, 0x80) for entry in entries):
        return PartitionTable()
    if any(entry.type == PROTECTIVE for entry in entries):
        return PartitionTable(warnings=["the MBR is a GPT disk's, and there is no GPT"])
    table = PartitionTable("dos")
    next_logical = _FIRST_LOGICAL
    for number, entry in enumerate(entries, 1):
        if not entry.length:
            continue
        start, length = disk.to_sectors(entry.start), disk.to_sectors(entry.length)
        if entry.extended:
            table.add(disk, number, start, min(length, max(disk.block, _EXTENDED_SHOWN) // SECTOR))
            next_logical = _read_chain(disk, entry, table, next_logical)
        else:
            table.add(disk, number, start, length)
    table.partitions.sort()
    return table


def _read_chain(disk: Disk, extended: Entry, table: PartitionTable, number: int) -> int:
    """Adds the logical partitions of an extended one, from `number` on; the next free number.

    In a record the partitions' starts count from the record, the next record's start from the first.
    """
    at, room, empty = extended.start, extended.length, 0
    seen = set[int]()
    while at not in seen and empty < _MOST_EMPTY_RECORDS:
        seen.add(at)
        block = disk.blocks_at(at)
        if block is None:
            table.warnings.append(f"logical partitions: the record in block {at} is beyond the end of the device")
            return number
        entries = read_entries(block)
        if entries is None:
            table.warnings.append(f"logical partitions: block {at} is no boot record")
            return number
        empty += 1
        for index, entry in enumerate(entries):
            if not entry.length or entry.extended:
                continue
            if index >= 2 and not _fits(entry, at, room, extended):  # tools leave rubbish there
                continue
            if number > MOST_PARTITIONS:
                table.warnings.append(f"more than {MOST_PARTITIONS} partitions; the others are left out")
                return number
            table.add(disk, number, disk.to_sectors(at + entry.start), disk.to_sectors(entry.length))
            number, empty = number + 1, 0
        link = next((entry for entry in entries if entry.length and entry.extended), None)
        if link is None:
            return number
        at, room = extended.start + link.start, link.length
    table.warnings.append(f"logical partitions: the chain of records does not end (block {at})")
    return number


def _fits(entry: Entry, record: int, room: int, extended: Entry) -> bool:
    """Whether a partition lies in its record's room and in the extended partition."""
    start = record + entry.start
    end = start + entry.length
    inside = extended.start <= start and end <= extended.start + extended.length
    return entry.start + entry.length <= room and inside
