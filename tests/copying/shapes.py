"""Contents of disks to copy: sizes and where the data is."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

Shape = tuple[int, tuple[tuple[int, int, bool], ...]]
"""(size, pieces): each piece is (offset, length, whether it is data: otherwise zeros that are written)."""

K: Final = 1 << 10
M: Final = 1 << 20
SHAPES: Final[dict[str, Shape]] = {
    "empty": (0, ()),
    "a byte": (1, ((0, 1, True),)),
    "a byte less than a sector": (511, ((0, 511, True),)),
    "a sector": (512, ((0, 512, True),)),
    "all a hole": (3 * M + 7, ()),
    "all data": (3 * M + 1000, ((0, 3 * M + 1000, True),)),
    "written zeros": (2 * M, ((0, 2 * M, False),)),
    "the last byte": (70 * M + 1, ((70 * M, 1, True),)),
    "data and holes": (9 * M, ((0, 4 * K, True), (100 * K, 300 * K, True), (M + 4 * K, 4 * K, True), (8 * M, M, True))),
    "zeros in data": (M + 512, ((0, M, True), (64 * K, 64 * K, False), (300 * K + 512, 9 * K, False))),
    "every other block": (2 * M, tuple((at, 4 * K, True) for at in range(0, 2 * M, 8 * K))),
}


def make(path: Path, shape: Shape, seed: int = 1) -> Path:
    """A sparse file with these contents."""
    size, pieces = shape
    chance = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length, data in pieces:
            os.pwrite(file.fileno(), chance.randbytes(length) if data else bytes(length), offset)
    return path


def data_of(path: Path) -> list[tuple[int, int]]:
    """Where a file has data, by SEEK_DATA and SEEK_HOLE: (begin, end)."""
    found: list[tuple[int, int]] = []
    with path.open("rb") as file:
        size, at = os.fstat(file.fileno()).st_size, 0
        while at < size:
            try:
                begin = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: no more data
                break
            at = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            found.append((begin, at))
    return found


Run = Callable[..., str]
"""Runs a command, which must succeed, and returns what it prints."""
