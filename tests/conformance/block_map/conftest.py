"""Fixtures: a file system whose files can be mapped, and such a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conformance.backing_files import write_in_extents
from conformance.file_systems import EXT4, XFS, FileSystem, made_on_a_device

SIZE = 1 << 20
SECTORS = SIZE // 512
Program = Callable[[str, str], str]


@pytest.fixture(params=[EXT4, XFS], ids=lambda kind: kind.name, scope="module")
def place(request: pytest.FixtureRequest, program: Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system on a device of its own."""
    kind: FileSystem = request.param
    with made_on_a_device(program, kind, 512, tmp_path_factory.mktemp("place")) as (mounted_at, _):
        yield mounted_at


@pytest.fixture
def file(place: Path) -> Iterator[Path]:
    """Every block written, in several extents."""
    path = place / "f"
    write_in_extents(str(path), os.urandom(SIZE), extents=5)
    yield path
    path.unlink()
