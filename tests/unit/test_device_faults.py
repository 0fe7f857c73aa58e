"""Faults: what reaches a target's handlers, how they answer, and that no target harms its device."""

import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import pytest
from typing_extensions import Buffer

import blkloom
from blkloom._engine import Extent
from blkloom.errors import FaultError
from blkloom.table import Segment, Table
from blkloom.table.arguments import Arguments
from blkloom.target.base import HOLE, RETRY, ZERO, Retry, Target
from blkloom.target.opening import Opening
from blkloom.target.zero import Zero
from blkloom.units import Bytes, Sectors


@dataclass
class Scripted(Target):
    """Every range faults; what handlers do is up to the test."""

    log: list[tuple[Any, ...]]
    act: Callable[[str], Any] = lambda _: None

    name: ClassVar[str] = "scripted"

    @classmethod
    def parse(cls, arguments: Arguments) -> Self:
        arguments.finish()
        return cls([])

    def map(self, opening: Opening, start: Bytes, length: Bytes) -> list[tuple[Bytes, Bytes, Extent]]:
        self.log.append(("map", start, length))
        return [(Bytes(0), length, Extent.fault())]

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


class Silent(Scripted):
    """Overrides no handler."""

    read = Target.read
    write = Target.write  # type: ignore[assignment]
    flush = Target.flush
    discard = Target.discard  # type: ignore[assignment]
    write_zeroes = Target.write_zeroes  # type: ignore[assignment]


class WriteOnly(Scripted):
    """Leaves zeros and discards to the base class."""

    discard = Target.discard  # type: ignore[assignment]
    write_zeroes = Target.write_zeroes  # type: ignore[assignment]


def table(*targets: Target, sectors: int = 8) -> Table:
    return Table(tuple(Segment(Sectors(sectors * i), Sectors(sectors), target) for i, target in enumerate(targets)))


def failing(number: int) -> AbstractContextManager[object]:
    return pytest.raises(OSError, match=rf"\[Errno {number}\]")


def test_handlers_get_offsets_from_the_segment_s_start() -> None:
    log: list[tuple[Any, ...]] = []
    with blkloom.Device(table(Zero(), Scripted(log))) as device:
        assert device.pread(8192, 0) == bytes(4096) + b"r" * 4096
        device.pwrite(b"w" * 512, 4096 + 512)
        device.pwrite(b"f" * 512, 4096, fua=True)
        device.discard(4096, 1024)
        device.write_zeroes(4096 + 1024, 512)
        device.write_zeroes(4096 + 1024, 512, unmap=False, fast=True)
        device.flush()
        assert device.extents(4096, 2048) == [(4096, 512, 3), (4608, 1536, 0)]
    assert log == [
        ("map", 4096, 4096),
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
    with blkloom.Device(table(Silent([]))) as device:
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
    with blkloom.Device(table(WriteOnly(log), sectors=4096)) as device:
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
    ],
)
def test_what_a_handler_raises_becomes_the_request_s_errno_and_the_device_lives_on(
    error: BaseException, number: int
) -> None:
    wrong = threading.Event()
    wrong.set()

    def act(operation: str) -> None:
        if wrong.is_set() and operation == "read":
            raise error

    with blkloom.Device(table(Scripted([], act), Zero())) as device:
        with failing(number):
            device.pread(4096, 2048)
        assert device.pread(512, 4096) == bytes(512)
        wrong.clear()
        assert device.pread(512, 0) == b"r" * 512


def test_a_bug_in_a_target_is_logged_with_its_traceback_once(caplog: pytest.LogCaptureFixture) -> None:
    def act(operation: str) -> None:
        if operation == "read":
            raise LookupError("the bug")

    with blkloom.Device(table(Scripted([], act)), name="disk") as device:
        for _ in range(3):
            with failing(errno.EIO):
                device.pread(512, 512)
    records = [record for record in caplog.records if record.exc_info]
    assert len(records) == 1
    assert "device 'disk': target scripted failed a read of 512 bytes at 512" in records[0].message
    assert records[0].levelno == logging.ERROR
    assert "the bug" in caplog.text


def test_a_read_of_the_wrong_length_is_eio_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with blkloom.Device(table(Scripted([], lambda _: b"short"))) as device, failing(errno.EIO):
        device.pread(512, 0)
    assert "returned 5 bytes, not 512" in caplog.text


def test_a_target_that_always_says_retry_fails_its_request() -> None:
    with (
        blkloom.Device(table(Scripted([], lambda name: RETRY if name == "read" else None))) as device,
        failing(errno.EIO),
    ):
        device.pread(512, 0)


def test_a_handler_that_never_returns_fails_its_requests_after_the_bound_not_the_device(
    caplog: pytest.LogCaptureFixture,
) -> None:
    go_on = threading.Event()
    device = blkloom.Device(
        table(Scripted([], lambda name: go_on.wait() and None if name == "read" else None), Zero()), fault_timeout=0.2
    )
    with failing(errno.ETIMEDOUT):
        device.pread(512, 0)
    assert device.pread(512, 4096) == bytes(512)
    with pytest.raises(TimeoutError, match=r"closed with requests not ended after 0\.2 s"):
        device.close()
    assert "does not return" in caplog.text
    go_on.set()
    assert device._mapper.ended(20), "the thread ends when the handler does"


def test_changes_whose_time_was_over_before_their_turn_are_never_made() -> None:
    log: list[tuple[Any, ...]] = []
    go_on = threading.Event()
    first = iter([go_on.wait])

    def act(operation: str) -> None:
        if operation == "read":
            next(first, lambda _: True)(20)

    with blkloom.Device(table(Scripted(log, act)), fault_timeout=0.2) as device:
        with failing(errno.ETIMEDOUT):
            device.pread(512, 0)
        for change in (
            lambda: device.discard(0, 512),
            lambda: device.write_zeroes(0, 512),
            lambda: device.pwrite(b"w" * 512, 0),
        ):
            with failing(errno.ETIMEDOUT):
                change()
        go_on.set()
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


@dataclass
class Preparing(Scripted):
    """prepare: which of the writes that came together are to be looked up again."""

    prepare: Callable[[int], list[int]] = lambda _: []

    def prepare_writes(self, writes: Sequence[tuple[Bytes, Bytes]]) -> Sequence[int]:
        self.log.append(("prepare", list(writes)))
        return self.prepare(len(writes))


def _writes_together(prepare: Callable[[int], list[int]]) -> list[tuple[Any, ...]]:
    """What a target met of a read and, while it was being answered, four writes."""

    def write(number: int) -> Callable[[blkloom.Device], object]:
        return lambda device: device.pwrite(bytes([number]) * 512, number * 512)

    return _behind_a_read(lambda log, act: Preparing(log, act, prepare), [write(number) for number in range(4)])


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


def test_every_load_gets_a_copy_of_its_target() -> None:
    seen: list[tuple[Any, ...]] = []

    @dataclass
    class Stateful(Scripted):
        def map(self, opening: Opening, start: Bytes, length: Bytes) -> list[tuple[Bytes, Bytes, Extent]]:
            assert not hasattr(self, "state")
            self.state: object = object()
            return super().map(opening, start, length)

    twice = table(Stateful(seen))
    with blkloom.Device(twice) as first, blkloom.Device(twice) as second:
        assert first.pread(1, 0) == second.pread(1, 0) == b"r"
        first.load(twice)
        first.resume()
    assert seen.count(("close",)) == 3
