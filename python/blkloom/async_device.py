"""Asyncio interface of a device: requests go to the engine's event loops, and an event descriptor reports completed
ones.

No Python threads are used. A small request that need not wait is executed at once. `submit` passes other requests to
the engine, and an event descriptor wakes the asyncio loop when requests have completed. An AsyncDevice belongs to the
asyncio loop in which it was made. Cancelling a coroutine ends the wait, not the I/O: the engine keeps the buffer until
the I/O has completed, so a buffer of a cancelled `pread_into` may still be written to.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from blkloom import _engine
from blkloom.forked import OwnProcess

if TYPE_CHECKING:
    from typing_extensions import Buffer


class AsyncDevice:
    """Coroutines with the names, arguments and errors of the device's methods.

    An async context manager; `aclose` waits for requests in flight and leaves the device open.
    """

    def __init__(self, device: _engine.Device) -> None:
        self.device = device
        self._process = OwnProcess("an asynchronous view of a device")
        self._loop = asyncio.get_running_loop()
        self._notices = _engine.Notices()
        self._tokens = itertools.count(1)
        self._waiting: dict[int, tuple[asyncio.Future[Any], Buffer | None]] = {}
        self._closed = False
        self._loop.add_reader(self._notices.fileno(), self._collect)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.device.size

    async def pread(self, length: int, offset: int) -> bytes:
        """Reads `length` bytes from `offset` on."""
        buffer = bytearray(length)
        await self._submit("read", offset, length, buffer)
        return bytes(buffer)

    async def pread_into(self, buffer: Buffer, offset: int) -> int:
        """Fills `buffer` from `offset` on, without a copy. Returns the number of bytes, always the size of the
        buffer.
        """
        length = _size(buffer)
        await self._submit("read", offset, length, buffer)
        return length

    async def pwrite(self, data: Buffer, offset: int, *, fua: bool = False) -> int:
        """Writes all of `data`, which must not change until this returns. fua: durable when this returns."""
        length = _size(data)
        await self._submit("write", offset, length, data, fua=fua)
        return length

    async def flush(self) -> None:
        """Makes every completed write durable."""
        await self._submit("flush", 0, 0)

    async def discard(self, offset: int, length: int) -> None:
        """Discards the range: its data is not needed any more."""
        await self._submit("discard", offset, length)

    async def write_zeroes(
        self, offset: int, length: int, *, unmap: bool = True, fast: bool = False, fua: bool = False
    ) -> None:
        """Writes zeros to the range. unmap: it may become a hole; fast: fail at once if that would be slow."""
        await self._submit("write_zeroes", offset, length, unmap=unmap, fast=fast, fua=fua)

    async def extents(
        self, offset: int = 0, length: int | None = None, *, context: str = "base:allocation"
    ) -> list[tuple[int, int, int]]:
        """(offset, length, flags) runs that cover the range; flags: 1 hole, 2 reads as zeros, or those of `context`."""
        end = self.device.size if length is None else offset + length
        all_found: list[tuple[int, int, int]] = []
        while not all_found or offset < end:
            # An answer may end before the end of the range, or have a gap, after which it is ignored.
            found: list[tuple[int, int, int]] = await self._submit(
                "extents", offset, max(end - offset, 0), context=context
            )
            before = offset
            for start, count, flags in found:
                if start != offset:
                    break
                offset += count
                if all_found and all_found[-1][2] == flags:
                    first, so_far, _ = all_found.pop()
                    start, count = first, so_far + count
                all_found.append((start, count, flags))
            if offset == before:
                break
        if offset < end:
            raise OSError(errno.EIO, f"nothing tells what is at {offset}")
        return all_found

    async def batch(self, requests: Sequence[tuple[Literal["r", "w"], Buffer, int]]) -> list[int]:
        """Many reads into and writes from (buffer, offset) at the same time, in any order. Returns the number of bytes
        or -errno for each request.
        """
        outcomes = await asyncio.gather(
            *(
                self.pread_into(buffer, offset) if way == "r" else self.pwrite(buffer, offset)
                for way, buffer, offset in requests
            ),
            return_exceptions=True,
        )
        return [_moved(outcome) for outcome in outcomes]

    async def aclose(self) -> None:
        """Waits for the I/O in flight, even if it fails, and detaches from the asyncio loop. Does nothing in a fork."""
        if self._closed or not self._process.is_current:
            return
        self._closed = True
        if futures := [future for future, _ in self._waiting.values()]:
            await asyncio.gather(*futures, return_exceptions=True)
        self._loop.remove_reader(self._notices.fileno())
        del self._notices  # close its descriptor now, not when a reference cycle is collected

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _submit(
        self, operation: _engine._Operation, offset: int, length: int, buffer: Buffer | None = None, **how: Any
    ) -> Any:
        self._process.check()
        if self._closed:
            raise RuntimeError("the asynchronous view of the device is closed")
        token = next(self._tokens)
        if self.device.submit(self._notices, token, operation, offset, length, buffer, **how):
            return None
        future: asyncio.Future[Any] = self._loop.create_future()
        self._waiting[token] = (future, buffer)
        # Shielded, so that cancelling leaves the entry (and with it the buffer) to `_collect`.
        return await asyncio.shield(future)

    def _collect(self) -> None:
        for token, result, number in self._notices.take():
            future, _ = self._waiting.pop(token)
            if number:
                future.set_exception(OSError(number, os.strerror(number)))
                future.exception()  # marks the exception as retrieved: its waiter may have been cancelled
            else:
                future.set_result(result)


def _size(buffer: Buffer) -> int:
    with memoryview(buffer) as view:
        return view.nbytes


def _moved(outcome: int | BaseException) -> int:
    if isinstance(outcome, int):
        return outcome
    if isinstance(outcome, OSError) and outcome.errno:
        return -outcome.errno
    raise outcome
