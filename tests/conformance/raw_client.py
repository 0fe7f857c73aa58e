"""Raw NBD clients of a server in this process."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from blkloom import _engine
from blkloom.export.nbd.codes import NBD_MAGIC, OPTION_MAGIC, REPLY_MAGIC, Option, Reply
from blkloom.export.nbd.server import NbdServer, ServerLimits
from blkloom.export.nbd.session import NbdExport

SIZE = 1 << 20
"""Bytes of each device."""
READ, WRITE, DISCONNECT = 0, 1, 2
GREETING = struct.pack(">QQH", NBD_MAGIC, OPTION_MAGIC, 3)


def export(engine: _engine.Engine, name: str, *, read_only: bool = False, description: str = "") -> NbdExport:
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


def option_bytes(option: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", OPTION_MAGIC, option, len(data)) + data


def go_data(name: str) -> bytes:
    return struct.pack(">I", len(name.encode())) + name.encode() + b"\0\0"


def request(command: int, offset: int, length: int) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, command, 1, offset, length)


@asynccontextmanager
async def serving(
    engine: _engine.Engine, path: Path, *exports: NbdExport, limits: ServerLimits | None = None
) -> AsyncIterator[NbdServer]:
    async with NbdServer(engine, exports or [export(engine, "disk")], limits=limits) as server:
        await server.listen_unix(path / "nbd.sock")
        yield server


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await main()

    asyncio.run(bounded())
