"""`WriteCache`: whether the disk of one socket has a write cache, which the driver switches (VIRTIO 1.2, 5.2.4).

The switch is in memory that the supervisor keeps: a front-end that connects again after the death of a worker does not
set it again. It belongs to the process of the front-end; the disk of another process begins with a write cache.
"""

from __future__ import annotations

import os
import struct
from typing import Final

_RECORD: Final = struct.Struct("<iB")
"""Process, and whether the cache is off."""


def make_record() -> int:
    """A descriptor of new memory for the switch. Raises OSError."""
    return os.memfd_create("blkloom-write-cache", os.MFD_CLOEXEC)


class WriteCache:
    """The switch. Owns the descriptor."""

    def __init__(self, record: int) -> None:
        self._record = record

    @property
    def descriptor(self) -> int:
        """Its memory."""
        return self._record

    @property
    def is_on(self) -> bool:
        """Whether writes may be answered before they are durable."""
        return not self._read()[1]

    def begin(self, process: int) -> None:
        """A front-end has connected, perhaps again. process: 0 if it is in another PID namespace."""
        if self._read()[0] != process:
            self._write(process, is_off=False)

    def switch(self, *, is_on: bool) -> None:
        """Switches it for the present front-end. Raises OSError."""
        self._write(self._read()[0], is_off=not is_on)

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self._record)

    def _read(self) -> tuple[int, int]:
        found = os.pread(self._record, _RECORD.size, 0).ljust(_RECORD.size, b"\0")
        process, is_off = _RECORD.unpack(found)
        return process, is_off

    def _write(self, process: int, *, is_off: bool) -> None:
        os.pwrite(self._record, _RECORD.pack(process, is_off), 0)
