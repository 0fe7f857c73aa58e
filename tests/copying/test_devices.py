"""Copies from and to devices of a supervisor, and block devices."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blkloom.control.client import Client
from partition_images import mbr

from .conftest import Copy
from .shapes import K, M, make

pytestmark = [pytest.mark.xdist_group("system"), pytest.mark.timeout(120)]

SIZE = 8 * M
SHAPE = (SIZE, ((0, 300 * K, True), (4 * M, 64 * K, True), (SIZE - 512, 512, True)))
Program = Callable[[str, str], str]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk."""
    return make(tmp_path / "disk.img", SHAPE)


@pytest.fixture
def client(copy: Copy, tmp_path: Path) -> Iterator[Client]:
    """A supervisor of the test's own, where `copy` looks for devices."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse is missing or closed")
    with Client(str(tmp_path / "run")) as client:
        yield client
        client.stop()


@pytest.fixture
def node(program: Program, tmp_path: Path) -> Iterator[Path]:
    """A block device with old contents."""
    if os.geteuid():
        pytest.skip("only root makes loop devices")
    losetup = program("losetup", "mount")
    (tmp_path / "block.img").write_bytes(b"\xff" * (SIZE + M))
    made = subprocess.run(
        [losetup, "-f", "--show", tmp_path / "block.img"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr}")
    yield Path(made.stdout.strip())
    subprocess.run([losetup, "-d", made.stdout.strip()], check=True)


def test_devices_are_copied_by_name(copy: Copy, client: Client, disk: Path, tmp_path: Path) -> None:
    client.create("source", table=f"0 {SIZE // 512} loop {disk}")
    client.create("target", table=f"0 {SIZE // 512 + 8} ram")
    copy("source", "blkloom:target", "--verify")
    copy("blkloom:target", tmp_path / "back.img")
    assert (tmp_path / "back.img").read_bytes() == disk.read_bytes() + bytes(4096)
    assert [state.kind for info in client.info() for state in info.exports] == ["nbd", "nbd"], (
        "files of copies are left"
    )
    assert "are the same" in copy("target", "target", status=64).stderr
    client.export("source", kind="fuse")
    copy("source", tmp_path / "again.img")
    assert (tmp_path / "again.img").read_bytes() == disk.read_bytes()


def test_a_device_without_that_name_is_a_file(copy: Copy, client: Client, disk: Path, tmp_path: Path) -> None:
    assert "none not found" in copy("blkloom:none", tmp_path / "x", status=64).stderr
    client.create("small", table="0 8 ram")
    assert "must not be smaller" in copy(disk, "small", status=64).stderr


def test_a_block_device_is_overwritten_and_what_follows_stays(copy: Copy, disk: Path, node: Path) -> None:
    copy(disk, node, "--verify")
    assert node.read_bytes() == disk.read_bytes() + b"\xff" * M


def test_a_copy_to_a_block_device_continues_where_its_state_says(
    copy: Copy, disk: Path, node: Path, tmp_path: Path
) -> None:
    assert "--state" in copy("--resume", disk, node, status=64).stderr
    copy("--state", tmp_path / "state", disk, node)
    assert not (tmp_path / "state").exists()
    assert node.read_bytes()[:SIZE] == disk.read_bytes()


def test_a_mounted_block_device_is_refused(
    copy: Copy, disk: Path, node: Path, program: Program, tmp_path: Path
) -> None:
    subprocess.run([program("mkfs.ext4", "e2fsprogs"), "-q", node], check=True)
    (tmp_path / "mnt").mkdir()
    subprocess.run([program("mount", "mount"), node, tmp_path / "mnt"], check=True)
    try:
        assert "already in use" in copy(disk, node, status=75).stderr
    finally:
        subprocess.run([program("umount", "mount"), tmp_path / "mnt"], check=True)
    copy(disk, node)
    assert node.read_bytes()[:SIZE] == disk.read_bytes()


def test_what_the_source_is_on_is_not_overwritten(copy: Copy, node: Path, tmp_path: Path) -> None:
    """A loop device and its file, which the kernel does not lock; the disk of a partition."""
    image = tmp_path / "block.img"
    before = image.read_bytes()
    assert "is on" in copy("--force", node, image, status=64).stderr
    assert "is on" in copy("-n", node, image, status=64).stderr
    assert "is on" in copy(image, node, status=64).stderr
    assert image.read_bytes() == before


def test_the_disk_of_a_partition_and_the_partition_are_not_copied_to_each_other(
    copy: Copy, node: Path, program: Program
) -> None:
    node.write_bytes(mbr((0, 0x83, 2048, 4096)))
    subprocess.run([program("partx", "util-linux"), "--update", node], check=True)
    part = Path(f"{node}p1")
    try:
        before = node.read_bytes()
        assert "is on" in copy(part, node, status=64).stderr
        assert "is on" in copy(node, part, status=64).stderr
        assert node.read_bytes() == before
    finally:
        subprocess.run([program("partx", "util-linux"), "--delete", node], check=True)


def test_what_a_device_is_on_is_not_overwritten(copy: Copy, client: Client, disk: Path) -> None:
    client.create("lower", table=f"0 {SIZE // 512} loop {disk}", shared=True)
    client.create("middle", table=f"0 {SIZE // 512} linear blkloom:lower 0")
    client.create("upper", table=f"0 {SIZE // 512} linear blkloom:middle 0")
    before = disk.read_bytes()
    assert "is on lower" in copy("upper", "lower", status=64).stderr
    assert f"is on {disk}" in copy("--shared", "--force", "upper", disk, status=64).stderr
    file = client.export("upper", kind="fuse").path
    assert f"is on {disk}" in copy("--shared", "--force", file, disk, status=64).stderr
    assert "is on lower" in copy(file, "lower", status=64).stderr
    assert "is on upper" in copy(file, "upper", status=64).stderr
    assert disk.read_bytes() == before


def test_the_backing_file_of_the_source_is_not_overwritten(
    copy: Copy, disk: Path, program: Program, tmp_path: Path
) -> None:
    overlay, before = tmp_path / "overlay.qcow2", disk.read_bytes()
    words = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(disk), str(overlay)]
    subprocess.run([program("qemu-img", "qemu-utils"), *words], check=True)
    assert f"is on {disk}" in copy("--shared", "--force", overlay, disk, status=64).stderr
    assert f"is on {disk}" in copy("--force", overlay, disk, status=64).stderr
    assert disk.read_bytes() == before
