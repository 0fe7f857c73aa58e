"""Memory for the requests of clients: all clients share one budget, even if they leave requests unfinished."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

import blkloom
from blkloom import _engine
from blkloom.export.nbd.server import NbdServer, ServerLimits
from blkloom.export.nbd.session import NbdExport
from blkloom.memory import default_budget
from blkloom.table.syntax import word
from blkloom.targets.load_context import LoadContext
from blkloom.targets.loaded import LoadedTarget
from blkloom.targets.spec import TargetSpec
from blkloom.units import Bytes

from .nbd_client import FUA, READ, WRITE, NbdClient, Style

MIB = 1 << 20
SIZE = 64 * MIB
LARGE = 32 * MIB
STALLED = 32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file without holes: these would be sent as such."""
    file = tmp_path / "disk.img"
    file.write_bytes(os.urandom(MIB) * (SIZE // MIB))
    return file


@pytest.fixture
def stall() -> Iterator[Callable[[Path], None]]:
    """Connects clients that send half of a large durable write, and others that take no large replies."""
    with ExitStack() as stack:

        def stall(sock: Path) -> None:
            half = bytes(LARGE // 2)
            for number in range(2 * STALLED):
                client = NbdClient.unix(sock, style=Style.SIMPLE)
                stack.callback(client.close)
                if number % 2:
                    client.send(READ, 0, LARGE)
                else:
                    client.socket.setblocking(False)
                    client.socket.sendall(struct.pack(">IHHQQI", 0x25609513, FUA, WRITE, 1, 0, LARGE))
                    with suppress(BlockingIOError):  # what the server does not take
                        client.socket.sendall(half)

        yield stall


def well_behaved(sock: Path) -> None:
    client = NbdClient.unix(sock)
    for number in range(100):
        data = bytes([number]) * 65536
        assert client.ask(WRITE, number * 65536, payload=data).error == 0
        assert client.ask(READ, number * 65536, 65536).data == data
    client.disconnect()


def peak(pid: int, what: str) -> int:
    """Bytes. Source: proc_pid_status(5)."""
    (found,) = re.findall(rf"^{what}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found) * 1024


def test_stalled_clients_stay_within_the_budget_and_another_is_served(
    serve: Callable[..., Any], path: Path, tmp_path: Path, stall: Callable[[Path], None]
) -> None:
    sock = tmp_path / "nbd.sock"
    server = serve("--client-memory=128M", "--stall-timeout=600", "--stats=json", "--socket", sock, path)
    well_behaved(sock)
    before = peak(server.process.pid, "VmHWM")
    stall(sock)
    well_behaved(sock)
    assert peak(server.process.pid, "VmHWM") - before < 128 * MIB + 16 * MIB
    server.process.send_signal(signal.SIGTERM)
    printed, _ = server.process.communicate()
    (export,) = json.loads(printed).values()
    assert export["memory"]["budget"] == 128 * MIB


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of 256 MiB."""
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    if "memory" in groups:
        parent, file = Path("/sys/fs/cgroup/memory") / groups["memory"].lstrip("/"), "memory.limit_in_bytes"
    else:
        parent, file = Path("/sys/fs/cgroup") / groups.get("", "/").lstrip("/"), "memory.max"
    group = parent / f"blkloom-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        if not (group / file).exists():
            pytest.skip(f"{parent} gives its groups no limits of memory (cgroup.subtree_control)")
        (group / file).write_text(str(256 * MIB))
        yield group
    finally:
        group.rmdir()


def test_in_a_control_group_the_budget_fits_its_limit(
    blkloom: str, path: Path, tmp_path: Path, stall: Callable[[Path], None], memory_group: Path
) -> None:
    sock = tmp_path / "nbd.sock"
    command = ["/bin/sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', memory_group, blkloom, "serve"]
    command += ["--stall-timeout=600", "--stats=json", "--socket", sock, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        assert server.stdout.readline().startswith("nbd+unix")
        stall(sock)
        well_behaved(sock)
        server.send_signal(signal.SIGTERM)
        printed, _ = server.communicate()
    assert server.returncode == 0
    (export,) = json.loads(printed).values()
    assert export["memory"]["budget"] == min(64 * MIB, default_budget())


class Remote(TargetSpec):
    """Reads and writes an export as a client."""

    socket: str

    name = "remote"
    arguments = (word("socket"),)

    def load(self, context: LoadContext, start: Bytes, length: Bytes) -> LoadedTarget:
        return LoadedRemote(self, [(Bytes(0), length, _engine.Extent.fault())])


class LoadedRemote(LoadedTarget):
    spec: Remote
    writes = True
    _client: NbdClient | None = None

    def _ask(self, *request: Any, **how: Any) -> bytes:
        self._client = self._client or NbdClient.unix(self.spec.socket)
        reply = self._client.ask(*request, **how)
        assert reply.error == 0
        return reply.data

    def read(self, offset: Bytes, length: Bytes) -> bytes:
        return self._ask(READ, offset, length)

    def write(self, offset: Bytes, data: bytes, *, fua: bool) -> None:
        self._ask(WRITE, offset, payload=data, flags=FUA if fua else 0)

    def close(self) -> None:
        if self._client:
            self._client.close()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """`start_server(engine, **devices)`: on an event loop of its own, a socket for each device."""
    with ExitStack() as stack:

        def start(engine: _engine.Engine, **devices: blkloom.Device) -> None:
            listening: Future[asyncio.AbstractEventLoop] = Future()
            end = asyncio.Event()

            async def main() -> None:
                async with ServerStack(engine, tmp_path, devices):
                    listening.set_result(asyncio.get_running_loop())
                    await end.wait()

            thread = threading.Thread(target=asyncio.run, args=(main(),))
            thread.start()
            loop = listening.result()
            stack.callback(thread.join)
            stack.callback(loop.call_soon_threadsafe, end.set)

        yield start


class ServerStack:
    """A server a device."""

    def __init__(self, engine: _engine.Engine, folder: Path, devices: dict[str, blkloom.Device]) -> None:
        self._folder = folder
        limits = ServerLimits(stall=600)
        self._servers = {
            name: NbdServer(engine, [NbdExport("", _engine.Export(device))], limits=limits)
            for name, device in devices.items()
        }

    async def __aenter__(self) -> None:
        for name, server in self._servers.items():
            await server.listen_unix(self._folder / name)

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers.values():
            await server.stop()


@pytest.mark.parametrize("length", [256 << 10, 20 * MIB])
def test_a_device_that_is_a_client_of_another_in_its_process_goes_on_at_the_limit(
    start_server: Callable[..., None], tmp_path: Path, length: int
) -> None:
    engine = blkloom.Engine(memory=8 * MIB)
    with ExitStack() as stack:
        stack.callback(engine.close)
        bottom = stack.enter_context(blkloom.open(f"0 {SIZE // 512} ram", engine=engine))
        over = [f"0 {SIZE // 512} remote {tmp_path / below}" for below in ("bottom", "middle")]
        middle, top = (stack.enter_context(blkloom.open(table, engine=engine, targets=[Remote])) for table in over)
        start_server(engine, bottom=bottom, middle=middle, top=top)

        def write_and_read(number: int) -> None:
            client = NbdClient.unix(tmp_path / "top")
            data = bytes([number]) * length
            cookies = [client.send(WRITE, number * length, payload=data) for _ in range(2)]
            assert sorted(client.receive()[0] for _ in cookies) == cookies
            assert client.ask(READ, number * length, length).data == data
            client.disconnect()

        with ThreadPoolExecutor() as pool:
            list(pool.map(write_and_read, range(2 if length > MIB else 16)))
        assert engine.memory()["waiting"] == 0
