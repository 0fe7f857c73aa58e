"""Copies from and to NBD servers: blkloom's, QEMU's and nbdkit."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .conftest import Copy
from .shapes import K, M, data_of, make

pytestmark = pytest.mark.timeout(120)

SIZE = 8 * M
SHAPE = (SIZE, ((0, 300 * K, True), (4 * M, 64 * K, True), (5 * M, 128 * K, False), (SIZE - 512, 512, True)))
Program = Callable[[str, str], str]
Serve = Callable[..., Any]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk."""
    return make(tmp_path / "disk.img", SHAPE)


@contextmanager
def qemu(program: Program, path: Path, *options: str) -> Iterator[str]:
    """The URI of a raw file, served by QEMU to several connections."""
    socket, pid = path.with_suffix(".sock"), path.with_suffix(".pid")
    command = [program("qemu-nbd", "qemu-utils"), "-t", "-e", "8", "--fork", f"--pid-file={pid}", "-f", "raw", *options]
    subprocess.run([*command, f"--socket={socket}", str(path)], check=True)
    try:
        yield f"nbd+unix:///?socket={socket}"
    finally:
        subprocess.run(["kill", pid.read_text().strip()], check=True)


@contextmanager
def nbdkit(program: Program, folder: Path, *words: str) -> Iterator[str]:
    """The URI of an nbdkit."""
    socket, pid = folder / "nbdkit.sock", folder / "nbdkit.pid"
    command = [program("nbdkit", "nbdkit"), "-U", str(socket), "-P", str(pid), *words]
    subprocess.run(command, check=True)
    try:
        yield f"nbd+unix:///?socket={socket}"
    finally:
        subprocess.run(["kill", pid.read_text().strip()], check=True)


def test_a_served_disk_is_copied_with_its_holes(
    copy: Copy, serve: Serve, program: Program, disk: Path, tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "ours.img", tmp_path / "theirs.img"
    server = serve(disk, "--socket", tmp_path / "s.sock")
    copy(server.uri, ours, "--verify")
    subprocess.run([program("nbdcopy", "libnbd-bin"), server.uri, theirs], check=True)
    assert ours.read_bytes() == disk.read_bytes()
    assert data_of(ours) == data_of(theirs)
    server.stop()
    with qemu(program, disk, "-r") as uri:
        copy("--force", uri, ours)
    assert ours.read_bytes() == disk.read_bytes()


def test_a_server_gets_the_disk_over_old_contents(copy: Copy, program: Program, disk: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.img"
    old.write_bytes(b"\xff" * (SIZE + M))
    with qemu(program, old, "--discard=unmap", "--detect-zeroes=unmap") as uri:
        copy(disk, uri, "--verify")
        image = tmp_path / "back.qcow2"
        copy(uri, image)
        assert "are the same" in copy(uri, uri, status=64).stderr
    assert old.read_bytes() == disk.read_bytes() + b"\xff" * M
    copy(image, tmp_path / "back.img")
    assert (tmp_path / "back.img").read_bytes() == old.read_bytes()


def test_a_server_to_another(copy: Copy, serve: Serve, program: Program, disk: Path, tmp_path: Path) -> None:
    server = serve("--ram", "9M", "--socket", tmp_path / "ram.sock")
    with qemu(program, disk, "-r") as uri:
        copy(uri, server.uri, "--verify")
    copy(server.uri, tmp_path / "back.img")
    assert (tmp_path / "back.img").read_bytes() == disk.read_bytes() + bytes(M)


def test_a_server_that_fails_is_named(copy: Copy, program: Program, disk: Path, tmp_path: Path) -> None:
    words = ["--filter=error", "file", str(disk), "error-pread=EIO", "error-pread-rate=100%"]
    with nbdkit(program, tmp_path, *words) as uri:
        said = copy(uri, tmp_path / "copy.img", status=74).stderr
    assert "read of" in said
    assert "nbdkit.sock" in said


@pytest.mark.parametrize(
    ("words", "expected"), [(["-r", "memory", "8M"], "read-only"), (["memory", "1000"], "not a multiple of 512")]
)
def test_servers_that_cannot_be_targets_are_refused(
    copy: Copy, program: Program, disk: Path, tmp_path: Path, words: list[str], expected: str
) -> None:
    with nbdkit(program, tmp_path, *words) as uri:
        assert expected in copy(disk, uri, status=66).stderr


@pytest.mark.parametrize("options", [["--rate", "1000000"], ["--request-size", "5000"]])
def test_requests_are_whole_blocks_of_a_server_that_takes_no_others(
    copy: Copy, program: Program, disk: Path, tmp_path: Path, options: list[str]
) -> None:
    policy = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-error-policy=error"]
    target = tmp_path / "target.img"
    target.write_bytes(bytes(SIZE))
    make(disk, (SIZE, ((0, 300 * K, True), (SIZE - 4 * K, 4 * K, True))))
    with nbdkit(program, tmp_path, "--filter=blocksize-policy", "file", str(target), *policy) as uri:
        copy(*options, disk, uri)
    assert target.read_bytes() == disk.read_bytes()


def test_no_server_and_no_uri_are_refused(copy: Copy, disk: Path, tmp_path: Path) -> None:
    assert "start the server" in copy(f"nbd+unix:///?socket={tmp_path}/none", tmp_path / "x", status=66).stderr
    assert "write nbd://" in copy(disk, "nbd+unix:///", status=64).stderr
    assert not (tmp_path / "x").exists()
