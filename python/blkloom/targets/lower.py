"""A backend that passes its operations to a lower file or device: the base of targets that look at the bytes.

Its coroutines run in the asyncio loop of the backend, see `backend.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from typing_extensions import override

from blkloom import _engine
from blkloom.async_device import AsyncDevice
from blkloom.targets.backend import Backend

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from blkloom.units import Bytes

_T = TypeVar("_T")


class LowerDevice(AsyncDevice):
    """A lower device for asyncio, with the flush of a suspend."""

    async def flush_for_suspend(self) -> None:
        """As `flush`. Backends below see that it is the flush of a suspend (`Backend.flush_for_suspend`)."""
        await self._submit("flush", 0, 0, suspending=True)


class LowerView:
    """A lower device for coroutines."""

    def __init__(self, device: _engine.Device) -> None:
        self._device = device
        self._view: LowerDevice | None = None

    @property
    def lower(self) -> LowerDevice:
        """The lower device. Only in coroutines of a backend."""
        if self._view is None:
            self._view = LowerDevice(self._device)
        return self._view

    async def close(self) -> None:
        """Not the device."""
        if self._view is not None:
            await self._view.aclose()


def run_in_loop(backend: Backend, work: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine in the loop of a backend, and returns or raises what it does. Not in that loop."""
    import asyncio  # has been imported, with the loop

    return asyncio.run_coroutine_threadsafe(work, backend.loop).result()


class LowerBackend(LowerView, Backend):
    """Does what the lower device does. A subclass changes what it needs."""

    Lower: TypeAlias = _engine.Device
    """What `LoadContext.lower` returns: it is closed with the table."""

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """See `run_in_loop`."""
        return run_in_loop(self, work)

    @override
    async def read(self, offset: Bytes, length: Bytes) -> bytes | bytearray:
        return await self.lower.pread(length, offset)

    @override
    async def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
        await self.lower.pwrite(data, offset, fua=fua)

    @override
    async def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool) -> None:
        await self.lower.write_zeroes(offset, length, unmap=may_unmap)

    @override
    async def discard(self, offset: Bytes, length: Bytes) -> None:
        await self.lower.discard(offset, length)

    @override
    async def flush(self) -> None:
        await self.lower.flush()

    @override
    async def flush_for_suspend(self) -> None:
        await self.lower.flush_for_suspend()
