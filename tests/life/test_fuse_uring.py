"""Files over io_uring end only with their worker. Users get errors, and no request hangs."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.errors import MountError, ResourceError
from faulty_fs import needs_fuse_uring

from .conftest import Life, a_life, info, until

KiB = 1 << 10
SECTORS = 65536
GONE = {errno.ECONNABORTED, errno.ENOTCONN, errno.ECANCELED}
"""What a program is told whose file has ended."""
FIO = "--ioengine=io_uring --direct=1 --rw=randrw --bs=4k --iodepth=16 --time_based --runtime=600 --allow_file_create=0"
Program = Callable[[str, str], str]


@pytest.fixture
def life() -> Iterator[Life]:
    """A supervisor of the test's own, where the kernel has FUSE over io_uring."""
    needs_fuse_uring()
    with a_life() as life:
        yield life


@pytest.fixture
def disk(client: Client) -> Path:
    """A device in memory, as a file."""
    client.create("disk", table=f"0 {SECTORS} ram")
    return Path(client.export("disk", kind="fuse", options={"uring": True}).path)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor, whose close(2) may fail as all else that is asked of a dead file."""
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        with suppress(OSError):
            os.close(descriptor)


def gone(file: int) -> int | None:
    """The errno of a read; None: it was answered."""
    try:
        os.pread(file, 4 * KiB, 0)
    except OSError as error:
        return error.errno
    return None


def kill_worker(client: Client) -> None:
    """Returns when another serves."""
    former = info(client, "disk")
    assert former.worker
    os.kill(former.worker, signal.SIGKILL)
    until(client, "disk", lambda now: now.worker not in {0, former.worker})


def test_a_load_on_a_killed_worker_fails_and_the_file_comes_back(
    client: Client, disk: Path, program: Program, tmp_path: Path
) -> None:
    for kill in range(3):
        with opened(disk, os.O_RDWR) as file:
            os.pwrite(file, bytes([kill + 1]) * 4 * KiB, 0)
            command = [program("fio", "fio"), "--name=load", f"--filename={disk}", *FIO.split()]
            load = subprocess.Popen([*command, "--offset=64k"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
            until(client, "disk", lambda now: now.connections > 1)
            kill_worker(client)
            printed, _ = load.communicate(timeout=60)
            assert load.returncode != 0, printed
            assert gone(file) in GONE
        assert disk.read_bytes()[: 4 * KiB] == bytes([kill + 1]) * 4 * KiB, "the device and its memory live on"
    (export,) = [export for export in info(client, "disk").exports if export.kind == "fuse"]
    assert (export.path, export.details["uring"]) == (str(disk), True)
    client.unexport("disk", str(disk))
    assert not os.path.lexists(disk)
    assert client.export("disk", kind="fuse").path == str(disk), "and it can be exported otherwise"


def test_the_last_to_go_of_worker_and_supervisor_ends_the_file(life: Life, disk: Path) -> None:
    with opened(disk, os.O_RDWR) as file, life.client() as client:
        worker = info(client, "disk").worker
        life.kill()
        assert os.pwrite(file, b"x" * KiB, 0) == KiB, "the worker serves on"
        os.kill(worker, signal.SIGKILL)
        while (error := gone(file)) is None:  # the kernel ends the connection a little later
            pass
        assert error in GONE
    life.start()
    with life.client() as client:
        assert info(client, "disk").state == "FAILED", "its memory went with both"


def test_an_upgrade_is_refused_while_it_is_open_and_makes_it_anew_while_it_is_not(client: Client, disk: Path) -> None:
    former = info(client, "disk").worker
    with disk.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"kept", 0)
        with pytest.raises(ResourceError, match=r"is open .*no other worker can go on with it \(io_uring\)"):
            client.upgrade()
        assert os.pread(file.fileno(), 4, 0) == b"kept"
    assert info(client, "disk").worker == former
    assert client.upgrade() == 1
    assert info(client, "disk").worker != former
    assert disk.read_bytes()[:4] == b"kept"


def test_devices_come_together_without_it(client: Client, disk: Path) -> None:
    client.create("lower", table=f"0 {SECTORS} ram")
    client.create("upper", table=f"0 {SECTORS} linear blkloom:lower 0")
    file = Path(client.export("lower", kind="fuse", options={"uring": True}).path)
    file.open("r+b", buffering=0).close()
    with disk.open("rb"), pytest.raises(MountError, match="is open"):  # of the smaller group, which moves
        client.load("disk", table=f"0 {SECTORS} linear blkloom:upper 0")
    client.load("disk", table=f"0 {SECTORS} linear blkloom:upper 0")
    client.resume("disk")
    with disk.open("r+b", buffering=0) as written:
        os.pwrite(written.fileno(), b"stacked", 0)
    assert file.read_bytes()[:7] == b"stacked"


def test_tables_are_swapped_under_it(client: Client, disk: Path) -> None:
    with disk.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"before", 0)
        client.load("disk", table=f"0 {2 * SECTORS} zero")
        client.resume("disk")
        assert os.fstat(file.fileno()).st_size == 2 * SECTORS * 512
        assert os.pread(file.fileno(), 6, 0) == bytes(6)


def test_it_is_taken_away_from_its_users_by_force_only(client: Client, disk: Path) -> None:
    with opened(disk, os.O_RDONLY) as file:
        with pytest.raises(MountError, match="is open"):
            client.unexport("disk", str(disk))
        assert os.pread(file, 4, 0) == bytes(4)
        client.unexport("disk", str(disk), force=True)
        assert gone(file) in GONE
    assert info(client, "disk").state == "ACTIVE"


def test_the_commands_serve_over_it(blkloom: str, life: Life, client: Client, tmp_path: Path) -> None:
    client.create("disk", table=f"0 {SECTORS} ram")
    export = [blkloom, "--run-dir", str(life.run_dir), "export", "disk"]
    refused = subprocess.run([*export, "--fuse-uring"], capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode
    assert "--fuse-uring needs --fuse" in refused.stderr
    done = subprocess.run([*export, "--fuse", "--fuse-uring"], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stderr, Path(done.stdout.strip()).stat().st_size) == ("", SECTORS * 512)
    served = tmp_path / "served"
    command = [blkloom, "serve", "--ram", "1M", "--fuse", str(served), "--fuse-uring"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert str(served) in process.stdout.readline()
            with served.open("r+b", buffering=0) as file:
                assert os.pwrite(file.fileno(), b"hello", 4096) == 5
                assert os.pread(file.fileno(), 5, 4096) == b"hello"
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not served.exists()
