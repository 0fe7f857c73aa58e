"""The log of written pages during a live migration, against a slow model and against the memory itself."""

from __future__ import annotations

import errno
import os
import random
import select
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import blkloom
from blkloom import Device
from vhost_user_driver import (
    DISCARD,
    F_LOG,
    FLUSH,
    GUEST,
    IDENTIFY,
    READ,
    SECTOR,
    USER,
    WRITE,
    WRITE_ZEROES,
    FrontEndError,
    Machine,
    shared_memory,
)
from vhost_user_served import VhostUserServed

PAGE = 4096
SECTORS = 4096
RINGS = 64 << 10
"""Bytes for rings and headers of a queue of `Machine`."""
FAILS = SECTORS - 512
"""The first sector that cannot be read."""
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """A raw device, a part of which fails."""
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(FAILS * SECTOR))
    with blkloom.open(f"0 {FAILS} loop {path}\n{FAILS} 512 error\n") as device:
        yield device


@pytest.fixture
def served(tmp_path: Path, device: Device) -> Iterator[VhostUserServed]:
    """It is served."""
    with VhostUserServed(tmp_path / "socket", device) as served:
        yield served


def _pages(at: int, length: int) -> set[int]:
    return set(range(at // PAGE, (at + length - 1) // PAGE + 1)) if length else set()


def _changed(machine: Machine, before: bytes) -> set[int]:
    after = memoryview(machine.memory[:])
    pages = range(0, len(after), PAGE)
    return {at // PAGE for at in pages if before[at : at + PAGE] != after[at : at + PAGE]}


class Load:
    """Random requests, and what the specification says about the pages that each of them writes."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self.machine = machine
        self._chosen = random.Random(seed)

    def request(self) -> tuple[set[int], set[int]]:
        """Executes one. Returns the pages that it must write, and those that it may write besides."""
        index = self._chosen.randrange(len(self.machine.queues))
        queue, chosen = self.machine.queues[index], self._chosen
        kind = chosen.choice([READ, READ, READ, WRITE, FLUSH, IDENTIFY, DISCARD, WRITE_ZEROES, 99])
        length = {READ: SECTOR * chosen.randrange(40), IDENTIFY: chosen.choice([20, 32, 9000])}.get(kind, 0)
        sector = chosen.choice([chosen.randrange(FAILS - 40), chosen.randrange(FAILS, SECTORS + 40)])
        data = b""
        if kind == WRITE:
            data = chosen.randbytes(SECTOR)
        elif kind in {DISCARD, WRITE_ZEROES}:
            data = struct.pack("<QII", sector, 8, 0)
        slot = queue.submit(kind, sector, length, data)
        found, status, written = queue.wait()
        assert found == slot
        must = _pages(queue.used, 6 + 8 * queue.size) | _pages(queue.headers + slot * 32 + 16, 1)
        # A queue that falls asleep says in its used ring when it is to be woken.
        may = {page for other in self.machine.queues for page in _pages(other.used, 6 + 8 * other.size)}
        data_pages = _pages(queue.data_at(slot), length if kind == READ else min(length, 20))
        if status == 0 and kind in {READ, IDENTIFY}:
            assert written > min(length, 20)
            return must | data_pages, may
        return must, may | data_pages if kind == READ and sector + length // SECTOR <= SECTORS else may


@pytest.mark.parametrize("seed", range(2))
def test_the_pages_in_the_log_are_those_that_were_written(served: VhostUserServed, seed: int) -> None:
    with Machine.connected(served.path, queues=2) as machine:
        load = Load(machine, seed)
        for _ in range(10):
            load.request()
        machine.set_log()
        machine.keep_log(on=True)
        load.request()
        machine.take_log()
        for count in range(60):
            if count % 20 == 19:
                served.hand_over()
                machine.write(0, bytes(PAGE))
                machine.take_log()
            before = machine.memory[:]
            must, may = load.request()
            marked = machine.take_log()
            assert must <= marked <= must | may, f"request {count}"
            own = {page for queue in machine.queues for page in _pages(queue.descriptors, RINGS)}
            # The driver itself writes rings, headers and the data of writes.
            written = _changed(machine, before) - marked - own
            slots = {
                page for queue in machine.queues for slot in range(8) for page in _pages(queue.data_at(slot), PAGE)
            }
            assert written <= slots, f"request {count}"


def test_marks_begin_and_end_with_the_migration(served: VhostUserServed) -> None:
    with Machine.connected(served.path) as machine:
        machine.set_log()
        machine.read(0, PAGE)
        assert machine.take_log() == set(), "a log that nothing is marked in yet"
        machine.keep_log(on=True, rings=False)
        queue = machine.queues[0]
        slot = queue.submit(READ, 0, PAGE)
        queue.wait()
        assert machine.take_log() == _pages(queue.data_at(slot), PAGE) | _pages(queue.headers + slot * 32 + 16, 1)
        machine.keep_log(on=False)
        machine.read(0, PAGE)
        assert machine.take_log() == set()


def test_the_front_end_is_told_of_marks(served: VhostUserServed) -> None:
    event = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        with Machine.connected(served.path) as machine:
            machine.control.tell(7, b"", [event])
            machine.set_log()
            machine.keep_log(on=True)
            for _ in range(2):
                with suppress(BlockingIOError):
                    os.set_blocking(event, False)
                    os.eventfd_read(event)
                machine.read(0, PAGE)
                assert select.select([event], [], [], 60)[0]
                served.hand_over()
    finally:
        os.close(event)


def test_a_larger_log_takes_the_place_of_a_log(served: VhostUserServed) -> None:
    with Machine.connected(served.path) as machine:
        machine.set_log()
        machine.keep_log(on=True)
        machine.read(0, PAGE)
        assert machine.take_log()
        machine.set_log()
        machine.read(0, PAGE)
        assert machine.take_log()


def test_nothing_is_written_before_there_is_a_log(served: VhostUserServed) -> None:
    with Machine.connected(served.path) as machine:
        machine.set_log()
        machine.keep_log(on=True)
        machine.read(0, PAGE)
        base = machine.stop()
        machine.take_log()
        # The front-end starts again during the migration: the former log is not used any more.
        queue = machine.queues[0]
        machine.control.tell(10, struct.pack("=II", 0, base))
        machine.control.tell(12, struct.pack("=Q", 0), [queue.kick])
        slot = queue.submit(READ, 0, PAGE)
        with pytest.raises(TimeoutError):
            queue.wait(0.2)
        assert machine.take_log() == set()
        machine.set_log()
        assert queue.wait()[:2] == (slot, 0)
        assert _pages(queue.data_at(slot), PAGE) <= machine.take_log()


def test_a_stopped_queue_is_flushed_during_a_migration(served: VhostUserServed, device: Device) -> None:
    def flushes() -> int:
        count: int = device.stats()["flush"]["count"]
        return count

    with Machine.connected(served.path) as machine:
        machine.write(0, bytes(PAGE))
        before = flushes()
        base = machine.stop()
        assert flushes() == before
        machine.control.tell(10, struct.pack("=II", 0, base))
        machine.control.tell(12, struct.pack("=Q", 0), [machine.queues[0].kick])
        machine.set_log()
        machine.keep_log(on=True)
        machine.write(0, bytes(PAGE))
        machine.stop()
        assert flushes() == before + 1


def test_a_disk_that_another_host_cannot_continue_with_keeps_no_log(tmp_path: Path) -> None:
    with (
        blkloom.open("0 2048 ram") as device,
        VhostUserServed(tmp_path / "socket", device) as served,
        Machine.connected(served.path) as machine,
    ):
        assert not machine.control.number(1) & F_LOG
        machine.set_log()
        with pytest.raises(FrontEndError):
            machine.keep_log(on=True)
        machine.read(0, PAGE)
        assert machine.take_log() == set()


def _send_log(machine: Machine, size: int, offset: int, files: list[int]) -> None:
    machine.control.send(6, struct.pack("=QQ", size, offset), files)


@pytest.mark.parametrize(
    ("size", "offset", "reason"),
    [
        (1 << 40, 0, "it ends at"),
        (0, 0, "no range"),
        (PAGE, 1, "cannot be used"),
        (PAGE, (1 << 64) - 1, "cannot be used"),
        (PAGE, PAGE, "does not cover"),
    ],
)
def test_a_log_that_cannot_be_used_is_refused(
    served: VhostUserServed, caplog: pytest.LogCaptureFixture, size: int, offset: int, reason: str
) -> None:
    with Machine.connected(served.path) as machine:
        machine.set_log()
        machine.keep_log(on=True)
        file = shared_memory(4 * PAGE)
        _send_log(machine, size, offset, [file])
        os.close(file)
        with suppress(ConnectionResetError):
            assert machine.control.socket.recv(100) == b""
    with Machine.connected(served.path) as machine:
        assert len(machine.read(0, PAGE)) == PAGE
    assert reason in caplog.text


@pytest.mark.parametrize("log", [(1 << 64) - 8, (1 << 64) - 1, GUEST * 8])
def test_a_used_ring_that_the_log_does_not_have_is_refused(
    served: VhostUserServed, caplog: pytest.LogCaptureFixture, log: int
) -> None:
    with Machine.connected(served.path) as machine:
        machine.set_log()
        machine.keep_log(on=True)
        queue = machine.queues[0]
        places = (USER + queue.descriptors, USER + queue.used, USER + queue.available, log)
        with pytest.raises(FrontEndError):
            machine.control.tell(9, struct.pack("=IIQQQQ", 0, 1, *places))
    assert "does not cover" in caplog.text


def test_a_log_may_be_taken_and_changed_at_any_time(served: VhostUserServed) -> None:
    """Its contents are the front-end's."""
    with Machine.connected(served.path) as machine:
        machine.set_log()
        machine.keep_log(on=True)
        log = machine._log
        assert log is not None
        for byte in (0xFF, 0, 0x55):
            log[:] = bytes([byte]) * len(log)
            machine.write(0, bytes([byte]) * PAGE)
            assert machine.read(0, PAGE) == bytes([byte]) * PAGE
        with pytest.raises(OSError, match="status 1") as caught:
            machine.request(READ, SECTORS, PAGE)
        assert caught.value.errno == errno.EIO
