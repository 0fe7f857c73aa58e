"""A failed sync stays recorded with the descriptors. If a process is killed, replaced or handed over after the failed
flush, the next flush fails, too. `status`, `info`, `wait`, the log and the removal of the device report it.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from blkloom.control.client import Client
from blkloom.errors import LostData
from conformance.nbd_client import FLUSH, FUA, WRITE, NbdClient
from faulty_fs import FaultyFileSystem

from .conftest import Life, a_life, info, read, until
from .loop_commands import Loop

pytestmark = pytest.mark.timeout(60)

Connect = Callable[[str], NbdClient]
MIB = 1 << 20
SECTORS = MIB // 512


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultyFileSystem]:
    with FaultyFileSystem(tmp_path / "faulty") as faulty:
        yield faulty


@pytest.fixture
def disk(life: Life, faulty: FaultyFileSystem) -> Iterator[str]:
    """The table of a device of that name. If it is there in the end its removal must say that data may be lost."""
    table = f"0 {SECTORS} loop {faulty.file('disk.img', size=MIB)}"
    with life.client() as client:
        client.create("disk", table=table)
    yield table
    with life.client() as client:
        if [device.name for device in client.info()] == ["disk"]:
            loses(client, "disk")
        assert client.info() == []


def loses(client: Client, device: str, *nbds: NbdClient) -> None:
    """The device is removed when its clients have left, and says that data may be lost."""
    for nbd in nbds:
        nbd.close()
    until(client, device, lambda found: not found.connections)
    with pytest.raises(
        LostData, match=rf"data written to device '{device}' may be lost: a sync of .*disk\.img had failed"
    ):
        client.remove(device)


def fail(faulty: FaultyFileSystem, nbd: NbdClient, offset: int = 0) -> None:
    """A flush that fails, on a disk that works again then."""
    assert nbd.ask(WRITE, offset, payload=b"B" * 4096).error == 0
    faulty.fail("write", errno.EIO)
    assert nbd.ask(FLUSH).error == errno.EIO
    faulty.mend()


def fails(nbd: NbdClient) -> bool:
    return nbd.ask(FLUSH).error == errno.EIO == nbd.ask(WRITE, 0, flags=FUA, payload=b"C" * 512).error


def kill_worker(life: Life, device: str = "disk") -> None:
    """Its successor has the device when this returns."""
    with life.client() as client:
        before = info(client, device)
        os.kill(before.worker, signal.SIGKILL)
        until(client, device, lambda found: found.worker not in (0, before.worker) and found.state == "ACTIVE")
        client.status(device)


def between_a_killed_worker(life: Life) -> None:
    kill_worker(life)


def between_an_upgrade(life: Life) -> None:
    with life.client() as client:
        client.upgrade()


def between_a_killed_supervisor(life: Life) -> None:
    life.kill()
    life.start()


def between_a_killed_supervisor_and_then_its_worker(life: Life) -> None:
    between_a_killed_supervisor(life)
    kill_worker(life)


def between_an_upgrade_and_a_killed_worker(life: Life) -> None:
    between_an_upgrade(life)
    kill_worker(life)


def between_both_killed(life: Life) -> None:
    with life.client() as client:
        worker = info(client, "disk").worker
    life.kill()
    os.kill(worker, signal.SIGKILL)
    life.start()


def between_a_hand_over_to_another_group(life: Life) -> None:
    with life.client() as client:
        before = info(client, "disk").worker
        client.create("more", table="0 8 ram")
        client.create("evenmore", table="0 8 linear blkloom:more 0")
        # The group of two is the larger one, and takes the other in.
        client.create("above", table="0 16 striped 2 8 blkloom:evenmore 0 blkloom:disk 0")
        assert info(client, "disk").worker != before
        client.remove("above", force=True)
        client.remove("evenmore")
        client.remove("more")


def between_a_suspend_and_a_resume(life: Life) -> None:
    with life.client() as client:
        client.suspend("disk")
        client.resume("disk")


@pytest.mark.parametrize(
    "between",
    [
        between_a_killed_worker,
        between_an_upgrade,
        between_a_killed_supervisor,
        between_a_killed_supervisor_and_then_its_worker,
        between_an_upgrade_and_a_killed_worker,
        between_both_killed,
        between_a_hand_over_to_another_group,
        between_a_suspend_and_a_resume,
    ],
)
def test_a_failed_flush_is_remembered(
    life: Life, faulty: FaultyFileSystem, disk: str, connect: Connect, between: Callable[[Life], None]
) -> None:
    fail(faulty, connect("disk"))
    between(life)
    assert fails(connect("disk"))
    with life.client() as client:
        assert "sync_failed=EIO" in client.status("disk")[0][3]
        client.load("disk", table=disk)
        client.resume("disk")
        assert connect("disk").ask(FLUSH).error == 0
        assert "sync_failed" not in client.status("disk")[0][3]
        assert info(client, "disk").sync_errors == []
    kill_worker(life)  # with its clients
    with life.client() as client:
        nbd = connect("disk")
        assert nbd.ask(FLUSH).error == 0
        nbd.close()
        until(client, "disk", lambda device: not device.connections)
        client.remove("disk")


@pytest.mark.parametrize("what", ["flush", "fua", "suspend"])
def test_it_is_stored_before_it_is_told(
    life: Life, faulty: FaultyFileSystem, disk: str, connect: Connect, client: Client, what: str
) -> None:
    nbd = connect("disk")
    worker = info(client, "disk").worker
    if what != "fua":
        assert nbd.ask(WRITE, 0, payload=b"B" * 4096).error == 0
    faulty.fail("write", errno.EIO)
    if what == "suspend":
        with pytest.raises(OSError, match="Input/output error"):
            client.suspend("disk")
    else:
        reply = nbd.ask(FLUSH) if what == "flush" else nbd.ask(WRITE, 0, flags=FUA, payload=b"B" * 4096)
        assert reply.error == errno.EIO
    os.kill(worker, signal.SIGKILL)
    faulty.mend()
    until(client, "disk", lambda found: found.worker not in (0, worker))
    assert fails(connect("disk"))


def between_an_upgrade_that_finds_it(life: Life) -> None:
    with life.client() as client, pytest.raises(OSError, match="flush on suspend: Input/output error"):
        client.upgrade()
    between_an_upgrade(life)


@pytest.mark.parametrize("between", [between_an_upgrade_that_finds_it, between_a_killed_supervisor])
def test_closing_a_copy_of_the_file_that_fails_does_not_end_the_device(
    life: Life, faulty: FaultyFileSystem, disk: str, connect: Connect, between: Callable[[Life], None]
) -> None:
    nbd = connect("disk")
    assert nbd.ask(WRITE, 0, payload=b"B" * 4096).error == 0
    faulty.fail("write", errno.EIO, count=1)  # FUSE writes back at close(2), and says what came of it
    between(life)
    assert fails(connect("disk"))


def test_a_flush_that_fails_while_there_is_no_supervisor_is_told_to_the_next(
    life: Life, faulty: FaultyFileSystem, disk: str, connect: Connect
) -> None:
    nbd = connect("disk")
    assert nbd.ask(WRITE, 0, payload=b"B" * 4096).error == 0
    faulty.fail("write", errno.EIO)
    life.kill()
    nbd.send(FLUSH)
    life.start()
    _, reply = nbd.receive()
    assert reply.error == errno.EIO
    faulty.mend()
    kill_worker(life)
    assert fails(connect("disk"))


@pytest.mark.usefixtures("qemu_tools")
@pytest.mark.parametrize("options", [[], ["-o", "data_file={}/data.raw"]], ids=["image", "data file"])
def test_an_image_stays_failed_as_a_whole_when_its_worker_is_killed(
    life: Life, faulty: FaultyFileSystem, connect: Connect, client: Client, options: list[str]
) -> None:
    path = faulty.mount / "disk.qcow2"
    words = [option.format(faulty.mount) for option in options]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words, path, str(MIB)], check=True, timeout=60)
    client.create("disk", table=f"0 {SECTORS} qcow2 {path}")
    nbd = connect("disk")
    assert nbd.ask(WRITE, 0, payload=b"A" * 4096).error == 0
    assert nbd.ask(FLUSH).error == 0
    fail(faulty, nbd, 512 << 10)
    for _ in range(2):
        kill_worker(life)
        nbd = connect("disk")
        before = {path.name: path.read_bytes() for path in faulty.disk.iterdir()}
        assert nbd.ask(FLUSH).error == errno.EIO
        assert nbd.ask(WRITE, 0, payload=b"C" * 4096).error == errno.EIO
        assert nbd.ask(WRITE, 256 << 10, payload=b"C" * 4096).error == errno.EIO
        assert read(nbd, length=4096) == b"A" * 4096
        assert {path.name: path.read_bytes() for path in faulty.disk.iterdir()} == before
        nbd.close()
    client.load("disk", table=f"0 {SECTORS} qcow2 {path}")
    client.resume("disk")
    nbd = connect("disk")
    assert nbd.ask(WRITE, 0, payload=b"D" * 4096).error == 0
    assert nbd.ask(FLUSH).error == 0
    nbd.close()
    until(client, "disk", lambda device: not device.connections)
    client.remove("disk")
    subprocess.run(["qemu-img", "check", "-q", path], check=True, timeout=60)


def test_devices_on_top_keep_failing_and_say_so(
    life: Life, faulty: FaultyFileSystem, disk: str, connect: Connect, client: Client
) -> None:
    client.create("top", table=f"0 {SECTORS} linear blkloom:disk 0")
    fail(faulty, connect("top"))
    kill_worker(life, "top")
    top = connect("top")
    assert fails(top)
    assert fails(connect("disk"))
    assert client.status("top")[0][3] == "sync_failed=EIO"
    path = faulty.mount / "disk.img"
    assert info(client, "top").sync_errors == [f"{path} had failed: Input/output error"]
    loses(client, "top", top)


def test_status_info_log_and_events_say_so(
    life: Life,
    faulty: FaultyFileSystem,
    disk: str,
    connect: Connect,
    beside: Callable[..., Future[Any]],
    blkloom: str,
) -> None:
    with life.client() as client:
        client.create("top", table=f"0 {SECTORS} linear blkloom:disk 0")
        events = {name: info(client, name).event for name in ("disk", "top")}
        waits = [beside("wait", name, event) for name, event in events.items()]
        fail(faulty, connect("disk"))
        assert [wait.result(60) > event for wait, event in zip(waits, events.values(), strict=True)] == [True, True]
        path = faulty.mount / "disk.img"
        assert client.status("disk")[0][3] == f"file 1 0 {path} sync_failed=EIO"
        told = subprocess.run(
            [blkloom, "--run-dir", life.run_dir, "info", "disk"], check=True, capture_output=True, text=True, timeout=60
        ).stdout
        assert f"Lost data:         a sync of {path} had failed: Input/output error\n" in told
        log = (life.run_dir.parent / "supervisor.log").read_text()
        assert f"device 'disk': {path}: a sync failed: Input/output error" in log
        loses(client, "top")


def test_stop_says_that_data_may_be_lost_and_fails(
    life: Life, faulty: FaultyFileSystem, disk: str, connect: Connect, blkloom: str
) -> None:
    nbd = connect("disk")
    fail(faulty, nbd)
    nbd.close()
    stop = subprocess.run(
        [blkloom, "--run-dir", life.run_dir, "stop"], capture_output=True, text=True, timeout=60, check=False
    )
    assert stop.returncode != 0
    assert "data written to device 'disk' may be lost" in stop.stderr
    assert life.process.wait(60) == 1
    life.start()


def test_a_removal_that_finds_the_failure_says_so_too(
    life: Life, faulty: FaultyFileSystem, disk: str, connect: Connect, client: Client
) -> None:
    nbd = connect("disk")
    assert nbd.ask(WRITE, 0, payload=b"B" * 4096).error == 0
    nbd.close()
    until(client, "disk", lambda device: not device.connections)
    faulty.fail("write", errno.EIO)


def test_a_device_whose_worker_is_gone_says_so_at_its_end(faulty: FaultyFileSystem) -> None:
    with a_life("--max-deaths=0") as life, life.client() as client:
        client.create("disk", table=f"0 {SECTORS} loop {faulty.file('disk.img', size=MIB)}")
        nbd = NbdClient.unix(life.socket("disk"))
        fail(faulty, nbd)
        os.kill(info(client, "disk").worker, signal.SIGKILL)
        until(client, "disk", lambda found: found.state == "FAILED")
        nbd.close()
        with pytest.raises(LostData, match="device 'disk' may be lost"):
            client.remove("disk")


@pytest.mark.parametrize("change", [["-c"], ["--direct-io=on"]], ids=" ".join)
def test_a_loop_device_that_is_changed_has_its_file_still_and_keeps_failing(
    life: Life, faulty: FaultyFileSystem, connect: Connect, client: Client, loop: Loop, change: list[str]
) -> None:
    path = faulty.file("disk.img", size=MIB)
    name = loop("-f", "--show", path).strip()
    fail(faulty, connect("loop0"))
    os.truncate(path, 2 * MIB)
    loop(*change, name)
    assert fails(connect("loop0"))
    kill_worker(life, "loop0")
    nbd = connect("loop0")
    assert fails(nbd)
    loses(client, "loop0", nbd)
