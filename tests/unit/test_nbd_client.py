"""The target `nbd` against a server by hand: servers that break the protocol, and requests that are sent again."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import msgspec
import pytest
from hypothesis import strategies

import blkloom
from blkloom import _engine
from blkloom.nbd_client import connecting
from blkloom.nbd_client.handshake import HandshakeError, ServerExport, dialogue
from blkloom.nbd_client.links import Needs
from nbd_by_hand import (
    BLOCK_STATUS,
    CONTEXT,
    DISC,
    FLAGS,
    FLUSH,
    READ,
    SIZE,
    WRITE,
    WRITE_ZEROES,
    ByHand,
    Connection,
    Honest,
    Request,
    chunk,
    data,
    simple,
)

pytestmark = pytest.mark.timeout(120)

WRITES_ZEROES = 1 << 6

Wrong = Callable[[Request], bytes]


def status_runs(*runs: int, context: int = CONTEXT) -> bytes:
    return struct.pack(f">I{len(runs)}I", context, *runs)


READS: dict[str, tuple[str, Wrong]] = {
    "unknown request": ("not in flight", lambda r: data(r.cookie + (1 << 32), r.offset, bytes(r.length))),
    "no reply": ("without magic", lambda _: b"\0" * 16),
    "extended reply": ("another form", lambda _: bytes.fromhex("6e8a278c") + bytes(28)),
    "simple reply": ("a simple reply to a read", lambda r: simple(r.cookie) + bytes(r.length)),
    "data before the request": ("outside", lambda r: data(r.cookie, r.offset - 1, bytes(r.length))),
    "data after the request": ("outside", lambda r: data(r.cookie, r.offset + 1, bytes(r.length))),
    "data at the end of the world": ("outside", lambda r: data(r.cookie, (1 << 64) - 1, bytes(r.length))),
    "data twice": (
        "overlaps",
        lambda r: data(r.cookie, r.offset, bytes(512), done=False) + data(r.cookie, r.offset + 511, bytes(9)),
    ),
    "a hole twice": (
        "overlaps",
        lambda r: 2 * chunk(r.cookie, 2, struct.pack(">QI", r.offset, 8), done=False),
    ),
    "data missing": ("without all of its data", lambda r: data(r.cookie, r.offset, bytes(r.length - 1))),
    "no data": ("without all of its data", lambda r: chunk(r.cookie, 0)),
    "empty data": ("without data", lambda r: data(r.cookie, r.offset, b"")),
    "an empty hole": ("malformed hole", lambda r: chunk(r.cookie, 2, struct.pack(">QI", r.offset, 0))),
    "a long hole": ("outside", lambda r: chunk(r.cookie, 2, struct.pack(">QI", r.offset, (1 << 32) - 1))),
    "an unknown chunk": ("unknown type", lambda r: chunk(r.cookie, 77)),
    "a chunk that is too long": ("too long", lambda r: struct.pack(">IHHQI", 0x668E33EF, 1, 2, r.cookie, 1 << 31)),
    "none that is not the last": ("NONE", lambda r: chunk(r.cookie, 0, done=False)),
    "an error without code": ("malformed error", lambda r: chunk(r.cookie, 0x8001, struct.pack(">IH", 0, 0))),
    "an error that ends in its message": (
        "malformed error",
        lambda r: chunk(r.cookie, 0x8001, struct.pack(">IH", 5, 99)),
    ),
    "a block status": ("does not fit", lambda r: chunk(r.cookie, 5, status_runs(r.length, 0))),
}
STATUSES: dict[str, tuple[str, Wrong]] = {
    "of another context": ("not asked for", lambda r: chunk(r.cookie, 5, status_runs(512, 0, context=CONTEXT + 1))),
    "twice": ("twice", lambda r: 2 * chunk(r.cookie, 5, status_runs(512, 0), done=False)),
    "without runs": ("malformed block status", lambda r: chunk(r.cookie, 5, status_runs())),
    "with half a run": ("malformed block status", lambda r: chunk(r.cookie, 5, status_runs(512))),
    "with an empty run": ("empty run", lambda r: chunk(r.cookie, 5, status_runs(0, 0))),
    "missing": ("without one", lambda r: chunk(r.cookie, 0)),
    "as a simple reply": ("a simple reply to a block status", lambda r: simple(r.cookie)),
    "as data": ("does not fit", lambda r: data(r.cookie, r.offset, bytes(512))),
}


def opened(server: ByHand, options: str = "1 connections=1") -> blkloom.Device:
    return blkloom.open(f"0 {SIZE // 512} nbd {server.uri} {options}")


def status(device: blkloom.Device) -> str:
    return device.status()[0][3]


def in_flight_and_waiting(device: blkloom.Device) -> tuple[int, int]:
    words = status(device).split()
    return int(words[words.index("in_flight") + 1]), int(words[words.index("waiting") + 1])


def broken_by(folder: Path, wrong: Wrong, kind: int, request: Callable[[blkloom.Device], object]) -> tuple[object, str]:
    """The result of a request whose first reply is wrong, and the status afterwards."""
    honest = Honest()
    honest.memory[:] = random.Random(3).randbytes(SIZE)

    def serve(connection: Connection) -> None:
        if connection.number > 0:
            honest.serve(connection)
            return
        while (found := connection.request()) is not None and found.kind != DISC:
            connection.send(wrong(found) if found.kind == kind else honest.execute(connection, found))

    with ByHand(folder, serve) as server, opened(server) as device:
        result = request(device)
        assert "reconnects 1" in status(device)
        if kind == READ:
            assert result == honest.memory[4096:8192]
        return result, status(device)


@pytest.mark.parametrize("name", READS)
def test_a_server_that_breaks_the_protocol_is_cut_and_the_read_sent_again(tmp_path: Path, name: str) -> None:
    what, wrong = READS[name]
    _, told = broken_by(tmp_path, wrong, READ, lambda device: device.pread(4096, 4096))
    assert "the server broke the protocol" in told
    assert what in told


@pytest.mark.parametrize("name", STATUSES)
def test_a_wrong_block_status_cuts_the_connection(tmp_path: Path, name: str) -> None:
    what, wrong = STATUSES[name]
    result, told = broken_by(tmp_path, wrong, BLOCK_STATUS, lambda device: device.extents(0, 4096))
    assert result == [(0, 4096, 0)]
    assert what in told


def test_a_server_that_shuts_down_is_left(tmp_path: Path) -> None:
    _, told = broken_by(
        tmp_path,
        lambda r: chunk(r.cookie, 0x8001, struct.pack(">IH", 108, 0)),
        READ,
        lambda device: device.pread(4096, 4096),
    )
    assert "shutting down" in told


@hypothesis.settings(
    max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None
)
@hypothesis.given(
    garbage=strategies.binary(min_size=20, max_size=200),
    magic=strategies.sampled_from([b"", b"\x66\x8e\x33\xef", b"\x67\x44\x66\x98"]),
)
def test_random_replies_never_harm(tmp_path_factory: pytest.TempPathFactory, garbage: bytes, magic: bytes) -> None:
    # Garbage may be the beginning of a longer chunk; the end of the stream ends that.
    def serve(connection: Connection) -> None:
        if connection.number > 0:
            honest.serve(connection)
            return
        connection.request()
        connection.send(magic + garbage)

    honest = Honest()
    with ByHand(tmp_path_factory.mktemp("random"), serve) as server, opened(server) as device:
        assert device.pread(512, 0) == bytes(512)


def test_data_may_come_in_any_order_and_pieces(tmp_path: Path) -> None:
    content, honest = random.Random(8).randbytes(8192), Honest()

    def serve(connection: Connection) -> None:
        while (request := connection.request()) is not None and request.kind != DISC:
            if request.kind != READ:
                connection.send(honest.execute(connection, request))
                continue
            at = request.offset
            reply = (
                data(request.cookie, at + 5000, content[5000:], done=False)
                + chunk(request.cookie, 2, struct.pack(">QI", at + 1000, 4000), done=False)
                + data(request.cookie, at, content[:1000], done=False)
                + chunk(request.cookie, 0)
            )
            for byte in reply:  # each in a packet of its own
                connection.send(bytes([byte]))

    with ByHand(tmp_path, serve) as server, opened(server) as device:
        assert device.pread(8192, 4096) == content[:1000] + bytes(4000) + content[5000:]


def test_nothing_is_sent_until_the_server_has_closed_a_connection_with_unanswered_writes(tmp_path: Path) -> None:
    honest, cut, may_close = Honest(), threading.Event(), threading.Event()
    order: list[str] = []
    first_write = threading.Lock()

    def serve(connection: Connection) -> None:
        while (request := connection.request()) is not None:
            if request.kind == DISC:
                return
            if request.kind == WRITE and request.offset == 4096 and first_write.acquire(blocking=False):
                connection.send(b"\0" * 16)  # cut, with this write unanswered
                found = connection.request()
                assert found is not None
                assert found.kind == DISC
                cut.set()
                assert may_close.wait(60)
                honest.execute(connection, request)  # late, but before the end of the connection
                order.append("old write")
                return
            order.append(f"request of kind {request.kind} at {request.offset}")
            connection.send(honest.execute(connection, request))

    with ByHand(tmp_path, serve) as server, opened(server, "1 connections=2") as device:
        while not status(device).startswith("2/2"):
            pass
        order.clear()
        writes = [
            threading.Thread(target=device.pwrite, args=(letter * 4096, at))
            for letter, at in [(b"a", 4096), (b"b", 8192)]
        ]
        writes[0].start()
        assert cut.wait(60)
        writes[1].start()
        read = threading.Thread(target=device.pread, args=(512, 0))
        read.start()
        while "waiting 3" not in status(device):
            pass
        assert order == []
        may_close.set()
        for thread in (*writes, read):
            thread.join()
        assert order[0] == "old write"
        sent = [what for what in order if "kind 1" in what]
        assert sent == ["request of kind 1 at 4096", "request of kind 1 at 8192"]
        assert device.pread(4096, 4096) == b"a" * 4096
    assert honest.memory[8192:12288] == b"b" * 4096


def test_a_request_without_an_answer_cuts_its_connection(tmp_path: Path) -> None:
    honest = Honest()

    def serve(connection: Connection) -> None:
        if connection.number > 0:
            honest.serve(connection)
            return
        while (request := connection.request()) is not None and request.kind != DISC:
            pass

    with ByHand(tmp_path, serve) as server, opened(server, "2 connections=1 timeout=1") as device:
        device.pwrite(b"x" * 512, 0)
        assert "not answered within 1 s" in status(device)
    assert honest.memory[:512] == b"x" * 512


def test_a_write_is_durable_without_fua_of_the_server(tmp_path: Path) -> None:
    honest = Honest()
    with ByHand(tmp_path, honest.serve, flags=1 | 1 << 2 | 1 << 8) as server, opened(server) as device:
        device.pwrite(b"x" * 512, 0, fua=True)
        device.discard(0, 4096)
        device.write_zeroes(0, 512)
        with pytest.raises(OSError, match="not supported"):
            device.write_zeroes(0, 512, fast=True)
    kinds = [request.kind for _, request in honest.requests]
    assert kinds[:3] == [1, 3, 1]


def test_a_flush_is_not_sent_if_one_has_covered_all_writes(tmp_path: Path) -> None:
    """The first is sent: a former process of the device, or its table before, may have written."""
    honest = Honest()
    with ByHand(tmp_path, honest.serve) as server:
        with opened(server) as device:
            device.flush()
            device.flush()
            device.pwrite(b"x" * 512, 0)
            device.flush()
            device.flush()
        assert [request.kind for _, request in honest.requests] == [FLUSH, WRITE, FLUSH]
        with opened(server, "2 connections=1 read_only") as device:
            device.flush()
    assert len(honest.requests) == 3


def test_a_server_that_has_lost_what_the_device_relies_on_is_not_used(tmp_path: Path) -> None:
    honest = Honest()

    def serve(connection: Connection) -> None:
        server.flags = FLAGS & ~WRITES_ZEROES if connection.number == 0 else server.flags
        if connection.number > 0:
            honest.serve(connection)

    with ByHand(tmp_path, serve) as server, opened(server) as device:
        zeroing = threading.Thread(target=device.write_zeroes, args=(0, SIZE))
        zeroing.start()
        while "the server does not write zeroes any more; load the table again" not in status(device):
            pass
        assert honest.requests == []
        server.flags = FLAGS
        zeroing.join()
    assert [(request.kind, request.length) for _, request in honest.requests] == [(WRITE_ZEROES, SIZE), (FLUSH, 0)]


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ({"extended": False}, "extended headers any more"),
        ({"flags": FLAGS & ~WRITES_ZEROES}, "write zeroes any more"),
        ({"size": SIZE - 1}, "bytes, but"),
        ({"flags": FLAGS | 1 << 1}, "read-only now"),
        ({"minimum": 4096}, "block sizes"),
        ({"maximum": 4096}, "block sizes"),
        ({"flags": FLAGS & ~(1 << 8)}, "several connections"),
    ],
)
def test_every_connection_offers_what_the_first_one_did(lost: dict[str, Any], said: str) -> None:
    needs = Needs(size=SIZE, block=1, longest=SIZE, writable=True, multi_conn=True, extended=True, write_zeroes=True)
    found = ServerExport(SIZE, FLAGS, extended=True, maximum=SIZE)
    needs.check(found)
    with pytest.raises(HandshakeError, match=said):
        needs.check(msgspec.structs.replace(found, **lost))


def test_zeros_that_are_sent_as_data_count_as_data(tmp_path: Path) -> None:
    """Only so many bytes are on their way, so that memory for them is limited."""
    honest, may_serve = Honest(), threading.Event()

    def serve(connection: Connection) -> None:
        assert may_serve.wait(60)
        honest.serve(connection)

    with ByHand(tmp_path, serve, flags=FLAGS & ~WRITES_ZEROES) as server, opened(server) as device:
        threads = [threading.Thread(target=device.write_zeroes, args=(0, SIZE)) for _ in range(64)]
        for thread in threads:
            thread.start()
        while sum(found := in_flight_and_waiting(device)) < 64:
            pass
        may_serve.set()
        for thread in threads:
            thread.join()
    assert found == (32, 32)
    assert [(request.kind, request.length) for _, request in honest.requests[:64]] == 64 * [(WRITE, SIZE)]


def test_a_server_that_ends_every_connection_is_asked_less_and_less_often(tmp_path: Path) -> None:
    times: list[float] = []
    honest, enough = Honest(), 4

    def serve(connection: Connection) -> None:
        times.append(time.monotonic())
        if len(times) > enough:
            honest.serve(connection)

    with ByHand(tmp_path, serve) as server, opened(server) as device:
        assert device.pread(512, 0) == bytes(512)
    assert len(times) == enough + 1
    assert times[-1] - times[1] >= 0.05 + 0.1 + 0.2  # the pauses; the machine adds to them


@pytest.mark.parametrize("minimum", [1, 512, 4096, 65536])
def test_unaligned_reads_are_not_longer_than_the_server_allows(tmp_path: Path, minimum: int) -> None:
    honest, maximum = Honest(), 65536
    honest.memory[:] = random.Random(4).randbytes(SIZE)
    with (
        ByHand(tmp_path, honest.serve, blocks=(minimum, max(minimum, 4096), maximum)) as server,
        opened(server) as device,
    ):
        assert device.pread(300_000, 700) == honest.memory[700:300_700]
    reads = [request for _, request in honest.requests if request.kind == READ]
    assert len(reads) > 300_000 // maximum
    for read in reads:
        assert read.offset % minimum == read.length % minimum == 0
        assert read.length <= maximum


def test_a_timeout_of_any_length_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, honest = _engine.NbdClient, Honest()
    monkeypatch.setattr(_engine, "NbdClient", lambda **settings: made(**settings | {"timeout": 1.8e19}))
    with ByHand(tmp_path, honest.serve) as server, opened(server) as device:
        assert device.pread(512, 0) == bytes(512)


class Hesitant(ByHand):
    """Does no handshake after the first one until it is allowed."""

    allowed = threading.Event()

    def _handshake(self, sock: socket.socket, connection: Connection) -> None:
        if connection.number > 0:
            assert self.allowed.wait(60)
        super()._handshake(sock, connection)


def test_a_device_that_closes_does_not_wait_for_an_attempt_to_connect(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with Hesitant(tmp_path, lambda _: None) as server:
        device = opened(server, "2 connections=1 read_only")
        while server.accepted < 2:
            pass
        device.close()
        (connecting,) = [
            thread for thread in threading.enumerate() if thread.name == "blkloom-nbd" and thread not in before
        ]
        server.allowed.set()
        connecting.join()


def test_an_address_that_does_not_answer_leaves_time_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent, socket.create_server(("127.0.0.1", 0)) as server:
        queued = socket.create_connection(silent.getsockname())  # the kernel lets no other client in
        addresses = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", it.getsockname()) for it in (silent, server)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
        with queued, connecting._reach_host("storage", 10809, time.monotonic() + 4) as found:
            assert found.getpeername() == server.getsockname()


def test_a_server_cannot_fill_the_memory_with_replies_to_an_option() -> None:
    sent: list[bytes] = []

    def flood() -> None:
        steps, option = dialogue("disk"), b""
        wanted = next(steps)
        while len(sent) < 1000:
            match wanted:
                case bytes():
                    option, answer = wanted[8:12], b""
                case 16:
                    answer = b"NBDMAGICIHAVEOPT"
                case 2:
                    answer = b"\0\3"
                case 20:
                    answer = struct.pack(">Q4sII", 0x3E889045565A9, option, 4, 60_000)
                case _:
                    answer = bytes(60_000)
                    sent.append(answer)
            wanted = steps.send(answer)

    with pytest.raises(HandshakeError, match="too long a reply"):
        flood()
    assert len(b"".join(sent)) <= 1 << 20
