"""The log of the target `log-writes`, as the kernel's dm-log-writes has it: entries to bytes and back.

A superblock is in the first sector of the log. Each entry has a sector with its header (and the text of a mark), and
after it the data of a write. The size of a sector is in the superblock. Source: Linux
Documentation/admin-guide/device-mapper/log-writes.rst; dm-log-writes.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final

import msgspec

from blkloom.errors import UsageError
from blkloom.units import SECTOR

FLUSH, FUA, DISCARD, MARK, METADATA = 1, 2, 4, 8, 16
"""Flags of entries."""
_NAMES: Final = {FLUSH: "flush", FUA: "FUA", DISCARD: "discard", MARK: "mark", METADATA: "metadata"}
_MAGIC: Final = 0x6A736677736872
_VERSION: Final = 1
_SUPERBLOCK: Final = struct.Struct("<QQQI")
"""Magic number, version, number of entries, size of a sector."""
_HEADER: Final = struct.Struct("<QQQQ")
"""First sector, number of sectors, flags, length of a mark in bytes."""
LONGEST_MARK: Final = SECTOR - _HEADER.size
_LARGEST_SECTOR: Final = 65536


class LogEntry(msgspec.Struct, frozen=True):
    """An entry. sector, sectors: in the device, of 512 bytes or of the log's size. data: of a write. mark: the text."""

    sector: int
    sectors: int
    flags: int
    data: bytes = b""
    mark: bytes = b""

    @property
    def is_durable(self) -> bool:
        """Whether what was written before may be relied on after it: a flush or a FUA write."""
        return bool(self.flags & (FLUSH | FUA))

    def describe(self) -> str:
        """What it is, for people."""
        names = " ".join(name for flag, name in _NAMES.items() if self.flags & flag and flag != MARK)
        if self.flags & MARK:
            return f"mark '{self.mark.decode(errors='replace')}'"
        if not self.sectors:
            return names or "nothing"
        what = "discard" if self.flags & DISCARD else "write"
        names = names.replace("discard", "").strip()
        return f"{what} of {self.sectors} sectors at {self.sector}{f' ({names})' if names else ''}"


def superblock(entries: int) -> bytes:
    """The first sector of a log with so many entries."""
    return _SUPERBLOCK.pack(_MAGIC, _VERSION, entries, SECTOR).ljust(SECTOR, b"\0")


def entry_bytes(entry: LogEntry) -> bytes:
    """An entry in a log with sectors of 512 bytes."""
    header = _HEADER.pack(entry.sector, entry.sectors, entry.flags, len(entry.mark)) + entry.mark
    return header.ljust(SECTOR, b"\0") + entry.data


def end_of_log(read: Callable[[int, int], bytes]) -> tuple[int, int]:
    """Number of entries of a log with sectors of 512 bytes, and the first sector after them. read: returns (number of
    bytes, offset) of the log. Raises UsageError if it is none, OSError.
    """
    magic, version, entries, size = _SUPERBLOCK.unpack_from(read(SECTOR, 0))
    if (magic, version, size) != (_MAGIC, _VERSION, SECTOR):
        raise UsageError(
            "the log of writes cannot be continued: it does not begin as one",
            cure="remove the device and create it again, with a new log",
        )
    at = 1
    for _ in range(entries):
        _, sectors, flags, _ = _HEADER.unpack_from(read(SECTOR, at * SECTOR))
        at += 1 + (0 if flags & DISCARD else sectors)
    return entries, at


class WriteLog:
    """A log to read. entries: their number. sector: bytes of a sector of the log and of the positions in it."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        """Raises UsageError for a file that is no log, OSError."""
        self._file = file
        self._name = name
        file.seek(0)
        head = file.read(_SUPERBLOCK.size)
        magic, version, self.entries, self.sector = (
            _SUPERBLOCK.unpack(head) if len(head) == _SUPERBLOCK.size else (0, 0, 0, 0)
        )
        if magic != _MAGIC:
            raise UsageError(f"{name} is no log of writes", cure="give the log device of a log-writes target")
        if version != _VERSION:
            raise UsageError(f"{name}: a log of version {version}", cure=f"version {_VERSION} is known")
        if not SECTOR <= self.sector <= _LARGEST_SECTOR or self.sector & (self.sector - 1):
            raise UsageError(f"{name}: sectors of {self.sector} bytes", cure="the log is damaged")

    def __iter__(self) -> Iterator[LogEntry]:
        """All entries, in order. Raises UsageError if the log is damaged, OSError."""
        self._file.seek(self.sector)
        for number in range(self.entries):
            block = self._file.read(self.sector)
            if len(block) < self.sector:
                raise UsageError(f"{self._name}: entry {number} is missing", cure=f"{self.entries} were announced")
            sector, sectors, flags, length = _HEADER.unpack_from(block)
            if length > self.sector - _HEADER.size:
                raise UsageError(f"{self._name}: entry {number} has a mark of {length} bytes", cure="it is damaged")
            data = b""
            if sectors and not flags & DISCARD:
                data = self._file.read(sectors * self.sector)
                if len(data) < sectors * self.sector:
                    raise UsageError(f"{self._name}: the data of entry {number} is missing", cure="it is damaged")
            yield LogEntry(sector, sectors, flags, data, block[_HEADER.size : _HEADER.size + length])
