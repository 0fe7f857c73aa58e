"""The last values of numbers, and a sparkline of them. Pure except `History`, which one thread uses."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

BARS: Final = "▁▂▃▄▅▆▇█"
ASCII_BARS: Final = "_.:-=+*#"


class History:
    """The last `length` values of each key. A key that gets no new value is dropped."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._values: dict[int, deque[float]] = {}

    def add(self, values: Mapping[int, float | None]) -> None:
        """Adds one value for each key. None: unknown; the key keeps its former values."""
        self._values = {key: self._values.get(key) or deque(maxlen=self._length) for key in values}
        for key, value in values.items():
            if value is not None:
                self._values[key].append(value)

    def __getitem__(self, key: int) -> Sequence[float]:
        """The values, oldest first; empty for an unknown key."""
        return tuple(self._values.get(key, ()))


def sparkline(values: Iterable[float], width: int, *, bars: str = BARS) -> str:
    """The last `width` values as bars, right-aligned: the maximum is the tallest bar, 0 the smallest. Other values have
    at least the second smallest bar, to differ from 0.
    """
    shown = list(values)[-width:]
    top = max(shown, default=0.0)
    steps = len(bars) - 1
    return "".join(bars[math.ceil(value / top * steps) if value > 0 else 0] for value in shown).rjust(width)
