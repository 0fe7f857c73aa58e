"""A run directory whose path is too long for a socket: its sockets are in a directory with a short name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

import pytest

from blkloom.control.rundir import RunDir
from conformance.nbd_client import WRITE, NbdClient

from .conftest import Life, a_life, info, read, until
from .loop_commands import Loop

Connect: TypeAlias = Callable[[str], NbdClient]
pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def life() -> Iterator[Life]:
    with a_life(name="/".join(["x" * 60] * 3)) as life:
        yield life


@pytest.fixture
def connected(life: Life) -> Iterator[Connect]:
    """`connected(device)`: a client of it, at the address that `info` tells."""
    with ExitStack() as stack:

        def connect(device: str) -> NbdClient:
            with life.client() as client:
                nbd = NbdClient.unix(Path(info(client, device).exports[0].unix), device)
            stack.callback(nbd.close)
            return nbd

        yield connect


def test_devices_live_in_it_as_in_any_other(life: Life, loop: Loop, connected: Connect, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(8192))
    with life.client() as client:
        client.create("ram", table="0 16 ram")
        client.create("above", table="0 8 linear blkloom:ram 8")
        nbd = connected("ram")
        assert nbd.ask(WRITE, 4096, payload=b"w" * 512).error == 0
        assert read(connected("above")) == b"w" * 512
        assert os.path.samefile(info(client, "ram").exports[0].unix, life.socket("ram"))
        client.rename("above", name="upper")
        client.upgrade()
        assert read(nbd, 4096) == b"w" * 512
        assert read(connected("upper")) == b"w" * 512
    assert loop("-f", "--show", tmp_path / "file") == "loop0\n"


def test_workers_and_supervisors_find_each_other_again(life: Life, connected: Connect) -> None:
    with life.client() as client:
        client.create("ram", table="0 16 ram")
        nbd = connected("ram")
        assert nbd.ask(WRITE, 0, payload=b"w" * 512).error == 0
    life.kill()
    life.start()
    assert read(nbd) == b"w" * 512
    with life.client() as client:
        former = info(client, "ram").worker
        os.kill(former, signal.SIGKILL)
        until(client, "ram", lambda found: found.worker not in (0, former))
        assert read(connected("ram")) == b"w" * 512


def test_nothing_of_it_stays_when_the_supervisor_ends(life: Life) -> None:
    sockets = RunDir.at(life.run_dir).sockets
    with life.client() as client:
        client.create("ram", table="0 16 ram")
    assert sockets.stat().st_mode & 0o777 == 0o700
    assert len(os.fsencode(sockets)) < 40
    life.stop()
    assert not sockets.exists()
    assert not life.run_dir.joinpath("dev").is_symlink()
