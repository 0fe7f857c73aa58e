"""A device on a full file system: a command that waits for the event, workers that die, clients that reconnect, and the
removal of the device.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.errors import DeviceBusy
from conformance.nbd_client import FLUSH, READ, WRITE, NbdClient
from qcow2.full_disk import KIB, MIB, SmallDisk, image, small_disk

from .conftest import Life, info, is_answered, read, until

pytestmark = pytest.mark.timeout(120)

SIZE = 24 * MIB
NO_SPACE, IO_ERROR = 28, 5


@pytest.fixture
def disk(program: Callable[[str, str], str], tmp_path: Path) -> Iterator[SmallDisk]:
    program("qemu-img", "qemu-utils")
    with small_disk(program, "tmpfs", tmp_path) as disk:
        yield disk


@pytest.fixture
def path(life: Life, disk: SmallDisk) -> Iterator[Path]:
    """The image of the device `disk`, which has written and flushed its first MiB and found the file system full."""
    path = image(disk.folder, SIZE)
    with life.client() as client:
        client.create("disk", table=f"0 {SIZE // 512} qcow2 {path} 1 on_enospc=park")
        nbd = NbdClient.unix(life.socket("disk"))
        assert nbd.ask(WRITE, 0, payload=b"a" * MIB).error == 0
        assert nbd.ask(FLUSH).error == 0
        nbd.close()
        until(client, "disk", lambda device: not device.connections)
        disk.fill()
    yield path
    with life.client() as client:
        for device in client.info():
            client.remove(device.name, force=True)
    subprocess.run(["qemu-img", "check", path], check=True, timeout=60, stdout=subprocess.DEVNULL)


def parked(client: Client) -> int:
    words = client.status("disk")[0][3].split()
    return int(next(word for word in words if word.startswith("parked=")).partition("=")[2])


def answer(nbd: NbdClient, cookie: int) -> int:
    """The error of the one request that is under way."""
    answered, reply = nbd.receive()
    assert answered == cookie
    return reply.error


def park(client: Client, nbd: NbdClient, offset: int = 8 * MIB) -> int:
    """A write that waits, once the device has said so. Its cookie."""
    event = info(client, "disk").event
    cookie = nbd.send(WRITE, offset, payload=b"x" * (4 * KIB))
    assert client.wait("disk", event) > event
    return cookie


def test_a_user_is_told_makes_room_and_says_retry(
    blkloom: str, life: Life, client: Client, disk: SmallDisk, path: Path, connect: Callable[[str], NbdClient]
) -> None:
    def say(*words: str) -> str:
        command = [blkloom, "--run-dir", str(life.run_dir), "message", "disk", "0", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    nbd, other = connect("disk"), connect("disk")
    cookie = park(client, nbd)
    assert parked(client) == 1
    assert read(other, 0) == b"a" * 512
    assert other.ask(WRITE, 0, payload=b"A" * 512).error == 0
    assert other.ask(FLUSH).error == 0
    assert say("get_event") == "event_ENOSPC\n"
    assert "no_space=1 " in say("get_errors")
    disk.free()
    say("retry")
    assert answer(nbd, cookie) == 0
    assert nbd.ask(READ, 8 * MIB, 512).data == b"x" * 512


def test_what_a_client_left_waiting_goes_with_it(
    client: Client, disk: SmallDisk, path: Path, connect: Callable[[str], NbdClient]
) -> None:
    nbd = connect("disk")
    park(client, nbd)
    nbd.close()
    until(client, "disk", lambda device: not device.connections)
    assert parked(client) == 0
    disk.free()
    client.message("disk", 0, "retry")
    assert read(connect("disk"), 8 * MIB) == bytes(512)


def test_a_killed_worker_with_parked_writes_is_replaced(
    life: Life, client: Client, disk: SmallDisk, path: Path, connect: Callable[[str], NbdClient]
) -> None:
    park(client, connect("disk"))
    worker = info(client, "disk").worker
    os.kill(worker, signal.SIGKILL)
    until(client, "disk", lambda device: device.worker not in (0, worker) and device.state == "ACTIVE")
    again = connect("disk")
    assert read(again, 0) == b"a" * 512
    cookie = park(client, again)
    disk.free()
    client.message("disk", 0, "retry")
    assert answer(again, cookie) == 0


def test_a_suspended_device_hands_parked_writes_over_to_another_process(
    life: Life, client: Client, disk: SmallDisk, path: Path, connect: Callable[[str], NbdClient]
) -> None:
    nbd = connect("disk")
    cookie = park(client, nbd)
    worker = info(client, "disk").worker
    client.upgrade()
    with life.client() as after:
        until(after, "disk", lambda device: device.worker not in (0, worker))
        while not parked(after):
            pass
        after.suspend("disk")
        assert not is_answered(nbd)
        disk.free()
        subprocess.run(["qemu-img", "snapshot", "-c", "full", path], check=True, timeout=60)
        after.resume("disk")
        assert answer(nbd, cookie) == 0


def test_removing_the_device_by_force_fails_what_waits(
    client: Client, path: Path, connect: Callable[[str], NbdClient]
) -> None:
    nbd = connect("disk")
    cookie = park(client, nbd)
    with pytest.raises(DeviceBusy):  # as with dmsetup: an error table is in its place now
        client.remove("disk", force=True)
    assert answer(nbd, cookie) == IO_ERROR
    nbd.close()
    client.remove("disk", retry=True)


def test_a_stop_fails_what_waits_for_want_of_space(life: Life, path: Path, connect: Callable[[str], NbdClient]) -> None:
    nbd = connect("disk")
    with life.client() as client:
        cookie = park(client, nbd)
    life.stop()
    assert answer(nbd, cookie) == NO_SPACE
    life.start()
