"""Files that a killed process left immutable are found and freed: by `reap`, and by a supervisor that starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blkloom.filemap.immutable import hold

from .conftest import Life

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes files immutable"),
]
HOLD_AND_DIE = """
import os, signal, sys
from blkloom.filemap.immutable import hold
fd = os.open(sys.argv[1], os.O_RDWR)
if hold(fd, sys.argv[1]) is None:
    sys.exit("not here")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def abandoned(file: Path) -> Path:
    """Nobody can write to it, and nobody is left who meant that."""
    done = subprocess.run([sys.executable, "-c", HOLD_AND_DIE, file], capture_output=True, text=True, check=False)
    if "not here" in done.stderr:
        pytest.skip("files cannot be made immutable on this file system")
    assert not writable(file), done.stderr
    return file


def writable(file: Path) -> bool:
    try:
        os.close(os.open(file, os.O_RDWR))
    except PermissionError:
        return False
    return True


def test_reap_frees_it_and_says_so(life: Life, abandoned: Path) -> None:
    with life.client() as client:
        said = client.reap()
    assert writable(abandoned)
    assert any(str(abandoned) in line for line in said)


def test_a_supervisor_that_starts_frees_it_and_the_log_says_so(life: Life, abandoned: Path) -> None:
    life.stop()
    life.start()
    assert writable(abandoned)
    assert str(abandoned) in (life.run_dir.parent / "supervisor.log").read_text()


def test_one_that_is_held_stays_as_it_is(life: Life, file: Path) -> None:
    with file.open("r+b") as opened:
        held = hold(opened.fileno(), str(file))
        if held is None:
            pytest.skip("files cannot be made immutable on this file system")
        try:
            with life.client() as client:
                assert not any(str(file) in line for line in client.reap())
            assert not writable(file)
        finally:
            held.release()
    assert writable(file)
