"""`blkloom fault`: a live device becomes faulty and well again, under its clients, its node and devices above it."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom import Fault
from blkloom.control.client import Client
from blkloom.errors import DeviceBusy, TableError, UsageError
from conformance.file_systems import MiB
from conformance.nbd_client import FLUSH, READ, WRITE, NbdClient

from .attached import Program, ext4, make_disk, said, write_and_sync
from .attached import life as life_with_nodes
from .conftest import Life, info, read, until

__all__ = ["life_with_nodes"]
pytestmark = pytest.mark.timeout(120)
Connect = Callable[[str], NbdClient]
BLOCK = b"b" * 4096


def answer(nbd: NbdClient, command: int, offset: int = 0) -> int:
    """The error of a request of one sector; 0: none."""
    if command == WRITE:
        return nbd.ask(WRITE, offset, payload=bytes(512)).error
    return nbd.ask(command, offset, 512 if command == READ else 0).error


@pytest.fixture
def two(client: Client, file: Path) -> str:
    """A device with two segments on one file, which is locked."""
    client.create("disk", table=f"0 8 linear {file} 0\n8 4 loop {file} 4096")
    return client.table("disk")


def test_a_client_sees_each_fault_and_then_none(client: Client, connect: Connect, two: str) -> None:
    nbd = connect("disk")
    client.fault("disk", Fault.fail(["reads"]))
    assert [answer(nbd, READ), answer(nbd, WRITE), answer(nbd, FLUSH)] == [errno.EIO, 0, 0]
    client.fault("disk", Fault.fail(["writes", "flushes"], errno="ENOSPC", ranges=[(0, 1)]))
    assert [answer(nbd, READ), answer(nbd, WRITE), answer(nbd, WRITE, 512)] == [0, errno.ENOSPC, 0]
    client.fault("disk", Fault.bad_blocks([(2, 3), (9, 1)]))
    bad = [number for number in range(12) if answer(nbd, READ, number * 512)]
    assert bad == [2, 3, 4, 9]
    assert answer(nbd, WRITE, 9 * 512) == 0
    assert answer(nbd, READ, 9 * 512) == 0
    client.fault("disk", Fault.only_reads())
    assert [answer(nbd, READ), answer(nbd, WRITE)] == [0, errno.EPERM]
    client.fault("disk", Fault.flaky(0, 3600))
    assert answer(nbd, READ) == errno.EIO
    client.fault("disk", Fault.throttle(bps=1 << 40))
    assert answer(nbd, READ) == 0
    client.fault("disk", Fault.slow(1, ["reads"]))
    assert client.table("disk") == "0 12 delay blkloom:disk-real 0 1 blkloom:disk-real 0 0 blkloom:disk-real 0 0"
    assert answer(nbd, READ) == 0
    client.fault("disk", None)
    assert client.table("disk") == two
    assert [found.name for found in client.info()] == ["disk"]
    assert [answer(nbd, READ), answer(nbd, WRITE), answer(nbd, FLUSH)] == [0, 0, 0]


def test_memory_keeps_its_contents(client: Client, connect: Connect) -> None:
    client.create("disk", table="0 2048 ram")
    nbd = connect("disk")
    assert nbd.ask(WRITE, 4096, payload=BLOCK).error == 0
    client.fault("disk", Fault.fail())
    assert answer(nbd, READ) == errno.EIO
    client.fault("disk", None)
    assert client.table("disk") == "0 2048 ram"
    assert read(nbd, 4096, 4096) == BLOCK
    os.kill(info(client, "disk").worker, signal.SIGKILL)
    assert read(connect("disk"), 4096, 4096) == BLOCK


def test_what_waits_in_a_slow_device_goes_on_at_once_when_it_is_well(
    client: Client, connect: Connect, two: str
) -> None:
    nbd = connect("disk")
    client.fault("disk", Fault.slow(3_600_000))
    cookie = nbd.send(WRITE, 0, payload=BLOCK)
    client.fault("disk", None)
    answered, reply = nbd.receive()
    assert (answered, reply.error) == (cookie, 0)
    assert read(nbd, 0, 4096) == BLOCK


def test_a_fault_survives_a_killed_worker_an_upgrade_and_a_killed_supervisor(
    client: Client, connect: Connect, life: Life, two: str
) -> None:
    client.fault("disk", Fault.fail(["reads"], ranges=[(0, 1)]))
    os.kill(info(client, "disk").worker, signal.SIGKILL)
    assert answer(connect("disk"), READ) == errno.EIO
    client.upgrade()
    nbd = connect("disk")
    assert answer(nbd, READ) == errno.EIO
    life.kill()
    life.start()
    with life.client() as other:
        assert info(other, "disk").fault == "fail --reads --range 0+1"
        assert info(other, "disk-real").uuid.startswith("BLKLOOM-FAULT-")
        other.fault("disk", None)
        assert other.table("disk") == two
        assert answer(nbd, READ) == 0
        os.kill(info(other, "disk").worker, signal.SIGKILL)
        assert answer(connect("disk"), READ) == 0


def test_devices_above_and_below_stay(client: Client, connect: Connect, file: Path) -> None:
    client.create("low", table=f"0 16 linear {file} 0")
    client.create("disk", table="0 16 linear blkloom:low 0")
    client.create("top", table="0 12 linear blkloom:disk 4")
    nbd = connect("top")
    client.fault("disk", Fault.fail())
    assert answer(nbd, READ) == errno.EIO
    assert info(client, "disk-real").deps == ["blkloom:low"]
    assert info(client, "low").holders == ["disk-real"]
    with pytest.raises(DeviceBusy, match="device 'disk-real' is stacked on it"):
        client.remove("low")
    client.rename("disk-real", name="other")
    assert client.table("disk") == "0 16 error blkloom:other 0"
    client.fault("disk", None)
    assert read(nbd) == b"f" * 512
    assert info(client, "low").holders == ["disk"]
    assert client.table("disk") == "0 16 linear blkloom:low 0"


def test_the_real_device_is_removed_with_the_faulty_one(client: Client, two: str, file: Path) -> None:
    client.fault("disk", Fault.fail())
    with pytest.raises(DeviceBusy):
        client.remove("disk-real")
    client.remove("disk")
    while client.info():
        pass
    client.create("again", table=f"0 16 linear {file} 0")  # the file is free


def test_nothing_changes_where_a_fault_is_refused(client: Client, two: str) -> None:
    with pytest.raises(TableError, match="range past the end of the segment"):
        client.fault("disk", Fault.fail(ranges=[(12, 1)]))
    with pytest.raises(TableError, match="Invalid probability"):
        client.fault("disk", Fault.fail(probability=2))
    with pytest.raises(UsageError, match="block value out of range"):
        client.fault("disk", Fault.bad_blocks([(12, 1)]))
    with pytest.raises(UsageError, match="device 'disk' has no fault; `blkloom fault` lists"):
        client.fault("disk", None)
    client.suspend("disk")
    with pytest.raises(UsageError, match="device 'disk' is suspended; blkloom resume disk"):
        client.fault("disk", Fault.fail())
    client.resume("disk")
    client.load("disk", "0 12 zero")
    with pytest.raises(UsageError, match="device 'disk' has an inactive table; blkloom resume disk makes it active"):
        client.fault("disk", Fault.fail())
    client.clear("disk")
    assert client.table("disk") == two
    assert [found.name for found in client.info()] == ["disk"]


def test_a_well_device_is_refused_while_its_real_device_has_a_client(
    client: Client, connect: Connect, two: str
) -> None:
    client.fault("disk", Fault.fail())
    other = connect("disk-real")
    until(client, "disk-real", lambda found: found.connections == 1)
    assert answer(other, WRITE) == errno.EPERM
    with pytest.raises(DeviceBusy, match="device 'disk-real' is in use: 1 clients"):
        client.fault("disk", None)
    other.disconnect()
    until(client, "disk-real", lambda found: found.connections == 0)
    client.fault("disk", None)
    assert client.table("disk") == two


def test_a_mounted_file_system_gets_eio_and_then_is_well(
    life_with_nodes: Life, program: Program, tmp_path: Path
) -> None:
    with life_with_nodes.client() as client:
        make_disk(client, tmp_path)
        node = client.attach("disk", block_device=True).node.path
        with ext4(program, node, tmp_path / "mnt") as place:
            write_and_sync(place / "before")
            (place / "file").write_bytes(bytes(MiB))
            os.sync()
            client.fault("disk", Fault.fail(["reads"]))
            descriptor = os.open(place / "file", os.O_RDONLY | os.O_DIRECT)
            try:
                with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                    os.preadv(descriptor, [bytearray_aligned()], 0)
                client.fault("disk", None)
                assert os.preadv(descriptor, [bytearray_aligned()], 0) == 4096
            finally:
                os.close(descriptor)
            write_and_sync(place / "after")
            assert client.table("disk").split()[2] == "loop"
        client.detach("disk")


def bytearray_aligned() -> memoryview:
    """4 KiB for direct I/O."""
    return memoryview(mmap.mmap(-1, 4096))


def test_the_command_makes_faults_and_lists_them(blkloom: str, life: Life, client: Client, two: str) -> None:
    assert said(blkloom, life, "fault") == ""
    for words in (
        ["fail", "--reads", "--writes", "--probability", "0.25", "--errno", "ENOSPC", "--range", "1+2", "--seed", "7"],
        ["slow", "2000ms", "--flushes"],
        ["throttle", "--iops", "5", "--writes"],
        ["read-only"],
        ["flaky", "5", "2", "--drop-writes"],
        ["bad-blocks", "1", "3-5"],
    ):
        assert said(blkloom, life, "fault", "disk", *words) == ""
        assert said(blkloom, life, "fault", "--list") == f"disk: {' '.join(words)}\n"
        assert f"Fault:             {' '.join(words)}\n" in said(blkloom, life, "info", "disk")
    assert said(blkloom, life, "fault", "disk", "off") == ""
    assert client.table("disk") == two
