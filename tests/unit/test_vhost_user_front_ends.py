"""Front-ends that break the protocol, and what they may change at any time."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import blkloom
from blkloom import Extent, LoadContext, LoadedTarget, TargetSpec, _engine
from blkloom.export import limited_log
from blkloom.export.vhost_user.connection import Connection
from blkloom.peer_credentials import PeerCredentials
from blkloom.units import Bytes, Sectors
from vhost_user_driver import (
    GUEST,
    READ,
    USER,
    WRITE,
    FrontEnd,
    FrontEndError,
    Machine,
    Queue,
    shared_memory,
)
from vhost_user_served import VhostUserServed

SECTORS = 2048
BLOCK = 4096
pytestmark = pytest.mark.timeout(120)
Send = Callable[[Machine], None]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VhostUserServed]:
    """A device in memory, for front-ends of other users."""
    monkeypatch.setattr(PeerCredentials, "may_command", property(lambda _: False))
    with blkloom.open(f"0 {SECTORS} ram") as device, VhostUserServed(tmp_path / "socket", device) as served:
        yield served


def _u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def _regions(*regions: tuple[int, int, int, int]) -> bytes:
    return struct.pack("=II", len(regions), 0) + b"".join(struct.pack("=QQQQ", *region) for region in regions)


def _with_file(send: Callable[[Machine, int], None], make: Callable[[], int]) -> Send:
    def sent(machine: Machine) -> None:
        file = make()
        try:
            send(machine, file)
        finally:
            os.close(file)

    return sent


BROKEN: dict[str, tuple[Send, str]] = {
    "no request": (lambda machine: machine.control.send(5000), "request 5000 is not known"),
    "an answer": (lambda machine: machine.control.send(1, flags=5), "flags 0x5"),
    "long": (lambda machine: machine.control.socket.sendall(struct.pack("=III", 5, 1, 1 << 30)), "bytes for request 5"),
    "short": (lambda machine: machine.control.send(8, b"1234"), "4 bytes in place of 8"),
    "features": (lambda machine: machine.control.send(2, _u64(1 << 27)), "0x8000000 were not offered"),
    "protocol features": (lambda machine: machine.control.send(16, _u64(1 << 63)), "were not offered"),
    "a vring": (lambda machine: machine.control.send(8, struct.pack("=II", 64, 64)), "vring 64"),
    "a size": (lambda machine: machine.control.send(8, struct.pack("=II", 0, 48)), "48 descriptors"),
    "a large size": (lambda machine: machine.control.send(8, struct.pack("=II", 0, 2048)), "2048 descriptors"),
    "no eventfd": (lambda machine: machine.control.send(12, _u64(0x100)), "without an eventfd"),
    "no descriptor": (lambda machine: machine.control.send(12, _u64(0)), "0 descriptors"),
    "two descriptors": (
        lambda machine: machine.control.send(12, _u64(0), [machine.queues[0].kick, machine.queues[0].call]),
        "2 descriptors",
    ),
    "many descriptors": (
        lambda machine: machine.control.send(12, _u64(0), [machine.queues[0].kick] * 30),
        "more than 8 descriptors",
    ),
    "a pipe for kicks": (
        _with_file(lambda machine, file: machine.control.send(12, _u64(0), [file]), lambda: os.open("/dev/null", 2)),
        "is no eventfd",
    ),
    "a file for calls": (
        _with_file(lambda machine, file: machine.control.send(13, _u64(0), [file]), lambda: os.open("/dev/zero", 2)),
        "is no eventfd",
    ),
    "a file for requests": (
        _with_file(lambda machine, file: machine.control.send(21, b"", [file]), lambda: os.open("/dev/null", 2)),
        "is no socket",
    ),
    "memory that can shrink": (
        _with_file(
            lambda machine, file: machine.control.send(5, _regions((GUEST, 4096, USER, 0)), [file]),
            lambda: shared_memory(4096, sealed=False),
        ),
        "can shrink",
    ),
    "memory of a device": (
        _with_file(
            lambda machine, file: machine.control.send(5, _regions((GUEST, 4096, USER, 0)), [file]),
            lambda: os.open("/dev/zero", os.O_RDWR),
        ),
        "can shrink",
    ),
    "memory past its end": (
        lambda machine: machine.control.send(5, _regions((GUEST, machine.length + 1, USER, 0)), [machine.file]),
        "it ends at",
    ),
    "memory without end": (
        lambda machine: machine.control.send(5, _regions(((1 << 64) - 1, 4096, USER, 0)), [machine.file]),
        "are no range",
    ),
    "memory twice": (
        lambda machine: machine.control.send(
            5, _regions((GUEST, 8192, USER, 0), (GUEST + 4096, 4096, USER, 0)), [machine.file] * 2
        ),
        "two regions",
    ),
    "memory without a file": (lambda machine: machine.control.send(5, _regions((GUEST, 1, USER, 0))), "0 descriptors"),
    "many regions": (lambda machine: machine.control.send(5, struct.pack("=II", 9, 0)), "9 regions"),
    "inflight": (
        lambda machine: machine.control.send(32, struct.pack("=QQHHI", 1 << 40, 0, 1, 64, 0), [machine.file]),
        "requests in flight cannot be used",
    ),
    "small inflight": (
        lambda machine: machine.control.send(32, struct.pack("=QQHHI", 64, 0, 1, 64, 0), [machine.file]),
        "for requests in flight, of 64",
    ),
    "many in flight": (
        lambda machine: machine.control.send(31, struct.pack("=QQHHI", 0, 0, 1000, 64, 0)),
        "1000 queues of 64",
    ),
    "a log without memory": (
        lambda machine: machine.control.send(6, struct.pack("=QQ", 4096, 0)),
        "0 descriptors",
    ),
    "a log that can shrink": (
        _with_file(
            lambda machine, file: machine.control.send(6, struct.pack("=QQ", 4096, 0), [file]),
            lambda: shared_memory(4096, sealed=False),
        ),
        "can shrink",
    ),
    "a log that is a device": (
        _with_file(
            lambda machine, file: machine.control.send(6, struct.pack("=QQ", 4096, 0), [file]),
            lambda: os.open("/dev/zero", os.O_RDWR),
        ),
        "can shrink",
    ),
    "a file for the log's event": (
        _with_file(lambda machine, file: machine.control.send(7, b"", [file]), lambda: os.open("/dev/null", 2)),
        "is no eventfd",
    ),
    "a log of a disk in memory": (
        lambda machine: machine.control.send(2, _u64(1 << 26)),
        "0x4000000 were not offered",
    ),
    "a ring elsewhere": (
        lambda machine: machine.control.send(9, struct.pack("=IIQQQQ", 0, 0, 16, USER, USER, 0)),
        "a ring of 1024 bytes at 0x10",
    ),
    "configuration": (
        lambda machine: machine.control.send(25, struct.pack("=III", 0, 1, 0) + b"\0"),
        "only the write cache can be changed",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_front_end_that_breaks_the_protocol_is_disconnected(
    served: VhostUserServed, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    send, reason = BROKEN[what]
    with Machine.connected(served.path) as machine:
        machine.write(0, b"b" * BLOCK)
        send(machine)
        with suppress(ConnectionResetError):  # the rest of the message was not received
            while machine.control.socket.recv(4096):
                pass
    with Machine.connected(served.path) as machine:
        assert machine.read(0, BLOCK) == b"b" * BLOCK
    assert reason in caplog.text


def test_a_front_end_of_the_same_user_may_share_any_memory(tmp_path: Path) -> None:
    with (
        blkloom.open(f"0 {SECTORS} ram") as device,
        VhostUserServed(tmp_path / "socket", device) as served,
        Machine.connected(served.path) as machine,
    ):
        file = shared_memory(machine.length, sealed=False)
        os.pwrite(file, machine.memory[:], 0)
        machine.control.tell(5, _regions((GUEST, machine.length, USER, 0)), [file])
        # The machine has another memory from now on.
        machine.memory.close()
        os.close(machine.file)
        machine.file, machine.memory = file, mmap.mmap(file, machine.length)
        for queue in machine.queues:
            queue.memory = machine.memory
        machine.write(0, b"m" * BLOCK)
        assert machine.read(0, BLOCK) == b"m" * BLOCK


def test_regions_of_memory_are_added_and_removed_one_by_one(
    served: VhostUserServed, caplog: pytest.LogCaptureFixture
) -> None:
    with Machine.connected(served.path) as machine:
        half = machine.length // 2
        assert machine.control.number(36) == 64

        def single(guest: int, size: int, user: int, offset: int) -> bytes:
            return struct.pack("=QQQQQ", 0, guest, size, user, offset)

        machine.control.tell(38, single(GUEST, machine.length, USER, 0))
        for start in (0, half):
            machine.control.tell(37, single(GUEST + start, half, USER + start, start), [machine.file])
        machine.write(0, b"1" * BLOCK)
        with pytest.raises(FrontEndError, match="message 37"):
            machine.control.tell(37, single(GUEST, half, USER, 0), [machine.file])
        with pytest.raises(FrontEndError, match="message 38"):
            machine.control.tell(38, single(GUEST + 1, half, USER, 0))
        assert machine.read(0, BLOCK) == b"1" * BLOCK
        served.hand_over()
        assert machine.read(0, BLOCK) == b"1" * BLOCK
        machine.control.tell(38, single(GUEST + half, half, USER + half, half))
        machine.queues[0].submit(READ, 0, BLOCK)  # its data is in the other half
        assert machine.queues[0].wait()[1] == 1
    assert "two regions have the guest address" in caplog.text


def test_a_refused_message_is_acknowledged_as_such(served: VhostUserServed, caplog: pytest.LogCaptureFixture) -> None:
    with Machine.connected(served.path) as machine:
        with pytest.raises(FrontEndError, match="message 8 was refused"):
            machine.control.tell(8, struct.pack("=II", 0, 3))
        machine.write(0, b"a" * BLOCK)
    assert "SET_VRING_NUM of the front-end is refused: a queue of 3 descriptors" in caplog.text


def test_a_part_of_the_configuration_that_does_not_exist_is_empty(served: VhostUserServed) -> None:
    with Machine.connected(served.path) as machine:
        assert len(machine.configuration(0, 256)) == 256
        payload, _ = machine.control.ask(24, struct.pack("=III", 200, 57, 0) + bytes(57))
        assert payload == b""
        payload, _ = machine.control.ask(24, struct.pack("=III", 0xFFFF_FFFF, 0xFFFF_FFFF, 0))
        assert payload == b""


def test_a_message_may_come_in_parts(served: VhostUserServed) -> None:
    with Machine.connected(served.path) as machine:
        message = struct.pack("=III", 17, 1, 0)
        for byte in message:
            machine.control.socket.sendall(bytes([byte]))
        assert machine.control.answer(17)[0] == _u64(64)


def test_a_front_end_without_the_features_of_the_protocol_is_served(served: VhostUserServed) -> None:
    with Machine(wanted=0) as machine:
        machine.control = control = FrontEnd(served.path)
        control.tell(2, _u64(1 << 32))
        control.tell(5, _regions((GUEST, machine.length, USER, 0)), [machine.file])
        queue = machine.queues[0]
        control.tell(8, struct.pack("=II", 0, machine.size))
        places = (USER + queue.descriptors, USER + queue.used, USER + queue.available, 0)
        control.tell(9, struct.pack("=IIQQQQ", 0, 0, *places))
        control.tell(13, _u64(0), [queue.call])
        control.tell(12, _u64(0), [queue.kick])
        machine.write(0, b"o" * BLOCK)
        assert machine.read(0, BLOCK) == b"o" * BLOCK
        assert machine.stop() == 2
        queue.submit(READ, 0, BLOCK)
        with pytest.raises(TimeoutError):
            queue.wait(0.1)
        # Again with rings that begin anew, as after a reset of the driver.
        machine.memory[queue.used : queue.used + 4] = bytes(4)
        machine.memory[queue.available : queue.available + 4] = bytes(4)
        queue.next = queue.seen = 0
        queue.free = list(range(machine.SLOTS))
        control.tell(10, struct.pack("=II", 0, 0))
        control.tell(12, _u64(0), [queue.kick])
        assert machine.read(0, BLOCK) == b"o" * BLOCK


def test_memory_and_eventfds_may_change_while_requests_are_served(served: VhostUserServed) -> None:
    with Machine.connected(served.path) as machine:
        queue = machine.queues[0]
        for _ in range(20):
            slot = queue.submit(WRITE, 0, 0, b"c" * BLOCK)
            regions = _regions((GUEST, machine.length, USER, 0))
            machine.control.tell(5, regions, [machine.file])
            os.close(queue.call)
            queue.call = os.eventfd(0, os.EFD_NONBLOCK)
            machine.control.tell(13, _u64(0), [queue.call])
            assert queue.wait()[:2] == (slot, 0)


def test_eventfds_stay_as_the_front_end_made_them(served: VhostUserServed) -> None:
    with Machine.connected(served.path) as machine:
        queue = machine.queues[0]
        for event in (queue.kick, queue.call, queue.error):
            os.set_blocking(event, True)
        machine.control.tell(13, _u64(0), [queue.call])
        machine.control.tell(14, _u64(0), [queue.error])
        machine.control.tell(12, _u64(0), [queue.kick])
        machine.write(0, b"e" * BLOCK)
        assert all(os.get_blocking(event) for event in (queue.kick, queue.call, queue.error))
        # One that is full is readable, and nothing waits until it is read.
        os.set_blocking(queue.call, False)
        with suppress(BlockingIOError):
            os.eventfd_read(queue.call)
        os.eventfd_write(queue.call, 2**64 - 2)
        os.set_blocking(queue.call, True)
        slot = queue.submit(READ, 0, BLOCK)
        while queue._half(queue.used + 2) == queue.seen:
            pass
        assert queue.wait()[:2] == (slot, 0)


def test_a_disabled_queue_is_not_served(served: VhostUserServed) -> None:
    with Machine.connected(served.path, queues=2) as machine:
        machine.control.tell(18, struct.pack("=II", 1, 0))
        machine.queues[1].submit(READ, 0, BLOCK)
        with pytest.raises(TimeoutError):
            machine.queues[1].wait(0.1)
        machine.write(0, b"d" * BLOCK)
        machine.control.tell(18, struct.pack("=II", 1, 1))
        slot, status, _ = machine.queues[1].wait()
        assert status == 0
        assert machine.queues[1].data_of(slot, BLOCK) == b"d" * BLOCK


def _break(queue: Queue) -> None:
    """As a driver that makes too many requests available."""
    queue._put_half(queue.available + 2, 1000)
    os.eventfd_write(queue.kick, 1)


def _was_told(queue: Queue) -> bool:
    return bool(select.select([queue.error], [], [], 60)[0])


def test_the_driver_of_a_broken_queue_is_told_and_may_start_it_again(
    served: VhostUserServed, caplog: pytest.LogCaptureFixture
) -> None:
    with Machine.connected(served.path, queues=2) as machine:
        queue = machine.queues[0]
        machine.write(0, b"q" * BLOCK)
        _break(queue)
        assert _was_told(queue)
        machine.write(0, b"q" * BLOCK, queue=1)
        queue._put_half(queue.available + 2, queue.next)
        assert machine.stop() == queue.next, "it goes on behind what it has served"
        machine.control.tell(10, struct.pack("=II", 0, queue.next))
        machine.control.tell(12, _u64(0), [queue.kick])
        assert machine.read(0, BLOCK) == b"q" * BLOCK
    assert "the available index 1000" in caplog.text


def test_a_broken_queue_stays_so_over_a_hand_over_and_the_others_go_on(
    served: VhostUserServed, caplog: pytest.LogCaptureFixture
) -> None:
    with Machine.connected(served.path, queues=3) as machine:
        first, second = machine.queues[:2]
        _break(first)
        assert _was_told(first)
        os.eventfd_read(first.error)
        # This one is broken where only the next worker looks: its used index is not that of its requests in flight.
        second._put_half(second.used + 2, 1000)
        for _ in range(2):
            served.hand_over()
            machine.write(0, b"o" * BLOCK, queue=2)
        assert _was_told(second)
        first._put_half(first.available + 2, 1)
        os.eventfd_write(first.kick, 1)
        served.hand_over()
        assert machine.read(0, BLOCK, queue=2) == b"o" * BLOCK
        assert not select.select([first.error], [], [], 0)[0]
        assert first._half(first.used + 2) == 0, "it is served no more"
        # As after a reset of the driver, with new requests in flight.
        assert machine.inflight is not None
        os.pwrite(machine.inflight[0], bytes(struct.unpack("=QQHHI", machine.inflight[1])[0]), 0)
        for index, queue in enumerate((first, second)):
            machine.stop(index)
            for at in (queue.available + 2, queue.used + 2):
                queue._put_half(at, 0)
            queue.next = queue.seen = 0
            machine.control.tell(10, struct.pack("=II", index, 0))
            machine.control.tell(12, _u64(index), [queue.kick])
            assert machine.read(0, BLOCK, queue=index) == b"o" * BLOCK
    assert caplog.text.count("a queue has ended") == 2


def test_a_virtual_machine_is_accepted_after_the_requests_of_the_one_before(served: VhostUserServed) -> None:
    with Machine.connected(served.path) as first, socket.socket(socket.AF_UNIX) as second:
        second.connect(os.fspath(served.path))
        second.sendall(struct.pack("=III", 1, 1, 0))
        second.settimeout(0.1)
        with pytest.raises(TimeoutError):
            second.recv(1)
        first.write(0, b"1" * BLOCK)
        first.hang_up()
        second.settimeout(60)
        assert len(second.recv(20)) == 20


class Held(TargetSpec):
    """Reads wait until the test lets them go on."""

    name = "held"
    began, goes_on = threading.Event(), threading.Event()

    def load(self, context: LoadContext, start: Sectors, length: Sectors) -> LoadedTarget:
        return LoadedHeld(self, [(0, length, Extent.fault())])


class LoadedHeld(LoadedTarget):
    """See `Held`."""

    def read(self, offset: Bytes, length: Bytes) -> bytes:
        Held.began.set()
        assert Held.goes_on.wait(60)
        return b"h" * length


def test_a_hand_over_that_takes_too_long_leaves_the_virtual_machine_where_it_is(tmp_path: Path) -> None:
    with (
        blkloom.open(f"0 {SECTORS} held", targets=[Held]) as device,
        VhostUserServed(tmp_path / "socket", device) as served,
        Machine.connected(served.path) as machine,
    ):
        queue = machine.queues[0]
        queue.submit(READ, 0, BLOCK)
        assert Held.began.wait(60)
        with pytest.raises(TimeoutError):
            served.run(served.server.pause(0.01))
        served.call(served.server.go_on)
        Held.goes_on.set()
        slot, status, _ = queue.wait()
        assert (status, queue.data_of(slot, BLOCK)) == (0, b"h" * BLOCK)
        assert machine.read(8 * BLOCK, BLOCK) == b"h" * BLOCK
        served.hand_over()
        assert machine.read(0, BLOCK) == b"h" * BLOCK


def _submit_and_wait_until_taken(machine: Machine) -> int:
    """A request that waits in the engine; the slot."""
    slot = machine.queues[0].submit(WRITE, 0, 0, b"w" * BLOCK)
    assert machine.inflight is not None
    while os.pread(machine.inflight[0], 1, 16 + 16 * 3 * slot) != b"\1":  # the mark of its head
        os.sched_yield()
    return slot


def _left_in_a_stop(machine: Machine, served: VhostUserServed) -> None:
    """Asks to stop a queue whose request waits, and hangs up."""
    _submit_and_wait_until_taken(machine)
    machine.control.send(11, struct.pack("=II", 0, 0))
    machine.control.send(17)  # the front-end has sent more than was handled
    while served.call(lambda: served.server._session is None or served.server._session._handled is None):
        os.sched_yield()
    machine.hang_up()


def test_a_front_end_that_leaves_while_a_stopped_queue_waits_makes_no_other_wait(tmp_path: Path) -> None:
    with (
        blkloom.open(f"0 {SECTORS} ram") as device,
        VhostUserServed(tmp_path / "socket", device) as served,
        Machine.connected(served.path) as machine,
    ):
        device.suspend()
        _left_in_a_stop(machine, served)
        with Machine.connected(served.path) as other:
            slot = other.queues[0].submit(READ, 0, BLOCK)
            with pytest.raises(TimeoutError):
                other.queues[0].wait(0.1)
            device.resume()
            assert other.queues[0].wait()[:2] == (slot, 0)
            assert other.queues[0].data_of(slot, BLOCK) == bytes(BLOCK), "a request of a machine that has left"


def test_a_stop_goes_on_with_the_next_worker(tmp_path: Path) -> None:
    with (
        blkloom.open(f"0 {SECTORS} ram") as device,
        VhostUserServed(tmp_path / "socket", device) as served,
        Machine.connected(served.path) as machine,
    ):
        device.suspend()
        slot = _submit_and_wait_until_taken(machine)
        machine.control.send(11, struct.pack("=II", 0, 0))
        served.hand_over()
        device.resume()
        assert struct.unpack("=II", machine.control.answer(11)[0]) == (0, 1)
        assert machine.queues[0].wait()[:2] == (slot, 0)


def test_an_unexpected_error_ends_the_session_and_not_the_export(
    served: VhostUserServed, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class UnexpectedError(Exception):
        """Of a request of a front-end."""

    def fail(*_: object) -> None:
        raise UnexpectedError

    with Machine.connected(served.path) as machine:
        machine.write(0, b"u" * BLOCK)
        with monkeypatch.context() as patched:
            patched.setattr(Connection, "send", fail)
            machine.control.send(17)
            assert machine.control.socket.recv(100) == b""
    with Machine.connected(served.path) as machine:
        assert machine.read(0, BLOCK) == b"u" * BLOCK
    assert "UnexpectedError" in caplog.text


def test_a_front_end_that_no_session_can_be_made_for_is_left_out(
    served: VhostUserServed, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with socket.socket(socket.AF_UNIX) as control, monkeypatch.context() as patched:
        patched.setattr(_engine, "Notices", fail)
        control.connect(os.fspath(served.path))
        assert control.recv(1) == b""
    with Machine.connected(served.path) as machine:
        assert len(machine.read(0, BLOCK)) == BLOCK
    assert "cannot serve a front-end: Too many open files" in caplog.text


def test_front_ends_cannot_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with blkloom.open(f"0 {SECTORS} ram") as device, VhostUserServed(tmp_path / "socket", device) as served:
        for _ in range(3 * limited_log.MOST):
            with Machine.connected(served.path) as machine, suppress(ConnectionResetError):
                machine.control.send(5000)
                machine.control.socket.recv(100)
        with Machine.connected(served.path) as machine:
            for _ in range(3 * limited_log.MOST):
                with pytest.raises(FrontEndError):
                    machine.control.tell(8, struct.pack("=II", 0, 3))
            assert len(caplog.records) == limited_log.MOST
            served.call(served.server._log.close)  # the end of the interval
            assert f"{5 * limited_log.MOST} more messages" in caplog.records[-1].getMessage()
            with pytest.raises(FrontEndError):
                machine.control.tell(8, struct.pack("=II", 0, 3))
            assert len(caplog.records) == limited_log.MOST + 2


def test_front_ends_of_random_messages_hurt_nobody_else(
    served: VhostUserServed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import random

    caplog.set_level(logging.CRITICAL)
    chosen = random.Random(5)
    for _ in range(150):
        with Machine(queues=2) as machine:
            machine.connect(served.path, start=chosen.random() < 0.7)
            files = [machine.file, *(descriptor for queue in machine.queues for descriptor in (queue.kick, queue.call))]
            try:
                for _ in range(chosen.randrange(12)):
                    number = chosen.choice([2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 21, 24, 25, 31, 32, 37, 38])
                    sizes = [0, 8, 8, 8, 16, 20, 24, 40, 40, chosen.randrange(300)]
                    payload = bytearray(chosen.choice(sizes))
                    for _ in range(chosen.randrange(6)):
                        if payload:
                            payload[chosen.randrange(len(payload))] = chosen.choice([0, 1, 1, 2, 64, 255])
                    some = chosen.sample(files, chosen.choice([0, 0, 1, 1, 2]))
                    machine.control.send(number, bytes(payload), some, flags=chosen.choice([1, 1, 9]))
            except (BrokenPipeError, ConnectionResetError):
                continue
    with Machine.connected(served.path) as machine:
        machine.write(0, b"g" * BLOCK)
        served.hand_over()
        assert machine.read(0, BLOCK) == b"g" * BLOCK
