"""Test target with coroutine handlers that follow a script of the test, and gates at which the coroutines wait."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar, Self

from typing_extensions import Buffer

from blkloom import Device
from blkloom._engine import Extent
from blkloom.table import Segment, Table
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import HOLE, ZERO, LoadedTarget, Retry
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes, Sectors

PATIENCE = 60.0
"""Seconds after which a test gives up."""


class Gate:
    """Coroutines wait at it, in whatever loop, until a test opens it."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._open = False
        self.arrived = 0
        self.cancelled = 0

    async def wait(self) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._lock:
            self.arrived += 1
            if self._open:
                future.set_result(None)
            self._waiting.append((loop, future))
            self._lock.notify_all()
        try:
            await future
        except asyncio.CancelledError:
            with self._lock:
                self.cancelled += 1
                self._lock.notify_all()
            raise

    def open(self) -> None:
        with self._lock:
            self._open = True
            for loop, future in self._waiting:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(lambda future=future: future.done() or future.set_result(None))

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that changes when a coroutine arrives or is cancelled."""
        with self._lock:
            assert self._lock.wait_for(condition, PATIENCE)

    def until_arrived(self, count: int = 1) -> None:
        self.until(lambda: self.arrived >= count)

    def until_cancelled(self, count: int = 1) -> None:
        self.until(lambda: self.cancelled >= count)


async def nothing(operation: str, offset: int) -> None:
    return None


class LoadedAsynchronous(LoadedTarget):
    writes = flushes = True

    def __init__(self, spec: Asynchronous, context: LoadContext, length: Bytes) -> None:
        super().__init__(spec, [(Bytes(0), length, Extent.fault())])
        self.log, self.act = spec.log, spec.act

    async def read(self, offset: Bytes, length: Bytes) -> Buffer | Retry:
        self.log.append(("read", offset, length))
        answer = await self.act("read", offset)
        return b"r" * length if answer is None else answer

    async def write(self, offset: Bytes, data: bytes, *, fua: bool) -> Retry | None:
        self.log.append(("write", offset, data, fua))
        return await self.act("write", offset)

    async def flush(self) -> None:
        self.log.append(("flush",))
        await self.act("flush", -1)

    async def discard(self, offset: Bytes, length: Bytes) -> None:
        self.log.append(("discard", offset, length))
        await self.act("discard", offset)

    async def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> None:
        self.log.append(("write_zeroes", offset, length, may_unmap, fast))
        await self.act("write_zeroes", offset)

    async def extents(self, offset: Bytes, length: Bytes) -> list[tuple[Bytes, int]]:
        self.log.append(("extents", offset, length))
        await self.act("extents", offset)
        return [(Bytes(512), HOLE | ZERO), (Bytes(length - 512), 0)]

    def contexts(self) -> list[str]:
        return ["test:context"]

    async def block_status(self, context: str, offset: Bytes, length: Bytes) -> list[tuple[Bytes, int]]:
        self.log.append(("block_status", context, offset, length))
        return [(length, 7)]

    async def message(self, words: list[str]) -> str | None:
        self.log.append(("message", *words))
        await self.act("message", -1)
        return " ".join(words)

    def close(self) -> None:
        self.log.append(("close",))


class Asynchronous(TargetSpec):
    """Every range faults. act: what handlers await, given the operation and the offset (-1 for none); its result,
    unless that is None, is a read's answer.
    """

    log: list[tuple[Any, ...]]
    act: Callable[[str, int], Awaitable[Any]] = nothing
    kind: type[LoadedAsynchronous] = LoadedAsynchronous

    name: ClassVar[str] = "asynchronous"

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return self.kind(self, context, length)


def table(*targets: TargetSpec, sectors: int = 8) -> Table:
    return Table(tuple(Segment(Sectors(sectors * i), Sectors(sectors), target) for i, target in enumerate(targets)))


def until_faults(device: Device, count: int) -> None:
    """Waits until so many faults were handed to the mapper."""
    deadline = time.monotonic() + PATIENCE
    while device.stats()["faults"] < count:
        assert time.monotonic() < deadline, "they do not come"
        time.sleep(0.001)


class Calls:
    """Calls on threads of their own, for as long as it is entered."""

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(64)
        return self

    def __call__(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Future[Any]:
        return self._pool.submit(call, *arguments, **named)

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
