"""Processes are killed repeatedly under load: every flushed write is there, and other devices are not affected.

The clients of the load reconnect. The death of a worker closes the connections of its clients; the death of the
supervisor does not.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

import blkloom
from conformance.nbd_client import NbdClient
from qcow2 import qemu
from qcow2.shapes import Shape, make

from .conftest import Life, read, until
from .reconnecting import BLOCK, ReconnectingWriter

KILLS = int(os.environ.get("BLKLOOM_KILLS", "100"))
BLOCKS = 64
pytestmark = pytest.mark.timeout(280)


def make_devices(life: Life, folder: Path) -> list[ReconnectingWriter]:
    """A device on files, one in memory, and an idle one; two writers for each of the first."""
    sectors = 2 * BLOCKS * BLOCK // 512
    for name in ("a.img", "quiet.img"):
        (folder / name).write_bytes(bytes(sectors * 512))
    with life.client() as client:
        client.create("file", table=f"0 {sectors} loop {folder}/a.img", uuid="u-file")
        client.create("memory", table=f"0 {sectors} ram")
        client.create("quiet", table=f"0 {sectors} linear {folder}/quiet.img 0")
    return [
        ReconnectingWriter(life.socket(name), first=half * BLOCKS, blocks=BLOCKS, seed=seed)
        for seed, (name, half) in enumerate([("file", 0), ("file", 1), ("memory", 0), ("memory", 1)])
    ]


def test_a_worker_killed_a_hundred_times_loses_nothing_that_was_flushed(life: Life, tmp_path: Path) -> None:
    writers = make_devices(life, tmp_path)
    with life.client() as client:
        before = {info.name: info for info in client.info()}
        for writer in writers:
            writer.start()
        for turn in range(KILLS):
            name, mine = (("file", writers[:2]), ("memory", writers[2:]))[turn % 2]
            for writer in mine:
                writer.wait_for_flushes(1)
            (info,) = client.info(name)
            os.kill(info.worker, signal.SIGKILL)
        for writer in writers:
            writer.wait_for_flushes(2)
            writer.finish()
        after = {info.name: info for info in client.info()}
    assert after.keys() == before.keys()
    assert after["quiet"].worker == before["quiet"].worker, "another device was touched"
    for name in ("file", "memory"):
        old, new = before[name], after[name]
        assert (new.uuid, new.minor, new.state, new.exports) == (old.uuid, old.minor, "ACTIVE", old.exports)
    assert sum(writer.reconnects for writer in writers) >= KILLS


def test_a_supervisor_killed_a_hundred_times_is_not_noticed_by_clients(life: Life, tmp_path: Path) -> None:
    writers = make_devices(life, tmp_path)
    with life.client() as client:
        before = client.info()
    for writer in writers:
        writer.start()
    for _ in range(KILLS):
        writers[0].wait_for_flushes(1)
        life.kill()
        life.start()
        with life.client() as client:
            assert [info.name for info in client.info()] == [info.name for info in before]
    for writer in writers:
        writer.wait_for_flushes(1)
        writer.finish()
        assert writer.reconnects == 0
    with life.client() as client:
        after = client.info()
    assert [(i.name, i.uuid, i.minor, i.worker, i.state) for i in after] == [
        (i.name, i.uuid, i.minor, i.worker, i.state) for i in before
    ]


def test_a_worker_that_dies_while_there_is_no_supervisor_is_started_by_the_next(life: Life, tmp_path: Path) -> None:
    sectors = 2 * BLOCKS * BLOCK // 512
    (tmp_path / "a.img").write_bytes(bytes(sectors * 512))
    with life.client() as client:
        worker = client.create("file", table=f"0 {sectors} loop {tmp_path}/a.img").worker
    writer = ReconnectingWriter(life.socket("file"), first=0, blocks=BLOCKS, seed=1)
    writer.start()
    writer.wait_for_flushes(1)
    life.kill()
    os.kill(worker, signal.SIGKILL)
    life.start()
    writer.wait_for_flushes(2)
    writer.finish()
    with life.client() as client:
        (info,) = client.info("file")
        assert info.state == "ACTIVE"
        assert info.worker != worker


@pytest.mark.parametrize("busy", [False, True], ids=["the image is free", "the image is in use"])
def test_an_image_is_lent_out_even_if_the_worker_dies_while_its_device_is_suspended(
    life: Life, connect: Callable[[str], NbdClient], tmp_path: Path, program: Callable[[str, str], str], busy: bool
) -> None:
    program("qemu-img", "qemu-utils")
    path = make(tmp_path, Shape(), size=1 << 20).path
    with life.client() as client:
        client.create("disk", table=f"0 2048 qcow2 {path}")
        client.suspend("disk")
        (before,) = client.info("disk")
        with blkloom.open(str(path)) if busy else nullcontext():
            os.kill(before.worker, signal.SIGKILL)
            until(client, "disk", lambda found: found.worker not in (0, before.worker))
            client.status("disk")  # which the new one answers when it has the table
            assert client.info("disk")[0].state == "SUSPENDED"
        qemu.qemu_io(path, "write -P 9 0 64k")
        client.resume("disk")
        assert client.info("disk")[0].state == "ACTIVE"
        assert read(connect("disk")) == b"\x09" * 512
