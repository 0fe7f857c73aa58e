"""The worker's side of a kernel NBD device, with a kernel whose sockets the test has."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

import blkloom
from blkloom import Device, _engine
from blkloom.control.states import ExportState
from blkloom.export import memory_pressure
from blkloom.export.kernel_nbd import driver
from blkloom.export.kernel_nbd.endpoints import connected_pair
from blkloom.export.kernel_nbd.export_server import KernelNbdExportServer
from blkloom.export.kernel_nbd.state import KernelNbdDetails
from blkloom.table import parse_table
from blkloom.targets.registry import builtin_targets

REQUEST, REPLY = struct.Struct(">IIQQI"), struct.Struct(">IIQ")
READ, WRITE, DISCONNECT = 0, 1, 2
CONNECTIONS = 2
TAG = "blkloom-test-1"
"""Of the device."""


class Kernel:
    """As much of the kernel as the server sees: sockets that are replaced when they are dead, and a size."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.size = 0
        self.tag = TAG
        self.timeouts: list[int] = []
        self.replaced = 0

    def tag_of(self, number: int) -> str:
        return self.tag if number == 0 else ""

    def sectors_of(self, number: int) -> int:
        return self.size // 512

    def reconfigure(self, number: int, **wanted: Any) -> None:
        assert (number, wanted["tag"]) == (0, self.tag)
        self.size = wanted.get("size", self.size)
        if "timeout" in wanted:
            self.timeouts.append(wanted["timeout"])
        for descriptor in wanted.get("sockets", ()):
            for index, former in enumerate(self.sockets):
                if former.fileno() < 0:
                    self.sockets[index] = socket.socket(fileno=os.dup(descriptor))
                    self.sockets[index].setblocking(False)
                    self.replaced += 1
                    break

    async def send(self, which: int, kind: int, cookie: int, offset: int, data: bytes = b"", length: int = 0) -> None:
        request = REQUEST.pack(0x25609513, kind, cookie, offset, length or len(data)) + data
        await asyncio.get_running_loop().sock_sendall(self.sockets[which], request)

    async def reply(self, which: int, length: int = 0) -> tuple[int, bytes] | None:
        """Cookie and data of a reply without an error; None if the server has closed the socket, which is dead then."""
        data = b""
        while len(data) < REPLY.size + length:
            more = await asyncio.get_running_loop().sock_recv(self.sockets[which], REPLY.size + length - len(data))
            if not more:
                self.sockets[which].close()
                return None
            data += more
        magic, error, cookie = REPLY.unpack_from(data)
        assert (magic, error) == (0x67446698, 0)
        return cookie, data[REPLY.size :]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    kernel = Kernel()
    for name in ("tag_of", "sectors_of", "reconfigure"):
        monkeypatch.setattr(driver, name, getattr(kernel, name))
    monkeypatch.setattr(memory_pressure, "lacks", str)  # it would lock the memory of the tests
    yield kernel
    for one in kernel.sockets:
        one.close()


class Worker:
    """A device of memory and the server of its export. paused: another worker has served it."""

    def __init__(self, kernel: Kernel, *, paused: bool = False, first: dict[str, int] | None = None) -> None:
        self.device: Device = blkloom.open("0 2048 ram")
        self.engine = _engine.Engine(loops=2)
        self.changes = 0
        if first is None:
            pairs = [connected_pair() for _ in range(CONNECTIONS)]
            kernel.sockets = [kernels for _, kernels in pairs]
            for one in kernel.sockets:
                one.setblocking(False)
            first = {str(index): ours.detach() for index, (ours, _) in enumerate(pairs)}
        state = ExportState(id="e1", name="disk", kind="kernel-nbd", path="/dev/nbd0")
        KernelNbdDetails(tag=TAG, timeout=1, connections=CONNECTIONS, number=0).put(state)
        self.server = KernelNbdExportServer(state, self.device, self.engine, first, self._changed, paused=paused)

    def _changed(self) -> None:
        self.changes += 1

    async def close(self) -> None:
        await self.server.end()
        self.engine.close()
        self.device.close()


@asynccontextmanager
async def working(kernel: Kernel) -> AsyncIterator[Worker]:
    worker = Worker(kernel)
    try:
        await worker.server.ready()
        yield worker
    finally:
        await worker.close()


async def until_all_are_replaced(kernel: Kernel) -> None:
    """Notes that the sockets are dead, as the kernel does, until the server has given others."""
    goal = kernel.replaced + CONNECTIONS  # the first may be replaced before the others are noted
    assert [await kernel.reply(which) for which in range(CONNECTIONS)] == [None] * CONNECTIONS
    while kernel.replaced < goal:
        await asyncio.sleep(0.01)


def test_all_connections_serve_and_the_kernel_is_told_the_size(kernel: Kernel) -> None:
    async def check() -> None:
        async with working(kernel) as worker:
            assert kernel.size == worker.device.size == 1 << 20
            for which in range(CONNECTIONS):
                await kernel.send(which, WRITE, which, 4096 * which, b"%d" % which * 512)
                assert await kernel.reply(which) == (which, b"")
            await kernel.send(0, READ, 7, 4096, length=512)
            assert await kernel.reply(0, 512) == (7, b"1" * 512)
            assert (worker.server.connections, worker.server.gone, kernel.replaced) == (0, False, 0)

    asyncio.run(check())


def test_a_request_that_waits_at_a_suspended_device_is_not_executed_after_it_was_sent_again(kernel: Kernel) -> None:
    async def check() -> None:
        async with working(kernel) as worker:
            worker.device.suspend()
            await kernel.send(0, WRITE, 1, 0, b"a" * 512)
            for _ in range(2):  # more than one time-out
                await until_all_are_replaced(kernel)
                await kernel.send(1, WRITE, 1, 0, b"a" * 512)
            worker.device.resume()
            assert await kernel.reply(1) == (1, b"")
            await kernel.send(0, WRITE, 2, 0, b"b" * 512)
            assert await kernel.reply(0) == (2, b"")
            await kernel.send(0, READ, 3, 0, length=512)
            assert await kernel.reply(0, 512) == (3, b"b" * 512)
            assert set(kernel.timeouts) == {1}, "a suspend makes no time-out longer"

    asyncio.run(check())


def test_connections_that_were_taken_out_go_on_without_a_new_socket(kernel: Kernel) -> None:
    async def check() -> None:
        async with working(kernel) as worker:
            clients = await worker.server.pause(None)
            assert len(clients) == CONNECTIONS
            await kernel.send(0, WRITE, 1, 0, b"a" * 512)
            worker.server.go_on(clients)
            assert await kernel.reply(0) == (1, b"")
            assert kernel.replaced == 0

    asyncio.run(check())


def test_a_worker_that_goes_on_for_a_killed_one_closes_its_sockets_and_gives_others(kernel: Kernel) -> None:
    async def check() -> None:
        pairs = [connected_pair() for _ in range(CONNECTIONS)]
        kernel.sockets = [kernels for _, kernels in pairs]
        for one in kernel.sockets:
            one.setblocking(False)
        await kernel.send(0, WRITE, 1, 0, b"a" * 512)  # the former worker has not received it
        first = {str(index): ours.detach() for index, (ours, _) in enumerate(pairs)}
        worker = Worker(kernel, paused=True, first=first)
        try:
            worker.server.go_on()
            await until_all_are_replaced(kernel)
            await kernel.send(1, READ, 2, 0, length=512)
            assert await kernel.reply(1, 512) == (2, bytes(512)), "it was not sent again"
            while kernel.size != worker.device.size:
                await asyncio.sleep(0.01)
        finally:
            await worker.close()

    asyncio.run(check())


def test_a_device_that_a_user_disconnects_is_gone(kernel: Kernel) -> None:
    async def check() -> None:
        async with working(kernel) as worker:
            for which in range(CONNECTIONS):
                await kernel.send(which, DISCONNECT, 0, 0)
                kernel.sockets[which].shutdown(socket.SHUT_RDWR)
            assert not worker.server.gone, "it has users"
            kernel.tag = ""
            while not worker.changes:
                await asyncio.sleep(0.01)
            assert worker.server.gone

    asyncio.run(check())


def test_connections_serve_the_new_size_of_a_device(kernel: Kernel) -> None:
    async def check() -> None:
        async with working(kernel) as worker:
            worker.device.load(parse_table("0 4096 ram", targets=builtin_targets()))
            worker.device.resume()
            worker.server.device_changed()
            while kernel.size != 2 << 20:
                await asyncio.sleep(0.01)
            await kernel.send(0, READ, 1, (2 << 20) - 512, length=512)
            assert await kernel.reply(0, 512) == (1, bytes(512))
            assert kernel.replaced == 0

    asyncio.run(check())
