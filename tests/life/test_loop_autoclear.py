"""Devices that are removed after their last user has left, with deaths of supervisor and worker in between."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.control.states import LoopNotes
from conformance.nbd_client import NbdClient

from .conftest import Life, info, read, until

pytestmark = pytest.mark.timeout(120)


def until_gone(client: Client, *gone: str) -> None:
    """Waits for devices to go by themselves."""
    while {device.name for device in client.info()} & set(gone):
        pass


def make(client: Client, file: Path) -> None:
    client.create("disk", table=f"0 16 loop {file}", autoclear=True, loop=LoopNotes(sizelimit=7))


def with_partitions(client: Client, file: Path) -> None:
    make(client, file)
    for number in (1, 2):
        client.create(f"disk{number}", table=f"0 8 linear blkloom:disk {number}", loop=LoopNotes(partition=number))


def test_it_waits_for_a_first_client_and_goes_with_the_last(
    client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    make(client, file)
    assert info(client, "disk").autoclear
    client.suspend("disk")
    client.resume("disk")  # news, and no client yet
    first, second = connect("disk"), connect("disk")
    until(client, "disk", lambda device: device.connections == 2)
    first.disconnect()
    until(client, "disk", lambda device: device.connections == 1)
    assert read(second) == b"f" * 512
    second.disconnect()
    until_gone(client, "disk")


def test_a_removal_ends_with_those_below_that_were_due(client: Client, file: Path) -> None:
    make(client, file)
    for number in range(20):
        client.create(
            f"above{number}",
            table=f"0 16 linear blkloom:{f'above{number - 1}' if number else 'disk'} 0",
            autoclear=True,
        )
    client.remove("above19", force=True)
    assert client.info() == []


def test_one_that_is_retained_stays(client: Client, file: Path, connect: Callable[[str], NbdClient]) -> None:
    make(client, file)
    nbd = connect("disk")
    until(client, "disk", lambda device: device.connections == 1)
    client.retain("disk")
    nbd.disconnect()
    assert until(client, "disk", lambda device: not device.connections).autoclear is False


def test_a_device_that_stands_on_it_is_a_user(client: Client, file: Path) -> None:
    make(client, file)
    client.create("upper", table="0 8 linear blkloom:disk 0")
    assert info(client, "disk").open_count == 1
    client.remove("upper")
    until_gone(client, "disk")


def test_the_last_user_of_any_partition_is_the_last(
    client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    with_partitions(client, file)
    whole, part = connect("disk"), connect("disk2")
    until(client, "disk", lambda device: device.connections == 1)
    until(client, "disk2", lambda device: device.connections == 1)
    whole.disconnect()
    until(client, "disk", lambda device: not device.connections)
    assert len(client.info()) == 3
    part.disconnect()
    until_gone(client, "disk", "disk1", "disk2")


def test_a_partition_that_comes_and_goes_is_no_user(client: Client, file: Path) -> None:
    with_partitions(client, file)
    client.remove("disk1")
    client.remove("disk2")
    client.create("later", table="0 8 zero")  # the supervisor has had time to think of it
    assert [device.name for device in client.info()] == ["disk", "later"]


def test_a_disk_that_goes_with_its_last_partition_is_no_error_of_its_removal(
    client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    with_partitions(client, file)
    client.retain("disk")  # no autoclear
    part = connect("disk1")
    until(client, "disk1", lambda device: device.connections == 1)
    client.remove("disk", deferred=True)
    client.retain("disk1")
    part.disconnect()
    until(client, "disk1", lambda device: not device.connections)
    assert info(client, "disk").deferred
    client.remove("disk")
    assert client.info() == []


def test_a_worker_that_is_killed_does_not_take_it_along(
    client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    make(client, file)
    lost = connect("disk")
    worker = until(client, "disk", lambda device: device.connections == 1).worker
    os.kill(worker, signal.SIGKILL)
    until(client, "disk", lambda device: device.restarts == 1 and device.worker not in (0, worker))
    assert info(client, "disk").autoclear
    with pytest.raises(ConnectionError):
        read(lost)
    nbd = connect("disk")
    assert read(nbd) == b"f" * 512
    nbd.disconnect()
    until_gone(client, "disk")


def test_it_survives_an_upgrade_with_its_clients(
    client: Client, life: Life, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    with_partitions(client, file)
    nbd = connect("disk1")
    assert read(nbd) == b"f" * 512
    assert client.upgrade() == 1
    with life.client() as other:
        assert info(other, "disk").autoclear
        assert info(other, "disk").loop == LoopNotes(sizelimit=7)
        assert info(other, "disk2").loop == LoopNotes(partition=2)
        assert read(nbd) == b"f" * 512
        nbd.disconnect()
        until_gone(other, "disk", "disk1", "disk2")


@pytest.mark.parametrize("with_file", [True, False], ids=["", "without state file"])
def test_it_survives_the_supervisor_and_goes_with_a_client_that_stays(life: Life, file: Path, with_file: bool) -> None:
    with life.client() as client:
        make(client, file)
        with closing(NbdClient.unix(life.socket("disk"))) as nbd:
            assert read(nbd) == b"f" * 512
            life.kill()
            if not with_file:
                (life.run_dir / "devices" / "0.json").unlink()
            life.start()
            with life.client() as other:
                assert info(other, "disk").autoclear
                assert info(other, "disk").loop == LoopNotes(sizelimit=7)
                assert read(nbd) == b"f" * 512
                nbd.disconnect()
                until_gone(other, "disk")


def test_it_goes_at_once_when_the_last_client_left_while_there_was_no_supervisor(life: Life, file: Path) -> None:
    with life.client() as client:
        make(client, file)
    life.kill()
    with closing(NbdClient.unix(life.socket("disk"))) as nbd:
        assert read(nbd) == b"f" * 512
        nbd.disconnect()
    life.start()
    with life.client() as client:
        until_gone(client, "disk")


def test_it_stays_when_supervisor_and_worker_were_killed(
    life: Life, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    with life.client() as client:
        make(client, file)
        connect("disk")
        worker = until(client, "disk", lambda device: device.connections == 1).worker
    life.kill()
    os.kill(worker, signal.SIGKILL)
    life.start()
    with life.client() as client:
        assert info(client, "disk").autoclear
        nbd = connect("disk")
        assert read(nbd) == b"f" * 512
        nbd.disconnect()
        until_gone(client, "disk")


def test_reading_through_the_supervisor_is_no_use_of_a_device(client: Client, file: Path) -> None:
    make(client, file)
    assert client.read("disk", 512, 1024) == b"f" * 1024
    client.create("later", table="0 8 zero")
    assert info(client, "disk").open_count == 0


@pytest.mark.parametrize(("offset", "length"), [(-1, 512), (0, 0), (0, (1 << 20) + 1), (8192, 1), (8000, 512)])
def test_reading_what_is_not_there_or_too_much_is_refused(client: Client, file: Path, offset: int, length: int) -> None:
    make(client, file)
    with pytest.raises(ValueError, match=r"cannot be read|offset is -1"):
        client.read("disk", offset, length)


def test_a_suspended_device_is_not_read(client: Client, file: Path) -> None:
    make(client, file)
    client.suspend("disk")
    with pytest.raises(ValueError, match="is suspended"):
        client.read("disk", 0, 512)
