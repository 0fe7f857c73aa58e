"""The order in which devices are shown. Failed ones come first, whatever the order. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Final

from blkloom.metrics.rates import Row


class Order(Enum):
    """What devices are sorted by; the value is the word on a command line."""

    IOPS = "iops"
    BANDWIDTH = "bandwidth"
    LATENCY = "latency"
    NAME = "name"


_NUMBERS: Final[Mapping[Order, Callable[[Row], float]]] = {
    Order.IOPS: lambda row: row.rates.iops if row.rates else -1,
    Order.BANDWIDTH: lambda row: row.rates.bandwidth if row.rates else -1,
    Order.LATENCY: lambda row: row.rates.p99 if row.rates else -1,
}


def ordered(rows: Iterable[Row], order: Order, *, reverse: bool = False) -> list[Row]:
    """Numbers from the greatest down, names from a up; reverse: the other way. Equal ones by name."""
    by_name = sorted(rows, key=lambda row: row.info.name, reverse=reverse and order is Order.NAME)
    if (number := _NUMBERS.get(order)) is not None:
        by_name.sort(key=number, reverse=not reverse)
    return sorted(by_name, key=lambda row: row.info.state != "FAILED")
