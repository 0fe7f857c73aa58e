"""Backends: coroutines that read and write data that is neither in a local file nor in memory.

A target passes a backend to `LoadContext.backend` and maps `Extent.backend`. A backend does not see devices, faults or
clusters: the offset of an operation counts from the backend's start. All coroutines of a backend run in one asyncio
loop on a separate thread, one at a time between two awaits. The target's handlers run on another thread, so data that
they share with the backend needs a lock.

Order, errors and cancellation are the same as for a target's handlers. Operations in flight together have no order. A
flush makes durable every write that was answered before the flush was submitted. An `OSError` gives the request its
errno; any other exception gives EIO. A read that is in flight when its device, or a device above it, is suspended, or
when its client is handed to another process, is cancelled and submitted again afterwards. Operations that change data
are waited for, up to the device's `fault_timeout`.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from blkloom.errors import FaultError

if TYPE_CHECKING:
    import asyncio

    from typing_extensions import Buffer

    from blkloom.units import Bytes


class Backend(ABC):
    """Base class of backends. `read` is required, the other operations are optional."""

    longest: ClassVar[int] = 1 << 20
    """Maximum bytes of one operation. Longer requests are split, and the parts are submitted together."""
    most_in_flight: ClassVar[int] = 64
    """Maximum number of operations in flight. Others wait in order of arrival."""
    most_bytes_in_flight: ClassVar[int] = 32 << 20
    """Maximum total bytes of the reads and writes in flight. A single operation may exceed it."""

    loop: asyncio.AbstractEventLoop
    """The loop of its coroutines. Set before the first of them runs."""

    @abstractmethod
    async def read(self, offset: Bytes, length: Bytes) -> Buffer:
        """Returns exactly `length` bytes from `offset`."""

    async def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
        """Stores `data` at `offset`. fua: the data must be durable when this returns."""
        raise FaultError(errno.EROFS, "the backend is read-only")

    async def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool) -> None:
        """Makes the range read as zeros. The default writes zeros."""
        await self.write(offset, bytes(length), fua=False)

    async def discard(self, offset: Bytes, length: Bytes) -> None:
        """Discards the range: its contents are not needed any more. A hint."""
        return

    async def flush(self) -> None:
        """Makes completed writes durable. Called only if an extent of the backend is writable."""
        return

    async def flush_for_suspend(self) -> None:
        """The flush of a suspend or of the end of a device. An OSError undoes the suspend. By default `flush`."""
        await self.flush()

    async def close(self) -> None:
        """Releases resources after the last operation. Must end within a few seconds."""
        return
