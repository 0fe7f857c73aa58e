"""Runs of equal neighbours, in arrays and in block status answers. Pure; any thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


def runs_alike(values: NDArray[Any]) -> Iterator[tuple[int, int, int]]:
    """(value, from, to) of runs of equal elements."""
    cuts = (np.flatnonzero(np.diff(values)) + 1).tolist()
    for low, high in zip([0, *cuts], [*cuts, values.size], strict=True):
        yield int(values[low]), low, high


def joined(runs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The runs with equal neighbours merged."""
    length, flags = 0, 0
    for more, value in runs:
        if length and value != flags:
            yield length, flags
            length = 0
        length, flags = length + more, value
    if length:
        yield length, flags
