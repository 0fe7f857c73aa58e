"""Partitions of loop devices: found, kept and removed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from blkloom.control.client import Client
from conformance.file_systems import EXT4, made_on_a_device
from conformance.nbd_client import READ_ONLY, NbdClient
from partition_images import gpt, mbr

from .conftest import Life, info, read
from .loop_commands import Loop, cells, names, until_gone

pytestmark = pytest.mark.timeout(180)
MIB = 1 << 20


@pytest.fixture
def life(shared: Life) -> Life:
    """The module's."""
    return shared


@pytest.fixture
def partitioned(tmp_path: Path) -> Path:
    """A disk of 1 MiB with partition 1, an extended one with 5, and 3; each full of its number."""
    return write_partitions(tmp_path / "disk.img", {1: (64, 64), 2: (256, 256), 3: (1024, 512), 5: (272, 32)})


def write_partitions(path: Path, partitions: dict[int, tuple[int, int]]) -> Path:
    """Start and length in sectors; 2 is the extended one."""
    data = bytearray(path.read_bytes() if path.exists() else bytes(MIB))
    primary = [partitions.get(number, (0, 0)) for number in (1, 2, 3, 4)]
    data[:512] = mbr(*((0, 5 if number == 2 else 0x83, *piece) for number, piece in enumerate(primary, 1)))
    for number, (start, length) in partitions.items():
        if number != 2:
            data[start * 512 : (start + length) * 512] = b"%d" % number * (length * 512)
    if 5 in partitions:
        record = partitions[2][0]
        data[record * 512 : record * 512 + 512] = mbr((0, 0x83, partitions[5][0] - record, partitions[5][1]))
    path.write_bytes(data)
    return path


def test_the_block_size_is_that_of_the_gpt_unless_it_is_given(loop: Loop, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8192) + gpt((100, 199), block=4096, count=16))
    assert loop("-f", "--show", "-P", "-o", "8192", path) == "loop0\n"
    assert client.table("loop0") == f"0 32768 loop {path} 8192 1 block_size=4096"
    assert client.table("loop0p1") == "0 800 linear blkloom:loop0 800"
    loop("-D")
    done = loop.run("-f", "--show", "-P", "-b", "512", "-o", "8192", path)
    assert (done.returncode, done.stdout) == (0, "loop0\n")
    assert "there is a GPT for blocks of 4096 bytes, and the device has blocks of 512; use -b 4096" in done.stderr


def tables(client: Client) -> dict[str, str]:
    """Of the partitions."""
    return {device.name: client.table(device.name) for device in client.info() if device.deps[0].startswith("blkloom:")}


def test_partitions_are_devices_that_stand_on_theirs_and_go_before_it(
    loop: Loop, client: Client, partitioned: Path, connect: Callable[[str], NbdClient]
) -> None:
    assert loop("-P", "-f", "--show", partitioned) == "loop0\n"
    assert tables(client) == {
        "loop0p1": "0 64 linear blkloom:loop0 64",
        "loop0p2": "0 2 linear blkloom:loop0 256",
        "loop0p3": "0 512 linear blkloom:loop0 1024",
        "loop0p5": "0 32 linear blkloom:loop0 272",
    }
    clients = [connect(f"loop0p{number}") for number in (1, 3, 5)]
    assert [read(nbd) for nbd in clients] == [b"1" * 512, b"3" * 512, b"5" * 512]
    assert cells(loop("-n", "-O", "NAME,PARTSCAN")) == ["loop0", "1"]
    assert "a partition" in loop.fails("-d", "loop0p1")
    loop("-d", "loop0")
    assert names(client) == ["loop0", "loop0p1", "loop0p3", "loop0p5"]  # these have clients
    for nbd in clients:
        nbd.disconnect()
    until_gone(client, "loop0", "loop0p1", "loop0p3", "loop0p5")


def test_partitions_of_a_read_only_device_are_read_only(
    loop: Loop, partitioned: Path, connect: Callable[[str], NbdClient]
) -> None:
    loop("-r", "-P", "--name", "disk", "-f", partitioned)
    assert connect("disk1").flags & READ_ONLY


def test_partitions_are_found_at_the_block_size_there_is_and_without_a_client_noticed(
    loop: Loop, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(mbr((0, 0x83, 2, 3)).ljust(MIB, b"\0"))
    loop("-P", "-f", "-b", "4096", "--autoclear", path)
    assert tables(client) == {"loop0p1": "0 24 linear blkloom:loop0 16"}
    assert info(client, "loop0").size == MIB


def test_set_capacity_reads_partitions_again_and_leaves_the_right_ones_alone(
    loop: Loop, client: Client, partitioned: Path, connect: Callable[[str], NbdClient]
) -> None:
    loop("-P", "-f", partitioned)
    nbd = connect("loop0p1")
    number = info(client, "loop0p1").minor
    write_partitions(partitioned, {1: (64, 64), 3: (1024, 600), 4: (1800, 100)})
    loop("-c", "loop0")
    assert tables(client) == {
        "loop0p1": "0 64 linear blkloom:loop0 64",
        "loop0p3": "0 600 linear blkloom:loop0 1024",
        "loop0p4": "0 100 linear blkloom:loop0 1800",
    }
    assert info(client, "loop0p1").minor == number
    assert read(nbd) == b"1" * 512
    os.truncate(partitioned, 1024 * 512)
    done = loop.run("-c", "loop0")
    assert (done.returncode, done.stderr.count("is beyond the end of the device")) == (0, 2)
    assert sorted(tables(client)) == ["loop0p1"]
    assert read(nbd) == b"1" * 512


def test_a_partition_in_use_that_should_be_another_is_kept_and_that_is_said(
    loop: Loop, client: Client, partitioned: Path, connect: Callable[[str], NbdClient]
) -> None:
    loop("-P", "-f", partitioned)
    nbd = connect("loop0p1")
    assert read(nbd) == b"1" * 512
    write_partitions(partitioned, {1: (32, 64)})
    said = loop.fails("-c", "loop0")
    assert said.startswith("blkloom: loop0: failed to reread partitions: Device or resource busy\n")
    assert len(tables(client)) == 4
    assert tables(client)["loop0p1"] == "0 64 linear blkloom:loop0 64"
    nbd.disconnect()
    while info(client, "loop0p1").connections:
        pass
    loop("-c", "loop0")
    assert tables(client) == {"loop0p1": "0 64 linear blkloom:loop0 32"}


def test_what_is_wrong_with_a_partition_table_is_told_and_the_device_stays(
    loop: Loop, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(mbr((0, 0x83, 64, 64), (0, 0x83, 9999, 1), (0, 0x83, 2000, 100)).ljust(MIB, b"\0"))
    done = loop.run("-P", "-f", "--show", path)
    assert (done.returncode, done.stdout) == (0, "loop0\n")
    assert done.stderr.splitlines() == [
        "blkloom: loop0: partition 2: start 9999 is beyond the end of the device; left out",
        "blkloom: loop0: partition 3: size 100 extends beyond the end of the device; truncated",
    ]
    assert sorted(tables(client)) == ["loop0p1", "loop0p3"]


def test_a_name_without_a_digit_at_its_end_needs_no_p(loop: Loop, client: Client, partitioned: Path) -> None:
    loop("-P", "disk", partitioned)
    assert sorted(tables(client)) == ["disk1", "disk2", "disk3", "disk5"]


def test_a_block_map_is_shown_as_the_mode_and_its_partitions_are_found(
    loop: Loop, client: Client, program: Callable[[str, str], str], partitioned: Path, tmp_path: Path
) -> None:
    with made_on_a_device(program, EXT4, 512, tmp_path) as (place, _), ExitStack() as stack:
        stack.callback(client.remove_all, force=True)
        path = place / "disk.img"
        path.write_bytes(partitioned.read_bytes())  # without holes
        assert loop("-f", "--show", "-P", "--block-map", path) == "loop0\n"
        assert cells(loop("-n", "-O", "MODE,DIO", "loop0")) == ["block_map", "0"]
        assert sorted(tables(client)) == ["loop0p1", "loop0p2", "loop0p3", "loop0p5"]
        loop("-c", "loop0")
        assert cells(loop("-n", "-O", "MODE", "loop0")) == ["block_map"]
        loop("-d", "loop0")
        assert client.info() == []
        path.write_bytes(bytes(4096))
        os.truncate(path, 8192)
        said = loop.fails("-f", "--block-map", path)
        assert said.startswith(f"blkloom: {path}: failed to set up loop device: ")
        assert "block map is not possible" in said
