"""What a node and its rule of one writer do when the device changes: tables, block sizes, partitions, deaths."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.control.states import LoopNotes
from blkloom.errors import DeviceBusy
from conformance.file_systems import MiB, run
from conformance.nbd_client import READ_ONLY, WRITE, NbdClient

from .attached import SIZE, Program, disk, ext4, life, said, write_and_sync
from .conftest import Life, info, until
from .loop_commands import Loop

__all__ = ["disk", "life"]
pytestmark = pytest.mark.timeout(120)
Connect = Callable[[str], NbdClient]


def test_nbd_clients_only_read_also_after_a_read_only_table_was_replaced(
    client: Client, tmp_path: Path, connect: Connect
) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(MiB))
    table = f"0 {MiB // 512} loop {tmp_path}/disk.img"
    client.create("disk", table=table, read_only=True)
    node = client.attach("disk", via="loop").node.path
    client.load("disk", table)
    client.resume("disk")
    assert run("blockdev", "--getro", node) == "0\n"
    reader = connect("disk")
    assert reader.flags & READ_ONLY
    assert reader.ask(WRITE, 0, payload=bytes(512)).error != 0
    reader.disconnect()
    client.detach("disk")
    writer = connect("disk")
    assert not writer.flags & READ_ONLY
    writer.disconnect()


def partition(client: Client, number: int, start: int) -> str:
    """Makes a partition device of `disk`, as `blkloom loop -P` does."""
    name = f"disk{number}"
    client.create(name, table=f"0 2048 linear blkloom:disk {start}", loop=LoopNotes(partition=number))
    return name


def is_read_only(connect: Connect, device: str) -> bool:
    """For NBD clients."""
    nbd = connect(device)
    flags = nbd.flags
    nbd.disconnect()
    return bool(flags & READ_ONLY)


def test_nbd_clients_only_read_partitions_while_the_disk_is_attached(
    client: Client, disk: str, connect: Connect, life: Life
) -> None:
    first = partition(client, 1, 2048)
    writer = connect(first)
    until(client, first, lambda found: found.connections == 1)
    with pytest.raises(DeviceBusy, match=f"device '{first}' has 1 clients, which may write"):
        client.attach(disk, via="loop")
    writer.disconnect()
    until(client, first, lambda found: found.connections == 0)
    node = client.attach(disk, via="loop").node.path
    second = partition(client, 2, 8192)
    assert [is_read_only(connect, name) for name in (disk, first, second)] == [True, True, True]
    with pytest.raises(DeviceBusy, match=f"device '{disk}' is attached at {node}"):
        client.export(first, kind="nbd", host="localhost", port=0)
    with pytest.raises(DeviceBusy, match=f"device '{disk}' is attached at {node}"):
        client.attach(second, via="loop")
    life.kill()
    life.start()
    with life.client() as again:
        again.detach(disk)
        assert [is_read_only(connect, name) for name in (disk, first, second)] == [False, False, False]


def test_nbd_clients_only_read_a_disk_while_one_of_its_partitions_is_attached(
    client: Client, disk: str, connect: Connect
) -> None:
    first, second = partition(client, 1, 2048), partition(client, 2, 8192)
    for name in (first, second):
        client.attach(name, via="loop")
    client.detach(first)
    assert [is_read_only(connect, name) for name in (disk, first, second)] == [True, False, True]
    client.remove(second)
    assert [is_read_only(connect, name) for name in (disk, first)] == [False, False]
    client.attach(first, via="loop")
    assert is_read_only(connect, disk)
    client.remove(first, force=True)
    assert not is_read_only(connect, disk)


def test_the_node_follows_the_block_size_of_loop_b(
    blkloom: str, life: Life, client: Client, tmp_path: Path, program: Program
) -> None:
    loop = Loop(blkloom, life.run_dir, attach=True)
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))
    node = loop("-f", "--show", tmp_path / "disk.img").strip()
    loop("-b", "4096", "loop0")
    assert run("blockdev", "--getss", node) == "4096\n"
    loop("-b", "512", "loop0")
    with ext4(program, node, tmp_path / "m") as place:
        done = subprocess.run(
            [blkloom, "--run-dir", life.run_dir, "loop", "-b", "2048", "loop0"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert f"{node} keeps its blocks of 512 bytes: it is in use: mounted at {place}" in done.stderr
        write_and_sync(place / "file")
        assert run("blockdev", "--getss", node) == "512\n"
    said(blkloom, life, "resume", "loop0")
    assert run("blockdev", "--getss", node) == "2048\n"
    client.remove("loop0")


def test_the_size_is_known_after_worker_and_supervisor_were_killed(client: Client, disk: str, life: Life) -> None:
    client.create("memory", table="0 2048 ram")
    before = {found.name: found for found in client.info()}
    workers = [until(client, name, lambda found: found.worker != 0).worker for name in before]
    life.kill()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    life.start()
    with life.client() as again:
        for name, known in before.items():
            found = info(again, name)
            assert (found.size, found.block_size, found.targets) == (known.size, known.block_size, known.targets)
            assert (found.types, found.deps) == (known.types, known.deps)
        assert info(again, "memory").state == "FAILED"
        assert again.read(disk, 0, 512) == bytes(512)
        again.remove("memory", force=True)
        again.remove(disk)
