"""Supervisor and worker are killed together, and what was in their memory is lost: targets go on where no completed
write is lost.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.write_log import WriteLog
from conformance.nbd_client import FLUSH, READ, WRITE, NbdClient

from .conftest import Life, info

pytestmark = pytest.mark.timeout(120)
SECTORS = 2048
BLOCK = 4096
LOST = "is lost with the processes that had it"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"old".ljust(BLOCK, b"-") * (SECTORS * 512 // BLOCK))
    return path


def killed_together(life: Life, device: str = "disk") -> Client:
    """A client of the next supervisor."""
    with life.client() as client:
        worker = info(client, device).worker
    life.kill()
    os.kill(worker, signal.SIGKILL)
    life.start()
    return life.client()


def write(life: Life, byte: bytes, block: int, device: str = "disk") -> None:
    """Fills a block, and flushes it."""
    nbd = NbdClient.unix(life.socket(device))
    assert nbd.ask(WRITE, block * BLOCK, payload=byte * BLOCK).error == nbd.ask(FLUSH).error == 0
    nbd.close()


def failure(client: Client) -> str:
    """The error of a device that has failed."""
    found = info(client, "disk")
    assert found.state == "FAILED"
    return found.reason


def warnings(life: Life) -> str:
    return (life.run_dir.parent / "supervisor.log").read_text()


@pytest.mark.parametrize(
    ("words", "message", "changed", "first"),
    [
        ("flakey {disk} 0 1000000 1", "", "", ""),
        ("throttle {disk} 0", "set iops=7", "iops=7", "0"),
        ("pause {disk} 0", "pause", "paused 0", "running 0"),
        ("full {disk} 0 8192", "set 4096", "4096", "0 8192"),
        ("dust {disk} 0 4096", "quiet", "bypass quiet", "bypass verbose"),
        ("torn {disk} 0", "cut", "cut 0 0 0", "running 0 0 0"),
    ],
    ids=lambda words: words.split()[0] if "{disk}" in words else "",
)
def test_targets_for_tests_begin_again(
    client: Client, life: Life, disk: Path, words: str, message: str, changed: str, first: str
) -> None:
    client.create("disk", table=f"0 {SECTORS} {words.format(disk=disk)}")
    if message:
        client.message("disk", 0, message)
        assert changed in client.status("disk")[0][3]
    with killed_together(life) as again:
        assert again.read("disk", 0, 3) == b"old"
        assert first in again.status("disk")[0][3]
        assert changed not in again.status("disk")[0][3] or not changed
        assert LOST in warnings(life)
        write(life, b"n", 0)


def test_a_log_of_writes_is_continued(client: Client, life: Life, disk: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(bytes(1 << 20))
    client.create("disk", table=f"0 {SECTORS} log-writes {disk} {log}")
    write(life, b"a", 0)
    client.message("disk", 0, "mark here")
    with killed_together(life) as again:
        assert again.status("disk")[0][3].startswith("3 ")
        write(life, b"b", 1)
        assert again.status("disk")[0][3].startswith("5 ")
        assert f"{LOST}; its log is continued" in warnings(life)
        with log.open("rb") as file:
            found = [(entry.data[:1], entry.describe()) for entry in WriteLog(file, "log")]
    assert found == [
        (b"a", "write of 8 sectors at 0"),
        (b"", "flush"),
        (b"", "mark 'here'"),
        (b"b", "write of 8 sectors at 8"),
        (b"", "flush"),
    ]


def test_a_log_of_writes_that_is_none_any_more_is_not_written_to(
    client: Client, life: Life, disk: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_bytes(bytes(1 << 20))
    client.create("disk", table=f"0 {SECTORS} log-writes {disk} {log}")
    log.write_bytes(b"other".ljust(1 << 20))
    with killed_together(life) as again:
        assert "it does not begin as one" in failure(again)
    assert log.read_bytes().strip() == b"other"


def test_a_persistent_snapshot_keeps_what_its_origin_overwrites(
    client: Client, life: Life, disk: Path, tmp_path: Path
) -> None:
    client.create("disk", table=f"0 {SECTORS} loop {disk}")
    client.snapshot("disk", "snap", file=tmp_path / "cow", chunk=BLOCK)
    write(life, b"n", 0)
    with killed_together(life) as again:
        assert (again.read("snap", 0, 3), again.read("disk", 0, 3)) == (b"old", b"nnn")
        write(life, b"n", 1)
        assert (again.read("snap", BLOCK, 3), again.read("disk", BLOCK, 3)) == (b"old", b"nnn")


def test_a_mirror_fails_until_it_is_said_which_leg_has_all_data(
    client: Client, life: Life, disk: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(SECTORS * 512))
    table = f"0 {SECTORS} mirror core 1 32 2 {disk} 0 {other} 0"
    client.create("disk", table=table)
    write(life, b"n", 0)
    with killed_together(life) as again:
        assert "which legs have all data is lost" in failure(again)
        again.remove("disk")
        again.create("disk", table=table)
        nbd = NbdClient.unix(life.socket("disk"))
        assert nbd.ask(READ, 0, length=BLOCK).data == b"n" * BLOCK
        nbd.close()


def test_a_qcow2_image_has_what_a_flush_covered_and_the_log_warns_of_the_rest(
    client: Client, life: Life, program: Callable[[str, str], str], tmp_path: Path
) -> None:
    image = tmp_path / "disk.qcow2"
    command = [program("qemu-img", "qemu-utils"), "create", "-q", "-f", "qcow2", str(image), f"{SECTORS * 512}"]
    subprocess.run(command, check=True)
    client.create("disk", table=f"0 {SECTORS} qcow2 {image}")
    write(life, b"f", 1)
    lost = "writes that no flush covered may be lost"
    assert lost not in warnings(life)
    os.kill(info(client, "disk").worker, signal.SIGKILL)
    write(life, b"g", 2)
    assert lost not in warnings(life)
    with killed_together(life) as again:
        assert again.read("disk", BLOCK, BLOCK + 1) == b"f" * BLOCK + b"g"
    assert lost in warnings(life)
