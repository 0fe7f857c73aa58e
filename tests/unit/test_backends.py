"""Backends: coroutines that read and write data, many at the same time, limited, cancelled and closed."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import pytest

import blkloom
from async_target import PATIENCE, Calls, Gate, nothing, table
from blkloom._engine import BackendQueue, Extent
from blkloom.errors import FaultError
from blkloom.table import parse_table
from blkloom.targets.backend import Backend
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.registry import all_targets
from blkloom.targets.spec import TargetSpec
from blkloom.targets.zero import Zero
from blkloom.units import Bytes
from longer_times import in_time, needs, with_longer_times

BLOCK = 4096


class Logging(Backend):
    """act: what operations await, given their name and offset (-1 for none); its result, unless None, is a read's."""

    def __init__(self, log: list[tuple[Any, ...]], act: Callable[[str, int], Awaitable[Any]] = nothing) -> None:
        self.log = log
        self.act = act

    async def read(self, offset: Bytes, length: Bytes) -> bytes:
        self.log.append(("read", offset, length))
        answer: bytes | None = await self.act("read", offset)
        return b"r" * length if answer is None else answer

    async def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
        self.log.append(("write", offset, data, fua))
        await self.act("write", offset)

    async def discard(self, offset: Bytes, length: Bytes) -> None:
        self.log.append(("discard", offset, length))

    async def flush(self) -> None:
        self.log.append(("flush",))
        await self.act("flush", -1)

    async def close(self) -> None:
        self.log.append(("close",))
        await self.act("close", -1)


class ReadOnly(Backend):
    async def read(self, offset: Bytes, length: Bytes) -> bytes:
        return bytes(length)


class On(TargetSpec):
    """A segment in a backend."""

    backend: Backend
    read_only: bool = False

    name: ClassVar[str] = "on"

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        extent = Extent.backend(context.backend(self.backend), 1000, read_only=self.read_only)
        assert extent.kind == "backend"
        return LoadedTarget(self, [(Bytes(0), length, extent)])


def failing(number: int) -> Any:
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


def at(gate: Gate, operation: str) -> Callable[[str, int], Any]:
    async def act(name: str, offset: int) -> None:
        if name == operation:
            await gate.wait()

    return act


def test_every_operation_comes_with_the_backends_own_offsets() -> None:
    log: list[tuple[Any, ...]] = []
    with blkloom.Device(table(Zero(), On(Logging(log)))) as device:
        assert device.pread(8192, 0) == bytes(4096) + b"r" * 4096
        device.pwrite(b"w" * 512, 4096 + 512)
        device.pwrite(b"f" * 512, 4096, fua=True)
        device.discard(4096, 1024)
        device.write_zeroes(4096 + 1024, 512)
        device.flush()
        assert device.extents(4096, 2048) == [(4096, 2048, 0)]
    assert log == [
        ("read", 1000, 4096),
        ("write", 1512, b"w" * 512, False),
        ("write", 1000, b"f" * 512, True),
        ("discard", 1000, 1024),
        ("write", 2024, bytes(512), False),
        ("flush",),
        ("flush",),
        ("close",),
    ]


def test_all_begin_before_any_ends() -> None:
    count = 32
    began: set[int] = set()
    all_began = asyncio.Event()

    async def act(operation: str, offset: int) -> None:
        if operation == "read":
            began.add(offset)
            if len(began) == count:
                all_began.set()
            await all_began.wait()

    with blkloom.Device(table(On(Logging([], act)), sectors=8 * count)) as device:
        reads = [("r", bytearray(BLOCK), number * BLOCK) for number in range(count)]
        assert device.batch(reads) == [BLOCK] * count


class Four(Logging):
    longest = 512
    most_in_flight = 4


def test_long_requests_come_in_parts_and_no_more_of_them_than_may_run() -> None:
    gate = Gate()
    running, most = 0, 0

    async def act(operation: str, offset: int) -> None:
        nonlocal running, most
        if operation == "read":
            running += 1
            most = max(running, most)
            await gate.wait()
            running -= 1

    log: list[tuple[Any, ...]] = []
    with Calls() as call, blkloom.Device(table(On(Four(log, act)))) as device:
        read = call(device.pread, BLOCK, 0)
        gate.until_arrived(4)
        gate.open()
        assert read.result(PATIENCE) == b"r" * BLOCK
    assert most == 4
    assert sorted(entry[1:] for entry in log if entry[0] == "read") == [(1000 + at, 512) for at in range(0, BLOCK, 512)]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (FaultError(errno.ENOSPC, "full"), errno.ENOSPC),
        (FileNotFoundError(errno.ENOENT, "gone"), errno.ENOENT),
        (ZeroDivisionError(), errno.EIO),
        (MemoryError(), errno.ENOMEM),
        (SystemExit(3), errno.EIO),
        (asyncio.IncompleteReadError(b"", 1), errno.EIO),
    ],
)
def test_what_a_backend_raises_becomes_the_errno_and_it_lives_on(error: BaseException, number: int) -> None:
    wrong = True

    async def act(operation: str, offset: int) -> None:
        await asyncio.sleep(0)
        if wrong and operation == "read":
            raise error

    with blkloom.Device(table(On(Logging([], act)))) as device:
        with failing(number):
            device.pread(512, 0)
        wrong = False
        assert device.pread(512, 0) == b"r" * 512


def test_a_bug_and_a_wrong_length_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def act(operation: str, offset: int) -> bytes | None:
        return b"short" if operation == "read" else None

    with blkloom.Device(table(On(Logging([], act)))) as device:
        for _ in range(3):
            with failing(errno.EIO):
                device.pread(512, 0)
    records = [record for record in caplog.records if record.exc_info]
    assert len(records) == 1
    assert records[0].levelno == logging.ERROR
    assert "Logging.read returned 5 bytes, not 512" in records[0].message


def test_a_backend_that_only_reads_refuses_the_rest() -> None:
    with blkloom.Device(table(On(ReadOnly()))) as device:
        with failing(errno.EROFS):
            device.pwrite(b"w" * 512, 0)
        with failing(errno.EROFS):
            device.write_zeroes(0, 512)
        device.flush()
    with blkloom.Device(table(On(Logging([]), read_only=True))) as device, failing(errno.EROFS):
        device.pwrite(b"w" * 512, 0)


@pytest.mark.parametrize("which", ["top", "below"])
def test_a_suspend_on_whatever_level_cancels_reads_and_they_are_asked_again(which: str) -> None:
    gate = Gate()
    log: list[tuple[Any, ...]] = []
    with Calls() as call, blkloom.Device(table(On(Logging(log, at(gate, "read")))), name="below") as below:
        devices = {"below": below}
        text = parse_table("0 8 linear blkloom:below 0", targets=all_targets())
        devices["top"] = blkloom.Device(text, name="top", devices=devices)
        read = call(devices["top"].pread, 512, 0)
        gate.until_arrived()
        devices[which].suspend()
        gate.until_cancelled()
        assert not read.done()
        gate.open()
        devices[which].resume()
        assert read.result(PATIENCE) == b"r" * 512
        devices["top"].close()
    assert [entry[0] for entry in log].count("read") == 2


@pytest.mark.parametrize("operation", ["write", "flush"])
def test_a_suspend_waits_for_what_changes_something(operation: str) -> None:
    gate = Gate()
    with Calls() as call, blkloom.Device(table(On(Logging([], at(gate, operation))))) as device:
        request = call(device.pwrite, b"w" * 512, 0) if operation == "write" else call(device.flush)
        gate.until_arrived()
        suspend = call(device.suspend)
        while not device.suspended:
            assert not suspend.done()
        gate.open()
        suspend.result(PATIENCE)
        request.result(PATIENCE)
        assert gate.cancelled == 0
        device.resume()


@with_longer_times(0.2, 2, 20)
def test_an_operation_whose_time_is_over_is_cancelled_and_fails(seconds: float) -> None:
    gate = Gate()
    with blkloom.Device(table(On(Logging([], at(gate, "write")))), fault_timeout=seconds) as device:
        with failing(errno.ETIMEDOUT):
            device.pwrite(b"w" * 512, 0)
        needs(gate.arrived == 1, "no operation was begun")
        gate.until_cancelled()
        with in_time():
            assert device.pread(512, 0) == b"r" * 512


def test_a_close_fails_an_unfinished_read_and_closes_the_backend() -> None:
    gate = Gate()
    log: list[tuple[Any, ...]] = []
    with Calls() as call:
        device = blkloom.Device(table(On(Logging(log, at(gate, "read")))))
        read = call(device.pread, 512, 0)
        gate.until_arrived()
        device.close()
        with failing(errno.ESHUTDOWN):
            read.result(PATIENCE)
    assert gate.cancelled == 1
    assert log[-1] == ("close",)


def test_one_that_does_not_end_is_said_and_holds_up_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blkloom.targets.backend_loop.CLOSE_SECONDS", 0.05)
    gate, closing = Gate(), Gate()

    async def act(operation: str, offset: int) -> None:
        while operation == "read":
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue
        if operation == "close":
            await closing.wait()

    with Calls() as call:
        device = blkloom.Device(table(On(Logging([], act))))
        read = call(device.pread, 512, 0)
        gate.until_arrived()
        device.close()
        with failing(errno.ESHUTDOWN):
            read.result(PATIENCE)
    assert "1 operations did not end within 0.05 s" in caplog.text
    assert "backend Logging failed to close" in caplog.text


def test_limits_of_nothing_are_refused() -> None:
    assert BackendQueue(longest=5, most=6, most_bytes=7).limits == (5, 6, 7)
    for longest, most in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="longest and most must be at least 1"):
            BackendQueue(longest=longest, most=most, most_bytes=1)
