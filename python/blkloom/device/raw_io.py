"""A device as a Python file: `io.RawIOBase` with a position, for code that needs a file object.

Any number of views of one device may be open. Each has its own position and may be used by one thread at a time, like
Python's raw files. Closing a view does not close its device.
"""

from __future__ import annotations

import errno
import io
import os
from typing import TYPE_CHECKING

from typing_extensions import override

from blkloom import _engine

if TYPE_CHECKING:
    from typing_extensions import Buffer


class RawDevice(io.RawIOBase):
    """Raw file object with a position. Like a block device it has a fixed size: reads end there, writes past it fail
    with ENOSPC. `flush` is Python's (a raw file has no buffer); for durable data call the device's `flush`.
    """

    def __init__(self, device: _engine.Device, *, writable: bool = True) -> None:
        super().__init__()
        self._device = device
        self._writable = writable
        self._position = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def writable(self) -> bool:
        return self._writable

    @override
    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Fills `buffer`, or a part of it at the end of the device. Returns the number of bytes (0 at the end)."""
        self._check_open()
        with memoryview(buffer) as whole, whole.cast("B") as view:
            length = min(len(view), max(0, self._device.size - self._position))
            if length:
                with view[:length] as part:
                    self._device.pread_into(part, self._position)
        self._position += length
        return length

    def write(self, data: Buffer) -> int:
        """Writes `data`, or the part before the end of the device. Returns the number of bytes."""
        self._check_open()
        if not self._writable:
            raise io.UnsupportedOperation("write")
        with memoryview(data) as whole, whole.cast("B") as view:
            length = min(len(view), max(0, self._device.size - self._position))
            if len(view) and not length:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if length:
                with view[:length] as part:
                    self._device.pwrite(part, self._position)
        self._position += length
        return length

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Sets the position, which may be past the end. Returns the new position."""
        self._check_open()
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._device.size}
        if whence not in bases:
            raise ValueError(f"whence {whence} is not SEEK_SET, SEEK_CUR or SEEK_END")
        position = bases[whence] + offset
        if position < 0:
            raise OSError(errno.EINVAL, f"position {position} is before the start of the device")
        self._position = position
        return position

    @override
    def tell(self) -> int:
        self._check_open()
        return self._position

    def truncate(self, size: int | None = None) -> int:
        """Raises an error: the table decides the size of a device."""
        raise io.UnsupportedOperation("truncate: a device has the size of its table")

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on a closed view")
