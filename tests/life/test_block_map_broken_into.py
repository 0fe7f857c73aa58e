"""Other programs access a file while its blocks are mapped: no byte is lost or written to a wrong place.

fio writes and verifies over NBD all the time. Accesses of other programs break the lease, and the device continues in
file mode. The file system is checked after each test.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blkloom.control.client import Client
from conformance.backing_files import write_in_extents
from conformance.file_systems import EXT4, XFS, FileSystem, made_on_a_device

from .conftest import Life, a_life, until
from .verifying import Verifying

MiB = 1 << 20
SIZE = 16 * MiB
JOBS = 2
pytestmark = pytest.mark.timeout(280)

Program = Callable[[str, str], str]


@pytest.fixture(params=[EXT4, XFS], ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> FileSystem:
    found: FileSystem = request.param
    return found


@pytest.fixture
def file(kind: FileSystem, program: Program, tmp_path: Path) -> Iterator[Path]:
    """In many pieces, and a little longer than the device on it."""
    with made_on_a_device(program, kind, 512, tmp_path) as (place, _):
        path = place / "disk.img"
        write_in_extents(str(path), bytes(SIZE + MiB), extents=100)
        yield path


@pytest.fixture
def life(file: Path) -> Iterator[Life]:
    """Begun after the file system and over before it."""
    with a_life() as life:
        yield life


@pytest.fixture
def fio(program: Program) -> str:
    return program("fio", "fio")


def create(client: Client, file: Path, *options: str) -> None:
    words = ["block_map", *options]
    table = f"0 {SIZE // 512} loop {file} 0 {len(words)} {' '.join(words)}"
    client.create("disk", table=table, shared=True)  # e4defrag skips locked files


def state(client: Client) -> str:
    ((_, _, _, text),) = client.status("disk")
    return text.split()[0]


def mapped_again(client: Client) -> bool:
    """Whether a suspend and resume brings the block map back."""
    client.suspend("disk")
    client.resume("disk")
    return state(client) == "block_map"


def witness(fio: str, life: Life, folder: Path, loops: int) -> Verifying:
    return Verifying(fio, life.socket("disk"), jobs=JOBS, size=SIZE // JOBS, loops=loops, folder=folder)


def open_to_read(file: Path) -> None:
    with file.open("rb") as stream:
        assert len(stream.read(MiB)) == MiB


def open_to_write(file: Path) -> None:
    os.close(os.open(file, os.O_RDWR))


def open_without_waiting(file: Path) -> None:
    """O_NONBLOCK: EWOULDBLOCK begins to break the lease; an open that waits then succeeds."""
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_NONBLOCK))
    except BlockingIOError:
        open_to_read(file)


def truncate(file: Path) -> None:
    """What lies behind the device changes."""
    os.truncate(file, SIZE + MiB // 2)
    os.truncate(file, SIZE + MiB)


def defragment(program: Program, kind: FileSystem, file: Path) -> None:
    """The blocks move: the old ones may soon belong to another file."""
    tool = program("e4defrag", "e2fsprogs") if kind is EXT4 else program("xfs_fsr", "xfsprogs")
    while True:
        done = subprocess.run([tool, "-v", file], capture_output=True, text=True, check=False, timeout=120)
        if done.returncode == 0:
            break
        # e4defrag gives up where the kernel moved nothing because the pages are just being written.
        assert "EXT4_IOC_MOVE_EXT ioctl:Success" in done.stdout + done.stderr, done.stdout + done.stderr
    other = file.with_name("other.img")
    other.write_bytes(b"\xee" * (8 * MiB))
    assert set(other.read_bytes()) == {0xEE}
    os.sync()
    assert set(other.read_bytes()) == {0xEE}
    other.unlink()


def test_another_process_gets_the_file_and_fio_notices_nothing(
    life: Life, file: Path, kind: FileSystem, fio: str, program: Program, tmp_path: Path
) -> None:
    actions: list[Callable[[], None]] = [
        lambda: open_to_read(file),
        lambda: open_to_write(file),
        lambda: open_without_waiting(file),
        lambda: truncate(file),
        lambda: defragment(program, kind, file),
    ]
    done = 0
    with life.client() as client:
        create(client, file, "immutable=off")
        fio_at_work = witness(fio, life, tmp_path, loops=12)
        while fio_at_work.running():
            assert state(client) == "block_map"
            event = client.info("disk")[0].event
            actions[done % len(actions)]()
            assert state(client) == "file"
            until(client, "disk", lambda info, event=event: info.event > event)
            done += 1
            assert mapped_again(client)
        fio_at_work.finish()
        assert done >= len(actions), "fio was faster than those who disturb it"
        client.remove("disk", retry=True)


def test_a_clone_keeps_what_it_was_and_the_device_its_own(
    life: Life, file: Path, kind: FileSystem, fio: str, program: Program, tmp_path: Path
) -> None:
    if kind is not XFS:
        pytest.skip("ext4 has no reflinks")
    clone = file.with_name("clone.img")
    with life.client() as client:
        create(client, file, "immutable=off")
        fio_at_work = witness(fio, life, tmp_path, loops=6)
        while fio_at_work.running():
            subprocess.run(["cp", "--reflink=always", file, clone], check=True, timeout=60)
            before = hashlib.sha256(clone.read_bytes()).digest()
            assert state(client) == "file"
            assert not mapped_again(client), "its extents are shared"
            assert hashlib.sha256(clone.read_bytes()).digest() == before
            os.truncate(clone, 0)  # unlinked only, xfs would free its blocks later
            clone.unlink()
            assert mapped_again(client)
        fio_at_work.finish()
        client.remove("disk", retry=True)


def test_an_immutable_file_cannot_be_written_and_the_map_stays(
    life: Life, file: Path, kind: FileSystem, fio: str, tmp_path: Path
) -> None:
    with life.client() as client:
        create(client, file)
        fio_at_work = witness(fio, life, tmp_path, loops=4)
        refused = 0
        while fio_at_work.running():
            for action in (open_to_write, truncate):
                with pytest.raises(PermissionError):
                    action(file)
                refused += 1
        assert state(client) == "block_map"
        fio_at_work.finish()
        assert refused
        client.remove("disk", retry=True)
    open_to_write(file)


def test_what_was_written_past_the_file_system_is_in_the_file_afterwards(life: Life, file: Path) -> None:
    content = os.urandom(SIZE)
    with life.client() as client:
        assert file.read_bytes()[:SIZE] == bytes(SIZE)  # its pages are cached
        create(client, file)
        uri = f"nbd+unix:///?socket={life.socket('disk')}"
        (source := file.parent.parent / "source").write_bytes(content)
        subprocess.run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, uri], check=True, timeout=60)
        client.remove("disk", retry=True)
    assert file.read_bytes()[:SIZE] == content
