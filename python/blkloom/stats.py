"""Statistics of a device or an export: counters and latency histograms of the engine.

`Stats.from_engine` types the dict that `Device.stats()` and `Export.stats()` return. Values are
immutable; two snapshots subtract to what happened between them, and those of several devices
merge. Latencies are nanoseconds in log-linear buckets, as in HdrHistogram: exact below 16 ns, then
eight buckets for every power of two, so a bucket is at most 12.5 % of its value wide.
Pure; any thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Final, Self

import msgspec

from blkloom.units import format_size

BUCKETS: Final = 16 + 60 * 8
"""Buckets of a histogram: enough for every 64-bit number."""

PERCENTILES: Final = (50.0, 90.0, 99.0, 99.9)
"""Those that reports show."""


def bucket_of(value: int) -> int:
    """The bucket that counts `value` nanoseconds."""
    if value < 16:
        return value
    exponent = value.bit_length() - 1
    return 16 + (exponent - 4) * 8 + ((value >> (exponent - 3)) & 7)


def bucket_bounds(index: int) -> tuple[int, int]:
    """The least and the greatest number of nanoseconds that bucket `index` counts."""
    if index < 16:
        return index, index
    shift, step = divmod(index - 16, 8)
    return (8 + step) << (shift + 1), ((9 + step) << (shift + 1)) - 1


class Histogram(msgspec.Struct, frozen=True):
    """counts[i] values fell into bucket i. Trailing zeros may be left out."""

    counts: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """How many values."""
        return sum(self.counts)

    def percentile(self, percent: float) -> int:
        """Nanoseconds that `percent` of the values do not exceed (the upper bound of the bucket,
        so it is never too small); 0 when there are none. Raises ValueError outside of 0 to 100.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"percentile {percent} is not from 0 to 100")
        rank = max(1, -int(-self.total * percent // 100))
        for index, count in enumerate(self.counts):
            rank -= count
            if count and rank <= 0:
                return bucket_bounds(index)[1]
        return 0

    @property
    def mean(self) -> float:
        """Nanoseconds on average, from the buckets' middles; 0 when there are none."""
        total = self.total
        return sum(count * sum(bucket_bounds(i)) / 2 for i, count in enumerate(self.counts) if count) / max(1, total)

    @property
    def largest(self) -> int:
        """The upper bound of the greatest value's bucket."""
        return self.percentile(100)

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(tuple(a + b for a, b in zip_longest(self.counts, other.counts, fillvalue=0)))

    def __sub__(self, earlier: Histogram) -> Histogram:
        return Histogram(tuple(max(0, a - b) for a, b in zip_longest(self.counts, earlier.counts, fillvalue=0)))


class OperationStats(msgspec.Struct, frozen=True):
    """One operation: how often it ended, bytes it moved, how often it failed, how long it took."""

    count: int = 0
    bytes: int = 0
    errors: int = 0
    latency: Histogram = Histogram()

    def __add__(self, other: OperationStats) -> OperationStats:
        return OperationStats(
            self.count + other.count,
            self.bytes + other.bytes,
            self.errors + other.errors,
            self.latency + other.latency,
        )

    def __sub__(self, earlier: OperationStats) -> OperationStats:
        return OperationStats(
            self.count - earlier.count,
            self.bytes - earlier.bytes,
            self.errors - earlier.errors,
            self.latency - earlier.latency,
        )


class Stats(msgspec.Struct, frozen=True):
    """operations by name (read, write, flush, discard, write_zeroes, extents, ...), faults that
    went to the mapper, requests in flight when the snapshot was taken, and I/O errors: requests that storage failed,
    where an operation's errors are all that failed. Exports count none of those.
    """

    operations: Mapping[str, OperationStats] = msgspec.field(default_factory=dict)
    faults: int = 0
    in_flight: int = 0
    io_errors: int = 0

    @classmethod
    def from_engine(cls, counters: Mapping[str, Any]) -> Self:
        """Types what the engine returns. Raises KeyError or TypeError if it is something else."""
        operations = {
            name: OperationStats(value["count"], value["bytes"], value["errors"], Histogram(tuple(value["latency"])))
            for name, value in counters.items()
            if name not in ("faults", "in_flight", "io_errors")
        }
        return cls(operations, counters["faults"], counters["in_flight"], counters.get("io_errors", 0))

    def __getitem__(self, operation: str) -> OperationStats:
        """The operation's; zeros if there were none."""
        return self.operations.get(operation, OperationStats())

    def __iter__(self) -> Iterator[str]:
        return iter(self.operations)

    def __add__(self, other: Stats) -> Stats:
        """Of several devices or exports together."""
        return Stats(
            {name: self[name] + other[name] for name in {**self.operations, **other.operations}},
            self.faults + other.faults,
            self.in_flight + other.in_flight,
            self.io_errors + other.io_errors,
        )

    def __sub__(self, earlier: Stats) -> Stats:
        """What happened since `earlier`; requests in flight are those of now."""
        return Stats(
            {name: self[name] - earlier[name] for name in self.operations},
            self.faults - earlier.faults,
            self.in_flight,
            self.io_errors - earlier.io_errors,
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: latencies in nanoseconds, histograms as [least, greatest, count] of the buckets
        that are not empty.
        """
        return {
            "operations": {name: _operation_dict(operation) for name, operation in self.operations.items()},
            "faults": self.faults,
            "in_flight": self.in_flight,
            "io_errors": self.io_errors,
        }

    def to_json(self, *, indent: int | None = None) -> str:
        """`to_dict` as JSON text."""
        import json

        return json.dumps(self.to_dict(), indent=indent)

    def to_text(self, *, seconds: float | None = None) -> str:
        """A table for people, operations that never happened left out. seconds: how long it took,
        for rates.
        """
        rate = ("IOPS", "rate") if seconds else ()
        rows = [("operation", "count", "bytes", "errors", *rate, "mean", *(f"p{p:g}" for p in PERCENTILES), "max")]
        for name, operation in self.operations.items():
            if operation.count:
                rates = _rates(operation, seconds) if seconds else ()
                rows.append((name, *_cells(operation, rates)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        io_errors = f", I/O errors {self.io_errors}" if self.io_errors else ""
        return "\n".join([*lines, f"faults {self.faults}, in flight {self.in_flight}{io_errors}"])


class MemoryUse(msgspec.Struct, frozen=True):
    """What clients make an engine keep: bytes of the budget, bytes reserved, and requests that wait for memory."""

    budget: int
    reserved: int
    waiting: int

    def to_dict(self) -> dict[str, int]:
        """For JSON."""
        return {"budget": self.budget, "reserved": self.reserved, "waiting": self.waiting}

    def to_text(self) -> str:
        """A line for people."""
        waiting = "1 request waits" if self.waiting == 1 else f"{self.waiting} requests wait"
        return f"clients' memory {format_size(self.reserved)} of {format_size(self.budget)}, {waiting} for some"


def format_nanoseconds(value: float) -> str:
    """`"850 ns"`, `"12.3 us"`, `"4.56 ms"`, `"7.89 s"`."""
    for unit in ("ns", "us", "ms"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"


def without_tails(counters: Mapping[str, Any]) -> dict[str, Any]:
    """What the engine returns, as it travels between processes: histograms without the zeros at their
    ends, of which thousands of devices would have megabytes.
    """
    return {
        name: value if isinstance(value, int) else {**value, "latency": _without_tail(value["latency"])}
        for name, value in counters.items()
    }


def _without_tail(counts: Sequence[int]) -> Sequence[int]:
    last = next((index for index in range(len(counts) - 1, -1, -1) if counts[index]), -1)
    return counts[: last + 1]


def _operation_dict(operation: OperationStats) -> dict[str, Any]:
    latency = operation.latency
    return {
        "count": operation.count,
        "bytes": operation.bytes,
        "errors": operation.errors,
        "latency_ns": {
            "mean": round(latency.mean),
            **{f"p{p:g}": latency.percentile(p) for p in PERCENTILES},
            "max": latency.largest,
            "buckets": [[*bucket_bounds(index), count] for index, count in enumerate(latency.counts) if count],
        },
    }


def _rates(operation: OperationStats, seconds: float) -> tuple[str, str]:
    return f"{operation.count / seconds:.0f}", f"{format_size(round(operation.bytes / seconds))}/s"


def _cells(operation: OperationStats, rates: tuple[str, ...]) -> tuple[str, ...]:
    latency = operation.latency
    return (
        str(operation.count),
        format_size(operation.bytes),
        str(operation.errors),
        *rates,
        format_nanoseconds(latency.mean),
        *(format_nanoseconds(latency.percentile(p)) for p in PERCENTILES),
        format_nanoseconds(latency.largest),
    )
