"""File systems of this machine's kernel on devices that blkloom serves, through nbdfuse and a loop device."""

from __future__ import annotations

import hashlib
import os
import random
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from conformance.file_systems import (
    BTRFS,
    EXT4,
    TIMEOUT,
    XFS,
    FileSystem,
    MiB,
    Program,
    loop_device,
    mounted,
    run,
)


@pytest.fixture
def mounting(program: Program) -> None:
    """Skips where nothing can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a loop device needs root")
    for device in ("/dev/fuse", "/dev/loop-control"):
        try:
            os.close(os.open(device, os.O_RDWR))
        except OSError as error:
            pytest.skip(f"{device} cannot be used: {error.strerror}")
    for name, package in [("nbdfuse", "libnbd-bin"), ("fusermount3", "fuse3"), ("losetup", "mount")]:
        program(name, package)


@contextmanager
def as_file(program: Program, uri: str, directory: Path) -> Iterator[Path]:
    """The device as a file, through nbdfuse, an NBD client of others."""
    mountpoint, ready = directory / "fuse", directory / "fuse.pid"
    mountpoint.mkdir()
    # nbdfuse writes its process id when it is mounted: into a FIFO, that is something to wait for.
    os.mkfifo(ready)
    command = [program("nbdfuse", "libnbd-bin"), "--pidfile", str(ready), str(mountpoint), uri]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            wait_until_mounted(process, ready)
            yield mountpoint / "nbd"
            run(program("fusermount3", "fuse3"), "-u", mountpoint)
            _, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, errors.decode()
        finally:
            if process.poll() is None:
                subprocess.run(["fusermount3", "-u", "-z", mountpoint], check=False, timeout=TIMEOUT)
                process.kill()


def wait_until_mounted(process: subprocess.Popen[bytes], ready: Path) -> None:
    assert process.stderr is not None
    errors = process.stderr.fileno()
    fifo = os.open(ready, os.O_RDONLY | os.O_NONBLOCK)
    try:
        woken, _, _ = select.select([fifo, errors], [], [], TIMEOUT)
        assert fifo in woken, f"nbdfuse did not come up: {os.read(errors, 65536).decode() if woken else 'no word'}"
    finally:
        os.close(fifo)


def fill(directory: Path, seed: int) -> None:
    """Files of many sizes, some removed and some renamed again, and all durable."""
    content = random.Random(seed)
    for number, size in enumerate([0, 1, 511, 4095, 4096, 65537, 3_000_001, 9_000_000]):
        folder = directory / f"folder{number % 3}"
        folder.mkdir(exist_ok=True)
        (folder / str(size)).write_bytes(content.randbytes(size))
    (directory / "folder0" / "4095").rename(directory / "renamed")
    shutil.rmtree(directory / "folder1")
    (directory / "link").symlink_to("folder2")
    for file in files_of(directory):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def files_of(directory: Path) -> list[Path]:
    return sorted(file for file in directory.rglob("*") if file.is_file() and not file.is_symlink())


def sums(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files_of(directory)
    }


@pytest.mark.usefixtures("mounting")
@pytest.mark.parametrize("file_system", [EXT4, XFS, BTRFS], ids=lambda file_system: file_system.name)
def test_a_file_system_made_through_nbd_is_whole_in_the_backing_file(
    file_system: FileSystem, program: Program, serve: Callable[..., Any], tmp_path: Path
) -> None:
    disk = tmp_path / "disk.img"
    disk.touch()
    os.truncate(disk, file_system.size)
    make, *make_options = file_system.make
    check, *check_options = file_system.check

    server = serve(disk, "--socket", tmp_path / "nbd.sock")
    with ExitStack() as stack:
        file = stack.enter_context(as_file(program, server.uri, tmp_path))
        device = stack.enter_context(loop_device(program, file))
        run(program(make, file_system.package), *make_options, device)
        place = stack.enter_context(mounted(program, file_system.name, device, tmp_path / "mounted", "rw"))
        fill(place, seed=7)
        before = sums(place)
    server.stop()

    assert len(before) == 5
    run(program(check, file_system.package), *check_options, disk)
    with mounted(program, file_system.name, disk, tmp_path / "mounted", "loop,ro") as place:
        assert sums(place) == before


@pytest.mark.usefixtures("mounting")
def test_a_file_system_lives_across_segments_and_a_restart_of_the_server(
    program: Program, serve: Callable[..., Any], tmp_path: Path
) -> None:
    first, second = tmp_path / "first.img", tmp_path / "second.img"
    first.write_bytes(bytes(20 * MiB))
    second.write_bytes(b"\xaa" * MiB + bytes(44 * MiB) + b"\xbb" * MiB)
    table = f"0 {20 * 2048} loop {first}\n{20 * 2048} {44 * 2048} linear {second} 2048"

    server = serve("--table", table, "--socket", tmp_path / "nbd.sock")
    with as_file(program, server.uri, tmp_path) as file:
        run(program("mkfs.ext4", "e2fsprogs"), "-q", "-F", file)
        with (
            loop_device(program, file) as device,
            mounted(program, "ext4", device, tmp_path / "mounted", "rw") as place,
        ):
            fill(place, seed=8)
            before = sums(place)
    server.stop()

    server = serve("--table", table, "--read-only", "--socket", tmp_path / "nbd.sock")
    again = tmp_path / "again"
    again.mkdir()
    with (
        as_file(program, server.uri, again) as file,
        loop_device(program, file) as device,
        mounted(program, "ext4", device, tmp_path / "mounted", "ro") as place,
    ):
        assert sums(place) == before
    server.stop()

    held = second.read_bytes()
    assert held[:MiB] == b"\xaa" * MiB
    assert held[45 * MiB :] == b"\xbb" * MiB
    whole = tmp_path / "whole.img"
    whole.write_bytes(first.read_bytes() + held[MiB : 45 * MiB])
    run(program("e2fsck", "e2fsprogs"), "-f", "-n", whole)
