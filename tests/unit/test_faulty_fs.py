"""The file system that fails on command, and this machine's kernel, behave as the tests with it assume."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from faulty_fs import FaultyFileSystem

BEFORE, AFTER = b"A" * 4096, b"B" * 4096


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultyFileSystem]:
    with FaultyFileSystem(tmp_path / "faulty") as faulty:
        yield faulty


@pytest.fixture
def fd(faulty: FaultyFileSystem) -> Iterator[int]:
    fd = os.open(faulty.file("file", contents=BEFORE), os.O_RDWR)
    yield fd
    os.close(fd)


def test_what_was_written_and_synced_is_on_the_disk(faulty: FaultyFileSystem, fd: int) -> None:
    os.pwrite(fd, AFTER, 0)
    assert faulty.on_disk("file").read_bytes() == BEFORE, "it is cached"
    os.fdatasync(fd)
    assert faulty.on_disk("file").read_bytes() == AFTER


def test_a_failed_sync_is_told_once_and_what_was_written_is_lost(faulty: FaultyFileSystem, fd: int) -> None:
    faulty.fail("write", errno.EIO)
    os.pwrite(fd, AFTER, 0)
    with pytest.raises(OSError, match="Input/output error"):
        os.fdatasync(fd)
    faulty.mend()
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fd, 4096, 0) == BEFORE
    assert faulty.on_disk("file").read_bytes() == BEFORE


def test_each_open_file_description_is_told_of_an_error(faulty: FaultyFileSystem, fd: int) -> None:
    other = os.open(faulty.mount / "file", os.O_RDWR)
    faulty.fail("write", errno.EIO)
    os.pwrite(fd, AFTER, 0)
    for descriptor in (os.dup(fd), other):
        with pytest.raises(OSError, match="Input/output error"):
            os.fdatasync(descriptor)
        os.close(descriptor)
    os.fdatasync(fd)  # a duplicate of it was told


def test_only_the_named_file_fails_and_only_so_often(faulty: FaultyFileSystem, fd: int) -> None:
    path = faulty.file("another")
    faulty.fail("fsync", errno.ENOSPC, name="another", count=1)
    os.fdatasync(fd)
    with path.open("r+b") as another:
        with pytest.raises(OSError, match="No space left on device"):
            os.fdatasync(another.fileno())
        os.fdatasync(another.fileno())


def test_files_are_made_listed_renamed_and_removed(faulty: FaultyFileSystem) -> None:
    for name in ("one", "two"):
        faulty.file(name, size=5)
    (faulty.mount / "one").rename(faulty.mount / "three")
    (faulty.mount / "two").unlink()
    assert [path.name for path in faulty.mount.iterdir()] == ["three"]
    assert (faulty.mount / "three").stat().st_size == 5
