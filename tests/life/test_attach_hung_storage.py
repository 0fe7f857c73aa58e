"""Nodes whose worker was killed and cannot end, because its storage hangs: no other worker begins, I/O waits at most
for the recovery time-out, and users of the node can always be freed.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.errors import AttachError
from blkloom.supervisor.group import process_began
from conformance.file_systems import run
from faulty_fs import FaultyFileSystem

from .attached import Program, a_life_with_nodes, ext4, write_and_sync, writing
from .conftest import info, until

pytestmark = pytest.mark.timeout(120)

REFUSED = {os.strerror(number) for number in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)}


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultyFileSystem]:
    """The file system with the file of the device."""
    with FaultyFileSystem(tmp_path / "faulty") as faulty:
        yield faulty


class Hung:
    """The device "disk", whose worker was killed while its storage holds a sync. users: processes that wait for the
    node; the first for that sync, the second for a worker.
    """

    def __init__(self, client: Client, via: str, faulty: FaultyFileSystem, stack: ExitStack) -> None:
        client.create("disk", table=f"0 2048 loop {faulty.file('disk.img', size=1 << 20)}")
        self.node = client.attach("disk", via=via).node
        self.users = [stack.enter_context(writing(self.node.path)) for _ in range(2)]
        faulty.hold("fsync")
        stack.callback(faulty.mend)
        self._begin(self.users[0])
        while not faulty.held():
            pass
        self.worker = info(client, "disk").worker
        os.kill(self.worker, signal.SIGKILL)
        self._begin(self.users[1])

    def _begin(self, user: subprocess.Popen[str]) -> None:
        assert user.stdin is not None
        user.stdin.write("\n")
        user.stdin.flush()

    def say(self) -> list[str]:
        """What the users say, when they have ended."""
        return [user.stdout.read().strip() for user in self.users if user.stdout is not None]


@contextmanager
def control_file_system(*, there: bool) -> Iterator[None]:
    """That of FUSE is mounted where systemd mounts it, or not there."""
    path = "/sys/fs/fuse/connections"
    if there is os.path.ismount(path):
        yield
        return
    change, undo = ["mount", "-t", "fusectl", "none", path], ["umount", path]
    run(*(change if there else undo))
    try:
        yield
    finally:
        run(*(undo if there else change))


@pytest.mark.parametrize(("via", "control"), [("loop", False), ("fuse", False), ("fuse", True)])
def test_io_fails_after_the_recovery_timeout_and_the_event_says_so(
    faulty: FaultyFileSystem, via: str, *, control: bool
) -> None:
    with (
        control_file_system(there=control),
        a_life_with_nodes("--recovery-timeout=0.1") as life,
        life.client() as client,
        ExitStack() as stack,
    ):
        hung = Hung(client, via, faulty, stack)
        with life.client() as waiting:
            waiting.wait("disk", 0)
        found = info(client, "disk")
        assert found.state == "FAILED"
        assert found.reason.startswith(f"its former worker, process {hung.worker}, was killed and has not ended")
        assert set(hung.say()) <= REFUSED
        assert process_began(hung.worker), "no other worker may begin"
        faulty.mend()
        while process_began(hung.worker):
            pass
        client.resume("disk")
        if via == "loop":  # another loop device, soon
            until(client, "disk", lambda found: found.node is not None and found.node.details != hung.node.details)
            until(client, "disk", lambda found: found.node is not None and found.node.path != "")
        run("dd", f"if={hung.node.link}", "of=/dev/null", "count=1", "status=none")
        client.detach("disk")


@pytest.mark.parametrize("via", ["loop", "fuse"])
def test_users_are_freed_before_the_recovery_timeout(faulty: FaultyFileSystem, via: str) -> None:
    with a_life_with_nodes() as life, life.client() as client, ExitStack() as stack:
        hung = Hung(client, via, faulty, stack)
        found = until(client, "disk", lambda found: bool(found.reason))
        assert (found.state, found.restarts) == ("ACTIVE", 0)
        client.detach("disk", force=True)
        assert set(hung.say()) <= REFUSED
        assert process_began(hung.worker), "no other worker may begin"
        assert client.reap() == []
        faulty.mend()
        until(client, "disk", lambda found: found.restarts == 1)
        client.attach("disk", via=via)
        run("dd", f"if={hung.node.link}", "of=/dev/null", "count=1", "status=none")
        client.detach("disk")


@pytest.mark.parametrize("by", ["resume", "detach", "time-out"])
def test_a_suspend_that_waits_for_a_file_system_can_be_cancelled(
    faulty: FaultyFileSystem, program: Program, tmp_path: Path, by: str
) -> None:
    with a_life_with_nodes() as life, life.client() as client, ThreadPoolExecutor(1) as pool:
        client.create("disk", table=f"0 65536 loop {faulty.file('disk.img', size=32 << 20)}")
        node = client.attach("disk", via="loop").node
        with ext4(program, node.path, tmp_path / "m") as place:
            (place / "file").write_bytes(bytes(1 << 16))
            faulty.hold("fsync")
            with life.client() as other:
                suspend = pool.submit(other.suspend, "disk", timeout=1 if by == "time-out" else None)
                try:
                    if by != "time-out":
                        waits = f"waits for the file systems on {node.link}, which "
                        until(client, "disk", lambda found: found.reason.startswith(waits))
                    if by == "resume":
                        client.resume("disk")
                    elif by == "detach":
                        client.detach("disk", force=True)
                    with pytest.raises(AttachError, match=r"the freeze of|not frozen after 1 s") as error:
                        suspend.result()
                finally:
                    faulty.mend()
            assert error.value.errno == (errno.ETIMEDOUT if by == "time-out" else errno.ECANCELED)
            found = info(client, "disk")
            assert (found.state, found.reason) == ("ACTIVE", "")
            if by != "detach":
                write_and_sync(place / "other")  # once it is thawed
