"""The loop target's options on plain files: opening, announced block sizes, status."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import blkloom
from blkloom.errors import BackingError, TableError
from blkloom.table import Table, format_table
from blkloom.targets.limits import BlockLimits

SIZE = 1 << 20
SECTORS = SIZE // 512


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def test_status_says_way_extents_queue_and_path(file: Path) -> None:
    with blkloom.open(f"0 8 loop {file}\n8 8 loop {file} 4096 1 read_only", shared=True) as device:
        assert [text for *_, text in device.status()] == [f"file 1 0 {file}"] * 2


@pytest.mark.parametrize("size", [512, 1024, 2048, 4096])
def test_the_block_size_asked_for_is_what_clients_are_told(file: Path, size: int) -> None:
    with blkloom.open(f"0 64 loop {file} 4096 1 block_size={size}") as device:
        assert device.limits == BlockLimits(size, 4096)
        assert device.pwrite(b"x" * 100, 50) == 100, "it is a wish, no duty"


def test_the_largest_block_size_of_the_segments_counts(file: Path) -> None:
    table = f"0 64 loop {file} 0 1 block_size=1024\n64 64 loop {file} 65536 1 block_size=2048"
    with blkloom.open(table) as device:
        assert device.limits.logical == 2048


def test_what_makes_no_whole_blocks_is_refused(file: Path) -> None:
    told = r"Unaligned length: must be a multiple of .* 4096 bytes: '32256' \(make it 56 sectors"
    with pytest.raises(TableError, match=told):
        blkloom.open(f"0 63 loop {file} 4096 1 block_size=4096")


@pytest.mark.parametrize("mode", ["", "direct_io"])
def test_blocks_may_begin_at_any_sector_of_the_file(file: Path, mode: str) -> None:
    """As with losetup -o 512 -b 4096."""
    options = f"{2 if mode else 1} block_size=4096 {mode}"
    with blkloom.open(f"0 64 loop {file} 512 {options}") as device:
        assert device.limits.logical == 4096
        device.pwrite(b"x" * 4096, 8192)
        device.flush()
    assert file.read_bytes()[8704 : 8704 + 4096] == b"x" * 4096


def test_a_file_that_ends_inside_a_block_is_warned_of(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with file.open("ab") as stream:
        stream.write(b"x" * 77)
    with caplog.at_level(logging.WARNING), blkloom.open(f"0 {SECTORS} loop {file}"):
        pass
    assert "not using 77 bytes in incomplete block at EOF" in caplog.text


def test_read_only_auto_writes_where_it_can(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), blkloom.open(f"0 {SECTORS} loop {file} 0 1 read_only=auto") as device:
        assert device.pwrite(b"w" * 512, 0) == 512
    assert caplog.text == ""


def test_read_only_auto_reads_what_cannot_be_written_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A program that runs cannot be written to, not by root either (ETXTBSY)."""
    program = shutil.which("sleep")
    assert program is not None
    path = Path(shutil.copy(program, tmp_path / "sleep"))
    sectors = path.stat().st_size // 512
    with subprocess.Popen([path, "60"]) as running:
        try:
            with pytest.raises(BackingError) as raised:
                blkloom.open(f"0 {sectors} loop {path}")
            assert raised.value.errno == errno.ETXTBSY
            with (
                caplog.at_level(logging.WARNING),
                blkloom.open(f"0 {sectors} loop {path} 0 1 read_only=auto") as device,
            ):
                assert device.pread(4, 0) == b"\x7fELF"
                with pytest.raises(OSError, match="Read-only file system"):
                    device.pwrite(b"w" * 512, 0)
            assert f"{path}: cannot be written to (Text file busy); it is read-only" in caplog.text
        finally:
            running.kill()


def test_read_only_auto_does_not_pass_over_other_errors(tmp_path: Path) -> None:
    with pytest.raises(BackingError, match="No such file"):
        blkloom.open(f"0 8 loop {tmp_path / 'nowhere'} 0 1 read_only=auto")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("2 block_map direct_io", "exclude each other"),
        ("2 block_map block_map=try", "exclude each other"),
        ("2 read_only read_only=auto", "exclude each other"),
        ("2 block_size=512 block_size=4096", "exclude each other"),
        ("2 block_map block_map", "given twice"),
        ("1 block_size=8192", "unknown option"),
        ("1 block_size=", "unknown option"),
        ("1 immutable=off", "goes with block_map only"),
        ("2 direct_io immutable=off", "goes with block_map only"),
    ],
)
def test_options_that_do_not_go_together(file: Path, options: str, what: str) -> None:
    with pytest.raises(TableError, match=what):
        blkloom.open(f"0 8 loop {file} 0 {options}")


# a file that ends inside a sector


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """One sector and 488 bytes."""
    path = tmp_path / "odd.img"
    path.write_bytes(b"x" * 1000)
    return path


def test_a_file_given_by_its_path_is_rounded_up_to_a_sector(odd: Path) -> None:
    with blkloom.open(odd) as device:
        assert device.table is not None
        assert format_table(device.table) == f"0 2 loop {odd} 0 1 round_up"
        assert device.pread(1024, 0) == b"x" * 1000 + bytes(24)
    assert odd.stat().st_size == 1000, "reading made it longer"


@pytest.mark.parametrize("change", ["pwrite", "write_zeroes"])
def test_a_write_into_the_last_sector_makes_the_file_a_whole_one(odd: Path, change: str) -> None:
    with blkloom.open(odd) as device:
        if change == "pwrite":
            device.pwrite(b"w" * 30, 990, fua=True)
        else:
            device.write_zeroes(990, 30)
        new = b"w" * 30 if change == "pwrite" else bytes(30)
        assert device.pread(1024, 0) == b"x" * 990 + new + bytes(4)
        device.pwrite(b"e", 1023)
    assert odd.read_bytes() == b"x" * 990 + new + b"\0\0\0e"


def test_a_discard_of_the_last_sector_zeroes_what_the_file_has_of_it(odd: Path) -> None:
    with blkloom.open(odd) as device:
        device.discard(990, 34)
        assert device.pread(1024, 0) == b"x" * 990 + bytes(34)
        assert odd.stat().st_size == 1000, "the file does not grow for what it need not keep"
        device.pwrite(b"y" * 34, 990)
        device.discard(512, 512)
        assert device.pread(1024, 0) == b"x" * 512 + bytes(512)
    assert odd.read_bytes() == b"x" * 512 + bytes(512)


@pytest.mark.parametrize("option", ["device", "table"])
def test_a_read_only_file_is_rounded_up_for_reading(odd: Path, option: str) -> None:
    table = f"0 2 loop {odd} 0 2 read_only round_up" if option == "table" else f"0 2 loop {odd} 0 1 round_up"
    with blkloom.open(table, read_only=option == "device") as device:
        assert device.pread(100, 924) == b"x" * 76 + bytes(24)
        for change in (
            lambda: device.pwrite(b"w", 1020),
            lambda: device.write_zeroes(600, 8),
            lambda: device.discard(512, 512),
        ):
            with pytest.raises(OSError, match=r".") as caught:
                change()
            assert caught.value.errno == errno.EROFS
    assert odd.read_bytes() == b"x" * 1000


def test_a_last_sector_that_was_cut_off_is_an_error_and_is_not_written_back(odd: Path) -> None:
    with blkloom.open(odd) as device:
        os.truncate(odd, 700)
        for access in (lambda: device.pread(512, 512), lambda: device.pwrite(b"w", 1020)):
            with pytest.raises(OSError, match=r".") as caught:
                access()
            assert caught.value.errno == errno.EIO
    assert odd.stat().st_size == 700


def test_a_last_sector_that_another_has_completed_is_read_from_the_file(odd: Path) -> None:
    with blkloom.open(odd, shared=True) as device:
        with odd.open("ab") as other:
            other.write(b"y" * 100)
        assert device.pread(512, 512) == b"x" * 488 + b"y" * 24
        device.pwrite(b"w", 1023)
    assert odd.read_bytes() == b"x" * 1000 + b"y" * 23 + b"w" + b"y" * 76


def test_the_last_sector_is_buffered_where_direct_io_cannot_reach_it(
    odd: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with blkloom.open(odd, direct_io=True) as device:
        device.pwrite(b"w", 1023)
        assert device.pread(2, 1022) == b"\0w"


@pytest.mark.parametrize("file", ["empty", "image"])
def test_an_empty_file_is_a_device_of_size_0(tmp_path: Path, qemu_tools: None, file: str) -> None:
    path = tmp_path / "disk.qcow2"
    if file == "image":
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "0"], check=True)
    else:
        path = tmp_path / "disk.img"
        path.touch()
    with blkloom.open(path) as device:
        assert (device.size, device.table, device.status(), device.extents()) == (0, Table(()), [], [])
        device.flush()
        assert device.pread(0, 0) == b""
        for access in (lambda: device.pread(1, 0), lambda: device.pwrite(b"w", 0)):
            with pytest.raises(OSError, match=r"."):
                access()


def test_round_up_is_refused_where_it_has_no_meaning(odd: Path) -> None:
    with pytest.raises(TableError, match="does not go with block_map"):
        blkloom.open(f"0 2 loop {odd} 0 2 block_map round_up")
    with pytest.raises(TableError, match="2 sectors are there"):
        blkloom.open(f"0 3 loop {odd} 0 1 round_up")
