"""The recent past of numbers, and a line of it as small bars. Pure but for `History`, which one thread owns."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

BARS: Final = "▁▂▃▄▅▆▇█"
ASCII_BARS: Final = "_.:-=+*#"


class History:
    """The last `length` numbers of each key. A key that is not told of any more is forgotten."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._values: dict[int, deque[float]] = {}

    def add(self, values: Mapping[int, float | None]) -> None:
        """One more number a key; None: it is not known, and the key keeps its past."""
        self._values = {key: self._values.get(key) or deque(maxlen=self._length) for key in values}
        for key, value in values.items():
            if value is not None:
                self._values[key].append(value)

    def __getitem__(self, key: int) -> Sequence[float]:
        """Oldest first; empty for a key never told of."""
        return tuple(self._values.get(key, ()))


def sparkline(values: Iterable[float], width: int, *, bars: str = BARS) -> str:
    """The last `width` values, right-aligned, the greatest as the tallest bar and 0 as the smallest.
    What is not 0 is at least the second one, so that a little and nothing differ.
    """
    shown = list(values)[-width:]
    top = max(shown, default=0.0)
    steps = len(bars) - 1
    return "".join(bars[math.ceil(value / top * steps) if value > 0 else 0] for value in shown).rjust(width)
