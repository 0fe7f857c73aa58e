"""Autoclear of devices with a node: both go after the last user of the node has left, and not before the first."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom.control.client import Client
from conformance.file_systems import mounted, run
from conformance.nbd_client import NbdClient

from .attached import SIZE, Program, is_there, life, loop_devices, said, write_and_sync
from .conftest import Life, info, until
from .loop_commands import Loop, until_gone

__all__ = ["life"]
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def loop(blkloom: str, life: Life) -> Loop:
    """`blkloom loop ...`, which attaches."""
    return Loop(blkloom, life.run_dir, attach=True)


@pytest.fixture
def image(tmp_path: Path, program: Program) -> Path:
    """An ext4 in a file."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    run(program("mkfs.ext4", "e2fsprogs"), "-q", path)
    (tmp_path / "m").mkdir()
    return path


@pytest.mark.parametrize("options", ["rw", "ro"])
def test_a_mount_and_an_unmount_leave_nothing(
    blkloom: str, life: Life, client: Client, image: Path, options: str
) -> None:
    place = image.parent / "m"
    script = "set -e; mount -o $4 $($1 loop -f --show --autoclear $2) $3; umount $3"
    run("env", f"BLKLOOM_RUN_DIR={life.run_dir}", "sh", "-c", script, "sh", blkloom, image, place, options)
    until_gone(client, "loop0")
    assert loop_devices(life) == []
    assert list((life.run_dir / "nodes").iterdir()) == []


def test_it_stays_until_a_first_user_and_while_it_is_used(loop: Loop, client: Client, image: Path, life: Life) -> None:
    node = loop("-f", "--show", "--autoclear", image).strip()
    with mounted(_found, "ext4", node, image.parent / "m", "rw") as place:
        until(client, "loop0", lambda found: found.node is not None and found.node.used)
        life.kill()
        write_and_sync(place / "file")
        life.start()
        with life.client() as again:
            assert info(again, "loop0").autoclear
            nbd = NbdClient.unix(life.socket("loop0"))
            until(again, "loop0", lambda found: found.connections == 1)
    with life.client() as again:
        assert info(again, "loop0").node is not None  # of use to the client that is left
        nbd.disconnect()
        until_gone(again, "loop0")
    assert not is_there(node)


def _found(name: str, package: str) -> str:
    return name


def test_a_process_that_has_written_was_a_user(loop: Loop, client: Client, image: Path) -> None:
    node = loop("-f", "--show", "--autoclear", image).strip()
    subprocess.run(["dd", "if=/dev/zero", f"of={node}", "bs=4096", "count=1", "oflag=direct"], check=True, stderr=-3)
    until_gone(client, "loop0")
    assert not is_there(node)


def test_the_partitions_of_the_kernel_are_its_users(
    blkloom: str, loop: Loop, client: Client, tmp_path: Path, program: Callable[[str, str], str], life: Life
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    sfdisk = program("sfdisk", "fdisk")
    subprocess.run([sfdisk, "--quiet", path], input="start=2048, size=65536\n", text=True, check=True)
    node = loop("-f", "--show", "-P", "--autoclear", path).strip()
    run(program("mkfs.ext4", "e2fsprogs"), "-q", f"{node}p1")
    with mounted(program, "ext4", f"{node}p1", tmp_path / "m", "rw") as place:
        write_and_sync(place / "file")
        assert said(blkloom, life, "ls").count("\n") == 2
    until_gone(client, "loop0", "loop0p1")
    assert not is_there(node)


def test_one_that_is_detached_is_removed(loop: Loop, client: Client, image: Path) -> None:
    loop("-f", "--show", "--autoclear", image)
    client.detach("loop0")
    until_gone(client, "loop0")
