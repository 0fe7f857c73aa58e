"""Coroutines that do not finish: suspends, closes, timeouts, and coroutines that ignore their cancellation."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

import pytest

import blkloom
from async_target import PATIENCE, Asynchronous, Calls, Gate, LoadedAsynchronous, table, until_faults
from blkloom.errors import DrainError
from blkloom.table import parse_table
from blkloom.targets.coroutines import in_thread
from blkloom.targets.registry import all_targets
from blkloom.targets.zero import Zero
from blkloom.units import Bytes, Sectors
from longer_times import in_time, needs, with_longer_times


def first_at(gate: Gate, operation: str) -> Callable[[str, int], Any]:
    """What has the first of an operation wait at a gate, and no other."""
    waiting = [operation]

    async def act(operation: str, offset: int) -> None:
        if operation in waiting:
            waiting.remove(operation)
            await gate.wait()

    return act


def reads_at(gate: Gate) -> Callable[[str, int], Any]:
    """What has all reads wait at a gate."""

    async def act(operation: str, offset: int) -> None:
        if operation == "read":
            await gate.wait()

    return act


def change(device: blkloom.Device, operation: str) -> Callable[[], Any]:
    return {
        "read": lambda: device.pread(512, 0),
        "extents": lambda: device.extents(0, 1024),
        "write": lambda: device.pwrite(b"w" * 512, 0),
        "discard": lambda: device.discard(0, 512),
        "write_zeroes": lambda: device.write_zeroes(0, 512),
        "flush": device.flush,
    }[operation]


@pytest.mark.parametrize("operation", ["read", "extents"])
def test_a_suspend_cancels_what_changes_nothing_and_it_is_asked_for_again(operation: str) -> None:
    gate = Gate()
    log: list[tuple[Any, ...]] = []
    with Calls() as call, blkloom.Device(table(Asynchronous(log, first_at(gate, operation)))) as device:
        request = call(change(device, operation))
        gate.until_arrived()
        device.suspend()
        assert gate.cancelled == 1
        assert not request.done()
        device.resume()
        assert request.result(PATIENCE) in (b"r" * 512, [(0, 512, 3), (512, 512, 0)])
        met = list(log)
    assert [entry[0] for entry in met if entry[0] != "flush"] == [operation] * 2


@pytest.mark.parametrize("operation", ["write", "discard", "write_zeroes", "flush"])
def test_a_suspend_waits_for_what_changes_something(operation: str) -> None:
    gate = Gate()
    log: list[tuple[Any, ...]] = []
    with Calls() as call, blkloom.Device(table(Asynchronous(log, first_at(gate, operation)))) as device:
        request = call(change(device, operation))
        gate.until_arrived()
        with pytest.raises(DrainError):
            device.suspend(timeout=0.05)
        assert not device.suspended
        suspend = call(device.suspend)
        while not device.suspended:
            time.sleep(0.001)
        assert not request.done()
        gate.open()
        suspend.result(PATIENCE)
        request.result(PATIENCE)
        assert gate.cancelled == 0
        device.resume()
    assert [entry[0] for entry in log].count(operation) == (
        1 if operation != "flush" else [entry[0] for entry in log].count("flush")
    )


@pytest.mark.parametrize("which", ["top", "middle", "below"])
def test_a_suspend_of_a_device_above_cancels_what_it_waits_for_and_nothing_else(which: str) -> None:
    gate = Gate()
    log: list[tuple[Any, ...]] = []
    targets = all_targets()
    with Calls() as call, blkloom.Device(table(Asynchronous(log, reads_at(gate))), name="below") as below:
        devices = {"below": below}
        for name, lower in (("middle", "below"), ("top", "middle")):
            text = parse_table(f"0 8 linear blkloom:{lower} 0", targets=targets)
            devices[name] = blkloom.Device(text, name=name, devices=devices)
        through = call(devices["top"].pread, 512, 0)
        gate.until_arrived()
        beside = call(below.pread, 512, 512)
        gate.until_arrived(2)
        suspend = call(devices[which].suspend)
        gate.until_cancelled(1 if which != "below" else 2)
        gate.until_arrived(2)
        gate.open()
        suspend.result(PATIENCE)
        if which != "below":
            assert beside.result(PATIENCE) == b"r" * 512
            assert gate.cancelled == 1
        assert not through.done()
        devices[which].resume()
        assert through.result(PATIENCE) == b"r" * 512
        assert beside.result(PATIENCE) == b"r" * 512
        for name in ("top", "middle"):
            devices[name].close()


def test_requests_beyond_the_bound_wait_at_the_gate_too_when_the_device_is_suspended() -> None:
    class One(LoadedAsynchronous):
        most_in_flight = 1

    gate = Gate()
    with Calls() as call, blkloom.Device(table(Asynchronous([], reads_at(gate), One))) as device:
        reads = [call(device.pread, 512, 512 * number) for number in range(8)]
        until_faults(device, 8)
        device.suspend()
        gate.open()
        device.resume()
        assert [read.result(PATIENCE) for read in reads] == [b"r" * 512] * 8


def test_a_read_stays_interrupted_through_a_swap_and_the_new_table_answers() -> None:
    gate = Gate()
    with Calls() as call, blkloom.Device(table(Asynchronous([], reads_at(gate)))) as device:
        read = call(device.pread, 512, 0)
        gate.until_arrived()
        device.load(table(Zero()))
        device.resume()
        assert read.result(PATIENCE) == bytes(512)


def test_many_suspends_fail_no_read() -> None:
    async def act(operation: str, offset: int) -> None:
        await asyncio.sleep(0.002)

    stop = threading.Event()
    with Calls() as call, blkloom.Device(table(Asynchronous([], act), sectors=128)) as device:

        def read(begun: threading.Event) -> None:
            while not stop.is_set():
                assert set(device.batch([("r", bytearray(512), 512 * number) for number in range(64)])) == {512}
                begun.set()

        begun = [threading.Event() for _ in range(3)]
        readers = [call(read, event) for event in begun]
        assert all(event.wait(PATIENCE) for event in begun)
        for _ in range(50):
            device.suspend()
            device.resume()
        stop.set()
        for reader in readers:
            reader.result(PATIENCE)


def test_a_close_fails_what_is_unfinished() -> None:
    gate = Gate()
    with Calls() as call:
        device = blkloom.Device(table(Asynchronous([], reads_at(gate))))
        read = call(device.pread, 512, 0)
        gate.until_arrived()
        device.close()
        with pytest.raises(OSError, match=rf"\[Errno {errno.ESHUTDOWN}\]"):
            read.result(PATIENCE)
    assert gate.cancelled == 1


@pytest.mark.parametrize("operation", ["read", "write", "flush", "extents"])
@with_longer_times(0.2, 2, 20)
def test_a_coroutine_whose_time_is_over_is_cancelled(operation: str, seconds: float) -> None:
    gate = Gate()
    device = blkloom.Device(table(Asynchronous([], first_at(gate, operation)), Zero()), fault_timeout=seconds)
    with device:
        with pytest.raises(OSError, match=rf"\[Errno {errno.ETIMEDOUT}\]"):
            change(device, operation)()
        needs(gate.arrived == 1, "no handler was begun")
        gate.until_cancelled()
        assert device.pread(512, 4096) == bytes(512)
        with in_time():
            change(device, operation)()


class OneAtATime(LoadedAsynchronous):
    """Its first write ends, once cancelled, when the test says; the others at once."""

    most_in_flight = 1
    first = Gate()
    others_failed = Gate()

    async def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
        self.log.append(("write", offset))
        if len(self.log) > 1:
            return
        try:
            await self.first.wait()
        finally:
            await self.others_failed.wait()


@with_longer_times(0.2, 2, 20)
def test_requests_whose_time_is_over_before_there_is_room_are_never_begun(seconds: float) -> None:
    target = Asynchronous([], kind=OneAtATime)
    first_write, others_failed = OneAtATime.first, OneAtATime.others_failed = Gate(), Gate()
    with Calls() as call, blkloom.Device(table(target), fault_timeout=seconds) as device:
        writes = [call(device.pwrite, bytes([number]) * 512, 512 * number) for number in range(4)]
        until_faults(device, 4)
        still_ran = not first_write.cancelled
        wait(writes, PATIENCE, FIRST_COMPLETED)
        came_in_time = still_ran and first_write.arrived == 1
        if came_in_time:
            first = writes.pop(target.log[0][1] // 512)
            failed = [write.exception(PATIENCE) for write in writes]
        others_failed.open()
        needs(came_in_time, "the first of four writes did not still run when the last came")
        failed.append(first.exception(PATIENCE))
        with in_time():
            device.pwrite(b"w" * 512, 0)
        met = list(target.log)
    assert [getattr(error, "errno", error) for error in failed] == [errno.ETIMEDOUT] * 4
    assert len([entry for entry in met if entry[0] == "write"]) == 2


class Stubborn(LoadedAsynchronous):
    """Its reads cannot be cancelled; they end when the test says."""

    async def read(self, offset: Bytes, length: Bytes) -> bytes:
        self.log.append(("read", offset))
        while True:
            try:
                await self.act("read", offset)
            except asyncio.CancelledError:
                self.log.append(("cancelled", offset))
            else:
                return b"r" * length


@with_longer_times(0.2, 2, 20)
def test_a_coroutine_that_cannot_be_cancelled_is_never_resumed_and_holds_nothing_up(
    caplog: pytest.LogCaptureFixture, seconds: float
) -> None:
    gate = Gate()
    log: list[tuple[Any, ...]] = []
    with blkloom.Device(table(Asynchronous(log, reads_at(gate), Stubborn), Zero()), fault_timeout=seconds) as device:
        with pytest.raises(OSError, match=rf"\[Errno {errno.ETIMEDOUT}\]"):
            device.pread(512, 0)
        needs(gate.arrived > 0, "no handler was begun")
        device.suspend()  # waits until it has been given up
        assert f"did not end within {seconds} s of being cancelled" in caplog.text
        met = list(log)
        needs(("cancelled", 0) in met, "the handler was closed before it was cancelled")
        gate.open()
        device.resume()
        assert device.pread(512, 4096) == bytes(512)
        with in_time():
            assert device.pread(512, 512) == b"r" * 512
    assert met[:2] == [("read", 0), ("cancelled", 0)]
    assert ("read", 512) in log


def test_a_suspend_that_will_not_wait_so_long_says_that_a_target_holds_it_up() -> None:
    gate = Gate()
    with Calls() as call, blkloom.Device(table(Asynchronous([], reads_at(gate), Stubborn))) as device:
        read = call(device.pread, 512, 0)
        gate.until_arrived()
        with pytest.raises(DrainError, match="a target does"):
            device.suspend(timeout=0.05)
        gate.open()
        assert read.result(PATIENCE) == b"r" * 512


def test_a_close_ends_a_coroutine_that_cannot_be_cancelled(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blkloom.device.mapper.CANCEL_SECONDS", 0.05)
    gate = Gate()
    log: list[tuple[Any, ...]] = []
    with Calls() as call:
        device = blkloom.Device(table(Asynchronous(log, reads_at(gate), Stubborn)))
        read = call(device.pread, 512, 0)
        gate.until_arrived()
        device.close()
        with pytest.raises(OSError, match=rf"\[Errno {errno.ESHUTDOWN}\]"):
            read.result(PATIENCE)
    assert "did not end within 0.05 s" in caplog.text
    assert log[-1] == ("close",), "its files are closed all the same"


@with_longer_times(0.2, 2, 20)
def test_a_message_has_the_time_of_a_fault(seconds: float) -> None:
    gate = Gate()

    async def act(operation: str, offset: int) -> None:
        if operation == "message":
            await gate.wait()

    with blkloom.Device(table(Asynchronous([], act)), fault_timeout=seconds) as device:
        with pytest.raises(TimeoutError):
            device.message(Sectors(0), ["slow"])
        needs(gate.arrived == 1, "no handler was begun")
        assert gate.cancelled == 1
        gate.open()
        with in_time():
            assert device.message(Sectors(0), ["fast"]) == "fast"


def test_what_a_coroutine_raises_at_a_message_goes_to_the_caller() -> None:
    async def act(operation: str, offset: int) -> None:
        if operation == "message":
            raise LookupError("no such thing")

    with blkloom.Device(table(Asynchronous([], act))) as device, pytest.raises(LookupError, match="no such thing"):
        device.message(Sectors(0), ["what"])


def test_a_call_in_a_thread_has_ended_when_its_coroutine_was_cancelled() -> None:
    entered, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def call_that_blocks() -> bytes:
        entered.set()
        assert go_on.wait(PATIENCE)
        order.append("the call")
        return b"r" * 512

    async def act(operation: str, offset: int) -> bytes | None:
        return await in_thread(call_that_blocks) if operation == "read" else None

    with Calls() as call, blkloom.Device(table(Asynchronous([], act))) as device:
        read = call(device.pread, 512, 0)
        assert entered.wait(PATIENCE)

        def suspend() -> None:
            device.suspend()
            order.append("the suspend")

        suspended = call(suspend)
        while not device.suspended:
            time.sleep(0.001)
        go_on.set()
        suspended.result(PATIENCE)
        device.resume()
        assert read.result(PATIENCE) == b"r" * 512
    assert order == ["the call", "the suspend", "the call"]


def test_what_a_call_in_a_thread_raises_is_what_the_coroutine_raises() -> None:
    def fails() -> None:
        raise FileNotFoundError(errno.ENOENT, "gone")

    async def act(operation: str, offset: int) -> None:
        if operation == "read":
            await in_thread(fails)

    with (
        blkloom.Device(table(Asynchronous([], act))) as device,
        pytest.raises(OSError, match=rf"\[Errno {errno.ENOENT}\]"),
    ):
        device.pread(512, 0)
