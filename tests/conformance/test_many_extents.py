"""Files with very many extents: every access path reports all of them, in any number of requests to the engine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import blkloom
from blkloom import _engine
from blkloom.testing import NbdThread

from .ways_in import WAYS_IN

pytestmark = pytest.mark.timeout(60)

PAGE = 4096
STRETCHES = 40_000
"""More than the engine gathers for one request."""


@pytest.fixture(scope="module")
def engine() -> Iterator[_engine.Engine]:
    engine = _engine.Engine(loops=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def comb(engine: _engine.Engine) -> Iterator[blkloom.Device]:
    """Data in every other page."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        path = Path(directory) / "comb"
        with path.open("wb") as file:
            file.truncate(STRETCHES * PAGE)
            for number in range(0, STRETCHES, 2):
                os.pwrite(file.fileno(), b"x", number * PAGE)
        with blkloom.open(path, engine=engine) as device:
            yield device


@pytest.mark.parametrize("way", WAYS_IN)
def test_extents_cover_the_range_however_many_there_are(
    engine: _engine.Engine, comb: blkloom.Device, tmp_path: Path, way: str
) -> None:
    host = NbdThread(engine, tmp_path / "nbd.sock")
    try:
        with WAYS_IN[way](comb, host) as way_in:
            found = way_in.extents(100, STRETCHES * PAGE - 200, one=False)
            if found is None:
                pytest.skip("simple replies have no block status")
            assert found[0] == (100, PAGE - 100, 0)
            assert found[-1] == ((STRETCHES - 1) * PAGE, PAGE - 100, 3)
            assert found[1:-1] == [(number * PAGE, PAGE, number % 2 * 3) for number in range(1, STRETCHES - 1)]
    finally:
        host.close()
