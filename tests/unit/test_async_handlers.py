"""Coroutine handlers: many at the same time, limited in number, with the same answers and errors as plain handlers."""

from __future__ import annotations

import asyncio
import errno
import functools
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import pytest

import blkloom
from async_target import PATIENCE, Asynchronous, Calls, Gate, LoadedAsynchronous, table, until_faults
from blkloom._engine import Extent
from blkloom.errors import RetryLater
from blkloom.targets.coroutines import has_coroutines
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.spec import TargetSpec
from blkloom.targets.zero import Zero
from blkloom.units import Bytes, Sectors
from longer_times import in_time, with_longer_times

BLOCK = 4096


def failing(number: int) -> AbstractContextManager[object]:
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


def read_blocks(device: blkloom.Device, count: int) -> list[int]:
    """Reads so many blocks together; bytes or -errno of each."""
    return device.batch([("r", bytearray(BLOCK), number * BLOCK) for number in range(count)])


def test_a_message_may_be_answered_by_a_coroutine() -> None:
    log: list[tuple[Any, ...]] = []
    with blkloom.Device(table(Zero(), Asynchronous(log))) as device:
        assert device.message(Sectors(8), ["hello", "world"]) == "hello world"
        assert log == [("message", "hello", "world")]


def test_a_metadata_context_may_be_asked_of_a_coroutine() -> None:
    with blkloom.Device(table(Asynchronous([]))) as device:
        assert device.extents(0, 1024, context="test:context") == [(0, 1024, 7)]


@pytest.mark.parametrize("count", [32, 100])
def test_all_begin_before_any_ends(count: int) -> None:
    began: set[int] = set()
    all_began = asyncio.Event()

    async def act(operation: str, offset: int) -> None:
        began.add(offset)
        if len(began) == count:
            all_began.set()
        await all_began.wait()

    with blkloom.Device(table(Asynchronous([], act), sectors=8 * count)) as device:
        assert read_blocks(device, count) == [BLOCK] * count


class Four(LoadedAsynchronous):
    most_in_flight = 4


class EightKilobytes(LoadedAsynchronous):
    most_bytes_in_flight = 2 * BLOCK


@pytest.mark.parametrize(("kind", "most"), [(Four, 4), (EightKilobytes, 2)])
def test_no_more_run_than_their_class_says_and_the_others_wait(kind: type[LoadedAsynchronous], most: int) -> None:
    gate = Gate()
    running = 0
    seen: set[int] = set()

    async def act(operation: str, offset: int) -> None:
        nonlocal running
        running += 1
        await gate.wait()
        seen.add(running)
        running -= 1

    # Two segments of one class share its bound.
    target = Asynchronous([], act, kind)
    with Calls() as call, blkloom.Device(table(target, target, sectors=128)) as device:
        reads = call(read_blocks, device, 32)
        until_faults(device, 32)
        gate.until_arrived(most)
        gate.open()
        assert reads.result(PATIENCE) == [BLOCK] * 32
    assert max(seen) == most


def test_a_request_larger_than_the_bound_runs_alone() -> None:
    gate = Gate()
    log: list[tuple[Any, ...]] = []
    with (
        Calls() as call,
        blkloom.Device(table(Asynchronous(log, lambda *_: gate.wait(), EightKilobytes), sectors=64)) as device,
    ):
        large = call(device.pread, 4 * BLOCK, 0)
        gate.until_arrived()
        small = call(device.pread, BLOCK, 0)
        until_faults(device, 2)
        gate.open()
        assert len(large.result(PATIENCE)) == 4 * BLOCK
        assert len(small.result(PATIENCE)) == BLOCK
    assert [entry[2] for entry in log if entry[0] == "read"] == [4 * BLOCK, BLOCK]


def test_a_task_that_a_handler_made_cannot_end_the_mapper(caplog: pytest.LogCaptureFixture) -> None:
    async def exits() -> None:
        raise SystemExit(3)

    async def act(operation: str, offset: int) -> None:
        if operation == "read":
            await asyncio.wait({asyncio.ensure_future(exits())})

    with blkloom.Device(table(Asynchronous([], act))) as device:
        assert device.pread(512, 0) == b"r" * 512
        assert device.pread(512, 0) == b"r" * 512
    assert "SystemExit" in caplog.text


def test_a_coroutine_may_say_later() -> None:
    begun: list[str] = []
    tries = 0

    async def act(operation: str, offset: int) -> None:
        nonlocal tries
        await asyncio.sleep(0)
        if operation == "write":
            tries += 1
            if tries < 3:
                raise RetryLater(errno.ENOSPC, "no space", begins=lambda: begun.append("waits"))

    with Calls() as call, blkloom.Device(table(Asynchronous([], act))) as device:
        write = call(device.pwrite, b"w" * 512, 0)
        while tries < 3:
            if device.deferred:
                device.retry_deferred()
        assert write.result(PATIENCE) == 512
    assert begun == ["waits"]


@with_longer_times(0.03, 0.3, 3)
def test_a_handler_may_say_when_it_wants_to_be_asked_again(seconds: float) -> None:
    pause = 2 / 3 * seconds
    tries: list[float] = []

    async def act(operation: str, offset: int) -> None:
        if operation == "read":
            tries.append(time.monotonic())
            if len(tries) < 4:
                raise RetryLater(errno.EIO, "not yet", seconds=pause)

    with blkloom.Device(table(Asynchronous([], act)), fault_timeout=seconds) as device, in_time():
        assert device.pread(512, 0) == b"r" * 512
    assert all(later - earlier >= pause for earlier, later in pairwise(tries))


def test_writes_come_in_the_order_in_which_they_were_answered_and_submitted() -> None:
    log: list[tuple[Any, ...]] = []

    async def act(operation: str, offset: int) -> None:
        await asyncio.sleep(0)
        log.append(("ended", operation))

    with blkloom.Device(table(Asynchronous(log, act))) as device:
        for number in range(20):
            device.pwrite(bytes([number]) * 512, 0)
    kinds = [entry[0] for entry in log[:40]]
    assert kinds == ["write", "ended"] * 20
    assert [entry[2][0] for entry in log if entry[0] == "write"] == list(range(20))


def test_a_flush_that_comes_while_one_runs_has_another_and_they_share_it() -> None:
    gate = Gate()
    log: list[tuple[Any, ...]] = []

    async def act(operation: str, offset: int) -> None:
        if operation == "flush":
            await gate.wait()

    with Calls() as call, blkloom.Device(table(Asynchronous(log, act))) as device:
        first = call(device.flush)
        gate.until_arrived()
        device.pwrite(b"w" * 512, 0)  # a flush waits for no write, nor a write for a flush
        later = [call(device.flush) for _ in range(8)]
        until_faults(device, 10)
        gate.open()
        for flush in (first, *later):
            flush.result(PATIENCE)
        met = list(log)  # closing flushes, too
    assert [entry[0] for entry in met] == ["flush", "write", "flush"]


class Decorated(LoadedAsynchronous):
    @functools.wraps(LoadedAsynchronous.read)
    def read(self, *arguments: Any) -> Any:
        return LoadedAsynchronous.read(self, *arguments)


class Plain(LoadedAsynchronous):
    """Its plain read returns the coroutine of something else."""

    def read(self, offset: Bytes, length: Bytes) -> Any:  # type: ignore[override]
        return LoadedAsynchronous.read(self, offset, length)


class Wrong(TargetSpec):
    name = "wrong"

    def load(self, context: object, start: Bytes, length: Bytes) -> LoadedTarget:
        return LoadedWrong(self, [(Bytes(0), length, Extent.fault())])


class LoadedWrong(LoadedTarget):
    """A coroutine from what looks like a plain function, and no handler that is a coroutine function."""

    writes = True

    async def _nothing(self) -> None:
        return None

    def read(self, offset: Bytes, length: Bytes) -> Any:
        return self._nothing()

    def write(self, offset: Bytes, data: bytes, *, fua: bool) -> Any:
        return self._nothing()


def test_which_targets_have_coroutines_is_seen_at_their_class() -> None:
    assert has_coroutines(LoadedAsynchronous)
    assert has_coroutines(Decorated)
    assert has_coroutines(Plain)
    assert not has_coroutines(LoadedTarget)
    assert not has_coroutines(LoadedWrong)
    with blkloom.Device(table(Asynchronous([], kind=Decorated), Asynchronous([], kind=Plain))) as device:
        assert device.pread(8192, 0) == b"r" * 8192


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_a_coroutine_where_none_was_announced_is_an_error_and_never_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    with blkloom.Device(table(Wrong())) as device:
        with failing(errno.EIO):
            device.pread(512, 0)
        with failing(errno.EIO):
            device.pwrite(b"w" * 512, 0)
    assert "define it with 'async def'" in caplog.text


def test_plain_and_asynchronous_targets_share_a_device() -> None:
    class Both(LoadedAsynchronous):
        """A plain write beside its coroutines."""

        def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:  # type: ignore[override]
            self.log.append(("plain", offset))

    log: list[tuple[Any, ...]] = []
    gate = Gate()
    with Calls() as call, blkloom.Device(table(Asynchronous(log, lambda *_: gate.wait(), Both), Zero())) as device:
        read = call(device.pread, 512, 0)
        gate.until_arrived()
        device.pwrite(b"w" * 512, 512)
        assert not read.done()
        gate.open()
        read.result(PATIENCE)
    assert ("plain", 512) in log


def test_nothing_of_a_target_runs_between_two_awaits_of_another_handler() -> None:
    alone = True
    met: set[bool] = set()

    class Alone(LoadedAsynchronous):
        async def read(self, offset: Bytes, length: Bytes) -> bytes:
            nonlocal alone
            for _ in range(20):
                alone = False
                sum(range(2000))  # long enough for other threads
                alone = True
                await asyncio.sleep(0)
            return bytes(length)

        def status(self) -> str:
            met.add(alone)
            return ""

    with Calls() as call, blkloom.Device(table(Asynchronous([], kind=Alone), sectors=256)) as device:
        reads = [call(read_blocks, device, 32) for _ in range(4)]
        device.status()  # however soon the reads are done
        while not all(read.done() for read in reads):
            device.status()
    assert met == {True}


def test_a_target_with_coroutines_does_work_of_its_own_and_is_told_what_comes() -> None:
    worked = threading.Semaphore(0)
    expected: list[int] = []
    gate = Gate()

    class Busy(LoadedAsynchronous):
        prefetches = True
        steps = 3

        def __init__(self, spec: Asynchronous, context: LoadContext, length: Bytes) -> None:
            super().__init__(spec, context, length)
            self._segment = context.segment()

        def preresume(self) -> None:
            self._segment.has_work()

        def work(self) -> bool:
            self.steps -= 1
            worked.release()
            return self.steps > 0

        def prefetch(self, reads: Sequence[tuple[Bytes, Bytes]]) -> None:
            expected.extend(offset for offset, _ in reads)

        def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:  # type: ignore[override]
            held_up.set()
            assert go_on.wait(PATIENCE)

    held_up, go_on = threading.Event(), threading.Event()
    with Calls() as call, blkloom.Device(table(Asynchronous([], lambda *_: gate.wait(), Busy), sectors=64)) as device:
        for _ in range(3):
            assert worked.acquire(timeout=PATIENCE)
        write = call(device.pwrite, b"w" * 512, 0)
        assert held_up.wait(PATIENCE)
        reads = [call(device.pread, 512, number * 512) for number in range(4)]
        until_faults(device, 5)
        go_on.set()
        gate.open()
        for ended in (write, *reads):
            ended.result(PATIENCE)
    assert sorted(expected) == [0, 512, 1024, 1536]
