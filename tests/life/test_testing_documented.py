"""The examples of docs/testing.md, run by a separate pytest as written. That on ext4 needs root and FUSE."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conformance.file_systems import needs_root
from faulty_fs import needs_fuse

from .test_testing_fixtures import SECONDS, pytest_command

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"
DISKS, SQLITE, EXT4 = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def outcome(folder: Path, code: str) -> str:
    """The output of a pytest that runs the code."""
    test = folder / "test_example.py"
    test.write_text(code)
    done = subprocess.run(pytest_command(test), capture_output=True, text=True, check=False, timeout=2 * SECONDS)
    return done.stdout + done.stderr


def test_the_short_examples_run() -> None:
    subprocess.run([sys.executable, "-c", DISKS], check=True, timeout=SECONDS)


def test_a_power_cut_shows_which_settings_of_sqlite_lose_data(tmp_path: Path) -> None:
    pytest.importorskip("apsw", reason="apsw is missing (make test-tools)")
    said = outcome(tmp_path, SQLITE)
    assert "5 passed" in said, said


@pytest.mark.usefixtures("ext4_tools")
def test_a_power_cut_shows_it_through_a_mounted_ext4(tmp_path: Path) -> None:
    said = outcome(tmp_path, EXT4)
    assert "2 passed" in said, said


@pytest.fixture
def ext4_tools(program: Callable[[str, str], str]) -> None:
    needs_root("a mounted file system")
    needs_fuse()
    program("mkfs.ext4", "e2fsprogs")
