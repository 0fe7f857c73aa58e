"""The target `nbd` on qemu-nbd, nbdkit, nbd-server and blkloom: contents, limits, holes, restarts and stalls."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

import pytest

import blkloom
from blkloom.errors import BackingError, TableError
from nbd_sources import Source

pytestmark = pytest.mark.timeout(120)

MiB = 1 << 20
SIZE = 16 * MiB
SECTORS = SIZE // 512

Program = Callable[[str, str], str]

NBDKIT = ("nbdkit", "-f")
SOURCES = {
    "nbdkit": (*NBDKIT, "file", "disk.img"),
    "nbdkit, memory": (*NBDKIT, "memory", str(SIZE)),
    "nbdkit, simple replies": (*NBDKIT, "--no-sr", "file", "disk.img"),
    "nbdkit, one connection": (*NBDKIT, "--filter=multi-conn", "file", "disk.img", "multi-conn-mode=disable"),
    "nbdkit, no FUA": (*NBDKIT, "--filter=fua", "memory", str(SIZE)),
    "nbdkit, no zeroes": (*NBDKIT, "--filter=nozero", "file", "disk.img"),
    "nbdkit, blocks of 4096": (
        *NBDKIT, "--filter=blocksize-policy", "file", "disk.img", "blocksize-minimum=4096",
        "blocksize-preferred=65536", "blocksize-maximum=256k", "blocksize-error-policy=error",
    ),
    "qemu-nbd": ("qemu-nbd", "-t", "-f", "raw", "-x", "", "-e", "8", "--discard=unmap", "disk.img"),
    "qemu-nbd, qcow2": ("qemu-nbd", "-t", "-f", "qcow2", "-x", "", "-e", "8", "image.qcow2"),
    "blkloom": ("blkloom", "serve", "disk.img"),
}  # fmt: skip
PACKAGES = {"nbdkit": "nbdkit", "qemu-nbd": "qemu-utils"}


@pytest.fixture
def source(program: Program, blkloom: str, tmp_path: Path) -> Iterator[Callable[[str], Source]]:
    """`source(name)` starts one of SOURCES."""
    with ExitStack() as stack:

        def start(name: str) -> Source:
            command = list(SOURCES[name])
            command[0] = blkloom if command[0] == "blkloom" else program(command[0], PACKAGES[command[0]])
            return stack.enter_context(made(tmp_path, command))

        yield start


def made(folder: Path, command: list[str]) -> Source:
    disk, image = folder / "disk.img", folder / "image.qcow2"
    with disk.open("ab") as file:
        file.truncate(SIZE)
    if "image.qcow2" in command:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
    paths = {"disk.img": str(disk), "image.qcow2": str(image)}
    return Source(folder, *(paths.get(word, word) for word in command))


@contextmanager
def opened(source: Source, options: str = "", *, sectors: int = SECTORS, **settings: bool) -> Iterator[blkloom.Device]:
    with blkloom.open(f"0 {sectors} nbd {source.uri()} {options}", **settings) as device:
        yield device


def failure(request: Callable[[], object]) -> int | None:
    """The errno of a request that fails."""
    try:
        request()
    except OSError as error:
        return error.errno
    pytest.fail("the request did not fail")


def status(device: blkloom.Device) -> str:
    return device.status()[0][3]


@pytest.mark.parametrize("name", SOURCES)
def test_every_server_serves_what_was_written(source: Callable[[str], Source], name: str) -> None:
    chance, model = random.Random(20), bytearray(SIZE)
    with opened(source(name)) as device:
        block = device.limits.logical
        discarded: list[range] = []
        for _ in range(300):
            length = block * chance.choice([1, 1, 2, 7, 16, 100, 300 if block == 512 else 200])
            at = chance.randrange(0, SIZE - length) // block * block
            match chance.choice(["write", "write", "read", "zero", "discard", "flush"]):
                case "write":
                    data = chance.randbytes(length)
                    device.pwrite(data, at, fua=chance.random() < 0.2)
                    model[at : at + length] = data
                case "zero":
                    device.write_zeroes(at, length, unmap=chance.random() < 0.5)
                    model[at : at + length] = bytes(length)
                case "discard":
                    device.discard(at, length)
                    discarded.append(range(at, at + length))
                    model[at : at + length] = device.pread(length, at)
                case "flush":
                    device.flush()
                case _:
                    assert device.pread(length, at) == model[at : at + length]
        device.pwrite(model[: 3 * MiB], MiB)
        model[MiB : 4 * MiB] = model[: 3 * MiB]
        assert device.pread(SIZE, 0) == model
        covered = 0
        for at, length, flags in device.extents():
            assert at == covered
            covered = at + length
            if flags & 2:
                assert not any(model[at:covered])
        assert covered == SIZE


def test_holes_stay_holes(source: Callable[[str], Source]) -> None:
    with opened(source("nbdkit")) as device:
        device.pwrite(b"x" * MiB, 4 * MiB)
        assert device.extents() == [(0, 4 * MiB, 3), (4 * MiB, MiB, 0), (5 * MiB, SIZE - 5 * MiB, 3)]


def test_holes_stay_holes_below_linear_and_in_an_export(source: Callable[[str], Source]) -> None:
    from blkloom.testing.serving import served

    with opened(source("qemu-nbd")) as below:
        below.pwrite(b"x" * MiB, 4 * MiB)
        with served(below) as uri:
            listed = subprocess.run(
                ["nbdinfo", "--map", "--totals", uri], capture_output=True, text=True, check=True
            ).stdout
    assert [line.split()[0] for line in listed.splitlines()] == [str(MiB), str(SIZE - MiB)]


@pytest.mark.parametrize("name", ["nbdkit, one connection", "nbdkit"])
def test_there_are_as_many_connections_as_the_server_allows(source: Callable[[str], Source], name: str) -> None:
    with opened(source(name), "1 connections=3") as device:
        device.pread(512, 0)
        wait_for(device, lambda text: text.startswith("1/1 " if "one" in name else "3/3 "))


def test_a_segment_longer_than_the_export_is_refused(source: Callable[[str], Source]) -> None:
    with pytest.raises(TableError, match=f"it has {SECTORS} sectors"), opened(source("nbdkit"), sectors=SECTORS + 1):
        pass


def test_a_read_only_export_must_be_asked_for(program: Program, tmp_path: Path) -> None:
    kit = program("nbdkit", "nbdkit")
    with made(tmp_path, [kit, "-f", "-r", "file", "disk.img"]) as source:
        with pytest.raises(TableError, match="the export is read-only"), opened(source):
            pass
        with opened(source, "1 read_only=auto") as device:
            assert device.pread(512, 0) == bytes(512)
            assert failure(lambda: device.pwrite(bytes(512), 0)) == errno.EROFS


def test_errors_of_the_server_are_those_of_requests(program: Program, tmp_path: Path) -> None:
    kit = program("nbdkit", "nbdkit")
    errors = ["--filter=error", "memory", str(SIZE), "error-pread=ENOMEM", "error-pread-rate=100%"]
    with made(tmp_path, [kit, "-f", *errors]) as source, opened(source) as device:
        assert failure(lambda: device.pread(512, 0)) == errno.ENOMEM
        device.pwrite(b"x" * 512, 0)


def test_an_unknown_export_and_no_server_are_errors(program: Program, tmp_path: Path) -> None:
    program("qemu-nbd", "qemu-utils")
    with (
        made(tmp_path, ["qemu-nbd", "-t", "-f", "raw", "-x", "disk", "disk.img"]) as source,
        pytest.raises(BackingError, match="no such export"),
    ):
        blkloom.open(f"0 8 nbd {source.uri('other')}")
    with pytest.raises(BackingError, match="No such file"):
        blkloom.open(f"0 8 nbd nbd+unix:///?socket={tmp_path}/nothing")


class Load:
    """Threads that write and verify blocks of their own, until `stop`."""

    THREADS = 4
    BLOCKS = 64

    def __init__(self, device: blkloom.Device) -> None:
        self._device = device
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._rounds = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(self.THREADS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def wait(self, rounds: int) -> None:
        """Waits for so many more writes."""
        for _ in range(rounds):
            assert self._rounds.acquire(timeout=60)
            assert not self._errors

    def _run(self, number: int) -> None:
        chance, newest = random.Random(number), {}
        try:
            while not self._stop.is_set():
                # Blocks overlap: each write covers half of the next block, too.
                block = chance.randrange(self.BLOCKS - 1)
                at = (number * self.BLOCKS + block) * 4096
                data = chance.randbytes(8192)
                self._device.pwrite(data, at)
                newest[block], newest[block + 1] = data[:4096], data[4096:]
                seen = chance.choice(list(newest))
                assert self._device.pread(4096, (number * self.BLOCKS + seen) * 4096) == newest[seen]
                self._rounds.release()
            for block, data in newest.items():
                assert self._device.pread(4096, (number * self.BLOCKS + block) * 4096) == data
        except BaseException as error:
            self._errors.append(error)
            self._rounds.release()


def wait_for(device: blkloom.Device, true: Callable[[str], bool]) -> None:
    """Waits until the status is as wanted: each request to the server takes some time."""
    for _ in range(100_000):
        if true(status(device)):
            return
        device.pread(512, 0)
    pytest.fail(status(device))


RESTARTED = ["nbdkit", "qemu-nbd", "blkloom", "nbdkit, simple replies"]


@pytest.mark.parametrize("name", RESTARTED)
def test_a_load_survives_kills_of_the_server(source: Callable[[str], Source], name: str) -> None:
    server = source(name)
    with opened(server) as device, Load(device) as load:
        for _ in range(4):
            load.wait(50)
            server.kill()
            server.start()
        load.wait(100)
        assert "reconnects 0" not in status(device)


@pytest.mark.parametrize("name", ["nbdkit", "blkloom"])
def test_a_load_survives_stalls_of_the_server(source: Callable[[str], Source], name: str) -> None:
    server = source(name)
    with opened(server, "1 timeout=1") as device, Load(device) as load:
        for _ in range(2):
            load.wait(50)
            server.signal(signal.SIGSTOP)
            lost = status(device)
            while "not answered within" not in lost:
                lost = status(device)
            server.signal(signal.SIGCONT)
            load.wait(100)
            server.kill()  # the next stall has an error of its own
            server.start()


def test_requests_fail_when_the_server_was_away_too_long_and_succeed_when_it_is_back(
    source: Callable[[str], Source],
) -> None:
    server = source("nbdkit")
    with opened(server, "1 reconnect=1") as device:
        device.pwrite(b"x" * 512, 0)
        server.kill()
        assert failure(lambda: device.pread(512, 0)) == errno.EIO
        assert "failing" in status(device)
        server.start()
        while "failing" in status(device):
            pass
        assert device.pread(512, 0) == b"x" * 512


class Proxy:
    """Stands between the target and a server, and disturbs their connections: cuts replies in half, resets, and adds
    garbage. It ends a connection with the client only after the server has ended it.
    """

    def __init__(self, folder: Path, behind: Path) -> None:
        self.path = folder / "proxy.sock"
        self._behind = behind
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(16)
        self._threads = [threading.Thread(target=self._accept)]
        self._sockets: list[socket.socket] = []
        self._chance = random.Random(7)
        self.often = 0.0
        self.disturbed: dict[str, int] = {"half": 0, "end": 0, "garbage": 0}

    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in (self._listener, *self._sockets):
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            self._sockets += (client, server)
            server.connect(str(self._behind))
            for pump in (self._requests, self._replies):
                thread = threading.Thread(target=pump, args=(client, server))
                self._threads.append(thread)
                thread.start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _replies(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                what = self._chance.choice(list(self.disturbed)) if self._chance.random() < self.often else ""
                if what:
                    self.disturbed[what] += 1
                    if what == "garbage":
                        client.sendall(bytes(40))
                    elif what == "half":
                        client.sendall(data[: len(data) // 2])
                    with suppress(OSError):
                        server.shutdown(socket.SHUT_WR)
                    while server.recv(1 << 16):  # until the server has ended it
                        pass
                    break
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("name", ["nbdkit", "blkloom"])
def test_a_load_survives_a_network_that_cuts_replies_in_half(
    source: Callable[[str], Source], tmp_path: Path, name: str
) -> None:
    with (
        Proxy(tmp_path, source(name).path) as proxy,
        blkloom.open(f"0 {SECTORS} nbd {proxy.uri()}") as device,
        Load(device) as load,
    ):
        load.wait(20)
        proxy.often = 0.02
        while min(proxy.disturbed.values()) < 3:
            load.wait(20)
        proxy.often = 0.0
        load.wait(20)


def test_nbd_server_serves_what_was_written(program: Program, tmp_path: Path) -> None:
    """It cannot get its socket from the test, so the test waits for it."""
    server, disk, path = program("nbd-server", "nbd-server"), tmp_path / "disk.img", tmp_path / "server.sock"
    disk.write_bytes(bytes(SIZE))
    configuration = tmp_path / "nbd-server.conf"
    with socket.create_server(("127.0.0.1", 0)) as unused:  # it always listens on a port, too
        port = unused.getsockname()[1]
    configuration.write_text(
        f"[generic]\nunixsock = {path}\nport = {port}\nlistenaddr = 127.0.0.1\n"
        f"[disk]\nexportname = {disk}\nflush = true\nfua = true\n"
    )
    number = tmp_path / "server.pid"
    subprocess.run([server, "-C", configuration, "-p", number], check=True, stderr=subprocess.DEVNULL)
    while not (number.exists() and number.read_text().strip() and path.exists()):
        pass
    try:
        with blkloom.open(f"0 {SECTORS} nbd nbd+unix:///disk?socket={path}") as device:
            data = random.Random(6).randbytes(MiB)
            device.pwrite(data, 4096, fua=True)
            device.flush()
            assert device.pread(MiB, 4096) == data
    finally:
        os.kill(int(number.read_text()), signal.SIGTERM)
    assert disk.read_bytes()[4096 : 4096 + MiB] == data
