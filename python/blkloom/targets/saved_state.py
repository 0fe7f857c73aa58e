"""State of a target that the next process of its device gets: the settings made by messages.

The state of all targets of a table is JSON in one memfd, which the supervisor keeps. A new state is written beside the
old one, and then the header refers to it. So a process that is killed leaves one of the two. A new table begins without
state, and so does one whose memory is lost, because the supervisor was killed, too (`is_lost`). Any thread may use it.
"""

from __future__ import annotations

import os
import struct
import threading
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from blkloom.targets.descriptors import Descriptors

_HEADER: Final = struct.Struct("<QQ")
"""Offset and length of the state; zeros: there is none."""


class TableState:
    """The states of the targets of one table, by the number of the target."""

    def __init__(self, descriptors: Descriptors) -> None:
        self._descriptors = descriptors
        self._lock = threading.Lock()
        self._is_lost = False

    @cached_property
    def _memory(self) -> int:
        """Raises OSError."""
        return self._descriptors.memory(_make, self._remake)

    def _remake(self) -> int:
        self._is_lost = True
        return _make()

    @property
    def is_lost(self) -> bool:
        """Whether the states of a former process are lost. Raises OSError."""
        with self._lock:
            return self._memory >= 0 and self._is_lost

    def read(self) -> dict[str, Any]:
        """All states; {} at first. Raises OSError."""
        with self._lock:
            return self._read()

    def _read(self) -> dict[str, Any]:
        header = os.pread(self._memory, _HEADER.size, 0)
        at, length = _HEADER.unpack(header) if len(header) == _HEADER.size else (0, 0)
        return msgspec.json.decode(os.pread(self._memory, length, at), type=dict[str, Any]) if length else {}

    def write(self, number: int, value: object) -> None:
        """Replaces the state of one target. Raises OSError."""
        with self._lock:
            text = msgspec.json.encode(self._read() | {str(number): value})
            at, length = _HEADER.unpack(os.pread(self._memory, _HEADER.size, 0).ljust(_HEADER.size, b"\0"))
            first = _HEADER.size
            place = first if at >= first + len(text) else max(at + length, first)
            self._write(text, place)
            os.pwrite(self._memory, _HEADER.pack(place, len(text)), 0)
            os.ftruncate(self._memory, place + len(text))

    def _write(self, text: bytes, at: int) -> None:
        """Writes all of a text: one call may write less."""
        left = memoryview(text)
        while left:
            written = os.pwrite(self._memory, left, at)
            left, at = left[written:], at + written

    def close(self) -> None:
        """Closes the memory, if it was used."""
        if "_memory" in self.__dict__:
            os.close(self._memory)
            del self._memory


class SavedState:
    """The state of one target."""

    def __init__(self, table: TableState, number: int) -> None:
        self._table = table
        self._number = number

    @property
    def is_lost(self) -> bool:
        """Whether a former process had a state that is lost. Raises OSError."""
        return self._table.is_lost

    def read(self) -> Any:
        """What the former process of the device has saved; None: nothing, or the table is new. Raises OSError."""
        return self._table.read().get(str(self._number))

    def save(self, value: object) -> None:
        """Saves a value of JSON's types. Raises OSError."""
        self._table.write(self._number, value)


def _make() -> int:
    return os.memfd_create("blkloom-state", os.MFD_CLOEXEC)
