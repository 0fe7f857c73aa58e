"""The GUID partition table: a header in block 1, a copy in the last block, and an array of entries.

Source: UEFI 2.10, chapter 5.3; the kernel's checks (block/partitions/efi.c), but entries may be larger
than 128 bytes, as the specification has it, and the copy is used without having to ask for it. Pure;
everything in it is hostile: no number is believed before it has been bounded.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

from blkloom.partitions.found import MOST_PARTITIONS, Disk, PartitionTable

_HEADER: Final = struct.Struct("<8sIII4xQQQQ16sQIII")
_SIGNATURE: Final = b"EFI PART"
_CRC_AT: Final = 16
_ENTRY: Final = struct.Struct("<16s16sQQ")
_SMALLEST_ENTRY: Final = 128
_LARGEST_ENTRY: Final = 4096
_LARGEST_ARRAY: Final = 1 << 20
"""Bytes of all entries; 128 entries of 128 bytes are usual."""
_PRIMARY: Final = 1
_UNUSED: Final = bytes(16)


class BadGpt(ValueError):
    """A header or its entries that cannot be; says why."""


@dataclass(frozen=True)
class _Header:
    """Logical blocks, bytes. Checked."""

    other: int
    first: int
    last: int
    array: int
    count: int
    entry: int
    array_crc: int


def read_gpt(disk: Disk) -> PartitionTable | None:
    """The partitions, of the copy where the header in block 1 cannot be used. None: there is neither."""
    table = PartitionTable("gpt")
    last = disk.blocks - 1
    try:
        header = _read_header(disk, _PRIMARY)
        entries = _read_entries(disk, header)
    except BadGpt as error:
        table.warnings.append(f"the primary GPT is invalid: {error}")
        try:
            header = _read_header(disk, last)
            entries = _read_entries(disk, header)
        except BadGpt as other:
            if _SIGNATURE in (_signature(disk, _PRIMARY), _signature(disk, last)):
                table.warnings.append(f"the alternate GPT is invalid too: {other}")
                return table
            return None
        table.warnings.append("using the alternate GPT")
    else:
        try:
            _read_entries(disk, _read_header(disk, header.other))
        except BadGpt as error:
            table.warnings.append(f"the alternate GPT is invalid, using the primary one: {error}")
    _add(disk, table, header, entries)
    return table


def _signature(disk: Disk, block: int) -> bytes:
    return (disk.blocks_at(block) or b"")[: len(_SIGNATURE)]


def _read_header(disk: Disk, at: int) -> _Header:
    block = disk.blocks_at(at)
    if block is None:
        raise BadGpt(f"block {at} is beyond the end of the device")
    signature, _, size, crc, here, other, first, last, _, array, count, entry, array_crc = _HEADER.unpack_from(block)
    if signature != _SIGNATURE:
        raise BadGpt(f"block {at} has no GPT header")
    if not _HEADER.size <= size <= disk.block:
        raise BadGpt(f"its header has {size} bytes, not {_HEADER.size} to {disk.block}")
    whole = bytearray(block[:size])
    whole[_CRC_AT : _CRC_AT + 4] = bytes(4)
    if zlib.crc32(whole) != crc:
        raise BadGpt("the checksum of its header is wrong")
    if here != at:
        raise BadGpt(f"its header belongs in block {here}, and is in block {at}")
    if not first <= last < disk.blocks:
        raise BadGpt(f"its usable blocks {first} to {last} are not inside the device of {disk.blocks}")
    if not _SMALLEST_ENTRY <= entry <= _LARGEST_ENTRY or entry & (entry - 1):
        raise BadGpt(f"its entries have {entry} bytes, not a power of two from {_SMALLEST_ENTRY} to {_LARGEST_ENTRY}")
    if not 0 < count * entry <= _LARGEST_ARRAY:
        raise BadGpt(f"{count} entries of {entry} bytes: not from 1 to {_LARGEST_ARRAY // entry}")
    return _Header(other, first, last, array, count, entry, array_crc)


def _read_entries(disk: Disk, header: _Header) -> bytes:
    size = header.count * header.entry
    found = disk.blocks_at(header.array, -(-size // disk.block))
    if found is None:
        raise BadGpt(f"its entries, from block {header.array} on, are not inside the device")
    if zlib.crc32(memoryview(found)[:size]) != header.array_crc:
        raise BadGpt("the checksum of its entries is wrong")
    return found[:size]


def _add(disk: Disk, table: PartitionTable, header: _Header, entries: bytes) -> None:
    for index in range(header.count):
        kind, _, first, last = _ENTRY.unpack_from(entries, index * header.entry)
        if kind == _UNUSED:
            continue
        if index >= MOST_PARTITIONS:
            table.warnings.append(f"entries from {MOST_PARTITIONS + 1} on are left out")
            return
        if not first <= last < disk.blocks:
            table.warnings.append(
                f"partition {index + 1}: blocks {first} to {last} are not inside the device; left out"
            )
            continue
        table.add(disk, index + 1, disk.to_sectors(first), disk.to_sectors(last - first + 1))
