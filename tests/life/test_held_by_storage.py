"""A killed worker that waits for storage has not ended: no other worker starts, and I/O waits, then fails after a
timeout.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blkloom.control.client import Client
from blkloom.supervisor.group import process_began, still_there
from conformance.nbd_client import FLUSH, WRITE, NbdClient, Style
from faulty_fs import FaultyFileSystem

from .conftest import Life, a_life, info, read, until

DATA = b"written by the one that was killed".ljust(4096, b".")


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultyFileSystem]:
    with FaultyFileSystem(tmp_path / "faulty") as faulty:
        yield faulty


def kill_while_storage_holds_it(life: Life, client: Client, faulty: FaultyFileSystem, stack: ExitStack) -> int:
    """The process id of the worker of "disk", which has a flush under way."""
    path = faulty.file("disk.img", size=1 << 20)
    client.create("disk", table=f"0 2048 loop {path}")
    writer = NbdClient.unix(life.socket("disk"))
    stack.callback(writer.close)
    assert writer.ask(WRITE, 0, payload=DATA).error == 0
    faulty.hold("fsync")
    writer.send(FLUSH)
    while not faulty.held():
        pass
    worker = info(client, "disk").worker
    os.kill(worker, signal.SIGKILL)
    return worker


def has_ended(pid: int) -> bool:
    """Whether no thread of the process is left. A zombie that is not reaped yet has ended."""
    try:
        return os.listdir(f"/proc/{pid}/task") == [str(pid)] and _state(pid) == "Z"
    except FileNotFoundError:
        return True


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_no_worker_takes_the_place_of_a_killed_one_before_it_has_ended(faulty: FaultyFileSystem, life: Life) -> None:
    with life.client() as client, ExitStack() as stack:
        worker = kill_while_storage_holds_it(life, client, faulty, stack)
        found = until(client, "disk", lambda found: bool(found.reason))
        assert found.reason == f"waits for its former worker, process {worker}, which was killed and has not ended"
        assert (found.state, found.restarts) == ("ACTIVE", 0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(str(life.socket("disk")))
        assert not has_ended(worker), "it has not ended"
        assert "at most 300 s" in (life.run_dir.parent / "supervisor.log").read_text()
        faulty.mend()
        found = until(client, "disk", lambda found: found.restarts == 1)
        assert has_ended(worker)
        later = NbdClient(waiting, "", Style.SIMPLE)
        stack.callback(later.close)
        assert read(later, 0, len(DATA)) == DATA
        assert info(client, "disk").reason == ""


def test_a_device_fails_where_its_killed_worker_has_not_ended_in_time_and_can_be_resumed_when_it_has(
    faulty: FaultyFileSystem,
) -> None:
    with a_life("--recovery-timeout=0.1") as life, life.client() as client, ExitStack() as stack:
        worker = kill_while_storage_holds_it(life, client, faulty, stack)
        found = until(client, "disk", lambda found: found.state == "FAILED")
        assert found.reason.startswith(f"its former worker, process {worker}, was killed and has not ended: storage")
        faulty.mend()
        while process_began(worker):
            pass
        assert info(client, "disk").state == "FAILED", "no command has resumed it"
        client.resume("disk")
        later = NbdClient.unix(life.socket("disk"), style=Style.SIMPLE)
        stack.callback(later.close)
        assert read(later, 0, len(DATA)) == DATA


def test_a_process_is_known_by_its_number_and_its_beginning() -> None:
    async def look() -> None:
        child = await asyncio.create_subprocess_exec("sleep", "60")
        began = process_began(child.pid)
        assert still_there("w", child.pid, began + 1) is None
        assert still_there("w", child.pid, 0) is None, "a state file of a former version does not say"
        group = still_there("w", child.pid, began)
        assert group is not None
        assert not await group.wait_for_end(0)
        group.kill()
        assert await group.wait_for_end(60)
        await child.wait()
        assert still_there("w", child.pid, began) is None

    asyncio.run(look())
