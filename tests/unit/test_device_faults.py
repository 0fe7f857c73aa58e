"""Faults: the arguments of a target's handlers, their answers, and protection of the device from faulty targets."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import pytest
from typing_extensions import Buffer

import blkloom
from async_target import Asynchronous, table
from blkloom._engine import Extent
from blkloom.errors import FaultError, TableError
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import HOLE, RETRY, ZERO, LoadedTarget, Retry
from blkloom.targets.spec import TargetSpec
from blkloom.targets.zero import Zero
from blkloom.units import Bytes
from longer_times import TooSlow, in_time, with_longer_times


class LoadedScripted(LoadedTarget):
    writes = flushes = True

    def __init__(self, spec: Scripted, length: Bytes) -> None:
        super().__init__(spec, [(Bytes(0), length, Extent.fault())])
        self.log, self.act = spec.log, spec.act

    def read(self, offset: Bytes, length: Bytes) -> Buffer | Retry:
        self.log.append(("read", offset, length))
        answer: bytes | Retry | None = self.act("read")
        return b"r" * length if answer is None else answer

    def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
        self.log.append(("write", offset, data, fua))
        self.act("write")

    def flush(self) -> None:
        self.log.append(("flush",))
        self.act("flush")

    def discard(self, offset: Bytes, length: Bytes) -> None:
        self.log.append(("discard", offset, length))

    def write_zeroes(self, offset: Bytes, length: Bytes, *, may_unmap: bool, fast: bool) -> None:
        self.log.append(("write_zeroes", offset, length, may_unmap, fast))

    def extents(self, offset: Bytes, length: Bytes) -> list[tuple[Bytes, int]]:
        self.log.append(("extents", offset, length))
        return [(Bytes(512), HOLE | ZERO), (Bytes(length - 512), 0)]

    def close(self) -> None:
        self.log.append(("close",))


class Scripted(TargetSpec):
    """Every range faults; what handlers do is up to the test."""

    log: list[tuple[Any, ...]]
    act: Callable[[str], Any] = lambda _: None
    kind: type[LoadedScripted] = LoadedScripted

    name: ClassVar[str] = "scripted"

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        self.log.append(("load", start, length))
        return self.kind(self, length)


class Silent(TargetSpec):
    """Has no handler."""

    name: ClassVar[str] = "silent"

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return LoadedTarget(self, [(Bytes(0), length, Extent.fault())])


class WriteOnly(LoadedScripted):
    """Leaves zeros and discards to the base class."""

    discard = LoadedTarget.discard  # type: ignore[assignment]
    write_zeroes = LoadedTarget.write_zeroes  # type: ignore[assignment]


Make = Callable[[list[tuple[Any, ...]], Callable[[str], Any]], TargetSpec]
"""A target of its log and what its handlers do."""


def at_once(log: list[tuple[Any, ...]], act: Callable[[str], Any]) -> TargetSpec:
    """Its handlers are coroutines that wait for nothing."""

    async def coroutine(operation: str, offset: int) -> object:
        return act(operation)

    return Asynchronous(log, coroutine)


def awaiting(log: list[tuple[Any, ...]], act: Callable[[str], Any]) -> TargetSpec:
    """Its handlers are coroutines that give way first."""

    async def coroutine(operation: str, offset: int) -> object:
        await asyncio.sleep(0)
        return act(operation)

    return Asynchronous(log, coroutine)


@pytest.fixture(params=[Scripted, at_once, awaiting])
def make(request: pytest.FixtureRequest) -> Make:
    """Targets of plain handlers, and of coroutines."""
    made: Make = request.param
    return made


def nothing(operation: str) -> None:
    """What a handler does by default."""


def failing(number: int) -> AbstractContextManager[object]:
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


def test_handlers_get_offsets_from_the_segment_s_start(make: Make) -> None:
    log: list[tuple[Any, ...]] = []
    with blkloom.Device(table(Zero(), make(log, nothing))) as device:
        assert device.pread(8192, 0) == bytes(4096) + b"r" * 4096
        device.pwrite(b"w" * 512, 4096 + 512)
        device.pwrite(b"f" * 512, 4096, fua=True)
        device.discard(4096, 1024)
        device.write_zeroes(4096 + 1024, 512)
        device.write_zeroes(4096 + 1024, 512, unmap=False, fast=True)
        device.flush()
        assert device.extents(4096, 2048) == [(4096, 512, 3), (4608, 1536, 0)]
    assert log == [
        *([("load", 4096, 4096)] if make is Scripted else []),
        ("read", 0, 4096),
        ("write", 512, b"w" * 512, False),
        ("write", 0, b"f" * 512, True),
        ("flush",),
        ("discard", 0, 1024),
        ("write_zeroes", 1024, 512, True, False),
        ("write_zeroes", 1024, 512, False, True),
        ("flush",),
        ("extents", 0, 2048),
        ("flush",),
        ("close",),
    ]


def test_a_request_over_two_targets_faults_to_each_with_its_part() -> None:
    first: list[tuple[Any, ...]] = []
    second: list[tuple[Any, ...]] = []
    with blkloom.Device(table(Scripted(first), Scripted(second))) as device:
        assert device.pwrite(b"a" * 512 + b"b" * 512, 4096 - 512) == 1024
    assert ("write", 3584, b"a" * 512, False) in first
    assert ("write", 0, b"b" * 512, False) in second


def test_a_target_without_handlers_can_neither_be_read_nor_written() -> None:
    with blkloom.Device(table(Silent())) as device:
        with failing(errno.EIO):
            device.pread(512, 0)
        for write in (
            lambda: device.pwrite(b"x", 0),
            lambda: device.discard(0, 512),
            lambda: device.write_zeroes(0, 512),
        ):
            with failing(errno.EROFS):
                write()
        device.flush()


def test_zeros_are_written_and_discards_ignored_unless_the_target_does_better() -> None:
    log: list[tuple[Any, ...]] = []
    with blkloom.Device(table(Scripted(log, kind=WriteOnly), sectors=4096)) as device:
        device.discard(0, 512)
        device.write_zeroes(512, (1 << 20) + 512)
        with failing(errno.EOPNOTSUPP):
            device.write_zeroes(0, 512, fast=True)
    assert [(entry[1], len(entry[2])) for entry in log if entry[0] == "write"] == [
        (512, 1 << 20),
        (512 + (1 << 20), 512),
    ]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (FaultError(errno.ENOSPC, "full"), errno.ENOSPC),
        (FaultError("no errno"), errno.EIO),
        (FileNotFoundError(errno.ENOENT, "gone"), errno.ENOENT),
        (ZeroDivisionError(), errno.EIO),
        (MemoryError(), errno.ENOMEM),
        (SystemExit(3), errno.EIO),
        (KeyboardInterrupt(), errno.EIO),
        (asyncio.CancelledError(), errno.EIO),
        (TimeoutError(), errno.EIO),
    ],
)
def test_what_a_handler_raises_becomes_the_request_s_errno_and_the_device_lives_on(
    error: BaseException, number: int, make: Make
) -> None:
    wrong = threading.Event()
    wrong.set()

    def act(operation: str) -> None:
        if wrong.is_set() and operation == "read":
            raise error

    with blkloom.Device(table(make([], act), Zero())) as device:
        with failing(number):
            device.pread(4096, 2048)
        assert device.pread(512, 4096) == bytes(512)
        wrong.clear()
        assert device.pread(512, 0) == b"r" * 512


def test_a_bug_in_a_target_is_logged_with_its_traceback_once(caplog: pytest.LogCaptureFixture, make: Make) -> None:
    def act(operation: str) -> None:
        if operation == "read":
            raise LookupError("the bug")

    target = make([], act)
    with blkloom.Device(table(target), name="disk") as device:
        for _ in range(3):
            with failing(errno.EIO):
                device.pread(512, 512)
    records = [record for record in caplog.records if record.exc_info]
    assert len(records) == 1
    assert f"device 'disk': target {target.name} failed a read of 512 bytes at 512" in records[0].message
    assert records[0].levelno == logging.ERROR
    assert "the bug" in caplog.text


def test_a_read_of_the_wrong_length_is_eio_and_said(caplog: pytest.LogCaptureFixture, make: Make) -> None:
    with blkloom.Device(table(make([], lambda _: b"short"))) as device, failing(errno.EIO):
        device.pread(512, 0)
    assert "returned 5 bytes, not 512" in caplog.text


def test_a_target_that_always_says_retry_fails_its_request(make: Make) -> None:
    with (
        blkloom.Device(table(make([], lambda name: RETRY if name == "read" else None))) as device,
        failing(errno.EIO),
    ):
        device.pread(512, 0)


@with_longer_times(0.2, 2, 20)
def test_a_handler_that_never_returns_fails_its_requests_after_the_bound_not_the_device(
    caplog: pytest.LogCaptureFixture, seconds: float
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def act(operation: str) -> None:
        if operation == "read":
            entered.set()
            go_on.wait()

    device = blkloom.Device(table(Scripted([], act), Zero()), fault_timeout=seconds)
    with failing(errno.ETIMEDOUT):
        device.pread(512, 0)
    if not entered.is_set():
        go_on.set()
        device.close()
        raise TooSlow("no handler was begun")
    assert device.pread(512, 4096) == bytes(512)
    with pytest.raises(TimeoutError, match=rf"closed with requests not ended after {seconds} s"):
        device.close()
    assert "does not return" in caplog.text
    go_on.set()
    assert device._mapper.ended(20), "the thread ends when the handler does"


@with_longer_times(0.2, 2, 20)
def test_changes_whose_time_was_over_before_their_turn_are_never_made(seconds: float) -> None:
    log: list[tuple[Any, ...]] = []
    entered, go_on = threading.Event(), threading.Event()
    first = iter([go_on.wait])

    def act(operation: str) -> None:
        if operation == "read":
            entered.set()
            next(first, lambda _: True)(6 * seconds + 20)

    with blkloom.Device(table(Scripted(log, act)), fault_timeout=seconds) as device:
        with failing(errno.ETIMEDOUT):
            device.pread(512, 0)
        if not entered.is_set():
            go_on.set()
            raise TooSlow("no handler was begun")
        for change in (
            lambda: device.discard(0, 512),
            lambda: device.write_zeroes(0, 512),
            lambda: device.pwrite(b"w" * 512, 0),
        ):
            with failing(errno.ETIMEDOUT):
                change()
        go_on.set()
        with in_time():
            assert device.pread(512, 0) == b"r" * 512, "the device goes on"
            device.discard(512, 512)
    changes = [entry for entry in log if entry[0] in ("discard", "write_zeroes", "write")]
    assert changes == [("discard", 512, 512)]


def _behind_a_read(
    make: Callable[[list[tuple[Any, ...]], Callable[[str], None]], Scripted],
    calls: Sequence[Callable[[blkloom.Device], object]],
) -> list[tuple[Any, ...]]:
    """What a target met of a read and of calls that all came while that was being answered. None of them may fail."""
    log: list[tuple[Any, ...]] = []
    entered, go_on = threading.Event(), threading.Event()

    def act(operation: str) -> None:
        if operation == "read":
            entered.set()
            go_on.wait(20)

    failed: list[OSError] = []

    def run(call: Callable[[blkloom.Device], object]) -> None:
        try:
            call(device)
        except OSError as error:
            failed.append(error)

    with blkloom.Device(table(make(log, act))) as device:
        reader = threading.Thread(target=device.pread, args=(512, 0))
        reader.start()
        assert entered.wait(20)
        callers = [threading.Thread(target=run, args=(call,)) for call in calls]
        for thread in callers:
            thread.start()
        while device.stats()["faults"] <= len(calls):  # all of them have arrived
            time.sleep(0.001)
        go_on.set()
        for thread in [reader, *callers]:
            thread.join()
        met = list(log)  # closing flushes, too
    assert not failed
    return met


def test_flushes_that_wait_together_share_one_call() -> None:
    log = _behind_a_read(Scripted, [blkloom.Device.flush] * 8)
    assert log.count(("flush",)) == 1


def _writes_together(prepare: Callable[[int], list[int]]) -> list[tuple[Any, ...]]:
    """What a target met of a read and, while it was being answered, four writes. prepare: which of the writes that came
    together are to be looked up again.
    """

    class Preparing(LoadedScripted):
        prepares_writes = True

        def prepare_writes(self, writes: Sequence[tuple[Bytes, Bytes]]) -> Sequence[int]:
            self.log.append(("prepare", list(writes)))
            return prepare(len(writes))

    def write(number: int) -> Callable[[blkloom.Device], object]:
        return lambda device: device.pwrite(bytes([number]) * 512, number * 512)

    return _behind_a_read(lambda log, act: Scripted(log, act, Preparing), [write(number) for number in range(4)])


def test_a_target_prepares_the_writes_that_came_together_with_one_call() -> None:
    prepared = [[0, 1, 3]]
    log = _writes_together(lambda _: prepared.pop() if prepared else [])
    kinds = [entry[0] for entry in log if entry[0] in ("prepare", "write")]
    assert kinds[:2] == ["prepare", "write"], "what is not ready comes by itself"
    first = next(entry for entry in log if entry[0] == "prepare")
    assert sorted(first[1]) == [(number * 512, 512) for number in range(4)]
    assert sorted(entry[1] for entry in log if entry[0] == "write") == [0, 512, 1024, 1536], "each is made once"


def test_what_goes_wrong_while_writes_are_prepared_fails_none_of_them(caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: int) -> list[int]:
        raise ValueError("a bug")

    log = _writes_together(fails)
    assert sum(entry[0] == "write" for entry in log) == 4
    assert "a bug" in caplog.text


def test_every_load_is_a_loaded_target_of_its_own() -> None:
    log: list[tuple[Any, ...]] = []
    loaded: list[LoadedTarget] = []

    class Listed(LoadedScripted):
        def __init__(self, spec: Scripted, length: Bytes) -> None:
            super().__init__(spec, length)
            loaded.append(self)

    twice = table(Scripted(log, kind=Listed))
    with blkloom.Device(twice) as first, blkloom.Device(twice) as second:
        assert first.pread(1, 0) == second.pread(1, 0) == b"r"
        first.load(twice)
        first.resume()
    assert len(set(map(id, loaded))) == 3
    assert all(target.spec is loaded[0].spec for target in loaded)
    assert log.count(("close",)) == 3


@pytest.mark.parametrize(
    ("handler", "declaration"),
    [
        ("flush", "flushes"),
        ("write", "writes"),
        ("prefetch", "prefetches"),
        ("prepare_writes", "prepares_writes"),
    ],
)
def test_a_handler_that_must_be_declared_and_is_not_is_refused_at_once(handler: str, declaration: str) -> None:
    with pytest.raises(TypeError, match=f"Odd has a handler '{handler}'; say so: {declaration} = True"):
        type("Odd", (LoadedTarget,), {handler: lambda *_: None})
    type("Even", (LoadedTarget,), {handler: lambda *_: None, declaration: True})


def test_what_a_spec_loads_must_be_a_loaded_target() -> None:
    class Wrong(Silent):
        def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
            return []  # type: ignore[return-value]

    class Lacking(TargetSpec):
        name = "lacking"

    with pytest.raises(TableError, match="target silent loads no LoadedTarget but list"):
        blkloom.Device(table(Wrong()))
    with pytest.raises(TableError, match=r"target lacking failed to map: .*Lacking does not define load"):
        blkloom.Device(table(Lacking()))


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Scripted([]).log = []  # type: ignore[misc]
