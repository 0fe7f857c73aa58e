"""Fixtures: engines with each kind of I/O, an NBD server on an engine, and file systems for backing files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blkloom import _engine
from blkloom.testing import NbdThread

from .file_systems import FileSystems, Program
from .supervisor_by_hand import Store, Zygote, zygote


@pytest.fixture(params=["auto", "threads"])
def engine(request: pytest.FixtureRequest) -> Iterator[_engine.Engine]:
    engine = _engine.Engine(io=request.param, loops=2)
    yield engine
    engine.close()


@pytest.fixture
def one_loop() -> Iterator[_engine.Engine]:
    """An engine with one event loop."""
    engine = _engine.Engine(loops=1)
    yield engine
    engine.close()


@pytest.fixture
def host(engine: _engine.Engine, tmp_path: Path) -> Iterator[NbdThread]:
    host = NbdThread(engine, tmp_path / "nbd.sock")
    yield host
    host.close()


@pytest.fixture
def store() -> Iterator[Store]:
    """What a supervisor keeps of its workers."""
    store = Store()
    yield store
    store.close()


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Zygote]:
    """For workers of the test's own."""
    with zygote(tmp_path / "run") as started:
        yield started


@pytest.fixture(scope="session")
def file_systems(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileSystems]:
    """Of the kernel's; unmounted and checked when all tests are over."""
    made = FileSystems(program, tmp_path_factory.mktemp("file-systems"))
    yield made
    made.close()
