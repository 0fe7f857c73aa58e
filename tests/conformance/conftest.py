"""An engine in each of its ways of doing I/O, and a server of NBD on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blkloom import _engine

from .ways_in import NbdHost


@pytest.fixture(params=["auto", "threads"])
def engine(request: pytest.FixtureRequest) -> Iterator[_engine.Engine]:
    engine = _engine.Engine(io=request.param, loops=2)
    yield engine
    engine.close()


@pytest.fixture
def host(engine: _engine.Engine, tmp_path: Path) -> Iterator[NbdHost]:
    host = NbdHost(engine, tmp_path / "nbd.sock")
    yield host
    host.close()
