"""Parser of the GUID partition table: a header in block 1, a copy in the last block, and an array of entries.

Source: UEFI 2.10, chapter 5.3; the kernel's checks (block/partitions/efi.c). Differences from the kernel: entries may
be larger than 128 bytes, as in the specification, and the copy is used without an option. Pure; the input is not
trusted: every number is checked against its limits before use.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from blkloom.partitions.found import MOST_PARTITIONS, Disk, PartitionTable

_HEADER: Final = struct.Struct("<8sIII4xQQQQ16sQIII")
_SIGNATURE: Final = b"EFI PART"
_CRC_AT: Final = 16
_ENTRY: Final = struct.Struct("<16s16sQQ8x72s")
_SMALLEST_ENTRY: Final = 128
_LARGEST_ENTRY: Final = 4096
_LARGEST_ARRAY: Final = 1 << 20
"""Maximum bytes of all entries; 128 entries of 128 bytes are usual."""
_PRIMARY: Final = 1
_UNUSED: Final = bytes(16)


BLOCK_SIZES: Final = (512, 4096, 1024, 2048)


class BadGpt(ValueError):
    """An invalid header or entry; the text is the reason."""


@dataclass(frozen=True)
class _Header:
    """A checked header, in logical blocks and bytes."""

    other: int
    first: int
    last: int
    array: int
    count: int
    entry: int
    array_crc: int


def read_gpt(disk: Disk) -> PartitionTable | None:
    """The partitions of the GPT, or of its copy if the header in block 1 is not valid. None if neither is valid."""
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


def block_size_of(size: int, read: Callable[[int, int], bytes]) -> int | None:
    """The logical block size for which the GPT of a disk of `size` bytes was made; None if there is no GPT. read: as
    `Disk.read`.
    """
    for block in BLOCK_SIZES:
        try:
            header = _read_header(disk := Disk(size, block, read), _PRIMARY)
            _read_entries(disk, header)
        except BadGpt:
            continue
        return block
    return None


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
        kind, id, first, last, name = _ENTRY.unpack_from(entries, index * header.entry)
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
        start, length = disk.to_sectors(first), disk.to_sectors(last - first + 1)
        table.add(disk, index + 1, start, length, type=_guid(kind), name=_name(name), uuid=_guid(id))


def _guid(data: bytes) -> str:
    """The text of a GUID; its first three fields are little-endian."""
    return str(UUID(bytes_le=data))


def _name(data: bytes) -> str:
    """The name in an entry: UTF-16, up to the first NUL."""
    return data.decode("utf-16-le", "replace").partition("\0")[0]
