"""Reads an MBR: four entries in block 0, and chains of extended boot records for the logical partitions.

Read as the kernel reads it (block/partitions/msdos.c): positions in logical blocks, those in a chain
relative to it; the extended partition itself is a partition of 1 KiB or one block, so that no program takes
its contents for a file system. A chain with a cycle, one that is too long, and one that leaves the disk are cut
off there. Pure; the input is not trusted.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from blkloom.partitions.found import MOST_PARTITIONS, Disk, PartitionTable
from blkloom.units import SECTOR

PROTECTIVE: Final = 0xEE
"""Type of an entry of a protective MBR, which marks a GPT disk."""
_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
_ENTRY: Final = struct.Struct("<B3xB3xII")
_FIRST_ENTRY: Final = 446
_ENTRIES: Final = 4
_DISK_ID: Final = struct.Struct("<I")
_DISK_ID_AT: Final = 440
_MAGIC: Final = b"\x55\xaa"
_MAGIC_AT: Final = 510
_FIRST_LOGICAL: Final = 5
_MOST_EMPTY_RECORDS: Final = 100
"""Maximum number of consecutive records without a partition in a chain, as in the kernel."""
_EXTENDED_SHOWN: Final = 1024


@dataclass(frozen=True)
class Entry:
    """An entry of a boot record. start, length: logical blocks; the base of start depends on the record, see
    `_read_chain`.
    """

    flag: int
    type: int
    start: int
    length: int

    @property
    def type_text(self) -> str:
        """The type as fdisk and blkid print it."""
        return f"{self.type:#x}"

    @property
    def extended(self) -> bool:
        """Whether it contains a chain of records."""
        return self.type in _EXTENDED


def read_entries(record: bytes) -> list[Entry] | None:
    """The four entries of a boot record (its first 512 bytes); None without its magic number."""
    if record[_MAGIC_AT : _MAGIC_AT + 2] != _MAGIC:
        return None
    return [Entry(*_ENTRY.unpack_from(record, _FIRST_ENTRY + at * _ENTRY.size)) for at in range(_ENTRIES)]


def is_protective(entries: list[Entry]) -> bool:
    """Whether the entries are a valid protective MBR (UEFI 5.2.3). Only then the GPT is used."""
    return any(entry.type == PROTECTIVE and entry.start == 1 for entry in entries)


def names_gpt(entries: list[Entry]) -> bool:
    """Whether an entry has the type of a protective MBR, valid or not."""
    return any(entry.type == PROTECTIVE for entry in entries)


def read_mbr(disk: Disk, entries: list[Entry]) -> PartitionTable:
    """The partitions of `entries`, which are those of block 0. kind is "" if they are not a partition table: some file
    systems have the same magic number, with other data before it.
    """
    if any(entry.flag not in (0, 0x80) for entry in entries):
        return PartitionTable()
    if names_gpt(entries):
        return PartitionTable(warnings=["the MBR is that of a GPT disk, and there is no GPT"])
    table = PartitionTable("dos")
    (disk_id,) = _DISK_ID.unpack_from(disk.blocks_at(0) or bytes(_MAGIC_AT), _DISK_ID_AT)
    next_logical = _FIRST_LOGICAL
    for number, entry in enumerate(entries, 1):
        if not entry.length:
            continue
        start, length = disk.to_sectors(entry.start), disk.to_sectors(entry.length)
        if entry.extended:
            shown = min(length, max(disk.block, _EXTENDED_SHOWN) // SECTOR)
            table.add(disk, number, start, shown, type=entry.type_text, uuid=_uuid(disk_id, number))
            next_logical = _read_chain(disk, entry, table, next_logical, disk_id)
        else:
            table.add(disk, number, start, length, type=entry.type_text, uuid=_uuid(disk_id, number))
    table.partitions.sort()
    return table


def _uuid(disk_id: int, number: int) -> str:
    return f"{disk_id:08x}-{number:02x}" if disk_id else ""


def _read_chain(disk: Disk, extended: Entry, table: PartitionTable, number: int, disk_id: int) -> int:
    """Adds the logical partitions of an extended partition, from `number` on; returns the next free number.

    In a record, starts of partitions are relative to the record; the start of the next record is relative to the first.
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
            if index >= 2 and not _fits(entry, at, room, extended):  # tools leave garbage there
                continue
            if number > MOST_PARTITIONS:
                table.warnings.append(f"more than {MOST_PARTITIONS} partitions; the others are left out")
                return number
            start, length = disk.to_sectors(at + entry.start), disk.to_sectors(entry.length)
            table.add(disk, number, start, length, type=entry.type_text, uuid=_uuid(disk_id, number))
            number, empty = number + 1, 0
        link = next((entry for entry in entries if entry.length and entry.extended), None)
        if link is None:
            return number
        at, room = extended.start + link.start, link.length
    table.warnings.append(f"logical partitions: the chain of records does not end (block {at})")
    return number


def _fits(entry: Entry, record: int, room: int, extended: Entry) -> bool:
    """Whether a partition lies in the range of its record and in the extended partition."""
    start = record + entry.start
    end = start + entry.length
    inside = extended.start <= start and end <= extended.start + extended.length
    return entry.start + entry.length <= room and inside
