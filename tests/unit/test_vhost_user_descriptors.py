"""Front-ends that keep hold of what they have sent: open files that they make blocking or fill, and descriptors that
must not stay open, or whose close waits.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import blkloom
from blkloom import _engine
from vhost_user_driver import READ, WRITE, FrontEnd, Machine
from vhost_user_served import VhostUserServed

BLOCK = 4096
FULL = (1 << 64) - 2
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[VhostUserServed]:
    """A device in memory."""
    with blkloom.open("0 2048 ram") as device, VhostUserServed(tmp_path / "socket", device) as served:
        yield served


def _fill(event: int) -> None:
    """The next write to the eventfd waits."""
    with suppress(BlockingIOError):
        os.eventfd_read(event)
    os.eventfd_write(event, FULL)
    os.set_blocking(event, True)


def _empty(event: int) -> None:
    os.set_blocking(event, False)
    with suppress(BlockingIOError):
        while True:
            os.eventfd_read(event)


def _used(machine: Machine, index: int = 0) -> int:
    queue = machine.queues[index]
    return queue._half(queue.used + 2)


def _hang_up(machine: Machine) -> None:
    with suppress(ConnectionResetError):  # the rest of the message was not received
        while machine.control.socket.recv(4096):
            pass


def test_a_call_that_would_wait_does_not_stop_the_event_loop(served: VhostUserServed) -> None:
    with Machine.connected(served.path, wanted=0) as machine:
        machine.write(0, b"c" * BLOCK)
        queue = machine.queues[0]
        before = _used(machine)
        _fill(queue.call)
        try:
            for _ in range(4):
                queue.submit(READ, 0, BLOCK)
                deadline = time.monotonic() + 60
                while _used(machine) == before and time.monotonic() < deadline:
                    os.sched_yield()
                assert _used(machine) == before + 1, "the loop that serves all queues waits for one driver"
                before += 1
        finally:
            _empty(queue.call)


def test_an_error_that_would_wait_does_not_stop_the_worker(
    served: VhostUserServed, caplog: pytest.LogCaptureFixture
) -> None:
    with Machine.connected(served.path, queues=2) as machine:
        queue = machine.queues[0]
        _fill(queue.error)
        try:
            queue._put_half(queue.available + 2, 1000)
            os.eventfd_write(queue.kick, 1)
            while "a queue has ended" not in caplog.text:
                os.sched_yield()
            machine.control.socket.settimeout(60)
            assert machine.control.number(17) == 64
        finally:
            _empty(queue.error)


def test_a_channel_whose_front_end_does_not_read_does_not_stop_the_worker(served: VhostUserServed) -> None:
    with Machine.connected(served.path) as machine:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    theirs.send(bytes(4096))
            with suppress(BlockingIOError):
                while True:
                    theirs.send(b"x")
            machine.control.tell(21, b"", [theirs.fileno()])
            theirs.setblocking(True)
            emptied = threading.Timer(30, ours.shutdown, [socket.SHUT_RDWR])
            emptied.start()
            served.call(served.server.device_changed)
            assert emptied.is_alive(), "it has waited until there was room"
            emptied.cancel()
            emptied.join()


def test_a_channel_that_is_no_unix_socket_is_refused(served: VhostUserServed, caplog: pytest.LogCaptureFixture) -> None:
    with Machine.connected(served.path) as machine, socket.socket() as inet:
        machine.control.send(21, b"", [inet.fileno()])
        _hang_up(machine)
    with Machine.connected(served.path) as machine:
        assert len(machine.read(0, BLOCK)) == BLOCK
    assert "is no Unix stream socket" in caplog.text


def test_no_descriptor_stays_open(served: VhostUserServed) -> None:
    def descriptors() -> dict[str, str]:
        found = {}
        for name in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):
                found[name] = os.readlink(f"/proc/self/fd/{name}")
        return found

    event = os.eventfd(0)
    path = os.open(f"/proc/self/fd/{event}", os.O_PATH)
    receiver, sender = os.pipe()
    directory = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    some = [event, path, receiver, sender, directory]

    def connect_with(number: int, descriptor: int) -> None:
        control = FrontEnd(served.path)
        control.send(number, struct.pack("=Q", 0), [descriptor])
        with control.socket, suppress(ConnectionResetError, BrokenPipeError):  # it was dropped
            control.send(17)
            control.socket.recv(100)

    before = None
    for _ in range(3):
        for number in (1, 2, 5, 6, 7, 12, 13, 14, 21, 24, 31, 32):
            for descriptor in some:
                connect_with(number, descriptor)
        with Machine.connected(served.path) as machine:
            machine.write(0, b"d" * BLOCK)
        control = FrontEnd(served.path)
        with control.socket:
            control.number(17)
            after = descriptors()
            while before is not None and len(after) > len(before):  # others close them: until the test's time is over
                after = descriptors()
        before = after
    for descriptor in some:
        os.close(descriptor)


def test_a_descriptor_whose_close_waits_does_not_stop_the_worker(served: VhostUserServed) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    lingering = socket.create_connection(listening.getsockname())
    peer, _ = listening.accept()
    with listening, peer:
        lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
        lingering.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                lingering.send(bytes(1 << 20))
        lingering.setblocking(True)
        for number in (12, 21, 32, 1):
            with Machine() as machine:
                machine.connect(served.path, start=False)
                machine.control.acknowledges = False
                machine.control.send(number, struct.pack("=Q", 0), [lingering.fileno()])
                if number == 1:
                    lingering.close()
                    machine.hang_up()
                else:
                    _hang_up(machine)
        waiting = threading.Timer(20, lambda: None)  # the close waits for 30 s
        waiting.start()
        served.call(served.server.stats)
        assert waiting.is_alive(), "it has waited for the close"
        waiting.cancel()
        waiting.join()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_queue_that_cannot_be_handed_over_takes_the_others_with_it(
    served: VhostUserServed, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve, calls = _engine.serve_vhost_user, count(1)

    def serve_once(*arguments: Any, **more: Any) -> _engine.Transport:
        if next(calls) == 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return serve(*arguments, **more)

    with Machine.connected(served.path, queues=2) as machine:
        machine.write(0, b"h" * BLOCK)
        monkeypatch.setattr(_engine, "serve_vhost_user", serve_once)
        served.hand_over()
        _hang_up(machine)
        before = _used(machine)
        slot = machine.queues[0].submit(WRITE, 0, 0, b"s" * BLOCK)
        with Machine.connected(served.path) as other:
            assert other.read(0, BLOCK) == b"h" * BLOCK, f"request {slot} of a machine that was disconnected"
        assert _used(machine) == before
    assert "is disconnected: queue 1 cannot be served" in caplog.text
