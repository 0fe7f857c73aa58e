"""The commands of docs/vhost-user.md, as they are written, with Linux in QEMU.

Overlays over one base image; a disk that grows, and of which a snapshot is made, while the virtual machine runs; the
same disk mounted on the host.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from guest import Guest
from machine_disks import PAGE, qemu_options

from blkloom import Client
from blkloom.testing.serving import supervised
from conformance.file_systems import MiB, needs_root, run
from documented import blocks
from faulty_fs import needs_fuse

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(600)]
BASE, MORE = 32 * MiB, 64 * MiB
WORDS = "in the base image\n"

SCRIPT = """
hear() { until test -e "$1"; do sleep 0.2; done; }

test "$(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial)" = "one two"
mkdir /run/one /run/two
mount -t ext4 /dev/vda /run/one
mount -t ext4 /dev/vdb /run/two
cat /run/one/words /run/two/words
echo changed > /run/two/words
touch mounted
hear grown
until test "$(blockdev --getsize64 /dev/vda)" = SIZE; do sleep 0.2; done
resize2fs /dev/vda 2> /dev/null
head -c 50000000 /dev/urandom > /run/one/large
sha256sum < /run/one/large > sum
sync -f /run/one/large
touch synced
until test -e taken; do
    head -c 1000000 /dev/urandom > /run/one/changing
done
rm /run/one/large
sync -f /run/one
touch removed
hear seen
echo last > /run/one/words
ls /run/two
umount /run/one /run/two
e2fsck -fn /dev/vda 2> /dev/null
e2fsck -fn /dev/vdb 2> /dev/null
"""


class Shell:
    """Runs documented commands on the host, in a folder, with the supervisor of the test."""

    def __init__(self, client: Client, folder: Path) -> None:
        self._folder = folder
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self._environment = os.environ | {"BLKLOOM_RUN_DIR": str(client.run_dir.path), "PATH": path}

    def __call__(self, commands: str) -> None:
        done = subprocess.run(
            ["bash", "-eux", "-o", "pipefail", "-c", commands],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


@pytest.fixture
def folder(guest: Guest) -> Iterator[Path]:
    """Of the images. Nothing is mounted in it afterwards."""
    needs_root("a disk on the host")
    needs_fuse()
    yield guest.directory
    if os.path.ismount(guest.directory / "mnt"):
        run("umount", "--lazy", guest.directory / "mnt")


def test_the_documented_recipes(guest: Guest, program: Callable[[str, str], str], folder: Path) -> None:
    for name, package in (("mkfs.ext4", "e2fsprogs"), ("qemu-img", "qemu-utils"), ("mount", "mount")):
        program(name, package)
    overlays, growth, (take, delete), (there, back) = (
        blocks(PAGE, "sh", title)
        for title in (
            "One base image, several virtual machines",
            "A larger disk while the virtual machine runs",
            "A snapshot while the virtual machine runs",
            "The disk on the host",
        )
    )
    make_base(folder)
    before = digest(folder / "base.qcow2")
    with supervised() as client, ThreadPoolExecutor(1) as pool:
        shell = Shell(client, folder)
        shell(overlays[0])
        paths = [export.path for name in ("one", "two") for export in client.info(name)[0].exports[1:]]
        assert paths == [str(client.run_dir.vhost_socket(name)) for name in ("one", "two")]
        machine = dataclasses.replace(guest, options=qemu_options(guest.memory, *paths))
        script = SCRIPT.replace("SIZE", str(BASE + MORE))
        running = pool.submit(machine.run, script, modules=["virtio_blk", "ext4"], timeout=300)
        until_there(folder / "mounted", running)
        shell(growth[0])
        (folder / "grown").touch()
        until_there(folder / "synced", running)
        shell(take)
        (folder / "taken").touch()
        until_there(folder / "removed", running)
        assert digest(folder / "mnt" / "large") == (folder / "sum").read_text().split()[0]
        unmount(shell, client, "before", delete)
        (folder / "seen").touch()
        printed = running.result()
        assert printed.startswith(WORDS * 2), printed
        assert "large" not in printed
        shell(there)
        assert (folder / "mnt" / "words").read_text() == "last\n"
        assert os.statvfs(folder / "mnt").f_blocks * os.statvfs(folder / "mnt").f_frsize > BASE
        unmount(shell, client, "one", back)
    assert digest(folder / "base.qcow2") == before
    for name in ("base", "one", "two"):
        run("qemu-img", "check", "-q", folder / f"{name}.qcow2")


def make_base(folder: Path) -> None:
    """A file system with one file, as an image."""
    (folder / "contents").mkdir()
    (folder / "contents" / "words").write_text(WORDS)
    raw = folder / "base.img"
    run("mkfs.ext4", "-q", "-d", folder / "contents", raw, str(BASE // 1024))
    run("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, folder / "base.qcow2")


def unmount(shell: Shell, client: Client, device: str, commands: str) -> None:
    """Runs commands whose first one unmounts. Between it and the others, the file system is checked."""
    first, _, others = commands.partition("\n")
    assert first == "umount mnt"
    shell(first)
    node = client.info(device)[0].node
    assert node is not None
    shell(f"e2fsck -fn {node.path}")
    shell(others)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def until_there(path: Path, running: Future[str]) -> None:
    """Waits until the virtual machine has made a file. Raises its error if it has ended before."""
    while not path.exists():
        if wait([running], timeout=0.05).done:
            running.result()
            raise AssertionError(f"the virtual machine has ended without {path.name}")
