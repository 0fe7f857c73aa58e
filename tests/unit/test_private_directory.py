"""Private directories of `serve --attach`: what killed programs leave is removed, and nothing else."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest

from blkloom.attach.private_directory import PrivateDirectory, remove_abandoned


def test_a_directory_of_a_running_program_stays(tmp_path: Path) -> None:
    directory = PrivateDirectory.make(tmp_path)
    assert asyncio.run(remove_abandoned(tmp_path)) == []
    assert directory.run_dir.path.is_dir()
    directory.close()
    assert list(tmp_path.iterdir()) == []


def test_a_program_killed_before_it_had_a_lock_leaves_nothing(tmp_path: Path) -> None:
    left = tmp_path / "blkloom-serve-killed"
    left.mkdir()
    others = [tmp_path / "blkloom-of-a-user", tmp_path / "blkloom-serve-with-files" / "file"]
    for other in others:
        other.mkdir(parents=True)
    assert asyncio.run(remove_abandoned(tmp_path)) == [f"directory {left}"]
    assert not left.exists()
    assert all(other.exists() for other in others)


def test_a_program_killed_before_its_directory_has_contents_leaves_nothing(tmp_path: Path) -> None:
    left = tmp_path / "blkloom-serve-killed"
    left.mkdir(mode=0o700)
    (left / "serving.lock").touch(0o600)
    other = tmp_path / "file"
    other.touch()
    assert asyncio.run(remove_abandoned(tmp_path)) == [f"directory {left}"]
    assert list(tmp_path.iterdir()) == [other]


def test_a_directory_that_is_removed_before_it_has_a_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tempfile.mkdtemp
    removed: list[str] = []

    def make_and_remove_the_first(*, prefix: str, dir: Path) -> str:
        path = made(prefix=prefix, dir=dir)
        if not removed:
            assert asyncio.run(remove_abandoned(tmp_path)) == [f"directory {path}"]
            removed.append(path)
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_remove_the_first)
    directory = PrivateDirectory.make(tmp_path)
    assert removed
    assert [str(path) for path in tmp_path.iterdir()] == [str(directory.run_dir.path)]
    directory.close()
