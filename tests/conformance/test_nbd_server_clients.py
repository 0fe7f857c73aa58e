"""NBD server with the engine: limits of clients, clients that vanish or break the protocol, and its end."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from blkloom import _engine
from blkloom.errors import UsageError
from blkloom.export.nbd.codes import OPTION_MAGIC, Option, Reply
from blkloom.export.nbd.server import NbdServer, ServerLimits
from left_behind import no_descriptor_left
from longer_times import needs, with_longer_times

from .raw_client import (
    DISCONNECT,
    GREETING,
    READ,
    SIZE,
    WRITE,
    Client,
    go_data,
    request,
    run,
    serving,
)


class Records(logging.Handler):
    """Log records of the server; `seen` waits for one."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.new = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.new.set()

    async def seen(self, part: str) -> str:
        while not (found := [line for line in self.lines if part in line]):
            self.new.clear()
            await self.new.wait()
        return found[0]


@pytest.fixture
def records() -> Iterator[Records]:
    log = logging.getLogger("blkloom.nbd")
    handler = Records()
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.DEBUG)
    yield handler
    log.setLevel(level)
    log.removeHandler(handler)


# limits


def test_handshake_that_takes_too_long_is_dropped(one_loop: _engine.Engine, tmp_path: Path, records: Records) -> None:
    async def main() -> None:
        async with serving(one_loop, tmp_path, limits=ServerLimits(handshake=0.05)) as server:
            silent = await Client.greeted(server)
            assert await silent.at_end()
            assert "unix pid" in await records.seen("the handshake took more than 0.05 s")
            assert server.connections == 0
            silent.close()

    run(main)


def test_one_client_too_many_is_told_why_and_the_next_is_taken(
    one_loop: _engine.Engine, tmp_path: Path, records: Records
) -> None:
    async def main() -> None:
        async with serving(one_loop, tmp_path, limits=ServerLimits(connections=2, refusals=1)) as server:
            taken = [await Client.greeted(server) for _ in range(2)]
            for client in taken:
                await client.go()
            refused = await Client.greeted(server)
            reply, message = await refused.ask(Option.GO, go_data(""))
            assert reply == Reply.ERR_POLICY
            assert b"2 connections, the most it takes" in message
            for _ in range(5):
                dropped = await Client.connect(server)
                assert await dropped.at_end()
                dropped.close()
            assert (await refused.ask(Option.ABORT))[0] == Reply.ACK
            assert await refused.at_end()
            assert sum("clients are refused" in line for line in records.lines) == 1
            assert await taken[1].read(0, 1) == b"\0"
            taken.pop().close()
            await records.seen("taken again; 6 were refused")
            later = await Client.greeted(server)
            await later.go()
            for client in (*taken, later, refused):
                client.close()

    run(main)


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often accept is tried."""

    accepts = 0

    async def sock_accept(self, sock: socket.socket) -> tuple[socket.socket, object]:
        self.accepts += 1
        return await super().sock_accept(sock)


def test_no_descriptor_left_to_accept_waits_for_one_and_does_not_spin(
    one_loop: _engine.Engine, tmp_path: Path, records: Records
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CountingLoop)
        async with serving(one_loop, tmp_path, limits=ServerLimits(accept_retry=3600)) as server:
            first = await Client.greeted(server)
            await first.go()
            assert await first.read(0, 1) == b"\0"
            waiting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                await loop.sock_connect(waiting, server.listeners[0].socket.getsockname())
                assert "Too many open files" in await records.seen("nothing is left to accept them with")
                tried = loop.accepts
                for _ in range(1000):
                    await asyncio.sleep(0)
                assert loop.accepts == tried
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            first.close()
            assert await Client(waiting).receive(18) == GREETING
            assert sum("nothing is left" in line for line in records.lines) == 1
            waiting.close()

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        runner.run(asyncio.wait_for(main(), 60))


# bad clients


@pytest.mark.parametrize(
    "sent",
    [b"", b"\0\0", b"\xff" * 4, b"GET / HTTP/1.1\r\n\r\n", struct.pack(">I", 3) + bytes(100),
     struct.pack(">IQII", 3, OPTION_MAGIC, 6, 0xFFFFFFFF), struct.pack(">IQII", 3, OPTION_MAGIC, 99, 50000) + bytes(7)],
)  # fmt: skip
def test_bad_client_ends_alone_and_leaves_nothing_behind(one_loop: _engine.Engine, tmp_path: Path, sent: bytes) -> None:
    async def main() -> None:
        async with serving(one_loop, tmp_path) as server:
            good = await Client.greeted(server)
            await good.go()
            assert await good.read(0, 1) == b"\0"
            with no_descriptor_left(collect=True):
                for _ in range(20):
                    bad = await Client.connect(server)
                    await bad.send(sent)
                    bad.socket.shutdown(socket.SHUT_WR)
                    while await bad.receive(1):
                        pass
                    bad.close()
                assert server.connections == 1
            assert await good.read(0, 1) == b"\0"
            good.close()

    run(main)


def test_many_clients_that_vanish_are_forgotten(one_loop: _engine.Engine, tmp_path: Path, records: Records) -> None:
    async def main() -> None:
        async with serving(one_loop, tmp_path) as server:
            first = await Client.greeted(server)  # what the engine opens once and keeps is not counted
            await first.go()
            first.close()
            await server.wait_for_last_client()
            with no_descriptor_left(collect=True):
                for moment in range(60):
                    client = await Client.greeted(server)
                    if moment % 3:
                        await client.go()
                    if moment % 3 == 2:
                        await client.send(request(WRITE, 0, 4096) + b"half")
                    client.close()
                await server.wait_for_last_client()
                assert server.connections == 0
                assert server.served == 41

    run(main)


# the end


def test_stop_closes_clients_and_removes_the_socket_file(one_loop: _engine.Engine, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(one_loop, tmp_path) as server:
            clients = [await Client.greeted(server) for _ in range(3)]
            for client in clients:
                await client.go()
                assert await client.read(0, 1) == b"\0"
            assert await server.stop() == 0
            assert await server.stop() == 0
            for client in clients:
                assert await client.at_end()
                client.close()
            assert not list(tmp_path.iterdir())
            with pytest.raises(UsageError):
                await server.listen_unix(tmp_path / "again.sock")
            assert not list(tmp_path.iterdir())

    run(main)


def test_client_still_haggling_at_the_stop_is_told_so(one_loop: _engine.Engine, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(one_loop, tmp_path) as server:
            haggling = await Client.greeted(server)
            assert (await haggling.ask(Option.LIST))[0] == Reply.ACK
            stopping = asyncio.create_task(server.stop())
            await asyncio.sleep(0)
            while (await haggling.ask(Option.LIST))[0] == Reply.ACK:
                pass
            reply, message = await haggling.ask(Option.GO, go_data(""))
            assert (reply, message) == (Reply.ERR_SHUTDOWN, b"the server is shutting down")
            assert (await haggling.ask(Option.ABORT))[0] == Reply.ACK
            assert await stopping == 0
            haggling.close()

    run(main)


def test_silent_clients_do_not_hold_up_the_stop(one_loop: _engine.Engine, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(one_loop, tmp_path, limits=ServerLimits(handshake=3600)) as server:
            silent = [await Client.connect(server) for _ in range(3)]
            for client in silent:
                await client.receive(18)
            assert await server.stop() == 0
            for client in silent:
                assert await client.at_end()
                client.close()

    run(main)


@with_longer_times(0.5, 5, 25)
def test_a_client_that_takes_no_replies_is_cut_at_the_end_of_the_stop_and_named(
    one_loop: _engine.Engine, tmp_path: Path, records: Records, seconds: float
) -> None:
    async def main() -> None:
        async with serving(one_loop, tmp_path) as server:
            hoarding = await Client.greeted(server)
            await hoarding.go()
            for _ in range(3):
                await hoarding.send(request(READ, 0, SIZE))
            records.lines.clear()
            taking = await Client.greeted(server)
            await taking.go()
            await taking.send(request(READ, 0, SIZE))
            while _engine_reads(server) < 2:  # one each: the others wait for room among the replies
                await asyncio.sleep(0)
            stopping = asyncio.create_task(server.stop(seconds))
            reply = await taking.receive(16 + SIZE)
            left = await stopping
            needs(len(reply) == 16 + SIZE, "the one that takes its replies did not get them to the end")
            needs(left == 0, "connections had not ended")
            assert f"unix pid {os.getpid()}" in (cut := await records.seen("of replies"))
            assert "export 'disk'" in cut
            assert sum("of replies" in line for line in records.lines) == 1
            for client in (hoarding, taking):
                client.close()

    run(main)


def _engine_reads(server: NbdServer) -> int:
    (exported,) = server._exports.values()
    return int(exported.export.stats()["read"]["count"])


def test_last_client_gone_ends_the_wait(one_loop: _engine.Engine, tmp_path: Path, records: Records) -> None:
    async def main() -> None:
        async with serving(one_loop, tmp_path) as server:
            waiting = asyncio.create_task(server.wait_for_last_client())
            browsing = await Client.greeted(server)
            await browsing.ask(Option.ABORT)
            await records.seen("left during the handshake")
            clients = [await Client.greeted(server) for _ in range(2)]
            for client in clients:
                await client.go()
            clients[0].close()
            assert await clients[1].read(0, 1) == b"\0"
            assert not waiting.done()
            await clients[1].send(request(DISCONNECT, 0, 0))
            await waiting
            assert "unix pid" in await records.seen("serving export 'disk' (simple replies)")
            for client in (browsing, clients[1]):
                client.close()

    run(main)
