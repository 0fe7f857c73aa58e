"""An engine in each of its ways of doing I/O, a server of NBD on it, and file systems to stand on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blkloom import _engine

from .file_systems import FileSystems, Program
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


@pytest.fixture(scope="session")
def file_systems(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileSystems]:
    """Of the kernel's; unmounted and checked when all tests are over."""
    made = FileSystems(program, tmp_path_factory.mktemp("file-systems"))
    yield made
    made.close()
