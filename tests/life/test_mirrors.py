"""A mirror of a supervisor: killed workers, an upgrade, and a leg that dies under load."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom import Fault
from blkloom.control.client import Client
from conformance.nbd_client import NbdClient

from .conftest import Life, info, read, until
from .reconnecting import BLOCK, ReconnectingWriter

BLOCKS = 64
SECTORS = 2 * BLOCKS * BLOCK // 512
REGIONS = SECTORS // 32
pytestmark = pytest.mark.timeout(280)


@pytest.fixture
def legs(client: Client, tmp_path: Path) -> list[Path]:
    """The files of devices `left` and `right`, which a device `disk` mirrors."""
    files = [tmp_path / name for name in ("left", "right")]
    for file in files:
        file.write_bytes(bytes(SECTORS * 512))
        client.create(file.name, table=f"0 {SECTORS} linear {file} 0")
    table = f"0 {SECTORS} mirror core 1 32 2 blkloom:left 0 blkloom:right 0 1 handle_errors"
    client.create("disk", table=table)
    return files


def writers(life: Life) -> list[ReconnectingWriter]:
    """Two for the device."""
    found = [
        ReconnectingWriter(life.socket("disk"), first=half * BLOCKS, blocks=BLOCKS, seed=half) for half in range(2)
    ]
    for writer in found:
        writer.start()
    return found


def state(client: Client) -> str:
    """Regions in sync, and the letters of the legs."""
    words = client.status("disk")[0][3].split()
    return f"{words[3]} {words[5]}"


def wait_for(client: Client, wanted: str) -> None:
    """Until the mirror is in this state: each change that ends in one is an event."""
    while True:
        event = info(client, "disk").event
        if state(client) == wanted:
            return
        client.wait("disk", event)


def finish(client: Client, load: list[ReconnectingWriter], legs: list[Path]) -> None:
    """Ends the load, which has lost nothing; both legs have all of it."""
    for writer in load:
        writer.wait_for_flushes(1)
    for writer in load:
        writer.finish()
    wait_for(client, f"{REGIONS}/{REGIONS} AA")
    client.suspend("disk")
    expected = b"".join(writer.expected() for writer in load)
    assert [leg.read_bytes() for leg in legs] == [expected, expected]
    client.resume("disk")


def test_a_killed_worker_makes_the_next_one_copy_all_again(life: Life, client: Client, legs: list[Path]) -> None:
    load = writers(life)
    for _ in range(5):
        for writer in load:
            writer.wait_for_flushes(1)
        before = info(client, "disk").worker
        os.kill(before, signal.SIGKILL)
        until(client, "disk", lambda found, before=before: found.worker not in (0, before))  # type: ignore[misc]
        wait_for(client, f"{REGIONS}/{REGIONS} AA")
    finish(client, load, legs)


def test_a_leg_that_dies_under_load_is_left_out_and_copied_again(life: Life, client: Client, legs: list[Path]) -> None:
    wait_for(client, f"{REGIONS}/{REGIONS} AA")
    load = writers(life)
    for name in ("left", "right"):
        for writer in load:
            writer.wait_for_flushes(2)
        client.fault(name, Fault.fail())
        event = info(client, "disk").event
        while "D" not in state(client):
            client.wait("disk", event)
        for writer in load:
            writer.wait_for_flushes(2)
        assert state(client).endswith("DA" if name == "left" else "AD")
        client.fault(name, None)
        client.suspend("disk")
        client.resume("disk")
        wait_for(client, f"{REGIONS}/{REGIONS} AA")
    finish(client, load, legs)
    assert all(writer.reconnects == 0 for writer in load)


def test_the_next_worker_does_not_take_the_leg_for_good_that_was_left_out(
    life: Life, client: Client, legs: list[Path]
) -> None:
    wait_for(client, f"{REGIONS}/{REGIONS} AA")
    load = writers(life)
    client.fault("left", Fault.fail())
    for writer in load:
        writer.wait_for_flushes(2)
    client.upgrade()
    for writer in load:
        writer.wait_for_flushes(2)
    before = info(client, "disk").worker
    os.kill(before, signal.SIGKILL)
    until(client, "disk", lambda found: found.worker not in (0, before))
    client.fault("left", None)
    os.kill(info(client, "disk").worker, signal.SIGKILL)
    finish(client, load, legs)


def test_an_upgrade_copies_nothing_again(client: Client, legs: list[Path], connect: Callable[[str], NbdClient]) -> None:
    wait_for(client, f"{REGIONS}/{REGIONS} AA")
    client.suspend("disk")
    with legs[1].open("r+b") as file:
        file.write(b"only here")
    client.upgrade()
    client.resume("disk")
    wait_for(client, f"{REGIONS}/{REGIONS} AA")
    assert legs[0].read_bytes()[:9] == bytes(9)
    assert legs[1].read_bytes()[:9] == b"only here"
    assert read(connect("disk"), 0, 9) == bytes(9)
