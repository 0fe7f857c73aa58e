"""A backing file that does not answer: errors name it, no command hangs, other devices do not wait.

The file is on a FUSE file system (nbdfuse) whose server delays reads for longer than any timeout.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blkloom.errors import DrainError
from conformance.nbd_client import READ, NbdClient, Style
from faulty_fs import needs_fuse

from .conftest import Life

SECTORS = 2048


@pytest.fixture
def stuck(program: Callable[[str, str], str], tmp_path: Path) -> Iterator[Path]:
    """A file whose reads take ten minutes."""
    nbdkit, nbdfuse = program("nbdkit", "nbdkit"), program("nbdfuse", "libnbd-bin")
    fusermount = program("fusermount3", "fuse3")
    needs_fuse()
    mountpoint, mounted = tmp_path / "mnt", tmp_path / "mounted"
    mountpoint.mkdir()
    os.mkfifo(mounted)  # nbdfuse writes its process id there once it is mounted
    slow = [nbdkit, "--filter=delay", "memory", "1M", "rdelay=600"]
    command = [nbdfuse, "-P", str(mounted), str(mountpoint / "disk"), "--socket-activation", *slow]
    with ExitStack() as stack:
        fifo = os.open(mounted, os.O_RDONLY | os.O_NONBLOCK)
        stack.callback(os.close, fifo)
        fuse = subprocess.Popen(command, start_new_session=True)
        stack.callback(fuse.wait, 60)
        stack.callback(os.killpg, fuse.pid, signal.SIGKILL)
        assert select.select([fifo], [], [], 60)[0], "nbdfuse did not come up"
        stack.callback(subprocess.run, [fusermount, "-uz", str(mountpoint)], check=True)
        yield mountpoint / "disk"


def test_a_suspend_names_the_file_that_does_not_answer(life: Life, stuck: Path) -> None:
    with life.client() as client, ExitStack() as stack:
        client.create("slow", table=f"0 {SECTORS} loop {stuck}")
        client.create("other", table=f"0 {SECTORS} zero")
        connected = stack.enter_context(socket.socket(socket.AF_UNIX))
        connected.connect(str(life.socket("slow")))
        reader = NbdClient(connected, "", Style.STRUCTURED)
        stack.callback(reader.close)
        reader.send(READ, 0, 4096)
        with life.client() as watching:
            while watching.stats("slow")["slow"]["device"]["in_flight"] == 0:
                pass
        with pytest.raises(DrainError, match=str(stuck)):
            client.suspend("slow", timeout=0.5)
        (info,) = client.info("slow")
        assert info.state == "ACTIVE", "a suspend that failed leaves the device live"
        client.suspend("other")
        client.resume("other")
        client.remove("other")
        reader.close()
        client.remove("slow", force=True)
        assert client.info() == []
