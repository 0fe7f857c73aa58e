"""What `blkloom copy` prints."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from .conftest import Copy
from .shapes import M, make

SHAPE = (3 * M, ((0, M, True),))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk."""
    return make(tmp_path / "disk.img", SHAPE)


def on_a_terminal(command: list[str]) -> bytes:
    """What a command prints to a terminal that is its standard error."""
    ours, its = os.openpty()
    try:
        with subprocess.Popen(command, stderr=its) as process:
            os.close(its)
            shown = b""
            while True:
                try:
                    shown += os.read(ours, 4096)
                except OSError:  # EIO: the command has closed the terminal
                    break
        assert process.returncode == 0, shown
        return shown
    finally:
        os.close(ours)


def test_a_terminal_shows_the_progress_of_the_copy_and_of_verify(blkloom: str, disk: Path, tmp_path: Path) -> None:
    command = [blkloom, "--run-dir", str(tmp_path / "run"), "copy", str(disk)]
    shown = on_a_terminal([*command, str(tmp_path / "copy.img"), "--verify"])
    assert b"copying" in shown
    assert b"verifying" in shown
    assert b"100%" in shown
    assert on_a_terminal([*command, str(tmp_path / "quiet.img"), "-q"]) == b""


def test_without_a_terminal_nothing_is_printed(copy: Copy, disk: Path, tmp_path: Path) -> None:
    done = copy(disk, tmp_path / "copy.img")
    assert (done.stdout, done.stderr) == ("", "")


def test_json_has_what_was_copied(copy: Copy, disk: Path, tmp_path: Path) -> None:
    done = copy("--json", "--verify", disk, tmp_path / "copy.img")
    assert json.loads(done.stdout) == {
        "source": str(disk),
        "target": str(tmp_path / "copy.img"),
        "size": 3 * M,
        "data": M,
        "zeroes": 2 * M,
        "resumed_at": 0,
        "verified": True,
    }
