"""Targets for tests after an upgrade and after the death of a worker: what their users have set stays."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.errors import BlkloomError
from conformance.nbd_client import FLUSH, READ, WRITE, NbdClient

from .conftest import info, until

pytestmark = pytest.mark.timeout(120)
Connect = Callable[[str], NbdClient]
SECTORS = 2048
BLOCK = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SECTORS * 512))
    return path


def write(nbd: NbdClient, byte: bytes, block: int) -> int:
    """Fills a block. Returns the error."""
    return nbd.ask(WRITE, block * BLOCK, payload=byte * BLOCK).error


def kill_worker(client: Client) -> None:
    """Returns when the next worker serves."""
    before = info(client, "disk").worker
    os.kill(before, signal.SIGKILL)
    until(client, "disk", lambda found: found.worker not in (0, before))


def state(client: Client) -> str:
    return client.status("disk")[0][3]


def seen(client: Client) -> bytes:
    """The first byte of each of four blocks."""
    return client.read("disk", 0, 4 * BLOCK)[::BLOCK]


def test_flakey_goes_on_in_its_intervals(client: Client, connect: Connect, disk: Path) -> None:
    client.create("disk", table=f"0 {SECTORS} flakey {disk} 0 2 1000000")
    nbd = connect("disk")
    while nbd.ask(READ, 0, length=BLOCK).error == 0:
        pass  # until it is down, for days
    client.upgrade()
    assert nbd.ask(READ, 0, length=BLOCK).error != 0
    kill_worker(client)
    assert connect("disk").ask(READ, 0, length=BLOCK).error != 0
    client.load("disk", table=f"0 {SECTORS} flakey {disk} 0 1000000 2")
    client.resume("disk")  # another table begins again
    assert connect("disk").ask(READ, 0, length=BLOCK).error == 0


@pytest.mark.parametrize("ending", ["an upgrade", "a death"])
def test_a_disk_without_power_stays_so_and_keeps_its_recording(
    client: Client, connect: Connect, disk: Path, ending: str
) -> None:
    client.create("disk", table=f"0 {SECTORS} torn {disk} 0")
    nbd = connect("disk")
    assert write(nbd, b"a", 0) == nbd.ask(FLUSH).error == write(nbd, b"b", 1) == 0
    client.message("disk", 0, "cut")
    before = state(client)
    assert before == f"cut 8 {BLOCK} 0"
    if ending == "an upgrade":
        client.upgrade()
    else:
        kill_worker(client)
    assert state(client) == before
    nbd = connect("disk")
    assert 0 not in (nbd.ask(READ, 0, length=BLOCK).error, write(nbd, b"c", 2), nbd.ask(FLUSH).error)
    contents = disk.read_bytes()
    assert (contents[0], contents[BLOCK], contents[2 * BLOCK]) == (ord("a"), 0, 0)
    client.message("disk", 0, f"states 8 {disk}.state")
    states = {Path(f"{disk}.state.{number}").read_bytes() for number in range(1, 9)}
    assert len(states) == 8
    assert all(found[:BLOCK] == b"a" * BLOCK and set(found[BLOCK : 2 * BLOCK]) <= set(b"\0b") for found in states)
    seeds = state(client)
    kill_worker(client)
    assert state(client) == seeds
    client.message("disk", 0, "restore")
    assert seen(client)[:1] == b"a"
    kill_worker(client)
    assert state(client).startswith("running 0 0 ")
    assert write(connect("disk"), b"d", 3) == 0


def test_a_cut_that_is_to_come_comes_after_an_upgrade(client: Client, connect: Connect, disk: Path) -> None:
    client.create("disk", table=f"0 {SECTORS} torn {disk} 0")
    client.message("disk", 0, "cut 2")
    nbd = connect("disk")
    assert write(nbd, b"a", 0) == 0
    client.upgrade()
    assert (write(nbd, b"b", 1), write(nbd, b"c", 2) != 0) == (0, True)
    assert state(client).startswith("cut ")
    kill_worker(client)
    assert state(client).startswith("cut 8 ")
    assert disk.read_bytes()[::BLOCK][:3] == b"a\0\0"  # the upgrade has flushed the first


def test_a_death_before_the_cut_leaves_what_was_flushed(client: Client, connect: Connect, disk: Path) -> None:
    client.create("disk", table=f"0 {SECTORS} torn {disk} 0")
    nbd = connect("disk")
    assert write(nbd, b"a", 0) == nbd.ask(FLUSH).error == write(nbd, b"b", 0) == write(nbd, b"b", 1) == 0
    kill_worker(client)
    assert (state(client), seen(client)) == ("running 0 0 0", b"a\0\0\0")
    with pytest.raises(BlkloomError, match="the device has power"):
        client.message("disk", 0, "restore")
