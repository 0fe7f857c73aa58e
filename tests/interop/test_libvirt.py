"""libvirt's driver for QEMU starts a virtual machine with the XML that docs/vhost-user.md shows, without KVM.

The virtual machine has no system: its BIOS runs the program in the boot sector of its disk.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from blkloom import Client
from blkloom.control.states import DeviceInfo
from blkloom.testing.serving import supervised
from conformance.file_systems import MiB, needs_root, run
from documented import ROOT, blocks

PAGE = "docs/vhost-user.md"
SOCKET, GROUP = "/srv/vm/disk.sock", "libvirt-qemu"
GROUP_ID = 64055
"""Debian's; on this machine it has no name."""
PATIENCE = 100.0
SECTOR = 512
COUNT = bytes.fromhex(
    "31c0 8ec0 8ed8"  # xor ax, ax; mov es, ax; mov ds, ax
    "bb007e b80102 b90200 b600 cd13"  # read sector 1 of the boot disk to 7e00 (int 13, ah=2)
    "fe06007e"  # inc byte [7e00]
    "bb007e b80103 b90200 b600 cd13"  # write it
    "f4 ebfd"  # hlt, for ever
)
"""Program in the boot sector: counts in the first byte of the next sector how often it ran."""

pytestmark = pytest.mark.timeout(300)


def test_a_domain_starts_and_its_disk_survives_the_death_of_a_worker(
    program: Callable[[str, str], str], blkloom: str
) -> None:
    virsh = ROOT / ".cache/qemu/virsh"
    if not virsh.exists():
        pytest.skip(f"{virsh} is missing (make test-tools; needs Debian's archive, for amd64)")
    program("qemu-system-x86_64", "qemu-system-x86")
    needs_root("libvirt without its packages")
    with tempfile.TemporaryDirectory(prefix="blk") as name, supervised() as client:
        folder = Path(name)
        folder.chmod(0o711)  # QEMU runs as another user
        socket = folder / "disk.sock"
        (folder / "disk.img").write_bytes(COUNT.ljust(510, b"\0") + b"\x55\xaa" + bytes(MiB - SECTOR))
        client.create("disk", table=f"0 {MiB // SECTOR} loop {folder}/disk.img")
        export_as_documented(blkloom, client, socket)
        (text,) = blocks(PAGE, "xml", "libvirt")
        domain = folder / "domain.xml"
        domain.write_text(replaced(replaced(text, SOCKET, str(socket)), "type='kvm'", "type='qemu'"))
        with libvirt(folder, virsh.parent) as commands:
            print(f"define --validate {domain}\nstart vm", file=commands, flush=True)
            until(client, lambda _: boots(client) == 1)
            worker = client.info("disk")[0].worker
            os.kill(worker, signal.SIGKILL)
            until(client, lambda found: found.worker not in {0, worker} and found.connections == 1)
            print("reset vm", file=commands, flush=True)
            until(client, lambda _: boots(client) == 2)
            client.upgrade()
            print("reset vm", file=commands, flush=True)
            until(client, lambda _: boots(client) == 3)
            print("destroy vm", file=commands, flush=True)
        until(client, lambda found: found.connections == 0)


def export_as_documented(blkloom: str, client: Client, socket: Path) -> None:
    """Runs the documented command for a socket that libvirt's QEMU may use."""
    commands = [line for block in blocks(PAGE, "sh") for line in block.splitlines() if GROUP in line]
    first, *words = replaced(replaced(commands[0], SOCKET, str(socket)), GROUP, str(GROUP_ID)).split()
    assert first == "blkloom"
    run("env", f"BLKLOOM_RUN_DIR={client.run_dir.path}", blkloom, *words)
    assert (socket.stat().st_gid, socket.stat().st_mode & 0o777) == (GROUP_ID, 0o660)


def replaced(text: str, old: str, new: str) -> str:
    assert old in text, f"{PAGE} does not have {old}"
    return text.replace(old, new)


@contextmanager
def libvirt(folder: Path, qemu: Path) -> Iterator[IO[str]]:
    """virsh with the driver in it: takes commands until the end of the block. All of them must succeed."""
    script = Path(__file__).with_name("libvirt_namespaces.sh")
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with (folder / "virsh.log").open("w+") as log:
        process = subprocess.Popen(
            [*namespaces, "bash", script, folder, qemu],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdin is not None
        try:
            yield process.stdin
            process.stdin.close()
            status = process.wait(PATIENCE)
        except BaseException as error:
            error.add_note(Path(log.name).read_text())
            raise
        finally:
            process.kill()
            process.wait()
    said = Path(log.name).read_text()
    assert status == 0, said
    assert "error" not in said, said


def boots(client: Client) -> int:
    return client.read("disk", SECTOR, 1)[0]


def until(client: Client, true: Callable[[DeviceInfo], bool]) -> None:
    """Waits for a state of the device."""
    deadline = time.monotonic() + PATIENCE
    while not true(found := client.info("disk")[0]):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
