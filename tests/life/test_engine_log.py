"""Log messages of a worker's engine are in the supervisor's log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lost_rings
from blkloom import _engine
from blkloom.control.client import Client
from conformance.nbd_client import FUA, WRITE, NbdClient
from installed_targets import install_targets

from .conftest import Life, a_life

pytestmark = pytest.mark.timeout(120)

LOSING = """
from blkloom import Extent, LoadedTarget, TargetSpec

class Losing(TargetSpec):
    name = "losing"

    def load(self, context, start, length):
        return LoadedLosing(self, [(0, length, Extent.zero())])

class LoadedLosing(LoadedTarget):
    def message(self, words):
        return f"{lose_rings()} lost"
"""


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Life]:
    try:
        _engine.Engine(io="io_uring").close()
    except OSError as error:
        pytest.skip(f"needs io_uring: {error}")
    source = Path(lost_rings.__file__).read_text() + LOSING
    install_targets(tmp_path, monkeypatch, "losing", source, {"losing": "Losing"})
    with a_life() as life:
        yield life


def test_a_worker_that_loses_its_rings_says_so(
    life: Life, client: Client, file: Path, connect: Callable[[str], NbdClient]
) -> None:
    client.create("disk", table=f"0 8 losing\n8 8 linear {file} 0")
    nbd = connect("disk")
    assert nbd.ask(WRITE, 4096, payload=b"a" * 512, flags=FUA).error == 0
    assert client.message("disk", 0, "lose") != "0 lost"
    assert nbd.ask(WRITE, 4096, payload=b"b" * 512, flags=FUA).error == 0
    life.stop()
    log = (life.run_dir.parent / "supervisor.log").read_text()
    (line,) = (line for line in log.splitlines() if "io_uring_enter" in line)
    assert "WARNING blkloom.engine.core.queue[" in line
    assert "this loop goes on with threads (error=" in line
