"""Files that a killed process left immutable are found and made writable by `reap` and by a supervisor that starts."""

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


ATTEMPTS = 10
"""A supervisor of another test may start in between and free the file."""


def abandon(file: Path) -> None:
    """Leaves it immutable, for a process that has gone."""
    for _ in range(ATTEMPTS):
        done = subprocess.run([sys.executable, "-c", HOLD_AND_DIE, file], capture_output=True, text=True, check=False)
        if "not here" in done.stderr:
            pytest.skip("files cannot be made immutable on this file system")
        if not writable(file):
            return
    pytest.fail(f"the file is not left immutable: {done.stderr}")


def writable(file: Path) -> bool:
    try:
        os.close(os.open(file, os.O_RDWR))
    except PermissionError:
        return False
    return True


def test_reap_frees_it_and_says_so(life: Life, file: Path) -> None:
    for _ in range(ATTEMPTS):
        abandon(file)
        with life.client() as client:
            said = client.reap()
        assert writable(file)
        if any(str(file) in line for line in said):
            return
    pytest.fail(f"it does not say so: {said}")


def test_a_supervisor_that_starts_frees_it_and_the_log_says_so(life: Life, file: Path) -> None:
    for _ in range(ATTEMPTS):
        life.stop()
        abandon(file)
        life.start()
        assert writable(file)
        if str(file) in (log := (life.run_dir.parent / "supervisor.log").read_text()):
            return
    pytest.fail(f"the log does not say so: {log}")


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
