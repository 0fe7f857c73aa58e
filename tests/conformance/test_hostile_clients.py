"""Hostile and broken clients get a defined error, do not affect other clients, and leave nothing behind."""

from __future__ import annotations

import os
import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

import blkloom
from blkloom import _engine
from left_behind import no_descriptor_left, no_thread_left

from .transmission import READ, STYLES, WRITE, Hangup, Transmission

MIB = 1 << 20


@pytest.fixture
def engine() -> Iterator[_engine.Engine]:
    made = _engine.Engine(loops=2)
    yield made
    made.close()


@pytest.fixture
def export(engine: _engine.Engine) -> Iterator[_engine.Export]:
    with blkloom.open(f"0 {16 * MIB // 512} ram", engine=engine) as device:
        yield _engine.Export(device)


Connect = Callable[..., Transmission]


@pytest.fixture
def connect(engine: _engine.Engine) -> Iterator[Connect]:
    with ExitStack() as stack:

        def connect(export: _engine.Export, style: str, **options: object) -> Transmission:
            client = Transmission(engine, export, style, **options)
            stack.callback(client.close)
            return client

        yield connect


@pytest.mark.parametrize("style", STYLES)
def test_garbage_ends_only_its_own_connection(connect: Connect, export: _engine.Export, style: str) -> None:
    good = connect(export, style)
    good.ask(WRITE, 0, data=b"kept" * 1000)
    rng = random.Random(1)
    for _ in range(200):
        bad = connect(export, style)
        with suppress(BrokenPipeError, ConnectionResetError):
            bad.socket.sendall(rng.randbytes(rng.randrange(1, 5000)))
        bad.close()
        bad.ended()
        assert good.ask(READ, 0, 4000).data == b"kept" * 1000
    good.close()
    good.ended()
    assert export.connections == 0


def test_mutated_requests_are_answered_or_end_the_connection(connect: Connect, export: _engine.Export) -> None:
    rng = random.Random(2)
    for turn in range(300):
        client = connect(export, STYLES[turn % 3])
        request = bytearray(client.header(rng.randrange(9), 1, rng.randrange(32 * MIB), rng.randrange(MIB), 0))
        for _ in range(rng.randrange(4)):
            request[rng.randrange(len(request))] = rng.randrange(256)
        client.socket.sendall(bytes(request))
        client.socket.shutdown(socket.SHUT_WR)
        while client.socket.recv(65536):
            pass
        client.ended()
        client.close()


def test_a_client_that_stalls_in_the_middle_of_a_request_is_dropped(connect: Connect, export: _engine.Export) -> None:
    good = connect(export, "simple")
    for sent in (b"\x25", struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 0, 4096) + b"x" * 100):
        stalled = connect(export, "simple", stall_timeout=0.2)
        stalled.socket.sendall(sent)
        assert "stalled" in stalled.ended()
        with pytest.raises(Hangup):
            stalled.exactly(1)
    idle = connect(export, "simple", stall_timeout=0.2)
    assert idle.ask(READ, 0, 512).error == 0
    assert good.ask(READ, 0, 4).data == bytes(4)
    good.close()
    good.ended()
    assert idle.ask(READ, 0, 512).error == 0, "a client that waits between requests is not stalled"


def test_a_client_that_never_reads_its_replies_is_bounded_and_dropped(connect: Connect, export: _engine.Export) -> None:
    greedy = connect(export, "simple", stall_timeout=0.5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    request = b"".join(greedy.header(READ, i, 0, MIB, 0) for i in range(1000))  # a gigabyte of replies
    with pytest.raises(ConnectionError):  # the server takes no more of them, and hangs up
        greedy.socket.sendall(request * 100)
    assert "stalled" in greedy.ended()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 256 * 1024, f"{grown} KiB for one client that does not read"


@pytest.mark.parametrize("style", STYLES)
def test_asking_for_four_gigabytes_is_refused_and_the_connection_goes_on(
    connect: Connect, export: _engine.Export, style: str
) -> None:
    client = connect(export, style)
    assert client.ask(READ, 0, (1 << 32) - 1).error != 0
    assert client.ask(READ, 0, 4).data == bytes(4)
    client.send(WRITE, 0, payload=(1 << 32) - 1)
    if style == "extended":
        with pytest.raises(Hangup):
            client.reply()
        return
    sent = client.socket.send(b"x" * MIB)
    assert sent > 0, "the payload is read and thrown away"
    assert export.stats()["in_flight"] == 0
    client.close()
    client.ended()


class Asleep(blkloom.TargetSpec):
    """Answers nothing until it is told to."""

    name = "asleep"
    wake = threading.Event()

    def load(self, context: object, start: int, length: int) -> LoadedAsleep:  # type: ignore[override]
        return LoadedAsleep(self, [(0, length, _engine.Extent.fault())])


class LoadedAsleep(blkloom.LoadedTarget):
    def read(self, offset: int, length: int) -> bytes:
        Asleep.wake.wait(30)
        return bytes(length)


def test_clients_that_vanish_with_requests_in_flight_leave_nothing_behind(
    engine: _engine.Engine, connect: Connect
) -> None:
    Asleep.wake.clear()
    table = f"0 {8 * MIB // 512} asleep\n{8 * MIB // 512} 8 zero\n"
    with blkloom.open(table, engine=engine, targets=[Asleep]) as device:
        export = _engine.Export(device)
        warm = connect(export, "simple")
        warm.ask(READ, 8 * MIB, 512)
        with no_descriptor_left(beyond=30), no_thread_left():  # the tests' own eventfds, one a client
            gone = [connect(export, STYLES[i % 3]) for i in range(30)]
            for client in gone:
                for at in range(20):
                    client.send(READ, at * 4096, 4096)
                client.socket.close()
            assert warm.ask(READ, 8 * MIB, 512).data == bytes(512), "mapped ranges are served meanwhile"
            assert export.connections == 31, "their requests still use the device"
            Asleep.wake.set()
            for client in gone:
                client.ended()
            assert export.connections == 1
        assert device.stats()["in_flight"] == 0
        warm.close()


def test_ten_thousand_connections_meet_the_bound_and_the_first_client_goes_on(
    serve: Callable[..., object], tmp_path: Path
) -> None:
    """In waves, so that this process needs few descriptors: the server's bound is far lower."""
    path = tmp_path / "d.sock"
    server = serve("--ram", "16M", "--socket", path, "--max-connections", "50")
    pid = server.process.pid  # type: ignore[attr-defined]
    first = negotiated(path)
    assert read(first, 0, 512) == bytes(512)  # from here on the engine's loops are there
    at_rest = server_resources(pid)
    greeted = 0
    for _ in range(50):
        wave = []
        for _ in range(200):
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(path))
            client.settimeout(30)
            wave.append(client)
        for client in wave:
            with suppress(ConnectionResetError):
                greeted += client.recv(8) == b"NBDMAGIC"
        for client in wave:  # not before: no client may leave and so make room for others
            client.close()
    assert 50 <= greeted < 10_000, "some are served or told why not, most are hung up on"
    assert read(first, 0, 512) == bytes(512)
    first.close()
    assert eventually(lambda: server_resources(pid)[0] < at_rest[0] + 3), "descriptors are given back"
    last = negotiated(path)
    assert read(last, 0, 512) == bytes(512)
    last.close()
    (fds, thread_count, memory), (fds_0, thread_count_0, memory_0) = server_resources(pid), at_rest
    assert fds <= fds_0 + 2
    assert thread_count <= thread_count_0 + 2
    assert memory < memory_0 + 64 * MIB
    assert "connections, the most it takes" in server.log.read_text()  # type: ignore[attr-defined]


def server_resources(pid: int) -> tuple[int, int, int]:
    """Descriptors, threads and resident bytes of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")), pages * 4096


def eventually(true: Callable[[], bool], *, within: float = 30.0) -> bool:
    """Whether it becomes true; looks again and again, for /proc has no events."""
    deadline = time.monotonic() + within
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def negotiated(path: Path) -> socket.socket:
    """A client past the handshake (EXPORT_NAME, simple replies)."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))  # waits for its place in the queue, which a time-out would forbid
    client.settimeout(30)
    assert len(client.recv(18, socket.MSG_WAITALL)) == 18
    client.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, 0))
    assert len(client.recv(10, socket.MSG_WAITALL)) == 10
    return client


def read(client: socket.socket, offset: int, length: int) -> bytes:
    client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, READ, 1, offset, length))
    magic, error, _ = struct.unpack(">IIQ", client.recv(16, socket.MSG_WAITALL))
    assert (magic, error) == (0x67446698, 0)
    return client.recv(length, socket.MSG_WAITALL)
