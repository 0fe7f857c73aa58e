"""File systems on attached devices go on while workers are killed and replaced, tables swapped and the device grows.

A load writes files in rounds and reads them back; in the end they are there after unmount, check and mount.
`make survival` kills and upgrades more often.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blkloom.control.client import Client
from conformance.file_systems import BTRFS, EXT4, XFS, FileSystem, MiB, mounted, run
from long_runs import LONG

from .attached import Program, life, make_disk
from .conftest import Life, info, until

__all__ = ["life"]
pytestmark = pytest.mark.timeout(0 if LONG else 240)
KILLS, UPGRADES = (50, 20) if LONG else (5, 1)
SYSTEMS = {system.name: system for system in (EXT4, XFS, BTRFS)}


class Load:
    """Writes files, syncs them, reads them back past the page cache, deletes some; until it is stopped."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._random = random.Random(1)
        self._sums: dict[str, str] = {}
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.rounds = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._round()
                self.rounds += 1
        except BaseException as error:
            self._error = error

    def _round(self) -> None:
        name = str(self._random.randrange(20))
        data = self._random.randbytes(self._random.randrange(1, MiB))
        with (self._folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._sums[name] = hashlib.sha256(data).hexdigest()
        read = self._random.choice(sorted(self._sums))
        assert hashlib.sha256((self._folder / read).read_bytes()).hexdigest() == self._sums[read]
        if len(self._sums) > 10:
            gone = self._random.choice(sorted(self._sums))
            (self._folder / gone).unlink()
            del self._sums[gone]

    def wait_for_rounds(self, more: int = 2) -> None:
        """Until it has done that many more."""
        until_then = self.rounds + more
        while self.rounds < until_then:
            assert self._thread.is_alive(), self._error

    def finish(self) -> dict[str, str]:
        """Ends it. The sums of all files."""
        self._stop.set()
        self._thread.join(120)
        assert self._error is None, self._error
        return self._sums


@contextmanager
def loaded(
    client: Client, program: Program, system: FileSystem, device: str, folder: Path
) -> Iterator[tuple[Load, Path]]:
    """A new file system on the device's node, under load in the block. Afterwards it is checked."""
    node = client.attach(device).node.path
    program(system.make[0], system.package)
    run(*system.make, node)
    with mounted(program, system.name, node, folder, "rw") as place:
        load = Load(place)
        try:
            yield load, place
        finally:
            sums = load.finish()
    run(*system.check, node)
    with mounted(program, system.name, node, folder, "ro") as place:
        found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in place.iterdir() if path.is_file()}
    assert found == sums
    client.detach(device)


@pytest.fixture(params=sorted(SYSTEMS))
def system(request: pytest.FixtureRequest) -> FileSystem:
    """The kernel's, one by one."""
    return SYSTEMS[request.param]


def test_a_file_system_goes_on_while_the_worker_is_killed(
    client: Client, program: Program, system: FileSystem, tmp_path: Path
) -> None:
    disk = make_disk(client, tmp_path, system.size)
    with loaded(client, program, system, disk, tmp_path / "m") as (load, _):
        for _ in range(KILLS):
            load.wait_for_rounds()
            before = until(client, disk, lambda found: found.worker != 0).worker
            os.kill(before, signal.SIGKILL)
            until(client, disk, lambda found, before=before: found.worker not in (0, before))  # type: ignore[misc]
        load.wait_for_rounds()
    assert info(client, disk).restarts == KILLS


def test_a_file_system_goes_on_through_upgrade_swap_and_growth(
    client: Client, program: Program, system: FileSystem, tmp_path: Path
) -> None:
    disk = make_disk(client, tmp_path, system.size)
    with loaded(client, program, system, disk, tmp_path / "m") as (load, place):
        for _ in range(UPGRADES):
            load.wait_for_rounds()
            client.upgrade()
        load.wait_for_rounds()
        client.suspend(disk)
        client.resume(disk)
        load.wait_for_rounds()
        size = 2 * system.size
        os.truncate(tmp_path / "disk.img", size)
        client.load(disk, f"0 {size // 512} loop {tmp_path}/disk.img")
        client.resume(disk)
        load.wait_for_rounds()
        found = info(client, disk).node
        assert found is not None
        assert run("blockdev", "--getsize64", found.path) == f"{size}\n"
        grow = {
            "xfs": ("xfs_growfs", str(place)),
            "btrfs": ("btrfs", "filesystem", "resize", "max", str(place)),
        }.get(system.name)  # ext4 would need CAP_SYS_RESOURCE
        if grow is not None:
            before = os.statvfs(place).f_blocks
            run(*grow)
            assert os.statvfs(place).f_blocks > before * 1.5
        load.wait_for_rounds()


def test_a_file_system_goes_on_while_the_supervisor_is_killed(
    client: Client, life: Life, program: Program, tmp_path: Path
) -> None:
    disk = make_disk(client, tmp_path, EXT4.size)
    with loaded_again(client, life, program, disk, tmp_path) as load:
        load.wait_for_rounds()
        life.kill()
        load.wait_for_rounds()
        life.start()
        load.wait_for_rounds()
        with life.client() as again:
            os.kill(until(again, disk, lambda found: found.worker != 0).worker, signal.SIGKILL)
            load.wait_for_rounds()


@contextmanager
def loaded_again(client: Client, life: Life, program: Program, disk: str, tmp_path: Path) -> Iterator[Load]:
    """As `loaded`, for a supervisor that is replaced meanwhile."""
    node = client.attach(disk).node.path
    run(program("mkfs.ext4", "e2fsprogs"), "-q", node)
    with mounted(program, "ext4", node, tmp_path / "m", "rw") as place:
        load = Load(place)
        try:
            yield load
        finally:
            load.finish()
    run(*EXT4.check, node)
    with life.client() as again:
        again.detach(disk)


@pytest.mark.parametrize("system", [EXT4, BTRFS], ids=lambda system: system.name)
def test_a_suspend_freezes_the_file_system(
    client: Client, program: Program, system: FileSystem, tmp_path: Path
) -> None:
    """What is on the device then is clean. A frozen xfs keeps a record in its log, for open files that were deleted."""
    disk = make_disk(client, tmp_path, system.size)
    with loaded(client, program, system, disk, tmp_path / "m") as (load, _):
        load.wait_for_rounds()
        client.suspend(disk)
        rounds = load.rounds
        run("cp", "--sparse=always", tmp_path / "disk.img", tmp_path / "copy.img")
        assert load.rounds <= rounds + 1
        client.resume(disk)
        load.wait_for_rounds()
    run(*system.check, tmp_path / "copy.img")


def test_suspend_with_nolockfs_freezes_nothing(
    client: Client, program: Program, tmp_path: Path, beside: Callable[..., object]
) -> None:
    disk = make_disk(client, tmp_path, EXT4.size)
    with loaded(client, program, EXT4, disk, tmp_path / "m") as (load, _):
        load.wait_for_rounds()
        # No fsfreeze here: it would wait for any sync of the machine, and that for the suspended device.
        client.suspend(disk, lock_fs=False)
        node = info(client, disk).node
        assert node is not None
        assert not node.frozen
        client.resume(disk)
        load.wait_for_rounds()


def test_a_supervisor_that_was_killed_leaves_nothing_frozen_for_ever(
    client: Client, life: Life, program: Program, tmp_path: Path
) -> None:
    disk = make_disk(client, tmp_path, EXT4.size)
    with loaded_again(client, life, program, disk, tmp_path) as load:
        load.wait_for_rounds()
        client.suspend(disk)
        life.kill()
        life.start()
        with life.client() as again:
            assert info(again, disk).state == "SUSPENDED"
            again.resume(disk)
            load.wait_for_rounds()


def test_fstrim_returns_the_space_of_deleted_files(
    client: Client, program: Program, system: FileSystem, tmp_path: Path
) -> None:
    disk = make_disk(client, tmp_path, system.size)
    node = client.attach(disk).node.path
    program(system.make[0], system.package)
    run(*system.make, node)
    with mounted(program, system.name, node, tmp_path / "m", "rw") as place:
        (place / "file").write_bytes(os.urandom(16 * MiB))
        run("sync", "--file-system", place)
        full = (tmp_path / "disk.img").stat().st_blocks * 512
        (place / "file").unlink()
    # Mounted again: XFS frees the blocks of a deleted file in the background, and has done so once it is unmounted.
    with mounted(program, system.name, node, tmp_path / "m", "rw") as place:
        run(program("fstrim", "util-linux"), place)
        assert (tmp_path / "disk.img").stat().st_blocks * 512 <= full - 12 * MiB
    client.detach(disk)
