"""Rates per second: computes a row for each device from two samples.

A worker counts from 0 when it starts. If a device has another worker than in the earlier sample, or if a counter is
smaller, the whole count is taken as new (like `rate` in Prometheus). A device without an earlier sample has no rates.
Pure; any thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from blkloom.control.states import DeviceInfo
from blkloom.metrics.sampling import DeviceSample, Sample
from blkloom.stats import Histogram, OperationStats, Stats


@dataclass(frozen=True, slots=True)
class Flow:
    """One operation between two samples: requests and bytes per second, and latencies."""

    iops: float = 0.0
    bandwidth: float = 0.0
    latency: Histogram = field(default_factory=Histogram)

    def percentile(self, percent: float) -> int | None:
        """Nanoseconds; None if nothing happened."""
        return self.latency.percentile(percent) if self.latency.total else None

    def __add__(self, other: Flow) -> Flow:
        return Flow(self.iops + other.iops, self.bandwidth + other.bandwidth, self.latency + other.latency)


@dataclass(frozen=True, slots=True)
class Rates:
    """Reads, writes, and faults per second."""

    read: Flow = Flow()
    write: Flow = Flow()
    faults: float = 0.0

    @property
    def iops(self) -> float:
        """Reads and writes per second."""
        return self.read.iops + self.write.iops

    @property
    def bandwidth(self) -> float:
        """Bytes per second, reads and writes together."""
        return self.read.bandwidth + self.write.bandwidth

    @property
    def p99(self) -> int:
        """The greater 99th percentile of reads and writes; 0 without requests."""
        return max(self.read.percentile(99) or 0, self.write.percentile(99) or 0)

    def __add__(self, other: Rates) -> Rates:
        return Rates(self.read + other.read, self.write + other.write, self.faults + other.faults)


@dataclass(frozen=True, slots=True)
class Row:
    """The row of a device. in_flight and rates: None if unknown."""

    info: DeviceInfo
    in_flight: int | None = None
    rates: Rates | None = None


@dataclass(frozen=True, slots=True)
class Total:
    """The totals of all devices. A request counts only for the device that the client used, not for lower devices.
    rates: None while no device has rates.
    """

    clients: int = 0
    in_flight: int = 0
    size: int = 0
    rates: Rates | None = None


def rows_between(before: Sample | None, now: Sample) -> list[Row]:
    """A row for each device of `now`, by minor number. before: None at the first sample."""
    seconds = now.seconds - before.seconds if before else 0.0
    found = []
    for minor, device in sorted(now.devices.items()):
        earlier = before.devices.get(minor) if before else None
        rates = _rates(earlier, device, seconds) if earlier and seconds > 0 else None
        found.append(Row(device.info, device.stats.in_flight if device.stats else None, rates))
    return found


def happened(before: DeviceSample, now: DeviceSample) -> Stats | None:
    """The counters of a device since `before`; None if one of both is missing."""
    if before.stats is None or now.stats is None:
        return None
    return now.stats if began_anew(before, now) else now.stats - before.stats


def began_anew(before: DeviceSample, now: DeviceSample) -> bool:
    """Whether the counters of `now` have restarted since `before`."""
    if before.stats is None or now.stats is None:
        return True
    if before.info.worker != now.info.worker or now.stats.faults < before.stats.faults:
        return True
    return any(now.stats[name].count < before.stats[name].count for name in before.stats)


def total_of(rows: Iterable[Row]) -> Total:
    """The sum of all rows."""
    clients = in_flight = size = 0
    rates: Rates | None = None
    for row in rows:
        clients += row.info.connections
        in_flight += row.in_flight or 0
        size += row.info.size
        if row.rates is not None:
            rates = row.rates if rates is None else rates + row.rates
    return Total(clients, in_flight, size, rates)


_NOTHING: Final = OperationStats()


def _rates(before: DeviceSample, now: DeviceSample, seconds: float) -> Rates | None:
    if before.stats is None or now.stats is None:
        return None
    start = Stats() if began_anew(before, now) else before.stats

    def flow(name: str) -> Flow:
        # Most devices of many are idle: their histograms are not worth subtracting.
        count = now_stats[name].count - start[name].count
        change = now_stats[name] - start[name] if count else _NOTHING
        return Flow(count / seconds, change.bytes / seconds, change.latency)

    now_stats = now.stats
    return Rates(flow("read"), flow("write"), (now_stats.faults - start.faults) / seconds)
