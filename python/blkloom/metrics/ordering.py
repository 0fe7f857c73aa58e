"""Sort orders of devices. Failed devices always come first. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Final

from blkloom.metrics.rates import Row


class Order(Enum):
    """A sort order; its value is the word on the command line."""

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
    """Sorts: numbers descending, names ascending; equal ones by name. reverse: the opposite order."""
    by_name = sorted(rows, key=lambda row: row.info.name, reverse=reverse and order is Order.NAME)
    if (number := _NUMBERS.get(order)) is not None:
        by_name.sort(key=number, reverse=not reverse)
    return sorted(by_name, key=lambda row: row.info.state != "FAILED")
