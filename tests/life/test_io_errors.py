"""I/O errors of a supervised device: in `info`, beside `status`, in the log and in metrics; after restarts and
upgrades.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom.control.client import Client
from conformance.nbd_client import READ, NbdClient

from .conftest import Life, info, read, until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def life(shared: Life) -> Life:
    """The module's."""
    return shared


@pytest.fixture
def failing(client: Client, file: Path, connect: Callable[[str], NbdClient]) -> Callable[[int], None]:
    """`failing(count)`: so many more reads of `disk` fail, for its file has been cut off; and that is known."""
    client.create("disk", table=f"0 16 linear {file} 0")

    def fail(count: int) -> None:
        before = info(client, "disk").io_errors
        os.truncate(file, 4096)
        nbd = connect("disk")
        assert [nbd.ask(READ, 6144, 512).error for _ in range(count)] == [errno.EIO] * count
        until(client, "disk", lambda found: found.io_errors == before + count)
        os.truncate(file, 8192)

    return fail


def said_of(file: Path) -> str:
    return f"read at byte 6144 failed: Input/output error (EIO), file {file}"


def run(blkloom: str, life: Life, *words: str) -> subprocess.CompletedProcess[str]:
    command = [blkloom, "--run-dir", str(life.run_dir), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)


def test_users_find_how_many_there_were_and_the_last(
    blkloom: str, life: Life, file: Path, failing: Callable[[int], None]
) -> None:
    assert "error" not in run(blkloom, life, "info", "disk").stdout
    before = run(blkloom, life, "status", "disk")
    failing(3)
    lines = run(blkloom, life, "info", "disk").stdout.splitlines()
    assert "I/O errors:        3" in lines
    assert f"Last error:        {said_of(file)}" in lines
    after = run(blkloom, life, "status", "disk")
    assert (before.stdout, before.stderr) == (after.stdout, ""), "what dmsetup prints is another"
    assert after.stderr == f"blkloom: device 'disk': 3 I/O errors, the last: {said_of(file)}\n"
    columns = run(blkloom, life, "info", "-c", "--noheadings", "-o", "io_errors,last_io_error", "disk").stdout
    assert columns == f"3:{said_of(file)}\n"
    (found,) = json.loads(run(blkloom, life, "info", "--json", "disk").stdout)
    assert (found["io_errors"], found["last_io_error"]) == (3, said_of(file))
    assert (
        json.loads(run(blkloom, life, "stats", "--json", "disk").stdout)["devices"]["disk"]["device"]["io_errors"] == 3
    )
    metrics = run(blkloom, life, "stats", "--prometheus").stdout
    assert 'blkloom_device_io_errors_total{device="disk"} 3' in metrics.splitlines()
    assert f"device 'disk': {said_of(file)}" in (life.run_dir.parent / "supervisor.log").read_text()


@pytest.mark.parametrize("what", ["a killed worker", "an upgrade", "a killed supervisor"])
def test_they_are_counted_on_after(
    life: Life,
    client: Client,
    file: Path,
    failing: Callable[[int], None],
    connect: Callable[[str], NbdClient],
    what: str,
) -> None:
    failing(2)
    if what == "a killed worker":
        os.kill(info(client, "disk").worker, signal.SIGKILL)
        until(client, "disk", lambda found: found.restarts == 1)
        assert info(client, "disk").io_errors == 2
        read(connect("disk"))  # it is there again
        failing(1)
    elif what == "an upgrade":
        client.upgrade()
    else:
        life.kill()
        life.start()
    with life.client() as again:
        found = info(again, "disk")
    assert (found.io_errors, found.last_io_error) == (3 if what == "a killed worker" else 2, said_of(file))
