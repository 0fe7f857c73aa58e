"""Partitions of any device: printed, and made devices, nodes of the kernel and files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom.attach.kernel_partitions import kernel_partitions
from blkloom.control.client import Client
from blkloom.errors import DeviceBusy, UsageError
from conformance.file_systems import MiB, run
from conformance.nbd_client import WRITE, NbdClient
from partition_images import gpt, mbr

from .attached import Program, ext4, life, said, write_and_sync
from .conftest import Life, info, read, until

__all__ = ["life"]
pytestmark = pytest.mark.timeout(120)
Connect = Callable[[str], NbdClient]
SIZE = 16 * MiB
FIRST, SECOND = (2048, 16384), (20480, 2048)


@pytest.fixture
def image(tmp_path: Path, program: Program) -> Path:
    """A QCOW2 image with a GPT: two partitions."""
    with (tmp_path / "disk.raw").open("wb") as file:
        file.write(gpt((2048, 18431), (20480, 22527), blocks=SIZE // 512))
        file.truncate(SIZE)
        os.pwrite(file.fileno(), b"1" * 512, FIRST[0] * 512)
        os.pwrite(file.fileno(), b"2" * 512, SECOND[0] * 512)
    run(program("qemu-img", "qemu-utils"), "convert", "-O", "qcow2", tmp_path / "disk.raw", tmp_path / "disk.qcow2")
    return tmp_path / "disk.qcow2"


def fails(blkloom: str, life: Life, *words: str) -> str:
    """What the command says; it fails."""
    command = [blkloom, "--run-dir", str(life.run_dir), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


def shown(blkloom: str, life: Life, columns: str) -> list[list[str]]:
    """The columns of each partition of `disk`."""
    lines = said(blkloom, life, "partitions", "disk", "--noheadings", "-o", columns).splitlines()
    return [line.split() for line in lines]


def change(connect: Connect, at: int, data: bytes) -> None:
    """Writes to `disk` over NBD."""
    nbd = connect("disk")
    assert nbd.ask(WRITE, at, payload=data).error == 0
    nbd.disconnect()


def test_partitions_are_devices_of_a_device_without_a_node(
    blkloom: str, life: Life, client: Client, image: Path, connect: Connect
) -> None:
    assert said(blkloom, life, "create", "disk", str(image), "-P") == ""
    assert shown(blkloom, life, "nr,start,sectors,device") == [
        ["1", "2048", "16384", "disk1"],
        ["2", "20480", "2048", "disk2"],
    ]
    found = json.loads(said(blkloom, life, "partitions", "disk", "--json"))
    assert (found["device"], found["scheme"]) == ("disk", "gpt")
    assert [(one["nr"], one["end"], one["size"]) for one in found["partitions"]] == [
        (1, 18431, 16384 * 512),
        (2, 22527, 2048 * 512),
    ]
    first, second = connect("disk1"), connect("disk2")
    assert (read(first), read(second)) == (b"1" * 512, b"2" * 512)
    second.disconnect()
    until(client, "disk2", lambda device: device.connections == 0)
    assert "Device disk1 is in use: 1 client is connected" in fails(blkloom, life, "remove", "disk")
    assert [device.name for device in client.info()] == ["disk", "disk1", "disk2"]
    change(connect, 0, mbr((0, 0x83, 4096, 64), (0, 0x83, *SECOND)) + bytes(512))
    assert "in use: disk1" in fails(blkloom, life, "partitions", "disk", "--update")
    assert read(first) == b"1" * 512
    first.disconnect()
    until(client, "disk1", lambda device: device.connections == 0)
    said(blkloom, life, "partitions", "disk", "--update")
    assert shown(blkloom, life, "nr,start,type,scheme,device") == [
        ["1", "4096", "0x83", "dos", "disk1"],
        ["2", "20480", "0x83", "dos", "disk2"],
    ]
    said(blkloom, life, "partitions", "disk", "--remove")
    said(blkloom, life, "partitions", "disk", "--update")  # there are none
    assert [device.name for device in client.info()] == ["disk"]
    said(blkloom, life, "partitions", "disk", "--add")
    said(blkloom, life, "remove", "disk")
    assert client.info() == []


def test_partitions_of_a_block_device_are_nodes_of_the_kernel(
    blkloom: str, life: Life, client: Client, image: Path, program: Program, tmp_path: Path
) -> None:
    """Also if this kernel reads no GPT."""
    node = said(blkloom, life, "create", "disk", str(image), "-P", "--attach").strip()
    assert [(start, length) for _, start, length in kernel_partitions(node).values()] == [FIRST, SECOND]
    assert shown(blkloom, life, "nr,node") == [["1", f"{node}p1"], ["2", f"{node}p2"]]
    assert [device.name for device in client.info()] == ["disk"]
    with ext4(program, f"{node}p1", tmp_path / "m") as place:
        write_and_sync(place / "file")
        with open(node, "r+b", buffering=0) as disk:
            disk.write(mbr((0, 0x83, *FIRST), (0, 0x83, 30000, 64)) + bytes(512))
        assert client.scan_partitions("disk") == []
        assert kernel_partitions(node)[2] == (f"{node}p2", 30000, 64)
        with open(node, "r+b", buffering=0) as disk:
            disk.write(mbr((0, 0x83, 4096, 64)))
        with pytest.raises(DeviceBusy, match=f"{node}p1 is in use: mounted at {place}"):
            client.scan_partitions("disk")
        assert list(kernel_partitions(node)) == [1, 2]
        with pytest.raises(DeviceBusy, match="mounted at"):
            client.scan_partitions("disk", remove=True)
    said(blkloom, life, "partitions", "disk", "--update")
    assert kernel_partitions(node) == {1: (f"{node}p1", 4096, 64)}
    said(blkloom, life, "partitions", "disk", "--add", "--devices")
    assert shown(blkloom, life, "device,node") == [["disk1", f"{node}p1"]]
    said(blkloom, life, "partitions", "disk", "--remove")
    assert kernel_partitions(node) == {}
    client.detach("disk")
    with pytest.raises(UsageError, match="is not attached as a block device"):
        client.scan_partitions("disk")
    client.remove("disk")


def test_partitions_that_the_kernel_has_cached_are_read_again(
    blkloom: str, life: Life, client: Client, tmp_path: Path
) -> None:
    for name, start in (("a", 2048), ("b", 4096)):
        (tmp_path / name).write_bytes(mbr((0, 0x83, start, 64)) + bytes(4 * MiB - 512))
    client.create("disk", table=f"0 8192 loop {tmp_path}/a")
    node = said(blkloom, life, "attach", "disk", "-P").strip()
    assert kernel_partitions(node)[1].start == 2048
    client.load("disk", f"0 8192 loop {tmp_path}/b")
    client.resume("disk")
    said(blkloom, life, "partitions", "disk", "--update")
    assert kernel_partitions(node)[1].start == 4096
    client.remove("disk")


def test_partitions_of_a_file_are_files(blkloom: str, life: Life, client: Client, image: Path) -> None:
    client.create("disk", table=f"0 {SIZE // 512} qcow2 {image}")
    path = said(blkloom, life, "attach", "disk", "-P", "--via", "fuse").strip()
    assert shown(blkloom, life, "device,node") == [["disk1", f"{path}1"], ["disk2", f"{path}2"]]
    with open(f"{path}2", "rb") as opened:
        assert opened.read(4) == b"2222"
        assert f"{path}2: is open" in fails(blkloom, life, "detach", "disk")
    said(blkloom, life, "detach", "disk")
    assert [os.path.lexists(gone) for gone in (path, f"{path}1", f"{path}2")] == [False] * 3
    client.remove("disk")
    assert client.info() == []


def test_a_device_without_a_table_has_no_partitions(blkloom: str, life: Life, client: Client) -> None:
    client.create("disk")
    assert "device 'disk' has no table" in fails(blkloom, life, "partitions", "disk")
    assert "-P is incompatible with --notable" in fails(blkloom, life, "create", "other", "-P", "--notable")
    client.remove("disk")


def test_suspended_devices_keep_their_partitions(blkloom: str, life: Life, client: Client, image: Path) -> None:
    said(blkloom, life, "create", "disk", str(image), "-P", "--attach")
    client.suspend("disk")
    assert "device 'disk' is suspended" in fails(blkloom, life, "partitions", "disk", "--add")
    client.resume("disk")
    node = info(client, "disk").node
    assert node is not None
    assert list(kernel_partitions(node.path)) == [1, 2]
    client.remove("disk")


@pytest.mark.parametrize("how", ["nbd", "attach", "fuse"])
def test_serve_serves_partitions_too(blkloom: str, life: Life, image: Path, program: Program, how: str) -> None:
    file = str(image.parent / "file")
    words = {"nbd": [], "attach": ["--attach"], "fuse": ["--fuse", file]}[how]
    with subprocess.Popen(
        [blkloom, "serve", str(image), "-P", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            first = server.stdout.readline().strip()
            if how == "nbd":
                second = [server.stdout.readline().strip() for _ in range(2)][1]
                assert "/p2?" in second
                sizes = [run(program("nbdinfo", "libnbd-bin"), "--size", uri) for uri in (first, second)]
                assert sizes == [f"{SIZE}\n", f"{SECOND[1] * 512}\n"]
            elif how == "attach":
                assert Path(f"{first}p2").is_block_device()
                assert Path(f"{first}p2").read_bytes()[:4] == b"2222"
            else:
                assert [server.stdout.readline().strip() for _ in range(2)] == [f"{file}1", f"{file}2"]
                assert Path(f"{file}2").read_bytes()[:4] == b"2222"
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
