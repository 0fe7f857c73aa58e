"""Fixtures: `blkloom copy` as a process."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Copy = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def copy(blkloom: str, tmp_path: Path) -> Copy:
    """`copy(words...)`: the result of a command. status: what it must exit with."""

    def run(*words: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
        command = [blkloom, "--run-dir", str(tmp_path / "run"), "copy", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        return done

    return run
