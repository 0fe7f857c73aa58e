"""I/O errors of a device: the counter, the log, and errors that are not I/O errors."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import blkloom
from blkloom.stats import Stats
from faulty_fs import FaultyFileSystem

SIZE = 1 << 20


@pytest.fixture
def cut(tmp_path: Path) -> Iterator[tuple[Path, blkloom.Device]]:
    """A file that was cut off behind its first page, and the device on it."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    with blkloom.open(f"0 {SIZE // 512} loop {path}", name="disk") as device:
        os.truncate(path, 4096)
        yield path, device


def fails(device: blkloom.Device, offset: int, number: int = errno.EIO) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        device.pread(512, offset)
    assert caught.value.errno == number


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


def test_an_error_is_counted_and_the_log_names_device_operation_offset_errno_and_file(
    cut: tuple[Path, blkloom.Device], caplog: pytest.LogCaptureFixture
) -> None:
    path, device = cut
    fails(device, 65536)
    assert (device.io_errors, device.last_io_error) == (1, ("read", 65536, errno.EIO, str(path)))
    assert Stats.from_engine(device.stats()).io_errors == 1
    assert "I/O errors 1" in Stats.from_engine(device.stats()).to_text()
    device.close()
    said = f"device 'disk': read at byte 65536 failed: Input/output error (EIO), file {path}"
    assert lines(caplog) == [said]


def test_many_errors_are_few_lines_and_none_is_forgotten(
    cut: tuple[Path, blkloom.Device], caplog: pytest.LogCaptureFixture
) -> None:
    path, device = cut
    for time in range(1000):
        fails(device, 65536 + time * 512)
    device.close()
    said = lines(caplog)
    assert len(said) < 100
    times = [int(line.partition(" (EIO)")[2].partition("(")[2].partition(" times")[0] or 1) for line in said]
    assert sum(times) == device.io_errors == 1000
    assert all(str(path) in line for line in said)


def test_what_a_client_may_not_have_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8192))
    with blkloom.open(f"0 8 loop {path} 0 1 read_only\n8 8 error", name="disk") as device:
        fails(device, 8192, errno.EINVAL)
        fails(device, 4096)
        with pytest.raises(OSError, match="Read-only"):
            device.pwrite(b"w", 0)
        assert (device.io_errors, device.last_io_error) == (0, None)
    assert lines(caplog) == []


@pytest.mark.parametrize("options", ["", " 0 1 direct_io"])
def test_writes_that_storage_fails_are_counted(tmp_path: Path, options: str, caplog: pytest.LogCaptureFixture) -> None:
    with FaultyFileSystem(tmp_path / "faulty") as faulty:
        path = faulty.file("disk.img", size=SIZE)
        device = blkloom.open(f"0 {SIZE // 512} loop {path}{options}", name="disk")
        device.pwrite(b"w" * 4096, 8192)
        faulty.fail("write", errno.EIO)
        operation, offset = ("write", 8192) if options else ("flush", 0)
        with pytest.raises(OSError, match=r".") as caught:
            device.pwrite(b"w" * 4096, 8192) if options else device.flush()
        assert caught.value.errno == errno.EIO
        assert (device.io_errors, device.last_io_error) == (1, (operation, offset, errno.EIO, str(path)))
        faulty.mend()
        with suppress(OSError):  # its last flush, if it remembers that one has failed
            device.close()
    where = "write at byte 8192" if options else "flush"
    assert f"device 'disk': {where} failed: Input/output error (EIO), file {path}" in "\n".join(lines(caplog))


def test_a_device_on_another_counts_what_its_own_clients_meet(cut: tuple[Path, blkloom.Device]) -> None:
    path, device = cut
    with blkloom.open("0 8 linear blkloom:disk 128", devices={"disk": device}) as upper:
        fails(upper, 512)
        assert upper.last_io_error == ("read", 512, errno.EIO, str(path))
    assert (upper.io_errors, device.io_errors) == (1, 0)


def test_an_export_counts_none(cut: tuple[Path, blkloom.Device]) -> None:
    _, device = cut
    assert Stats.from_engine(blkloom._engine.Export(device).stats()).io_errors == 0
