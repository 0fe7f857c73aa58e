"""Processes are killed while they write to mapped blocks: flushed data is in the file, and the file system is intact.

Each file system is unmounted and checked after the devices are removed.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blkloom.control.client import Client
from conformance.backing_files import write_in_extents
from conformance.file_systems import EXT4, XFS, FileSystem, made_on_a_device
from conformance.nbd_client import WRITE, NbdClient

from .conftest import Life, a_life, until
from .reconnecting import BLOCK, ReconnectingWriter

TURNS = max(2, int(os.environ.get("BLKLOOM_KILLS", "100")) // 30)
BLOCKS = 64
SECTORS = 2 * BLOCKS * BLOCK // 512
pytestmark = pytest.mark.timeout(280)

VICTIMS = ("worker", "supervisor", "both")


@pytest.fixture(params=[EXT4, XFS], ids=lambda kind: kind.name)
def file(request: pytest.FixtureRequest, program: Callable[[str, str], str], tmp_path: Path) -> Iterator[Path]:
    """A file of zeros in many extents, on a file system of its own."""
    kind: FileSystem = request.param
    with made_on_a_device(program, kind, 512, tmp_path) as (place, _):
        path = place / "disk.img"
        write_in_extents(str(path), bytes(SECTORS * 512), extents=24)
        yield path


@pytest.fixture
def life(file: Path) -> Iterator[Life]:
    """Begun after the file system and over before it: workers keep what was mounted when they began."""
    with a_life() as life:
        yield life


def create(client: Client, file: Path, options: str = "1 block_map") -> None:
    client.create("disk", table=f"0 {SECTORS} loop {file} 0 {options}")


def writers_of(life: Life) -> list[ReconnectingWriter]:
    return [ReconnectingWriter(life.socket("disk"), first=half * BLOCKS, blocks=BLOCKS, seed=half) for half in range(2)]


def kill(life: Life, victim: str) -> None:
    """Kills; what was killed is back when this returns."""
    with life.client() as client:
        worker = active(client)
    if victim in ("supervisor", "both"):
        life.kill()
    if victim in ("worker", "both"):
        os.kill(worker, signal.SIGKILL)
    if victim in ("supervisor", "both"):
        life.start()
    with life.client() as client:
        if victim in ("worker", "both"):
            active(client, after=worker)


def active(client: Client, after: int = 0) -> int:
    """The worker of the device, as soon as there is one, and another than `after`."""
    return until(client, "disk", lambda info: info.state == "ACTIVE" and info.worker not in (0, after)).worker


def mode(client: Client) -> str:
    active(client)
    ((_, _, _, text),) = client.status("disk")
    return text.split()[0]


def remove(client: Client) -> None:
    """As soon as its clients have left."""
    client.remove("disk", deferred=True)
    while client.info():
        pass


def is_immutable(path: Path) -> bool:
    """statx(2), which opens nothing and so breaks no lease."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(256)
    at_fdcwd, immutable = -100, 0x10
    if libc.statx(at_fdcwd, os.fsencode(path), 0, 0, buffer):
        raise OSError(ctypes.get_errno(), "statx", str(path))
    attributes: int = struct.unpack_from("=Q", buffer, 8)[0]
    return bool(attributes & immutable)


def test_processes_killed_again_and_again_lose_nothing_that_was_flushed(life: Life, file: Path) -> None:
    with life.client() as client:
        create(client, file)
        assert mode(client) == "block_map"
    assert is_immutable(file)
    writers = writers_of(life)
    for writer in writers:
        writer.start()
    for turn in range(TURNS * len(VICTIMS)):
        for writer in writers:
            writer.wait_for_flushes(1)
        kill(life, VICTIMS[turn % len(VICTIMS)])
    for writer in writers:
        writer.wait_for_flushes(2)
        writer.finish()
    with life.client() as client:
        assert mode(client) == "block_map", "it went on in another mode"
        assert is_immutable(file)
        remove(client)
        assert not is_immutable(file)
        assert client.reap() == []
    assert file.read_bytes() == b"".join(writer.expected() for writer in writers)


def test_another_process_opens_the_file_while_workers_are_killed(life: Life, file: Path) -> None:
    """A process that opens the file gets it in the end, and no write is lost."""
    with life.client() as client:
        create(client, file, "2 block_map immutable=off")
        assert mode(client) == "block_map"
    writers = writers_of(life)
    for writer in writers:
        writer.start()
    for _ in range(TURNS):
        for writer in writers:
            writer.wait_for_flushes(1)
        opener = threading.Thread(target=lambda: os.close(os.open(file, os.O_RDWR)), daemon=True)
        opener.start()
        kill(life, "worker")
        opener.join(120)
        assert not opener.is_alive(), "the file cannot be opened"
        with life.client() as client:
            client.suspend("disk")
            client.resume("disk")
    for writer in writers:
        writer.wait_for_flushes(2)
        writer.finish()
    with life.client() as client:
        remove(client)
        assert client.reap() == []
    assert file.read_bytes() == b"".join(writer.expected() for writer in writers)


def end(pids: set[int]) -> None:
    """Kills, and returns when they have nothing open any more (a process's pidfd is readable then)."""
    with ExitStack() as stack:
        ending = [os.pidfd_open(pid) for pid in pids]
        for descriptor in ending:
            stack.callback(os.close, descriptor)
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        for descriptor in ending:
            readable, _, _ = select.select([descriptor], [], [], 60)
            assert readable, "a process that was killed does not end"


def test_who_goes_on_in_file_mode_can_write(life: Life, file: Path) -> None:
    """The worker was killed, and a process opened the file before the next worker had the lease. The flag must be
    cleared too, because an immutable file cannot be written through its file system.
    """
    with life.client() as client:
        create(client, file)
        worker = until(client, "disk", lambda info: info.worker > 0).worker
        os.kill(worker, signal.SIGSTOP)
        with pytest.raises(BlockingIOError):  # from now on the lease is being broken
            os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        os.kill(worker, signal.SIGKILL)
        until(client, "disk", lambda info: info.worker not in (0, worker))
        assert mode(client) == "file"
        assert not is_immutable(file)
        writer = NbdClient.unix(life.socket("disk"))
        assert writer.ask(WRITE, 0, payload=b"w" * BLOCK).error == 0
        writer.close()
        remove(client)
        assert client.reap() == []
    assert file.read_bytes()[:BLOCK] == b"w" * BLOCK


def abandon(file: Path) -> bytes:
    """Everything that had the file in a block map is killed, and its run directory lost, as in a crash of the
    machine. What was flushed.
    """
    with a_life() as life:
        with life.client() as client:
            create(client, file)
        writers = writers_of(life)
        for writer in writers:
            writer.start()
            writer.wait_for_flushes(2)
        for writer in writers:
            writer.finish()
        life.kill()
        end(life.processes())
        shutil.rmtree(life.run_dir)
        life.run_dir.mkdir(mode=0o700)
    assert is_immutable(file), "there is nothing to release"
    return b"".join(writer.expected() for writer in writers)


def test_a_supervisor_that_starts_releases_what_was_abandoned(file: Path) -> None:
    expected = abandon(file)
    with a_life() as other, other.client() as client:
        assert not is_immutable(file)
        assert client.reap() == []
        assert file.read_bytes() == expected
        create(client, file)
        assert mode(client) == "block_map"
        remove(client)


def test_reap_releases_what_was_abandoned_and_nothing_else(file: Path) -> None:
    used = file.with_name("used.img")
    write_in_extents(str(used), bytes(SECTORS * 512))
    with a_life() as other, other.client() as client:
        create(client, used)
        expected = abandon(file)
        (line,) = client.reap()
        assert str(file) in line
        assert not is_immutable(file)
        assert file.read_bytes() == expected
        assert is_immutable(used)
        assert mode(client) == "block_map"
        assert client.reap() == []
        remove(client)
        assert not is_immutable(used)
