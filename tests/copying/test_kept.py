"""Files that `blkloom copy` must not destroy or take for its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blkloom import open as open_device
from blkloom import open_files
from blkloom.copying.ends import file_end
from blkloom.copying.failing import CopyFailed
from blkloom.copying.journal import _NEW, JournalError
from blkloom.copying.running import Settings

from .conftest import Copy
from .ended_in_process import SECTORS, SHAPE, SIZE, copy_to, end, interrupted, new
from .shapes import make


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk."""
    return make(tmp_path / "disk.img", SHAPE)


def test_a_copy_begins_again_in_the_file_that_it_has_made_only(copy: Copy, disk: Path, tmp_path: Path) -> None:
    """Nothing was copied, and the journal says so."""
    target, state = tmp_path / "copy.img", tmp_path / "copy.img.blkloom-copy"
    with pytest.raises(CopyFailed):
        copy_to(end(f"0 {SECTORS} error"), new(target), Settings())
    noted = state.read_bytes()
    target.rename(tmp_path / "own.img")
    target.write_bytes(b"good")
    assert "not the file that it has made" in copy("--resume", disk, target, status=65).stderr
    assert target.read_bytes() == b"good"
    assert state.read_bytes() == noted
    (tmp_path / "own.img").replace(target)
    copy("--resume", disk, target)
    assert target.read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("name", ["disk.img", "copy.img", "notes", "pipe"])
def test_no_other_file_becomes_the_state(copy: Copy, disk: Path, tmp_path: Path, name: str) -> None:
    before = disk.read_bytes()
    (tmp_path / "notes").write_text("notes")
    os.mkfifo(tmp_path / "pipe")
    said = copy("--state", tmp_path / name, disk, tmp_path / "copy.img", status=65).stderr
    assert "not the state of a copy" in said
    assert disk.read_bytes() == before
    assert (tmp_path / "notes").read_text() == "notes"
    assert (tmp_path / "pipe").is_fifo()
    assert not (tmp_path / "copy.img").exists()


def test_a_link_that_others_made_is_not_written_to(copy: Copy, disk: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("victim")
    (tmp_path / f"copy.img.blkloom-copy{_NEW}").symlink_to(tmp_path / "victim")
    copy(disk, tmp_path / "copy.img")
    assert (tmp_path / "victim").read_text() == "victim"


def test_a_copy_that_is_refused_leaves_states_as_they_were(copy: Copy, disk: Path, tmp_path: Path) -> None:
    small, state = tmp_path / "small.img", tmp_path / "small.img.blkloom-copy"
    small.write_bytes(bytes(SIZE - 512))
    copy("-n", disk, small, status=64)
    assert not state.exists()
    target, state = tmp_path / "copy.img", tmp_path / "copy.img.blkloom-copy"
    interrupted(disk, target)
    noted = state.read_bytes()
    with open_device(target):  # as another copy has it
        copy("-n", disk, target, status=75)
        copy("--force", disk, target, status=75)
    assert state.read_bytes() == noted
    copy("--resume", disk, target)
    assert target.read_bytes() == disk.read_bytes()


def test_a_later_file_with_the_same_inode_is_another_one(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "copy.img"
    interrupted(disk, target)
    generation, inode = open_files.generation, target.stat().st_ino
    monkeypatch.setattr(open_files, "generation", lambda fd: generation(fd) + (os.fstat(fd).st_ino == inode))
    with pytest.raises(JournalError, match="DST is not what it was: its generation"):
        copy_to(file_end(str(disk)), new(target), Settings(resume=True))


@pytest.mark.parametrize("options", [["--no-flush"], ["--state", "elsewhere"]])
def test_what_is_noted_of_former_contents_is_forgotten(
    copy: Copy, disk: Path, tmp_path: Path, options: list[str]
) -> None:
    target = tmp_path / "copy.img"
    interrupted(disk, target)
    other = make(tmp_path / "other.img", SHAPE, seed=2)
    words = [str(tmp_path / word) if word == "elsewhere" else word for word in options]
    copy(*words, "--force", other, target)
    assert "was interrupted" in copy("--resume", disk, target, status=64).stderr
    assert target.read_bytes() == other.read_bytes()
    Path(f"{target}.blkloom-copy").write_text("a file of the user")
    copy(*words, "--force", other, target)
    assert Path(f"{target}.blkloom-copy").read_text() == "a file of the user"
