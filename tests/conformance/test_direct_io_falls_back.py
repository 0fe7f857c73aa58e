"""Direct I/O on a file system without it: buffered I/O with a warning that gives the reason, or an error if it is
required.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import blkloom
from blkloom.errors import BackingError, TableError

from .backing_files import write_in_extents
from .file_systems import FileSystems, mounted, needs_root

SIZE = 1 << 20
SECTORS = SIZE // 512

Program = Callable[[str, str], str]


def a_file(folder: Path, size: int = SIZE) -> Path:
    path = folder / "direct.img"
    write_in_extents(str(path), os.urandom(SIZE), extents=1)
    os.truncate(path, size)
    return path


@contextmanager
def opened(table: str, caplog: pytest.LogCaptureFixture) -> Iterator[tuple[blkloom.Device, str]]:
    """A device, and the warnings of its loading."""
    caplog.clear()
    with caplog.at_level(logging.WARNING), blkloom.open(table) as device:
        yield device, caplog.text


def mode(device: blkloom.Device) -> str:
    ((_, _, _, text),) = device.status()
    return text.split()[0]


def works(device: blkloom.Device) -> None:
    """What is written is read again, at any alignment."""
    device.pwrite(b"w" * 1000, 300)
    device.flush()
    assert device.pread(1100, 250)[50:1050] == b"w" * 1000


def falls_back(table: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """`table` says `direct_io`: with a warning; with `direct_io=require` it is refused, for the same reason."""
    with opened(table, caplog) as (device, warnings):
        assert mode(device) == "file"
        assert reason in warnings
        works(device)
    with (
        pytest.raises((TableError, BackingError), match=reason),
        opened(table.replace("direct_io", "direct_io=require"), caplog),
    ):
        pass


@pytest.mark.parametrize("place", ["ext4", "ext4_4k", "xfs", "xfs_4k", "btrfs"])
@pytest.mark.parametrize("word", ["direct_io", "direct_io=require"])
def test_direct_io_is_used_where_it_can_be(
    file_systems: FileSystems, place: str, word: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = a_file(file_systems.place(place))
    with opened(f"0 {SECTORS - 8} loop {path} 4096 1 {word}", caplog) as (device, warnings):
        assert mode(device) == "direct_io"
        assert warnings == ""
        works(device)


def test_an_offset_that_fits_no_block_of_the_disk(file_systems: FileSystems, caplog: pytest.LogCaptureFixture) -> None:
    path = a_file(file_systems.place("ext4_4k"))
    falls_back(f"0 {SECTORS - 8} loop {path} 1536 1 direct_io", "1536", caplog)


def test_an_offset_of_sectors_is_enough_on_a_disk_of_sectors(
    file_systems: FileSystems, caplog: pytest.LogCaptureFixture
) -> None:
    path = a_file(file_systems.place("ext4"))
    with opened(f"0 {SECTORS - 8} loop {path} 1536 1 direct_io=require", caplog) as (device, _):
        assert mode(device) == "direct_io"
        works(device)


def test_a_file_that_ends_inside_a_block_of_the_disk(
    file_systems: FileSystems, caplog: pytest.LogCaptureFixture
) -> None:
    path = a_file(file_systems.place("ext4_4k"), SIZE - 512)
    falls_back(f"0 {SECTORS - 1} loop {path} 0 1 direct_io", "ends", caplog)


def test_a_segment_that_leaves_out_the_last_block_of_such_a_file(
    file_systems: FileSystems, caplog: pytest.LogCaptureFixture
) -> None:
    path = a_file(file_systems.place("ext4_4k"), SIZE - 512)
    with opened(f"0 {SECTORS - 8} loop {path} 0 1 direct_io=require", caplog) as (device, _):
        assert mode(device) == "direct_io"
        works(device)


def test_a_block_size_for_clients_smaller_than_the_disk_s(
    file_systems: FileSystems, caplog: pytest.LogCaptureFixture
) -> None:
    path = a_file(file_systems.place("xfs_4k"))
    falls_back(f"0 {SECTORS} loop {path} 0 2 direct_io block_size=512", "block", caplog)


def test_a_file_system_that_knows_no_direct_io(
    program: Program, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    needs_root("ramfs")
    with mounted(program, "ramfs", "ramfs", tmp_path / "ramfs", "rw") as place:
        path = place / "disk.img"
        path.write_bytes(bytes(SIZE))
        falls_back(f"0 {SECTORS} loop {path} 0 1 direct_io", "file system", caplog)


@pytest.mark.parametrize(
    ("place", "word", "logical"), [("ext4", "direct_io", 512), ("ext4_4k", "direct_io", 4096), ("ext4_4k", "", 512)]
)
def test_what_direct_io_needs_is_what_the_device_asks_of_its_clients(
    file_systems: FileSystems, place: str, word: str, logical: int
) -> None:
    path = a_file(file_systems.place(place))
    with blkloom.open(f"0 {SECTORS} loop {path} 0 {f'1 {word}' if word else ''}") as device:
        assert device.limits.logical == logical
        assert device.limits.optimal >= 4096
