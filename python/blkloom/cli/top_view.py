"""The view of `blkloom top` (sort order, scroll position), and the keys that change it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from blkloom.metrics.ordering import Order

ORDER_KEYS: Final = {"i": Order.IOPS, "b": Order.BANDWIDTH, "l": Order.LATENCY, "n": Order.NAME}
QUIT_KEYS: Final = frozenset({"q", "Q", "\x1b"})
_MOVES: Final = {"k": -1, "up": -1, "j": 1, "down": 1}
_PAGES: Final = {"pageup": -1, "pagedown": 1, " ": 1}


@dataclass(frozen=True, slots=True)
class View:
    """A view: the sort order, whether it is reversed, and the first visible row."""

    order: Order = Order.IOPS
    reverse: bool = False
    first: int = 0

    def after(self, key: str, *, rows: int, page: int) -> View:
        """The view after `key`; unchanged if the key has no meaning. rows: number of devices. page: number of rows that
        fit.
        """
        if (order := ORDER_KEYS.get(key)) is not None:
            return replace(self, order=order, reverse=order is self.order and not self.reverse, first=0)
        if key == "r":
            return replace(self, reverse=not self.reverse, first=0)
        if key in ("home", "end"):
            return replace(self, first=0 if key == "home" else max(0, rows - page))
        by = _MOVES.get(key, 0) + _PAGES.get(key, 0) * page
        return replace(self, first=self.first + by).within(rows, page) if by else self

    def within(self, rows: int, page: int) -> View:
        """Limits the scroll position to the number of rows."""
        first = max(0, min(self.first, rows - page))
        return self if first == self.first else replace(self, first=first)
