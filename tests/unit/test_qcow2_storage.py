"""Storage of an image file on file systems without some features."""

from __future__ import annotations

import errno
import mmap
import os
import random
from pathlib import Path

import numpy as np
import pytest

from blkloom.image.storage import FileStorage
from blkloom.image.types import HostOffset


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The error that every fallocate ends with ("error"), and how many there were ("calls")."""
    state = {"error": errno.EOPNOTSUPP, "calls": 0}

    def fallocate(storage: FileStorage, mode: int, offset: int, length: int) -> None:
        state["calls"] += 1
        raise OSError(state["error"], os.strerror(state["error"]))

    monkeypatch.setattr(FileStorage, "_fallocate", fallocate)
    return state


def test_a_file_system_without_holes_is_asked_once(tmp_path: Path, refused: dict[str, int]) -> None:
    with (tmp_path / "file").open("wb+", buffering=0) as file:
        file.write(b"x" * 4096)
        storage = FileStorage(file.fileno(), file.name)
        assert [storage.punch(HostOffset(0), 512) for _ in range(3)] == [False] * 3
        assert refused["calls"] == 1
        storage.zero(HostOffset(512), 512)
        storage.reserve(HostOffset(0), 512)
        assert storage.read(HostOffset(0), 4096) == b"x" * 512 + bytes(512) + b"x" * 3072


def test_a_file_system_that_fails_is_no_file_system_without_holes(tmp_path: Path, refused: dict[str, int]) -> None:
    refused["error"] = errno.EIO
    with (tmp_path / "file").open("wb+", buffering=0) as file:
        storage = FileStorage(file.fileno(), file.name)
        for _ in range(2):
            with pytest.raises(OSError, match=rf"\[Errno {errno.EIO}\]"):
                storage.punch(HostOffset(0), 512)
            with pytest.raises(OSError, match=rf"\[Errno {errno.EIO}\]"):
                storage.reserve(HostOffset(0), 512)
        assert refused["calls"] == 4


def test_what_is_written_lies_in_pages_as_it_will_in_the_file(
    tmp_path: Path, refused: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may stop where a page of the caller's ends: a sector in two pages could be torn by a crash."""
    pwrite, starts = os.pwrite, list[int]()

    def watched(fd: int, data: memoryview, offset: int) -> int:
        address = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        starts.append((address - offset) % mmap.PAGESIZE)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    expected = bytearray(4 << 20)
    with (tmp_path / "file").open("wb+", buffering=0) as file:
        storage = FileStorage(file.fileno(), file.name)
        for offset, length in [(0, 512), (8, 8), (512, 65536), (1 << 20, 2 << 20), (5000, 1 << 20), (4095, 2)]:
            data = random.Random(offset).randbytes(length)
            storage.write(HostOffset(offset), data)
            expected[offset : offset + length] = data
        for offset, length in [(1024, 512), (1536, 3 << 20), (777, 5)]:
            storage.zero(HostOffset(offset), length)
            expected[offset : offset + length] = bytes(length)
        assert storage.read(HostOffset(0), len(expected)) == expected
    assert len(starts) >= 9
    assert not any(starts)


@pytest.mark.parametrize("most", [700, 100, 1])
def test_a_write_that_stops_inside_a_sector_goes_on_at_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    pwrite, ranges = os.pwrite, list[tuple[int, int]]()

    def short(fd: int, data: memoryview, offset: int) -> int:
        done = pwrite(fd, data[:most], offset)
        ranges.append((offset, offset + done))
        return done

    monkeypatch.setattr(os, "pwrite", short)
    data = random.Random(most).randbytes(2000)
    with (tmp_path / "file").open("wb+", buffering=0) as file:
        storage = FileStorage(file.fileno(), file.name)
        storage.write(HostOffset(512), data)
        assert storage.read(HostOffset(512), 2000) == data
    if most > 512:
        assert [start for start, _ in ranges] == [512, 1024, 1536, 2048]


def test_a_write_of_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    with (tmp_path / "file").open("wb+", buffering=0) as file:
        storage = FileStorage(file.fileno(), file.name)
        with pytest.raises(OSError, match=rf"\[Errno {errno.EIO}\]"):
            storage.write(HostOffset(0), b"x")
