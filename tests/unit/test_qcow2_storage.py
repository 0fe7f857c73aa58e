"""A file's bytes: what a file system cannot do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from blkloom.qcow2.storage import FileStorage
from blkloom.qcow2.types import HostOffset


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
