"""The NBD server with the engine behind it: hand-over, bounds, bad clients, a clean stop.

Clients are raw sockets where the order of bytes matters and the libnbd tools where it does not.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import json
import logging
import os
import resource
import shutil
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blkloom.errors import UsageError
from blkloom.export.nbd.codes import NBD_MAGIC, OPTION_MAGIC, REPLY_MAGIC, Option, Reply
from blkloom.export.systemd import adopt_socket

_engine = pytest.importorskip("blkloom._engine", reason="the engine is not built: make setup")
from blkloom.export.nbd.server import NbdServer, ServerLimits  # noqa: E402
from blkloom.export.nbd.session import NbdExport  # noqa: E402

SIZE = 1 << 20
READ, WRITE, DISCONNECT = 0, 1, 2
GREETING = struct.pack(">QQH", NBD_MAGIC, OPTION_MAGIC, 3)
needs_nbdinfo = pytest.mark.skipif(not shutil.which("nbdinfo"), reason="nbdinfo is missing: apt install libnbd-bin")
SYSTEM_PYTHON = "/usr/bin/python3"
needs_libnbd = pytest.mark.skipif(
    not os.path.exists("/usr/lib/python3/dist-packages/nbd.py"), reason="libnbd is missing: apt install python3-libnbd"
)


@pytest.fixture
def engine() -> Iterator[object]:
    made = _engine.Engine(loops=1)
    yield made
    made.close()


def export(engine: object, name: str, *, read_only: bool = False, description: str = "") -> NbdExport:
    """A RAM device of SIZE bytes under `name`."""
    memory = os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(memory, SIZE)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    region = _engine.Region(memory, SIZE)
    os.close(memory)
    device = _engine.Device(engine, _engine.Map([(0, SIZE, 0, _engine.Extent.memory(region, 0))]), name=name)
    return NbdExport(name, _engine.Export(device, name=name, read_only=read_only), description)


class Client:
    """A raw client on a Unix or TCP socket."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected

    @classmethod
    async def connect(cls, server: NbdServer) -> Client:
        listening = server.listeners[0].socket
        connected = socket.socket(listening.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        await asyncio.get_running_loop().sock_connect(
            connected, listening.getsockname()[: 2 if listening.family == socket.AF_INET else None]
        )
        return cls(connected)

    @classmethod
    async def greeted(cls, server: NbdServer) -> Client:
        client = await cls.connect(server)
        assert await client.receive(18) == GREETING
        await client.send(struct.pack(">I", 3))
        return client

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def receive(self, length: int) -> bytes:
        """Exactly length bytes, or those before the end."""
        data = b""
        while len(data) < length:
            more = await asyncio.get_running_loop().sock_recv(self.socket, length - len(data))
            if not more:
                break
            data += more
        return data

    async def at_end(self) -> bool:
        try:
            return await asyncio.get_running_loop().sock_recv(self.socket, 1) == b""
        except ConnectionResetError:
            return True

    async def ask(self, option: int, data: bytes = b"") -> tuple[Reply, bytes]:
        """The final reply to an option, and its data."""
        await self.send(option_bytes(option, data))
        while True:
            magic, _, kind, length = struct.unpack(">QIII", await self.receive(20))
            assert magic == REPLY_MAGIC
            content = await self.receive(length)
            if (reply := Reply(kind)) == Reply.ACK or reply.is_error:
                return reply, content

    async def go(self, name: str = "") -> None:
        assert (await self.ask(Option.GO, go_data(name)))[0] == Reply.ACK

    async def read(self, offset: int, length: int) -> bytes:
        await self.send(request(READ, offset, length))
        return await self.simple_reply(length)

    async def simple_reply(self, length: int = 0) -> bytes:
        magic, error, _ = struct.unpack(">IIQ", await self.receive(16))
        assert (magic, error) == (0x67446698, 0)
        return await self.receive(length)

    def close(self) -> None:
        self.socket.close()


def descriptors() -> int:
    """How many are open, not counting those of objects nobody can reach any more."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def option_bytes(option: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", OPTION_MAGIC, option, len(data)) + data


def go_data(name: str) -> bytes:
    return struct.pack(">I", len(name.encode())) + name.encode() + b"\0\0"


def request(command: int, offset: int, length: int) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, command, 1, offset, length)


@asynccontextmanager
async def serving(
    engine: object, path: Path, *exports: NbdExport, limits: ServerLimits | None = None
) -> AsyncIterator[NbdServer]:
    async with NbdServer(engine, exports or [export(engine, "disk")], limits=limits) as server:
        await server.listen_unix(path / "nbd.sock")
        yield server


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await main()

    asyncio.run(bounded())


async def tool(*command: str) -> str:
    """Run a client program; its output. It must succeed."""
    process = await asyncio.create_subprocess_exec(*command, stdout=-1, stderr=-2)
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


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


# hand-over


@pytest.mark.parametrize("way", ["EXPORT_NAME", "GO"])
def test_requests_sent_along_with_the_last_option_are_served(engine: object, tmp_path: Path, way: str) -> None:
    async def main() -> None:
        async with serving(engine, tmp_path) as server:
            client = await Client.connect(server)
            last = (
                option_bytes(Option.EXPORT_NAME, b"disk")
                if way == "EXPORT_NAME"
                else option_bytes(Option.GO, go_data(""))
            )
            write = request(WRITE, 512, 4096) + b"w" * 4096
            await client.send(struct.pack(">I", 3) + last + write + request(READ, 512, 4096))
            assert await client.receive(18) == GREETING
            await client.receive(10 if way == "EXPORT_NAME" else 20 + 12 + 20)
            await client.simple_reply()
            assert await client.simple_reply(4096) == b"w" * 4096
            client.close()

    run(main)


def test_the_name_decides_which_device_is_served(engine: object, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(engine, tmp_path, export(engine, "a"), export(engine, "b")) as server:
            writer = await Client.greeted(server)
            await writer.go("b")
            await writer.send(request(WRITE, 0, 1) + b"b")
            await writer.simple_reply()
            for name, byte in (("a", b"\0"), ("b", b"b"), ("", b"\0")):
                reader = await Client.greeted(server)
                await reader.go(name)
                assert await reader.read(0, 1) == byte
                reader.close()
            writer.close()

    run(main)


def test_tcp_connections_are_prompt_kept_alive_and_non_blocking(engine: object) -> None:
    async def main() -> None:
        async with NbdServer(engine, [export(engine, "disk")]) as server:
            await server.listen_tcp("127.0.0.1", 0)
            client = await Client.greeted(server)
            await client.go()
            assert await client.read(0, 512) == bytes(512)
            served = descriptor_of_peer(client.socket)
            assert served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert served.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert fcntl.fcntl(served, fcntl.F_GETFL) & os.O_NONBLOCK
            served.close()
            client.close()

    run(main)


def descriptor_of_peer(client: socket.socket) -> socket.socket:
    """The server's end of a TCP connection, found among this process's descriptors."""
    for entry in os.listdir("/proc/self/fd"):
        try:
            duplicate = os.dup(int(entry))
        except OSError:
            continue
        try:
            found = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)
            continue
        try:
            if found.getpeername() == client.getsockname():
                return found
        except OSError:
            pass
        found.close()
    raise AssertionError("the server has no such connection")


def test_socket_passed_by_systemd_is_served_and_its_file_left(engine: object, tmp_path: Path) -> None:
    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as passed:
            passed.bind(str(tmp_path / "passed.sock"))
            passed.listen()
            async with NbdServer(engine, [export(engine, "disk")]) as server:
                server.adopt(adopt_socket(os.dup(passed.fileno())))
                client = await Client.greeted(server)
                await client.go()
                assert await client.read(0, 512) == bytes(512)
                client.close()
            assert (tmp_path / "passed.sock").is_socket()

    run(main)


@needs_nbdinfo
def test_nbdinfo_lists_exports_through_the_printed_uris(engine: object, tmp_path: Path) -> None:
    async def main() -> None:
        odd = "a b/?#&%ü"
        exports = [export(engine, "disk", description="system"), export(engine, odd, read_only=True)]
        async with serving(engine, tmp_path, *exports) as server:
            await server.listen_tcp("localhost", 0)
            listed = json.loads(await tool("nbdinfo", "--list", "--json", server.uris("")[0]))
            assert [(one["export-name"], one.get("description")) for one in listed["exports"]] == [
                ("disk", "system"),
                (odd, None),
            ]
            for uri in server.uris(odd):
                told = json.loads(await tool("nbdinfo", "--json", uri))
                (one,) = told["exports"]
                assert (one["export-name"], one["export-size"], one["is_read_only"]) == (odd, SIZE, True)
                assert one["contexts"] == ["base:allocation"]
                assert (one["block_size_minimum"], one["block_size_preferred"], one["block_size_maximum"]) == (
                    1,
                    4096,
                    33554432,
                )

    run(main)


@needs_libnbd
@pytest.mark.parametrize("structured", [True, False])
def test_libnbd_reads_what_it_wrote(engine: object, tmp_path: Path, structured: bool) -> None:
    script = f"""
import nbd, sys
h = nbd.NBD()
h.set_request_structured_replies({structured})
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
assert h.get_structured_replies_negotiated() == {structured}
assert h.can_meta_context("base:allocation") == {structured}
assert h.can_df() == {structured}
assert h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero() and h.can_fast_zero()
assert h.can_cache() and h.can_multi_conn() and not h.is_read_only()
h.pwrite(b"x" * 70000, 1000)
assert h.pread(70002, 999) == b"\\0" + b"x" * 70000 + b"\\0"
h.shutdown()
"""

    async def main() -> None:
        async with serving(engine, tmp_path) as server:
            await tool(SYSTEM_PYTHON, "-c", script, server.uris()[0])
            await server.wait_for_last_client()

    run(main)


# exports


def test_exports_come_and_go_for_clients_that_connect_later(engine: object, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(engine, tmp_path, export(engine, "a")) as server:
            before = await Client.greeted(server)
            server.add_export(export(engine, "b"))
            server.remove_export("a")
            after = await Client.greeted(server)
            await before.go("a")
            assert await before.read(0, 1) == b"\0"
            assert (await after.ask(Option.GO, go_data("a")))[0] == Reply.ERR_UNKNOWN
            await after.go("")
            with pytest.raises(UsageError, match="two exports"):
                server.add_export(export(engine, "b"))
            with pytest.raises(UsageError, match="there is no export 'a'"):
                server.remove_export("a")
            before.close()
            after.close()

    run(main)


# bounds


def test_handshake_that_takes_too_long_is_dropped(engine: object, tmp_path: Path, records: Records) -> None:
    async def main() -> None:
        async with serving(engine, tmp_path, limits=ServerLimits(handshake=0.05)) as server:
            silent = await Client.greeted(server)
            assert await silent.at_end()
            assert "unix pid" in await records.seen("the handshake took more than 0.05 s")
            assert server.connections == 0
            silent.close()

    run(main)


def test_one_client_too_many_is_told_why_and_the_next_is_taken(
    engine: object, tmp_path: Path, records: Records
) -> None:
    async def main() -> None:
        async with serving(engine, tmp_path, limits=ServerLimits(connections=2, refusals=1)) as server:
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
    engine: object, tmp_path: Path, records: Records
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CountingLoop)
        async with serving(engine, tmp_path, limits=ServerLimits(accept_retry=3600)) as server:
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
def test_bad_client_ends_alone_and_leaves_nothing_behind(engine: object, tmp_path: Path, sent: bytes) -> None:
    async def main() -> None:
        async with serving(engine, tmp_path) as server:
            good = await Client.greeted(server)
            await good.go()
            assert await good.read(0, 1) == b"\0"
            before = descriptors()
            for _ in range(20):
                bad = await Client.connect(server)
                await bad.send(sent)
                bad.socket.shutdown(socket.SHUT_WR)
                while await bad.receive(1):
                    pass
                bad.close()
            assert server.connections == 1
            assert descriptors() == before
            assert await good.read(0, 1) == b"\0"
            good.close()

    run(main)


def test_many_clients_that_vanish_are_forgotten(engine: object, tmp_path: Path, records: Records) -> None:
    async def main() -> None:
        async with serving(engine, tmp_path) as server:
            first = await Client.greeted(server)  # what the engine opens once and keeps is not counted
            await first.go()
            first.close()
            await server.wait_for_last_client()
            before = descriptors()
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
            assert descriptors() == before

    run(main)


# the end


def test_stop_closes_clients_and_removes_the_socket_file(engine: object, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(engine, tmp_path) as server:
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


def test_client_still_haggling_at_the_stop_is_told_so(engine: object, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(engine, tmp_path) as server:
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


def test_silent_clients_do_not_hold_up_the_stop(engine: object, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(engine, tmp_path, limits=ServerLimits(handshake=3600)) as server:
            silent = [await Client.connect(server) for _ in range(3)]
            for client in silent:
                await client.receive(18)
            assert await server.stop() == 0
            for client in silent:
                assert await client.at_end()
                client.close()

    run(main)


def test_a_client_that_takes_no_replies_is_cut_at_the_end_of_the_stop_and_named(
    engine: object, tmp_path: Path, records: Records
) -> None:
    async def main() -> None:
        async with serving(engine, tmp_path) as server:
            hoarding = await Client.greeted(server)
            await hoarding.go()
            for _ in range(3):
                await hoarding.send(request(READ, 0, SIZE))
            taking = await Client.greeted(server)
            await taking.go()
            await taking.send(request(READ, 0, SIZE))
            while _engine_reads(server) < 2:  # one each: the others wait for room among the replies
                await asyncio.sleep(0)
            stopping = asyncio.create_task(server.stop(0.5))
            assert len(await taking.simple_reply(SIZE)) == SIZE, "one that takes them gets its replies to the end"
            assert await stopping == 0
            assert f"unix pid {os.getpid()}" in (cut := await records.seen("of replies"))
            assert "export 'disk'" in cut
            assert sum("of replies" in line for line in records.lines) == 1
            for client in (hoarding, taking):
                client.close()

    run(main)


def _engine_reads(server: NbdServer) -> int:
    (exported,) = server._exports.values()
    return int(exported.export.stats()["read"]["count"])


def test_last_client_gone_ends_the_wait(engine: object, tmp_path: Path, records: Records) -> None:
    async def main() -> None:
        async with serving(engine, tmp_path) as server:
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
