"""What `blkloom copy` refuses, and what it says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .conftest import Copy
from .shapes import M, make

SHAPE = (M, ((0, M, True),))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk."""
    return make(tmp_path / "disk.img", SHAPE)


def test_a_file_with_contents_is_kept(copy: Copy, disk: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.img"
    kept.write_bytes(b"kept")
    said = copy(disk, kept, status=64).stderr
    assert "exists and is not empty" in said
    assert "--force" in said
    assert kept.read_bytes() == b"kept"


def test_a_target_that_is_smaller_is_not_touched(copy: Copy, disk: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.img"
    small.write_bytes(b"s" * (M - 512))
    assert "must not be smaller" in copy("-n", disk, small, status=64).stderr
    assert small.read_bytes() == b"s" * (M - 512)


@pytest.mark.parametrize("options", [["--force"], ["-n"]])
def test_a_disk_is_not_copied_to_itself(copy: Copy, disk: Path, tmp_path: Path, options: list[str]) -> None:
    before = disk.read_bytes()
    os.link(disk, tmp_path / "other.img")
    assert "are the same" in copy(*options, disk, tmp_path / "other.img", status=64).stderr
    assert disk.read_bytes() == before


def test_pipes_servers_and_directories_are_no_ends(copy: Copy, disk: Path, tmp_path: Path) -> None:
    assert "cannot be a pipe" in copy(disk, "-", status=64).stderr
    assert "cannot be a pipe" in copy("-", disk, status=64).stderr
    assert "must be a regular file" in copy(tmp_path, disk, "-n", status=66).stderr
    assert "must be a regular file" in copy(disk, tmp_path, status=66).stderr
    assert "No such file" in copy(tmp_path / "none.img", disk, "-n", status=66).stderr


def test_a_raw_file_that_looks_like_an_image_needs_a_word(copy: Copy, disk: Path, tmp_path: Path) -> None:
    copy(disk, tmp_path / "disk.qcow2")
    hidden = (tmp_path / "disk.qcow2").rename(tmp_path / "hidden.img")
    said = copy(hidden, tmp_path / "copy.img", status=64).stderr
    assert "--source-format qcow2" in said
    copy("-f", "raw", hidden, tmp_path / "raw.img")
    assert (tmp_path / "raw.img").read_bytes() == hidden.read_bytes()
    copy("-f", "qcow2", hidden, tmp_path / "disk")
    assert (tmp_path / "disk").read_bytes() == disk.read_bytes()


def test_options_that_exclude_each_other_are_named(copy: Copy, disk: Path, tmp_path: Path) -> None:
    assert "exclude each other" in copy("--force", "--resume", disk, tmp_path / "x", status=64).stderr
    assert "--no-flush" in copy("--no-flush", "--resume", disk, tmp_path / "x", status=64).stderr
    assert "is not a size" in copy("--rate", "fast", disk, tmp_path / "x", status=64).stderr
    assert not (tmp_path / "x").exists()


def test_a_file_in_use_is_not_overwritten(copy: Copy, disk: Path, tmp_path: Path) -> None:
    from blkloom import open as open_device

    used = make(tmp_path / "used.img", SHAPE, seed=2)
    before = used.read_bytes()
    with open_device(used):
        assert "already in use" in copy("--force", disk, used, status=75).stderr
        assert "already in use" in copy("-n", disk, used, status=75).stderr
        assert "already in use" in copy(used, tmp_path / "new.img", status=75).stderr
    assert used.read_bytes() == before
    assert not (tmp_path / "new.img").exists()
