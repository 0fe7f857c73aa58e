"""Redo log: changed metadata of an image that is not in the file yet, in memory that outlives the process.

A worker that is killed loses the changes that it had only in memory, and with them completed writes, which users of a
node or of a virtual machine's disk do not expect. So each change is recorded here, before the engine's table refers to
it and before a request is answered. The next worker writes the records to the file in the order of flush.py (`Step`),
as a flush would have, and then opens the image. This is no protection against power loss, which needs no log.

Invariants: the records are those since the last flush or later; a later record of the same bytes is newer; only records
below the committed length count, so that a change is there completely or not at all. One thread (the mapper's).
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from blkloom.image.types import HostOffset

if TYPE_CHECKING:
    from blkloom.image.storage import Storage

_LENGTH: Final = struct.Struct("=Q")
"""At the beginning: number of bytes of committed records."""
_RECORD: Final = struct.Struct("=QII")
"""Offset in the file, number of bytes that follow, step."""
_FIRST: Final = 4096
"""Bytes of memory at first."""
_LARGE: Final = 8 << 20


class Step(IntEnum):
    """Kinds of metadata, in the order in which they are written, with a sync after each."""

    REFCOUNTS = 0
    REFCOUNT_TABLE = 1
    HEADER = 2
    L2 = 3
    L1 = 4


class RedoLog:
    """A log in the memfd `memory`, which it closes at once: the mapping has a descriptor of its own."""

    def __init__(self, memory: int) -> None:
        """Raises OSError."""
        try:
            self.is_new = os.fstat(memory).st_size < _FIRST
            """No former process has used the memory."""
            if self.is_new:
                os.ftruncate(memory, _FIRST)
            self._map = mmap.mmap(memory, 0)
        finally:
            os.close(memory)
        self._end = _LENGTH.size + self._committed
        """Where the next record begins."""

    @property
    def _committed(self) -> int:
        length: int = _LENGTH.unpack_from(self._map)[0]
        return length

    @property
    def is_empty(self) -> bool:
        """Whether no record counts."""
        return self._committed == 0

    @property
    def is_large(self) -> bool:
        """Whether a flush should empty it."""
        return self._end > _LARGE

    def add(self, step: Step, offset: int, data: bytes) -> None:
        """Appends a record that counts after `commit`. Raises OSError."""
        record = _RECORD.pack(offset, len(data), step) + data
        self._make_room(self._end + len(record))
        self._store(self._end, record)
        self._end += len(record)

    def commit(self) -> None:
        """Makes all records count."""
        self._set_committed(self._end - _LENGTH.size)

    def clear(self) -> None:
        """Removes all records: what they say is durable."""
        self._set_committed(0)
        self._end = _LENGTH.size
        if len(self._map) > _LARGE:
            self._map.resize(_FIRST)

    def replay(self, storage: Storage, sync_data: Callable[[], None]) -> None:
        """Writes the records to the file, and empties the log. sync_data: syncs an external data file. Raises OSError;
        then it can be done again.
        """
        records = list(self._records())
        sync_data()
        for step in Step:
            written = False
            for at, offset, data in records:
                if at is step:
                    storage.write(HostOffset(offset), data)
                    written = True
            if written or step is Step.REFCOUNTS:  # the first also covers the copies that new entries refer to
                storage.sync()
        self.clear()

    def close(self) -> None:
        """Closes the memory, with its contents."""
        self._map.close()

    def _store(self, at: int, data: bytes) -> None:
        self._map[at : at + len(data)] = data

    def _set_committed(self, length: int) -> None:
        """Stores the number of bytes at once. `Struct.pack_into` would store zeros first, and a process that is killed
        between the two would lose all records.
        """
        memoryview(self._map)[: _LENGTH.size].cast("Q")[0] = length

    def _records(self) -> Iterator[tuple[Step, int, bytes]]:
        at, end = _LENGTH.size, _LENGTH.size + self._committed
        while at < end:
            offset, length, step = _RECORD.unpack_from(self._map, at)
            at += _RECORD.size + length
            yield Step(step), offset, self._map[at - length : at]

    def _make_room(self, end: int) -> None:
        if end > len(self._map):
            self._map.resize(max(2 * len(self._map), -(-end // mmap.PAGESIZE) * mmap.PAGESIZE))
