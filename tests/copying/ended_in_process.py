"""Copies in the process of the test, which can end them in the middle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from blkloom import builtin_targets, parse_table
from blkloom.copying.ends import End, NewTarget, file_end, table_end
from blkloom.copying.running import Copying, Result, Settings

from .shapes import K, M

SIZE = 3 * M
SHAPE = (SIZE, ((0, 700 * K, True), (M, 900 * K, True), (2 * M + 512, M - 512, True)))
SECTORS = SIZE // 512


class Stop(Exception):
    """Raised by a test in the middle of a copy."""


def end(text: str) -> End:
    """A table as an end."""
    return table_end("the table", parse_table(text, targets=builtin_targets()), {"table": "of the test"})


def new(path: Path, size: int = SIZE) -> NewTarget:
    """A raw file to make."""
    return NewTarget(path=str(path), name=str(path), format="raw", size=size)


def copy_to(
    source: End, target: End | NewTarget, settings: Settings, reached: Callable[[int], None] = lambda _: None
) -> Result:
    """Copies in this process. reached: called with the position at every checkpoint."""
    with Copying(source, settings, lambda _what, done: reached(done), ticking=False) as copying:
        return copying.to(target)


def interrupted(disk: Path, target: Path) -> None:
    """Leaves a copy that was interrupted."""

    def reached(position: int) -> None:
        if position:
            raise Stop

    with pytest.raises(Stop):
        copy_to(file_end(str(disk)), new(target), Settings(requests=1, checkpoint=M // 2, request_size=64 * K), reached)
    assert Path(f"{target}.blkloom-copy").exists()
